"""One federation on one machine: virtual hospitals in worker processes, or inside Flower's Ray simulation."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.durable import write_atomically
from fedmed.errors import ConfigError, DataError
from fedmed.federated import client_app
from fedmed.federated.central import central_sites, check_central
from fedmed.federated.combiners import too_few_sites
from fedmed.federated.federation import run_federation
from fedmed.federated.local_grid import LocalGrid
from fedmed.federated.local_worker import keep_freed_memory
from fedmed.federated.phantoms import with_phantoms
from fedmed.federated.resume import record
from fedmed.federated.rounds import Watch
from fedmed.federated.run_folder import RunFolder, only_writer
from fedmed.federated.selection import sample_size
from fedmed.federated.sites import SIMULATION, site_names
from fedmed.federated.strategies import server_step
from fedmed.federated.virtual_hospitals import Hospital, planned, with_hospitals
from fedmed.imaging.cache import cache_folder
from fedmed.imaging.manifest import read_manifest
from fedmed.imaging.reading import presets_named, require_channels
from fedmed.models.low_rank import require_trunk
from fedmed.privacy.accounting import warm_up
from fedmed.privacy.policy import read_policy
from fedmed.training.coupling import require_fixed_statistics
from fedmed.training.fitting import require_fit
from fedmed.training.local_algorithms.fedbn import require_norms
from fedmed.training.network import network_of
from fedmed.training.run_data import custom_dataset
from fedmed.types import OnProgress

GPU_PROCESSES = 4  # worker processes that share one GPU, at most


def simulate(config: RunConfig, out: str | Path, *, watch: Watch = lambda event: None) -> dict[str, Any]:
    """Run a whole federation in worker processes of this machine, as `fedmed simulate` does.

    Workers are forked: with a GPU, or `train.threads` above 1, each simulation needs a Python process of its own.

    Args:
        config: the run, with every path absolute, as `fedmed.load` gives it; phantom hospitals if it names no sites.
        out: the run folder to make.
        watch: called with every event.

    Returns:
        The content of `result.json`. Its status is `paused` when a quorum was missed.

    Raises:
        FedmedError: the configuration or the data cannot be used, and nothing was written; or the run cannot go on,
            and `result.json` says why.
    """
    config = with_phantoms(config, explicit=run_file.explicit_keys(config))
    _, hospitals = plan(config)
    config, folder = begin(config, Path(out), hospitals)
    with only_writer(folder.path), local_grid(config, folder) as grid:
        return run_on(grid, config, folder, watch)


def plan(config: RunConfig, progress: OnProgress | None = None) -> tuple[int, Sequence[Hospital] | None]:
    """Check a run; nothing is written.

    Returns:
        The network's number of parameters, and the hospitals if patients are dealt to them anew.

    Raises:
        FedmedError: as `check` and `planned`.
    """
    if config.simulation.partition == "as-given":
        return check(config), None
    hospitals = planned(config, progress)
    return check(config, [hospital.name for hospital in hospitals]), hospitals


def begin(config: RunConfig, out: Path, hospitals: Sequence[Hospital] | None) -> tuple[RunConfig, RunFolder]:
    """Make the run folder of a run that `plan` has checked.

    Returns:
        The configuration with the manifests of its virtual hospitals, and the folder, which knows the run again.

    Raises:
        RunFailed: the folder holds a file already, or cannot be written.
    """
    folder = RunFolder.create(out, config)
    record(folder, config)
    return with_hospitals(config, folder.path, hospitals), folder


def check(config: RunConfig, names: Sequence[str] | None = None) -> int:
    """Find what is wrong with a simulation before anything is written, and return its number of parameters.

    Args:
        config: the run.
        names: of its virtual hospitals, if they are not those of `data.sites`.

    Raises:
        FedmedError: a name is unknown, a manifest cannot be used, the network fits neither images nor task, or there
            are too few sites.
    """
    source = "data.sites names" if names is None else f'simulation.partition = "{config.simulation.partition}" makes'
    names = site_names(config) if names is None else names
    if len(names) < config.strategy.min_sites:
        least = config.strategy.min_sites
        raise ConfigError(f"{source} {len(names)} sites, but strategy.min-sites = {least}; lower it or add sites")
    unknown = sorted(set(config.strategy.required_sites) - set(names))
    if unknown:
        raise ConfigError(f'strategy.required-sites: there is no site "{unknown[0]}" among {", ".join(names)}')
    server_step(config)
    require_trunk(config.model)
    strategy = config.strategy
    asked = sample_size(len(names), fraction=strategy.fraction, least=strategy.min_sites)
    too_few = too_few_sites(strategy, asked)
    if too_few:
        raise ConfigError(too_few)
    presets_named(config.data.preset)
    if config.simulation.policy:
        read_policy(Path(config.simulation.policy))
    if config.data.dataset:
        custom_dataset(config.data.dataset)
    else:
        for path in [*config.data.sites, *([config.data.server] if config.data.server else [])]:
            manifest = read_manifest(Path(path), config.task)
            if len(manifest.rows) == 0:
                raise DataError(f"{path}: the manifest has no rows")
            require_channels(manifest.modalities, config.data.preset, config.data.items, config.model.in_channels)
    torch.set_num_threads(1)  # no thread pool may exist when the workers are forked
    network = network_of(config)
    if not config.data.dataset:
        require_fit(network, config)
    if config.strategy.name == "fedbn":
        require_norms(network)
    if config.privacy.mode != "none":
        require_fixed_statistics(network)
    if config.privacy.mode == "central":
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        check_central(config, sites=central_sites(config, names), parameters=trained)
    return sum(parameter.numel() for parameter in network.parameters())


def prepare_fork(config: RunConfig) -> None:
    """Import what workers need and start no thread, so that a fork is safe and a worker's first step is fast."""
    torch.set_num_threads(1)
    if config.train.augment:
        import fedmed.imaging.augment.planar  # torchvision: five seconds
    if config.privacy.mode == "dp-sgd":
        import fedmed.training.account  # noqa: F401  # opacus: seconds
    if config.privacy.mode != "none":
        warm_up()
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch._dynamo, seconds of work, once
    gc.collect()
    gc.freeze()  # a collection in a worker would touch, and so copy, every page of what was imported here


def devices(config: RunConfig) -> list[str]:
    """The torch devices of the workers. CUDA is only counted, never touched, before the fork."""
    wanted = config.simulation.device
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and gpus == 0:
        raise ConfigError('simulation.device = "cuda", but this machine shows no GPU')
    return [f"cuda:{number}" for number in range(gpus)] or ["cpu"]


def worker_count(config: RunConfig, devices: Sequence[str], *, sites: int = 0) -> int:
    """How many worker processes: as asked, else as many as keep the machine busy; never more than sites."""
    asked = config.simulation.workers or most_workers(devices)
    return max(1, min(asked, sites or len(config.data.sites)))


def most_workers(devices: Sequence[str]) -> int:
    """How many worker processes keep this machine busy: one per core, and on GPUs a few per GPU."""
    return cores() if devices == ["cpu"] else min(cores(), GPU_PROCESSES * len(devices))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_grid(config: RunConfig, folder: RunFolder, client: ClientApp = client_app.app) -> LocalGrid:
    """Fork the workers of a simulation; call it before any thread or progress display is started.

    Raises:
        ConfigError: CUDA was used in this process.
    """
    prepare_fork(config)
    places = devices(config)
    if places != ["cpu"] and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch says no types
        raise ConfigError("this process uses CUDA already, so it can fork no workers; simulate in a process of its own")
    folder.spool.mkdir(exist_ok=True)
    return LocalGrid(
        client,
        [
            {"partition-id": number, "name": name, "virtual": True, "states": str(folder.path / "sites")}
            for number, name in enumerate(site_names(config))
        ],
        run_file.flatten(config),
        workers=worker_count(config, places),
        spool=folder.spool,
        devices=places,
    )


def run_on(grid: LocalGrid, config: RunConfig, folder: RunFolder, watch: Watch, *, threads: int = 0) -> dict[str, Any]:
    """Run a federation over forked workers.

    The server evaluates while they wait, with `threads`; 0 = as many as OMP_NUM_THREADS says, or as there are cores.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(threads or (int(said) if said.isdecimal() else 0) or cores())
    keep_freed_memory()
    return run_federation(grid, config, folder, watch=watch, cache_dir=cache_folder(), processes=grid.worker_pids)


def run_with_ray(config: RunConfig, folder: RunFolder, watch: Watch) -> dict[str, Any]:
    """Run the same federation over Flower's Ray simulation.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401  (the extra `ray`)
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'flwr[simulation]==1.41.0'") from None
    from flwr.simulation import run_simulation

    results: list[dict[str, Any]] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(run_federation(grid, config, folder, watch=watch, cache_dir=cache_folder()))

    logging.getLogger("flwr").setLevel(logging.ERROR)  # it warns that this door will move; the pin keeps it here
    effective = folder.path / "sites" / "run.toml"  # with the manifests of the virtual hospitals, however they came
    write_atomically(effective, run_file.to_toml(config).encode())
    os.environ[SIMULATION] = str(effective)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own advice, instead of its warning
    try:
        run_simulation(
            server_app=server,
            client_app=client_app.app,
            num_supernodes=len(config.data.sites),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    finally:
        del os.environ[SIMULATION]
    return results[0]
