"""What the predictions of an experiment amount to: metrics with intervals, and replicates that can be compared.

For every network and place there is an array of replicates, one for each seed and each resample of the place's
patients. All networks of a place are resampled alike, so two of them are compared replicate by replicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.config import RunConfig
from fedmed.errors import DataError
from fedmed.experiments.predictions import SERVER, Judged
from fedmed.metrics import MINIMUM, Difference, interval_ends, over_seeds, paired_difference, replicate, seed_moves
from fedmed.types import SMALL

Array = NDArray[np.float64]
Estimate = dict[str, float | int | None]
UNTOLD: Estimate = {"value": None, "low": None, "high": None, "n": None}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A quantity as it is, and resampled."""

    values: Array  # (S,) of each seed; NaN where undefined
    replicates: Array  # (S, R) of each seed and resample of the patients
    patients: int
    smallest: int  # patients of the smallest place in it; a sum would tell a small one apart
    fewest: float  # of them in the rarer class, for what ranks one class above the other; 0 of a single patient
    highest: float  # value that it can have; the lowest is 0

    @property
    def enough(self) -> bool:
        """Whether there are enough patients to resample."""
        return self.patients >= MINIMUM and self.fewest >= MINIMUM

    @property
    def value(self) -> float:
        """The mean over the seeds."""
        return float(self.values.mean())

    @property
    def by_seed(self) -> list[float | None]:
        """The value of each seed; None where undefined."""
        return [None if np.isnan(value) else float(value) for value in self.values]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The predictions of an experiment, and how they are resampled."""

    config: RunConfig
    judged: Mapping[tuple[str, int], Mapping[str, Judged]]  # by network and seed, then by place
    seeds: tuple[int, ...]

    def drawn(self, network: str, place: str, keep: NDArray[np.bool_] | None = None) -> dict[str, Drawn]:
        """Every metric of a network at a place, or at some of its cases."""
        chosen = [self.judged[network, seed][place] for seed in self.seeds]
        chosen = chosen if keep is None else [cases.select(keep) for cases in chosen]
        everyone = sorted({patient for cases in chosen for patient in cases.patients})
        measures = [cases.measures(self.config.task.labels) for cases in chosen]
        count, values, replicates = self.config.evaluate.bootstrap, [], []
        for cases, each in zip(chosen, measures, strict=True):
            values.append(each.statistic(np.ones((len(cases.row), 1)))[:, 0])  # (K,)
            rng = np.random.default_rng(_number(f"{self.config.split_seed}/{place}"))
            replicates.append(replicate(each.statistic, cases.patients, count, rng, among=everyone))
        value, drawn = np.stack(values), np.stack(replicates)  # (S, K), (S, K, R)
        fewest = np.min([m.fewest(cases.patients) for cases, m in zip(chosen, measures, strict=True)], axis=0)  # (K,)
        return {
            name: Drawn(
                values=value[:, k],
                replicates=drawn[:, k],
                patients=len(everyone),
                smallest=len(everyone),
                fewest=float(fewest[k]) if len(everyone) > 1 else 0.0,
                highest=float(measures[0].highest[k]),
            )
            for k, name in enumerate(measures[0].names)
        }

    def estimate(self, drawn: Drawn, *, suppress: bool = True) -> Estimate:
        """Value and 95 % interval, over patients, and over seeds too where there are several."""
        value = None if np.isnan(drawn.value) else drawn.value
        n = None if suppress and drawn.smallest < SMALL else drawn.patients
        resampled = np.clip(self._over_seeds(drawn), 0, drawn.highest)
        low, high = interval_ends(resampled, enough=value is not None and drawn.enough)
        return {"value": value, "low": low, "high": high, "n": n}

    def difference(self, first: Drawn, second: Drawn, *, test: bool) -> Difference:
        """The first minus the second, in pairs."""
        pair = (self._over_seeds(first), self._over_seeds(second))
        enough = first.enough and second.enough
        return paired_difference((first.value, second.value), pair, test=test, enough=enough)

    def _over_seeds(self, drawn: Drawn) -> Array:
        rng = np.random.default_rng(_number(f"{self.config.split_seed}/seeds"))
        moves = seed_moves(len(self.seeds), drawn.replicates.shape[1], rng)
        return over_seeds(drawn.values, drawn.replicates, moves)


def mean_of(parts: Sequence[Drawn], *, together: bool) -> Drawn:
    """The mean of several quantities, those left out that are undefined, in each replicate anew.

    Args:
        parts: of one metric.
        together: whether they are of different patients, who add up; else they are all of the same.
    """
    add = sum if together else min
    defined = [part for part in parts if not np.isnan(part.values).all()]
    return Drawn(
        values=_mean(np.stack([part.values for part in parts])),
        replicates=_mean(np.stack([part.replicates for part in parts])),
        patients=add(part.patients for part in parts),
        smallest=min(part.smallest for part in parts),
        fewest=min((part.fewest for part in defined), default=0.0),  # each has to bear its own resampling
        highest=parts[0].highest,
    )


def check_paired(judged: Mapping[tuple[str, int], Mapping[str, Judged]]) -> None:
    """Refuse networks that were judged on other patients than another one of the same seed was.

    Raises:
        DataError: they were, which only a data set of the user's own can bring about.
    """
    firsts = {seed: places for (_, seed), places in reversed(list(judged.items()))}
    for (_, seed), places in judged.items():
        first = firsts[seed]
        same = places.keys() == first.keys() and all(
            np.array_equal(places[name].row, first[name].row)
            and np.array_equal(places[name].patient, first[name].patient)
            for name in first
        )
        if not same:
            raise DataError(
                "two runs hold out other patients, so they cannot be compared; a data.dataset of your own has to "
                "choose them by config.split_seed and by nothing else that differs between runs"
            )


def check_same_split(judged: Mapping[tuple[str, int], Mapping[str, Judged]]) -> None:
    """Refuse seeds that were judged on other patients, where the run file asks for one split.

    Raises:
        DataError: they were.
    """
    networks = {network for network, _ in judged}
    for name in networks:
        check_paired({(str(seed), 0): places for (network, seed), places in judged.items() if network == name})


def intervals_of(seeds: int) -> str:
    """How the intervals of an experiment are made."""
    return "bootstrap of patients, Student's t of seeds" if seeds > 1 else "bootstrap of patients"


def site_places(places: Mapping[str, Judged]) -> list[str]:
    """The places that are sites."""
    return [name for name in places if name != SERVER]


def _mean(stack: Array) -> Array:
    """The mean along the first axis without NaN; NaN where all are."""
    defined = ~np.isnan(stack)
    count = defined.sum(axis=0)
    total = np.where(defined, stack, 0).sum(axis=0)
    means: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
