"""A task at a hospital: what it is kept from, what ends it, and what the health says after it."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from real_consortium import free_port, make_site

from fedmed.deployment import task
from fedmed.deployment.health import CONFINEMENT, health_endpoint, site_facts
from fedmed.deployment.site_folder import read_site_folder
from fedmed.deployment.task import limit_s
from fedmed.errors import ConfigError
from fedmed.federated.local_worker import HEADER_LIMIT, RUN_ID, answer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with keys; nobody runs."""
    folder = make_site(tmp_path_factory.mktemp("site"), "a-40")
    path = folder / "site.toml"
    text = path.read_text().replace('["toy:network"', '["toy:hanging", "toy:greedy", "toy:network"')
    path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def probe(site):
    """What tasks of that site met, tried once for all tests."""
    done = subprocess.run(
        [sys.executable, str(HERE / "task_probe.py"), str(site)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


def test_a_task_trains_and_its_answer_comes_back(probe):
    assert probe["real"][0] == "ok" and "network" in probe["real"][1]
    assert probe["ledger"]


@linux
def test_a_task_reaches_no_network(probe):
    assert not probe["reached"]
    assert "Error" in probe["tried"]["connect"] and "Error" in probe["tried"]["send"]


@linux
def test_a_task_reads_the_data_and_writes_to_its_own_folders_alone(probe):
    tried = probe["tried"]
    for act in ("write data", "remove data", "write key"):
        assert tried[act].startswith("PermissionError"), act
    assert tried["read data"] == "6"
    assert (tried["write state"], tried["rename state"]) == ("2", "renamed")
    assert tried["temporary"] == "flower/tmp"


@linux
def test_what_landlock_leaves_open_is_what_the_hospitals_page_says(probe):
    """Mode and times of its user's own files, and shared memory, which torch needs."""
    tried = probe["tried"]
    assert (tried["show data"], tried["date data"]) == ("None", "None")
    assert (tried["write shared memory"], tried["remove shared memory"]) == ("1", "None")
    page = (HERE.parent / "docs" / "security-for-hospitals.md").read_text(encoding="utf-8")
    assert "/dev/shm" in page and "chmod" in page


@linux
def test_a_task_has_the_processors_that_it_was_given(probe):
    assert probe["tried"]["processors"] == "1"


@linux
def test_a_task_that_hangs_is_ended_with_rule_and_hint_and_the_log_says_where(probe):
    code, reason = probe["hangs"]
    assert code == 2 and "no progress for 2 s" in reason and reason.endswith("(task-stalls-after-s)")
    assert "toy.py" in probe["log"] and "in forward" in probe["log"]


@linux
def test_a_task_that_computes_for_ever_is_ended_at_the_deadline(probe):
    code, reason = probe["late"]
    assert code == 2 and reason.endswith("strategy.round-timeout-s)")


@linux
def test_a_task_without_enough_memory_says_so(probe):
    code, reason = probe["memory"]
    assert code == 2 and "out of memory" in reason and "task-memory-gib" in reason


def test_a_task_that_was_killed_is_asked_again_by_the_server(probe):
    code, reason = probe["killed"]
    assert code == 8 and reason.endswith("(task.killed)")  # the code that `strategy.retries` counts


def test_a_task_without_room_on_the_disk_says_so_and_names_no_place(probe, site):
    code, reason = probe["no message"]
    assert code == 2 and reason.startswith("the site's disk is full") and reason.endswith("(task.disk)")
    code, reason = probe["no record"]
    assert code == 2 and re.search(r"\((ledger|chain)\.[a-z-]+\)$", reason), reason
    for name in ("no message", "no record"):
        assert str(site) not in probe[name][1] and ".jsonl" not in probe[name][1]
    assert probe["room again"] == probe["real"]


def test_no_task_stays(probe):
    assert not any(probe["left"])


@pytest.mark.parametrize(("slot", "code"), [(task.ANSWER, 0), ("../manifest.csv", 8)])
def test_an_answer_that_lies_in_a_file_of_the_tasks_own_choice_is_not_read(site, monkeypatch, slot, code):
    def work(site, channel, other, folder):
        channel.recv(HEADER_LIMIT)
        channel.sendall(answer(json.dumps({"slot": slot, "size": 0, "records": []}).encode()))
        os._exit(0)

    monkeypatch.setattr(task, "_work", work)
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN_ID)
    question = Message(RecordDict(), 1, "train")
    reply = task.ConfinedWorker(read_site_folder(site))(question, Context(1, 1, {}, RecordDict(), {}))
    assert (reply.error.code if reply.has_error() else 0) == code


@pytest.mark.parametrize(
    ("asked", "held"), [(60, 60), (0, 1), (1e9, 86_400), ("nan", 86_400), (float("inf"), 86_400), ("soon", 86_400)]
)
def test_a_deadline_is_a_number_whatever_the_server_says(asked, held):
    assert limit_s({"strategy.round-timeout-s": asked}, 86_400) == held


def test_a_task_ends_at_the_sites_own_limit_whatever_the_server_allows(probe):
    assert [limit_s({"strategy.round-timeout-s": asked}, 60.0) for asked in (20, 3600, "soon")] == [20, 60, 60]
    assert limit_s({}, 60.0) == 60
    code, reason = probe["too long"]
    assert code == 2 and "task-longest-s" in reason


def test_a_site_that_asks_for_confinement_refuses_tasks_where_it_is_not_in_force(probe):
    """The task is answered at once, with the rule, and nothing of it ran."""
    code, reason = probe["unconfined"]
    assert code == 2 and "require-confinement" in reason and "(network)" in reason
    assert "require-confinement" in probe["log"]
    assert probe["unconfined, not asked for"][0] == "ok"
    assert probe["recorded while unconfined"] == 0


def asked(port: int, path: str = "/health") -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def listening() -> set[int]:
    """The ports on which this process answers."""
    return {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}


def test_the_health_endpoint_says_what_the_records_say_and_names_nobody(probe, site):
    """`probe` has trained there once."""
    folder = read_site_folder(site)
    connected = True
    port = free_port()
    with health_endpoint(port, lambda: site_facts(folder, up_since="2026-01-01T00:00:00+00:00", connected=connected)):
        status, said = asked(port)
        assert status == 200
        assert (said["connected"], said["up_since"]) == (True, "2026-01-01T00:00:00+00:00")
        assert said["last_round"]["round"] == 1 and said["epsilon_left"] == 8.0 and said["problem"] is None
        assert said["last_refusal"] is None
        assert set(said["versions"]) == {"fedmed", "flwr", "torch"}
        text = json.dumps(said)
        assert not any(word in text for word in (folder.config.name, str(site), "toy", "PLANTED"))
        connected = False
        assert asked(port)[0] == 503
        assert asked(port, "/")[0] == 404
        with pytest.raises(ConfigError, match="choose another"), health_endpoint(port, dict):
            pass
    before = listening()
    with health_endpoint(0, dict):
        assert listening() == before


def test_records_that_are_damaged_show_in_the_health(probe, site, tmp_path):
    folder = Path(shutil.copytree(site, tmp_path / "copy"))
    (folder / "state" / "audit.jsonl").write_text("nonsense\n")
    said = site_facts(read_site_folder(folder), up_since="", connected=True)
    assert said["problem"]


def test_the_health_is_by_the_site_toml_of_now_and_says_what_a_task_is_kept_from(probe, site, tmp_path):
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    folder = read_site_folder(copy)

    def said():
        return site_facts(folder, up_since="", connected=True)

    assert (said()["epsilon_left"], said()["confinement"], said()["problem"]) == (8.0, None, None)
    text = folder.file.read_text()
    folder.file.write_text(re.sub(r"(?m)^epsilon = .*$", "epsilon = 3.0", text))
    (copy / "flower" / CONFINEMENT).write_text('{"network": "", "files": "all"}')
    assert (said()["epsilon_left"], said()["confinement"]) == (3.0, {"network": None, "files": "all"})
    folder.file.write_text("nonsense")
    assert "site.toml is wrong" in said()["problem"]
