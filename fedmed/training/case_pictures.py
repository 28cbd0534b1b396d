"""The best and the worst cases of an evaluation as small pictures: for who owns the patients, and nobody else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion

from fedmed.imaging.dataset import Dataset
from fedmed.imaging.stored import Tiles

Bytes = NDArray[np.uint8]
Masks = NDArray[np.bool_]

KEPT = 3  # best and worst cases each
SIDE = 288  # pixels of a picture's long side
LINE = 2  # pixels of an outline
QUALITY = 82  # of WebP: 10 to 20 kB a picture
TRUE, PREDICTED = (86, 180, 233), (230, 159, 0)  # Okabe & Ito 2008: sky blue and orange


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case that is worth a look."""

    row: int  # of the data set; of a volume cut into boxes the first of these
    score: float  # higher is better
    outcome: str = ""  # what was predicted and true, in words
    depth: int | None = None  # the slice that is shown of a volume
    predicted: Masks | None = None  # (L, H, W) of that slice; None for a classification
    true: Masks | None = None  # (L, H, W)


@dataclass
class Extremes:
    """The best and worst cases seen so far. Only their masks are kept, so memory does not grow with the set."""

    best: list[Case] = field(default_factory=list)
    worst: list[Case] = field(default_factory=list)

    def add(
        self,
        rows: NDArray[np.int64],
        scores: NDArray[np.floating],
        logits: NDArray[np.floating],
        targets: NDArray[np.floating],
    ) -> None:
        """Look at a batch of segmented cases.

        Args:
            rows: (n,) of the data set.
            scores: (n,) mean Dice over the labels.
            logits: (n, L, [D,] H, W).
            targets: masks of the same shape.
        """
        order = np.argsort(scores, kind="stable")
        present = [k for k in order if targets[k].any()]  # two empty masks agree, which is nothing to look at
        self.offer(
            [_case(int(rows[k]), float(scores[k]), logits[k] > 0, targets[k] > 0) for k in order[:KEPT]],
            [_case(int(rows[k]), float(scores[k]), logits[k] > 0, targets[k] > 0) for k in present[-KEPT:]],
        )

    def offer(self, worst: Sequence[Case], best: Sequence[Case]) -> None:
        """Keep those that are worse or better than the ones known; of equals the first in the data set."""
        self.worst = sorted([*self.worst, *worst], key=lambda case: (case.score, case.row))[:KEPT]
        self.best = sorted([*self.best, *best], key=lambda case: (-case.score, case.row))[:KEPT]

    def pictures(self, data: Dataset) -> list[dict[str, object]]:
        """Worst first: `kind`, `score`, `outcome` and `image`, a data URI. No case is shown twice."""
        shown = {case.row for case in self.worst}
        cases = [("worst", case) for case in self.worst]
        cases += [("best", case) for case in self.best if case.row not in shown]
        return [
            {
                "kind": kind,
                "score": round(case.score, 4),
                "outcome": case.outcome,
                "image": data_uri(outlined(plane(data, case.row, case.depth), case.true, case.predicted)),
            }
            for kind, case in cases
        ]


def plane(data: Dataset, row: int, depth: int | None) -> NDArray[np.float32]:
    """One picture of a data set, or one slice of a volume, (C, H, W) in [0, 1]; the middle slice if `depth` is None."""
    if isinstance(data.images, Tiles):
        order = np.arange(len(data.images)) if data.order is None else data.order
        pixels = data.images.volumes[data.images.volume[order[row]]]  # the whole volume that the box was cut from
        scale = 1 / np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1.0
        chosen = np.asarray(pixels[:, pixels.shape[1] // 2 if depth is None else depth])
        return chosen.astype(np.float32) * np.float32(scale)
    image: NDArray[np.float32] = data.batch(np.array([row]))[0][0].numpy()
    if image.ndim == 3:
        return image
    return image[:, image.shape[1] // 2 if depth is None else depth]


def outlined(pixels: NDArray[np.float32], true: Masks | None = None, predicted: Masks | None = None) -> Bytes:
    """A picture with the outlines of masks.

    Args:
        pixels: (C, H, W); three channels are a colour, of any other number the first is shown.
        true: (L, H, W), drawn in sky blue.
        predicted: (L, H, W), drawn in orange over it.

    Returns:
        (h, w, 3), the longer side of `SIDE` pixels.
    """
    colours = pixels if len(pixels) == 3 else np.repeat(pixels[:1], 3, axis=0)
    grey = np.rint(np.clip(np.nan_to_num(colours), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    scale = SIDE / max(grey.shape[:2])
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    picture = np.array(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC))
    for masks, colour in ((true, TRUE), (predicted, PREDICTED)):
        for mask in () if masks is None else masks:
            whole = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
            picture[whole & ~binary_erosion(whole, iterations=LINE)] = colour
    return picture


def data_uri(picture: Bytes) -> str:
    """(h, w, 3) as a WebP that stands in the page itself."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _case(row: int, score: float, predicted: Masks, true: Masks) -> Case:
    """Of a volume, the slice with most of either mask."""
    if predicted.ndim == 3:
        return Case(row=row, score=score, predicted=predicted, true=true)
    depth = int(np.argmax((predicted | true).sum(axis=(0, 2, 3))))
    return Case(row=row, score=score, depth=depth, predicted=predicted[:, depth].copy(), true=true[:, depth].copy())
