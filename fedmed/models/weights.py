"""Loads local weights into a network by name, and says what matched. Nothing is ever downloaded or unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.models.conversion import folded
from fedmed.models.fusion import LateFusion
from fedmed.models.input_range import for_unit_range
from fedmed.models.layouts import WRAPPERS, renamed
from fedmed.models.stages import stages

SHOWN = 3  # mismatches that an error lists
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of the tensors of a file, by their names in the network."""

    layout: str  # whose names the file had: own | torchvision | torchxrayvision | chexnet
    matched: tuple[str, ...]  # copied as they are
    adapted: tuple[str, ...] = ()  # the first convolution, for another number of channels
    rescaled: tuple[str, ...] = ()  # of the first layer, for images in [0, 1]; see `input_range.for_unit_range`
    input: str = ""  # the range of images that the file was for, if it is known not to be that
    folded: tuple[str, ...] = ()  # group normalizations that took in BatchNorm statistics
    fresh: tuple[str, ...] = ()  # the head, for other labels: as initialized
    head: tuple[str, ...] = ()  # the head, for as many labels: among `matched`
    unused: tuple[str, ...] = ()  # in the file only

    def __str__(self) -> str:
        """One line for a person."""
        parts = [f"{len(self.matched)} tensors as they are"]
        parts += [f"{', '.join(self.adapted)} adapted to the number of channels"] if self.adapted else []
        parts += [f"the first layer rescaled from {self.input} to [0, 1]"] if self.input else []
        parts += [f"{len(self.folded)} normalizations made of BatchNorm layers"] if self.folded else []
        parts += [f"{', '.join(self.fresh)} left as initialized, for other labels"] if self.fresh else []
        parts += ["head kept, its outputs in the file's order of labels"] if self.head else []
        parts += [f"{len(self.unused)} tensors of the file not used"] if self.unused else []
        return f"weights ({self.layout} names): {'; '.join(parts)}"


def load_weights(network: nn.Module, path: str | Path) -> Loaded:
    """Copies the tensors of a file into the network, by name, and returns what matched and what did not.

    Everything must fit but three things that fine-tuning changes. The first convolution may have another number of
    channels: each of ours gets the mean of the file's, times its number over ours, so that a gray image, repeated or
    not, excites it as before. The head may have another number of labels: it stays as initialized. One for as many
    labels is kept, and what is returned says so: tensors do not tell which label an output is for. A file with
    BatchNorm statistics fits a network with GroupNorm or InstanceNorm: see `conversion.folded`. A network of late
    fusion takes the file of one encoder into each of its encoders. Names may be those of `layouts.renamed`; what was
    made for another range of images than [0, 1] is rescaled by `input_range.for_unit_range`.

    Args:
        network: Changed in place, and only if everything fits.
        path: A `.safetensors` file, or a `.pth`, `.pt` or `.tar` file that holds a state dict, by itself or as the
            `state_dict` of a checkpoint.

    Raises:
        ModelError: If the file is missing or unreadable, or a name, a shape or a number does not fit. The message holds
            no path, since it may leave the site.
    """
    found = renamed(_read(Path(path)))
    rescaled = for_unit_range(found.layout, found.state)
    if isinstance(network, LateFusion) and not any(name.startswith("encoders.") for name in rescaled.state):
        head = f"{network.head_name}."
        body = {name: tensor for name, tensor in rescaled.state.items() if not name.startswith(head)}
        fit = _Fit(head=(), rescaled=rescaled.changed)
        for number, encoder in enumerate(network.encoders):
            fit.to(encoder, body, prefix=f"encoders.{number}.")
        for name, tensor in network.head.state_dict(prefix="head.").items():
            fit.fresh.append(name)
            fit.state[name] = tensor
        fit.unused += [name for name in rescaled.state if name.startswith(head)]
    else:
        fit = _Fit(head=stages(network)[-1].parameters, rescaled=rescaled.changed)
        fit.to(network, rescaled.state)
    if fit.mismatches:
        more = f"; and {len(fit.mismatches) - SHOWN} more" if len(fit.mismatches) > SHOWN else ""
        raise ModelError(f"model.weights does not fit the network: {'; '.join(fit.mismatches[:SHOWN])}{more}")
    network.load_state_dict(fit.state)
    return Loaded(
        layout=found.layout,
        matched=tuple(fit.matched),
        adapted=tuple(fit.adapted),
        rescaled=tuple(fit.rescaled),
        input=rescaled.source,
        folded=tuple(fit.folded),
        fresh=tuple(fit.fresh),
        head=tuple(name for name in fit.head if name in fit.matched),
        unused=(*fit.unused, *found.dropped),
    )


class _Fit:
    """Collects, tensor by tensor, what a network takes from a file."""

    def __init__(self, *, head: tuple[str, ...], rescaled: tuple[str, ...]) -> None:
        """`head` names the parameters that may have been made for other labels, `rescaled` what was changed already."""
        self.head, self.of_rescaled = head, rescaled
        self.state: dict[str, Tensor] = {}
        self.matched: list[str] = []
        self.adapted: list[str] = []
        self.rescaled: list[str] = []
        self.folded: list[str] = []
        self.fresh: list[str] = []
        self.unused: list[str] = []
        self.mismatches: list[str] = []

    def to(self, network: nn.Module, found: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Adds what `network`, whose names start with `prefix`, takes from `found`."""
        expected = network.state_dict()
        first = next((name for name, tensor in expected.items() if tensor.dim() >= 4), "")
        norms = _norms_to_fold(network, found)
        other_labels = _other_labels(expected, found, self.head)
        for name, tensor in expected.items():
            full, norm = prefix + name, name.rpartition(".")[0]
            if name in other_labels:
                self.fresh.append(full)
                self.state[full] = tensor
            elif name.endswith("num_batches_tracked") and f"{norm}.running_mean" in found and name not in found:
                self.state[full] = tensor  # files from before 2018 do not count batches
            elif phrase := _mismatch(name, tensor, found, channels_may_differ=name == first):
                self.mismatches.append(phrase)
            elif norm in norms:
                scale, shift = norms[norm]
                self.state[full] = scale if name.endswith(".weight") else shift
                if name.endswith(".weight"):
                    self.folded.append(prefix + norm)
            elif found[name].shape != tensor.shape:
                self.adapted.append(full)
                mean = found[name].mean(dim=1, keepdim=True) * (found[name].shape[1] / tensor.shape[1])
                self.state[full] = mean.expand_as(tensor)
            else:
                (self.rescaled if name in self.of_rescaled else self.matched).append(full)
                self.state[full] = found[name]
        for name in found:
            norm, _, last = name.rpartition(".")
            if last in STATISTICS and norm in norms:
                if name not in self.unused:  # as another encoder may have said already
                    self.unused.append(name)
            elif name not in expected:
                self.mismatches.append(f"{name} is not in the network")


def _norms_to_fold(network: nn.Module, found: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns scale and shift of every group or instance norm of the network that is a BatchNorm in the file."""
    norms = {}
    for name, module in network.named_modules():
        if not isinstance(module, nn.GroupNorm | nn.InstanceNorm2d | nn.InstanceNorm3d):
            continue
        channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        tensors = [found.get(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        weight, bias, mean, variance = (None if t is None or t.shape != (channels,) else t.float() for t in tensors)
        if weight is not None and bias is not None and mean is not None and variance is not None:
            groups = module.num_groups if isinstance(module, nn.GroupNorm) else channels
            norms[name] = folded(weight, bias, mean, variance, groups=groups, eps=module.eps)
    return norms


def _other_labels(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], head: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the head's names if the file has it for another number of labels and otherwise alike; else none."""
    if not all(name in found and found[name].dim() == expected[name].dim() > 0 for name in head):
        return ()
    alike = all(found[name].shape[1:] == expected[name].shape[1:] for name in head)
    theirs = {len(found[name]) for name in head}
    return head if alike and len(theirs) == 1 and theirs != {len(expected[name]) for name in head} else ()


def _mismatch(name: str, tensor: Tensor, found: Mapping[str, Tensor], *, channels_may_differ: bool) -> str:
    """Returns what keeps `found` from being loaded as the tensor of that name, as a phrase; empty if nothing does."""
    if name not in found:
        return f"{name} is missing"
    other = found[name]
    same = other.shape == tensor.shape
    if not same and channels_may_differ and other.dim() == tensor.dim() and other.shape[1] > 0:
        same = (other.shape[0], *other.shape[2:]) == (tensor.shape[0], *tensor.shape[2:])
    if not same:
        return f"{name} is {tuple(other.shape)}, expected {tuple(tensor.shape)}"
    if other.is_floating_point() != tensor.is_floating_point():
        return f"{name} is {other.dtype}, expected {tensor.dtype}"
    if not torch.isfinite(other).all():
        return f"{name} holds NaN or infinity"
    return ""


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError("model.weights names no file; expected a local .safetensors or .pth file")
    try:
        match path.suffix:
            case ".safetensors":
                return load_file(path)
            case ".pth" | ".pt" | ".tar":
                state = torch.load(path, map_location="cpu", weights_only=True)
            case other:
                raise ModelError(f"model.weights ends in {other!r}; expected .safetensors, .pth, .pt or .tar")
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ModelError(
            f"model.weights cannot be read as a {path.suffix} file of tensors ({type(error).__name__}); "
            "is it complete, and does it hold a plain state dict?"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError("model.weights holds more than tensors; save network.state_dict() alone")
    return state
