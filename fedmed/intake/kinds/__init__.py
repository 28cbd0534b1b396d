"""One file per kind of archive; each gives its images one by one, with whose they are and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fedmed.intake.kinds.brats import brats
from fedmed.intake.kinds.chexpert import chexpert
from fedmed.intake.kinds.dicom import dicom
from fedmed.intake.kinds.found import Found, Unmatched
from fedmed.intake.kinds.mimic_cxr import mimic_cxr
from fedmed.intake.kinds.nih import nih
from fedmed.intake.kinds.pairs import pairs
from fedmed.intake.kinds.rsna import rsna
from fedmed.intake.kinds.vinbig import vinbig

KINDS: dict[str, Callable[[Path], Iterator[Found | Unmatched]]] = {
    "dicom": dicom,
    "nih": nih,
    "chexpert": chexpert,
    "mimic-cxr": mimic_cxr,
    "rsna": rsna,
    "vinbig": vinbig,
    "brats": brats,
    "pairs": pairs,
}
