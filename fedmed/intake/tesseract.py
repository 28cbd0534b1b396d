"""Letters read by tesseract, where that program is installed: what it reads is looked at here, and told to nobody."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LETTER = 32  # px, height of the letters that it is shown
EDGE = 20  # px, between lines and around them
LONGEST_S = 10.0
SURE, WORD = 75.0, 4  # percent, and letters or digits: less is read in ribs and side markers too

Grey = NDArray[np.uint8]


def installed() -> bool:
    """Whether there is a tesseract on this machine's PATH."""
    return shutil.which("tesseract") is not None


def reads_a_word(lines: Sequence[tuple[Grey, int]]) -> bool:
    """Whether tesseract reads a word in any of some pictures of lines.

    Args:
        lines: (H, W) dark on bright, and how high their letters are in pixels.

    Returns:
        False as well where the program fails or takes too long: then nobody has read anything.
    """
    command = ["tesseract", "stdin", "stdout", "--psm", "6", "--dpi", "300", "tsv"]  # 6: one block of lines
    try:
        done = subprocess.run(
            command,
            input=_sheet(lines),
            capture_output=True,
            timeout=LONGEST_S,
            check=True,
            env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        )
    except (OSError, subprocess.SubprocessError):
        return False
    cells = [line.split("\t") for line in done.stdout.decode("utf-8", "replace").splitlines()[1:]]
    return any(
        len(row) == 12 and float(row[10]) >= SURE and sum(letter.isalnum() for letter in row[11]) >= WORD
        for row in cells
    )


def _sheet(lines: Sequence[tuple[Grey, int]]) -> bytes:
    """One picture of all lines below each other, their letters of one height, as PNG."""
    pieces = []
    for grey, height in lines:
        scale = LETTER / height
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        pieces.append(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC))
    width, height = max(piece.width for piece in pieces), sum(piece.height + EDGE for piece in pieces)
    sheet = Image.new("L", (width + 2 * EDGE, height + EDGE), 255)
    top = EDGE
    for piece in pieces:
        sheet.paste(piece, (EDGE, top))
        top += piece.height + EDGE
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
