"""A hospital's policy: what `decide` says, and that a federation obeys it, records it and tells it."""

import json
import re
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from private_sites import records_of as examined
from private_sites import site_in, task_of
from toy import PLANTED

from fedmed.config import PrivacyConfig
from fedmed.errors import ConfigError, LedgerUnusable, PolicyRefused
from fedmed.federated.site_config import SiteConfig
from fedmed.federated.sites import read_site
from fedmed.privacy.accounting import Spent
from fedmed.privacy.egress import contents, keep_departure
from fedmed.privacy.keys import make_keys, read_public
from fedmed.privacy.policy import (
    Approval,
    MetricRules,
    PrivacyRules,
    Request,
    SitePolicy,
    TrainingRules,
    decide,
    read_policy,
)
from fedmed.privacy.verification import examine, exported
from fedmed.reporting import write_model_card
from fedmed.training.oversight import form_of
from fedmed.training.site_round import evaluate_round, train_round

ROOT = Path(__file__).parent.parent
POLICY = "[policy.privacy]\nstable-ids = true\nepsilon = 1000.0\n"
NOTHING = Spent(epsilon=0.0, accountant="rdp", epsilon_rdp=0.0)
ASKED = Request(
    run="study",
    kind="train",
    network="chexnet",
    algorithm="fedavg",
    min_sites=3,
    privacy=PrivacyConfig(),
    patients=200,
    held_out_patients=50,
    moment=datetime(2026, 1, 2, 23, 30),
)
PRIVATE = PrivacyConfig(mode="dp-sgd", epsilon=3.0, delta=1e-5)


def test_the_default_policy_allows_and_says_its_terms():
    decision = decide(SitePolicy(), ASKED, NOTHING)
    assert decision.allowed and decision.rule == "policy" and decision.allowance is not None
    assert (decision.allowance.metrics, decision.allowance.epsilon, decision.allowance.delta) == (
        "histogram",
        8.0,
        1e-6,
    )


def test_an_approval_holds_on_its_last_day_and_for_its_runs():
    approval = Approval(purpose="pneumonia", expires=date(2026, 1, 2), runs=("study",))
    assert decide(SitePolicy(approval=approval), ASKED, NOTHING).allowed
    late = replace(ASKED, moment=datetime(2026, 1, 3, 0, 0), kind="card")
    assert decide(SitePolicy(approval=approval), late, NOTHING).rule == "policy.approval.expires"


REFUSALS = {
    "policy.paused": (SitePolicy(paused=True), {}),
    "policy.hours": (SitePolicy(hours=("08:00-18:00",)), {}),
    "policy.approval.expires": (SitePolicy(approval=Approval(expires=date(2026, 1, 1))), {}),
    "policy.approval.runs": (SitePolicy(approval=Approval(runs=("other",))), {}),
    "policy.training.networks": (SitePolicy(training=TrainingRules(networks=("unet",))), {}),
    "policy.training.algorithms": (SitePolicy(training=TrainingRules(algorithms=("scaffold",))), {}),
    "policy.training.min-sites": (SitePolicy(training=TrainingRules(min_sites=4)), {}),
    "policy.training.min-patients": (SitePolicy(training=TrainingRules(min_patients=201)), {}),
    "policy.privacy.required": (SitePolicy(privacy=PrivacyRules(required=True)), {}),
    "policy.privacy.unit": (
        SitePolicy(),
        {"privacy": PrivacyConfig(mode="dp-sgd", unit="image")},
    ),
    "policy.privacy.epsilon": (SitePolicy(privacy=PrivacyRules(epsilon=1.0)), {"privacy": PRIVATE}),
}


@pytest.mark.parametrize("rule", REFUSALS)
def test_every_rule_refuses_and_is_named(rule):
    policy, asked = REFUSALS[rule]
    spent = Spent(epsilon=2.0, accountant="rdp", epsilon_rdp=2.0)
    decision = decide(policy, replace(ASKED, **asked), spent)
    assert not decision.allowed and decision.allowance is None
    assert decision.rule == rule and decision.reason.endswith(f"({rule})")
    assert str(ASKED.patients) not in decision.reason


@pytest.mark.parametrize("mode", ["none", "central"])
def test_after_a_private_run_others_need_a_word_of_the_hospital(mode, toy_config, tmp_path):
    keys, uniform = {"mode": "dp-sgd", "noise-multiplier": 2.0}, {"weight-by": "uniform", "min-sites": 1}
    other = toy_config("a-40", strategy=uniform, privacy={"mode": mode, "sites": 3})
    train_round(task_of(other, "train", 1), site_in(tmp_path, POLICY))
    train_round(task_of(toy_config("a-40", privacy=keys), "train", 1), site_in(tmp_path, POLICY))
    with pytest.raises(PolicyRefused, match=r"required = false has to be written under \[policy.privacy\]") as refused:
        train_round(task_of(other, "train", 2), site_in(tmp_path, POLICY))
    assert refused.value.rule == "policy.privacy.required"
    train_round(task_of(other, "train", 2), site_in(tmp_path, f"{POLICY}required = false\n"))


def test_without_a_readable_ledger_nothing_is_allowed():
    assert decide(SitePolicy(), ASKED, None).rule == "policy.ledger"


def test_noise_that_is_for_tests_is_no_privacy():
    asked = replace(ASKED, privacy=PrivacyConfig(mode="dp-sgd", noise="insecure-test"))
    assert decide(SitePolicy(privacy=PrivacyRules(required=True)), asked, NOTHING).rule == "policy.privacy.required"


def test_hours_may_run_over_midnight():
    night = SitePolicy(hours=("22:00-06:00", "12:00-13:00"))
    for hour, allowed in ((23, True), (3, True), (6, False), (12, True), (13, False), (21, False)):
        asked = replace(ASKED, moment=datetime(2026, 1, 2, hour))
        assert decide(night, asked, NOTHING).allowed is allowed
        assert decide(night, replace(asked, kind="card"), NOTHING).allowed


@given(
    site=some.floats(0.1, 10), run=some.floats(0.1, 10), delta=some.floats(1e-9, 1e-3), few=some.integers(0, 100),
    unit=some.sampled_from(["patient", "image"]), theirs=some.sampled_from(["patient", "image"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_stricter_of_run_and_site_wins(site, run, delta, few, unit, theirs):
    policy = SitePolicy(
        privacy=PrivacyRules(epsilon=site, unit=unit), metrics=MetricRules(min_patients=few, training_loss=False)
    )
    asked = replace(ASKED, privacy=PrivacyConfig(mode="dp-sgd", epsilon=run, delta=delta, unit=theirs))
    decision = decide(policy, asked, NOTHING)
    assert decision.allowed is not (unit == "patient" and theirs == "image")
    if decision.allowance:
        assert decision.allowance.epsilon == min(site, run) and decision.allowance.delta == min(1e-6, delta)
        assert decision.allowance.metrics == ("none" if few > 50 else "histogram")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[policy]\npausd = true", "policy.pausd"),
        ("[policy.training]\nmin-sites = 0", "policy.training.min-sites"),
        ('[policy]\nhours = ["25:00-26:00"]', "expected hours"),
        ("[policy", "not valid TOML"),
        ("policy = 3", "policy"),
    ],
)
def test_a_policy_with_a_mistake_is_no_policy(tmp_path, text, message):
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        read_policy(tmp_path / "site.toml")
    assert str(tmp_path) not in refused.value.public


def test_a_deployed_site_reads_its_own_policy_and_fails_closed(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('name = "north"\nmanifest = "m.csv"\n[policy.privacy]\nwitness = "far"\n')
    site = read_site(path)
    assert site.oversight is not None and site.oversight.keys == tmp_path / "keys"
    assert read_policy(path).privacy.witness == str(tmp_path / "far")
    path.write_text('name = "north"\nmanifest = "m.csv"\n[policy]\nlax = 1\n')
    read_site.cache_clear()
    with pytest.raises(ConfigError, match="lax"):
        read_site(path)


# A federation.


@pytest.fixture
def under(tmp_path, toy_config, simulate):
    """A function: run toy sites under a policy, and give (result, run folder, rounds as the server saw them)."""

    def run(policy: str, *sites: str, watch=lambda event: None, **sections):
        (tmp_path / "site.toml").write_text(policy)
        keys = {"simulation": {"policy": str(tmp_path / "site.toml"), "workers": 1, "device": "cpu"}}
        return simulate(toy_config(*sites, **sections, **keys), watch)

    return run


def records_of(folder, name):
    site = folder.path / "sites" / name
    return examine(site, read_public(site / "keys" / "site.pub"))


@pytest.mark.simulation
def test_a_refusal_is_told_recorded_and_makes_the_run_degraded(under):
    result, folder = under("[policy.training]\nmin-patients = 10\n", "large-40", "small-10")
    assert result["status"] == "degraded"
    assert result["reason"] == (
        "small-10: the site has too few patients for its own policy (policy.training.min-patients)"
    )
    found = records_of(folder, "small-10")
    assert found.faults == () and found.egress == ()
    told = {
        (r.body["task"], r.body["allowed"], r.body["rule"]) for r in found.audit
    }  # it is greeted in later rounds, too
    assert told == {("card", False, "policy.training.min-patients")}


@pytest.mark.simulation
@pytest.mark.parametrize("form", ["exact", "histogram", "none"])
def test_the_policy_says_in_which_form_metrics_leave(under, form):
    rules = f'[policy.metrics]\nform = "{form}"\nmin-patients = 0\n'
    result, folder = under(rules, "a-200", "b-80", evaluate={"bootstrap": 100})
    (left,) = (record.body for record in records_of(folder, "a-200").egress if record.body["task"] == "evaluate")
    found = result["sites"][0]["metrics"].get("accuracy", {})
    assert ("low" in found and found["low"] is not None) == (form == "exact")
    assert ("bound" in result["sites"][0]["metrics"].get("auroc", {})) == (form == "histogram")
    sent = {row["name"] for row in left["left"] if row["kind"] == "sums"}
    assert ("patient" in sent, "positives" in sent) == (form == "exact", form == "histogram")
    words = {"exact": "metrics as scores of images", "histogram": "metrics as histograms", "none": "no metrics"}
    assert words[form] in left["controls"]


@pytest.mark.parametrize(
    ("site", "policy", "form"),
    [("exact", "histogram", "histogram"), ("histogram", "exact", "histogram"), ("none", "exact", "none")],
)
def test_the_stricter_form_of_site_and_policy_wins(toy_config, site, policy, form):
    decision = decide(SitePolicy(metrics=MetricRules(form=policy)), ASKED, NOTHING)
    permit = SimpleNamespace(allowance=decision.allowance)
    assert form_of(permit, site, toy_config("a-40")) == form
    assert form_of(None, site, toy_config("a-40")) == site
    assert form_of(permit, site, toy_config("a-40", privacy={"mode": "dp-sgd", "epsilon": 3.0})) == "none"


@pytest.mark.simulation
def test_every_reply_of_every_round_is_in_the_manifest_and_carries_the_ledgers_head(under):
    _, folder = under("[policy.metrics]\ntraining-loss = false\n", "a-40", "b-30")
    for name in ("a-40", "b-30"):
        found = records_of(folder, name)
        assert found.faults == ()
        assert [(r.body["task"], r.body["round"]) for r in found.egress] == [
            ("train", 1), ("train", 2), ("evaluate", 2)
        ]  # fmt: skip
        body = found.egress[0].body
        left = {row["name"]: row for row in body["left"]}
        assert left["parameters"]["bytes"] == 4 * left["parameters"]["values"] > 0
        assert {"num-examples", "patients", "ledger-hash", "ledger-signature"} <= set(left) and "loss" not in left
        assert body["ledger"] == {"sequence": found.head.sequence, "hash": found.head.hash}
        assert (body["epsilon_before"], body["epsilon_after"]) == (0.0, 0.0)
        assert "training loss withheld" in body["controls"]
        assert {r.body["task"] for r in found.audit} == {"card", "train", "evaluate"}
        text = json.dumps(exported(found, b"\0" * 32))
        assert PLANTED not in text and str(folder.path) not in text


@pytest.mark.simulation
def test_a_policy_changes_no_bit_of_the_network(under, toy_config, simulate):
    _, plain = simulate(toy_config("a-40", "b-30", simulation={"workers": 1, "device": "cpu"}))
    _, ruled = under("[policy]\n", "a-40", "b-30")
    for one, other in zip(*(folder.checkpoint()[1:2] for folder in (plain, ruled)), strict=True):
        assert np.array_equal(one.parameters, other.parameters)


@pytest.mark.simulation
def test_few_held_out_patients_send_no_metrics(under):
    result, folder = under("[policy.metrics]\nmin-patients = 5\n", "a-100", "b-20")
    metrics = {site["site"]: site["metrics"] for site in result["sites"]}
    assert metrics["a-100"] and not metrics["b-20"]
    last = records_of(folder, "b-20").egress[-1].body
    assert last["task"] == "evaluate" and not [row for row in last["left"] if row["kind"] == "sums"]


@pytest.mark.simulation
def test_a_pause_in_mid_run_works_at_once(under, tmp_path):
    def pause(event):
        if event["kind"] == "checkpoint_saved" and event["round"] == 1:
            (tmp_path / "site.toml").write_text("[policy]\npaused = true\n")

    result, folder = under("[policy]\n", "a-40", "b-30", watch=pause)
    assert result["status"] == "paused" and result["rounds"] == 1
    reasons = {failure["reason"] for failure in result["rounds_log"][-1]["failed"]}
    assert reasons == {"the site is paused (policy.paused)"}
    assert (
        len({record.body["policy"] for record in records_of(folder, "a-40").audit}) == 2
    )  # the edit shows in the audit log


@pytest.mark.simulation
def test_a_site_that_cannot_write_its_records_sends_nothing(under, tmp_path):
    def block(event):
        if event["kind"] == "round_started" and event["round"] == 1:
            (tmp_path / "run-1" / "sites" / "b-30" / "egress.jsonl").mkdir()

    result, _ = under("[policy]\n", "a-40", "b-30", watch=block)
    assert result["status"] == "degraded"
    (reason,) = {f["reason"] for f in result["rounds_log"][0]["failed"]}
    assert reason == "the site's records cannot be read or written: Is a directory (chain.unwritable)"


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ('[policy.training]\nalgorithms = ["scaffold"]', "policy.training.algorithms"),
        ('[policy.training]\nnetworks = ["chexnet"]', "policy.training.networks"),
        ("[policy.training]\nmin-sites = 2", "policy.training.min-sites"),
        ("[policy.privacy]\nrequired = true", "policy.privacy.required"),
    ],
)
def test_a_run_that_no_site_allows_does_not_begin(under, policy, rule):
    with pytest.raises(Exception, match=re.escape(f"({rule})")):
        under(policy, "a-40")


@pytest.mark.parametrize(
    "strategy",
    [{"name": "cyclic"}, {"name": "own:Steps"}, {"combine": "krum"}, {"combine": "krum", "name": "fedavgm"}],
    ids=str,
)
def test_a_run_that_may_pass_on_a_single_network_adds_up_one_whatever_it_says(toy_config, tmp_path, strategy):
    task = task_of(toy_config("a-40", strategy={**strategy, "min-sites": 5}), "train", 1)
    with pytest.raises(PolicyRefused, match="adds up 1 sites at least; this site asks for 2") as refused:
        train_round(task, site_in(tmp_path / "two", "[policy.training]\nmin-sites = 2"))
    assert refused.value.rule == "policy.training.min-sites"
    train_round(task, site_in(tmp_path / "one", POLICY, name="a-40"))


@pytest.mark.parametrize("strategy", [{}, {"combine": "multi-krum"}, {"combine": "median"}], ids=str)
def test_a_run_that_mixes_several_networks_adds_up_as_many_as_it_says(toy_config, tmp_path, strategy):
    task = task_of(toy_config("a-40", strategy={**strategy, "min-sites": 5}), "train", 1)
    train_round(task, site_in(tmp_path, f"[policy.training]\nmin-sites = 5\n{POLICY}", name="a-40"))


@pytest.mark.parametrize(
    ("rules", "rule"),
    [
        ("[policy]\npaused = true", "policy.paused"),
        ("[policy.approval]\nexpires = 2020-01-01", "policy.approval.expires"),
        ('[policy.training]\nalgorithms = ["scaffold"]', "policy.training.algorithms"),
    ],
)
def test_a_task_that_is_refused_whatever_the_data_reads_none_and_is_logged_once(toy_config, tmp_path, rules, rule):
    config, site = toy_config("broken-40"), site_in(tmp_path, rules, name="broken-40")
    with pytest.raises(PolicyRefused, match=re.escape(f"({rule})")):
        train_round(task_of(config, "train", 1), site)
    with pytest.raises(PolicyRefused, match=re.escape(f"({rule})")):
        evaluate_round(task_of(config, "evaluate", 1), site)
    logged = [(record.body["task"], record.body["allowed"]) for record in examined(site).audit]
    assert logged == [("train", False), ("evaluate", False)]


def test_a_task_is_judged_again_when_its_patients_are_counted_and_logged_once(toy_config, tmp_path):
    config, site = toy_config("a-40"), site_in(tmp_path, "[policy.training]\nmin-patients = 16", name="a-40")
    train_round(task_of(config, "train", 1), site)
    (tmp_path / "site.toml").write_text("[policy.training]\nmin-patients = 17")
    with pytest.raises(PolicyRefused, match="too few patients"):
        train_round(task_of(config, "train", 2), site)
    assert [record.body["allowed"] for record in examined(site).audit] == [True, False]


def test_an_egress_record_is_whole_or_nothing_leaves(tmp_path):
    (tmp_path / "egress.jsonl").mkdir()
    with pytest.raises(LedgerUnusable):
        keep_departure(tmp_path, make_keys(tmp_path / "keys"), *_update_and_departure())


def _update_and_departure():
    from fedmed.privacy.chain import EMPTY
    from fedmed.privacy.egress import Departure
    from fedmed.types import Update

    update = Update(weights=None, layout="x", num_examples=3, metrics={"n": np.zeros(2)}, masked=np.zeros(2, "u8"))
    assert [(row["name"], row["bytes"]) for row in contents(update)] == [
        ("masked", 16),
        ("n", 16),
        ("num-examples", 8),
    ]
    return update, Departure(
        task="train", run="r", round=1, rule="policy", controls=(), epsilon_before=0.0, epsilon_after=0.0, delta=1e-6,
        ledger=EMPTY, policy="", code="", settings="",
    )  # fmt: skip


@pytest.mark.simulation
def test_the_model_card_says_data_privacy_metrics_what_left_and_limits(under):
    rules = "[policy.training]\nmin-patients = 10\n[policy.metrics]\nmin-patients = 0\n"
    _, folder = under(rules, "a-40", "b_x-10", "c-40", server="server-60")
    card = write_model_card(folder.path).read_text(encoding="utf-8")
    assert re.search(r"^\| a-40 \| 20 \| 40 \| 2 \| no differential privacy", card, re.MULTILINE)
    assert "the site has too few patients" in card and r"b\_x-10" in card
    (left,) = re.findall(r"^\* a-40: (.*)$", card, re.MULTILINE)
    assert left.startswith("3 replies, 0.1 MiB (parameters); controls: metrics as histograms; no metrics; no noise")
    assert "the server's held-out patients | value" in card and "AUROC" in card
    assert "Not a medical device" in card and PLANTED not in card and str(folder.path) not in card


# The commands and the page.


@pytest.mark.simulation
def test_the_commands_of_the_ledger_page(under, fedmed, tmp_path):
    _, folder = under("[policy.training]\nmin-patients = 10\n", "site-40")
    site = folder.path / "sites" / "site-40"
    shown = fedmed("ledger", "show", site)
    assert shown.returncode == 0, shown.stderr
    assert "nothing is spent" in shown.stdout and "3 replies left the site" in shown.stdout
    anchor = shown.stdout.split("anchor to keep elsewhere: ")[1].split()[0]
    whole = fedmed("ledger", "verify", site, "--anchor", anchor)
    assert whole.returncode == 0 and whole.stdout.startswith("ledger: 1 records, audit: 4 records, egress: 3 records")
    wrong = fedmed("ledger", "verify", site, "--anchor", f"9:{anchor.split(':')[1]}", "--json")
    assert wrong.returncode == 1 and "missing at its end" in json.loads(wrong.stdout)["faults"][0]
    assert wrong.stderr.startswith("error: 1 faults")
    assert fedmed("ledger", "export", site, "--out", tmp_path / "x.json").returncode == 0
    kept = json.loads((tmp_path / "x.json").read_text())
    assert len(kept["egress"]) == 3 and kept["faults"] == [] and f"{kept['anchor']['sequence']}" == anchor[0]
    page = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    for line in whole.stdout.splitlines()[1:]:
        assert line in page
    for line in shown.stdout.splitlines()[1:3]:
        assert line in page


def test_the_policy_page_is_the_model():
    page = (ROOT / "docs" / "site-policy.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `([a-z.-]+)` \| `([^`]*)` \|", page, re.MULTILINE))
    expected: dict[str, str] = {}
    for model, prefix in (
        (SiteConfig, ""), (SitePolicy, "policy."), (Approval, "policy.approval."), (TrainingRules, "policy.training."),
        (MetricRules, "policy.metrics."), (PrivacyRules, "policy.privacy."),
    ):  # fmt: skip
        for field in model.model_fields.values():
            if field.alias not in ("policy", "approval", "training", "metrics", "privacy") or (
                not prefix and field.alias == "metrics"
            ):
                value = None if field.is_required() else field.default
                expected[f"{prefix}{field.alias}"] = json.dumps(list(value) if isinstance(value, tuple) else value)
    assert shown == expected


def test_a_refusal_names_its_rule_and_is_public():
    error = PolicyRefused("no (policy.paused)", rule="policy.paused")
    assert error.public == str(error) and error.rule == "policy.paused"
