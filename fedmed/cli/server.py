"""`fedmed server`: what a consortium's coordinator does: provision sites, run the server, submit runs."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from shlex import quote
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedmed.config import RunConfig
    from fedmed.deployment.control import FlowerRun
    from fedmed.deployment.coordinators import Entrance

LONGEST = 160  # characters of why a run ended

app = typer.Typer(
    help="The coordinator's side: provision, serve, submit runs, follow and stop them.", no_args_is_help=True
)

Place = Annotated[Path, typer.Argument(metavar="SERVER", help="the server's folder, or its consortium.toml")]
Server = Annotated[
    Path, typer.Option("--server", metavar="SERVER", help="the server's folder, or a coordinator's from elsewhere")
]
Own = Annotated[Path, typer.Option("--server", metavar="SERVER", help="the server's folder, or its consortium.toml")]
Either = Annotated[
    Path, typer.Argument(metavar="SERVER", help="the server's folder, or a coordinator's from elsewhere")
]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON, for a program")]


@app.callback()
def server() -> None:
    """Make and run a consortium's server, on its own machine; a coordinator elsewhere submits, follows, fetches."""


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to make")],
    name: Annotated[str, typer.Option(help="the consortium's name; else the folder's")] = "",
    address: Annotated[str, typer.Option(help="DNS name or IP address that sites connect to")] = "localhost",
    port: Annotated[int, typer.Option(help="TCP port")] = 8443,
    nginx: Annotated[bool, typer.Option("--nginx", help="with nginx in front: for coordinators elsewhere")] = False,
) -> None:
    """Write a commented consortium.toml.

    Example: fedmed server init chest --address fl.example.org --nginx
    """
    from fedmed.deployment.consortium import init_consortium

    inner = port + 1 if nginx else 0
    path = init_consortium(folder, name=name or folder.absolute().name, address=address, port=port, loopback_port=inner)
    print(f"wrote {path}; read it, then: fedmed server provision {quote(str(path))} CARD…")


@app.command("provision")
def provision(
    folder: Place,
    cards: Annotated[list[Path] | None, typer.Argument(metavar="CARD", help="card.json of sites that are new")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="make the server's certificate anew now")] = False,
) -> None:
    """Make authority and certificate, take in sites' cards, and write every site's kit anew.

    Example: fedmed server provision chest/consortium.toml north.json south.json
    """
    from fedmed.deployment.certificates import SOON
    from fedmed.deployment.consortium import read_consortium
    from fedmed.deployment.provision import provision as make
    from fedmed.errors import one_line

    place = read_consortium(folder)
    made = make(place, cards or [], renew=renew)
    names = ", ".join(place.consortium.addresses)
    state = "new" if made.renewed else f"kept: it is renewed in its last {SOON.days} days, and by --renew"
    print(f"certificate for {names}, valid until {made.certificate.not_valid_after_utc:%Y-%m-%d} ({state})")
    for card in made.cards:
        print(f"site {card.name}: card {card.fingerprint} (ask the site by telephone), kit {place.kits / card.name}")
    if made.kits:
        print(f"fingerprint of the coordinator's key, which sites will ask for: {made.kits[0].fingerprint}")
    elif not made.damaged:
        print("no sites yet: fedmed site keygen at each hospital writes its card")
    for wrong in made.damaged:
        print(one_line(wrong), file=sys.stderr)


@app.command("feasibility")
def feasibility(
    cards: Annotated[
        list[Path], typer.Argument(metavar="CARD", help="files of `fedmed data card`, called as the sites")
    ],
    as_json: AsJson = False,
) -> None:
    """Show whether the data of some sites fit each other, before anybody joins.

    Example: fedmed server feasibility north-data.json south-data.json
    """
    from fedmed.cli.intake import show_feasibility

    show_feasibility(cards, as_json=as_json)


@app.command("coordinator")
def coordinator(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the coordinator")],
    folder: Own = Path(),
    request: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a signing request (PEM), if the key was made elsewhere")
    ] = None,
) -> None:
    """Let a coordinator at another machine in: make a key and a certificate, or sign a request.

    Example: fedmed server coordinator anna --server chest
    """
    from fedmed.deployment.consortium import read_consortium
    from fedmed.deployment.coordinators import KEY, admit_coordinator

    place = read_consortium(folder)
    listed = place.coordinators / f"{name}.crt"
    before = listed.exists()
    given = admit_coordinator(place, name, request)
    print(f"{name} may enter; give {given} to {name} alone" + ("" if request is None else f", who adds {KEY}"))
    if before:
        print(f"{name}'s earlier certificate opens nothing any more")
    print(f"there: fedmed server status {quote(given.name)}    to shut {name} out: delete {listed}")


@app.command("start")
def start(folder: Place) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Example: fedmed server start chest
    """
    from fedmed.deployment.consortium import read_consortium
    from fedmed.deployment.superlink import start_server

    start_server(read_consortium(folder), lambda line: print(line, flush=True))


@app.command("submit")
def submit(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file")],
    folder: Server = Path(),
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key of the run file")
    ] = [],  # noqa: B006  # typer wants a list
    wait: Annotated[bool, typer.Option(help="wait for the run's end; exit status 1 if it failed")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run at all sites that are connected. Where their data lie, only they know.

    Example: fedmed server submit run.toml --server chest --wait
    """
    from fedmed import config as run_file
    from fedmed.cli.display import charge
    from fedmed.deployment import control
    from fedmed.deployment.coordinators import entrance
    from fedmed.deployment.submission import check_own_files, check_paths, deployable

    server = entrance(folder)
    if server.near:
        config = run_file.load(run, overrides)
        check_own_files(config)
    else:
        config = run_file.load_as_written(run, overrides)
        check_paths(config)
    with control.control(server) as client:
        sites = control.nodes(client)
        number = control.submit(client, deployable(config, [node.site for node in sites]))
    if not as_json:
        there = [node.site for node in sites if node.status == "online"]
        waits = f", and the run waits for {config.strategy.min_sites}" if len(there) < config.strategy.min_sites else ""
        print(f"run {number} of {config.name} is submitted; {len(there)} of {len(sites)} sites are connected{waits}")
        if config.privacy.mode == "dp-sgd":
            print(charge(config))
        sys.stdout.flush()
    if wait:
        _follow(server, number, config, as_json=as_json)
    elif as_json:
        print(json.dumps({"run": number, "status": None, "folder": None}))


@app.command("status")
def status(folder: Either = Path(), as_json: AsJson = False) -> None:
    """Show which sites may connect, which are there, and all runs.

    Example: fedmed server status chest
    """
    from fedmed.deployment import control
    from fedmed.deployment.consortium import read_consortium
    from fedmed.deployment.coordinators import entrance
    from fedmed.deployment.provision import readable_cards
    from fedmed.deployment.run_files import folders, of_series, run_client

    server = entrance(folder)
    cards = readable_cards(read_consortium(folder))[0] if server.near else []
    with control.control(server) as client, run_client(server) as files:
        sites, runs, names = control.nodes(client), control.runs(client), folders(files)
        barred = control.taken_out(client, cards) if cards else []
    if as_json:
        facts = {
            "sites": [{"site": node.site, "status": node.status} for node in sites],
            "runs": [_facts(run) for run in runs],
        }
        print(json.dumps(facts))
        return
    for node in sites:
        print(f"site {node.site}: {node.status}")
    for site in barred:
        print(f"site {site}: not let in; {control.NEW_KEY}")
    for run in runs:
        name = of_series(names, run.series)
        print(_line(run, str(server.runs / name) if server.runs and name else name))


@app.command("stop")
def stop(
    number: Annotated[int, typer.Argument(metavar="RUN", help="the run's number, from submit or status")],
    folder: Server = Path(),
) -> None:
    """Stop a run. Its folder keeps what was reached.

    Example: fedmed server stop 1234567 --server chest
    """
    from fedmed.deployment import control
    from fedmed.deployment.coordinators import entrance

    with control.control(entrance(folder)) as client:
        control.stop_run(client, control.newest(client, number).number)
    print(f"run {number} is stopped; fedmed server resume {number} goes on with it")


@app.command("resume")
def resume(
    number: Annotated[int, typer.Argument(metavar="RUN", help="the run's number, from submit or status")],
    folder: Server = Path(),
    wait: Annotated[bool, typer.Option(help="wait for the run's end; exit status 1 if it failed")] = False,
) -> None:
    """Go on with a run that paused, failed or was stopped, from its last checkpoint.

    Example: fedmed server resume 1234567 --server chest --wait
    """
    from fedmed import config as run_file
    from fedmed.deployment import control
    from fedmed.deployment.coordinators import entrance

    server = entrance(folder)
    with control.control(server) as client:
        new = control.resume_run(client, number)
        submitted = control.newest(client, new).config
    print(f"run {new} goes on with run {number}", flush=True)
    if wait:
        _follow(server, new, run_file.unflatten(dict(submitted)), as_json=False)


@app.command("fetch")
def fetch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the run's number, or the name of its folder")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to write")],
    folder: Server = Path(),
) -> None:
    """Bring a run's folder here. What is here already stays; a fetch that was cut off goes on.

    Example: fedmed server fetch 1234567 --server anna --out runs/first
    """
    from fedmed.deployment import control
    from fedmed.deployment.coordinators import entrance
    from fedmed.deployment.run_files import fetch_run, of_series

    server = entrance(folder)
    series = None
    if run.isdecimal():
        with control.control(server) as client:
            series = control.newest(client, int(run)).series

    def chosen(names: list[str]) -> str | None:
        return of_series(names, series) if series is not None else next((name for name in names if name == run), None)

    files = list(fetch_run(server, chosen, out))
    print(f"{len(files)} files, {sum(file.bytes for file in files) / 1e6:.1f} MB, as the server has them: {out}")


def _follow(server: Entrance, number: int, config: RunConfig, *, as_json: bool) -> None:
    """Show a run until it ends, and what came of it.

    Raises:
        RunFailed: it is not complete.
    """
    from fedmed.cli.display import interval, watching
    from fedmed.deployment.continuing import finished
    from fedmed.deployment.following import Following
    from fedmed.errors import RunFailed
    from fedmed.federated.run_folder import folder_of

    with watching(config.train.rounds, config.primary, quiet=as_json) as watch:
        ended = finished(server, number, partial(print, file=sys.stderr, flush=True), Following(server, watch))
    kept = folder_of(server.runs, ended.series) if server.runs else None
    if as_json:
        print(json.dumps({"run": number, "status": ended.status, "folder": str(kept) if kept else None}))
    else:
        print(f"{ended.status}: {kept or f'fedmed server fetch {number} brings its folder'}")
    if not as_json and kept and (kept / "result.json").exists():
        found = json.loads((kept / "result.json").read_text(encoding="utf-8"))["server"]["metrics"]
        print(f"  {config.primary} {interval(found.get(config.primary))}\nnext: fedmed report {quote(str(kept))}")
    if not ended.status.endswith(":completed"):
        why = ended.details or ("" if ended.status.endswith(":stopped") else "logs/server.log says why")
        resume = f"fedmed server resume {number} goes on with it"
        raise RunFailed(f"run {number}: {ended.status}; {f'{why}; ' if why else ''}{resume}")


def _line(run: FlowerRun, folder: str | None) -> str:
    """A run in one line: its folder's path on the server's machine, its name elsewhere; None before it is made."""
    from fedmed.errors import one_line

    what = f"{run.config.get('name', 'a run')} of {run.submitted:%Y-%m-%d %H:%M} UTC"
    kept = f", folder {folder}" if folder else ""
    why = f" ({shorten(one_line(run.details), LONGEST, placeholder=' …')})" if run.details else ""
    return f"run {run.number}: {run.status}, {what}{kept}{why}"


def _facts(run: FlowerRun) -> dict[str, object]:
    return {"run": run.number, "status": run.status, "details": run.details}
