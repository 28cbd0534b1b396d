"""`fedmed data`: making and preparing hospitals' data."""

from __future__ import annotations

import enum
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

app = typer.Typer(
    help="From an archive to a checked training set; phantom hospitals to try fedmed on; what is kept of images.",
    no_args_is_help=True,
)


Folder = Annotated[Path, typer.Argument(metavar="DIR|CSV", help="a folder with a manifest.csv, or the manifest")]


Site = Annotated[
    Path | None, typer.Option("--site", metavar="SITE", help="the site: whom its opt-out list names is not counted")
]


class Uncertain(enum.StrEnum):
    """What becomes of a label of which CheXpert's labeler was not sure."""

    ignore = "ignore"
    zeros = "zeros"
    ones = "ones"


class Kind(enum.StrEnum):
    """What the phantoms are for."""

    cxr = "cxr"
    lung_seg = "lung-seg"


@app.callback()
def data() -> None:
    """Make and prepare data."""


@app.command("synth")
def synth(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that does not exist yet")],
    task: Annotated[Kind, typer.Option(help="what the network will learn")] = Kind.cxr,
    sites: Annotated[int, typer.Option(min=1, max=1000, help="hospitals")] = 4,
    patients: Annotated[int, typer.Option(min=2, max=100_000, help="patients per hospital")] = 80,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same pixels")] = 7,
) -> None:
    """Write phantom hospitals as real DICOM, each with its own scanner, and a run.toml that trains on them.

    Example: fedmed data synth phantoms --task cxr --sites 4 --patients 80 --seed 7
    """
    from fedmed.cli.display import bar
    from fedmed.errors import DataError
    from fedmed.federated.phantoms import make_phantoms

    if folder.exists():
        raise DataError(f"{folder} exists; choose a new folder, so that nothing is overwritten")
    with bar(f"{sites} hospitals") as progress:
        make_phantoms(folder, task.value, sites=sites, patients=patients, seed=seed, progress=progress)
    print(f"wrote {folder}; next: fedmed simulate {quote(str(folder / 'run.toml'))}")


@app.command("cache")
def cache(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="a cache folder, else $FEDMED_CACHE, else ~/.fedmed/cache")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(min=0, metavar="GIB", help="remove the sets used longest ago until the rest fits")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="remove everything in DIR that no process uses")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read everything and remove what is damaged")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for a program")] = False,
) -> None:
    """Show the decoded images that are kept: how they were read, how many, their size and when they were last used.

    What a running process uses is never removed.

    Example: fedmed data cache --keep 20
    """
    from fedmed.cli.cache import show_cache

    show_cache(folder, keep_gib=0.0 if clear else keep, verify=verify, as_json=as_json)


@app.command("pull")
def pull(
    out: Annotated[Path, typer.Option(metavar="DIR", help="where images, quarantine and pulled.csv go")],
    dicomweb: Annotated[str, typer.Option(metavar="URL", help="of the archive's DICOMweb service")] = "",
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="certificate of the authority that signed the archive's; --pacs then by TLS"),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="of this machine, with its key, if the archive asks for one")
    ] = None,
    pacs: Annotated[str, typer.Option(metavar="HOST:PORT", help="of an archive without DICOMweb")] = "",
    called: Annotated[str, typer.Option(metavar="AET", help="its AE title")] = "",
    calling: Annotated[str, typer.Option(metavar="AET", help="the AE title under which it knows this machine")] = "",
    query: Annotated[
        str, typer.Option(help="modality=DX,CR date=20240101-20241231 body-part=CHEST description=words")
    ] = "",
    table: Annotated[
        Path | None,
        typer.Option("--list", metavar="CSV|XLSX", help="a column accession or patient (or MRN …): only these"),
    ] = None,
    rate: Annotated[float, typer.Option(min=0, metavar="MB/S", help="megabytes a second at most; 0 = no limit")] = 0.0,
    site: Annotated[
        Path | None, typer.Option(metavar="SITE", help="the site's folder or site.toml, for its keys")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the site's keys; made if they are not there")
    ] = None,
) -> None:
    """Pull images from the hospital's archive, de-identified on the way; what may show a name goes into quarantine.

    The same command goes on where it was interrupted. Passwords: FEDMED_PACS_USER and FEDMED_PACS_PASSWORD, or
    FEDMED_PACS_TOKEN, or ~/.netrc.

    Example: fedmed data pull --dicomweb https://pacs/dicom-web --query "modality=DX" --site north --out north/pulled
    """
    from fedmed.cli.pull import pull_images

    pull_images(
        out,
        dicomweb=dicomweb,
        ca=ca,
        certificate=certificate,
        pacs=pacs,
        called=called,
        calling=calling,
        query=query,
        table=table,
        rate=rate,
        site=site,
        keys=keys,
    )


@app.command("quarantine")
def quarantine(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="--out of the pull or the import")],
    release: Annotated[
        str, typer.Option("--release", metavar="ROWS", help="of quarantine.csv, 1,4-7 or all: into the images")
    ] = "",
    delete: Annotated[str, typer.Option("--delete", metavar="ROWS", help="of quarantine.csv: for good")] = "",
    start: Annotated[int, typer.Option("--from", min=1, metavar="ROW", help="that the page begins with")] = 1,
) -> None:
    """Show what is in quarantine as a page of pictures, and release or delete what a person has looked at.

    Example: fedmed data quarantine north/pulled --release 1,4-7 --delete 2
    """
    from fedmed.cli.quarantine import judge_quarantine

    judge_quarantine(folder, released=release, deleted=delete, start=start)


@app.command("import")
def import_(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="dicom, nih, chexpert, mimic-cxr, rsna, vinbig, brats or pairs")
    ],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="the archive: a folder")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where manifest.csv goes")],
    table: Annotated[
        Path | None, typer.Option("--table", metavar="CSV|XLSX", help="the hospital's own table of labels")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="TOML", help="what the table means, else DIR/labels.toml")
    ] = None,
    opt_out: Annotated[
        Path | None,
        typer.Option(
            "--opt-out",
            metavar="CSV|XLSX",
            help="patients who withdrew, by id or pseudonym, beside those of site.toml's list",
        ),
    ] = None,
    uncertain: Annotated[Uncertain, typer.Option(help="what uncertain labels become")] = Uncertain.ignore,
    site: Annotated[
        Path | None, typer.Option("--site", metavar="SITE", help="the site's folder or site.toml, for its keys")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", metavar="DIR", help="the site's keys, made if missing")] = None,
) -> None:
    """Write the manifest of an archive, joined with a table of labels, with pseudonyms for its patients.

    The first call with a table writes DIR/labels.toml for you to correct, imports nothing yet, and ends with status 1.
    Images stay where they are, but for DICOM, which is de-identified into DIR. The same command again goes on where it
    was interrupted. KIND: dicom, nih, chexpert, mimic-cxr, rsna, vinbig, brats or pairs; SRC: the archive's folder.

    Example: fedmed data import dicom north/pulled --out north/chest --table labels.xlsx --site north
    """
    from fedmed.cli.intake import check_archive, folders_of, import_data
    from fedmed.cli.pull import site_opt_out, site_pseudonyms

    check_archive(kind, source)
    standing = site_opt_out(site)
    if not import_data(
        kind,
        source,
        out,
        site_pseudonyms(site, keys, *folders_of(kind, source, out)),
        table=table,
        labels=labels,
        opt_out=opt_out or standing,
        standing=standing,
        uncertain=uncertain.value,
        check=f" --site {quote(str(site))}" if site else "",
    ):
        raise typer.Exit(1)


@app.command("check")
def check(
    place: Folder,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="LABEL", help="a label or region of the task; else all columns of 0 and 1"),
    ] = None,
    preset: Annotated[str, typer.Option(metavar="PRESET", help="data.preset of the run; else any that fits")] = "",
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="the page with pictures, too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for a program")] = False,
    site: Site = None,
) -> None:
    """Look at every image of a manifest: pass, or what to do. Exit 1 when training would be wrong.

    Example: fedmed data check north/chest --site north --html check.html
    """
    from fedmed.cli.intake import check_data, withdrawn_at

    withdrawn = withdrawn_at(site, place) or frozenset()
    if not check_data(place, labels=task or (), preset=preset, html=html, as_json=as_json, withdrawn=withdrawn):
        raise typer.Exit(1)


@app.command("card")
def card(
    place: Folder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="the card")],
    site: Site = None,
) -> None:
    """Write what may leave before the site joins: rounded counts and percentiles of a checked data set.

    Example: fedmed data card north/chest --site north --out north-data.json
    """
    from fedmed.cli.intake import withdrawn_at, write_card

    write_card(place, out, withdrawn_at(site, place))
