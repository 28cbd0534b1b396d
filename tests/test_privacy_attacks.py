"""Attempts to spend more than a hospital allows: each ends with the rule that stopped it, and below the limit."""

import os
import shutil
from pathlib import Path

import pytest
from records import RUN, cohort, keys_in, opened, patients, rules, step, until_refused

from fedmed.errors import BudgetExhausted, LedgerUnusable, PolicyRefused
from fedmed.privacy.cohort import cohort_of
from fedmed.privacy.ledger import Ledger
from fedmed.types import PrivacyEvent

CAP = 4.0
PLAN = step(3.0, 1.0, 1)  # ε of about 1.5 a time
BUDGET = "policy.privacy.epsilon"


@pytest.fixture
def spent_out(tmp_path):
    """A site whose patients 0 to 39 have nothing left."""
    ledger, keys = opened(tmp_path, epsilon=CAP), keys_in(tmp_path)
    until_refused(lambda round: ledger.settle(ledger.reserve(RUN, round, [PLAN], cohort(keys)), [PLAN]))
    return ledger


def refusal(ledger: Ledger, events: list[PrivacyEvent], *, run: str = RUN, round: int = 1, who=None) -> str:
    """The rule that refuses, after a look at what is recorded."""
    before = ledger.epsilon_rdp
    with pytest.raises((PolicyRefused, LedgerUnusable)) as refused:
        ledger.reserve(run, round, events, who or cohort(ledger.keys))
    assert ledger.epsilon_rdp == before <= CAP
    return refused.value.rule


def test_lower_noise(spent_out, tmp_path):
    assert refusal(spent_out, [step(0.5, 1.0, 1)]) == BUDGET
    strict = opened(tmp_path, epsilon=CAP, min_noise_multiplier=2.5)
    assert refusal(strict, [step(0.01, 0.001, 1)]) == "policy.privacy.min-noise-multiplier"


def test_more_rounds(spent_out):
    assert refusal(spent_out, [PLAN], round=1000) == BUDGET


def test_another_delta(spent_out, tmp_path):
    with pytest.raises(PolicyRefused) as refused:
        opened(tmp_path, epsilon=CAP, delta=1e-3)
    assert refused.value.rule == "policy.privacy.delta"


def test_another_unit(spent_out):
    for unit in ("image", "site"):
        event = PrivacyEvent(mechanism="gaussian", noise_multiplier=3.0, unit=unit, images_per_patient=2)
        assert refusal(spent_out, [event]) == BUDGET


def test_another_mechanism_or_release(spent_out):
    assert refusal(spent_out, [step(3.0, 1.0, 1, release="metrics")]) == BUDGET
    assert refusal(spent_out, [step(1.0, 0.3, 30)]) == BUDGET


def test_a_new_run_name(spent_out):
    assert refusal(spent_out, [PLAN], run="a fresh study") == BUDGET


def test_a_renamed_manifest(spent_out):
    again = cohort(spent_out.keys)
    assert refusal(spent_out, [PLAN], who=again) == BUDGET  # a file's name is nowhere in a cohort


def test_a_reordered_manifest(spent_out):
    named = patients(range(40))
    assert cohort_of(dict(reversed(named.items())), spent_out.keys) == cohort(spent_out.keys)


def test_a_re_pseudonymised_manifest(spent_out):
    assert refusal(spent_out, [PLAN], who=cohort(spent_out.keys, ids="new-pseudonym")) == BUDGET


def test_the_same_ids_with_other_pictures(spent_out):
    assert refusal(spent_out, [PLAN], who=cohort(spent_out.keys, pixels="second-visit")) == BUDGET


def test_a_chain_of_manifests_with_new_ids_and_partly_new_pictures(spent_out):
    people = {f"n-{number}": [f"x-{number}-0".encode(), f"new-{number}".encode()] for number in range(40)}
    assert refusal(spent_out, [PLAN], who=cohort_of(people, spent_out.keys)) == BUDGET
    later = {f"m-{number}": [f"new-{number}".encode()] for number in range(40)}  # nothing of the first manifest
    assert refusal(spent_out, [PLAN], who=cohort_of(later, spent_out.keys)) == BUDGET


def test_a_subsetted_manifest(spent_out):
    assert refusal(spent_out, [PLAN], who=cohort(spent_out.keys, [17])) == BUDGET


def test_a_manifest_with_new_patients_added(spent_out):
    assert refusal(spent_out, [PLAN], who=cohort(spent_out.keys, range(39, 500))) == BUDGET
    spent_out.reserve(RUN, 1, [PLAN], cohort(spent_out.keys, range(40, 500)))  # who was never there may


def test_a_manifest_without_links(spent_out):
    unknown = cohort_of({"nobody-knows": []}, spent_out.keys)
    assert refusal(spent_out, [PLAN], who=unknown) == BUDGET


def test_a_replayed_round(tmp_path):
    ledger = opened(tmp_path, epsilon=CAP)
    who = cohort(ledger.keys)
    allowed, refused = until_refused(lambda _: ledger.settle(ledger.reserve(RUN, 1, [PLAN], who), [PLAN]))
    assert refused.rule == BUDGET and 1 <= allowed < 10
    assert sum(len(charge.events) for charge in ledger.charges.values()) == allowed


def test_a_restarted_site(spent_out, tmp_path):
    spent_out.close()
    assert refusal(opened(tmp_path, epsilon=CAP), [PLAN]) == BUDGET


def test_a_site_restarted_between_reserving_and_settling(tmp_path):
    keys = keys_in(tmp_path)
    allowed = 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                opened(tmp_path, epsilon=CAP).reserve(RUN, 1, [PLAN], cohort(keys))
            except BudgetExhausted:
                os._exit(7)
            finally:
                os._exit(0)  # before it is settled
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7:
            break
        allowed += 1
    ledger = opened(tmp_path, epsilon=CAP)
    assert 1 <= allowed < 10 and len(ledger.charges) == allowed
    assert refusal(ledger, [PLAN]) == BUDGET


def test_a_moved_clock(spent_out, tmp_path):
    database = tmp_path / "ledger" / "ledger.sqlite"
    for when in (0, 2**31):  # nothing is given back by time: files from 1970 or 2038 change nothing
        os.utime(database, (when, when))
        assert refusal(opened(tmp_path, epsilon=CAP), [PLAN]) == BUDGET


def test_a_copied_database(tmp_path):
    keys = keys_in(tmp_path)
    elsewhere = str(tmp_path / "far")
    one = Ledger.open(tmp_path / "one", keys=keys, policy=rules(epsilon=CAP, witness=elsewhere))
    one.reserve(RUN, 1, [PLAN], cohort(keys))
    one.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = Ledger.open(tmp_path / "two", keys=keys, policy=rules(epsilon=CAP, witness=elsewhere))
    ledgers = [one, two]
    allowed, refused = until_refused(lambda round: ledgers[round % 2].reserve(RUN, round, [PLAN], cohort(keys)))
    assert refused.rule == BUDGET
    alone = opened(tmp_path / "alone", epsilon=CAP)
    assert 1 + allowed == until_refused(lambda round: alone.reserve(RUN, round, [PLAN], cohort(alone.keys)))[0]


def test_an_empty_ledger_in_place_of_the_spent_one(spent_out, tmp_path):
    spent_out.close()
    for path in (tmp_path / "ledger").glob("ledger.sqlite*"):
        path.unlink()
    again = opened(tmp_path, epsilon=CAP)
    assert again.epsilon_rdp > 0
    with pytest.raises(BudgetExhausted) as refused:
        again.reserve(RUN, 1, [PLAN], cohort(again.keys, [12345]))  # who is charged is lost with it: everybody
    assert refused.value.rule == BUDGET


def test_two_coordinators_at_once(tmp_path):
    ledgers = [opened(tmp_path, epsilon=CAP) for _ in range(2)]
    who = cohort(ledgers[0].keys)
    allowed, refused = until_refused(lambda n: ledgers[n % 2].reserve(f"run {n % 2}", n, [PLAN], who))
    assert refused.rule == BUDGET
    assert allowed == len(opened(tmp_path, epsilon=CAP).charges) < 10


def test_a_policy_edited_in_mid_run(tmp_path):
    ledger = opened(tmp_path, epsilon=CAP)
    ledger.reserve(RUN, 1, [PLAN], cohort(ledger.keys))
    raised = opened(tmp_path, epsilon=100.0)
    _, refused = until_refused(lambda number: raised.reserve(RUN, 2 + number, [PLAN], cohort(ledger.keys)))
    assert "as it was when the run began" in str(refused)
    assert refused.rule == BUDGET and raised.epsilon_rdp <= CAP
    raised.reserve("a later run", 1, [PLAN], cohort(ledger.keys))  # which the hospital may allow
    lowered = opened(tmp_path, epsilon=0.5)
    with pytest.raises(BudgetExhausted):
        lowered.reserve("a later run", 2, [PLAN], cohort(ledger.keys))


def test_no_message_of_a_refusal_holds_an_id_or_a_path(spent_out, tmp_path: Path):
    with pytest.raises(BudgetExhausted) as refused:
        spent_out.reserve(RUN, 1, [PLAN], cohort(spent_out.keys))
    for text in (str(refused.value), refused.value.public):
        assert "p-1" not in text and str(tmp_path) not in text
