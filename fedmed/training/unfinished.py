"""A round that a site has begun, on its own disk, so that a killed process goes on with it and not from the start."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedmed.config import TrainConfig
from fedmed.durable import write_atomically
from fedmed.errors import DataError
from fedmed.imaging.dataset import Dataset
from fedmed.types import Task


@dataclass(kw_only=True)
class Unfinished:
    """Where the state of a long round is kept, and when it was last written."""

    path: Path
    identify: Callable[[], str]  # a hash of all that decides the round; a state of another task is ignored
    every_s: float
    _saved: float = field(default_factory=time.monotonic)

    @cached_property
    def task(self) -> str:
        """Of the round; computed when it is first needed, as most rounds end before they are saved."""
        return self.identify()

    def load(self) -> tuple[dict[str, float], dict[str, Tensor]] | None:
        """The numbers and the tensors that were saved for this task, or None."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                if facts.pop("task", "") != self.task:
                    return None
                return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        except (OSError, SafetensorError, ValueError):
            return None

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.every_s

    def save(self, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        """Replace what was saved, atomically and durably.

        Raises:
            DataError: the disk is full or read-only.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            facts = json.dumps({"task": self.task, **numbers})
            content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"facts": facts})
            write_atomically(self.path, content, mode=0o600)
        except (OSError, SafetensorError) as error:
            raise DataError.told("the site's state of an unfinished round cannot be written") from error
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Forget the state: the round is over."""
        self.path.unlink(missing_ok=True)


def unfinished(task: Task, data: Dataset, folder: Path | None, train: TrainConfig, part: str) -> Unfinished | None:
    """Where a long round is saved: known again by its settings, number, received weights and patients.

    What the site kept of the rounds before need not be told apart: in a round of this number it is always the same.
    Its patients are not: one may have withdrawn since, or the manifest may list others.

    Args:
        task: of the round.
        data: of the site.
        folder: of the site's state; None = it keeps nothing.
        train: how often to save.
        part: of the round, as several networks may be trained in it.
    """
    if folder is None or train.save_every_s == 0:
        return None

    def identity() -> str:
        digest = hashlib.sha256(f"{task.settings}/{task.round}/{task.layout}/{task.learning_rate_factor}/".encode())
        for vector in (task.weights.parameters, task.weights.buffers, *task.vectors.values()):
            digest.update(np.ascontiguousarray(vector).data)
        digest.update(json.dumps([*map(str, data.patients)]).encode())
        for of_items in (data.rows, data.evaluation, *([] if data.labelled is None else [data.labelled])):
            digest.update(np.ascontiguousarray(of_items).data)
        return digest.hexdigest()

    return Unfinished(path=folder / f"unfinished-{part}.safetensors", identify=identity, every_s=train.save_every_s)
