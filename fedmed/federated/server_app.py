"""The Flower ServerApp: read the run configuration, run the federation, leave a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed import config as run_file
from fedmed.errors import ConfigError, RunFailed
from fedmed.federated.federation import Event, run_federation
from fedmed.federated.phantoms import with_phantoms
from fedmed.federated.run_folder import RunFolder, now
from fedmed.imaging.cache import cache_folder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation for `flwr run`; the run folder is made under `$FEDMED_RUNS`, whatever the configuration says."""
    config = with_phantoms(run_file.unflatten(context.run_config))
    if config.simulation.partition != "as-given":
        raise ConfigError(
            "simulation.partition deals patients for `fedmed simulate`; under `flwr run` leave it as-given"
        )
    stamp = now()[:19].replace(":", "").replace("-", "")
    folder = RunFolder.create(runs_folder() / f"{stamp}-{config.name}-{context.run_id}".replace(" ", "-"), config)
    print(f"run folder: {folder.path}")
    result = run_federation(grid, config, folder, watch=say, cache_dir=cache_folder())
    if result["status"] in ("failed", "paused"):
        raise RunFailed(f"{result['status']}: {result['reason']}")


def runs_folder() -> Path:
    """Where runs that Flower starts are kept: `$FEDMED_RUNS`, or `~/.fedmed/runs`."""
    return Path(os.environ.get("FEDMED_RUNS") or Path.home() / ".fedmed" / "runs")


def say(event: Event) -> None:
    """One plain line for the log of a Flower run."""
    facts = " ".join(
        f"{key}={value}" for key, value in event.items() if key not in ("time", "kind", "round", "metrics")
    )
    print(f"round {event['round']}: {event['kind']} {facts}", flush=True)
