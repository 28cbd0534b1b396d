"""`fedmed simulate`: a whole federation on this machine."""

from __future__ import annotations

import enum
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedmed.config import RunConfig
    from fedmed.federated.virtual_hospitals import Hospital


class Engine(enum.StrEnum):
    """What runs the virtual hospitals."""

    local = "local"
    ray = "ray"


def simulate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN.toml]", help="a run file; without one, the demo")] = None,
    assignments: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key")] = [],  # noqa: B006  # typer reads the default and never changes it
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the run folder to make; runs/TIME-NAME without it")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="continue the run in this folder")] = None,
    engine: Annotated[Engine, typer.Option(help="fedmed's own workers, or Flower's Ray")] = Engine.local,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, train nothing")] = False,
    log: Annotated[list[str], typer.Option(metavar="NAME", help="write events for tensorboard or mlflow too")] = [],  # noqa: B006  # typer copies it
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print result.json at the end")] = False,
) -> None:
    """Train a network across virtual hospitals on this machine, and report on it.

    Example: fedmed simulate phantoms/run.toml --set train.rounds=3 --set model.width=16 --out runs/first
    """
    from fedmed import config as run_file
    from fedmed.cli.display import bar
    from fedmed.errors import ConfigError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by a service manager: as by Ctrl-C
    if resume is not None and (run is not None or out is not None or assignments or dry_run):
        raise ConfigError("--resume takes the run folder alone; its run.toml says the rest")
    path = resume / "run.toml" if resume is not None else run
    config = run_file.load(path, assignments) if path else run_file.validate(run_file.override({}, assignments))
    _check_writers(log)

    # A misspelt key is answered by now; what follows takes seconds to import.
    from fedmed.federated.phantoms import with_phantoms
    from fedmed.federated.run_folder import RunFolder, only_writer, stamped
    from fedmed.federated.simulation import begin

    with bar("phantom hospitals") as progress:
        config = with_phantoms(config, progress, explicit=run_file.explicit_keys(config))
    if resume is not None:
        folder = RunFolder(resume)
        with only_writer(folder.path):
            effective = _resumed(config, resume)
            if effective is None:
                _show_finished(resume, as_json=as_json)
                return
            with _resumable(resume):
                result = _run(effective, folder, engine, log, quiet=quiet)
    else:
        parameters, hospitals = _plan(config)
        if dry_run:
            _show_plan(config, hospitals, parameters)
            return
        if hospitals is not None and not (quiet or as_json):
            _show_hospitals(config, hospitals)
        place = out or Path("runs") / stamped(config.name)
        effective, folder = begin(config, place, hospitals)
        with only_writer(folder.path), _resumable(folder.path):
            result = _run(effective, folder, engine, log, quiet=quiet)
    _show_result(result, config, folder.path, as_json=as_json)


def _plan(config: RunConfig) -> tuple[int, Sequence[Hospital] | None]:
    from fedmed.cli.display import bar
    from fedmed.federated.simulation import plan

    with bar("scanners") if config.simulation.partition == "scanner" else nullcontext() as progress:
        return plan(config, progress)


def _resumed(config: RunConfig, path: Path) -> RunConfig | None:
    """The same for a run folder that is taken up again; None if nothing is left to do."""
    from fedmed.federated.resume import take_up
    from fedmed.federated.run_folder import RunFolder
    from fedmed.federated.simulation import check
    from fedmed.federated.virtual_hospitals import with_hospitals

    if not take_up(RunFolder(path), config):
        return None
    effective = with_hospitals(config, RunFolder.resume(path).path)
    check(effective)
    return effective


def _check_writers(log: list[str]) -> None:
    if log:
        from fedmed.reporting.writers import check_writers

        check_writers(log)


def _run(config: RunConfig, folder: Any, engine: Engine, log: list[str], *, quiet: bool) -> dict[str, Any]:
    from fedmed.cli.display import together, watching
    from fedmed.federated.simulation import local_grid, run_on, run_with_ray
    from fedmed.reporting import write_model_card, write_report
    from fedmed.reporting.writers import writing

    try:
        if engine is Engine.ray:
            with (
                writing(log, folder.path) as write,
                watching(config.train.rounds, config.primary, quiet=quiet) as watch,
            ):
                return run_with_ray(config, folder, together(watch, write))
        with (
            local_grid(config, folder) as grid,
            writing(log, folder.path) as write,
            watching(config.train.rounds, config.primary, quiet=quiet) as watch,
        ):
            return run_on(grid, config, folder, together(watch, write))
    finally:
        if (folder.path / "result.json").exists():
            write_report(folder.path)
            write_model_card(folder.path)


@contextmanager
def _resumable(path: Path) -> Iterator[None]:
    """Say after Ctrl-C how the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"go on with: fedmed simulate --resume {quote(str(path))}", file=sys.stderr)
        raise


def _show_hospitals(config: RunConfig, hospitals: Sequence[Hospital]) -> None:
    from fedmed.cli.display import console
    from fedmed.cli.hospital_table import hospital_table

    shown = console()
    shown.print(hospital_table(hospitals, config.task.labels, shown.width))


def _show_plan(config: RunConfig, hospitals: Sequence[Hospital] | None, parameters: int) -> None:
    from fedmed.cli.display import charge
    from fedmed.federated.simulation import devices, worker_count
    from fedmed.federated.virtual_hospitals import check_files, planned
    from fedmed.reporting.words import plural

    for warning in check_files(config):
        print(f"warning: {warning}", file=sys.stderr)
    shown = planned(config) if hospitals is None else hospitals
    _show_hospitals(config, shown)
    workers = worker_count(config, devices(config), sites=len(shown))
    print(
        f"{config.model.name}: {parameters:,} parameters; {plural(config.train.rounds, 'round')} in "
        f"{workers} worker process{'es' if workers > 1 else ''}. Nothing was written."
    )
    if config.privacy.mode == "dp-sgd":
        print(charge(config))
        from fedmed.training.clipping import slow_layers
        from fedmed.training.network import network_of

        if slow := slow_layers(network_of(config)):
            print(slow)


def _show_finished(path: Path, *, as_json: bool) -> None:
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{result['status']} already: {result['rounds']} rounds, nothing left to do. Raise train.rounds in")
        print(f"{path / 'run.toml'} and resume again to train on.")


def _show_sites(result: dict[str, Any], primary: str) -> None:
    from rich.table import Table

    from fedmed.cli.display import console, interval

    table = Table("site", "patients", "images", "rounds", f"{primary} on its held-out patients", box=None)
    for site in result["sites"]:
        metric = interval(site["metrics"].get(primary))
        counts = (site[key] for key in ("patients", "images", "rounds_joined"))
        table.add_row(site["site"], *("-" if count is None else str(count) for count in counts), metric)
    console().print(table)


def _show_result(result: dict[str, Any], config: RunConfig, path: Path, *, as_json: bool) -> None:
    from fedmed.cli.display import interval
    from fedmed.errors import RunFailed
    from fedmed.reporting.words import plural

    if as_json:
        print(json.dumps(result))
    else:
        model = path / "model.json"
        best = f", the network of round {json.loads(model.read_text())['round']} kept" if model.exists() else ""
        best += (
            " (best on the server's selection patients)"
            if best and config.data.server and config.evaluate.keep == "best"
            else ""
        )
        print(f"{result['status']}: {plural(result['rounds'], 'round')}{best}, {result['timing']['total_s']:.0f} s")
        primary = config.primary
        for name, metric in result["server"]["metrics"].items():
            if name == primary or name.startswith(f"{primary}/"):
                print(f"  {name:<24} {interval(metric)}")
        _show_sites(result, primary)
        if result["status"] == "degraded":
            print(f"  dropped: {result['reason']}")
        print(f"report: {path / 'report.html'}")
    if result["status"] in ("failed", "paused"):
        raise RunFailed(f"{result['status']}: {result['reason']}; kept in {path}")
