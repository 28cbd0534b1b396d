"""`fedmed predict`: a kept network on new images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedmed.training.predict.batch import Prediction
    from fedmed.training.predict.kept import Kept

ROWS = 50  # of the table that is printed; predictions.csv holds all
WIDE = 6  # labels that have a column each; of more, so many are shown of each image


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE…", help="DICOM, PNG, JPEG or NIfTI files, and folders, which are searched"),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a new folder for results; else predictions/<time>-<run>")
    ] = None,
    heat_map: Annotated[
        bool, typer.Option("--heat-map", help="draw where the network looked: Grad-CAM, or gates of attention-unet")
    ] = False,
    label: Annotated[
        list[str], typer.Option(metavar="NAME", help="whose heat map; may be repeated; else the most probable label's")
    ] = [],  # noqa: B006  # typer reads the default and never changes it
    site: Annotated[
        str, typer.Option(metavar="NAME", help="the own network of this virtual hospital, in place of the shared one")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for a program")] = False,
) -> None:
    """Apply the network that a run kept to images: probabilities, heat maps or masks, and a predictions.csv.

    An IMAGE is a DICOM, PNG, JPEG or NIfTI file, or a folder, which is searched. For a network of volumes the DICOM
    slices in one folder are one image. One that cannot be read is a row that says why; only if none can be used, the
    exit status is 1.

    Example: fedmed predict runs/first scans/ --heat-map --label effusion --out predictions/first
    """
    from fedmed.errors import ConfigError

    if label and not heat_map:
        raise ConfigError("--label chooses whose heat map is drawn; add --heat-map")

    import torch

    from fedmed.training.predict.batch import check_heat_maps
    from fedmed.training.predict.kept import load_kept

    kept = load_kept(run, device="cuda" if torch.cuda.is_available() else "cpu", site=site)
    if heat_map:
        check_heat_maps(kept, label)
    folder, done = _predict(kept, images, out, _name(run), heat_map, label, quiet=quiet)
    if as_json:
        rows = [as_plain(kept, prediction) for prediction in done]
        print(json.dumps({"out": str(folder), "labels": list(kept.labels), "images": rows}))
    else:
        _show(kept, done, folder)
    failed = [prediction for prediction in done if prediction.error]
    if len(failed) == len(done):
        raise_for(failed)


def _predict(
    kept: Kept, named: list[Path], out: Path | None, name: str, heat_map: bool, labels: list[str], *, quiet: bool
) -> tuple[Path, list[Prediction]]:
    from fedmed.cli.display import bar
    from fedmed.errors import DataError
    from fedmed.training.predict.batch import predict_images
    from fedmed.training.predict.inputs import decoder, find_images
    from fedmed.training.predict.table import csv_writer

    if not any(path.exists() for path in named):
        raise DataError("there is no such file or folder" if len(named) == 1 else "nothing of what was named is there")
    with decoder(kept.recipe.items) as process:
        found = find_images(named, kept.recipe.items, process)
        if not found.images:
            raise DataError(f"there is no image in what was named ({found.passed_over} files that are none)")
        if found.passed_over and not quiet:
            print(f"{found.passed_over} files in the folders are no images and were passed over", file=sys.stderr)
        folder, done = _new_folder(out, name), []
        with (
            csv_writer(kept, folder, heat_maps=heat_map) as write,
            nullcontext(None) if quiet else bar("images") as progress,
        ):
            total = len(found.images)
            for prediction in predict_images(kept, found.images, folder, process, heat_maps=heat_map, labels=labels):
                write(prediction)
                done.append(prediction)
                if prediction.error:
                    print(f"image {prediction.number} of {total}: {prediction.error}", file=sys.stderr)
                if progress is not None:
                    progress(prediction.number, total)
    return folder, done


def _name(run: Path) -> str:
    return run.resolve().name


def _new_folder(out: Path | None, name: str) -> Path:
    from datetime import UTC, datetime

    from fedmed.errors import DataError

    folder = out or Path("predictions") / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{name}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError("the folder for results exists and is not empty; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def as_plain(kept: Kept, prediction: Prediction) -> dict[str, object]:
    """A prediction for --json."""
    from fedmed.training.predict.table import as_json

    return as_json(prediction, segments=kept.segments)


def raise_for(failed: Sequence[Prediction]) -> None:
    """End with one line that says why nothing could be used."""
    from fedmed.errors import DataError

    if len(failed) == 1:
        raise DataError(f"the image cannot be used: {failed[0].error}")
    raise DataError(f"none of the {len(failed)} images can be used; predictions.csv says why of each")


def _show(kept: Kept, done: Sequence[Prediction], folder: Path) -> None:
    from fedmed.cli.display import console
    from fedmed.reporting.words import plural

    if kept.segments:
        print(f"{'pixels' if kept.recipe.items == 'images' else 'voxels'} of each label")
    else:
        print(f"probabilities{'' if len(kept.labels) <= WIDE else f', the {WIDE} highest of {len(kept.labels)}'}")
    console().print(_table(kept, done[:ROWS]))
    failed = sum(bool(prediction.error) for prediction in done)
    pictures = sum(len(prediction.drawn) for prediction in done)
    parts = [f"{len(done) - failed} of {plural(len(done), 'image')}"]
    parts += [f"the first {ROWS} shown"] if len(done) > ROWS else []
    parts += [f"{plural(pictures, 'file')} drawn"] if pictures else []
    print(f"{', '.join(parts)}: {folder / 'predictions.csv'}")


def _table(kept: Kept, done: Sequence[Prediction]) -> Table:
    """A column for every label, or where that is too wide the most probable labels, one below the other."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = len(kept.labels) <= WIDE
    table = Table(
        "", "image", *(kept.labels if wide else ("label", "probability")), box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.columns[1].overflow = "fold"
    for column in table.columns[2 if wide else 3 :]:
        column.justify = "right"
    for prediction in done:
        number = str(prediction.number)
        name = Text("".join(c if c.isprintable() else "?" for c in prediction.image))
        values = dict(_values(kept, prediction))
        if prediction.error:
            name.append(f"\n{prediction.error}", style="yellow")
            table.add_row(number, name)
        elif wide:
            table.add_row(number, name, *(values[label] for label in kept.labels))
        else:
            for label, value in values.items():
                table.add_row(number, name, label, value)
                number, name = "", Text()
    return table


def _values(kept: Kept, prediction: Prediction) -> list[tuple[str, str]]:
    if kept.segments:
        return [(label, f"{count:,}") for label, count in prediction.voxels.items()]
    ranked = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])[:WIDE]
    return [(label, f"{value:.3f}") for label, value in ranked]
