"""Ways to deal patients to virtual hospitals. A patient's images all go to one of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fedmed.errors import ConfigError

LEAST = 2  # patients of a hospital, so that one can be held out
Dealt = dict[str, list[str]]  # hospital to its patients, both sorted


def iid(patients: Sequence[str], *, sites: int, seed: int) -> Dealt:
    """Shuffle and deal evenly: every hospital has the same mixture, up to chance."""
    shuffled = _shuffled(patients, _generator(seed, "iid"))
    return _named([shuffled[place::sites] for place in range(sites)])


def quantity(patients: Sequence[str], *, sites: int, alpha: float, seed: int) -> Dealt:
    """Hospitals of unequal size and equal mixture: shares of the patients ~ Dir(α·1).

    The quantity skew of Li et al. 2022 (arXiv:2102.02079, section 4.3), over patients in place of samples.
    """
    generator = _generator(seed, "quantity")
    shuffled = _shuffled(patients, generator)
    return _named(_mended(_cut(shuffled, generator.dirichlet(np.full(sites, alpha)))))


def dirichlet(classes: Mapping[str, str], *, sites: int, alpha: float, seed: int) -> Dealt:
    """Label skew: for every class the shares of its patients ~ Dir(α·1).

    The distribution-based label imbalance of Li et al. 2022 (arXiv:2102.02079, section 4.1).

    Args:
        classes: patient to class; see `class_of`.
        sites: how many hospitals.
        alpha: the smaller, the more a hospital consists of few classes; 100 is nearly IID.
        seed: of the run.
    """
    generator = _generator(seed, "dirichlet")
    dealt: list[list[str]] = [[] for _ in range(sites)]
    for name in sorted(set(classes.values())):
        members = _shuffled([patient for patient, its in classes.items() if its == name], generator)
        for site, part in zip(dealt, _cut(members, generator.dirichlet(np.full(sites, alpha))), strict=True):
            site.extend(part)
    return _named(_mended(dealt))


def class_of(positive: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """One class per patient for label skew: the rarest label that the patient is positive for, "" without any.

    With several labels a patient counts once; the rarest says most about who they are.

    Args:
        positive: patient to the labels that any of their images is positive for.
    """
    frequency = Counter(label for labels in positive.values() for label in set(labels))
    return {
        patient: min(labels, key=lambda label: (frequency[label], label)) if labels else ""
        for patient, labels in positive.items()
    }


def by_value(values: Mapping[str, Sequence[str]]) -> Dealt:
    """One hospital for each value; a patient goes where most of their images are, on a tie to the first in order."""
    dealt: Dealt = {}
    for patient in sorted(values):
        count = Counter(values[patient])
        dealt.setdefault(min(count, key=lambda value: (-count[value], value)), []).append(patient)
    return dict(sorted(dealt.items()))


def numbered(dealt: Dealt, prefix: str) -> Dealt:
    """The same hospitals under plain names, numbered from the largest, which is `prefix`-1."""
    order = sorted(dealt.items(), key=lambda item: (-len(item[1]), item[0]))
    return {f"{prefix}-{number}": patients for number, (_, patients) in enumerate(order, start=1)}


def _generator(seed: int, scheme: str) -> np.random.Generator:
    digest = hashlib.sha256(f"partition/{scheme}/{seed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _shuffled(patients: Sequence[str], generator: np.random.Generator) -> list[str]:
    ordered = sorted(patients)  # the order of a manifest's rows must not matter
    return [ordered[place] for place in generator.permutation(len(ordered))]


def _cut(patients: Sequence[str], shares: np.ndarray) -> list[list[str]]:
    """Consecutive parts of a list, as large as the shares say."""
    ends = np.round(np.cumsum(shares) * len(patients)).astype(int)
    starts = [0, *ends[:-1]]
    return [list(patients[start:end]) for start, end in zip(starts, ends, strict=True)]


def _mended(dealt: list[list[str]]) -> list[list[str]]:
    """Give hospitals of fewer than `LEAST` patients some of the largest one's: a share can round to nobody."""
    parts = [list(part) for part in dealt]
    if sum(map(len, parts)) < LEAST * len(parts):
        raise ConfigError(_too_few(sum(map(len, parts)), len(parts)))
    for part in parts:
        while len(part) < LEAST:
            part.append(max(parts, key=len).pop())
    return parts


def _named(parts: Sequence[Sequence[str]]) -> Dealt:
    if min(map(len, parts)) < LEAST:
        raise ConfigError(_too_few(sum(map(len, parts)), len(parts)))
    return {f"site-{number}": sorted(part) for number, part in enumerate(parts, start=1)}


def _too_few(patients: int, sites: int) -> str:
    return (
        f"simulation.partition-sites = {sites}, but there are {patients} patients in data.sites; every hospital needs "
        f"{LEAST} at least"
    )
