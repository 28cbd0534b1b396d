"""The run folder: all that a federation leaves behind. A kill at any moment loses a round at most."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from fedmed.config import RunConfig, to_toml
from fedmed.errors import RunFailed
from fedmed.types import FloatVector, Layout, Weights

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """Make a new run folder with the resolved configuration.

        Raises:
            RunFailed: the folder exists and is not empty, or cannot be written.
        """
        try:
            if path.exists() and any(path.iterdir()):
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

    def event(self, kind: str, round: int, **facts: Any) -> dict[str, Any]:
        """Append one line to `events.jsonl` and return it."""
        line = {"time": now(), "round": round, "kind": kind, **facts}
        os.write(self._events, json.dumps(line, allow_nan=False).encode() + b"\n")
        return line

    @cached_property
    def _events(self) -> int:
        return os.open(self.path / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

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
    ) -> None:
        """Write all that resuming after a round needs.

        Args:
            round: the round that ended.
            weights: the global network.
            state: the strategy's vectors.
            progress: what else changes, and is small.
            log: the entries of the rounds since the last checkpoint.
        """
        name = f"round-{round:04d}.safetensors"
        vectors = {f"state/{key}": vector for key, vector in state.items()}
        save_vectors(
            self.path / "checkpoints" / name,
            {"parameters": weights.parameters, "buffers": weights.buffers, **vectors},
        )
        lines = b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in log)
        os.write(self._rounds, lines)
        os.fsync(self._rounds)
        facts = {"round": round, "checkpoint": name, **progress}
        write_atomically(self.path / "checkpoints" / "state.json", json.dumps(facts).encode())
        for old in sorted((self.path / "checkpoints").glob("round-*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def save_best(self, weights: Weights) -> None:
        """Keep a copy of the best network so far."""
        save_vectors(
            self.path / "checkpoints" / "best.safetensors",
            {"parameters": weights.parameters, "buffers": weights.buffers},
        )

    def best(self) -> Weights:
        """The network kept by `save_best`."""
        vectors = load_file(self.path / "checkpoints" / "best.safetensors")
        return Weights(parameters=vectors["parameters"], buffers=vectors["buffers"])

    def checkpoint(self) -> tuple[dict[str, Any], Weights, dict[str, FloatVector]] | None:
        """The last checkpoint: progress, weights, strategy state; None before the first round ended.

        The log of the rounds, "rounds" in the progress, is a file that grows by a line a round. What a killed process
        wrote there after the last complete checkpoint is cut off.
        """
        index = self.path / "checkpoints" / "state.json"
        if not index.exists():
            return None
        facts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        facts["rounds"] = self._rounds_until(facts["round"])
        vectors = load_file(self.path / "checkpoints" / facts["checkpoint"])
        state = {key.removeprefix("state/"): vector for key, vector in vectors.items() if key.startswith("state/")}
        return facts, Weights(parameters=vectors["parameters"], buffers=vectors["buffers"]), state

    def _rounds_until(self, last: int) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        end = 0
        with (self.path / "checkpoints" / "rounds.jsonl").open("rb+") as file:
            while not entries or entries[-1]["round"] < last:
                entries.append(json.loads(file.readline()))
                end = file.tell()
            file.truncate(end)
        return entries

    def save_model(self, weights: Weights, layout: Layout, facts: Mapping[str, Any]) -> None:
        """Write the global network tensor by tensor, and how to build it."""
        tensors: dict[str, Any] = {}
        for entries, vector in ((layout.parameters, weights.parameters), (layout.buffers, weights.buffers)):
            for entry in entries:
                tensor = vector[entry.span].reshape(entry.shape)
                tensors[entry.name] = np.asarray(tensor.astype(np.int64) if entry.integer else tensor, order="C")
        save_vectors(self.path / "model.safetensors", tensors)
        write_atomically(self.path / "model.json", json.dumps(facts, indent=2).encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically; NaN is an error, undefined values are null."""
        write_atomically(self.path / name, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Remove the messages of the run and close its logs; a further event opens them again."""
        shutil.rmtree(self.spool, ignore_errors=True)
        for log in ("_events", "_rounds"):
            if log in self.__dict__:
                os.close(self.__dict__.pop(log))


def now() -> str:
    """The present time as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, durably: either the old or the new one is there after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_vectors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically and durably."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(tensors), partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
