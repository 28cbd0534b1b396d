"""How often burnt-in text is seen, in phantoms with a name in a corner and in real radiographs.

    python benchmarks/burned_in.py [--each 20] [--table metadata.csv]

A phantom chest of 1024 pixels has a name, date or number in one corner, bright or dark, in letters of the given height;
its contrast is that between the ink and what lies under it. This is judged by shape alone, as are the small phantoms of
`fedmed data synth`. The table of real X-rays has columns `path` (relative to the folder above it) and `hospital`; every
picture of them is looked at as it is, by tesseract too where it is installed. Times are CPU seconds.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedmed.federated.phantoms import make_phantoms
from fedmed.imaging.dicom.decoding import stored_frames
from fedmed.imaging.dicom.opening import open_dicom
from fedmed.imaging.phantoms.chest import random_pose, thorax
from fedmed.intake.burned_in import READ, lines_of_text, text_in

WORDS = ("DOE^JANE", "Mueller Anna 12.03.1950", "MRN 4711123", "Smith, John 03/04/61 M", "GARCIA LOPEZ")
SIDE, MARGIN, LOW = 1024, 12, 0.25


def main(each: int, table: Path | None) -> None:
    rng = np.random.default_rng(0)
    print("| letters, px | ink | seen | contrast under 25 %: seen | CPU, s |\n|---|---|---|---|---|")
    for height in (8, 12, 16, 24, 40, 64):
        for dark in (False, True):
            found = [phantom(rng, height, dark) for _ in range(each)]
            clear = [seen for seen, contrast, _ in found if contrast >= LOW]
            faint = [seen for seen, contrast, _ in found if contrast < LOW]
            seconds = sum(spent for *_, spent in found) / each
            print(f"| {height} | {'dark' if dark else 'bright'} | {sum(clear)} of {len(clear)} | "
                  f"{sum(faint)} of {len(faint)} | {seconds:.3f} |")  # fmt: skip
    bare = sum(lines_of_text(picture(rng)) > 0 for _ in range(2 * each))
    print(f"\nwithout text: {bare} of {2 * each} phantoms flagged")
    small = [lines_of_text(shown) > 0 for shown in small_phantoms()]
    print(f"without text: {sum(small)} of {len(small)} small phantoms flagged")
    if table:
        print("\n| hospital | X-rays | flagged by shape | read by tesseract | of these, not by shape |")
        print("|---|---|---|---|---|")
        looked, flagged, read, more = Counter(), Counter(), Counter(), Counter()
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                image = np.asarray(Image.open(table.parent.parent / row["path"]).convert("L"))
                looked[row["hospital"]] += 1
                shaped, words = lines_of_text(image) > 0, text_in(image) == READ
                flagged[row["hospital"]] += shaped
                read[row["hospital"]] += words
                more[row["hospital"]] += words and not shaped
        for hospital, count in looked.items():
            print(f"| {hospital} | {count} | {flagged[hospital]} | {read[hospital]} | {more[hospital]} |")


def small_phantoms() -> Iterator[np.ndarray]:
    """Those of four hospitals of 30 patients, seed 7, which have no text; longer sides of 128 to 160 pixels."""
    with tempfile.TemporaryDirectory() as name:
        make_phantoms(Path(name, "phantoms"), "cxr", sites=4, patients=30, seed=7)
        for file in sorted(Path(name).rglob("*.dcm")):
            yield next(iter(stored_frames(open_dicom(file))))


def picture(rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE) of 12 bits."""
    shown = np.asarray(thorax((SIDE, SIDE), random_pose(rng), rng).picture)
    return ((shown - shown.min()) / np.ptp(shown) * 4095).astype(np.uint16)


def phantom(rng: np.random.Generator, height: int, dark: bool) -> tuple[bool, float, float]:
    """Whether the text is seen, its contrast, and the CPU seconds of looking."""
    cells = picture(rng)
    font = ImageFont.load_default(size=height / 0.72)  # of an em; capitals are so high
    text = str(rng.choice(WORDS))
    layer = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(layer)
    left = MARGIN if rng.random() < 0.5 else max(MARGIN, SIDE - MARGIN - int(draw.textlength(text, font=font)))
    top = MARGIN if rng.random() < 0.5 else SIDE - MARGIN - int(1.6 * height)
    draw.text((left, top), text, fill=255, font=font)
    ink = np.asarray(layer) / 255
    colour = 0 if dark else 4095
    contrast = abs(colour - float(cells[ink > 0.5].mean())) / 4095
    written = (cells * (1 - ink) + colour * ink).astype(np.uint16)
    began = time.process_time()
    seen = lines_of_text(written) > 0
    return seen, contrast, time.process_time() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    main(arguments.each, arguments.table)
