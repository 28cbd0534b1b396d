"""The label dictionary: how a hospital's own table of labels is joined with its images, and what its words mean.

`labels.toml` says which column of the table is matched with what of the images, which columns make up a label, and
which of their values mean 1 and 0. Whatever is in neither list is unknown: it becomes an empty cell, and never 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Annotated, Literal

from pydantic import Field

from fedmed.config import Section, checked, read_toml
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.manifest import SPLITS
from fedmed.intake.kinds.found import ENDINGS, Found, stem_of
from fedmed.intake.persons import sex_of, years
from fedmed.intake.pseudonyms import Pseudonyms
from fedmed.intake.tables import Cells, columns_of, table_rows

Join = Literal["accession", "study", "patient", "image"]
JOINS: dict[Join, tuple[str, ...]] = {  # what names of columns hint at, folded
    "accession": ("accession", "accessionnumber", "accessionno", "acc", "zugangsnummer", "auftragsnummer"),
    "study": ("studyinstanceuid", "studyuid", "study"),
    "patient": ("patientid", "patient", "pid", "mrn", "subject", "recordid"),
    "image": ("image", "path", "file", "filename"),
}
ABOUT: dict[str, tuple[str, ...]] = {  # what a table may say beside labels, and names of columns that say it, folded
    "patient_id": JOINS["patient"],
    "age": ("age", "patientage", "alter"),
    "sex": ("sex", "patientsex", "gender", "geschlecht"),
    "view": ("view", "viewposition"),
    "split": ("split",),
    "site": ("site",),
}
WORDS = {  # values that mean the same in many sheets
    "1": ("1", "1.0", "yes", "y", "true", "pos", "positive", "present", "ja", "oui", "si", "vorhanden"),
    "0": ("0", "0.0", "no", "n", "false", "neg", "negative", "absent", "nein", "non", "keine"),
}
MOST_VALUES = 6  # of a column that may be a label
GUESS_ROWS = 2000
NOT_USED = "# Columns that are not used: "


class Label(Section):
    """One label of the federation."""

    columns: Annotated[tuple[str, ...], Field(min_length=1)]  # of the table; the first that says 0 or 1 counts
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    unknown: tuple[str, ...] = ("",)  # words that are known to say nothing, and so are not counted as strange


class LabelRules(Section):
    """`labels.toml`."""

    join: Join
    column: str
    columns: dict[str, str] = Field(
        default_factory=dict
    )  # age, sex, view, split, site, patient_id -> the table's column
    labels: dict[str, Label]


@dataclass(kw_only=True)
class LabelTable:
    """A hospital's table, ready to be asked; it remembers which of its rows were never asked for."""

    names: tuple[str, ...]
    about: tuple[str, ...]
    join: Join
    pseudonyms: Pseudonyms
    blank: list[int] = field(default_factory=list)  # rows without a key
    strange: Counter[str] = field(default_factory=Counter)  # label -> cells that say nothing labels.toml knows
    disputed: dict[str, list[int]] = field(default_factory=dict, repr=False)  # key -> rows that name several patients
    _torn: dict[tuple[str, int], list[int]] = field(default_factory=dict, repr=False)  # key, label's place -> its rows
    _rows: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict, repr=False)
    _used: dict[str, Path] = field(default_factory=dict, repr=False)  # key -> the last image that asked for it

    @property
    def conflicts(self) -> int:
        """Labels of which two rows of one key say the opposite: they are unknown, whatever further rows say."""
        return len(self._torn)

    def contradicting(self) -> list[tuple[int, str]]:
        """The rows of such labels, by number, each with the label's name."""
        return sorted((number, self.names[place]) for (_, place), numbers in self._torn.items() for number in numbers)

    def match(self, found: Found) -> dict[str, str] | None:
        """Labels, and what else the table says, of an image; None if it has no row, or rows of several patients."""
        key = self._key_of(found)
        row = self._rows.get(key) if key else None
        if row is None or key in self.disputed:
            return None
        if self.join == "image" and self._used.get(key, found.image) != found.image:
            raise DataError(f"row {row[0]} of the table fits two images of one name; give each file a name of its own")
        self._used[key] = found.image
        return dict(zip((*self.names, *self.about), row[1], strict=True))

    def disputes(self, found: Found) -> bool:
        """Whether rows name several patients for an image, so that nobody knows whose the labels are."""
        return self._key_of(found) in self.disputed

    def disputing(self) -> list[int]:
        """Rows of the table, by number, of which others with the same key name another patient."""
        return sorted(number for numbers in self.disputed.values() for number in numbers)

    def unmatched(self) -> list[int]:
        """Rows of the table, by number, that no image asked for."""
        keys = self._rows.keys() - self._used.keys() - self.disputed.keys()
        return sorted(self._rows[key][0] for key in keys)

    def __len__(self) -> int:
        """How many different keys the table has."""
        return len(self._rows)

    def _key_of(self, found: Found) -> str:
        match self.join:
            case "image":
                return stem_of(found.image.name, ENDINGS) or found.image.name
            case "study":
                return _keyed(self.join, found.study, self.pseudonyms, known=found.pseudonymous)
            case "patient":
                return _keyed(self.join, found.patient, self.pseudonyms, known=found.pseudonymous)
            case "accession":
                return _keyed(self.join, found.accession, self.pseudonyms, known=found.pseudonymous)

    def _add(
        self, key: str, number: int, values: tuple[str, ...], shared: dict[tuple[str, ...], tuple[str, ...]]
    ) -> None:
        first, before = self._rows.get(key, (number, values))
        labels = len(self.names)
        pairs = list(zip(before, values, strict=True))
        if "patient_id" in self.about:
            place = labels + self.about.index("patient_id")
            one, other = before[place], values[place]
            if one and other and self.pseudonyms.patient(one) != self.pseudonyms.patient(other):
                self.disputed.setdefault(key, [first]).append(number)
        for place, (a, b) in enumerate(pairs[:labels]):
            if a and b and a != b:
                self._torn.setdefault((key, place), [first]).append(number)
        merged = tuple("" if (key, place) in self._torn else a or b for place, (a, b) in enumerate(pairs))
        self._rows[key] = first, shared.setdefault(merged, merged)


def read_label_rules(path: Path) -> LabelRules:
    """Read a labels.toml.

    Raises:
        ConfigError: it is missing or wrong.
    """
    rules = checked(LabelRules, read_toml(path), source=str(path))
    if not rules.column:
        raise ConfigError(f"{path}: column: name the column of the table that says which image a row is of")
    unknown = sorted(set(rules.columns) - set(ABOUT))
    if unknown:
        raise ConfigError(f"{path}: columns.{unknown[0]}: there are {', '.join(ABOUT)}")
    for name, label in rules.labels.items():
        both = {*map(_folded, label.positive)} & {*map(_folded, label.negative)}
        if both:
            raise ConfigError(f'{path}: labels.{name}: "{sorted(both)[0]}" is positive and negative')
    return rules


def read_labels(table: Path, rules: LabelRules, pseudonyms: Pseudonyms) -> LabelTable:
    """Read a table into memory: about 250 bytes a row.

    Raises:
        DataError: it cannot be read, or lacks a column that labels.toml names, or has it twice.
    """
    named = (name for label in rules.labels.values() for name in label.columns)
    needed = (rules.column, *rules.columns.values(), *named)
    read = LabelTable(names=tuple(rules.labels), about=tuple(rules.columns), join=rules.join, pseudonyms=pseudonyms)
    meanings = {name: _meaning(label) for name, label in rules.labels.items()}
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # few combinations of labels, many rows
    for number, row in table_rows(table, needed=needed):
        key = _key_in_table(rules.join, row[rules.column], pseudonyms)
        if not key:
            read.blank.append(number)
            continue
        values = [_value(row, label, meanings[name], name, read.strange) for name, label in rules.labels.items()]
        more = [_plain_about(name, row[column]) for name, column in rules.columns.items()]
        read._add(key, number, (*values, *more), shared)
    return read


def guessed_rules(table: Path, *, by_name: bool = False) -> str:
    """A labels.toml to start from: the table's columns, and guesses at what they are. Values of few kinds are listed.

    Args:
        table: of the hospital.
        by_name: whether images are known by their file names at best, as pictures without headers are.

    Raises:
        DataError: the table cannot be read.
    """
    header = columns_of(table)
    values = _values_of(table, header)
    join, column = _guessed_join(header, by_name=by_name)
    lines = [
        "# How the table is joined with the images, and what its words mean. A first guess by fedmed: read it, correct",
        "# it, delete what is no label, then run the import again.",
        "#",
        f"# The table's columns: {', '.join(json.dumps(name, ensure_ascii=False) for name in header)}",
        "",
        "# What of an image the column holds: accession, study, patient, or image (a file's name).",
        f"join = {json.dumps(join)}",
        f"column = {json.dumps(column, ensure_ascii=False)}",
        "",
        "[columns]  # copied into the manifest; with patient_id, the table and not the image says whose an image is",
    ]
    used = {column}
    for name, hints in ABOUT.items():
        guess = next((each for each in header if bare(each) in hints and each != column), "")
        if name == "split" and not set(map(_folded, values.get(guess) or {"?"})) <= SPLITS.keys():
            guess = ""  # a column of that name that means something else
        known = guess and (name != "patient_id" or join == "image")  # an image with a header says itself whose it is
        lines.append(f"{'' if known else '# '}{name} = {json.dumps(guess, ensure_ascii=False)}")
        used.add(guess)
    for name in header:
        kinds = values.get(name)
        about = any(bare(name) in hints for hints in ABOUT.values())
        if name == column or about or kinds is None or not any(_guess(kind) for kind in kinds):
            continue
        lines += ["", f"[labels.{json.dumps(_common(name))}]", f"columns = [{json.dumps(name, ensure_ascii=False)}]"]
        for key, meaning in (("positive", "1"), ("negative", "0"), ("unknown", "")):
            chosen = sorted(kind for kind in kinds if _guess(kind) == meaning)
            lines.append(f"{key} = [{', '.join(json.dumps(kind, ensure_ascii=False) for kind in chosen)}]")
        used.add(name)
    if not any(line.startswith("[labels.") for line in lines):
        lines += ["", "# No column of yes and no was found. Describe each label so, without the # before it:"]
        lines += ["# [labels.effusion]", '# columns = ["…"]', '# positive = ["pos"]', '# negative = ["neg"]']
    if left := [name for name in header if name not in used]:
        lines += ["", f"{NOT_USED}{', '.join(json.dumps(name, ensure_ascii=False) for name in left)}"]
    return "\n".join(lines) + "\n"


def _values_of(table: Path, header: tuple[str, ...]) -> dict[str, set[str]]:
    """The different values of every column that has few."""
    values: dict[str, set[str]] = {name: set() for name in header}
    for number, (_, row) in enumerate(table_rows(table)):
        if number >= GUESS_ROWS:
            break
        for name in list(values):
            values[name].add(row[name])
            if len(values[name]) > MOST_VALUES:
                del values[name]
    return values


def _guessed_join(header: tuple[str, ...], *, by_name: bool) -> tuple[Join, str]:
    exact_first = ((fits, *item) for fits in (str.__eq__, str.startswith) for item in JOINS.items())
    best: Join = "image" if by_name else "accession"
    for fits, join, hints in sorted(exact_first, key=lambda each: each[1] != best):
        for name in header:
            if any(fits(bare(name), hint) for hint in hints):
                return join, name
    return best, ""  # any other column may hold names


def _guess(value: str) -> str:
    """What a value of a column probably means: 1, 0, or nothing."""
    return next((meaning for meaning, words in WORDS.items() if _folded(value) in map(_folded, words)), "")


def _common(name: str) -> str:
    return "-".join(name.lower().split())


def _meaning(label: Label) -> dict[str, str]:
    words = ((label.unknown, ""), (label.negative, "0"), (label.positive, "1"))
    return {_folded(word): value for spellings, value in words for word in spellings}


def _value(row: Cells, label: Label, meaning: Mapping[str, str], name: str, strange: Counter[str]) -> str:
    """What the first column that says 0 or 1 says."""
    for column in label.columns:
        word = _folded(row[column])
        if word and word not in meaning:
            strange[name] += 1
        if value := meaning.get(word, ""):
            return value
    return ""


def _plain_about(name: str, text: str) -> str:
    if name == "age":
        return years(text)
    return sex_of(text) if name == "sex" else text


def _key_in_table(join: Join, text: str, pseudonyms: Pseudonyms) -> str:
    if join == "image":
        name = PureWindowsPath(text).name  # whose paths may have either slash
        return stem_of(name, ENDINGS) or name
    return _keyed(join, text, pseudonyms, known=False)


def _keyed(join: Join, text: str, pseudonyms: Pseudonyms, *, known: bool) -> str:
    """An id as the site's pseudonym of it, so that tables fit to images that were pulled and de-identified before."""
    if known or not text.strip():
        return text.strip()
    return {"accession": pseudonyms.accession, "study": pseudonyms.uid, "patient": pseudonyms.patient}[join](text)


def _folded(text: str) -> str:
    """A cell's word whatever its case and blanks."""
    return " ".join(text.split()).casefold()


def bare(column: str) -> str:
    """A column's name without what people put between words."""
    return "".join(letter for letter in column.casefold() if letter.isalnum())
