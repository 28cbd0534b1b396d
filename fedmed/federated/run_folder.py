"""The run folder: all that a federation leaves behind. A kill at any moment loses a round at most."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedmed.config import RunConfig, to_toml
from fedmed.durable import append, write_all, write_atomically, write_json
from fedmed.errors import RunFailed
from fedmed.models.low_rank import merged
from fedmed.types import FloatVector, Layout, Weights, now

ALONE_S = 5.0  # that a resumed run waits for the processes of a killed one to end


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """Make a new run folder with the resolved configuration.

        Raises:
            RunFailed: the folder exists and holds a file, or cannot be written. Empty folders, and files half
                written, are what a full disk or a kill left of an earlier attempt.
        """
        try:
            if any(not entry.is_dir() and entry.suffix != ".partial" for entry in path.rglob("*")):
                raise RunFailed(f"{path} exists and is not empty; choose another --out")
            for name in ("checkpoints", "sites", "spool"):
                (path / name).mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            write_atomically(path / "run.toml", to_toml(config).encode())
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written ({os.strerror(error.errno or 0)})") from None
        return folder

    @property
    def spool(self) -> Path:
        """Where messages between processes lie; removed at the end."""
        return self.path / "spool"

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """Take up a run folder, whatever moment its last process died at: what was half written is removed."""
        folder = cls(path)
        folder.clear_up()
        for name in ("checkpoints", "sites", "spool"):
            (path / name).mkdir(parents=True, exist_ok=True)
        return folder

    def clear_up(self) -> None:
        """Remove what a killed process left half written, its hospitals' manifests (`virtual_hospitals`) included."""
        for dealt in self.path.glob(".partition-*"):
            shutil.rmtree(dealt, ignore_errors=True)
        for partial in self.path.rglob(".*.partial"):
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.spool, ignore_errors=True)
        cut_torn_line(self.path / "events.jsonl")

    def last_event(self) -> dict[str, Any]:
        """The last line of `events.jsonl`; empty if there is none."""
        path = self.path / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return dict(json.loads(lines[-1])) if lines else {}

    def event(self, kind: str, round: int, **facts: Any) -> dict[str, Any]:
        """Append one line to `events.jsonl` and return it."""
        line = {"time": now(), "round": round, "kind": kind, **facts}
        write_all(self._events, json.dumps(line, allow_nan=False).encode() + b"\n")
        return line

    @cached_property
    def _events(self) -> int:
        path = self.path / "events.jsonl"
        cut_torn_line(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @cached_property
    def _rounds(self) -> int:
        return os.open(self.path / "checkpoints" / "rounds.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def save_checkpoint(
        self,
        round: int,
        weights: Weights,
        state: Mapping[str, FloatVector],
        progress: Mapping[str, Any],
        log: Sequence[Mapping[str, Any]],
        *,
        keep: int = 2,
    ) -> None:
        """Write all that resuming after a round needs. The checkpoint exists once its vectors have their name.

        `state.json` says the same as the newest checkpoint's own file, for readers that want the newest only.

        Args:
            round: the round that ended.
            weights: the global network.
            state: the strategy's vectors.
            progress: what else changes, and is small.
            log: the entries of the rounds since the last checkpoint.
            keep: how many checkpoints stay; the best network stays beside them.
        """
        append(self._rounds, b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in log))
        name = f"round-{round:04d}.safetensors"
        facts = json.dumps({"round": round, "checkpoint": name, **progress}).encode()
        write_atomically((self.path / "checkpoints" / name).with_suffix(".json"), facts)
        vectors = {f"state/{key}": vector for key, vector in state.items()}
        save_vectors(
            self.path / "checkpoints" / name,
            {"parameters": weights.parameters, "buffers": weights.buffers, **vectors},
        )
        write_atomically(self.path / "checkpoints" / "state.json", facts)
        self.prune(keep=keep)

    def prune(self, *, keep: int) -> None:
        """Remove all checkpoints but the last ones, and all networks that were best but those that they name."""
        last = self._checkpoints()[-keep:]
        self._remove("round-*.safetensors", "round-*.json", but={path.stem for path in last})
        self._remove("best-*.safetensors", but=set(map(_best_of, last)))

    def save_best(self, round: int, weights: Weights) -> None:
        """Keep a copy of the best network so far. Of those before, the ones stay that a checkpoint names."""
        name = f"best-{round:04d}"
        save_vectors(
            self.path / "checkpoints" / f"{name}.safetensors",
            {"parameters": weights.parameters, "buffers": weights.buffers},
        )
        self._remove("best-*.safetensors", but={name, *map(_best_of, self._checkpoints())})

    def _remove(self, *kinds: str, but: Collection[str]) -> None:
        for path in [path for kind in kinds for path in (self.path / "checkpoints").glob(kind)]:
            if path.stem not in but:
                path.unlink()

    def best(self, round: int) -> Weights:
        """The network kept by `save_best`."""
        vectors = load_file(self.path / "checkpoints" / f"best-{round:04d}.safetensors")
        return Weights(parameters=vectors["parameters"], buffers=vectors["buffers"])

    def checkpoint(self) -> tuple[dict[str, Any], Weights, dict[str, FloatVector]] | None:
        """The last checkpoint that is whole: progress, weights, strategy state; None if there is none yet.

        The log of the rounds, "rounds" in the progress, is a file that grows by a line a round. What a killed process
        wrote there after the last complete checkpoint is cut off.

        Raises:
            RunFailed: there are checkpoints, but none can be read.
        """
        candidates = self._checkpoints()
        for path in reversed(candidates):
            try:
                facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                vectors = load_file(path)
                facts["rounds"] = self._rounds_until(facts["round"])
            except (OSError, SafetensorError, KeyError, ValueError):
                continue
            state = {key.removeprefix("state/"): vector for key, vector in vectors.items() if key.startswith("state/")}
            return facts, Weights(parameters=vectors["parameters"], buffers=vectors["buffers"]), state
        if candidates:
            raise RunFailed(f"{self.path}: none of its {len(candidates)} checkpoints can be read")
        (self.path / "checkpoints" / "rounds.jsonl").unlink(missing_ok=True)  # of a first checkpoint that was cut off
        return None

    def _rounds_until(self, last: int) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        end = 0
        with (self.path / "checkpoints" / "rounds.jsonl").open("rb+") as file:
            while last and (not entries or entries[-1]["round"] < last):
                entries.append(json.loads(file.readline()))
                end = file.tell()
            file.truncate(end)
        return entries

    def _checkpoints(self) -> list[Path]:
        """The files in `checkpoints/`, by round."""
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), key=number_of)

    def save_model(self, weights: Weights, layout: Layout, facts: Mapping[str, Any]) -> None:
        """Write the global network tensor by tensor, and how to build it."""
        tensors: dict[str, Any] = {}
        for entries, vector in ((layout.parameters, weights.parameters), (layout.buffers, weights.buffers)):
            for entry in entries:
                tensor = vector[entry.span].reshape(entry.shape)
                tensors[entry.name] = np.asarray(tensor.astype(np.int64) if entry.integer else tensor, order="C")
        save_vectors(self.path / "model.safetensors", merged(tensors))
        write_atomically(self.path / "model.json", json.dumps(facts, indent=2).encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically; NaN is an error, undefined values are null."""
        write_json(self.path / name, value)

    def close(self) -> None:
        """Remove the messages of the run and close its logs; a further event opens them again."""
        shutil.rmtree(self.spool, ignore_errors=True)
        for log in ("_events", "_rounds"):
            if log in self.__dict__:
                os.close(self.__dict__.pop(log))


def take_lock(folder: Path) -> int | None:
    """Take the lock of a run's folder, which its one writer holds: a descriptor to keep open, None if another has it.

    On a file system without locks everybody has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one process that writes a run's folder.

    Raises:
        RunFailed: another process is.
    """
    deadline = time.monotonic() + ALONE_S
    while (descriptor := take_lock(folder)) is None:  # workers of a killed process hold it until they have ended
        if time.monotonic() > deadline:
            raise RunFailed(f"{folder}: another process still trains this run; wait for its end, or end it")
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(descriptor)


def stamped(*parts: str) -> str:
    """What a new run folder is called: the present second in UTC, and these."""
    second = now()[:19].replace(":", "").replace("-", "")
    return "-".join((second, *parts)).replace(" ", "-")


def folder_of(runs: Path, series: int) -> Path | None:
    """The run folder of a Flower series; None if there is none."""
    found = next(runs.glob(f"*-{series}/run.toml"), None)
    return found.parent if found is not None else None


def _best_of(checkpoint: Path) -> str:
    """The stem of the file of the network that was best at a checkpoint; best-0000 if none is told."""
    try:
        round = int(json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8")).get("best_round", 0))
    except (OSError, ValueError):
        round = 0
    return f"best-{round:04d}"


def number_of(path: Path) -> int:
    """The round in the name of a checkpoint."""
    return int(path.stem.rpartition("-")[2])


def save_vectors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically and durably."""
    write_atomically(path, save(dict(tensors)))


def cut_torn_line(path: Path) -> None:
    """Remove what a killed process left of its last line."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
