"""What a site keeps on its own disk from round to round: one file for every round that a run may come back to."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmed.config import run_identity
from fedmed.durable import write_atomically
from fedmed.errors import ConfigError, DataError
from fedmed.types import FloatVector, Task

FILE = re.compile(r"round-(\d{4,})\.safetensors")
PERSONAL = "personal.safetensors"  # a network of the site's own, tensor by tensor


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """The folder of one run at one site. Nothing in it ever leaves."""

    folder: Path

    @classmethod
    def of(cls, state_dir: Path | None, *, name: str, task: Task) -> SiteState:
        """The state of a run, known again by its number and by the settings that a resumed run keeps.

        The folder bears the whole digest: the server chooses what is digested, and two runs whose digests only begin
        alike are soon found.

        Args:
            state_dir: the site's folder for what it keeps.
            name: the run's, for people who look into that folder.
            task: of the run.

        Raises:
            ConfigError: the site has no such folder.
        """
        if state_dir is None:
            text = (
                "this run needs a folder at the site for what it keeps between rounds, and there is none: "
                "use fedmed simulate, or a site.toml with state-dir"
            )
            raise ConfigError.told(text)
        digest = hashlib.sha256(f"{run_identity(task.settings)}/{task.layout}/{task.run}".encode()).hexdigest()
        return cls(folder=state_dir / f"{name}-{digest}")

    @property
    def run(self) -> str:
        """What tells the run from all others, at this site and at every other: settings, layout and number."""
        return self.folder.name.rpartition("-")[2]

    def before(self, round: int | None = None) -> dict[str, FloatVector]:
        """The newest vectors kept for a round before the given one, or the newest of all; none in the first round.

        A round that is repeated, because its answer was lost or the run was resumed, therefore starts from what it
        started from the first time.

        Raises:
            DataError: they are damaged.
        """
        rounds = [kept for kept in self._rounds() if round is None or kept < round]
        return self._load(rounds[-1]) if rounds else {}

    def forget(self, *, after: int, before: int) -> None:
        """Remove what was kept of the rounds between two: updates that the server has not used.

        No resumed run comes back to them: up to its checkpoint it has used the same updates, and later rounds are new.
        """
        for round in self._rounds():
            if after < round < before:
                (self.folder / f"round-{round:04d}.safetensors").unlink(missing_ok=True)

    @property
    def last_round(self) -> int:
        """The newest round that is kept; 0 if there is none."""
        return max(self._rounds(), default=0)

    def keep(self, round: int, vectors: Mapping[str, FloatVector], *, reach: int) -> None:
        """Keep what a round left behind, atomically and durably.

        Later rounds, which a resumed run goes through again, are removed; so are those that no run can come back to.

        Args:
            round: the round.
            vectors: named flat vectors; empty ones are kept too.
            reach: how many rounds a resumed run may go back.

        Raises:
            DataError: the disk is full or read-only.
        """
        facts = {"facts": _facts(round, vectors)}
        write_durably(self.folder / f"round-{round:04d}.safetensors", vectors, facts)
        kept = self._rounds()
        oldest = max((other for other in kept if other <= round - reach), default=0)
        for other in kept:
            if other > round or other < oldest:
                (self.folder / f"round-{other:04d}.safetensors").unlink(missing_ok=True)

    @property
    def personal(self) -> Path:
        """Where the site's own network is written after the last round."""
        return self.folder / PERSONAL

    def _rounds(self) -> list[int]:
        names = [FILE.fullmatch(path.name) for path in self.folder.glob("round-*.safetensors")]
        return sorted(int(name[1]) for name in names if name)

    def _load(self, round: int) -> dict[str, FloatVector]:
        try:
            with safe_open(self.folder / f"round-{round:04d}.safetensors", framework="np") as file:
                facts = (file.metadata() or {}).get("facts")
                vectors: dict[str, FloatVector] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            vectors, facts = {}, None
        if facts != _facts(round, vectors):
            text = (
                f"what this site kept of round {round} is damaged; without that file it would go on from an older one"
            )
            raise DataError(text, public=f"what this site kept of round {round} is damaged")
        return vectors


def resume_reach(checkpoint_every: int, keep_checkpoints: int) -> int:
    """How many rounds a resumed run may go back: to the oldest checkpoint that the server keeps."""
    return keep_checkpoints * checkpoint_every


def write_durably(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Write a safetensors file; after a crash the old one is there, or the new one whole.

    Raises:
        DataError: the disk is full or read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, dict(facts))
        write_atomically(path, content, mode=0o600)
    except (OSError, SafetensorError) as error:
        text = "what the site keeps between rounds cannot be written"
        raise DataError.told(text) from error


def _facts(round: int, vectors: Mapping[str, FloatVector]) -> str:
    """The round, and CRC-32 over names and values: against torn and rotten files, not against people."""
    value = 0
    for name in sorted(vectors):
        value = zlib.crc32(np.ascontiguousarray(vectors[name]).view(np.uint8).data, zlib.crc32(name.encode(), value))
    return json.dumps({"round": round, "checksum": f"{value:08x}"})
