"""What `fedmed site check` finds, and what the log and the health say with it."""

import json
import re
import shutil
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
from full_disks import mounted, needs_mount
from real_consortium import make_site

from fedmed.deployment import confinement
from fedmed.deployment.checks import check_site
from fedmed.deployment.dry_round import device
from fedmed.deployment.health import site_facts
from fedmed.deployment.site_folder import read_site_folder
from fedmed.errors import ConfigError


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with keys; nobody runs."""
    folder = make_site(tmp_path_factory.mktemp("site"), "a-40")
    path = folder / "site.toml"
    text = path.read_text().replace('["toy:network"', '["toy:hanging", "toy:greedy", "toy:network"')
    path.write_text(text)
    return folder


linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


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


def test_a_gpu_that_is_not_there_is_named_before_a_round_needs_it():
    with pytest.raises(ConfigError, match="no such GPU"):
        device("cuda:99")
    assert device("cpu").startswith("cpu, ")


DISK = """
import sys
from pathlib import Path
from fedmed.deployment import checks
checks.DISK_GIB = float(sys.argv[2])
print(checks._look("disk", lambda: checks.disk(checks.read_site_folder(Path(sys.argv[1])))).said)
"""


@needs_mount
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
