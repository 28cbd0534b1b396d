"""How far a federation has come: what is saved with every checkpoint besides the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmed.federated.exchange import Failure


@dataclass
class Progress:
    """The log of the rounds so far, and which network was best. The one thing in a run that changes."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)  # sites that never took part, with the reason
    best_round: int = 0  # 0 = no network was selected yet
    best_value: float | None = None
    stale: int = 0  # evaluations since the best one
    train_s: float = 0.0  # wall time in which sites were at work

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Read what `to_json` wrote; other keys are left alone."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def to_json(self) -> dict[str, Any]:
        """Everything but the log of the rounds, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "rounds"}

    @property
    def round(self) -> int:
        """The last finished round."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    def failures(self) -> list[Failure]:
        """Every time that a site did not do its part."""
        in_rounds = [failure for entry in self.rounds for failure in entry["failed"]]
        return [Failure(site=each["site"], reason=each["reason"]) for each in [*self.absent, *in_rounds]]

    def rounds_joined(self, site: str) -> int:
        """In how many rounds a site's update was used."""
        return sum(site in entry["joined"] for entry in self.rounds)

    def select(self, round: int, value: float | None) -> bool:
        """Note the selection metric of a round's network; True if it is the best so far."""
        if value is not None and (self.best_value is None or value > self.best_value):
            self.best_round, self.best_value, self.stale = round, value, 0
            return True
        self.stale += 1
        return False
