"""The attacks of simulations/poisoned-sites against every rule, once through real workers and once by hand."""

from pathlib import Path

import numpy as np
import pytest
from rounds_by_hand import LINEAR, add, made_up, run_of, terms_of

from fedmed.errors import UpdateRefused
from fedmed.federated.admission import validated_weights
from fedmed.federated.combiners import RULES, combiner
from fedmed.types import Update, Weights

FOLDER = Path(__file__).parent.parent / "simulations" / "poisoned-sites"
ROBUST = [name for name in RULES if name != "mean"]


@pytest.fixture
def study(monkeypatch):
    """The modules of the simulation."""
    monkeypatch.syspath_prepend(FOLDER)
    import measure

    return measure


def tampered(study, attack: str, sent) -> Update:
    current = Weights(parameters=np.zeros(LINEAR.num_parameters, np.float32), buffers=np.zeros(0, np.float32))
    weights = Weights(parameters=sent.change.astype(np.float32), buffers=np.zeros(0, np.float32))
    return study.TAMPERS[attack](Update(weights=weights, layout=LINEAR.hash, num_examples=sent.images), current)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attack", ["sign flip", "sign flip × 10", "× 100", "NaN", "wrong layout"])
def test_two_of_thirteen_sites_move_no_robust_rule_far(study, attack, rule):
    updates = made_up(13, spread=0.2)
    terms = terms_of(run_of(combine=rule, dishonest_sites=2, weight_by="uniform"))
    combined, refused = combiner(terms), 0
    for number, sent in enumerate(updates):
        if number >= 2:
            add(combined, terms.sent, LINEAR, sent)
            continue
        update = tampered(study, attack, sent)
        try:
            combined.add(sent.site, update, validated_weights(update, LINEAR))
        except UpdateRefused:
            refused += 1
    assert refused == (2 if attack in ("NaN", "wrong layout") else 0)
    honest = np.mean([each.change for each in updates[2:]], axis=0)
    away = np.linalg.norm(combined.result().change - honest) / np.linalg.norm(honest)
    if rule in ROBUST or refused:
        assert away < 0.3
    else:
        assert away > 0.3  # the mean: without this, the attacks would show nothing


@pytest.mark.simulation
@pytest.mark.parametrize("attack", ["label flip", "sign flip × 10"])
def test_an_attack_that_ruins_the_mean_leaves_a_robust_rule_working(study, attack):
    mean, median = (study.run(attack, rule, rounds=4) for rule in ("mean", "median"))
    honest = study.run("none", "mean", rounds=4)["server"]["metrics"]["auroc"]["value"]
    assert median["server"]["metrics"]["auroc"]["value"] > honest - 0.05
    if attack != "label flip":  # two flipped hospitals of thirteen are outvoted by any rule
        assert mean["server"]["metrics"]["auroc"]["value"] < 0.3


@pytest.mark.simulation
def test_nan_and_a_wrong_layout_are_refused_by_name(study):
    for attack, reason in (("NaN", "not finite"), ("wrong layout", "another layout")):
        result = study.run(attack, "mean", rounds=1)
        failed = result["rounds_log"][0]["failed"]
        assert [failure["site"] for failure in failed] == ["hospital-01", "hospital-02"]
        assert all(reason in failure["reason"] for failure in failed)
        assert result["status"] == "degraded"


def test_the_table_has_every_rule_and_attack_that_the_script_measures(study):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    tables = text.partition("<!-- begin: tables -->")[2].partition("<!-- end: tables -->")[0]
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    first, second = rows[: len(study.ATTACKS) + 2], rows[len(study.ATTACKS) + 2 :]
    assert [row[0].strip("| ") for row in first[2:]] == list(study.ATTACKS)
    assert [name.strip(" |") for name in first[0][1:]] == list(study.RULES)
    assert [row[0].strip("| ") for row in second[2:]] == list(study.RULES)
