"""What the images of a manifest become before they are kept: settings that decide pixels, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fedmed.errors import ConfigError

Items = Literal["images", "slices", "volumes", "patches"]
IN_3D: tuple[Items, ...] = ("volumes", "patches")
BETWEEN = ";"  # the modalities of one item: their files in a manifest, their presets in a recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one row of a manifest is decoded. Two sets with equal recipes share what is kept of them.

    What does not touch pixels is not here: labels of a classification, splits, and the size of a patch, which is cut
    when a batch is made.
    """

    preset: str  # a key of `reading.PRESETS`, or one for each modality with `BETWEEN` between them
    items: Items = "images"
    image_size: int = 0  # side of the square of an image or a slice, pixels; 0 in 3D
    spacing_mm: tuple[float, ...] = ()  # depth, height, width; empty = as acquired
    volume_size: tuple[int, ...] = ()  # depth, height, width in voxels; empty = whole
    labels: int = 0  # of a mask, whose classes are numbered from 1; 0 = there is none
    regions: tuple[str, ...] = ()  # their names in 3D, where a mask's file may name what it outlines

    @classmethod
    def of(
        cls,
        *,
        preset: str,
        items: str,
        image_size: int,
        spacing_mm: tuple[float, ...],
        volume_size: tuple[int, ...],
        labels: tuple[str, ...],
    ) -> Recipe:
        """The recipe of these settings, less the ones that its kind of item does not use; `labels` of masks alone.

        Raises:
            ConfigError: the kind of item is unknown, or lacks its size.
        """
        if items == "images":
            return cls(preset=preset, items="images", image_size=image_size, labels=len(labels))
        whole = cls(preset=preset, spacing_mm=spacing_mm, labels=len(labels), regions=labels)
        if items == "slices":
            return replace(whole, items="slices", image_size=image_size)
        if items not in IN_3D:
            raise ConfigError(f'data.items = "{items}" is unknown; there are images, slices, {", ".join(IN_3D)}')
        if len(volume_size) != 3:
            raise ConfigError(f'data.items = "{items}" needs data.volume-size = [DEPTH, HEIGHT, WIDTH], in voxels')
        if items == "patches":
            return replace(whole, items="patches")
        return replace(whole, items="volumes", volume_size=volume_size)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Recipe:
        """The inverse of `settings`, after a journey through JSON."""
        triples = {name: tuple(settings[name]) for name in ("spacing_mm", "volume_size", "regions")}
        return cls(**{**settings, **triples})

    def settings(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return asdict(self)

    def preset_of(self, modality: int) -> str:
        """How the modality at that place of a row is read."""
        presets = self.preset.split(BETWEEN)
        return presets[modality if len(presets) > 1 else 0]

    @property
    def depth(self) -> bool:
        """Whether an item has three dimensions."""
        return self.items in IN_3D

    def described(self) -> str:
        """For a table: "cxr images 224", "ct-lung patches 1 × 1 × 1 mm, masks of 2 labels"."""
        parts = [self.preset, self.items]
        if self.image_size:
            parts.append(str(self.image_size))
        if self.volume_size:
            parts.append(" × ".join(map(str, self.volume_size)))
        if self.spacing_mm:
            parts.append("at " + " × ".join(f"{value:g}" for value in self.spacing_mm) + " mm")
        if self.labels:
            parts.append(f"with masks ({self.labels} label{'s' if self.labels > 1 else ''})")
        return " ".join(parts)
