"""A run's data set at one place: the images of a manifest, or what the user's own function makes of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.imaging.dataset import Dataset, load_dataset


def run_data(
    manifest: Path,
    config: RunConfig,
    *,
    name: str,
    dataset: str,
    site_share: float,
    seed: int,
    cache_dir: Path | None,
    cache_gib: float,
    withdrawn: frozenset[str] = frozenset(),
    lenient: bool = False,
) -> Dataset:
    """The data set that a run asks for, of one manifest.

    Args:
        manifest: the CSV.
        config: of the run.
        name: of the place.
        dataset: "module:function" for data that are no images; empty = images.
        site_share: share of patients held out, unless the manifest has splits.
        seed: of the split.
        cache_dir: where decoded images are kept; None = memory.
        cache_gib: size above which the sets that were used longest ago leave the cache.
        withdrawn: patients who opted out.
        lenient: whether no single row may decide that there is no data set.

    Raises:
        DataError: the manifest is wrong, or too many images cannot be read.
        ConfigError: run and data do not fit each other, or the function does not exist.
    """
    if dataset:
        data = custom_dataset(dataset)(manifest, config)
        return data.select(np.array([patient not in withdrawn for patient in data.patients], bool))
    return load_dataset(
        manifest,
        task=config.task,
        preset=config.data.preset,
        image_size=config.data.image_size,
        in_channels=config.model.in_channels,
        max_unreadable=config.data.max_unreadable,
        site_share=site_share,
        seed=seed,
        name=name,
        cache_dir=cache_dir,
        items=config.data.items,
        spacing_mm=config.data.spacing_mm,
        volume_size=config.data.volume_size,
        cache_gib=cache_gib,
        withdrawn=withdrawn,
        lenient=lenient,
    )


def custom_dataset(reference: str) -> Callable[[Path, RunConfig], Dataset]:
    """The function behind a "module:function" in `data.dataset`.

    Raises:
        ConfigError: the module or the function does not exist.
    """
    module, _, name = reference.partition(":")
    try:
        function: Callable[[Path, RunConfig], Dataset] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'data.dataset = "{reference}": expected "module:function" ({error})') from None
    return function
