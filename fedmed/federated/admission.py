"""What a site sends is checked here before anything is done with it: nothing of it is taken on trust."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedmed.config import TaskConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.aggregation import CHUNK, chunks
from fedmed.federated.wire import decode_update
from fedmed.privacy.chain import Anchor
from fedmed.privacy.egress import HEAD
from fedmed.training.evaluate import checked_sums, metrics_from, parted_sums, personal_sums
from fedmed.training.moments import has_negative_variance
from fedmed.types import FloatVector, Layout, Scalar, Update, Weights

PRIVACY = (
    "unit", "adjacency", "delta", "images_per_patient", "accountant", "events", "epsilon", "epsilon_total",
    "accountant_total",
)  # fmt: skip
LONGEST_PRIVACY = 65_536  # characters


def decoded_update(answer: RecordDict | str, task: TaskConfig) -> Update:
    """The update in a site's answer, its sums checked.

    Args:
        answer: the content of the reply, or why there is none.
        task: what the sums have to be about.

    Raises:
        UpdateRefused: there is no answer, or it is malformed.
    """
    if isinstance(answer, str):
        raise UpdateRefused(answer)
    try:
        update = decode_update(answer)
        shared, own = (checked_sums(part, task) if part else {} for part in parted_sums(update.metrics))
        update = replace(update, metrics={**shared, **personal_sums(own)})
    except (OverflowError, RecursionError) as error:  # numbers and texts that no site of ours would send
        raise UpdateRefused(f"the reply is no update: {type(error).__name__}") from None
    return update


def privacy_in(facts: Mapping[str, Scalar]) -> dict[str, Any] | None:
    """What a site says of its patients' budget, as `result.json` holds it; None if it says nothing, or nonsense."""
    text = facts.get("privacy")
    if not isinstance(text, str) or len(text) > LONGEST_PRIVACY:
        return None
    try:
        values = json.loads(text)
        known = {name: values[name] for name in PRIVACY}
        events = known["events"]
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            return None
        said = [value for name, value in known.items() if name != "events"]
        if not all(map(_plain, [*said, *(value for event in events for value in event.values())])):
            return None
        numbers = [known[name] for name in ("delta", "epsilon", "epsilon_total") if known[name] is not None]
        if not all(_usable(number) and number >= 0 for number in numbers):
            return None
        return known | {name: str(values[name])[:200] for name in ("warning", "void") if name in values}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def public_facts(update: Update, task: TaskConfig) -> dict[str, Any]:
    """What the log of a run says of an update."""
    known: dict[str, Any] = {name: number_in(update.facts, name) for name in ("steps", "seconds", "loss")}
    privacy = privacy_in(update.facts)
    known |= {name: privacy[name] for name in ("epsilon", "warning") if name in privacy} if privacy else {}
    head = ledger_head(update.facts)
    known |= {"ledger": vars(head)} if head else {}
    known |= {"metrics": dict(metrics_from(update.metrics, task))} if update.metrics else {}
    return {"images": update.num_examples, **known}


def ledger_head(facts: Mapping[str, Scalar]) -> Anchor | None:
    """The newest record of the site's ledger, as the update names it; None if it names none, or nonsense.

    Whether the site signed it is for who has the site's key to say; kept here, it finds a ledger that was restored.
    """
    number, digest, signature = (facts.get(name) for name in HEAD)
    texts = isinstance(digest, str) and isinstance(signature, str)
    if not texts or not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**63:
        return None
    anchor = Anchor(sequence=number, hash=str(digest), signature=str(signature))
    return anchor if re.fullmatch(r"[0-9a-f]{64}/[0-9a-f]{128}", f"{anchor.hash}/{anchor.signature}") else None


def validated_counts(update: Update, *, images: int, patients: int) -> None:
    """Refuse an update that claims to be of no data, or of more than its site brought to the run.

    Args:
        update: what the site sent; weights of the mean follow from its counts.
        images: that the site's card named.
        patients: that the site's card named.

    Raises:
        UpdateRefused: with the reason, which names no site and no patient.
    """
    claims = {"images": (update.num_examples, images), "patients": (update.facts.get("patients"), patients)}
    for what, (claimed, known) in claims.items():
        if not isinstance(claimed, int) or isinstance(claimed, bool) or claimed < 1:
            shown = claimed if isinstance(claimed, int) else "no number of"
            raise UpdateRefused(f"the update claims {shown} training {what}; at least 1 is needed")
        if claimed > known:
            raise UpdateRefused(f"the update claims {claimed} training {what}; the site's card names {known} in all")


def validated_weights(update: Update, layout: Layout, *, sent: Weights | None = None, max_norm: float = 0.0) -> Weights:
    """The weights of an update that can be averaged: of this layout and length, finite, and not too far away.

    `max_norm` bounds the parameters alone; of running statistics, variances are at least 0.

    Args:
        update: what a site sent.
        layout: of the global network.
        sent: the network that the site was sent; needed for `max_norm`.
        max_norm: the largest ‖w - w_sent‖₂ over all trained parameters that is let in; 0 = any.

    Raises:
        UpdateRefused: with the reason, which names no site and no patient.
    """
    if update.layout != layout.hash:
        raise UpdateRefused("the update has another layout than the global network")
    if update.weights is None:
        raise UpdateRefused("the update carries no weights")
    got = (update.weights.parameters.size, update.weights.buffers.size)
    if got != (layout.num_parameters, layout.num_buffers):
        raise UpdateRefused(f"the update has {got} values, the network {layout.num_parameters, layout.num_buffers}")
    bounded = max_norm > 0 and sent is not None
    norm = _norm(update.weights.parameters, sent.parameters if bounded and sent is not None else None)
    if not math.isfinite(norm):
        raise UpdateRefused("the update's parameters are not finite")
    if bounded and norm > max_norm:
        raise UpdateRefused(
            f"the update moved the network by {norm:.4g}, above strategy.max-update-norm = {max_norm:g}"
        )
    if not math.isfinite(_norm(update.weights.buffers)):
        raise UpdateRefused("the update's buffers are not finite")
    if has_negative_variance(update.weights.buffers, layout):
        raise UpdateRefused("the update's buffers hold a running variance below 0")
    return update.weights


def validated_masked(update: Update, layout: Layout) -> None:
    """Refuse a masked update that no sum can take. What it holds nobody can see.

    Raises:
        UpdateRefused: with the reason.
    """
    if update.layout != layout.hash:
        raise UpdateRefused("the update has another layout than the global network")
    got, expected = 0 if update.masked is None else update.masked.size, layout.num_parameters + layout.num_buffers
    if update.weights is not None or got != expected:
        raise UpdateRefused(f"the update has {got} masked values, the network {expected}")


def number_in(facts: Any, name: str) -> float | None:
    """A finite number among the facts of an update; None if there is none of that name, or it is no number."""
    value = facts.get(name)
    return float(value) if _usable(value) else None


def _usable(value: Any) -> bool:
    """Whether a value of JSON, which knows NaN and whole numbers of any size, is a number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _usable(value)


def _norm(vector: FloatVector, origin: FloatVector | None = None) -> float:
    """‖vector - origin‖₂; not finite if any value is not, or if its square is not. One pass, no large temporary."""
    scratch = np.empty(min(CHUNK, vector.size), np.float32)
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for part in chunks(vector.size):
            values = vector[part]
            if origin is not None:
                values = np.subtract(values, origin[part], out=scratch[: len(values)])
            total += float(np.dot(values, values))
    return math.sqrt(total) if total >= 0 else math.nan
