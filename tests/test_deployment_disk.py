"""A disk that is full in the middle of a run over TLS, at a hospital and at the server, and then has room again."""

import re
import shutil
import time
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from full_disks import MOUNTS, NO_MOUNT
from hospitals import Hospitals
from real_consortium import RUN, recorded, wait_for

from fedmed.deployment import warm
from fedmed.errors import ConfigError
from fedmed.privacy import keys as site_keys
from fedmed.privacy.verification import examine

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]
SITE = "b-20"
LONG = RUN.replace("rounds = 2", "rounds = 4\nlocal-steps = 30") + "round-timeout-s = 180\n"
PRIVATE = LONG.replace("toy:network", "toy:slow") + '[privacy]\nmode = "dp-sgd"\nepsilon = 3.0\n'
HEAVY = LONG.replace('"toy:network"', '"toy:heavy"\nwidth = 1000')  # 4 MB
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as a running task has; messages ask for it


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    """The server and one of three sites have small disks of their own."""
    if not MOUNTS:
        pytest.skip(NO_MOUNT)
    made = Hospitals(tmp_path_factory.mktemp("h"))
    made.small = {"server": 256, SITE: 16}
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


def test_a_task_that_cannot_even_be_made_is_answered_at_once():
    with Path("/dev/full").open("wb", buffering=0) as disk, pytest.raises(OSError, match="No space") as full:
        disk.write(b"x")
    asked = Message(RecordDict(), 2, "train")
    said = warm.failed(full.value)(asked, None).error.reason
    assert said.endswith("(task.disk)") and "/dev" not in said
    assert warm.failed(ConfigError("/srv/site.toml: nonsense"))(asked, None).error.reason == ConfigError.public


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first", "later"])
def test_a_server_whose_disk_was_full_goes_on_by_itself_and_counts_every_round_once(hospitals, moment):
    """First: while the first network goes out. Later: before the second checkpoint is written."""
    hospitals.complete()
    disk, kind = hospitals.started["server"], "run_started" if moment == "first" else "round_finished"
    submitted = hospitals.submit(HEAVY.replace('name = "toy"', f'name = "{moment}"'))
    wait_for(lambda: hospitals.seen(moment, kind, int(moment == "later")), 400, submitted.log.read_text)
    disk.fill()
    full = time.monotonic()
    wait_for(lambda: time.monotonic() > full + 40, 60, str)
    assert disk.process.poll() is None
    assert not hospitals.seen(moment, "run_finished", 4)
    disk.free()
    wait_for(lambda: hospitals.seen(moment, "run_finished", 4), 500, lambda: disk.log.read_text()[-5000:])
    submitted.process.wait(100)
    result = hospitals.checked(hospitals.run_folder(moment))
    assert [entry["round"] for entry in result["rounds_log"]] == [1, 2, 3, 4]
    assert str(disk.folder) not in submitted.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between", "training"])
def test_a_site_whose_disk_is_full_misses_a_round_and_its_ledger_says_enough(hospitals, tmp_path, moment):
    """The last of this file: sites that have trained with privacy refuse to train without it."""
    hospitals.complete()
    disk = hospitals.started[SITE]
    before = recorded(disk.folder, "audit", "train")
    submitted = hospitals.submit(PRIVATE.replace('name = "toy"', f'name = "{moment}"'))
    wait_for(lambda: hospitals.seen(moment, "round_finished", 1), 400, submitted.log.read_text)
    if moment == "training":
        wait_for(lambda: recorded(disk.folder, "audit", "train") > before + 1, 100, submitted.log.read_text)
    disk.fill()
    wait_for(lambda: hospitals.seen(moment, "round_finished", 2), 300, submitted.log.read_text)
    disk.free()
    submitted.process.wait(300)
    result = hospitals.checked(hospitals.run_folder(moment))
    assert [SITE in entry["joined"] for entry in result["rounds_log"]] == [True, False, True, True]
    (reason,) = (failure["reason"] for entry in result["rounds_log"] for failure in entry["failed"])
    assert "disk is full" in reason or "No space left" in reason
    assert re.search(r"\((task\.disk|ledger\.[a-z-]+|chain\.[a-z-]+)\)$", reason), reason
    assert "/" not in reason and ".json" not in reason
    shutil.copytree(disk.folder / "state", tmp_path / "state")  # SQLite looks for the real path, which is elsewhere
    found = examine(tmp_path / "state", site_keys.read_public(disk.folder / "keys" / site_keys.PUBLIC))
    assert found.faults == ()
    charges = [charge for charge in found.balance.charges.values() if charge.run.startswith(f"{moment}-")]
    charged = sum(event.steps for charge in charges for event in charge.events)
    left = [e for e in hospitals.events(moment) if (e["kind"], e.get("site")) == ("update_received", SITE)]
    assert charged >= sum(event["steps"] for event in left) == 90
    assert all(event["epsilon"] <= found.spent.epsilon for event in left)
