"""What harms a ledger: kills at every write, full and read-only disks, damage, two writers, edits, old copies."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path

import pytest
from kill_points import AVAILABLE, run_killed
from records import RUN, cohort, keys_in, opened, rules, step, until_refused

from fedmed.errors import BudgetExhausted, LedgerUnusable
from fedmed.privacy.audit_log import audit_log
from fedmed.privacy.chain import Anchor
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.verification import examine

TRACED = pytest.mark.skipif(not AVAILABLE, reason="system calls are counted on Linux, x86-64")
PLAN = step(2.0, 1.0, 1)  # no sampling: its arithmetic takes no time


def child(act) -> int:
    """Run in a forked process; its exit status, 3 for a LedgerUnusable."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except LedgerUnusable:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wound(folder: Path, statement: str, *values: object) -> None:
    """What somebody with the file and a text book does."""
    with sqlite3.connect(folder / "ledger" / "ledger.sqlite") as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement, values)
    connection.close()


def filled(folder: Path, rounds: int = 4) -> Ledger:
    ledger = opened(folder, epsilon=60.0)
    for number in range(1, rounds + 1):
        ledger.settle(ledger.reserve(RUN, number, [PLAN], cohort(keys_in(folder))), [PLAN])
    return ledger


# Killed.


def killed_round(folder: Path, at: int | None) -> tuple[int, int]:
    """A round that is killed before its write number `at`; how many it began, and how many releases it made."""
    keys_in(folder)
    shown = folder / "released"

    def act() -> None:
        ledger = opened(folder, epsilon=60.0)
        for number in (1, 2):
            held = ledger.reserve(RUN, number, [PLAN], cohort(ledger.keys))
            with shown.open("ab", buffering=0) as file:
                file.write(b".")  # what the reservation allows: it counts as spent from here on
            ledger.settle(held, [PLAN])

    begun = run_killed(act, at)
    return begun, len(shown.read_bytes()) if shown.exists() else 0


def check_after_kill(folder: Path, at: int) -> None:
    folder.mkdir()
    _, released = killed_round(folder, at)
    ledger = opened(folder, epsilon=60.0)
    recorded = sum(event.steps for charge in ledger.charges.values() for event in charge.events)
    assert released <= recorded <= released + 1
    ledger.settle(ledger.reserve(RUN, 3, [PLAN], cohort(ledger.keys)), [PLAN])
    assert examine(folder, ledger.keys.public).faults == ()


@TRACED
def test_p14_killed_at_some_writes_no_release_is_uncounted(tmp_path):
    (tmp_path / "whole").mkdir()
    examine(tmp_path / "warm", filled(tmp_path / "warm").keys.public)  # imports belong to no kill
    writes, released = killed_round(tmp_path / "whole", None)
    assert released == 2 and writes > 20
    for at in range(3, writes, writes // 5):
        check_after_kill(tmp_path / str(at), at)


@TRACED
@pytest.mark.slow
def test_p14_killed_at_every_write_no_release_is_uncounted(tmp_path):
    (tmp_path / "whole").mkdir()
    writes, _ = killed_round(tmp_path / "whole", None)
    for at in range(1, writes + 1):
        check_after_kill(tmp_path / str(at), at)


@TRACED
@pytest.mark.slow
def test_killed_at_every_write_keys_are_whole_or_not_there(tmp_path):
    count = run_killed(lambda: keys_in(tmp_path / "whole") and None, None)
    for at in range(1, count + 1):
        run_killed(lambda at=at: keys_in(tmp_path / str(at)) and None, at)
        assert keys_in(tmp_path / str(at)).public


def test_what_a_killed_process_reserved_stays_charged_in_full(tmp_path):
    keys_in(tmp_path)

    def act() -> None:
        opened(tmp_path).reserve(RUN, 1, [step(steps=50)], cohort(keys_in(tmp_path)))
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(act) == -signal.SIGKILL
    (charge,) = opened(tmp_path).charges.values()
    assert not charge.settled and charge.events[0].steps == 50


# Disks.


def test_on_a_full_disk_nothing_is_allowed_and_nothing_is_lost(tmp_path):
    ledger = filled(tmp_path)
    before = ledger.head
    ledger.close()

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (tmp_path / "ledger" / "witness.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
        opened(tmp_path, epsilon=60.0).reserve(RUN, 9, [PLAN], cohort(ledger.keys))

    assert child(act) == 3
    again = opened(tmp_path, epsilon=60.0)
    assert again.head == before
    again.reserve(RUN, 9, [PLAN], cohort(ledger.keys))
    assert examine(tmp_path, ledger.keys.public).faults == ()


def test_a_full_database_refuses_and_the_witness_is_taken_up(tmp_path):
    ledger = filled(tmp_path)
    ledger._storage._opened().execute("PRAGMA max_page_count = 1")  # SQLite's own disk-full
    with pytest.raises(LedgerUnusable) as refused:
        until_refused(lambda number: ledger.reserve(RUN, number, [PLAN], cohort(ledger.keys)))
    assert refused.value.rule == "ledger.disk-full"
    before = ledger.head.sequence
    again = opened(tmp_path, epsilon=60.0)
    assert again.head.sequence == before + 2  # what the witness had been told, and the note of it
    assert examine(tmp_path, ledger.keys.public).faults == ()


def test_on_a_read_only_disk_nothing_is_allowed_but_everything_can_be_read():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents are closed to other users
        folder = Path(name)
        ledger = filled(folder)
        ledger.close()
        for path in (folder, folder / "ledger", *(folder / "ledger").iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)

        def act() -> None:
            if os.getuid() == 0:  # to whom no mode is a hindrance
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            assert examine(folder, ledger.keys.public).faults == ()
            Ledger.open(folder / "ledger", keys=ledger.keys, policy=rules(epsilon=60.0))

        assert child(act) == 3
        for path in (folder, folder / "ledger"):
            path.chmod(0o755)


def test_a_damaged_page_refuses(tmp_path):
    ledger = filled(tmp_path, 12)
    ledger.close()
    path = tmp_path / "ledger" / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = bytearray(path.read_bytes())
    for start in range(4096, len(content), 512):
        content[start + 100 : start + 140] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(LedgerUnusable):
        opened(tmp_path, epsilon=60.0)
    path.write_bytes(b"not a database at all" * 300)
    with pytest.raises(LedgerUnusable) as refused:
        opened(tmp_path, epsilon=60.0)
    assert refused.value.rule == "ledger.damaged"


# Two writers.


def test_two_processes_at_once_never_overspend_and_lose_nothing(tmp_path):
    keys = keys_in(tmp_path)
    opened(tmp_path, epsilon=8.0)
    counts = [tmp_path / "one", tmp_path / "two"]

    def spend(count: Path) -> None:
        ledger = opened(tmp_path, epsilon=8.0)
        for number in range(100):
            try:
                held = ledger.reserve(f"{RUN} {count.name}", number, [step(4.0, 1.0, 1)], cohort(keys))
                ledger.settle(held, held.events)
            except BudgetExhausted:
                return
            with count.open("ab") as file:
                file.write(b".")

    pids = []
    for count in counts:
        pid = os.fork()
        if pid == 0:
            try:
                spend(count)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    done = sum(len(count.read_bytes()) for count in counts if count.exists())
    ledger = opened(tmp_path, epsilon=8.0)
    assert done == len(ledger.charges) > 5
    alone = opened(tmp_path / "alone", epsilon=8.0)
    plan = [step(4.0, 1.0, 1)]
    assert until_refused(lambda number: alone.reserve(RUN, number, plan, cohort(alone.keys)))[0] == done
    assert examine(tmp_path, keys.public).faults == ()


# Edits, and old copies.


def test_the_database_itself_refuses_edits_and_deletions(tmp_path):
    filled(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "ledger" / "ledger.sqlite")
    for statement in ("DELETE FROM records WHERE sequence = 3", "UPDATE records SET line = ''", "DELETE FROM cohorts"):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            connection.execute(statement)
    connection.close()


def lower(line: str) -> str:
    """A record with fewer steps than were done."""
    facts = json.loads(line)
    facts["body"]["events"][0]["noise_multiplier"] = 99.0
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


WOUNDS = {
    "edited": ("UPDATE records SET line = ? WHERE sequence = 3", "was edited"),
    "deleted": ("DELETE FROM records WHERE sequence = 4", "missing or out of order"),
    "reordered": (
        "UPDATE records SET sequence = CASE sequence WHEN 4 THEN -6 ELSE -4 END WHERE sequence IN (4, 6)",
        "",
    ),
    "truncated": ("DELETE FROM records WHERE sequence > 7", "missing at its end"),
    "replaced": ("UPDATE cohorts SET members = x'00'", "cohort"),
}


@pytest.mark.parametrize("kind", WOUNDS)
def test_p11_verify_finds_what_was_done_to_a_ledger(tmp_path, kind):
    ledger = filled(tmp_path)
    ledger.close()
    statement, fault = WOUNDS[kind]
    line = examine(tmp_path, ledger.keys.public).records[2].line
    wound(tmp_path, statement, *([lower(line)] if "?" in statement else []))
    if kind == "reordered":
        wound(tmp_path, "UPDATE records SET sequence = -sequence WHERE sequence < 0")
    found = examine(tmp_path, ledger.keys.public).faults
    assert found and any(fault in each for each in found)
    if kind == "truncated":  # the witness has what is missing: it is charged again
        assert opened(tmp_path, epsilon=60.0).head.sequence > ledger.head.sequence
    else:
        with pytest.raises(LedgerUnusable):
            opened(tmp_path, epsilon=60.0)


def test_p11_a_forged_record_needs_the_sites_key(tmp_path):
    ledger, other = filled(tmp_path / "a"), filled(tmp_path / "b")
    with pytest.raises(LedgerUnusable) as refused:
        Ledger.open(tmp_path / "a" / "ledger", keys=other.keys, policy=rules(epsilon=60.0))
    assert refused.value.rule in ("ledger.signature", "ledger.forked")
    assert any("not signed" in fault for fault in examine(tmp_path / "a", other.keys.public).faults)
    assert examine(tmp_path / "a", ledger.keys.public).faults == ()


def test_p11_a_truncation_of_every_copy_here_is_found_against_an_anchor_kept_elsewhere(tmp_path):
    ledger = filled(tmp_path)
    old = tmp_path / "old"
    ledger.close()
    shutil.copytree(tmp_path / "ledger", old / "ledger")
    ledger.settle(ledger.reserve(RUN, 5, [PLAN], cohort(ledger.keys)), [PLAN])
    assert examine(old, ledger.keys.public).faults == ()
    found = examine(old, ledger.keys.public, anchors=[ledger.head]).faults
    assert found == (f"ledger: 2 records are missing at its end: an anchor names record {ledger.head.sequence}",)
    wrong = Anchor(sequence=2, hash="0" * 64, signature="")
    assert "another one" in examine(old, ledger.keys.public, anchors=[wrong]).faults[0]
    beside = tmp_path / "ledger" / "witness.jsonl"
    assert "missing" in examine(old, ledger.keys.public, witnesses=[beside]).faults[0]


def test_p11_a_restored_old_copy_is_charged_with_the_gap(tmp_path):
    ledger = filled(tmp_path / "site")
    ledger.close()
    elsewhere = str(tmp_path / "far")
    away = Ledger.open(tmp_path / "site" / "ledger", keys=ledger.keys, policy=rules(epsilon=60.0, witness=elsewhere))
    away.close()
    backup = tmp_path / "backup"
    shutil.copytree(tmp_path / "site" / "ledger", backup)
    held = away.reserve(RUN, 5, [step(0.9, 1.0, 1)], cohort(ledger.keys, range(500, 510)))
    away.settle(held, held.events)
    spent, head = away.epsilon_rdp, away.head
    away.close()
    shutil.rmtree(tmp_path / "site" / "ledger")
    shutil.copytree(backup, tmp_path / "site" / "ledger")
    back = Ledger.open(tmp_path / "site" / "ledger", keys=ledger.keys, policy=rules(epsilon=60.0, witness=elsewhere))
    assert back.head.sequence == head.sequence + 1  # the note that they came from the witness
    assert back.epsilon_rdp > spent  # whom the gap touched is not known any more: everybody is charged
    for_all = back.epsilon_rdp
    back.reserve(RUN, 6, [PLAN], cohort(ledger.keys, range(500, 510)))
    assert spent < back.epsilon_rdp < for_all  # once they are named again, they alone are
    examined = examine(tmp_path / "site", ledger.keys.public, anchors=[head])
    assert not [fault for fault in examined.faults if "ledger" in fault and "cohort" not in fault]


def test_p11_a_copy_that_went_on_by_itself_is_refused(tmp_path):
    ledger = filled(tmp_path / "a")
    ledger.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    filled(tmp_path / "b", 1)
    ledger.reserve(RUN, 5, [PLAN], cohort(ledger.keys, [7]))
    ledger.close()
    shutil.copy(tmp_path / "b" / "ledger" / "witness.jsonl", tmp_path / "a" / "ledger" / "witness.jsonl")
    with pytest.raises(LedgerUnusable) as refused:
        opened(tmp_path / "a", epsilon=60.0)
    assert refused.value.rule == "ledger.forked"


def test_p11_a_ledger_that_is_swapped_under_a_running_process_is_refused(tmp_path):
    ledger = filled(tmp_path / "a")
    other = filled(tmp_path / "b")
    other.close()
    ledger.close()
    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (tmp_path / "a" / "ledger" / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "b" / "ledger" / "ledger.sqlite", tmp_path / "a" / "ledger" / "ledger.sqlite")
    with pytest.raises(LedgerUnusable):
        ledger.reserve(RUN, 5, [PLAN], cohort(ledger.keys))


def test_a_half_written_line_of_the_witness_was_never_said(tmp_path):
    ledger = filled(tmp_path)
    path = tmp_path / "ledger" / "witness.jsonl"
    with path.open("ab") as file:
        file.write(b'{"body":{"kind":"reserved"')
    again = opened(tmp_path, epsilon=60.0)
    assert again.head == ledger.head
    again.reserve(RUN, 9, [PLAN], cohort(ledger.keys))
    assert examine(tmp_path, ledger.keys.public).faults == ()


def test_a_witness_that_cannot_be_reached_refuses(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LedgerUnusable) as refused:
        opened(tmp_path, witness=str(tmp_path / "file" / "deeper"))
    assert refused.value.rule == "chain.unwritable"


def test_a_clock_that_went_back_is_told_and_is_no_fault(tmp_path):
    ledger = filled(tmp_path)
    for time in ("2026-05-02T10:00:00.000Z", "2001-01-01T00:00:00.000Z"):
        audit_log(tmp_path).append({"kind": "decision", "time": time, "allowed": True}, ledger.keys)
    found = examine(tmp_path, ledger.keys.public)
    (warning,) = found.warnings
    assert not found.faults, "it is harmless, and stays so for ever"
    assert warning == "audit.jsonl: the clock went back before record 2 (nothing is spent by time)"
