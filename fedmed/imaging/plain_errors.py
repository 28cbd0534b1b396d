"""Decoders warn, log and raise with text from the file; what leaves these functions is a reason without any of it."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedmed.errors import FedmedError, UnreadableImage

Item = TypeVar("Item")

for _name in ("pydicom", "PIL", "openjpeg", "libjpeg", "rle", "pylibjpeg"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)  # their log records quote headers


@contextmanager
def plain_errors() -> Iterator[None]:
    """Nothing that a library says about a file comes out of this block but `UnreadableImage` with a reason.

    Raises:
        UnreadableImage: instead of whatever was raised, and no traceback shows what it was.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            yield
        except FedmedError:
            raise
        except Exception as error:  # decoders raise anything at all
            raise UnreadableImage(reason_of(error)) from None


def plainly(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; each is made under `plain_errors`, which ends before the item is given out."""
    while True:
        with plain_errors():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def reason_of(error: Exception) -> str:
    """A reason without any text from the file."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "a folder, not a file"
        case PermissionError():
            return "no permission to read it"
        case UnidentifiedImageError():
            return "neither DICOM, PNG nor JPEG"
        case EOFError() | zlib.error():
            return "truncated file"
        case OSError() if "truncated" in str(error).lower():
            return "truncated file"
        case Image.DecompressionBombError():
            return "larger than any picture"
        case MemoryError():
            return "needs more memory than it may have"
        case _:
            return f"cannot be decoded ({type(error).__name__})"
