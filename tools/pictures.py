"""The pictures of README and docs, made of phantoms, into docs/pictures.

    .venv/bin/python tools/pictures.py                 # trains the demo first: two minutes on two cores
    .venv/bin/python tools/pictures.py --run RUN       # of a demo that was trained already

It needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

import fedmed
from fedmed.federated.phantoms import PATIENTS, SEED, SITES, make_phantoms

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
COLORS = 128  # of a picture: half a page of text and plots in 60 kB
WAIT_MS = 8000  # of a page's own clock, until its plots are drawn


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a demo that was trained already")
    options = parser.parse_args()
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        sys.exit("Chromium is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_phantoms(folder / "cxr", "cxr", sites=SITES, patients=PATIENTS, seed=SEED)
        run = options.run or folder / "run"
        if options.run is None:
            fedmed.simulate(fedmed.load(folder / "cxr" / "run.toml"), run)
        take(program, fedmed.write_report(run).resolve(), PICTURES / "report.png", size=(1000, 2690), top=1310)
        checked = folder / "check.html"
        words = ("data", "check", folder / "cxr" / "site-2", "--html", checked)
        subprocess.run([sys.executable, "-m", "fedmed", *words], check=True, stdout=subprocess.DEVNULL)
        take(program, checked, PICTURES / "check.png", size=(1000, 2190))


def take(program: str, page: Path, picture: Path, *, size: tuple[int, int], top: int = 0) -> None:
    """A page's first pixels from `top` on, in few colors."""
    with tempfile.TemporaryDirectory() as name:
        shot = Path(name) / "shot.png"
        subprocess.run(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={name}",
                f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={WAIT_MS}", f"--screenshot={shot}",
                page.as_uri(),
            ],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        picture.parent.mkdir(exist_ok=True)
        Image.open(shot).convert("RGB").crop((0, top, *size)).quantize(COLORS).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
