"""Many long vectors side by side, on disk: read in columns, so that memory is flat in their number and length."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.federated.aggregation import chunks
from fedmed.types import FloatVector

VALUES = 1 << 20  # in memory at a time
DIFFERENCES = 1 << 16  # of one row from the others at a time, in a core's cache
Matrix = NDArray[np.float32]  # (rows, columns)


class Rows:
    """A float32 matrix that grows by rows. Its file has no name and goes with the process."""

    def __init__(self, width: int, folder: Path | None) -> None:
        """Start without rows."""
        self.width, self.count = width, 0
        self._file = tempfile.TemporaryFile(dir=folder if folder and folder.is_dir() else None, buffering=0)  # noqa: SIM115  # closed by `close`
        self.close = weakref.finalize(self, self._file.close)  # frees the disk; also where a round ends without result

    def append(self, parameters: FloatVector, sent: FloatVector, scale: float, rest: FloatVector) -> None:
        """Add the row (scale·(parameters - sent), rest)."""
        for part in chunks(parameters.size):
            self._write(np.subtract(parameters[part], sent[part]) * np.float32(scale))
        self._write(rest)
        self.count += 1

    def columns(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, Matrix]]:
        """The rows of `order` between two columns, piece by piece; each piece is valid until the next is asked for."""
        step = max(VALUES // max(len(order), 1), 1024)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            matrix = np.empty((len(order), last - first), np.float32)
            for row, number in enumerate(order):
                self._read(matrix[row], 4 * (number * self.width + first))
            yield slice(first - start, last - start), matrix

    def squared_distances(self, order: Sequence[int], stop: int) -> NDArray[np.float64]:
        """(n, n) ‖xᵢ - xⱼ‖² over the first `stop` columns, from the differences themselves.

        ‖xᵢ‖² + ‖xⱼ‖² - 2·xᵢ·xⱼ would be faster, and lose all digits where vectors are long and close to each other.
        """
        squares, step = np.zeros((len(order), len(order))), max(DIFFERENCES // max(len(order), 1), 64)
        for _, matrix in self.columns(order, 0, stop):
            for block in (matrix[:, first : first + step] for first in range(0, matrix.shape[1], step)):
                for row in range(len(order) - 1):
                    differences = np.subtract(block[row + 1 :], block[row], dtype=np.float64)
                    squares[row, row + 1 :] += np.einsum("ij,ij->i", differences, differences)
        return squares + squares.T

    def _write(self, values: FloatVector) -> None:
        left = np.ascontiguousarray(values).view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]

    def _read(self, row: FloatVector, offset: int) -> None:
        left = row.view(np.uint8).data
        while left:
            got = os.preadv(self._file.fileno(), [left], offset)
            left, offset = left[got:], offset + got
