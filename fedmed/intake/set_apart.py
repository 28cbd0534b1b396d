"""What a person decides about objects in quarantine: which are harmless, and which must not come in."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fedmed.durable import make_private
from fedmed.errors import ConfigError, DataError, UnreadableImage
from fedmed.imaging.decoding import VOLUME_BYTES, VOLUME_TIMEOUT_S
from fedmed.imaging.isolation import DecodingProcess
from fedmed.intake.keep import APART, QUARANTINE, REASONS, where_now
from fedmed.intake.tables import table_rows
from fedmed.types import OnProgress

SIDE = 1024  # px, longer side of a picture: small print stays readable
ROWS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


@dataclass(frozen=True, kw_only=True)
class SetApart:
    """An object that was set apart once. It stays at the site."""

    row: int  # of quarantine.csv, from 1; no row ever goes
    file: Path  # in quarantine
    image: Path  # its place among the images
    reason: str
    now: str  # APART, RELEASED or REMOVED


def set_apart(folder: Path) -> tuple[SetApart, ...]:
    """Every object that a pull or an import set apart, by its row.

    Args:
        folder: `--out` of the pull or the import.

    Raises:
        DataError: there is no such folder, or quarantine.csv cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    rows = table_rows(folder / REASONS, needed=("image", "reason")) if (folder / REASONS).is_file() else ()
    return tuple(
        SetApart(
            row=row,
            file=folder / QUARANTINE / Path(cells["image"]).name,
            image=folder / cells["image"],
            reason=cells["reason"],
            now=where_now(folder, cells["image"]),
        )
        for row, (_, cells) in enumerate(rows, 1)
    )


def chosen(text: str, objects: Sequence[SetApart]) -> tuple[SetApart, ...]:
    """The objects in quarantine that a text such as "1,4-7" or "all" names by their rows.

    Raises:
        ConfigError: it is no such text, or names a row of which no object is in quarantine.
    """
    here = {each.row: each for each in objects if each.now == APART}
    if text.strip() == "all":
        return tuple(here.values())
    rows: dict[int, None] = {}
    for part in text.split(","):
        found = ROWS.fullmatch(part.strip())
        if not found:
            raise ConfigError(f'"{text}": expected rows of {REASONS} such as 1,4-7, or all')
        first, last = int(found[1]), int(found[2] or found[1])
        absent = next((row for row in range(first, last + 1) if row not in here), None)
        if absent is not None:
            raise ConfigError(f'"{text}": no object of row {absent} is in quarantine')
        rows |= dict.fromkeys(range(first, last + 1))
    return tuple(here[row] for row in rows)


def release(each: SetApart) -> None:
    """Move an object to its place among the images, where the next import takes it in.

    Raises:
        DataError: it cannot be moved.
    """
    try:
        make_private(each.image.parent)
        each.file.replace(each.image)
    except OSError as error:
        raise DataError(f"{each.file}: cannot be moved ({error.strerror})") from None


def delete(each: SetApart) -> None:
    """Delete an object; the same pull or import does not bring it back.

    Raises:
        DataError: it cannot be deleted.
    """
    try:
        each.file.unlink()
    except OSError as error:
        raise DataError(f"{each.file}: cannot be deleted ({error.strerror})") from None


def pictures(
    objects: Sequence[SetApart], progress: OnProgress | None = None
) -> Iterator[tuple[SetApart, tuple[str, ...]]]:
    """Each object with pictures of what was judged of it, as data URIs; none where no decoder reads its pixels.

    Args:
        objects: in quarantine.
        progress: called with objects done, and all.
    """
    with DecodingProcess(
        timeout_s=VOLUME_TIMEOUT_S, memory_bytes=VOLUME_BYTES, jobs="fedmed.intake.judging"
    ) as process:
        for number, each in enumerate(objects, 1):
            try:
                found = process.run("pictures", path=str(each.file), side=SIDE)
                yield each, tuple(_as_uri(Image.fromarray(grey)) for grey in found.values())
            except UnreadableImage:
                yield each, ()
            if progress:
                progress(number, len(objects))


def _as_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
