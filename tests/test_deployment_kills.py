"""Kills at a server and at its sites, over TLS: a run completes all the same, and no process stays behind."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hospitals import SITES, checked
from over_tls import LONG, needs_nginx, over_tls, rounds_in, runner_of, submit
from real_consortium import Started, make_consortium, online, recorded, wait_for, words_of

from fedmed.deployment.consortium import ServerFolder

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(500)]
MOMENTS = ["early", "middle", "late"]  # a site begins a round's training, is in it, has an update that is to leave


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    with over_tls(tmp_path_factory.mktemp("c")) as (folder, _):
        yield folder


@needs_nginx
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_completes_after_a_kill_of_nginx(consortium, tmp_path, moment):
    """Its workers go on for a moment, and hold the port; the runner ends them and starts nginx again."""
    out = consortium.root.parent / "server.out"
    said = len(out.read_text())
    folder = run_with_a_kill(consortium, tmp_path, f"nginx-{moment}", lambda process: process.name() == "nginx")
    assert "nginx ended by itself" in out.read_text()[said:]
    assert "run_continued" not in (folder / "events.jsonl").read_text()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_goes_on_after_a_kill_of_the_superlink(consortium, tmp_path, moment):
    """Nobody does anything: the server starts it again and submits the run again, which goes on in its folder."""
    guarded = "fedmed.deployment.guarded"
    folder = run_with_a_kill(consortium, tmp_path, f"superlink-{moment}", lambda process: guarded in words_of(process))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (again,) = (event for event in events if event["kind"] == "run_continued")
    assert "ended before the run did" in again["reason"]


def run_with_a_kill(folder: ServerFolder, tmp_path: Path, name: str, of: Callable[[psutil.Process], bool]) -> Path:
    """The folder of a run of four rounds, in the second of which a child of the server's runner was killed.

    The run's name, WHAT-MOMENT, is no other's, so that what the sites recorded of it can be found.
    """
    text = LONG.replace('name = "toy"\n', f'name = "{name}"\n') + "round-timeout-s = 120\n"  # Flower may lose a message
    (tmp_path / "run.toml").write_text(text)
    moment = name.rpartition("-")[2]
    before, site = set(folder.runs.glob("*")), folder.root.parent / "a-40"
    begun = {log: recorded(site, log, "train") for log in ("audit", "egress")}
    words = ("server", "submit", tmp_path / "run.toml", "--server", folder.root, "--wait")
    waiting = Started(*words, log=tmp_path / "x")
    try:
        wait_for(lambda: recorded(site, "audit", "train") == begun["audit"] + 2, 240, waiting.log.read_text, 0.02)
        seen = time.monotonic()
        (victim,) = filter(of, psutil.Process(runner_of(folder, "server")).children())
        wait_for(lambda: moment != "middle" or time.monotonic() > seen + 1, 10, str)
        sent = begun["egress"] + 1 + (moment == "late")
        wait_for(lambda: recorded(site, "egress", "train") == sent, 60, waiting.log.read_text, 0.02)
        victim.kill()
        assert rounds_in(folder.runs, before) == 1
        assert waiting.process.wait(400) == 0, (tmp_path / "x").read_text()
    finally:
        waiting.stop()
    (made,) = set(folder.runs.glob("*")) - before
    result = checked(made, folder.root.parent.joinpath)
    assert [entry["round"] for entry in result["rounds_log"]] == [1, 2, 3, 4]
    return made


@pytest.mark.parametrize("program", ["fedmed.deployment.node", "fedmed.deployment.warm"])
def test_a_run_completes_after_a_kill_at_a_site(consortium, tmp_path, program):
    """The runner starts again what was killed; a SuperNode is let in when the server has missed it for a minute."""
    out = consortium.root.parent / "a-40.out"
    said = len(out.read_text())
    below = psutil.Process(runner_of(consortium, "a-40")).children()
    alive = [process for process in below if process.status() != psutil.STATUS_ZOMBIE]
    (victim,) = (process for process in alive if program in " ".join(words_of(process)))
    victim.send_signal(signal.SIGKILL)
    wait_for(lambda: "again" in out.read_text()[said:], 60, lambda: out.read_text())
    server = consortium.root
    if program == "fedmed.deployment.node":  # which says no farewell
        wait_for(lambda: "a-40" not in online(server), 120, lambda: "the server has not missed it")
    wait_for(lambda: online(server) == set(SITES), 300, lambda: f"only {online(server)} came")
    assert json.loads((submit(consortium, tmp_path) / "result.json").read_text())["status"] == "completed"


def test_nothing_stays_when_a_runner_is_killed(tmp_path):
    server = make_consortium(tmp_path, ["a-40"])
    started = [Started("server", "start", server, log=tmp_path / "server.out")]
    started.append(Started("site", "start", tmp_path / "a-40", log=tmp_path / "a-40.out"))
    try:
        wait_for(lambda: online(server) == {"a-40"}, 300, lambda: "the site did not come")
        for each in started[::-1]:
            below = psutil.Process(each.process.pid).children(recursive=True)
            assert below
            each.process.kill()
            assert psutil.wait_procs(below, timeout=60)[1] == []
    finally:
        for each in started:
            each.stop()
