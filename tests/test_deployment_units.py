"""The units and the container that start a site: restarts, hardening, where they may write."""

import configparser
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "client"


@pytest.mark.parametrize("name", ["fedmed-site.service", "fedmed-site.user.service"])
def test_the_units_start_the_command_and_start_it_again(name):
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string((CLIENT / name).read_text())
    service = unit["Service"]
    assert re.fullmatch(r"\S+/bin/fedmed site start \S+", service["ExecStart"])
    assert (service["Restart"], service["RestartSec"], service["NoNewPrivileges"]) == ("always", "15", "yes")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_system_unit_is_as_hardened_as_the_page_says():
    page = (ROOT / "docs" / "security-for-hospitals.md").read_text()
    (said,) = re.findall(r"exposure (\d\.\d)", page)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(CLIENT / "fedmed-site.service")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"Overall exposure level for fedmed-site.service: {said}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/fedmed-*.service")), ids=lambda path: path.name)
def test_a_unit_outlives_a_task_that_took_all_memory_and_is_enabled_last(path):
    text = path.read_text()
    assert "\nOOMPolicy=continue\n" in text
    steps = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    assert "enable --now" in steps[-1]
    if "user" not in path.name:
        made = steps.index("install -d -o fedmed -g fedmed -m 700 /var/lib/fedmed")
        assert "init" in steps[made + 1]
        assert "\nInaccessiblePaths=-/run/dbus -/run/user\n" in text


def test_the_container_publishes_no_port_and_writes_to_the_site_alone():
    (site,) = yaml.safe_load((CLIENT / "compose.yaml").read_text())["services"].values()
    assert "ports" not in site and site["read_only"] and site["cap_drop"] == ["ALL"]
    assert site["security_opt"] == ["no-new-privileges:true"] and site["user"] != "0"
    assert [volume for volume in site["volumes"] if not volume.endswith(":ro")] == ["./site:/site"]


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("client/compose.yaml", "docker compose run --rm --entrypoint fedmed site site check /site"),
        ("server/compose.yaml", "docker compose run --rm --entrypoint fedmed server server provision /server"),
        ("client/compose.yaml", "docker compose up"),
        ("server/compose.yaml", "docker compose up"),
        ("client/Dockerfile", "docker build"),
        ("server/Dockerfile", "docker build"),
        ("client/fedmed-site.service", "systemctl enable"),
        ("client/fedmed-site.user.service", "systemctl --user"),
        ("server/fedmed-server.service", "systemctl enable"),
    ],
)
def test_each_file_says_in_its_first_lines_how_it_is_installed(path, command):
    lines = (ROOT / path).read_text().splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    assert any(line.startswith("#   ") and command in line for line in head)


def test_the_image_is_built_from_the_wheelhouse_alone_and_runs_as_no_root():
    text = re.sub(r"\\\n", " ", (CLIENT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {step[0] for step in steps} <= {"ARG", "FROM", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT"}
    (run,) = (step[1] for step in steps if step[0] == "RUN")
    assert run.count("pip install") == run.count("--no-index") == 2 and "--require-hashes" in run
    assert [step[1] for step in steps if step[0] == "USER"] == ["10001"]
    assert json.loads(next(step[1] for step in steps if step[0] == "ENTRYPOINT"))[:3] == ["fedmed", "site", "start"]
