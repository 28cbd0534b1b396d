"""A site's images and targets as arrays, ready to be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.config import TaskConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.cache import Decoded, Pixels, decode_all, key_of
from fedmed.imaging.manifest import Manifest, Row, read_manifest
from fedmed.imaging.reading import preset_named, read_image, read_mask
from fedmed.imaging.resize import letterbox, letterbox_mask
from fedmed.imaging.split import evaluation_rows


@dataclass(frozen=True)
class Dataset:
    """Images, targets and whose they are.

    `select` shares pixels instead of copying them: row i of the data set is row `order[i]` of `images` (and of
    `targets` when these are masks). Read rows by `batch`.
    """

    images: NDArray[Any]  # (N, C, S, S): uint16, the value times 65535, maybe memory-mapped; or float32
    targets: NDArray[Any]  # (N, labels) float32, NaN = unknown; or (N, labels, S, S) uint8, 0 or 1
    patients: tuple[str, ...]  # one per row
    unreadable: tuple[int, ...] = ()  # rows of the manifest that were left out
    evaluation: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # (N,) held out
    channels: int = 0  # of a batch: one grey channel is repeated to so many; 0 = as stored
    order: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Without `evaluation` no row is held out; without `order` the rows are as stored."""
        if self.order is None:
            object.__setattr__(self, "order", np.arange(len(self.images)))
        if not len(self.evaluation):
            object.__setattr__(self, "evaluation", np.zeros(len(self.patients), bool))
        if not len(self.patients) == len(self.evaluation) == len(self._order):
            raise DataError(f"{len(self.patients)} patients do not fit {len(self._order)} images")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.patients)

    def batch(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows as tensors.

        Args:
            rows: (n,) indices below `len(self)`.

        Returns:
            Images (n, C, S, S) float32 in [0, 1], and targets float32: (n, labels) or (n, labels, S, S).
        """
        stored = self._order[rows]
        pixels = self.images[stored].astype(np.float32, copy=False)  # the gather is already a copy
        if self.images.dtype == np.uint16:
            pixels *= np.float32(1 / 65535)
        images = torch.from_numpy(pixels)
        if self.channels > images.shape[1]:
            images = images.repeat(1, self.channels // images.shape[1], 1, 1)
        targets = self.targets[stored if self.targets.ndim == 4 else rows]
        return images, torch.from_numpy(targets.astype(np.float32, copy=False))

    def select(self, keep: NDArray[np.bool_]) -> Dataset:
        """The rows where `keep` (N,) is true; pixels are shared."""
        rows = np.flatnonzero(keep)
        return replace(
            self,
            targets=self.targets if self.targets.ndim == 4 else self.targets[rows],
            patients=tuple(self.patients[row] for row in rows),
            evaluation=self.evaluation[rows],
            order=self._order[rows],
        )

    @property
    def _order(self) -> NDArray[np.int64]:
        return np.arange(len(self.images)) if self.order is None else self.order


def load_dataset(
    manifest_path: Path,
    *,
    task: TaskConfig,
    preset: str,
    image_size: int,
    in_channels: int,
    max_unreadable: float,
    site_share: float,
    seed: int,
    name: str,
    cache_dir: Path | None,
) -> Dataset:
    """Everything a manifest names, decoded, resized and split.

    Args:
        manifest_path: the site's CSV.
        task: labels, and classification or segmentation.
        preset: how pictures are read, a key of `reading.PRESETS`.
        image_size: side of the square that a picture is fitted into, pixels.
        in_channels: of the network; a multiple of what the preset gives.
        max_unreadable: share of unreadable images above which the set is refused.
        site_share: share of patients held out for evaluation, unless the manifest has splits.
        seed: of the split.
        name: of the site.
        cache_dir: where decoded images are kept; None = memory.

    Raises:
        DataError: the manifest is wrong, too many images cannot be read, or a mask does not fit.
        ConfigError: the preset is unknown or does not fit the network.
    """
    channels = preset_named(preset).channels
    if in_channels % channels:
        raise ConfigError(
            f'model.in-channels = {in_channels} does not fit data.preset = "{preset}", which gives {channels}'
        )
    manifest = read_manifest(manifest_path, task)
    held = evaluation_rows(manifest, site_share, seed, name)
    pixels = _pixels(manifest, task, preset, image_size, cache_dir)
    _check_unreadable(pixels.unreadable, len(manifest.rows), max_unreadable)
    readable = [index for index, row in enumerate(manifest.rows) if row.number not in pixels.unreadable]
    rows = [manifest.rows[index] for index in readable]
    return Dataset(
        images=pixels.images,
        targets=np.array([row.labels for row in rows], np.float32) if pixels.masks is None else pixels.masks,
        patients=tuple(row.patient for row in rows),
        unreadable=tuple(sorted(pixels.unreadable)),
        evaluation=held[readable],
        channels=in_channels,
    )


def _pixels(manifest: Manifest, task: TaskConfig, preset: str, size: int, cache_dir: Path | None) -> Pixels:
    rows = manifest.rows
    folder = None
    if cache_dir is not None:
        files = [path for row in rows for path in (row.image, row.mask) if path is not None]
        settings = {"preset": preset, "size": size, "kind": task.kind, "masks": len(task.labels)}
        if task.kind == "classification":
            del settings["masks"]  # the labels of a classification are not in the cache
        folder = cache_dir / key_of(files, base=manifest.path.parent, settings=settings)

    def decode(index: int) -> Decoded:
        return _decode(rows[index], preset=preset, size=size, labels=len(task.labels))

    return decode_all(decode, [row.number for row in rows], folder)


def _decode(row: Row, *, preset: str, size: int, labels: int) -> Decoded:
    """One row's image as (C, S, S) uint16 and mask as (L, S, S) uint8."""
    image = read_image(row.image, preset=preset)
    small = np.rint(letterbox(image, size).clip(0, 1) * 65535).astype(np.uint16)
    if row.mask is None:
        return small, None
    mask = read_mask(row.mask)
    if mask.shape != image.shape[1:]:
        text = f"row {row.number}: the mask is {_size(mask.shape)}, its image {_size(image.shape[1:])}"
        raise DataError(text, public=text)
    if labels > 1 and mask.max() > labels:
        text = f"row {row.number}: the mask holds {mask.max()}, but the task has {labels} labels"
        raise DataError(text, public=text)
    planes = mask[None] != 0 if labels == 1 else mask[None] == np.arange(1, labels + 1)[:, None, None]
    return small, letterbox_mask(planes.astype(np.uint8), size)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} by {shape[1]} pixels"


def _check_unreadable(unreadable: Mapping[int, str], total: int, most: float) -> None:
    """Refuse a set of which too much, or everything, cannot be read."""
    count = len(unreadable)
    if not count or (count < total and count <= most * total):
        return
    first = ", ".join(f"row {number} ({reason})" for number, reason in sorted(unreadable.items())[:5])
    more = ", …" if count > 5 else ""
    rule = "" if count == total else f", above data.max-unreadable = {100 * most:g} %"
    text = f"{count} of {total} images ({100 * count / total:.1f} %) cannot be read{rule}: {first}{more}"
    raise DataError(text, public=text)  # numbers of rows, and what was wrong with the bytes
