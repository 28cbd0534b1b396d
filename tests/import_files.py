"""What the tests of importing need: tables, pictures, a small hospital with both, and what became of them."""

import csv
import gzip
from pathlib import Path

import numpy as np
import openpyxl
from PIL import Image

from fedmed.intake.importing import Rules
from fedmed.intake.labels import read_label_rules, read_labels
from fedmed.intake.pseudonyms import Pseudonyms

RULES = """
join = "image"
column = "Datei"
[columns]
patient_id = "PatNr"
sex = "Geschlecht"
[labels.effusion]
columns = ["Erguss", "Erguss 2"]
positive = ["pos"]
negative = ["neg"]
unknown = ["", "not annotated"]
"""


def spreadsheet(path: Path, lines: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    for line in lines:
        book.active.append(line)
    book.save(path)
    return path


def hospital(tmp_path: Path, pseudonyms: Pseudonyms) -> tuple[Path, Rules]:
    for number in range(5):
        picture(tmp_path / "set" / f"{number}.png", number)
    sheet = spreadsheet(
        tmp_path / "labels.xlsx",
        [
            ["Datei", "PatNr", "Geschlecht", "Erguss", "Erguss 2"],
            ["0.png", 17.0, "w", "pos", None],
            ["1.png", 17, "w", "", "NEG "],
            ["2.png", 18, "m", "not annotated", ""],
            ["3.png", 19, "m", "vielleicht", None],
            ["3.png", 19, "m", "pos", None],
            ["9.png", 20, "m", "neg", None],
        ],
    )
    (tmp_path / "labels.toml").write_text(RULES)
    known = read_labels(sheet, read_label_rules(tmp_path / "labels.toml"), pseudonyms)
    return tmp_path / "set", Rules(pseudonyms=pseudonyms, table=known)


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def missed(out: Path) -> list[tuple[str, str]]:
    with (out / "unmatched.csv").open(newline="") as file:
        return [(row["what"], row["where"]) for row in csv.DictReader(file)]
