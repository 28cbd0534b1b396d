"""MIMIC-CXR 2 and MIMIC-CXR-JPG (Johnson et al. 2019, arXiv:1901.07042): reports as CheXpert's labeler read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import DataError
from fedmed.intake.kinds.chexpert import observed
from fedmed.intake.kinds.found import Found, Unmatched, the_file
from fedmed.intake.tables import columns_of, table_rows

SPLITS = {"train": "train", "validate": "validation", "test": "test"}


def mimic_cxr(source: Path) -> Iterator[Found | Unmatched]:
    """The images that `…-metadata.csv` names, with the observations of their study and the official split.

    Raises:
        DataError: a table is missing or has other columns.
    """
    labels, metadata, splits = (_table(source, part) for part in ("chexpert", "metadata", "split"))
    names = tuple(name for name in columns_of(labels) if name not in ("subject_id", "study_id"))
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # most studies have one of a few thousand patterns
    of_study: dict[str, tuple[str, ...]] = {}
    try:
        for number, row in table_rows(labels):
            pattern = tuple(observed(row[name], labels.name, number) for name in names)
            of_study[row["study_id"]] = shared.setdefault(pattern, pattern)
        split_of = {row["dicom_id"]: SPLITS[row["split"]] for _, row in table_rows(splits)}
        for number, row in table_rows(metadata):
            study, patient, name = row["study_id"], row["subject_id"], row["dicom_id"]
            image = _image(source, patient, study, name)
            if image is None:
                yield Unmatched(what="row without image", place=f"row {number} of {metadata.name}")
            elif study not in of_study:
                yield Unmatched(what="image without row", place=f"row {number} of {metadata.name}")
            else:
                observations = dict(zip(names, of_study[study], strict=True))
                yield Found(
                    patient=patient,
                    images=(image,),
                    study=study,
                    labels=observations,
                    view=row.get("ViewPosition", ""),
                    split=split_of.get(name, ""),
                )
    except KeyError:
        raise DataError(f"{source}: a table of MIMIC-CXR has other columns or splits than version 2.0.0") from None


def _table(source: Path, part: str) -> Path:
    return the_file(source, f"mimic-cxr-*-{part}.csv", f"mimic-cxr-*-{part}.csv.gz")


def _image(source: Path, patient: str, study: str, name: str) -> Path | None:
    folder = source / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
    return next((path for ending in ("jpg", "dcm") if (path := folder / f"{name}.{ending}").is_file()), None)
