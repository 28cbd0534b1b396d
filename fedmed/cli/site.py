"""`fedmed site`: what a hospital does to take part: its file, its keys, its kit, its runner."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from fedmed.errors import ConfigError, one_line

app = typer.Typer(help="A hospital's side: set up, join, take part, check.", no_args_is_help=True)

Place = Annotated[Path, typer.Argument(metavar="SITE", help="the site's folder, or its site.toml")]


@app.callback()
def site() -> None:
    """Set up a site, join a consortium, take part, and check all of it."""


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to make")],
    name: Annotated[str, typer.Option(help="the site's name in the federation; else the folder's")] = "",
    manifest: Annotated[str, typer.Option(help="the CSV of images, relative to the folder")] = "manifest.csv",
) -> None:
    """Write a commented site.toml with every key.

    Example: fedmed site init north --manifest /data/chest/manifest.csv
    """
    from fedmed.deployment.site_folder import init_site

    path = init_site(folder, name=name or folder.absolute().name, manifest=manifest)
    print(f"wrote {path}; read it, fill it in, then: fedmed site keygen {quote(str(folder))}")


@app.command("keygen")
def keygen(folder: Place) -> None:
    """Make the site's keys, which never leave it, and card.json, which the coordinator gets. Keys that exist stay.

    Example: fedmed site keygen north
    """
    from fedmed.deployment.site_folder import CARD, make_site_keys, read_site_folder

    place = read_site_folder(folder)
    card = make_site_keys(place)
    print(f"keys in {place.keys}: keep a copy in a safe, and send nobody any of them")
    print(f"card {place.root / CARD}: send it to the coordinator")
    print(f"fingerprint of the card, to be compared by telephone: {card.fingerprint}")


@app.command("join")
def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the folder that the coordinator sent")],
    folder: Annotated[
        Path, typer.Option("--site", metavar="SITE", help="the site's folder, or its site.toml")
    ] = Path(),
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="FINGERPRINT", help="of the coordinator's key, asked by telephone; needed the first time"),
    ] = None,
) -> None:
    """Check a kit and install it.

    Example: fedmed site join kits/north --site north --coordinator 1f2e-3d4c-5b6a-7988-9706
    """
    from fedmed.deployment.node_keys import fingerprint
    from fedmed.deployment.site_folder import join as join_consortium
    from fedmed.deployment.site_folder import read_site_folder
    from fedmed.federated.site_config import read_peers

    place = read_site_folder(folder)
    before: dict[str, str] = {}
    with suppress(ConfigError):  # damaged; it is about to be replaced
        before = dict(read_peers(place.root))
    joined = join_consortium(place, kit, coordinator)
    after = dict(read_peers(place.root))
    for name in sorted(before.keys() | after.keys()):
        if name != joined.site and before.get(name) != after.get(name):
            key = f"key {fingerprint(bytes.fromhex(after[name]))}" if name in after else "no more"
            print(f"in secure sums with this site: {name}, {key}")
    following = f"fedmed site check {quote(str(folder))}"
    print(f"{joined.site} has joined {joined.consortium} at {joined.address}; next: {following}")


@app.command("start")
def start(folder: Place) -> None:
    """Take part until SIGTERM or Ctrl-C. Connections go out only.

    Example: fedmed site start north
    """
    from fedmed.deployment.site_folder import read_site_folder
    from fedmed.deployment.supernode import start_site

    start_site(read_site_folder(folder), lambda line: print(line, flush=True))


@app.command("check")
def check(
    folder: Place,
    dry_round: Annotated[
        bool, typer.Option(help="train a small network on ten patients; no ledger and no state is touched")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for a program")] = False,
) -> None:
    """Check all that taking part needs, one line each: ok, or what to do. Exit status 1 if anything is wrong.

    Example: fedmed site check north
    """
    from fedmed.deployment.checks import check_site

    findings = list(check_site(folder, dry_round=dry_round))
    if as_json:
        print(json.dumps([{"what": f.what, "ok": f.ok, "said": f.said} for f in findings]))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {one_line(finding.said)}")
    wrong = sum(not finding.ok for finding in findings)
    if wrong:
        raise ConfigError(f"{wrong} of {len(findings)} checks failed")


@app.command("baseline")
def baseline(folder: Place) -> None:
    """Train a network on this site's patients alone, and write what they gained by the last run. Nothing is sent.

    It takes as long as the site's part of the run did. Given again after a kill, it goes on after the last round.

    Example: fedmed site baseline north
    """
    from fedmed.cli.display import bar, interval
    from fedmed.deployment.site_folder import read_site_folder
    from fedmed.federated.sites import site_at
    from fedmed.reporting.site_report import write_site_report
    from fedmed.training.local_baseline import train_baseline

    site = site_at(read_site_folder(folder).file)
    with bar("rounds") as progress:
        result = train_baseline(site, progress or (lambda done, rounds: print(f"round {done}/{rounds}", flush=True)))
    said = json.loads(result.read_text(encoding="utf-8"))
    for arm in said["arms"]:
        gained = arm["gain_over_local"] and arm["gain_over_local"]["value"]
        more = "" if gained is None else f", {gained:+.3f} over the site's own"
        print(f"{said['primary']} {interval(arm)} {arm['arm']}{more}")
    print(f"page: {write_site_report(result.parent)}")
