"""The door: clipped gradient sums of a batch, patient by patient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from fedmed.errors import ModelError
from fedmed.training.clipping import folded
from fedmed.training.clipping.convolutions import CONVOLVE, convolution
from fedmed.training.clipping.fallback import one_by_one
from fedmed.training.clipping.linear import linear
from fedmed.training.clipping.patients import patients_of
from fedmed.training.clipping.recording import Recording
from fedmed.training.clipping.recurrent import lstm
from fedmed.training.precision import in_float32

PerImageLoss = Callable[[Any, Tensor], Tensor]  # (outputs, targets) -> (n,)
Forward = Callable[..., Any]  # its first argument is the recording
FORWARDS: dict[type[nn.Module], Callable[[str, Any], Forward]] = {
    **dict.fromkeys(CONVOLVE, convolution),
    nn.Linear: lambda name, module: partial(linear, name, module),
    nn.GroupNorm: lambda name, module: partial(folded.group_norm, name, module),
    nn.LayerNorm: lambda name, module: partial(folded.layer_norm, name, module),
    nn.InstanceNorm1d: lambda name, module: partial(folded.instance_norm, name, module),
    nn.InstanceNorm2d: lambda name, module: partial(folded.instance_norm, name, module),
    nn.InstanceNorm3d: lambda name, module: partial(folded.instance_norm, name, module),
    nn.BatchNorm1d: lambda name, module: partial(folded.fixed_batch_norm, name, module),
    nn.BatchNorm2d: lambda name, module: partial(folded.fixed_batch_norm, name, module),
    nn.BatchNorm3d: lambda name, module: partial(folded.fixed_batch_norm, name, module),
    nn.PReLU: lambda name, module: partial(folded.prelu, name, module),
    nn.LSTM: lambda name, module: partial(lstm, name, module),
}
HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters"}  # methods that no forward pass calls
LEAST_NORM = 1e-12  # float32 still holds its square; gradients would pass a smaller bound with a computed norm of 0


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """What a batch was like before it was clipped. These are private: they may not leave the site un-noised."""

    norms: Tensor  # (P,) of each patient's gradient; (P, groups) with a bound for each group; 0 without an image
    losses: Tensor  # (n,) of each image


class GradientClipper:
    """Makes clipped gradient sums of a network, below Opacus' optimizer and accountant.

    A batch's sum stands in `.grad` afterwards, which is where `DPOptimizerFastGradientClipping` expects it. Between
    calls the network is as it was: nothing stays attached to it.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        max_norm: float | Mapping[str, float],
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        """Look at every layer once.

        Args:
            module: The network; what is frozen (requires_grad False) by now costs nothing.
            max_norm: C, the bound on every patient's gradient. Or a bound for each group of parameters, by the
                beginning of their names (`{"features.": 0.8, "classifier.": 0.6}`): per-layer clipping, whose whole
                bound is √(Σ C²).
            precision: `bfloat16` runs the forward and backward pass under autocast; norms and sums stay float32.

        Raises:
            ModelError: If nothing is trained, a bound is below 1e-12, a parameter is in no group or in two, or a
                layer cannot be clipped.
        """
        self.module = module
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ModelError("every parameter of the network is frozen; there is nothing to train")
        self.max_norm = max_norm
        beginnings = list(max_norm) if isinstance(max_norm, Mapping) else [""]
        self.groups = {parameter: _group(name, beginnings) for name, parameter in self.trained.items()}
        self.precision = precision
        self.fallbacks: list[str] = []  # layers that are run patient by patient, because no quicker way is known
        self.forwards: list[tuple[nn.Module, Forward]] = []
        self.norms_of_batches = [m for m in module.modules() if isinstance(m, _BatchNorm | _InstanceNorm)]
        for name, layer in _layers("", module, set()):
            make = _known(layer)
            if make is None:
                if getattr(layer, "batch_first", True) is False:
                    raise ModelError(f"layer {name} must be made with batch_first=True to tell its images apart")
                self.fallbacks.append(name)
            self.forwards.append((layer, make(name, layer) if make else partial(one_by_one, name, layer)))

    @property
    def max_norm(self) -> float | Mapping[str, float]:
        """The bound, or those of the groups; adaptive clipping sets it anew between batches."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, bound: float | Mapping[str, float]) -> None:
        self._bounds = list(bound.values()) if isinstance(bound, Mapping) else [bound]
        if not all(each >= LEAST_NORM for each in self._bounds):
            raise ModelError(
                f"gradients cannot be clipped to a norm of {bound}; expected {LEAST_NORM:g} or more, because float32 "
                "does not hold the squares of less"
            )
        self._max_norm = bound

    def accumulate_(
        self, loss: PerImageLoss, images: Tensor, targets: Tensor, patients: Tensor, weights: Tensor | None = None
    ) -> Clipped:
        """Add Σ_p c_p · Σ_{i of p} w_i ∇ℓ_i to every trainable parameter's .grad.

        c_p = min(1, C / ‖Σ_{i of p} w_i ∇ℓ_i‖)   (Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with the patient
        in place of the example). A patient whose gradient is not finite adds nothing. Every .grad exists afterwards.

        Args:
            loss: Takes what the network returns and the targets, and returns one loss for each image, (n,), that
                depends on no other image.
            images: (n, …); all images of a patient are in one batch.
            targets: (n, …).
            patients: (n,) int64 in 0 … P-1, the patient of each image; `torch.arange(n)` clips every image by itself.
            weights: (n,) w_i; None = 1.

        Raises:
            ModelError: If a layer's input is no stack of images, a parameter is read outside its layer, a layer works
                in place, a normalization would mix images, or the losses are not (n,).
        """
        self.refuse_mixing()
        bounds = torch.tensor(self._bounds, device=images.device, dtype=_dtype(self.trained))
        before = {p: p.grad for p in self.trained.values()}
        sorted_by = patients_of(patients)
        order = sorted_by.order
        recording = Recording(sorted_by, self.groups)
        norms, losses = bounds.new_zeros(sorted_by.total, len(bounds)), bounds.new_zeros(len(images))
        if len(images):
            for parameter in before:
                parameter.grad = None
            weighing = weights if weights is not None else torch.ones_like(losses)
            given = images, targets, weighing
            if order is not None:
                given = _ordered(images, order), targets[order], weighing[order]
            with self._attached(recording):
                found = self._backward(loss, *given)
            self._refuse_direct_use()
            for parameter, gradient in before.items():
                parameter.grad = gradient
            with _whole_float32():
                norms[sorted_by.names] = recording.finish_(bounds)
            losses[order if order is not None else slice(None)] = found.to(losses.dtype)
        for parameter in before:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return Clipped(norms=norms if isinstance(self.max_norm, Mapping) else norms[:, 0], losses=losses)

    def _backward(self, loss: PerImageLoss, images: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        half: AbstractContextManager[object] = nullcontext()
        if self.precision == "bfloat16":
            half = torch.autocast(images.device.type, torch.bfloat16)
        with torch.enable_grad():
            with half:
                outputs = self.module(images)
            losses = loss(in_float32(outputs), targets)
            if losses.shape != (len(images),):
                raise ModelError(
                    f"the loss returned {tuple(losses.shape)} numbers for {len(images)} images; expected one for each"
                )
            total = (losses * weights).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return losses.detach()

    @contextmanager
    def _attached(self, recording: Recording) -> Iterator[None]:
        """Let the layers record; afterwards the module is as it was."""
        own: list[tuple[nn.Module, Any]] = [(layer, layer.__dict__.get("forward")) for layer, _ in self.forwards]
        try:
            for layer, forward in self.forwards:
                layer.__dict__["forward"] = partial(forward, recording)
            yield
        finally:
            for layer, before in own:
                if before is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = before

    def refuse_mixing(self) -> None:
        """Look at the normalization layers as they are now.

        Raises:
            ModelError: one of them mixes images, or keeps sums over them.
        """
        for layer in self.norms_of_batches:
            if isinstance(layer, _BatchNorm) and (layer.training or not layer.track_running_stats):
                raise ModelError(
                    "BatchNorm in training mixes the images of a batch, so no image has a gradient of its own; "
                    "set model.norm = 'group', or freeze the layer in evaluation mode"
                )
            if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
                raise ModelError(
                    "InstanceNorm with running statistics keeps un-noised sums over patients; "
                    "make it with track_running_stats=False"
                )

    def refuse_folding(self, images: Tensor) -> None:
        """Run the network forward on the first two, then on all three of some images, and keep nothing of it.

        Slices or windows in a layer's first axis may happen to be as many as a batch has images; not of both batches.

        Args:
            images: (3, …) of noise.

        Raises:
            ModelError: If a layer's input is no stack of images.
        """
        for some in (images[:2], images):
            recording = Recording(patients_of(torch.arange(len(some), device=images.device)), self.groups)
            with torch.enable_grad(), self._attached(recording):
                self.module(some)

    def _refuse_direct_use(self) -> None:
        outside = [name for name, parameter in self.trained.items() if parameter.grad is not None]
        if outside:
            for parameter in self.trained.values():
                parameter.grad = None
            raise ModelError(
                f"{outside[0]} is read outside the layer that owns it, so its gradient would not be clipped; "
                "call the layer, or give the reading module the parameter as its own"
            )


@contextmanager
def _whole_float32() -> Iterator[None]:
    """No TF32 in convolutions, cuDNN's default: sums would be rounded by more than their norms allow for."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


def layers_of(module: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of a network's trained parameters, one for each layer: groups to be clipped apart.

    A layer inside one that has parameters of its own belongs to that one, so that no parameter is in two groups.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    beginnings = sorted({name[: name.rfind(".") + 1] or name for name in names}, key=len)
    outermost: list[str] = []
    for beginning in beginnings:
        if not beginning.startswith(tuple(outermost)):
            outermost.append(beginning)
    return tuple(outermost)


def slow_layers(module: nn.Module) -> str:
    """A line that names the classes of layers that are run patient by patient; empty where there are none."""
    kinds = sorted({type(layer).__name__ for _, layer in _layers("", module, set()) if _known(layer) is None})
    return f"gradients of {', '.join(kinds)} are made patient by patient, which is slow" if kinds else ""


def _layers(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that own trainable parameters, each once."""
    if module in seen:
        return
    seen.add(module)
    whole = is_parametrized(module) and any(p.requires_grad for p in module.parameters())
    if whole or any(p.requires_grad for p in module.parameters(recurse=False)):
        yield name or "(the whole network)", module
        return
    for key, child in module.named_children():
        yield from _layers(f"{name}.{key}" if name else key, child, seen)


def _known(layer: nn.Module) -> Callable[[str, Any], Forward] | None:
    """How a layer records; None for one whose forward pass is not exactly that of a known class."""
    if is_parametrized(layer):
        return None
    for kind, make in FORWARDS.items():
        if isinstance(layer, kind) and _works_as(kind, type(layer)):
            expected = {key for key, value in layer._parameters.items() if value is not None}
            if expected <= {"weight", "bias"} and not list(layer.children()):
                return make
            if isinstance(layer, nn.LSTM) and not layer.proj_size:
                return make
    return None


def _works_as(kind: type[nn.Module], own: type[nn.Module]) -> bool:
    """Whether a class changes none of another's methods: a forward pass calls more of them, as `_conv_forward`."""
    classes = own.__mro__[: own.__mro__.index(kind)]
    changed = {name for each in classes for name in vars(each) if callable(getattr(kind, name, None))}
    return changed <= HARMLESS


def _group(name: str, beginnings: list[str]) -> int:
    fitting = [place for place, beginning in enumerate(beginnings) if name.startswith(beginning)]
    if len(fitting) != 1:
        raise ModelError(f"parameter {name} is in {len(fitting)} of the groups that are clipped apart; expected one")
    return fitting[0]


def _ordered(images: Tensor, order: Tensor) -> Tensor:
    """The rows in another order, with the channels innermost in memory if they are."""
    if images.dim() > 3 and images.movedim(1, -1).is_contiguous():
        return images.movedim(1, -1)[order].movedim(-1, 1)
    return images[order]


def _dtype(trained: Mapping[str, nn.Parameter]) -> torch.dtype:
    return next(iter(trained.values())).dtype
