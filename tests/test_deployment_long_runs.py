"""What takes minutes over TLS: a large network, updates that cannot be used, a run that is stopped."""

import json
import re
import shlex
import time
from pathlib import Path

import pytest
from hospitals import SITES
from over_tls import LONG, edit, over_tls, rounds_in, submit, supernode
from real_consortium import RUN, Started, command, make_site, online, wait_for
from safetensors.numpy import load_file

from fedmed.deployment import control
from fedmed.deployment.consortium import ServerFolder
from fedmed.deployment.coordinators import own_entrance
from fedmed.deployment.kits import read_kit
from fedmed.deployment.processes import free_port
from fedmed.deployment.superlink import LOST_S

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    with over_tls(tmp_path_factory.mktemp("c")) as (folder, _):
        yield folder


def test_a_network_of_125_megabytes_passes_both_ways(consortium, tmp_path):
    heavy = 'name = "toy:heavy"\nwidth = 31_000'
    text = RUN.replace('name = "toy:network"', heavy).replace("rounds = 2", "rounds = 1")
    folder = submit(consortium, tmp_path, text)
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert load_file(folder / "checkpoints" / "round-0001.safetensors")["parameters"].nbytes > 124_000_000


def test_updates_that_cannot_be_used_are_refused_over_the_link_too(consortium, tmp_path):
    """More sites are let in: one's update is not finite, one's is of another network, one's has 80 MB, one's is late.

    What else is refused, the tests of the local engine show. Both engines hand the same records to the same function,
    after which nothing knows where they came from.
    """
    server = consortium.root
    folders = [server.parent / "nan-30"]
    folders += [make_site(tmp_path, name) for name in ("wide-30", "huge-30", "late-30")]
    for folder in folders[1:]:
        (folder / "site.toml").write_text((folder / "site.toml").read_text().replace("toy:dataset", "liars:dataset"))
    toml, recorders = server / "consortium.toml", read_kit(consortium.kits / "a-40").address
    edit(toml, port=int(recorders.rpartition(":")[2]))  # what these sites send, too, is kept and searched
    command("server", "provision", server, *(folder / "card.json" for folder in folders))
    edit(toml, port=consortium.consortium.port)
    for folder in folders[1:]:
        kit = consortium.kits / folder.name
        command("site", "join", kit, "--site", folder, "--coordinator", read_kit(kit).fingerprint)
    started = [Started("site", "start", folder, log=tmp_path / f"{folder.name}.out") for folder in folders]
    names = [folder.name for folder in folders]
    try:
        wait_for(lambda: online(server) == {*SITES, *names}, 300, lambda: f"only {online(server)} came")
        folder = submit(consortium, tmp_path, RUN.replace("rounds = 2", "rounds = 1") + "round-timeout-s = 120\n")
    finally:
        ended = [each.stop() for each in started]
        for name in names:
            (consortium.cards / f"{name}.json").unlink()
    assert ended == [(0, [])] * 4
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "degraded" and "nan-30: the update's parameters are not finite" in result["reason"]
    for name, size in (("wide-30", 1_000), ("huge-30", 20_000_000)):
        assert f"{name}: the update has ({size}, 0) values" in result["reason"]
    either = "the task was not done at|no answer before"  # as the site says, or the server if the task came later to it
    assert re.search(f"late-30: ({either}) the round's deadline", result["reason"])
    assert [entry["joined"] for entry in result["rounds_log"]] == [list(SITES)]


def test_a_run_that_a_coordinator_stopped_stays_stopped_until_it_is_resumed(consortium, tmp_path, capfd):
    (tmp_path / "run.toml").write_text(LONG)
    before = set(consortium.runs.glob("*"))
    words = ("server", "submit", tmp_path / "run.toml", "--server", consortium.root, "--wait")
    waiting = Started(*words, log=tmp_path / "x")
    try:
        wait_for(lambda: rounds_in(consortium.runs, before) >= 1, 240, waiting.log.read_text)
        number = re.search(r"run (\d+) of toy is submitted", waiting.log.read_text())[1]
        command("server", "stop", number, "--server", consortium.root)
        assert waiting.process.wait(120) == 1
    finally:
        waiting.stop()
    assert f"finished:stopped; fedmed server resume {number} goes on with it" in waiting.log.read_text()
    every = numbers(consortium)
    time.sleep(LOST_S + 5)  # the server looks for runs that it lost
    assert numbers(consortium) == every
    command("server", "resume", number, "--server", consortium.root, "--wait")
    said = capfd.readouterr()
    assert f" goes on with run {number}\nfinished:completed: " in said.out
    assert "round 2/" in said.err and said.err.count("round 1/") == 1  # the events of the folder, from its beginning


def numbers(folder: ServerFolder) -> list[int]:
    """Of all runs on the server."""
    with control.control(own_entrance(folder)) as client:
        return [run.number for run in control.runs(client)]


def test_a_supernode_without_tls_gets_nowhere(consortium):
    child, lines = supernode(consortium.root.parent / "nan-30", tls=False)
    try:
        child.wait(60)  # it may try for ever
        assert lines and not child.connected, lines
        assert online(consortium.root) == set(SITES)
    finally:
        child.end()


def test_a_trial_on_one_machine_with_the_commands_of_its_page(tmp_path, fedmed_process):
    page = (Path(__file__).parent.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    first, starts, last = page.split("## To try it on one machine")[1].split("```")[1:6:2]
    started, fingerprint = [], ""
    try:
        for line in first.strip().splitlines():
            words = shlex.split(line.replace("FINGERPRINT", fingerprint))[1:]
            words += ["--port", str(free_port())] if words[:2] == ["server", "init"] else []
            done = fedmed_process(*words, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            if "provision" in words:
                fingerprint = re.findall(r"[0-9a-f]{4}(?:-[0-9a-f]{4}){4}", done.stdout)[-1]
        for number, line in enumerate(starts.strip().splitlines()):
            words = shlex.split(line)[1:]
            started.append(Started(*words[:-1], tmp_path / words[-1], log=tmp_path / f"{number}.out"))
        status, submit = (shlex.split(line)[1:] for line in last.strip().splitlines())
        everybody = lambda: fedmed_process(*status, cwd=tmp_path).stdout.count("online") == 2  # noqa: E731
        wait_for(everybody, 120, lambda: "they are not online")
        done = fedmed_process(*submit, cwd=tmp_path)
        assert done.returncode == 0 and "finished:completed" in done.stdout, done.stdout + done.stderr
        assert re.search(r"^round 2/2  2 sites  loss .*auroc", done.stderr, re.MULTILINE)
        assert "is submitted; 2 of 2 sites are connected\n" in done.stdout and "\nnext: fedmed report " in done.stdout
        assert re.search(r"\n  auroc 0\.\d{3} \(", done.stdout)
        assert re.search(r"finished:completed, \S+ of 20\d\d-", fedmed_process(*status, cwd=tmp_path).stdout)
    finally:
        ended = [each.stop() for each in reversed(started)]
    assert ended == [(0, [])] * 3
