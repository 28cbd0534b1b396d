"""One object from wherever it came to where it stays: among the images, in quarantine, or nowhere.

Nothing that names a patient is written, not even for a moment: what touches the disk was de-identified before, in a
folder that only its owner enters, and its name is a keyed one. To keep an object again changes nothing.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from fedmed.durable import append, make_private
from fedmed.errors import DataError, UnreadableImage
from fedmed.imaging.decoding import VOLUME_BYTES, VOLUME_TIMEOUT_S
from fedmed.imaging.dicom.kinds import kind_of
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.isolation import DecodingProcess
from fedmed.imaging.plain_errors import plain_errors
from fedmed.imaging.volumes.headers import is_localizer
from fedmed.intake.deidentify import deidentified, is_ours
from fedmed.intake.persons import years
from fedmed.intake.pixels import may_hide_bits, put_cells_
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.quarantine import header_reason
from fedmed.intake.tables import replace_table, table_rows

IMAGES, QUARANTINE, INCOMING = "images", "quarantine", ".incoming"
REASONS, COLUMNS = "quarantine.csv", ("file", "image", "reason", "now")
APART, RELEASED, REMOVED = "in quarantine", "released", "removed by hand"  # where an object is now
LOCALIZER = "a localizer, not a slice of a volume"
VOLUMES = ("ct", "mr", "nuclear")  # kinds whose series are volumes
BEFORE, WITHDREW = "de-identified by fedmed before", "of a patient who withdrew"  # not written, and why
MASKS = (SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7", RTStructureSetStorage)  # regions of other images
UNSEEN = "pixels that cannot be looked at"

_noted: dict[Path, tuple[int, set[str]]] = {}  # of each quarantine.csv its bytes, and the files that it names
_pixels = DecodingProcess(timeout_s=VOLUME_TIMEOUT_S, memory_bytes=VOLUME_BYTES, jobs="fedmed.intake.judging")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What became of an object. Everything in it is keyed or harmless, and none of it is to leave the site."""

    path: Path | None  # in `images`; None = set apart, or not written
    reason: str | None  # why it was set apart or not written
    set_apart: bool = False  # in quarantine; else an object with a reason was not written at all
    image: str = ""  # where it is or, after a person looked at it, may be, relative to the folder
    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    view: str = ""
    age: str = ""  # whole years
    sex: str = ""
    accession: str = ""
    modality: str = ""


def keep(source: Path | Dataset, folder: Path, pseudonyms: Pseudonyms, withdrawn: frozenset[str] = frozenset()) -> Kept:
    """De-identify one object and write it to `folder/images/PATIENT/SERIES/OBJECT.dcm`, or to `folder/quarantine`.

    Localizers, and objects that are neither images nor masks (reports, presentation states, directories), are not
    written; nor are those of patients who withdrew, nor what fedmed wrote itself, whose pseudonyms would get
    pseudonyms.

    Args:
        source: a DICOM file, or an object with its pixels and its file meta information.
        folder: made if it is not there, for its owner alone.
        pseudonyms: of the site.
        withdrawn: pseudonyms of patients who withdrew.

    Raises:
        UnreadableImage: the object cannot be parsed or written anew; the reason names nothing of it.
        DataError: the folder cannot be written.
    """
    with plain_errors():
        dataset = source if isinstance(source, Dataset) else open_dicom(source)
        kind = kind_of(dataset)
        is_mask = str(dataset.get("SOPClassUID") or "") in MASKS
        if not is_mask and (kind.refusal and kind.modality != "capture"):
            return Kept(path=None, reason=kind.refusal)
        if not is_mask and "PixelData" not in dataset:
            raise UnreadableImage("an image without its pixels")
        if kind.modality in VOLUMES and is_localizer(dataset.get("ImageType")):
            return Kept(path=None, reason=LOCALIZER)
        if is_ours(dataset):
            return Kept(path=None, reason=BEFORE)
        patient = pseudonyms.patient(str(dataset.get("PatientID") or ""))
        if patient in withdrawn:
            return Kept(path=None, reason=WITHDREW, patient_id=patient)
        clean = deidentified(dataset, pseudonyms)
        name = f"{clean.SOPInstanceUID}.dcm"
        image = Path(IMAGES, str(clean.PatientID) or "nobody", str(clean.SeriesInstanceUID), name)
        reason = header_reason(dataset)
    if (folder / image).exists():
        return _kept(clean, folder, image, None)
    try:
        incoming = _written(clean, folder / INCOMING / name)
        unread = _with_hidden_bits_blanked(clean, incoming)
        if not reason and not is_mask:
            reason = _pixel_reason(incoming)
        reason = reason or unread
        _moved(incoming, folder / (Path(QUARANTINE, name) if reason else image))
        if reason:
            _note(folder / REASONS, (f"{QUARANTINE}/{name}", image.as_posix(), reason, APART))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    return _kept(clean, folder, image, reason)


def where_now(folder: Path, image: str) -> str:
    """Whether an object that was kept is among the images, in quarantine, or gone: a person may have moved it.

    Args:
        folder: that it was kept in.
        image: its place among the images, relative to the folder.
    """
    if (folder / image).exists():
        return RELEASED
    return APART if (folder / QUARANTINE / Path(image).name).exists() else REMOVED


def write_reasons(folder: Path) -> None:
    """Bring quarantine.csv up to date with what a person moved. No row goes: a series lacks what is set apart."""
    path = folder / REASONS
    if not path.is_file():
        return
    replace_table(path, COLUMNS, (row | {"now": where_now(folder, row["image"])} for _, row in table_rows(path)))


def _kept(clean: Dataset, folder: Path, image: Path, reason: str | None) -> Kept:
    return Kept(
        path=None if reason else folder / image,
        reason=reason,
        set_apart=bool(reason),
        image=image.as_posix(),
        patient_id=str(clean.PatientID),
        study_uid=str(clean.get("StudyInstanceUID") or ""),
        series_uid=str(clean.get("SeriesInstanceUID") or ""),
        view=str(clean.get("ViewPosition") or ""),
        age=years(str(clean.get("PatientAge") or "")),
        sex=str(clean.get("PatientSex") or ""),
        accession=str(clean.AccessionNumber),
        modality=str(clean.get("Modality") or ""),
    )


def _pixel_reason(path: Path) -> str | None:
    """What its pixels show, seen by a process that may crash."""
    try:
        return bytes(_pixels.run("pixels", path=str(path))["reason"]).decode() or None
    except UnreadableImage:
        return UNSEEN


def _with_hidden_bits_blanked(clean: Dataset, path: Path) -> str | None:
    """Write an object anew if there is something in bits that no value uses; why it cannot be known, else None."""
    if not may_hide_bits(clean):
        return None
    try:
        cells = bytes(_pixels.run("cells", path=str(path))["cells"])
    except UnreadableImage:
        return UNSEEN
    if cells:
        put_cells_(clean, cells)
        _written(clean, path)
    return None


def _written(clean: Dataset, path: Path) -> Path:
    """The object in a file that only its owner reads, on disk when this returns."""
    make_private(path.parent)
    buffer = io.BytesIO()
    with plain_errors():
        clean.save_as(buffer, enforce_file_format=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        append(descriptor, buffer.getbuffer())
    finally:
        os.close(descriptor)
    return path


def _moved(source: Path, target: Path) -> None:
    """All of the file or none of it."""
    make_private(target.parent)
    source.replace(target)


def _note(path: Path, cells: tuple[str, ...]) -> None:
    """A line of quarantine.csv, once, in one write."""
    size = path.stat().st_size if path.exists() else 0
    known, files = _noted.get(path, (-1, set()))
    if size != known:  # not seen yet, or written by somebody else
        files = {row["file"] for _, row in table_rows(path)} if size else set()
    if cells[0] not in files:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([cells] if size else [COLUMNS, cells])
        line = buffer.getvalue().encode()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            file.write(line)
        files.add(cells[0])
        size += len(line)
    _noted[path] = (size, files)
