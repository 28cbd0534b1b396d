"""The network that a run kept, rebuilt from model.json and model.safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fedmed import config as run_file
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.imaging.reading import presets_named
from fedmed.imaging.recipe import Recipe
from fedmed.models.attention_unet import AttentionUNet
from fedmed.training.network import FlatNetwork, layout_of, network_of
from fedmed.training.site_state import PERSONAL

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A network in evaluation mode, and how images are made ready for it."""

    network: FlatNetwork
    config: RunConfig  # of which [model], [task] and what prepares images are the run's; the rest are defaults
    recipe: Recipe
    round: int  # after which it was kept
    modalities: tuple[int, ...]  # how many an image may have; several where the run did not say

    @property
    def labels(self) -> tuple[str, ...]:
        """What it predicts."""
        return self.config.task.labels

    @property
    def segments(self) -> bool:
        """Whether it outlines the labels, rather than saying whether they are there."""
        return self.config.task.kind == "segmentation"

    @property
    def has_gates(self) -> bool:
        """Whether it is an Attention U-Net."""
        return isinstance(self.network.module, AttentionUNet)


def load_kept(run: str | Path, *, device: str = "cpu", site: str = "") -> Kept:
    """Rebuild the network that a run kept. Other files of the run folder are not needed.

    Args:
        run: a run folder.
        device: where the network computes.
        site: whose own network instead of the shared one, by the name of a virtual hospital.

    Raises:
        ModelError: the run kept no network, or its files are damaged or do not fit each other or this fedmed.
        ConfigError: the run's images are read by a function of its own, or in a way that this fedmed does not know.
    """
    network, config, round = kept_network(run, device=device, site=site)
    said = _facts(Path(run)).get("modalities")
    data = config.data
    if data.dataset:
        raise ConfigError(
            "the run's images came from a function of its own (data.dataset), which says nothing about image files; "
            "call the network from Python instead"
        )
    presets = presets_named(data.preset)
    recipe = Recipe.of(
        preset=data.preset,
        items=data.items,
        image_size=data.image_size,
        spacing_mm=data.spacing_mm,
        volume_size=data.volume_size,
        labels=(),
    )
    several = config.model.in_channels // (1 if recipe.depth else presets[0].channels)
    if said in (1, several):
        modalities: tuple[int, ...] = (said,)
    else:  # hospitals had different numbers, or an old run does not say; one may be repeated to all channels
        modalities = (several,) if len(presets) > 1 or config.model.fusion == "late" else (1, several)
    return Kept(network=network, config=config, recipe=recipe, round=round, modalities=modalities)


def kept_network(run: str | Path, *, device: str = "cpu", site: str = "") -> tuple[FlatNetwork, RunConfig, int]:
    """Rebuild the network alone, whatever its images were.

    Args:
        run: a run folder.
        device: where the network computes.
        site: whose own network instead of the shared one.

    Returns:
        The network in evaluation mode, what model.json says of it as a configuration, and the round that it is of.

    Raises:
        ModelError: the run kept no network, or its files are damaged or do not fit each other or this fedmed.
    """
    run = Path(run)
    facts = _facts(run)
    weights = _personal(run, site) if site else run / "model.safetensors"
    if not site and facts.get("strategy") == "fedbn":
        raise ModelError(
            "the norm layers of this run stayed at its sites (fedbn), so it has no network for everybody; "
            "name a site whose network is to be used with --site"
        )
    sections = {"model": facts["model"], "task": facts["task"], "data": facts["preprocessing"]}
    config = run_file.validate(sections, source="model.json")
    module = network_of(config)
    if layout_of(module).hash != facts["layout"]:
        raise ModelError("this fedmed builds another network than the run kept; use the version that model.json names")
    _load_(module, weights)
    module.eval().requires_grad_(False)
    return FlatNetwork(module, torch.device(device)), config, int(facts["round"])


def _personal(run: Path, site: str) -> Path:
    """The file of a virtual hospital's own network.

    Raises:
        ModelError: there is no such site, or it has no network of its own.
    """
    found = {path.parent.parent.name: path for path in sorted(run.glob(f"sites/*/*/{PERSONAL}"))}
    if site not in found:
        known = f"; those with one: {', '.join(found)}" if found else "; see strategy.personal-steps"
        raise ModelError(f'no site "{site}" of this run has a network of its own{known}')
    return found[site]


def _facts(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        text = f"there is no run folder {run}; one holds run.toml, and model.json once its run has ended"
        raise ModelError(text, public="there is no such run folder")
    try:
        facts = json.loads((run / "model.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("the run kept no network: its folder has no model.json; did the run end?") from None
    except (OSError, ValueError):
        raise ModelError("the run's model.json cannot be read") from None
    wanted = {"schema": int, "model": dict, "task": dict, "preprocessing": dict, "layout": str, "round": int}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), kind) for key, kind in wanted.items()):
        raise ModelError(f"the run's model.json is damaged; expected {', '.join(wanted)}")
    if facts["schema"] != SCHEMA:
        raise ModelError(f"the run's model.json has schema {facts['schema']}; this fedmed reads schema {SCHEMA}")
    return facts


@torch.no_grad()
def _load_(module: nn.Module, path: Path) -> None:
    """Copy the tensors of a file that `RunFolder.save_model` wrote into the network, by name."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"the run kept no network: its folder has no {path.name}") from None
    except (OSError, SafetensorError):
        raise ModelError(f"the run's {path.name} cannot be read; is it complete?") from None
    mine = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if tensors.keys() != mine.keys():
        raise ModelError(f"the run's {path.name} holds other tensors than its model.json describes")
    for name, tensor in mine.items():
        found = tensors[name]
        if tensor.ndim == 0 and found.shape == (1,):  # numpy's idea of a contiguous number, in files of save_model
            found = found[0]
        if found.shape != tensor.shape or found.is_floating_point() != tensor.is_floating_point():
            raise ModelError(f"{name} of the run's {path.name} has another shape or type than the network's")
        if not torch.isfinite(found).all():
            raise ModelError(f"{name} of the run's {path.name} holds NaN or infinity")
        tensor.copy_(found)
