"""Whatever one site answers, it is used or refused in words; nothing else ends a run."""

import json
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as some
from rounds_by_hand import LINEAR, run_of, terms_of, zeros

import fedmed
from fedmed.errors import UpdateRefused
from fedmed.federated.admission import (
    PRIVACY,
    decoded_update,
    privacy_in,
    public_facts,
    validated_counts,
    validated_weights,
)
from fedmed.federated.combiners import combiner
from fedmed.federated.exchange import answer_in
from fedmed.federated.identity import package_hash
from fedmed.federated.member import MOST, CannotJoin, member_of
from fedmed.federated.site_evaluation import metrics_of_sites
from fedmed.federated.strategies import STRATEGIES
from fedmed.federated.strategies.feddg_ga import RECEIVED, TRAINED
from fedmed.federated.wire import encode_update
from fedmed.metrics import NOISE, PATIENTS, SUMS, classification_sums, score_cases, segmentation_sums
from fedmed.training.evaluate import PERSONAL, checked_sums
from fedmed.training.sampling import steps_allowed
from fedmed.types import Update

TASKS = {
    "classification": SimpleNamespace(kind="classification", labels=("a", "b")),
    "segmentation": SimpleNamespace(kind="segmentation", labels=("a", "b")),
}
NUMBERS = some.one_of(
    some.sampled_from([0, 1, 3, -1, 10**400, -(10**400), 1e-320, 1e308, 1e39, 0.5, float("nan"), float("inf"), True]),
    some.integers(),
    some.floats(),
)
JSON = some.recursive(
    some.none() | NUMBERS | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SAID = dict.fromkeys(PRIVACY) | {"unit": "patient", "delta": 1e-6, "events": [{"steps": 1}], "epsilon": 1.0}
BUDGETS = some.dictionaries(some.sampled_from(PRIVACY), JSON, max_size=2).map(lambda said: json.dumps(SAID | said))
FACTS = some.fixed_dictionaries(
    {"steps": NUMBERS | JSON, RECEIVED: NUMBERS | JSON, TRAINED: NUMBERS | JSON, "patients": some.just(1) | JSON},
    optional={"privacy": BUDGETS | JSON, "loss": JSON, "seconds": JSON, "ledger-sequence": JSON},
)


def strict(value: object) -> None:
    """As `events.jsonl` and `result.json` are written."""
    json.dumps(value, allow_nan=False, indent=2)


def taken(content, config, known: int = 9) -> None:
    """What the round loop does with one reply of a site whose card names so many images and patients."""
    terms = terms_of(config)
    update = decoded_update(content, TASKS["classification"])
    strict(privacy_in(update.facts))
    validated_counts(update, images=known, patients=known)
    weights = validated_weights(update, LINEAR)
    combined = combiner(terms)
    combined.add("a", update, weights)
    strict(public_facts(update, TASKS["classification"]))
    after, _ = terms.step(terms.sent, combined.result(), terms.state)
    assert np.isfinite(after.parameters).all()


@pytest.mark.parametrize("name", STRATEGIES)
@given(facts=FACTS, more=some.dictionaries(some.sampled_from(["num-examples", "facts", "sums", "encoding"]), JSON))
@example(facts={"steps": 10**400, RECEIVED: 10**400, TRAINED: 1, "patients": 1}, more={})
@example(facts={"steps": 10**300, RECEIVED: 1e39, TRAINED: 1e39, "patients": 1}, more={})
@settings(max_examples=60, deadline=None)
def test_facts_of_a_site_are_used_or_refused_by_every_algorithm(name, facts, more):
    content = encode_update(Update(weights=zeros(LINEAR), layout=LINEAR.hash, num_examples=1))
    known = json.loads(str(content["update"]["json"]))
    content["update"] = ConfigRecord({"json": json.dumps({**known, "facts": facts, **more})})
    with suppress(UpdateRefused):
        taken(content, run_of(name))


def card_of(**counts: object) -> RecordDict:
    said = {"site": "a", "version": fedmed.__version__, "code": package_hash(), "problem": "", "reasons": ""}
    known = {"patients": 1, "images": 1, "modalities": 1, "unreadable": 0, "holds-out": True}
    return RecordDict({"card": ConfigRecord({**said, **known, **counts})})


@given(counts=some.dictionaries(some.sampled_from(["patients", "images", "modalities", "unreadable"]), NUMBERS))
@example(counts={"images": 2**62})
@example(counts={"patients": 10**400})
@example(counts={"unreadable": 2**62})
@settings(max_examples=60, deadline=None)
def test_counts_of_a_card_are_some_that_a_site_can_have_or_it_is_refused(counts):
    with suppress(UpdateRefused):
        member = member_of(card_of(**counts), 1)
        assert all(0 <= each <= MOST for each in (member.patients, member.images, member.modalities, member.unreadable))


def test_nothing_that_a_site_says_moves_the_cursor_of_a_terminal():
    said, shown = "\x1b[2Jall is\nwell\u202e", "?[2Jall is well?"
    assert answer_in(SimpleNamespace(has_error=lambda: True, error=Error(1, said)), 1, "") == shown
    assert member_of(card_of(reasons=said), 1).reasons == shown
    for refused in ({"problem": said}, {"version": said}):
        with pytest.raises(CannotJoin) as why:
            member_of(card_of(**refused), 1)
        assert shown in str(why.value)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_update_of_all_the_images_that_a_card_may_name_keeps_the_server_no_longer_than_another(name):
    config = run_of(name, {"batch-size": 1, "schedule": "cosine", "warmup-rounds": 1})
    facts = {"steps": steps_allowed(config, MOST).start, RECEIVED: 1.0, TRAINED: 1.0, "patients": MOST}
    taken(
        encode_update(Update(weights=zeros(LINEAR), layout=LINEAR.hash, num_examples=MOST, facts=facts)), config, MOST
    )


@pytest.mark.parametrize("said", [{"events": [float("nan")]}, {"events": [{"steps": 10**400}]}, {"epsilon": 10**400}])
def test_a_budget_that_no_file_can_hold_is_nonsense(said):
    assert privacy_in({"privacy": json.dumps(SAID)}) is not None
    assert privacy_in({"privacy": json.dumps(SAID | said)}) is None


VALUES = some.sampled_from(
    [0.0, 1.0, 2.0, 11.0, 0.5, 1e-320, 1e-30, 1e15, 1e59, 1e60, 1e200, 1e308, -1.0, np.nan, np.inf]
)


@pytest.mark.parametrize("kind", [*TASKS, "noised classification", "noised segmentation"])
@given(data=some.data())
@settings(max_examples=80, deadline=None)
def test_sums_of_a_site_give_finite_metrics_or_are_refused(kind, data):
    task = TASKS[kind.rpartition(" ")[2]]
    sums = _shapes(kind, task)
    for name in data.draw(some.lists(some.sampled_from(sorted(sums)), unique=True)):
        values = data.draw(some.lists(VALUES, min_size=1, max_size=4))
        sums[name] = np.resize(np.array(values), sums[name].shape)
    personal = {f"{PERSONAL}{name}": values for name, values in sums.items()} if data.draw(some.booleans()) else {}
    update = Update(weights=None, layout="", num_examples=1, metrics={**sums, **personal})
    content = encode_update(update)
    with suppress(UpdateRefused):
        strict(public_facts(decoded_update(content, task), task))
    strict(metrics_of_sites([("a", content)], task, lambda site, privacy: None, replicates=0)[0])


@pytest.mark.parametrize(("name", "value"), [("known", 1e-320), ("loss", 1e308), ("positives", 0.5)])
def test_sums_that_no_site_can_add_up_are_refused_by_name(name, value):
    sums = _shapes("classification", TASKS["classification"])
    checked_sums(sums, TASKS["classification"])
    with pytest.raises(UpdateRefused, match=name):
        checked_sums({**sums, name: np.full(sums[name].shape, value)}, TASKS["classification"])


def _shapes(kind: str, task) -> dict[str, np.ndarray]:
    """Sums that are taken, all ones."""
    if kind.startswith("noised"):
        size = 2 * 2 * 16 if task.kind == "classification" else 2
        return {SUMS: np.ones(size), NOISE: np.ones(1), PATIENTS: np.ones(1)}
    if task.kind == "segmentation":
        empty = segmentation_sums(score_cases(np.zeros((0, 2, 1, 1)), np.zeros((0, 2, 1, 1))), [])
        return {name: np.ones(values.shape) for name, values in empty.items()}
    none = np.zeros((0, 2))
    sums = {name: np.ones(values.shape) for name, values in classification_sums(none, none, []).items()}
    return sums | {"auroc-variance": np.full(3, 0.1), "auroc-variance-given": np.ones(3)}
