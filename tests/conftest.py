import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import LABELS
from warm_commands import run_command

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, run_on

ROOT = Path(__file__).parent.parent


LONGEST = ("test_deployment_tls", "test_flower_engines", "test_bad_input", "test_demo", "test_resume_kills")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take minutes, so that two workers end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Fail what skips for want of a program that FEDMED_REQUIRE names: a machine that should have it passes with it."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        missing = [word for word in os.environ.get("FEDMED_REQUIRE", "").split() if word in reason]
        if missing:
            report.outcome, report.longrepr = "failed", f"{reason}; FEDMED_REQUIRE asks for {' '.join(missing)}"
    return report


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory):
    """No test touches the home folder of who runs it."""
    home = tmp_path_factory.mktemp("home")
    variables = {"FEDMED_CACHE": "cache", "FEDMED_PHANTOMS": "phantoms", "FEDMED_RUNS": "runs", "FLWR_HOME": "flwr"}
    os.environ.update({name: str(home / folder) for name, folder in variables.items()})
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", TERM="dumb")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))  # children find `toy`, and this fedmed


def toy_run(*sites: str, server: str = "", **sections: dict[str, object]) -> RunConfig:
    """A run over toy sites such as "a-40"; sections override keys, with underscores for hyphens."""
    values = {
        "name": "toy",
        "model": {"name": "toy:network"},
        "task": {"labels": list(LABELS)},
        "data": {"dataset": "toy:dataset", "sites": list(sites), "server": server},
        "train": {"rounds": 2, "optimizer": "sgd", "learning-rate": 0.1, "weight-decay": 0.0},
        "strategy": {"min-sites": 1, "max-weight-share": 1.0},  # weights as they are: most proofs are of a plain mean
        "simulation": {"workers": 2, "device": "cpu"},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **{key.replace("_", "-"): value for key, value in keys.items()}}
    return run_file.validate(values)


@pytest.fixture(scope="session")
def toy_config():
    """The function `toy_run`."""
    return toy_run


@pytest.fixture
def simulate(tmp_path: Path):
    """A function: run a configuration over forked workers and give (result, run folder)."""
    count = 0

    def run(config: RunConfig, watch=lambda event: None):
        nonlocal count
        count += 1
        folder = RunFolder.create(tmp_path / f"run-{count}", config)
        with local_grid(config, folder) as grid:
            return run_on(grid, config, folder, watch), folder

    return run


@pytest.fixture
def fedmed():
    """A function: run a command as a user types it, in a warm process, and give what it printed."""
    return run_command


@pytest.fixture
def fedmed_process():
    """The same in an interpreter of its own."""

    def run(*arguments: object, timeout: float = 280, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedmed", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)

    return run
