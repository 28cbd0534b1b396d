"""Age and sex as tables and headers write them, in the words of a manifest."""

from __future__ import annotations

OLDEST = 90  # years: every greater age is written so (PS3.15 leaves it to the site; 45 CFR 164.514(b)(2)(i)(C))
SEXES = {
    "M": ("m", "male", "man", "mann", "männlich", "maennlich", "masculin", "homme", "masculino", "hombre", "maschio"),
    "F": (
        "f", "w", "female", "woman", "frau", "weiblich", "féminin", "feminin", "femme", "femenino", "feminino", "mujer",
        "femmina",
    ),
    "O": ("o", "other", "divers", "diverse"),
}  # fmt: skip


def years(text: str) -> str:
    """An age as whole years, 90 for all above: from "61", "61.0" or DICOM's "061Y", "018M"; "" for what is none."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "Y")
    try:
        age = int(float(digits) / {"Y": 1.0, "M": 12.0, "W": 52.0, "D": 365.0}[unit])
    except (ValueError, KeyError, OverflowError):
        return ""
    return str(min(age, OLDEST)) if 0 <= age < 120 else ""


def sex_of(text: str) -> str:
    """M, F or O from what tables write; "" for what is none of these words."""
    return next((sex for sex, words in SEXES.items() if text.strip().casefold() in words), "")
