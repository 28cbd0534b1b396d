"""The hospital's policy, ledger and logs around one task: asked before it, told what leaves after it.

`train_round` and `evaluate_round` call this themselves, so that a simulated hospital and a real one obey the same code.
Whatever cannot be read refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar, cast, get_args

from fedmed.config import RunConfig, StrategyConfig
from fedmed.errors import FedmedError, LedgerUnusable, PolicyRefused
from fedmed.imaging.dataset import Dataset
from fedmed.metrics import is_exact
from fedmed.privacy.accounting import Spent
from fedmed.privacy.audit_log import keep_decision
from fedmed.privacy.egress import Departure, keep_departure, with_head
from fedmed.privacy.keys import SiteKeys, make_keys, read_keys
from fedmed.privacy.ledger import DATABASE, Ledger
from fedmed.privacy.policy import (
    Allowance,
    Asked,
    Decision,
    Form,
    MetricRules,
    PrivacyRules,
    Request,
    SitePolicy,
    decide,
    read_policy,
)
from fedmed.types import Task, Update

Keeper = TypeVar("Keeper")
UNLIMITED = 1e4  # an ε that nobody reaches
NOISE = {
    "none": "no noise: no differential privacy",
    "dp-sgd": "clipped and noised (differential privacy)",
    "central": "no noise here: the server clips and noises (differential privacy of the whole hospital)",
}
OPEN_LEDGERS = 32  # per process; a worker stands for many virtual hospitals


@dataclass(frozen=True, kw_only=True)
class Oversight:
    """Where a site's policy and records lie. The policy is read anew for every task, so that a pause works at once."""

    policy: Path | None  # the site.toml; None = a virtual hospital without one, whose ledger counts and refuses nothing
    folder: Path  # ledger/, audit.jsonl, egress.jsonl
    keys: Path  # a folder apart
    code: str = ""  # hash of the installed fedmed, for the record


@dataclass(frozen=True, kw_only=True)
class Permit:
    """Leave to do one task, and how it must be done."""

    oversight: Oversight
    task: Task
    run: str
    rule: str
    allowance: Allowance
    policy_digest: str  # SHA-256 of the policy that allowed it
    keys: SiteKeys
    ledger: Ledger
    epsilon_before: float
    private: Literal["none", "dp-sgd", "central"]  # where noise is added to what the task trains


def permitted(
    task: Task,
    oversight: Oversight | None,
    config: RunConfig,
    data: Callable[[], Dataset],
    *,
    kind: Asked | None = None,
) -> Permit | None:
    """Ask the hospital's policy whether a task may be done; None where the site has none.

    It is asked before the data are read, which can take hours, and again when their patients are counted. The audit log
    holds the last answer.

    Args:
        task: what the server asks.
        oversight: of the site.
        config: the run, from the task's settings.
        data: gives those of the site.
        kind: of the task, if it is neither training nor evaluation.

    Raises:
        PolicyRefused: it may not; the error names the rule.
        LedgerUnusable: the ledger, a log or a key cannot be used.
        ConfigError: the policy cannot be read.
    """
    if oversight is None:
        return None
    asked, keys = kind or task.kind, site_keys(oversight)
    policy, ledger, decision = _answer(oversight, config, asked)
    if decision.allowed and asked != "unmask":  # no patient is touched again
        policy, ledger, decision = _answer(oversight, config, asked, data())
    digest, bound = _digest(policy.model_dump_json()), ledger.epsilon_rdp
    keep_decision(
        oversight.folder,
        keys,
        decision,
        task=asked,
        run=config.name,
        round=task.round,
        policy=digest,
        settings=_digest(task.settings),
    )
    if decision.allowance is None:
        raise PolicyRefused(decision.reason, rule=decision.rule)
    return Permit(
        oversight=oversight,
        task=task,
        run=config.name,
        rule=decision.rule,
        allowance=decision.allowance,
        policy_digest=digest,
        keys=keys,
        ledger=ledger,
        epsilon_before=bound,
        private=config.privacy.mode,
    )


def _answer(
    oversight: Oversight, config: RunConfig, asked: Asked, data: Dataset | None = None
) -> tuple[SitePolicy, Ledger, Decision]:
    """What the policy and the ledger of this moment say; without data only what does not depend on them."""
    policy = read_policy(oversight.policy) if oversight.policy else _no_policy(config)
    ledger = open_ledger(oversight, policy)
    trained, judged = (None, None) if data is None else data.people(named=config.privacy.mode != "none")
    request = Request(
        run=config.name,
        kind=asked,
        network=config.model.name,
        algorithm=config.strategy.name,
        min_sites=_added_up(config.strategy),
        secure_sum=config.strategy.secure_sum,
        privacy=config.privacy,
        patients=trained,
        held_out_patients=judged,
        moment=datetime.now().astimezone(),
        noised_before=ledger.has_noised_gradients,
    )
    bound = ledger.epsilon_rdp
    quick = Spent(epsilon=bound, accountant="rdp", epsilon_rdp=bound)
    return policy, ledger, decide(policy, request, quick if bound <= policy.privacy.epsilon else ledger.spent())


def _added_up(strategy: StrategyConfig) -> int:
    """How many sites' networks are in the next one, at least. Of a user's own algorithm no site knows more than one."""
    own = ":" in strategy.name and not strategy.secure_sum  # of which the site itself sees to how many are added up
    one = strategy.name == "cyclic" or own or strategy.combine == "krum"
    return 1 if one else strategy.min_sites


def _no_policy(config: RunConfig) -> SitePolicy:
    rules = PrivacyRules(required=False, unit="image", epsilon=UNLIMITED, delta=config.privacy.delta, stable_ids=True)
    return SitePolicy(privacy=rules, metrics=MetricRules(min_patients=0))


def require_ledger(config: RunConfig, keeper: Keeper | None, *, virtual: bool) -> Keeper:
    """Refuse privacy that nobody counts, and at a real hospital noise that can be predicted.

    Args:
        config: the run.
        keeper: what leads to the site's ledger, or None.
        virtual: whether the hospital is one of a simulation.

    Raises:
        PolicyRefused: as said.
    """
    if config.privacy.mode == "dp-sgd" and keeper is None:
        text = "a run with differential privacy needs [policy] in this site's site.toml: its ledger keeps the budget"
        raise PolicyRefused(text, rule="policy.ledger")
    if config.privacy.noise != "secure" and not virtual:
        text = f'privacy.noise = "{config.privacy.noise}" can be predicted; it is for simulation alone'
        raise PolicyRefused(text, rule="privacy.noise")
    return cast(Keeper, keeper)


def keep_refusal(permit: Permit, refusal: PolicyRefused, *, of: str) -> None:
    """Note in the audit log what of an allowed task is refused after all, and why.

    Args:
        permit: of the task.
        refusal: by which rule.
        of: what: "metrics", or "sum".

    Raises:
        LedgerUnusable: the log cannot be written.
    """
    decision = Decision(allowed=False, rule=refusal.rule, reason=str(refusal))
    task = permit.task
    keep_decision(
        permit.oversight.folder,
        permit.keys,
        decision,
        task=of,
        run=permit.run,
        round=task.round,
        policy=permit.policy_digest,
        settings=_digest(task.settings),
    )


def form_of(permit: Permit | None, site: Form, config: RunConfig) -> Form:
    """In which form evaluations may leave: the stricter of site and policy; none under DP, but see `NoisedSums`."""
    if config.privacy.mode != "none":
        return "none"
    forms = [site] if permit is None else [site, permit.allowance.metrics]
    return max(forms, key=get_args(Form).index)


def fewest_of(permit: Permit | None, site: int) -> int:
    """Patients who must have a label, and who must not, for anything of it to leave; `site` without a policy."""
    return site if permit is None else permit.allowance.fewest


@contextmanager
def noting_refusals(permit: Permit | None, *, of: str) -> Iterator[None]:
    """Have the audit log hold what is refused in here.

    Raises:
        PolicyRefused: as it came.
    """
    try:
        yield
    except PolicyRefused as refusal:
        if permit is not None:
            keep_refusal(permit, refusal, of=of)
        raise


def sites_in_a_sum(permit: Permit | None) -> int:
    """How many sites the hospital wants in a secure sum, at least."""
    return 1 if permit is None else permit.allowance.min_sites


def released(update: Update, permit: Permit | None) -> Update:
    """Note what is about to leave, and return it with the ledger's head; what the policy keeps here is taken out.

    Raises:
        LedgerUnusable: the manifest cannot be written; nothing may leave then.
    """
    if permit is None:
        return update
    facts = dict(update.facts)
    if not permit.allowance.training_loss:
        facts.pop("loss", None)
    update = replace(update, facts=MappingProxyType(with_head(facts, permit.ledger.head)))
    departure = Departure(
        task=permit.task.kind,
        run=permit.run,
        round=permit.task.round,
        rule=permit.rule,
        controls=_controls(permit, update),
        epsilon_before=permit.epsilon_before,
        epsilon_after=permit.ledger.epsilon_rdp,
        delta=permit.ledger.delta,
        ledger=permit.ledger.head,
        policy=permit.policy_digest,
        code=permit.oversight.code,
        settings=_digest(permit.task.settings),
    )
    keep_departure(permit.oversight.folder, permit.keys, update, departure)
    return update


def site_keys(oversight: Oversight) -> SiteKeys:
    """The site's keys, made when it has neither keys nor a ledger.

    Raises:
        LedgerUnusable: they are missing beside a ledger, damaged, or others may read them.
    """
    return _keys(oversight.keys, oversight.folder / "ledger" / DATABASE, os.getpid())


@lru_cache(maxsize=OPEN_LEDGERS)
def _keys(folder: Path, ledger: Path, process: int) -> SiteKeys:
    if not folder.exists() and not ledger.exists():
        try:
            return make_keys(folder)
        except LedgerUnusable as error:
            if error.rule != "keys.exist":  # else another process was faster
                raise
    return read_keys(folder)


def open_ledger(oversight: Oversight, policy: SitePolicy) -> Ledger:
    """The site's ledger under a policy, kept open by this process.

    Raises:
        LedgerUnusable: it cannot be used.
    """
    ledger = _ledger(oversight, policy, os.getpid())
    try:
        ledger.refresh()
    except FedmedError:
        _ledger.cache_clear()
        raise
    return ledger


@lru_cache(maxsize=OPEN_LEDGERS)
def _ledger(oversight: Oversight, policy: SitePolicy, process: int) -> Ledger:
    return Ledger.open(oversight.folder / "ledger", keys=site_keys(oversight), policy=policy)


def _controls(permit: Permit, update: Update) -> Sequence[str]:
    """Which technical controls applied to what leaves, in words."""
    if permit.task.kind == "unmask":
        return ["seeds of masks, for one sum alone"]
    allowance = permit.allowance
    form = "as scores of images" if is_exact(update.metrics) else "as histograms"
    if permit.private == "dp-sgd":
        form = "clipped and noised (differential privacy)"
    said = [f"metrics {form}" if update.metrics else "no metrics"]
    said += [] if allowance.training_loss else ["training loss withheld"]
    said += [] if update.masked is None else ["under masks: the server learns a sum of several sites alone"]
    return [*said, NOISE[permit.private]]


def _digest(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()
