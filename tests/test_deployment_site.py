"""A hospital's side without a server: what tasks are kept from, what ends them, what the runner says and checks."""

import ctypes
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.heartbeat import HeartbeatFailure, HeartbeatSender
from flwr.supercore.task_identity import TaskIdentity
from full_disks import MOUNTS, mounted
from real_consortium import free_port, make_site

from fedmed.deployment import confinement, door, launcher, node, processes, task
from fedmed.deployment.checks import check_site
from fedmed.deployment.confinement import Confinement
from fedmed.deployment.dry_round import device
from fedmed.deployment.health import CONFINEMENT, health_endpoint, site_facts
from fedmed.deployment.launcher import Launcher
from fedmed.deployment.site_folder import read_site_folder
from fedmed.deployment.supernode import LONGEST_REST_S, WHY, _why, rest_s
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


CONFINE = """
import encodings.idna, json, os, socket, sys  # all that is needed later: a plain user may not read this Python
from pathlib import Path
from fedmed.deployment import confinement
if sys.argv[2] == "user" and os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
if sys.argv[2] == "landlock":
    confinement._own_network = lambda: ""
if sys.argv[2] == "unmapped":  # as under AppArmor: a namespace may be made, and its maps not be written
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    confinement._landlock([Path(sys.argv[1])])
held = confinement.confine(writable=[Path(sys.argv[1])], memory_gib=0, processors=0)
def error(act):
    try:
        act()
        return ""
    except OSError as problem:
        return type(problem).__name__
said = {
    "held": vars(held),
    "connect": error(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), timeout=5)),
    "send": error(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(sys.argv[3])))),
    "outside": error(lambda: Path(sys.argv[1]).parent.joinpath("x").write_bytes(b"")),
    "inside": error(lambda: Path(sys.argv[1]).joinpath("x").write_bytes(b"")),
    "uid": os.geteuid(),
}
print(json.dumps(said))
"""


def landlock_version() -> int:
    """Of the kernel, which and not fedmed decides what can be asked of it."""
    return ctypes.CDLL(None, use_errno=True).syscall(444, None, 0, 1) if sys.platform == "linux" else 0


@pytest.mark.skipif(landlock_version() < 4, reason="Landlock refuses TCP from Linux 6.7 on")
@pytest.mark.parametrize(
    "who", ["user", "landlock", pytest.param("unmapped", marks=pytest.mark.skipif(os.geteuid() != 0, reason="as root"))]
)
def test_what_is_said_to_hold_does_hold_for_a_plain_user_and_where_namespaces_are_forbidden(who):
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        inside = Path(folder) / "inside"
        inside.mkdir()
        for place in (inside.parent, inside):
            place.chmod(0o777)  # so that nothing but Landlock refuses
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", CONFINE, str(inside), who, port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    held = Confinement(**said["held"])
    assert said["uid"] or who == "landlock" or os.geteuid()
    assert held.network and held.files
    assert said["connect"]
    assert bool(said["send"]) == (held.network == confinement.NO_NETWORK), "Landlock lets UDP pass, a namespace nothing"
    assert (said["outside"], said["inside"]) == ("PermissionError", "")


def test_what_does_not_hold_is_said(tmp_path):
    assert str(Confinement(network="", files="all", memory="1 GiB", processors="1 of 2")).startswith(
        "network: NOT limited, this system does not allow it; files: all"
    )


def test_a_kernel_on_which_any_file_may_be_cut_short_is_named():
    assert [("cut short" in confinement._files(version)) for version in range(1, 5)] == [True, True, False, False]
    assert confinement._files(0) == ""


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


WITHOUT_A_NAMESPACE = """
import runpy, sys
from fedmed.deployment import confinement
confinement._own_network = lambda: ""
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


@linux
def test_the_check_fails_and_the_log_and_health_say_so_where_a_site_asks_for_confinement_in_vain(site, tmp_path):
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    path = copy / "site.toml"

    def said(module: str) -> list[str]:
        """The lines of a program, until the one that a warm process ends its start with."""
        command = [sys.executable, "-c", WITHOUT_A_NAMESPACE, module, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
            lines = []
            for line in started.stdout:
                lines.append(line)
                if line == "ready for tasks\n":
                    started.kill()
            return lines

    what, ok, lax = json.loads(said("fedmed.deployment.dry_round")[-1])[0]
    assert (what, ok) == ("limits of a task", True) and "require-confinement = true" in lax
    path.write_text(path.read_text().replace("require-confinement = false", "require-confinement = true"))
    _, ok, refused = json.loads(said("fedmed.deployment.dry_round")[-1])[0]
    assert not ok and "(require-confinement)" in refused
    (line,) = (line for line in said("fedmed.deployment.warm") if line.startswith("every task: "))
    assert "each is refused" in line and "(network)" in line
    held = site_facts(read_site_folder(copy), up_since="", connected=True)["confinement"]
    assert "Landlock" in held["files"] and held["network"] != confinement.NO_NETWORK


@pytest.mark.parametrize(
    ("network", "landlock", "gaps"),
    [
        (confinement.NO_NETWORK, 3, ()),
        (confinement.NO_NETWORK, 2, ("files",)),
        (confinement.NO_NETWORK, 0, ("files",)),
        ("TCP refused by Landlock; UDP is not", 4, ("network",)),
        ("", 0, ("network", "files")),
    ],
)
def test_what_holds_in_part_is_a_gap(network, landlock, gaps):
    held = Confinement(network=network, files=confinement._files(landlock), memory="", processors="")
    assert held.gaps == gaps


def test_a_process_that_dies_again_and_again_is_started_ever_more_seldom():
    rests = [0.0]
    for _ in range(12):
        rests.append(rest_s(2.0, rests[-1]))
    assert rests[:5] == [0, 1, 2, 4, 8] and rests[-1] == LONGEST_REST_S
    assert rest_s(3600.0, 64.0) == 0


HEARTBEAT = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import flwr.supernode.cli as flower
from fedmed.deployment import door, node
def supernode():
    threading.Thread(target=lambda: 1 / 0).start()
    time.sleep(60)
flower.flower_supernode = supernode
node.joined_kit, node.clock_ahead_s = (lambda site: None), (lambda kit: 0.0)
Path(sys.argv[1], door.SOCKET).touch()
node.main(SimpleNamespace(flower=Path(sys.argv[1])))
"""


def test_a_supernode_whose_heartbeat_fails_ends_and_does_not_go_on_half_alive(tmp_path):
    words = [sys.executable, "-c", HEARTBEAT, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_door_whose_launcher_is_gone_ends_and_so_tells_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(door.SOCKET)
        listener.listen()
        start = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
        words = [sys.executable, "-I", "-S", door.__file__, str(tmp_path), "--token", "x"]
        with subprocess.Popen([sys.executable, "-c", start, *words]) as launching:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(100).endswith(b'"--token", "x"]\n')
                launching.kill()
                connection.settimeout(20)
                assert connection.recv(1) == b""


def test_a_process_that_cannot_be_killed_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(processes, "KILL_S", 0.2)
    with subprocess.Popen(["sleep", "30"]) as stuck, subprocess.Popen(["sleep", "30"]) as other:
        kill = os.kill
        monkeypatch.setattr(os, "kill", lambda pid, number: kill(pid, 0 if pid == stuck.pid else number))
        started = time.monotonic()
        processes.kill({stuck.pid, other.pid})
        assert time.monotonic() - started < 10
        assert stuck.poll() is None and other.poll() is not None
        kill(stuck.pid, signal.SIGKILL)


def test_a_launcher_that_proc_hides_is_not_gone(monkeypatch):
    own, words = Launcher(os.getpid()), {"here": b"python\0flower-superexec\0"}
    monkeypatch.setattr(launcher, "descendants", lambda pid: list(words))
    real = launcher._words
    monkeypatch.setattr(launcher, "_words", words.get)
    assert not own.gone()
    monkeypatch.setattr(launcher, "_words", real)
    words["999999999"] = words.pop("here")  # /proc has no such process: as if it were hidden
    assert not any(own.gone() for _ in range(5))
    monkeypatch.setattr(launcher, "descendants", lambda pid: [])
    assert [own.gone() for _ in range(3)] == [False, False, True]


def test_a_heartbeat_that_is_answered_with_an_error_is_sent_again(monkeypatch):
    monkeypatch.setattr(HeartbeatSender, "_heartbeat", HeartbeatSender._heartbeat)  # put back afterwards
    node.keep_beating()
    answers = iter([500, 429, 200])

    def beat() -> bool:
        request = httpx.Request("POST", "https://server/")
        httpx.Response(next(answers), request=request).raise_for_status()
        return True

    sender = HeartbeatSender(beat)
    for _ in range(2):
        with pytest.raises(HeartbeatFailure):
            sender._heartbeat()
    sender._heartbeat()


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


def test_the_log_rotates_and_keeps_five_files(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOG_BYTES", 1000)
    log = processes.log_file(tmp_path / "logs", "site")
    for number in range(500):
        log.info("line %d", number)
    log.handlers[0].close()
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["site.log", *(f"site.log.{count}" for count in range(1, 5))]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert "line 499" in files[0].read_text()


@pytest.mark.parametrize("code", [*WHY, 1, None])
def test_why_a_supernode_ended_is_told_in_a_sentence(code):
    told = _why(SimpleNamespace(bad_certificate=False, flower_code=code))
    assert {302: "node.key", 305: "this site's key", 603: "certificate", 606: "version"}.get(code, "") in told
    assert ("logs/site.log" in told, "lost the server" in told) == (code == 1, code is None)
    assert "certificate is refused" in _why(SimpleNamespace(bad_certificate=True, flower_code=code))


def test_a_gpu_that_is_not_there_is_named_before_a_round_needs_it():
    with pytest.raises(ConfigError, match="no such GPU"):
        device("cuda:99")
    assert device("cpu").startswith("cpu, ")


def test_the_log_goes_to_syslog_or_to_stderr_if_asked(tmp_path, monkeypatch, capsys):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as system:
        system.bind(str(tmp_path / "log"))
        system.settimeout(10)
        monkeypatch.setattr(processes, "SYSLOG", str(tmp_path / "log"))
        log = processes.log_file(tmp_path / "logs", "site", "syslog")
        log.info("it connects")
        assert re.fullmatch(rb"<\d+>fedmed-site: it connects\0?", system.recv(1000))
        for handler in log.handlers:
            handler.close()
    monkeypatch.setattr(processes, "SYSLOG", str(tmp_path / "nobody"))
    with pytest.raises(ConfigError, match="journal"):
        processes.log_file(tmp_path / "logs", "site", "syslog")
    processes.log_file(tmp_path / "logs", "site", "journal").log(logging.INFO, "it connects")
    assert capsys.readouterr().err == "it connects\n"
    assert not (tmp_path / "logs").exists()


DISK = """
import sys
from pathlib import Path
from fedmed.deployment import checks
checks.DISK_GIB = float(sys.argv[2])
print(checks._look("disk", lambda: checks.disk(checks.read_site_folder(Path(sys.argv[1])))).said)
"""


@pytest.mark.skipif(not MOUNTS, reason="this user may mount nothing")
def test_the_check_looks_at_the_disk_of_each_folder_with_advice_of_its_own(site, tmp_path):
    folder = Path(shutil.copytree(site, tmp_path / "copy"))
    said = mounted(folder / "cache", "size=1m", sys.executable, "-c", DISK, str(folder), "0.1").stdout
    assert said == "0.0 GiB free: make room, or choose another cache-dir. 0.1 GiB are needed\n"
    shutil.rmtree(folder / "state", ignore_errors=True)  # which the first task makes
    assert mounted(folder / "cache", "size=2g", sys.executable, "-c", DISK, str(folder), "0.1").stdout == "2 GiB free\n"


def test_the_check_shows_the_approval_and_its_end(site, tmp_path):
    folder = Path(shutil.copytree(site, tmp_path / "copy"))
    path = folder / "site.toml"
    text = path.read_text()

    def found(days: int):
        end = date.today() + timedelta(days=days)
        lines = f'[policy.approval]\npurpose = "pneumonia"\nexpires = {end}'
        path.write_text(re.sub(r"\[policy\.approval\].*?expires = \S+", lines, text, flags=re.DOTALL))
        return {each.what: each for each in check_site(folder, dry_round=False)}["approval"]

    assert found(400).ok and found(400).said.startswith("for pneumonia; until ")
    assert "ask for the next one" in found(10).said
    assert not found(-1).ok and "policy.approval.expires" in found(-1).said
