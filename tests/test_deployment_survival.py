"""Three hospitals over TLS, and what really happens to them: kills, a cut network, a slow link.

Each goes through its hospital's proxy, the first with a password. After each harm the run has finished, and its record
of who took part is true.
"""

import signal
import time

import httpx
import psutil
import pytest
from hospitals import SITES, Hospitals
from proxies import proxy
from real_consortium import RUN, free_port, online, processes_of, recorded, wait_for

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]
LONG = (
    RUN.replace("toy:network", "toy:slow").replace("rounds = 2", "rounds = 3\nlocal-steps = 30")
    + "round-timeout-s = 180\n"
)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    with proxy("user:secret") as way, proxy() as plain:
        made = Hospitals(tmp_path_factory.mktemp("h"), "127.0.0.2")  # an address that no proxy setting exempts
        made.environment = {name: {"HTTPS_PROXY": plain.url()} for name in SITES}
        made.environment[SITES[0]] = {"HTTPS_PROXY": way.url("user:secret")}
        made.way, made.health = way, free_port()
        policy = made.root / SITES[0] / "site.toml"
        policy.write_text(policy.read_text().replace("health-port = 0", f"health-port = {made.health}"))
        try:
            made.start_all()
            assert (SITES[0] in online(made.server)) and way.asked  # it came through the proxy
            assert all(let for _, let in way.asked)
            yield made
        finally:
            made.stop()


@pytest.mark.parametrize("moment", ["early", "middle", "late"])
@pytest.mark.parametrize("kind", ["worker", "messenger", "warm", "launcher", "supernode", "runner"])
def test_a_run_finishes_with_a_true_record_after_a_kill(hospitals, kind, moment):
    """Early: the policy has just allowed the round. Middle: in training. Late: the update is about to leave."""
    hospitals.complete()
    name, run = SITES[1], f"{kind}-{moment}"
    site, runner = hospitals.root / name, hospitals.started[name].process.pid
    before = {log: recorded(site, log, "train") for log in ("audit", "egress")}
    submitted = hospitals.submit(LONG.replace('name = "toy"', f'name = "{run}"'))
    wait_for(lambda: recorded(site, "audit", "train") > before["audit"], 300, submitted.log.read_text, 0.02)
    seen = time.monotonic()
    wait_for(lambda: kind == "runner" or kind in processes_of(runner), 10, lambda: f"no {kind}", 0.02)
    victim = psutil.Process(runner) if kind == "runner" else processes_of(runner)[kind]
    wait_for(lambda: moment != "middle" or time.monotonic() > seen + 1, 10, str)
    wait_for(lambda: (recorded(site, "egress", "train") > before["egress"]) == (moment == "late"), 60, str, 0.002)
    assert victim.status() != psutil.STATUS_ZOMBIE
    log = hospitals.started[name].log
    said = len(log.read_text())
    victim.send_signal(signal.SIGKILL)
    assert hospitals.seen(run, "round_started", 1) and not hospitals.seen(run, "round_finished", 1)
    if kind == "runner":
        hospitals.started[name].process.wait(60)
        below = lambda: [p for p in psutil.process_iter(["cmdline"]) if str(site) in " ".join(p.info["cmdline"] or [])]  # noqa: E731
        wait_for(lambda: not below(), 60, lambda: f"{below()} stayed")
        hospitals.start(name)
    if kind == "launcher":  # which a SuperNode does not miss: it stays connected, and would answer nothing any more
        wait_for(lambda: "what starts its tasks was gone" in log.read_text()[said:], 120, log.read_text)
    result = hospitals.result(submitted)
    assert len(result["rounds_log"]) == 3
    others = set(SITES) - {name}
    assert all(others <= set(entry["joined"]) for entry in result["rounds_log"])
    if kind == "worker":  # the server asked again
        assert result["status"] == "completed"


def test_a_task_that_hangs_costs_no_other_site_its_round(hospitals):
    hospitals.complete()
    name = SITES[0]  # whose answer is waited for first
    before = recorded(hospitals.root / name, "audit", "train")
    submitted = hospitals.submit(LONG.replace("timeout-s = 180", "timeout-s = 40").replace("rounds = 3", "rounds = 2"))
    wait_for(lambda: recorded(hospitals.root / name, "audit", "train") > before, 300, submitted.log.read_text)
    wait_for(lambda: "worker" in processes_of(hospitals.started[name].process.pid), 60, submitted.log.read_text)
    processes_of(hospitals.started[name].process.pid)["worker"].send_signal(signal.SIGSTOP)
    result = hospitals.result(submitted)
    assert result["status"] == "degraded"
    assert [set(SITES) - {name} <= set(entry["joined"]) for entry in result["rounds_log"]] == [True, True]
    assert name not in result["rounds_log"][0]["joined"]


def test_a_secure_sum_is_opened_after_a_kill_of_a_task(hospitals):
    hospitals.complete()
    site, runner = hospitals.root / SITES[1], hospitals.started[SITES[1]].process.pid
    before = recorded(site, "audit", "train")
    submitted = hospitals.submit(LONG.replace("min-sites = 2", "min-sites = 3\nsecure-sum = true"))
    wait_for(lambda: recorded(site, "audit", "train") > before, 300, submitted.log.read_text)
    wait_for(lambda: "worker" in processes_of(runner), 60, submitted.log.read_text)
    processes_of(runner)["worker"].send_signal(signal.SIGKILL)
    result = hospitals.result(submitted)
    assert (result["status"], len(result["rounds_log"])) == ("completed", 3)


def test_a_quorum_waits_for_a_site_that_goes_in_a_round_and_comes_back(hospitals):
    hospitals.complete()
    name = SITES[2]
    before = recorded(hospitals.root / name, "audit", "train")
    submitted = hospitals.submit(LONG.replace("min-sites = 2", "min-sites = 3"))
    wait_for(lambda: recorded(hospitals.root / name, "audit", "train") > before, 300, submitted.log.read_text)
    hospitals.started[name].stop()
    wait_for(lambda: name not in online(hospitals.server), 120, lambda: "the server has not missed it")
    hospitals.start(name)
    result = hospitals.result(submitted)
    assert (result["status"], len(result["rounds_log"])) == ("completed", 3)


@pytest.mark.parametrize("cut_s", [30, 300])
def test_a_network_that_is_cut_in_training_is_waited_for_as_the_run_needs_the_site(hospitals, cut_s):
    """Half a minute costs nothing. After five the site is asked again, since no round is to go on without it."""
    hospitals.complete()
    before = recorded(hospitals.root / SITES[0], "audit", "train")
    needing = LONG.replace("min-sites = 2", "min-sites = 3").replace("timeout-s = 180", "timeout-s = 600")
    submitted = hospitals.submit(needing)
    wait_for(lambda: recorded(hospitals.root / SITES[0], "audit", "train") > before, 300, submitted.log.read_text)
    hospitals.way.cut.set()
    cut = time.monotonic()
    try:
        wait_for(lambda: time.monotonic() > cut + cut_s, cut_s + 30, str)
        assert submitted.process.poll() is None
    finally:
        hospitals.way.cut.clear()
    result = hospitals.result(submitted)
    assert result["status"] == "completed"
    said = httpx.get(f"http://127.0.0.1:{hospitals.health}/health")
    assert said.status_code == 200 and said.json()["last_round"]["round"] == 3


def test_the_health_of_a_site_follows_its_connection(hospitals):
    def status() -> int:
        return httpx.get(f"http://127.0.0.1:{hospitals.health}/health").status_code

    hospitals.complete()
    wait_for(lambda: status() == 200, 60, lambda: str(status()))
    hospitals.way.cut.set()
    try:
        wait_for(lambda: status() == 503, 200, lambda: str(status()))
    finally:
        hospitals.way.cut.clear()
    wait_for(lambda: status() == 200, 200, lambda: str(status()))


@pytest.mark.timeout(1_500)
@pytest.mark.parametrize(("width", "rounds"), [(50, 2), (3_000, 1)], ids=["200 kB", "12 MB"])
def test_a_link_of_fifty_kilobytes_a_second_is_slow_and_nothing_else(hospitals, width, rounds):
    """That many thousand parameters, of four bytes, each way and round, over one line for all of the site's traffic.

    The large one takes four minutes to the site, four back, and four once more to be judged there.
    """
    hospitals.complete()
    passed, began = hospitals.way.passed, time.monotonic()
    hospitals.way.bytes_per_s = 50_000
    try:
        text = RUN.replace("toy:network", "toy:heavy").replace("[task]", f"width = {width}\n[task]")
        text = text.replace("rounds = 2", f"rounds = {rounds}") + "round-timeout-s = 780\n"
        result = hospitals.result(hospitals.submit(text), 1_200)
    finally:
        hospitals.way.bytes_per_s = 0
    assert result["status"] == "completed"
    sent = hospitals.way.passed - passed
    assert sent > rounds * 2 * width * 4_000
    assert time.monotonic() - began > sent / 50_000
