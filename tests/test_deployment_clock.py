"""Hospitals whose clocks are ten minutes off, through a whole run over TLS.

A library of a few lines, loaded before the C library, turns the time of day of a process and of all that it starts.
(`libfaketime` 0.9.10 does not serve: it hands on Python's `time.sleep`, which ends at a point of the monotonic clock,
with a point that lies elsewhere, so that it fails or never ends.)

A certificate is valid from an hour before it is made, so that a late clock takes it: `test_deployment_provisioning`.
"""

import logging
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.app.message import message
from flwr.supercore.corestate import in_memory_corestate
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.nodestate import in_memory_nodestate
from hospitals import SITES, Hospitals
from real_consortium import RUN

from fedmed.deployment.node import keep_server_time
from fedmed.deployment.processes import Child, flower_environment, free_port
from fedmed.deployment.site_folder import joined_kit, read_site_folder
from fedmed.deployment.supernode import site_command

COMPILER = shutil.which("cc")
CLOCK = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    long failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += atol(getenv("AHEAD_S"));
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *seconds) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (seconds) *seconds = exact.tv_sec;
    return exact.tv_sec;
}
"""
pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]
OFF_S = {"b-20": 600, "c-20": -600}
TEXT = RUN + "round-timeout-s = 180\n"  # shorter than the clocks are off: an answer must not seem too late


def turned(seconds: int, folder: Path) -> dict[str, str]:
    """The environment of a process whose clock is so many seconds ahead."""
    library = folder / "clock.so"
    if not library.exists():
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=CLOCK, text=True, check=True
        )
    return {"LD_PRELOAD": str(library), "AHEAD_S": str(seconds)}


def test_all_of_flower_at_a_site_takes_the_servers_time():
    keep_server_time(600.0)
    try:
        for module in (node_auth_http_interceptor, message, in_memory_nodestate, in_memory_corestate):
            assert 599 < (datetime.now(UTC) - module.now()).total_seconds() < 605, module.__name__
    finally:
        keep_server_time(-600.0)
    assert abs((datetime.now(UTC) - message.now()).total_seconds()) < 5


@pytest.mark.slow
@pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="a clock is turned by a compiled library, on Linux"
)
def test_clocks_that_are_ten_minutes_off_keep_nobody_from_a_run(tmp_path):
    """The site that is early trains from ten minutes after the run begins on, by its own clock: so it may at once."""
    hospitals = Hospitals(tmp_path)
    hospitals.environment = {site: turned(seconds, tmp_path) for site, seconds in OFF_S.items()}
    start = datetime.now() + timedelta(minutes=9)  # naive: policies are in local time
    hours = f"{start:%H:%M}-{start + timedelta(hours=3):%H:%M}"
    policy = tmp_path / "b-20" / "site.toml"
    policy.write_text(policy.read_text().replace("hours = []", f'hours = ["{hours}"]'))
    site = read_site_folder(policy)
    try:
        hospitals.start("server")
        hospitals.started["server"].says("c-20 may connect", 240)
        stock = {**flower_environment(tmp_path / "stock"), **turned(OFF_S["b-20"], tmp_path)}
        child = Child(site_command(site, joined_kit(site), free_port()), stock, logging.Logger("stock"))
        try:  # Flower's own SuperNode, with the right key, is refused: this is what is put right
            assert child.wait(240)
            assert '/v1/fleet/activate-node HTTP/1.1" 401' in (tmp_path / "server" / "logs" / "server.log").read_text()
        finally:
            child.end()
        for name in SITES:
            hospitals.start(name)
        hospitals.complete()
        result = hospitals.result(hospitals.submit(TEXT))
    finally:
        hospitals.stop()
    assert result["status"] == "completed"
    for name, seconds in OFF_S.items():
        (found,) = set(re.findall(r"this clock is ([+-]\d+) s from the server's", log_of(tmp_path / name)))
        assert abs(int(found) - seconds) <= 3
    assert "this clock is" not in log_of(tmp_path / "a-40")


def log_of(site: Path) -> str:
    return (site / "logs" / "site.log").read_text()
