"""A hospital's policy: the part `[policy]` of its site.toml, and the one function that applies it.

The hospital writes it, no server ever sees or overrides it, and where run and site disagree the stricter one wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedmed.config import PrivacyConfig, Section, checked, read_toml
from fedmed.privacy.accounting import Spent

Form = Literal["exact", "histogram", "none"]
HOURS = re.compile(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d")


def _hours(value: str) -> str:
    if not HOURS.fullmatch(value):
        raise ValueError('expected hours as "HH:MM-HH:MM", in the site\'s own time')
    return value


Hours = Annotated[str, AfterValidator(_hours)]


Asked = Literal["card", "train", "evaluate", "unmask"]  # `card`: who the site is, and how many patients it has


class TrainingRules(Section):
    """Which runs may train here."""

    networks: Annotated[tuple[str, ...], Field(description="names of `model.name` that are allowed; empty = all")] = ()
    algorithms: Annotated[
        tuple[str, ...], Field(description="names of `strategy.name` that are allowed; empty = all")
    ] = ()
    min_patients: Annotated[int, Field(ge=0, description="patients to train on, below which the site stays out")] = 0
    min_sites: Annotated[
        int,
        Field(
            ge=1,
            description="hospitals whose updates a run must add up, by its `strategy.min-sites`; with `cyclic`, "
            "`krum` and algorithms of the user's own it is taken to be one; in a secure sum the site sees to it itself",
        ),
    ] = 1
    secure_sum: Annotated[
        bool, Field(description="whether the server may see nothing of the trained network but a sum of several sites'")
    ] = False


class MetricRules(Section):
    """What of an evaluation of the site's patients may leave."""

    form: Annotated[
        Form,
        Field(description="`exact`: label and score of every image; `histogram`: sums and histograms; `none`: nothing"),
    ] = "histogram"
    min_patients: Annotated[
        int,
        Field(
            ge=0,
            description="held-out patients, below which no metric leaves; and below which, of those with a label, and "
            "in a classification of those without it, nothing of that label does",
        ),
    ] = 10
    training_loss: Annotated[bool, Field(description="whether the mean loss of training may leave")] = True


class PrivacyRules(Section):
    """The patients' budget, and what a run must do to spend it."""

    required: Annotated[
        bool,
        Field(
            description="whether a run without differential privacy is refused. Write true where the hospital agreed "
            "to private runs: a coordinator may ask for the same run without noise. Not written = from the first "
            "private run on"
        ),
    ] = False
    unit: Annotated[
        Literal["patient", "image"],
        Field(description="least that a run must protect; `image` also allows runs that protect single images"),
    ] = "patient"
    epsilon: Annotated[float, Field(gt=0, description="ε that no patient's budget exceeds, over all runs")] = 8.0
    delta: Annotated[
        float, Field(gt=0, lt=1, description="the site's one δ; fixed when its ledger is opened, and below 1/patients")
    ] = 1e-6
    min_noise_multiplier: Annotated[
        float, Field(ge=0, description="σ below which no release is allowed, whatever its ε")
    ] = 0.0
    stable_ids: Annotated[
        bool, Field(description="whether the hospital vouches that a person always has the same `patient_id`")
    ] = False
    witness: Annotated[
        str, Field(description="a folder for a copy of the ledger's records, best elsewhere; empty = beside it")
    ] = ""


class Approval(Section):
    """What the hospital's committee agreed to."""

    purpose: Annotated[str, Field(description="what for, for people; it is shown and never sent")] = ""
    expires: Annotated[
        date | Literal[""], Field(description='last day on which the site takes part, such as 2027-06-30; "" = no end')
    ] = ""
    runs: Annotated[
        tuple[str, ...], Field(description="values of `name` of the runs that are allowed; empty = all")
    ] = ()


class SitePolicy(Section):
    """All rules of a hospital; the defaults allow what fedmed allows."""

    paused: Annotated[
        bool, Field(description="refuse training and evaluation; runs still learn that the site is there")
    ] = False
    hours: Annotated[
        tuple[Hours, ...], Field(description='when the site trains, such as "22:00-06:00"; empty = always')
    ] = ()
    approval: Approval = Approval()
    training: TrainingRules = TrainingRules()
    metrics: MetricRules = MetricRules()
    privacy: PrivacyRules = PrivacyRules()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run asks of a site, as far as a policy looks at it. It holds nothing of a single patient."""

    run: str  # its name
    kind: Asked
    network: str
    algorithm: str
    min_sites: int
    privacy: PrivacyConfig
    patients: int | None  # to train on; None = nobody has counted yet, and what needs the number is not judged
    held_out_patients: int | None
    moment: datetime  # the site's own time
    secure_sum: bool = False
    noised_before: bool = False  # whether the site's ledger holds noised gradients of its patients


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How a task that is allowed must be done: the stricter of run and site."""

    metrics: Form
    fewest: int  # patients with a label, and without it, below which nothing of that label leaves
    training_loss: bool
    epsilon: float  # of this run at this site, at most
    delta: float
    min_noise_multiplier: float
    min_sites: int = 1  # in a secure sum


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a policy says to a request."""

    allowed: bool
    rule: str  # the key that refused; "policy" where all allow it
    reason: str  # a sentence that may leave the site
    allowance: Allowance | None = None


def decide(policy: SitePolicy, task: Request, ledger: Spent | None) -> Decision:
    """Whether a site may do a task, and what is allowed then. Pure: time and spending are given.

    Args:
        policy: of the hospital.
        task: what is asked.
        ledger: what the site's worst-placed patient has spent; None = there is no readable ledger.
    """
    for rule, reason in _refusals(policy, task, ledger):
        return Decision(allowed=False, rule=rule, reason=f"{reason} ({rule})")
    few = task.held_out_patients is None or task.held_out_patients < policy.metrics.min_patients
    allowance = Allowance(
        metrics="none" if few else policy.metrics.form,
        fewest=policy.metrics.min_patients,
        training_loss=policy.metrics.training_loss,
        epsilon=min(policy.privacy.epsilon, task.privacy.epsilon),
        delta=min(policy.privacy.delta, task.privacy.delta),
        min_noise_multiplier=policy.privacy.min_noise_multiplier,
        min_sites=policy.training.min_sites,
    )
    return Decision(allowed=True, rule="policy", reason="allowed", allowance=allowance)


def _refusals(policy: SitePolicy, task: Request, ledger: Spent | None) -> Iterator[tuple[str, str]]:
    """(rule, reason) of every rule that refuses, the plainest first."""
    training, privacy = policy.training, policy.privacy
    if task.kind in ("train", "evaluate"):  # at any hour a site says who it is, and lets the others' sum be opened
        if policy.paused:
            yield "policy.paused", "the site is paused"
        if policy.hours and not any(_within(task.moment.time(), span) for span in policy.hours):
            yield "policy.hours", f"the site trains at {', '.join(policy.hours)}"
    approval = policy.approval
    if approval.expires and task.moment.date() > approval.expires:
        yield "policy.approval.expires", "the site's approval has ended"
    if approval.runs and task.run not in approval.runs:
        yield "policy.approval.runs", "the site's approval is for other runs"
    if training.networks and task.network not in training.networks:
        yield "policy.training.networks", f'the site does not allow the network "{task.network}"'
    if training.algorithms and task.algorithm not in training.algorithms:
        yield "policy.training.algorithms", f'the site does not allow the algorithm "{task.algorithm}"'
    if task.min_sites < training.min_sites:
        yield (
            "policy.training.min-sites",
            f"the run adds up {task.min_sites} sites at least; this site asks for {training.min_sites}",
        )
    if training.secure_sum and not task.secure_sum:
        yield "policy.training.secure-sum", "the site's network leaves in a secure sum alone (strategy.secure-sum)"
    if task.patients is not None and task.patients < training.min_patients:
        yield "policy.training.min-patients", "the site has too few patients for its own policy"
    private = task.privacy.mode != "none"
    if privacy.required and task.privacy.mode != "dp-sgd":  # under central the server would have to be trusted
        yield "policy.privacy.required", "the site takes part only in runs with differential privacy of its own"
    unsaid = "required" not in privacy.model_fields_set
    if unsaid and task.noised_before and task.privacy.mode != "dp-sgd":
        yield (
            "policy.privacy.required",
            "the site has trained with differential privacy of its own; for a run without it, required = false "
            "has to be written under [policy.privacy] in its site.toml",
        )
    if privacy.required and task.privacy.noise == "insecure-test":
        yield "policy.privacy.required", 'the site refuses privacy.noise = "insecure-test"'
    if private and privacy.unit == "patient" and task.privacy.unit == "image":
        yield "policy.privacy.unit", "the run protects images, the site asks for patients"
    if ledger is None:
        yield "policy.ledger", "the site's ledger cannot be read"
    elif private and ledger.epsilon > privacy.epsilon:  # lowered since; else the ledger decides what is left
        yield "policy.privacy.epsilon", "the site's patients have spent more than its policy now allows"


def _within(moment: time, span: str) -> bool:
    """Whether a time lies in "HH:MM-HH:MM", which may run over midnight."""
    start, end = (time.fromisoformat(part) for part in span.split("-"))
    return start <= moment < end if start < end else moment >= start or moment < end


def read_policy(path: Path) -> SitePolicy:
    """The table `[policy]` of a site.toml; the rest of the file is for others. A witness's folder becomes absolute.

    Raises:
        ConfigError: the file cannot be read, or a key of the table is wrong.
    """
    values = read_toml(path).get("policy", {})
    policy = checked(SitePolicy, values, source=str(path), table=("policy",))
    if not policy.privacy.witness:
        return policy
    witness = str((path.parent / policy.privacy.witness).absolute())
    return policy.model_copy(update={"privacy": policy.privacy.model_copy(update={"witness": witness})})
