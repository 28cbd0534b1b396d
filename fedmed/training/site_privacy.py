"""What a task costs a site's patients, charged before it is done: DP-SGD, noised metrics, and noise at the server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedmed.config import PrivacyConfig
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.privacy.central import central_events, shared_noise
from fedmed.privacy.cohort import Cohort
from fedmed.privacy.noise import noise_generator
from fedmed.training.coupling import require_fixed_statistics
from fedmed.training.evaluate import patient_vectors
from fedmed.training.noised_metrics import NoisedSums
from fedmed.training.oversight import Permit, require_ledger
from fedmed.training.own_patients import OwnPatients, site_generator
from fedmed.training.reserving import SCHEDULE, charges_of, reserve_round, run_of
from fedmed.training.site_cohort import cohort_of_patients, patients_of
from fedmed.types import FloatVector, PrivacyEvent, Sums, Task

if TYPE_CHECKING:
    from fedmed.training.account import Account
    from fedmed.training.site import Site


def account_of(
    task: Task, site: Site, given: Permit | None, own: OwnPatients, kept: Mapping[str, FloatVector] | None = None
) -> Account:
    """What the round will cost the patients, reserved; without anything kept, what the run has cost so far.

    Raises:
        PolicyRefused, LedgerUnusable: the site has no ledger, or it refuses.
        ModelError: the network has BatchNorm that trains.
        DataError: there is no patient to train on.
    """
    from fedmed.training.account import opened_account  # heavy: opacus
    from fedmed.training.clipping import slow_layers

    if kept is not None:
        require_fixed_statistics(own.network.module)
    permit = require_ledger(own.config, given, virtual=site.virtual)
    cohort = _cohort(site, permit, own, held_out=False)
    seed = int(site_generator(own.config.seed, site.name, task.round).integers(2**62))
    account = opened_account(
        own.config, task.settings, task.round, permit, own.data, own.rows, cohort, seed=seed, kept=kept
    )
    if not site.virtual:
        warning = f"warning: {account.warning}" if account.warning else ""
        for line in filter(None, (warning, slow_layers(own.network.module) if kept is not None else "")):
            print(line, file=sys.stderr, flush=True)  # the site's own log
    return account


def noised_sums(task: Task, site: Site, given: Permit | None, own: OwnPatients) -> Sums:
    """What leaves of an evaluation in a run with `privacy.metrics-epsilon`: see `NoisedSums`.

    Raises:
        PolicyRefused, LedgerUnusable: the site has no ledger, or it cannot be used.
    """
    permit = require_ledger(own.config, given, virtual=site.virtual)
    seed = int(site_generator(own.config.seed, f"{site.name}/metrics", task.round).integers(2**62))
    sums = NoisedSums(
        task=task,
        config=own.config,
        permit=permit,
        form=site.metrics,
        cohort=_cohort(site, permit, own, held_out=True),
        source=noise_generator(own.config.privacy.noise, seed=seed),
    )
    vectors = partial(patient_vectors, own.network, own.data, own.held_out, own.config.task, centres=task.centres)
    return sums.of(vectors, own.people[1])


def charge_central(task: Task, site: Site, permit: Permit, own: OwnPatients) -> None:
    """Write into the hospital's ledger what the server promises to release of this round, before it is trained.

    The site cannot see the server's noise: the charge holds against everybody but the server, and as far as the server
    keeps its word. A patient is charged for a distance of two clips, see `rdp_filter.charged`.

    Raises:
        BudgetExhausted, PolicyRefused, LedgerUnusable: the ledger refuses, or cannot be used.
        ModelError: the network has BatchNorm that trains.
    """
    config = own.config
    require_fixed_statistics(own.network.module)
    cohort, run = _cohort(site, permit, own, held_out=False), run_of(config.name, task.settings)
    charges = charges_of(permit.ledger, run).values()
    planned = next((each.events for each in charges if (each.round, each.cohort) == (SCHEDULE, cohort.name)), ())
    releases = [replace(event, steps=1) for event in planned] or promised_releases(config.privacy, config.train.rounds)
    reserve_round(permit.ledger, run, task.round, releases, cohort, rounds=config.train.rounds)


def promised_releases(privacy: PrivacyConfig, rounds: int) -> tuple[PrivacyEvent, ...]:
    """What a server with these settings releases in a round at most; one that goes through rounds again adds noise."""
    sigma = privacy.noise_multiplier or noise_multiplier_for(
        epsilon=privacy.epsilon, delta=privacy.delta, sample_rate=1.0, steps=rounds, unit="site"
    )
    adaptive = None
    if privacy.clipping == "adaptive":
        sigma, adaptive = shared_noise(sigma, privacy.clip_quantile)
    return central_events(noise_multiplier=sigma, rounds=1, adaptive=adaptive)


def _cohort(site: Site, permit: Permit, own: OwnPatients, *, held_out: bool) -> Cohort:
    manifest = None if site.dataset else site.manifest
    touched = patients_of(own.data, own.held_out if held_out else own.rows)
    idle = {patient for patient, out in own.data.named.items() if out == held_out} - touched
    return cohort_of_patients(touched, manifest, own.config.task, permit, idle=idle)
