"""Who a task touched: the set of patients, whatever file named them and whatever they were called there.

A patient is known again by keyed digests: of the id in the manifest, and of each picture's decoded pixels, because the
same export under new pseudonyms gives new ids and the same pictures. Whoever shares one digest is one person: a
renamed, subsetted, joined or re-pseudonymised manifest meets the budget that its patients have spent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedmed.errors import LedgerUnusable
from fedmed.privacy.keys import DIGEST_BYTES, SiteKeys

EVERYONE = "everyone"  # the cohort that stands for the whole site
Digests = NDArray[np.void]  # (n,) of 16 bytes each


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A set of patients as digests, or the whole site.

    Attributes:
        name: SHA-256 over the members, hexadecimal; `everyone` = the whole site.
        members: for every patient the number of digests, four bytes, and the digests, both in order.
    """

    name: str
    members: bytes = field(repr=False)
    meant: int = 0  # patients whom the task is about, where the cohort stands for the whole site

    @classmethod
    def of_members(cls, members: bytes) -> Cohort:
        """The cohort with these members, as they are stored."""
        return cls(name=hashlib.sha256(members).hexdigest(), members=members)

    @property
    def is_everyone(self) -> bool:
        """Whether it stands for all patients of the site, also those that no manifest has named yet."""
        return self.name == EVERYONE

    @property
    def patients(self) -> int:
        """How many ids it holds; of the whole site, how many the task is about."""
        return self.meant if self.is_everyone else len(self.counts)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(patients,) digests of each patient.

        Raises:
            LedgerUnusable: the members are no members.
        """
        counts, place = [], 0
        while place < len(self.members):
            counts.append(int.from_bytes(self.members[place : place + 4]))
            place += 4 + counts[-1] * DIGEST_BYTES
            if not counts[-1] or place > len(self.members):
                raise LedgerUnusable("a cohort of the ledger is damaged", rule="ledger.cohort")
        return np.array(counts, np.int64)

    @cached_property
    def digests(self) -> Digests:
        """(n,) all digests, patient after patient."""
        starts = np.concatenate([[0], np.cumsum(4 + self.counts * DIGEST_BYTES)])
        parts = [self.members[start + 4 : end] for start, end in pairwise(starts.tolist())]
        return np.frombuffer(b"".join(parts), np.dtype((np.void, DIGEST_BYTES)))


def cohort_of(patients: Mapping[str, Iterable[bytes]], keys: SiteKeys, *, stable_ids: bool = False) -> Cohort:
    """The cohort of these patients.

    Args:
        patients: for each id the fingerprints of its pictures' decoded pixels.
        keys: of the site.
        stable_ids: whether the hospital vouches that a person always has the same id here. Otherwise a patient
            without fingerprints could not be known again, and the whole site is charged.
    """
    if not patients:
        return everyone()
    members = []
    for patient, fingerprints in patients.items():
        pictures = {keys.link("pixels", fingerprint) for fingerprint in fingerprints}
        if not pictures and not stable_ids:
            return everyone(len(patients))
        digests = sorted({keys.link("patient", patient.encode()), *pictures})
        members.append(len(digests).to_bytes(4) + b"".join(digests))
    return Cohort.of_members(b"".join(sorted(members)))


def everyone(meant: int = 0) -> Cohort:
    """The whole site, for a task about so many patients."""
    return Cohort(name=EVERYONE, members=b"", meant=meant)


def persons(cohorts: Sequence[Cohort]) -> NDArray[np.int64]:
    """(persons, cohorts) how often each person is in each cohort, equal rows once.

    A person is all patients of all cohorts that are connected by shared digests. Who is twice in one cohort, under two
    ids, contributes twice to it.
    """
    if not any(cohort.patients for cohort in cohorts):
        return np.zeros((0, len(cohorts)), np.int64)
    of_cohort = np.repeat(np.arange(len(cohorts)), [cohort.patients for cohort in cohorts])  # (patients,)
    counts = np.concatenate([cohort.counts for cohort in cohorts])
    _, digest = np.unique(np.concatenate([cohort.digests for cohort in cohorts]), return_inverse=True)
    patient = np.repeat(np.arange(len(counts)), counts)
    nodes = len(counts) + int(digest.max()) + 1
    edges = coo_array((np.ones(len(digest), np.int8), (patient, len(counts) + digest)), shape=(nodes, nodes))
    person = connected_components(edges, directed=False)[1][: len(counts)]
    _, person = np.unique(person, return_inverse=True)
    table = np.zeros((int(person.max()) + 1, len(cohorts)), np.int64)
    np.add.at(table, (person, of_cohort), 1)
    return np.unique(table, axis=0)
