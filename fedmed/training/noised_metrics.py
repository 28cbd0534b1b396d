"""Metrics of a private run: the noised sums over a site's held-out patients, which leave once, at the end, charged.

reserve → compute → keep → settle → send. Every draw of noise has a charge of its own in the ledger, written before the
patients are looked at. What was drawn is kept on the site's disk before it is sent, and the first of a run to be kept
is the only one that ever leaves: a server that asks again, because an answer was lost or it was killed, is sent the
same numbers, which cost nothing. One that asks about another network is sent none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedmed.config import RunConfig
from fedmed.errors import DataError, LedgerUnusable, PolicyRefused
from fedmed.metrics import NOISE, PATIENTS, SUMS, Form, longest
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.privacy.cohort import Cohort
from fedmed.privacy.grid import grid_of, noised, whole
from fedmed.privacy.noise import NoiseGenerator
from fedmed.training.oversight import Permit, keep_refusal
from fedmed.training.reserving import run_of
from fedmed.training.site_state import write_durably
from fedmed.types import PrivacyEvent, Sums, Task

FEWEST = 2  # held-out patients: a single one is there because a side must not be empty, and who it is tells of others
NETWORK = "network"  # among what is kept: a hash of the network that was judged


@dataclass(frozen=True, kw_only=True)
class NoisedSums:
    """Leave to ask for the sums of one run, and all that they are made with."""

    task: Task
    config: RunConfig
    permit: Permit
    form: Form  # in which the site lets evaluations leave
    cohort: Cohort  # the held-out patients, as the ledger knows them
    source: NoiseGenerator

    def of(self, vectors: Callable[[], NDArray[np.float64]], patients: int) -> Sums:
        """The noised sums, or nothing where policy or ledger let none leave; the audit log then says why.

        Args:
            vectors: gives (patients, values) what each patient adds; called once all is charged.
            patients: who are held out, public by the site's word.

        Raises:
            LedgerUnusable: the ledger or what was kept cannot be used.
            DataError: the disk is full or read-only.
        """
        try:
            self._check(patients)
            return self._kept() or self._released(vectors, patients)
        except PolicyRefused as refusal:
            keep_refusal(self.permit, refusal, of="metrics")
            return {}

    @property
    def path(self) -> Path:
        """Where what leaves is kept."""
        run = run_of(self.config.name, self.task.settings)
        return self.permit.oversight.folder / "metrics" / f"{run}.safetensors"

    def _check(self, patients: int) -> None:
        if "none" in (self.form, self.permit.allowance.metrics):
            raise PolicyRefused("the site lets no metric of this run leave (policy.metrics)", rule="policy.metrics")
        if patients < FEWEST:
            raise PolicyRefused(f"fewer than {FEWEST} patients are held out", rule="metrics.patients")

    def _kept(self) -> Sums | None:
        """What this run has drawn already; None if nothing.

        Raises:
            PolicyRefused: it is of another network.
            LedgerUnusable: it is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="np") as file:
                network = (file.metadata() or {}).get(NETWORK)
                sums: Sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        except (OSError, SafetensorError, ValueError):
            text = "the noised metrics that this site keeps of the run are damaged"
            raise LedgerUnusable(text, rule="metrics.damaged") from None
        if network != self._network():
            raise PolicyRefused("this run has had its metrics, of another network", rule="metrics.once")
        return sums

    def _released(self, vectors: Callable[[], NDArray[np.float64]], patients: int) -> Sums:
        """Charge, compute, keep, settle; if another process was faster, what it kept."""
        event = PrivacyEvent(mechanism="gaussian", noise_multiplier=self._noise_multiplier(), release="metrics")
        run = run_of(self.config.name, self.task.settings)
        reservation = self.permit.ledger.reserve(run, self.task.round, [event], self.cohort)
        bound = longest(self.config.task.kind, len(self.config.task.labels))
        noise = event.noise_multiplier * bound
        grid = grid_of(noise)
        total = whole(clipped(vectors(), bound), grid).sum(axis=0)
        drawn = {
            SUMS: noised(total, noise, grid, self.source),
            NOISE: np.array([noise]),
            PATIENTS: np.array([float(patients)]),
        }
        self._keep(drawn)
        self.permit.ledger.settle(reservation, reservation.events)
        return self._kept() or {}

    def _keep(self, drawn: Sums) -> None:
        """Keep what was drawn, unless something of this run is kept already."""
        own = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        write_durably(own, drawn, {NETWORK: self._network()})
        try:
            os.link(own, self.path)
        except FileExistsError:
            pass  # another process was faster: what it drew leaves, and this is forgotten
        except OSError as error:
            text = "the noised metrics of the run cannot be kept"
            raise DataError.told(text) from error
        finally:
            own.unlink()

    def _noise_multiplier(self) -> float:
        """σ, which hides a patient to `privacy.metrics-epsilon` or less; the site may ask for more."""
        allowance = self.permit.allowance
        epsilon = min(self.config.privacy.metrics_epsilon, allowance.epsilon)
        sigma = noise_multiplier_for(epsilon=epsilon, delta=allowance.delta, sample_rate=1.0, steps=1)
        return max(sigma, allowance.min_noise_multiplier)

    def _network(self) -> str:
        digest = hashlib.sha256(self.task.layout.encode())
        for vector in (self.task.weights.parameters, self.task.weights.buffers):
            digest.update(np.ascontiguousarray(vector).data)
        return digest.hexdigest()


def clipped(vectors: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """(patients, values) v · min(1, bound / ‖v‖) of each patient.

    Args:
        vectors: (patients, values).
        bound: of the L2 norm, fixed before any patient is looked at.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    shortened: NDArray[np.float64] = vectors * (bound / np.maximum(norms, bound))
    return shortened
