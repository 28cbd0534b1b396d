"""Three hospitals over TLS, and what really happens to them: kills, a cut network, a slow link.

Each goes through its hospital's proxy, the first with a password. After each harm the run has finished, and its record
of who took part is true.
"""

import json
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest
from proxies import Proxy, proxy
from real_consortium import RUN, Started, free_port, make_consortium, online, processes_of, recorded, wait_for

pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(900)]
SITES = ("a-40", "b-20", "c-20")
SHORT = RUN + "round-timeout-s = 180\n"  # a reply that is lost is waited for until then
LONG = (
    RUN.replace("toy:network", "toy:slow").replace("rounds = 2", "rounds = 3\nlocal-steps = 30")
    + "round-timeout-s = 180\n"
)


class Hospitals:
    """A server and its sites, all of which run."""

    def __init__(self, root: Path, way: Proxy, plain: Proxy) -> None:
        self.root, self.way, self.plain = root, way, plain
        self.server = make_consortium(root, list(SITES), "127.0.0.2")  # an address that no proxy setting exempts
        self.health = free_port()
        policy = root / SITES[0] / "site.toml"
        policy.write_text(policy.read_text().replace("health-port = 0", f"health-port = {self.health}"))
        self.started = {"server": Started("server", "start", self.server, log=root / "server.out")}
        self.runs = 0

    def start(self, name: str) -> None:
        way = self.way.url("user:secret") if name == SITES[0] else self.plain.url()
        self.started[name] = Started("site", "start", self.root / name, log=self.root / f"{name}.out", HTTPS_PROXY=way)

    def complete(self) -> None:
        wait_for(lambda: online(self.server) == set(SITES), 300, lambda: f"only {online(self.server)} came")

    def submit(self, text: str) -> Started:
        self.runs += 1
        run = self.root / f"run-{self.runs}.toml"
        run.write_text(text)
        log = self.root / f"run-{self.runs}.out"
        return Started("server", "submit", run, "--server", self.server, "--wait", "--json", log=log)

    def result(self, submitted: Started, timeout_s: float = 600) -> dict:
        """What the run says in the end, after its record was compared with what the sites recorded."""
        submitted.process.wait(timeout_s)
        facts = json.loads(submitted.log.read_text().splitlines()[-1])
        folder = Path(facts["folder"])
        result = json.loads((folder / "result.json").read_text())
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        for entry in result["rounds_log"]:
            came = {e["site"] for e in events if (e["kind"], e["round"]) == ("update_received", entry["round"])}
            failed = {failure["site"] for failure in entry["failed"]}
            assert set(entry["joined"]) == came
            assert came.isdisjoint(failed) and came | failed == set(SITES)
            assert all(failure["reason"] for failure in entry["failed"])
        whole = all(set(entry["joined"]) == set(SITES) for entry in result["rounds_log"])
        assert result["status"] == ("completed" if whole else "degraded")
        return result


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    with proxy("user:secret") as way, proxy() as plain:
        made = Hospitals(tmp_path_factory.mktemp("h"), way, plain)
        try:
            made.started["server"].says("c-20 may connect", 240)
            for name in SITES:
                made.start(name)
            made.complete()
            assert (SITES[0] in online(made.server)) and way.asked  # it came through the proxy
            assert all(let for _, let in way.asked)
            yield made
        finally:
            for each in reversed(list(made.started.values())):
                each.stop()


@pytest.mark.parametrize("moment", ["early", "middle", "late"])
@pytest.mark.parametrize("kind", ["worker", "messenger", "warm", "supernode", "runner"])
def test_a_run_finishes_with_a_true_record_after_a_kill(hospitals, kind, moment):
    """Early: the policy has just allowed the round. Middle: in training. Late: the update is about to leave."""
    hospitals.complete()
    name = SITES[1]
    site, runner = hospitals.root / name, hospitals.started[name].process.pid
    before = {log: recorded(site, log, "train") for log in ("audit", "egress")}
    submitted = hospitals.submit(LONG)
    log = "egress" if moment == "late" else "audit"
    wait_for(lambda: recorded(site, log, "train") > before[log], 300, submitted.log.read_text)
    seen = time.monotonic()
    wait_for(lambda: moment != "middle" or time.monotonic() > seen + 1, 10, str)
    victim = psutil.Process(runner) if kind == "runner" else processes_of(runner).get(kind)
    if victim is not None:  # a task that was late may be over
        victim.send_signal(signal.SIGKILL)
    if kind == "runner":
        hospitals.started[name].process.wait(60)
        below = lambda: [p for p in psutil.process_iter(["cmdline"]) if str(site) in " ".join(p.info["cmdline"] or [])]  # noqa: E731
        wait_for(lambda: not below(), 60, lambda: f"{below()} stayed")
        hospitals.start(name)
    result = hospitals.result(submitted)
    assert len(result["rounds_log"]) == 3
    others = set(SITES) - {name}
    assert all(others <= set(entry["joined"]) for entry in result["rounds_log"])
    if kind == "worker":  # the server asked again
        assert result["status"] == "completed"


def test_a_network_that_is_cut_for_half_a_minute_costs_no_site(hospitals):
    hospitals.complete()
    before = recorded(hospitals.root / SITES[0], "audit", "train")
    submitted = hospitals.submit(LONG)
    wait_for(lambda: recorded(hospitals.root / SITES[0], "audit", "train") > before, 300, submitted.log.read_text)
    hospitals.way.cut.set()
    cut = time.monotonic()
    wait_for(lambda: time.monotonic() > cut + 30, 60, str)
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


def test_a_link_of_fifty_kilobytes_a_second_is_slow_and_nothing_else(hospitals):
    """200 kB of network each way and round: four seconds of it for one site."""
    hospitals.complete()
    passed = hospitals.way.passed
    hospitals.way.bytes_per_s = 50_000
    try:
        text = SHORT.replace("toy:network", "toy:heavy").replace("[task]", "width = 50\n[task]")
        result = hospitals.result(hospitals.submit(text))
    finally:
        hospitals.way.bytes_per_s = 0
    assert result["status"] == "completed"
    assert hospitals.way.passed - passed > 2 * 2 * 200_000
