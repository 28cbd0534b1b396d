"""The Flower ServerApp: read the run configuration, run the federation, leave a run folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.errors import NO_ROOM, ConfigError, RunFailed, RunInterrupted
from fedmed.federated.federation import run_federation
from fedmed.federated.phantoms import with_phantoms
from fedmed.federated.resume import record, take_up
from fedmed.federated.run_folder import RunFolder, folder_of, stamped, take_lock
from fedmed.imaging.cache import cache_folder
from fedmed.types import Event

app = ServerApp()
ALONE_S = 300.0
OF_FLOWER = ("flwr.", "httpx")  # modules whose errors tell of the SuperLink, and not of the run


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation for `flwr run`; the run folder is made under `$FEDMED_RUNS`, whatever the configuration says.

    A Flower run of a series that has a folder already goes on with the run in it: the server lost its process.

    Raises:
        FedmedError: the run cannot go on.
        OSError: input or output failed, for another reason than a full disk.
    """
    try:
        _run(grid, context)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise RunInterrupted("the server's disk is full") from None  # the error's own text holds a path
        if type(error).__module__.startswith(OF_FLOWER):
            raise RunInterrupted("the server could not pass on the run's messages") from error
        raise


def _run(grid: Grid, context: Context) -> None:
    config = with_phantoms(run_file.unflatten(context.run_config))
    if config.simulation.partition != "as-given":
        raise ConfigError(
            "simulation.partition deals patients for `fedmed simulate`; under `flwr run` leave it as-given"
        )
    series = context.series_id or context.run_id
    begun = folder_of(runs_folder(), series)
    if begun is not None:
        be_alone(begun)
        if not take_up(RunFolder(begun), config):
            return
        folder = RunFolder.resume(begun)
    else:
        folder = _new_folder(config, series)
        be_alone(folder.path)
    print(f"run folder: {folder.path}")
    if begun is not None:
        why = "the server or the run's own process ended before the run did, or somebody resumed it"
        say(folder.event("run_continued", folder.last_event().get("round", 0), reason=why, flower_run=context.run_id))
    result = run_federation(grid, config, folder, watch=say, cache_dir=cache_folder())
    if result["status"] in ("failed", "paused"):
        raise RunFailed(f"{result['status']}: {result['reason']}")


def be_alone(folder: Path, wait_s: float = ALONE_S) -> None:
    """Wait until no other process writes a run's folder; from then on, until this one ends, none but it does.

    One that was stopped, or whose server gave it up, may still be evaluating.

    Raises:
        RunInterrupted: it does not end.
    """
    deadline = time.monotonic() + wait_s
    said = False
    while take_lock(folder) is None:  # the descriptor is never closed: the lock is the process's
        if not said:
            print("an earlier process of this run still writes its folder; waiting for its end", flush=True)
        if time.monotonic() > deadline:
            raise RunInterrupted("an earlier process of this run still writes its folder")
        said = True
        time.sleep(0.5)


def _new_folder(config: RunConfig, series: int) -> RunFolder:
    folder = RunFolder.create(runs_folder() / stamped(config.name, str(series)), config)
    record(folder, config)
    return folder


def runs_folder() -> Path:
    """Where runs that Flower starts are kept: `$FEDMED_RUNS`, or `~/.fedmed/runs`."""
    return Path(os.environ.get("FEDMED_RUNS") or Path.home() / ".fedmed" / "runs")


def say(event: Event) -> None:
    """One plain line for the log of a Flower run."""
    facts = " ".join(
        f"{key}={value}" for key, value in event.items() if key not in ("time", "kind", "round", "metrics")
    )
    print(f"round {event['round']}: {event['kind']} {facts}", flush=True)
