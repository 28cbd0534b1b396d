"""Events as TensorBoard or MLflow series: the same numbers that `events.jsonl` holds, and nothing else.

Both programs are extras, imported when a writer is opened. TensorBoard files lie in the run folder. MLflow goes where
`MLFLOW_TRACKING_URI` says, which may be another machine: names of sites and their numbers then go there; without it, to
`mlflow.db` in the run folder (`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmed.errors import ConfigError
from fedmed.types import Event

Write = Callable[[Event], None]
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
INSTALL = {"tensorboard": "tensorboard>=2.20", "mlflow": "mlflow-skinny>=3.4"}  # as in pyproject.toml


def check_writers(names: Iterable[str]) -> None:
    """Refuse writers that are unknown or not installed, before a run begins.

    Raises:
        ConfigError: which, and what to install.
    """
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f'--log "{name}": expected {" or ".join(PACKAGES)}')
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"--log {name} needs a package: pip install '{INSTALL[name]}'")


@contextmanager
def writing(names: Iterable[str], run: Path) -> Iterator[Write]:
    """A function that takes events and writes their numbers with every named writer; all are closed at the end.

    Args:
        names: keys of `PACKAGES`.
        run: the run folder.
    """
    with ExitStack() as stack:
        doors = {"tensorboard": _tensorboard, "mlflow": _mlflow}
        writers = [stack.enter_context(doors[name](run)) for name in dict.fromkeys(names)]

        def write(event: Event) -> None:
            for writer in writers:
                writer(event)

        yield write


def measures(event: Event) -> Iterator[tuple[str, float]]:
    """The numbers of one event, by name; what is undefined is left out.

    `site/SITE/…` is a site's own: `loss`, `seconds`, `epsilon` where they are told, `failed`. `server/METRIC`, with
    `-low` and `-high`, is the server's evaluation. `round/seconds` is the run's.
    """
    kind, site = event.get("kind"), event.get("site")
    found: dict[str, Any] = {}
    if kind == "update_received":
        found = {f"site/{site}/{name}": event.get(name) for name in ("loss", "seconds", "epsilon")}
    elif kind == "evaluated":
        for name, metric in event.get("metrics", {}).items():
            found |= {f"server/{name}": metric["value"], f"server/{name}-low": metric["low"]}
            found[f"server/{name}-high"] = metric["high"]
    elif kind == "round_finished":
        found = {"round/seconds": event.get("seconds")}
    elif kind in ("site_failed", "update_refused"):
        found = {f"site/{site}/failed": 1.0}
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


@contextmanager
def _tensorboard(run: Path) -> Iterator[Write]:
    from tensorboard.summary import Writer  # the extra `tensorboard`

    writer = Writer(str(run / "tensorboard"))

    def write(event: Event) -> None:
        wall_time = datetime.fromisoformat(event["time"]).timestamp()
        for name, value in measures(event):
            writer.add_scalar(name, value, event["round"], wall_time=wall_time)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _mlflow(run: Path) -> Iterator[Write]:
    from mlflow import MlflowClient  # the extra `mlflow`; seconds to import
    from mlflow.entities import Metric

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of tables that it makes, in the midst of progress
    here = f"sqlite:///{run.resolve() / 'mlflow.db'}"  # Flower brings SQLAlchemy; MLflow's plain files are given up
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or here)
    known = client.get_experiment_by_name("fedmed")
    experiment = (
        known.experiment_id
        if known
        else client.create_experiment(
            "fedmed", artifact_location=None if os.environ.get("MLFLOW_TRACKING_URI") else run.resolve().as_uri()
        )
    )
    number = client.create_run(experiment, run_name=run.resolve().name).info.run_id
    status = "FAILED"

    def write(event: Event) -> None:
        nonlocal status
        if event.get("kind") == "run_finished":
            status = "FINISHED" if event.get("status") in ("completed", "degraded") else "FAILED"
        time_ms = int(datetime.fromisoformat(event["time"]).timestamp() * 1000)
        found = [Metric(_plain(name), value, time_ms, event["round"]) for name, value in measures(event)]
        if found:
            client.log_batch(number, metrics=found)

    try:
        yield write
    finally:
        client.set_terminated(number, status=status)


def _plain(name: str) -> str:
    """A name as MLflow takes it: letters, digits, and `_ - . / space`."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)
