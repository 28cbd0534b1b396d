"""How far a federation has come: what is saved with every checkpoint besides the vectors."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedmed.federated.exchange import Failure
from fedmed.federated.member import NOWHERE, Member


@dataclass
class Progress:
    """The log of the rounds so far, which network was best, and who missed what. The one thing in a run that changes.

    A resumed run takes all of it up again, so that its result counts what happened before.
    """

    run: str = field(default_factory=lambda: secrets.token_hex(8))  # tells it from others with the same settings
    members: dict[str, Member] = field(default_factory=dict)  # every site that ever joined, by name
    rounds: list[dict[str, Any]] = field(default_factory=list)  # that ended with a new network
    broken: list[dict[str, Any]] = field(default_factory=list)  # that missed the quorum; each paused the run
    absent: list[dict[str, str]] = field(default_factory=list)  # sites that took no part outside rounds, and why
    missed: dict[str, int] = field(default_factory=dict)  # rounds in a row without an answer, by site
    away: dict[str, int] = field(default_factory=dict)  # sites no longer asked; the round that greets them again
    best_round: int = 0  # 0 = no network was selected yet
    best_value: float | None = None
    stale: int = 0  # evaluations since the best one that gave a value
    falls: int = 0  # of the learning rate, under a plateau schedule
    centres: list[float] = field(default_factory=list)  # of the last evaluation; see Task.centres
    privacy: dict[str, Any] = field(default_factory=dict)  # by site: what it last said of its patients' budget
    train_s: float = 0.0  # wall time in which sites were at work
    total_s: float = 0.0  # wall time until the last checkpoint, in all processes that the run has had

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Read what `to_json` wrote; other keys are left alone. No member is connected yet."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        members = {name: _absent(card) for name, card in values.get("members", {}).items()}
        return cls(**{**known, "members": members})

    def to_json(self) -> dict[str, Any]:
        """Everything but the log of the rounds, ready for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "rounds"}
        return {**values, "members": {name: asdict(member) for name, member in self.members.items()}}

    @property
    def round(self) -> int:
        """The last finished round."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def log(self) -> list[dict[str, Any]]:
        """The finished rounds, and a last one that paused the run if nothing came after it."""
        return [*self.rounds, *(entry for entry in self.broken[-1:] if entry["round"] > self.round)]

    def spent(self, site: str, privacy: dict[str, Any] | None) -> None:
        """Note what a site says of its patients' budget, if anything."""
        if privacy is not None:
            self.privacy[site] = privacy

    def failures(self) -> list[Failure]:
        """Every time that a site did not do its part."""
        in_rounds = [failure for entry in [*self.rounds, *self.broken] for failure in entry["failed"]]
        return [Failure(site=each["site"], reason=each["reason"]) for each in [*self.absent, *in_rounds]]

    def note_absent(self, failures: Sequence[Failure]) -> None:
        """Remember sites that could take no part; a resumed run that finds the same again counts it once."""
        self.absent += [asdict(failure) for failure in failures if asdict(failure) not in self.absent]

    def rounds_joined(self, site: str) -> int:
        """In how many rounds a site's update was used."""
        return sum(site in entry["joined"] for entry in self.rounds)

    def last_joined(self) -> dict[str, int]:
        """By site, the last finished round in which its update was used."""
        return {site: int(entry["round"]) for entry in self.rounds for site in entry["joined"]}

    def select(self, round: int, value: float | None, *, plateau_patience: int) -> bool:
        """Note the selection metric of a round's network, if there is one; True if it is the best so far.

        Every `plateau_patience` evaluations without improvement the learning rate falls, and does not rise again.
        """
        if value is None:
            return False
        if self.best_value is None or value > self.best_value:
            self.best_round, self.best_value, self.stale = round, value, 0
            return True
        self.stale += 1
        self.falls += self.stale % plateau_patience == 0
        return False

    def pause(self, entry: dict[str, Any]) -> None:
        """Note a round that missed the quorum. Whoever resumes has seen to the sites: all of them start afresh."""
        self.broken.append(entry)
        self.missed.clear()
        self.away.clear()


def _absent(card: Mapping[str, Any]) -> Member:
    return Member(**{**card, "node": NOWHERE, "masking": tuple(card["masking"])})
