"""The same federation through Flower's own engines: the Ray simulation, `flwr run . local`, and a real deployment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.supercore.object_ref import validate
from safetensors.numpy import load_file
from toy import PLANTED

from fedmed import config as run_file

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RUN = {"train.rounds": 2, "train.optimizer": "sgd", "train.learning-rate": 0.1, "train.weight-decay": 0.0}
TOY = {
    "strategy.max-weight-share": 1.0,
    "model.name": "toy:network",
    "task.labels": "a,b",
    "strategy.min-sites": 2,
    **RUN,
}


def parameters(folder: Path) -> np.ndarray:
    return load_file(folder / "checkpoints" / "round-0002.safetensors")["parameters"]


def run_config(**keys: object) -> str:
    values = {**TOY, **{key.replace("__", "."): value for key, value in keys.items()}}
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(processes: list[psutil.Process]) -> None:
    """End processes by their pids, children first."""
    everyone = [child for parent in processes if parent.is_running() for child in parent.children(recursive=True)]
    for process in [*everyone, *processes]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs([*everyone, *processes], timeout=10)


@pytest.fixture
def flower_home(tmp_path):
    """Environment of a Flower process with its own home, and nothing that calls out."""

    def make(name: str) -> dict[str, str]:
        (tmp_path / name).mkdir(exist_ok=True)
        return {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(tmp_path / name),
            "FEDMED_RUNS": str(tmp_path / "runs"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    return make


@pytest.fixture
def local_parameters(toy_config, simulate):
    """The network that fedmed's own engine trains from the same run."""
    config = toy_config("a-40", "b-20", strategy={"min_sites": 2})
    return parameters(simulate(config)[1].path)


def test_flower_accepts_the_apps():
    for reference in ("server.app:app", "client.app:app"):
        assert validate(reference, project_dir=ROOT) == (True, None)


def test_what_flower_packs_is_two_short_files():
    from flwr.cli.build import build_fab_from_disk

    fab = build_fab_from_disk(ROOT)
    assert len(fab if isinstance(fab, bytes) else fab[0]) < 20_000


@pytest.mark.simulation
def test_ray_engine_gives_the_same_weights_and_names_a_dropped_site(fedmed_process, toy_config, simulate, tmp_path):
    run = tmp_path / "run.toml"
    config = toy_config("a-40", "nan-20", "c-30", simulation={"workers": 2})
    run.write_text(run_file.to_toml(config))
    done = fedmed_process("simulate", run, "--engine", "ray", "--out", tmp_path / "ray")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ray" / "result.json").read_text())
    assert result["status"] == "degraded"
    assert "nan-20" in result["reason"]
    ours = simulate(config)[1].path
    np.testing.assert_allclose(parameters(tmp_path / "ray"), parameters(ours), rtol=0, atol=1e-6)
    kept = {path.relative_to(ours) for path in ours.glob("sites/*/findings.json")}
    assert kept and kept == {path.relative_to(tmp_path / "ray") for path in tmp_path.glob("ray/sites/**/findings.json")}


@pytest.mark.slow  # a minute; `--engine ray` above runs the same over Ray
@pytest.mark.simulation
def test_flwr_run_local_gives_the_same_weights(flower_home, local_parameters, tmp_path):
    port = free_port()
    environment = {**flower_home("home"), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port)}
    sites = run_config(data__dataset="toy:dataset", data__sites="a-40,b-20")
    command = ["flwr", "run", ".", "local", "--stream", "--federation-config", "num-supernodes=2", "-c", sites]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (folder,) = (tmp_path / "runs").iterdir()
        np.testing.assert_allclose(parameters(folder), local_parameters, rtol=0, atol=1e-6)
        assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    finally:
        end([p for p in psutil.process_iter(["cmdline"]) if f"127.0.0.1:{port}" in " ".join(p.info["cmdline"] or [])])
        listening = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid]
        end([psutil.Process(pid) for pid in set(listening)])


@pytest.mark.slow  # a minute; `test_deployment_tls` does the same with fedmed's own site runner
@pytest.mark.deployment
@pytest.mark.timeout(600)
def test_a_superlink_and_flowers_own_supernodes_give_the_same_weights(flower_home, local_parameters, tmp_path):
    """A real SuperLink and two SuperNodes as Flower starts them; every hospital reads its own site.toml."""
    port = free_port()
    link = f"127.0.0.1:{port}"
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "{link}"\ninsecure = true\n'
    )
    with ExitStack() as stack:

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=flower_home(name),
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(end, [psutil.Process(process.pid)])
            return process

        start("superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        wait_for(port)
        for name in ("a-40", "b-20"):
            site = tmp_path / f"{name}.toml"
            site.write_text(
                f'name = "{name}"\nmanifest = "{name}"\ndataset = "toy:dataset"\nnetworks = ["toy:network"]\n'
            )
            start(
                f"node-{name}",
                *("flower-supernode", "--insecure", "--superlink", link, "--port", str(free_port())),
                *("--node-config", f'site="{site}"'),
            )
        cli = {**flower_home("cli"), "COLUMNS": "200"}
        wait_for_nodes(cli, 2)
        done = subprocess.run(
            [str(BIN / "flwr"), "run", str(ROOT), "test", "--stream", "-c", run_config(data__sites="/etc/passwd")],
            env=cli,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed"
    assert [site["site"] for site in result["sites"]] == ["a-40", "b-20"]
    np.testing.assert_allclose(parameters(folder), local_parameters, rtol=0, atol=1e-6)
    for log in [*tmp_path.glob("*.log"), *(path for path in folder.rglob("*") if path.is_file())]:
        assert PLANTED.encode() not in log.read_bytes(), log.name


def wait_for(port: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"nothing listens on port {port}")


def wait_for_nodes(environment: dict[str, str], count: int, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    command = [str(BIN / "flwr"), "supernode", "list", "test", "--format", "json"]
    done = None
    while time.monotonic() < deadline:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0 and done.stdout.count('"online"') >= count:
            return
        time.sleep(0.5)
    pytest.fail(f"{count} SuperNodes did not come: {done.stdout + done.stderr if done else ''}")


def test_a_deployed_site_without_site_toml_never_reads_what_the_server_names():
    from fedmed.errors import ConfigError
    from fedmed.federated.sites import site_of

    assert "ray" not in sys.modules
    with pytest.raises(ConfigError, match=r"site\.toml"):
        site_of({"partition-id": 0, "num-partitions": 2}, {"data.sites": "/etc/passwd,/etc/shadow"})
