"""One site, one task: the only way in which fedmed trains or evaluates at a hospital.

`fedmed simulate`, `flwr run` and a real hospital all end in `train_round` and `evaluate_round`; `unmask_round` helps to
open a secure sum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from fedmed.config import RunConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.metrics import Form
from fedmed.training.discretion import for_the_site_alone, one_reason
from fedmed.training.evaluate import evaluation_sums, personal_sums
from fedmed.training.gradients import Correction
from fedmed.training.local_algorithms import FOLLOWS_SERVER, Outcome, Visit, local_algorithm, needs_folder
from fedmed.training.local_algorithms.fedbn import with_own_norms
from fedmed.training.local_algorithms.fine_tune import has_personal_network, personal_training
from fedmed.training.local_baseline import keep_network
from fedmed.training.local_findings import write_findings
from fedmed.training.loop import RoundContext, Trained
from fedmed.training.masking import Part, key_of_site, masked, part_in_sum, seeds_for
from fedmed.training.network import FlatNetwork, resident_network
from fedmed.training.oversight import (
    Permit,
    fewest_of,
    form_of,
    noting_refusals,
    permitted,
    released,
    require_ledger,
    sites_in_a_sum,
)
from fedmed.training.own_patients import OwnPatients, become_personal_, write_personal
from fedmed.training.sampling import Rows
from fedmed.training.site import Site, settings_from, site_data
from fedmed.training.site_privacy import account_of, charge_central, noised_sums
from fedmed.training.site_state import SiteState, resume_reach
from fedmed.training.unfinished import unfinished
from fedmed.types import SMALL, FloatVector, Scalar, Sums, Task, Update


@one_reason
def train_round(task: Task, site: Site) -> Update:
    """Train the received network on the site's own images.

    If the task asks for it, the received network is first evaluated on the patients that the site holds out, so that
    one exchange with the server serves both.

    Raises:
        PolicyRefused, LedgerUnusable: the hospital's policy does not allow it, or its records cannot be used.
        DataError: the site's data cannot be used.
        ModelError: the site builds another network than the server sent weights for.
    """
    _require_kind(task, "train")
    started = time.perf_counter()
    config = settings_from(task.settings)
    permit = _permitted(task, site, config)
    hidden: Part | None = None
    if config.strategy.secure_sum:
        with noting_refusals(permit, of="sum"):
            hidden = part_in_sum(task, site, config, fewest=sites_in_a_sum(permit))
    data, network = _prepared(task, site, config)
    state = _state(task, site, config)
    if state is not None and config.strategy.name in FOLLOWS_SERVER:
        state.forget(after=task.counted.get(site.name, 0), before=task.round)
    kept = state.before(task.round) if state is not None else {}
    _take_up_own_norms_(network, task, config, kept)
    metrics = _held_out_sums(network, data, config, task, permit, site) if task.evaluate else {}
    own = OwnPatients(network=network, data=data, config=config, site=site.name)
    saves = {part: unfinished(task, data, site.state_dir, config.train, part) for part in ("round", "personal")}
    account = account_of(task, site, permit, own, kept) if config.privacy.mode == "dp-sgd" else None
    if config.privacy.mode == "central" and permit is not None:
        charge_central(task, site, permit, own)
    if task.round == 1 and site.state_dir is not None and not site.virtual:
        with for_the_site_alone(site):
            keep_network(site.state_dir, "first", task, task.weights)

    def train(*, correction: Correction | None = None, personal: bool = False) -> Trained:
        context = RoundContext(
            round=task.round,
            plateau=task.learning_rate_factor,
            unfinished=saves["personal" if personal else "round"],
            correction=correction,
        )
        if personal:
            return own.train_(personal_training(config), context)
        return own.train_(config.train, context, account)

    visit = Visit(
        config=config,
        round=task.round,
        plateau=task.learning_rate_factor,
        network=network,
        received=task.weights,
        vectors=task.vectors,
        kept=kept,
        train_=train,
        held_out_loss=partial(own.held_out_loss, form=_form(permit, site, config, data)),
    )
    outcome = local_algorithm(config.strategy)(visit)
    to_keep = {**outcome.kept, **outcome.trained.kept}
    if state is not None and to_keep:
        reach = resume_reach(config.strategy.checkpoint_every, config.strategy.keep_checkpoints)
        state.keep(task.round, to_keep, reach=reach)
    for saved in saves.values():
        if saved is not None:
            saved.clear()
    facts = _facts_of_training(own, outcome, {} if account is None else account.facts(), config, started)
    # How many images its patients have is not for others to know under privacy.
    count = len(own.rows) if config.privacy.mode == "none" else own.people[0]
    update = _update(network, count, metrics, facts, outcome)
    if hidden is not None:
        update = masked(update, task, hidden, config, network.layout)
    return released(update, permit)


@one_reason
def unmask_round(task: Task, site: Site) -> Update:
    """Help to open a secure sum that this site's update is in. Nothing of its data is touched.

    Raises:
        PolicyRefused, LedgerUnusable: the site is in no such sum, or its records cannot be used.
    """
    _require_kind(task, "unmask")
    config = settings_from(task.settings)
    permit = _permitted(task, site, config)
    fewest = sites_in_a_sum(permit)
    with noting_refusals(permit, of="sum"):
        facts = seeds_for(part_in_sum(task, site, config, fewest=fewest), fewest=fewest)
    return released(Update(weights=None, layout=task.layout, num_examples=0, facts=MappingProxyType(facts)), permit)


@one_reason
def evaluate_round(task: Task, site: Site) -> Update:
    """Evaluate the received network on the patients that the site holds out; its weights do not come back.

    Where every site ends with a network of its own, it is made here, evaluated beside the received one, and written to
    the site's disk. A site with a state folder also writes its own findings there, for its own report; neither is sent.
    Under DP-SGD no sum leaves but noised and charged, once in a run.

    Raises:
        PolicyRefused, LedgerUnusable: the hospital's policy does not allow it, or its records cannot be used.
        DataError: the site's data cannot be used.
        ModelError: the site builds another network than the server sent weights for.
    """
    _require_kind(task, "evaluate")
    started = time.perf_counter()
    config = settings_from(task.settings)
    permit = _permitted(task, site, config)
    data, network = _prepared(task, site, config)
    state = _state(task, site, config)
    kept = state.before() if state is not None else {}
    _take_up_own_norms_(network, task, config, kept)
    own = OwnPatients(network=network, data=data, config=config, site=site.name)
    metrics = _held_out_sums(network, data, config, task, permit, site)
    if config.privacy.metrics_epsilon:
        metrics = noised_sums(task, site, permit, own)
    if site.state_dir is not None:
        with for_the_site_alone(site):
            manifest = None if site.dataset else site.manifest
            write_findings(site.state_dir, site.name, manifest, config, data, network, task.round)
        if not site.virtual:
            with for_the_site_alone(site):
                keep_network(site.state_dir, "final", task, network.weights())
    if state is not None and has_personal_network(config.strategy):
        if become_personal_(own, kept) and config.privacy.mode == "none":  # un-noised, it and its metrics stay
            metrics = {**metrics, **personal_sums(_held_out_sums(network, data, config, task, permit, site))}
        write_personal(network, state.personal)
    said = account_of(task, site, permit, own).facts() if config.privacy.mode == "dp-sgd" else {}  # replies may be lost
    facts: dict[str, Scalar] = {**_seconds_since(started, config), **said}
    count = len(own.held_out) if config.privacy.mode == "none" else own.people[1]
    return released(_update(network, count, metrics, facts), permit)


@one_reason
def site_card(task: Task, site: Site) -> dict[str, Scalar]:
    """What a site says of itself before the first round: how many patients and images it brings."""
    config, load = settings_from(task.settings), partial(site_data, site, task.settings)
    _state(task, site, config)  # refuses before the first round
    permitted(task, require_ledger(config, site.oversight, virtual=site.virtual), config, load, kind="card")
    key = key_of_site(task, site, config)
    data = load()
    private = config.privacy.mode != "none"
    trained, judged = data.people(named=private)
    patients = trained + judged if private else len(set(data.patients))
    return {
        "site": site.name,
        "patients": patients,
        "images": patients if private else len(data),  # under DP the number of patients alone is public
        **_left_out(data, private=private, virtual=site.virtual),
        "holds-out": judged > 0,
        "modalities": data.modalities,
        **key,
    }


def _left_out(data: Dataset, *, private: bool, virtual: bool) -> dict[str, Scalar]:
    """How many images cannot be read, and why; nothing of it under privacy.

    At a real hospital no count below `SMALL` is told, nor a total from which one would follow: it is "" then.
    """
    counts = {} if private else data.reasons
    few = not virtual and any(count < SMALL for count in counts.values())
    said = {reason: f"< {SMALL}" if not virtual and count < SMALL else str(count) for reason, count in counts.items()}
    return {
        "unreadable": "" if few else 0 if private else len(data.unreadable),
        "reasons": "; ".join(f"{reason}: {count}" for reason, count in said.items()),
    }


def _require_kind(task: Task, kind: Literal["train", "evaluate", "unmask"]) -> None:
    """What is done is what the policy is asked about, whatever function a message was addressed to."""
    if task.kind != kind:
        raise ConfigError(f"asked to {kind}, by a task of the kind {task.kind}")


def _permitted(task: Task, site: Site, config: RunConfig) -> Permit | None:
    return permitted(task, site.oversight, config, partial(site_data, site, task.settings))


def _prepared(task: Task, site: Site, config: RunConfig) -> tuple[Dataset, FlatNetwork]:
    if site.networks is not None and ":" in config.model.name and config.model.name not in site.networks:
        text = (
            f'this site imports no network "{config.model.name}"; it would have to stand in networks of its site.toml'
        )
        raise ConfigError.told(text)
    torch.set_num_threads(config.train.threads)
    data = site_data(site, task.settings)
    network = resident_network(config, site.device)
    if network.layout.hash != task.layout:
        raise ModelError(
            "the server's network has another layout than the one built here; compare the versions",
            public="the site built another network than the server",
        )
    network.load_(task.weights)
    return data, network


def _form(permit: Permit | None, site: Site, config: RunConfig, data: Dataset) -> Form:
    """In which form evaluations of these data may leave; a policy has counted those held out, else it is done here."""
    few = permit is None and data.people(named=False)[1] < site.min_held_out
    return "none" if few else form_of(permit, site.metrics, config)


def _facts_of_training(
    own: OwnPatients, outcome: Outcome, charged: Mapping[str, Scalar], config: RunConfig, started: float
) -> dict[str, Scalar]:
    """What is told of a training beside its weights."""
    mode = config.privacy.mode
    return {
        "patients": own.people[0],
        **({} if mode == "central" else {"steps": outcome.trained.steps}),  # in a pass they tell how many images
        **({"loss": outcome.trained.loss} if mode == "none" else {}),
        **charged,
        **outcome.facts,
        **_seconds_since(started, config),
    }


def _held_out_sums(
    network: FlatNetwork, data: Dataset, config: RunConfig, task: Task, permit: Permit | None, site: Site
) -> Sums:
    rows: Rows = np.flatnonzero(data.evaluation)
    return evaluation_sums(
        network,
        data,
        rows,
        config.task,
        form=_form(permit, site, config, data),
        centres=task.centres,
        spacing_mm=config.scored_spacing_mm,
        fewest=fewest_of(permit, site.min_held_out),
    )


def _state(task: Task, site: Site, config: RunConfig) -> SiteState | None:
    """What the site kept of this run, where its algorithm or its clipping keeps anything."""
    if not (needs_folder(config.strategy) or config.privacy.adapts_at_sites):
        return None
    return SiteState.of(site.state_dir, name=config.name, task=task)


def _take_up_own_norms_(network: FlatNetwork, task: Task, config: RunConfig, kept: Mapping[str, FloatVector]) -> None:
    if config.strategy.name == "fedbn":
        network.load_(with_own_norms(network, task.weights, kept))


def _seconds_since(started: float, config: RunConfig) -> dict[str, Scalar]:
    """How long a task took; nothing under DP-SGD, where it would tell, un-noised, how many were drawn."""
    return {} if config.privacy.mode == "dp-sgd" else {"seconds": time.perf_counter() - started}


def _update(
    network: FlatNetwork, num_examples: int, metrics: Sums, facts: dict[str, Scalar], outcome: Outcome | None = None
) -> Update:
    return Update(
        weights=outcome.weights if outcome else None,
        layout=network.layout.hash,
        num_examples=num_examples,
        metrics=MappingProxyType(dict(metrics)),
        facts=MappingProxyType(facts),
    )
