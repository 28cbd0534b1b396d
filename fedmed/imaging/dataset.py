"""A site's images and targets as arrays, ready to be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.config import TaskConfig
from fedmed.errors import DataError
from fedmed.imaging.cache.kept import kept
from fedmed.imaging.manifest import Manifest, read_manifest, without_patients
from fedmed.imaging.memory import in_memory
from fedmed.imaging.reading import require_channels
from fedmed.imaging.recipe import IN_3D, Recipe
from fedmed.imaging.split import evaluation_rows
from fedmed.imaging.stored import Located, Numbers, Slots, Stored, Tiles, check_unreadable
from fedmed.types import OnProgress


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Where the boxes of a data set were cut, so that what is predicted for them can be put together again."""

    volume: Numbers  # (n,) manifest row of the volume
    corner: Numbers  # (n, 3) its lowest voxel, along depth, height, width
    whole: Numbers  # (n, 3) voxels of the volume; a smaller volume than the box lies at the box's corner


@dataclass(frozen=True)
class Dataset:
    """Images, targets and whose they are: pictures (C, S, S), or volumes and boxes of volumes (C, D, H, W).

    `select` shares pixels instead of copying them: item i of the data set is item `order[i]` of `images` (and of
    `targets` when these are masks). Read items by `batch`.
    """

    # N items (C, …); a plain array holds float32, or shares of 255 or 65535
    images: NDArray[Any] | Slots | Tiles = field(repr=False)
    # (N, labels) float32, NaN = unknown; or masks (N, labels, …) of 0 and 1; or N items of class numbers (1, …)
    targets: NDArray[Any] | Slots | Tiles = field(repr=False)
    patients: tuple[str, ...] = field(repr=False)  # one per item
    unreadable: tuple[int, ...] = ()  # rows of the manifest that were left out
    evaluation: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # (N,) held out
    channels: int = 0  # of a batch: one grey channel is repeated to so many; 0 = as stored
    order: Numbers | None = None
    rows: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) manifest row that an item is of
    labels: int = 0  # of masks kept as class numbers
    reasons: Mapping[str, int] = field(default_factory=dict)  # why rows were left out, and how many for each reason
    modalities: int = 0  # places in a row of the manifest; 0 = there is none
    # Every patient of the manifest, with an item or without, and whether held out; empty = nobody but those with one
    named: Mapping[str, bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Without `evaluation` no item is held out; without `order` the items are as stored, each its own row."""
        count = len(self.patients)
        if self.order is None:
            object.__setattr__(self, "order", np.arange(len(self.images)))
        if not len(self.evaluation):
            object.__setattr__(self, "evaluation", np.zeros(count, bool))
        if not len(self.rows):
            object.__setattr__(self, "rows", np.arange(count))
        if not count == len(self.evaluation) == len(self.rows) == len(self._order):
            raise DataError(f"{count} patients do not fit {len(self._order)} images")

    def __len__(self) -> int:
        """Number of items."""
        return len(self.patients)

    def batch(
        self,
        rows: NDArray[np.int64],
        *,
        generator: np.random.Generator | None = None,
        margin: int = 0,
        keep_foreground: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some items as tensors.

        Args:
            rows: (n,) indices below `len(self)`.
            generator: if given, boxes of volumes are cut up to a quarter of a box away from their place, anew in
                every batch; nothing else changes. For training.
            margin: voxels around an item that come with it, in images and masks: what lies around a box in its
                volume, and 0 beyond that.
            keep_foreground: whether a box whose mask would lose all of its classes by moving stays in its place.

        Returns:
            Images (n, C, …) float32 in [0, 1], and targets float32: (n, labels) or masks (n, labels, …).
        """
        stored = self._order[rows]
        images = self._images
        corners = images.jittered(stored, generator) if isinstance(images, Tiles) and generator is not None else None
        if keep_foreground and corners is not None and isinstance(self.targets, Tiles):
            corners = self.targets.keeping_foreground(stored, corners)
        around = margin if isinstance(images, Tiles) else 0
        pixels = torch.from_numpy(_gathered(images, stored, corners, around))
        if self.channels > pixels.shape[1]:
            pixels = pixels.repeat(1, self.channels // pixels.shape[1], *[1] * (pixels.ndim - 2))
        targets = torch.from_numpy(self._targets(rows, stored, corners, around))
        if margin > around:  # nothing is known around whole items
            return _padded(pixels, margin), _padded(targets, margin)
        return pixels, targets

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item, as stored: (C, …)."""
        return self._images.shape

    def people(self, *, named: bool) -> tuple[int, int]:
        """How many patients are trained on, and held out; `named` counts also those without a readable image."""
        if named and self.named:
            held = sum(self.named.values())
            return len(self.named) - held, held
        trained, judged = ({self.patients[row] for row in np.flatnonzero(self.evaluation == side)} for side in (0, 1))
        return len(trained), len(judged)

    def select(self, keep: NDArray[np.bool_]) -> Dataset:
        """The items where `keep` (N,) is true, and their patients; pixels are shared."""
        rows = np.flatnonzero(keep)
        return replace(
            self,
            targets=self.labelled[rows] if self.labelled is not None else self.targets,
            patients=tuple(self.patients[row] for row in rows),
            evaluation=self.evaluation[rows],
            order=self._order[rows],
            rows=self.rows[rows],
            named=MappingProxyType({}),
        )

    @property
    def tiles(self) -> Tile | None:
        """Where each item was cut out of which volume; None if items are whole."""
        if not isinstance(self.images, Tiles):
            return None
        order = self._order
        return Tile(
            volume=self.rows,
            corner=self.images.corner[order],
            whole=self.images.shapes[self.images.volume[order]],
        )

    @property
    def labelled(self) -> NDArray[Any] | None:
        """The targets of a classification (N, labels), one row per item; None for masks, which lie as pixels do."""
        return self.targets if isinstance(self.targets, np.ndarray) and self.targets.ndim == 2 else None

    @property
    def _order(self) -> Numbers:
        return np.arange(len(self.images)) if self.order is None else self.order

    @cached_property
    def _images(self) -> Slots | Tiles:
        return Slots.of(self.images) if isinstance(self.images, np.ndarray) else self.images

    def _targets(self, rows: Numbers, stored: Numbers, corners: Numbers | None, margin: int) -> NDArray[np.float32]:
        if isinstance(self.targets, np.ndarray):
            values: NDArray[np.float32] = self.targets[stored if self.labelled is None else rows].astype(np.float32)
            return values
        classes = _gathered(self.targets, stored, corners, margin, scaled=False)  # (n, 1, …)
        if self.labels == 1:
            return classes
        numbers = np.arange(1, self.labels + 1, dtype=np.float32).reshape(-1, *[1] * (classes.ndim - 2))
        return np.equal(classes, numbers).astype(np.float32)


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
    items: str = "images",
    spacing_mm: tuple[float, ...] = (),
    volume_size: tuple[int, ...] = (),
    cache_gib: float = 50.0,
    processes: int = 1,
    progress: OnProgress | None = None,
    withdrawn: frozenset[str] = frozenset(),
    lenient: bool = False,
) -> Dataset:
    """Everything a manifest names, decoded, resized and split.

    Args:
        manifest_path: the site's CSV.
        task: labels, and classification or segmentation.
        preset: how pictures are read, a key of `reading.PRESETS`; or one for each modality, "ct-soft;pet".
        image_size: side of the square that a picture or a slice is fitted into, pixels.
        in_channels: of the network: a multiple of what the preset gives, and of several modalities all channels.
        max_unreadable: share of unreadable images above which the set is refused.
        site_share: share of patients held out for evaluation, unless the manifest has splits.
        seed: of the split.
        name: of the site.
        cache_dir: where decoded images are kept; None = memory.
        items: what a row of a batch is: images, slices, volumes or patches.
        spacing_mm: to which volumes are resampled, along depth, height, width; empty = as acquired.
        volume_size: voxels of a volume, cropped or padded at its centre, or of a patch.
        cache_gib: size above which the sets that were used longest ago leave the cache.
        processes: decoding processes, for what is not in the cache.
        progress: told (done, all) while images are decoded into the cache.
        withdrawn: patients who opted out; it is as if the manifest did not name them.
        lenient: no single row decides whether there is a data set, nor on which side another one is: those that do
            not fit count as unreadable, all may be, and a side may be empty. For private runs.

    Raises:
        DataError: the manifest is wrong, too many images cannot be read, or a row does not fit the task.
        ConfigError: the preset is unknown or does not fit the network.
    """
    recipe = Recipe.of(
        preset=preset,
        items=items,
        image_size=image_size,
        spacing_mm=spacing_mm,
        volume_size=volume_size,
        labels=task.labels if task.kind == "segmentation" else (),
    )
    manifest = without_patients(read_manifest(manifest_path, task, lenient=lenient), withdrawn)
    require_channels(manifest.modalities, preset, items, in_channels)
    held = evaluation_rows(manifest, site_share, seed, name, both=not lenient)
    fitting = [row for row in manifest.rows if not row.fault]
    if cache_dir is None:
        pixels = in_memory(fitting, recipe, processes=processes, lenient=lenient)
    else:
        pixels = kept(
            fitting, recipe, cache_dir, limit_gib=cache_gib, processes=processes, progress=progress, lenient=lenient
        )
    faults = {row.number: f"the row{row.fault}" for row in manifest.rows if row.fault}
    pixels = replace(pixels, unreadable={**faults, **pixels.unreadable})
    if not lenient:
        check_unreadable(pixels.unreadable, len(manifest.rows), max_unreadable)
    return _assembled(manifest, held, pixels, recipe, volume_size, in_channels)


def _assembled(
    manifest: Manifest,
    held: NDArray[np.bool_],
    stored: Stored,
    recipe: Recipe,
    volume_size: tuple[int, ...],
    in_channels: int,
) -> Dataset:
    """One data set of items; what a row says holds for all items of it."""
    readable = [index for index, row in enumerate(manifest.rows) if row.number not in stored.unreadable]
    facts: dict[str, Any] = {
        "unreadable": tuple(sorted(stored.unreadable)),
        "reasons": MappingProxyType(dict(Counter(stored.unreadable.values()).most_common())),
        "named": MappingProxyType(dict(zip(manifest.patients, held.tolist(), strict=True))),
        "modalities": manifest.modalities,
    }
    if not readable:
        return replace(_nothing(recipe, volume_size, in_channels, len(manifest.rows[0].labels)), **facts)
    tiles = recipe.items == "patches"
    images = _items(stored.images, volume_size if tiles else ())
    if isinstance(images, Tiles):
        of_row = images.volume
    else:
        of_row = np.repeat(np.arange(len(readable)), [place.shape[0] for place in stored.images])
    rows = [manifest.rows[index] for index in readable]
    masks = _items(stored.masks, volume_size if tiles else ()) if recipe.labels else None
    return Dataset(
        images=images,
        targets=np.array([row.labels for row in rows], np.float32)[of_row] if masks is None else masks,
        patients=tuple(rows[index].patient for index in of_row),
        evaluation=held[readable][of_row],
        channels=in_channels,
        rows=np.array([row.number for row in rows], np.int64)[of_row],
        labels=recipe.labels,
        **facts,
    )


def _nothing(recipe: Recipe, volume_size: tuple[int, ...], channels: int, labels: int) -> Dataset:
    """No item at all, of the shape that items would have."""
    sides = volume_size if recipe.items in IN_3D else (recipe.image_size, recipe.image_size)
    targets = (1, *sides) if recipe.labels else (labels,)
    return Dataset(
        images=np.zeros((0, channels, *sides), np.float32),
        targets=np.zeros((0, *targets), np.float32),
        patients=(),
        channels=channels,
        labels=recipe.labels,
    )


def _items(places: Sequence[Located], box: tuple[int, ...]) -> Slots | Tiles:
    """Every item at these places; boxes of that size out of them if there is one."""
    return Tiles.over([place.view()[0] for place in places], box) if box else Slots.at(places)


def _gathered(
    items: Slots | Tiles, rows: Numbers, corners: Numbers | None, margin: int, *, scaled: bool = True
) -> NDArray[np.float32]:
    if isinstance(items, Tiles):
        return items.gather(rows, scaled=scaled, corners=corners, margin=margin)
    return items.gather(rows, scaled=scaled)


def _padded(items: torch.Tensor, margin: int) -> torch.Tensor:
    """Items (n, C, …) with zeros around; labels (n, labels) as they are."""
    return torch.nn.functional.pad(items, [margin] * 2 * (items.ndim - 2))
