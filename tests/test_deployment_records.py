"""A hospital's records are found by its folder, and compared with the witness that its policy names."""

import shutil

import pytest
from real_consortium import command, make_site
from records import RUN, cohort, step

from fedmed.deployment.checks import check_site
from fedmed.deployment.health import site_facts
from fedmed.deployment.records import records_at
from fedmed.deployment.site_folder import read_site_folder
from fedmed.errors import FedmedError, LedgerUnusable
from fedmed.privacy.audit_log import audit_log
from fedmed.privacy.keys import read_keys
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.policy import read_policy
from fedmed.types import rounded_up


@pytest.fixture
def north(tmp_path):
    """A hospital's folder whose witness lies elsewhere, with a ledger that was opened."""
    folder = make_site(tmp_path, "a-40")
    path = folder / "site.toml"
    path.write_text(path.read_text().replace('witness = "witness"', 'witness = "../far"'))
    opened(folder).close()
    return folder


def opened(folder) -> Ledger:
    return Ledger.open(
        folder / "state" / "ledger", keys=read_keys(folder / "keys"), policy=read_policy(folder / "site.toml")
    )


def test_the_folder_or_the_site_toml_will_do(north, capsys):
    for place in (north, north / "site.toml"):
        command("ledger", "verify", place)
    assert capsys.readouterr().out.count("whole: no edit") == 2
    assert records_at(north).folder == north / "state"
    assert len(list((north.parent / "far").iterdir())) == 1


def test_an_older_copy_is_found_by_the_witness_of_the_policy(north):
    shutil.copytree(north / "state" / "ledger", north.parent / "old")
    ledger = opened(north)
    ledger.reserve(RUN, 1, [step(0.9, 1.0, 1)], cohort(ledger.keys, range(20)))
    ledger.close()
    before = len(records_at(north).examine(records_at(north).key()).records)
    shutil.rmtree(north / "state" / "ledger")
    shutil.copytree(north.parent / "old", north / "state" / "ledger")
    found = records_at(north).examine(records_at(north).key())
    assert len(found.records) < before
    assert any("missing at its end" in fault for fault in found.faults)


@pytest.mark.parametrize("copy", [True, False], ids=["older-copy", "no-copy"])
@pytest.mark.parametrize("witness", [True, False], ids=["witness", "no-witness"])
def test_a_hospital_that_lost_its_machine_comes_back_with_what_it_spent_if_it_has_a_witness(north, copy, witness):
    """As the hospitals' page says, step by step; without a witness nothing here knows what is missing."""
    site, safe = north / "site.toml", north.parent / "safe"
    site.write_text(site.read_text() if witness else site.read_text().replace('"../far"', '""'))
    opened(north).close()
    shutil.copytree(north, safe)
    ledger = opened(north)
    people = cohort(ledger.keys, range(20))
    ledger.reserve(RUN, 1, [step(0.9, 1.0, 1)], people)
    spent, head = ledger.epsilon_rdp, ledger.head
    ledger.close()
    shutil.rmtree(north)
    shutil.copytree(safe, north, ignore=None if copy else shutil.ignore_patterns("state"))

    def faults(**known: object) -> tuple[str, ...]:
        return records_at(north).examine(records_at(north).key(), **known).faults

    if copy:
        assert any("missing at its end" in fault for fault in faults(anchors=[head]))
        assert bool(faults()) == witness
    back = opened(north)
    assert back.epsilon_rdp == pytest.approx(spent if witness else 0.0)
    if witness:
        assert all("members of a cohort are missing" in fault for fault in faults(anchors=[head])) and faults()
        back.reserve(RUN, 2, [step(40.0, 0.02, 1)], people)
        assert faults(anchors=[head]) == ()
    back.close()


@pytest.mark.parametrize("older", [True, False], ids=["older-copy", "none"])
def test_who_removes_the_state_or_puts_an_older_copy_there_gets_no_budget_back(tmp_path, older):
    """As `site init` leaves a site: its witness lies beside the state, and nothing has to be set."""
    folder = make_site(tmp_path, "a-40")
    opened(folder).close()
    shutil.copytree(folder / "state", tmp_path / "old")
    ledger = opened(folder)
    ledger.reserve(RUN, 1, [step(0.9, 1.0, 1)], cohort(ledger.keys, range(20)))
    spent = ledger.epsilon_rdp
    ledger.close()
    shutil.rmtree(folder / "state")
    if older:
        shutil.copytree(tmp_path / "old", folder / "state")
    back = opened(folder)
    assert spent > 0 and back.epsilon_rdp == pytest.approx(spent)
    back.close()


def test_records_cannot_be_used_with_new_keys(north):
    shutil.rmtree(north / "keys")
    command("site", "keygen", north)
    with pytest.raises(LedgerUnusable, match="not signed with this site's key"):
        opened(north)


def test_a_witness_that_cannot_be_reached_is_a_fault_and_not_silence(north):
    shutil.rmtree(north.parent / "far")
    with pytest.raises(FedmedError, match="1 faults"):
        command("ledger", "verify", north)


def test_the_check_says_whether_the_witness_can_be_written(north):
    def found():
        return {each.what: each for each in check_site(north, dry_round=False)}["witness"]

    assert found().ok
    shutil.rmtree(north.parent / "far")
    assert not found().ok and "make it" in found().said and str(north.parent) not in found().said
    assert not (north.parent / "far").exists()


def test_a_folder_without_records_is_named_and_no_key_is_asked_for(tmp_path):
    site = make_site(tmp_path, "b-20")
    for place in (tmp_path / "nowhere", site):
        with pytest.raises(FedmedError, match=f"{place.name}: no ledger was opened there"):
            command("ledger", "show", place)


def test_the_check_subtracts_what_the_ledger_decides_by_and_a_clock_does_not_fail_it(north, capsys):
    ledger = opened(north)
    ledger.reserve(RUN, 1, [step(1.0, 0.02, 200)], cohort(ledger.keys, range(20)))
    spent = ledger.spent()
    ledger.close()
    for time, allowed in (("2026-05-02", {"allowed": False, "rule": "paused"}), ("2001-01-01", {"allowed": True})):
        body = {"kind": "decision", "time": time, "task": "evaluate", "round": 1, **allowed}
        audit_log(north / "state").append(body, ledger.keys)
    left = 8.0 - spent.epsilon_rdp
    shown = f"{8.0 - float(rounded_up(spent.epsilon_rdp, 3)):.3f}"
    assert shown != f"{8.0 - spent.epsilon:.3f}"
    (found,) = (each for each in check_site(north, dry_round=False) if each.what == "ledger")
    assert found.ok and f"{shown} is left" in found.said and "warning" in found.said
    facts = site_facts(read_site_folder(north), up_since="", connected=True)
    assert facts["epsilon_left"] == pytest.approx(left) and facts["problem"] is None
    assert facts["last_refusal"] == {"time": "2026-05-02", "rule": "paused"}
    command("ledger", "verify", north)
    assert "warning: audit.jsonl: the clock went back before record 2" in capsys.readouterr().out
