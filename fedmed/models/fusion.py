"""Late fusion: one encoder per modality, and a head that reads what those present agree on.

Early fusion needs nothing here: modalities are channels of one image (`in_channels`), and a missing one is a channel of
zeros that the network has to cope with. Late fusion is Havaei et al. 2016, "HeMIS: Hetero-Modal Image Segmentation"
(arXiv:1607.05194), section 2: a missing modality is left out of the statistics, so it changes neither the output nor
its own encoder. Any network of this package can be the encoder, up to its last layer, but with BatchNorm only where
that is frozen: its statistics would be of the missing images as well, which are all zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmed.errors import ModelError
from fedmed.models.spatial import margin_of
from fedmed.models.stages import FixedBatchNorm2d, FixedBatchNorm3d, stages


def late_fusion(make: Callable[[int], nn.Module], *, in_channels: int, modalities: int, outputs: int) -> LateFusion:
    """Returns a network with one encoder per modality.

    Takes images (N, in_channels, …), the channels of the first modality first, and returns what the encoder's network
    would. A modality whose channels are all zero in an example is missing from that example.

    Args:
        make: Returns a network for images of the given number of channels; called once per modality.
        in_channels: Channels of all modalities together.
        modalities: Number of modalities, at least 2, each with the same number of channels.
        outputs: Number of labels.

    Raises:
        ModelError: If the channels cannot be shared out evenly, or the network does not end in a linear layer or
            convolution.
    """
    if modalities < 2 or in_channels % modalities:
        raise ModelError(
            f"late fusion of model.modalities = {modalities} needs at least two with the same number of channels each; "
            f"model.in-channels = {in_channels} cannot be shared out so"
        )
    channels = in_channels // modalities
    return LateFusion([make(channels) for _ in range(modalities)], channels=channels, outputs=outputs)


class LateFusion(nn.Module):
    """Encoders side by side; mean and variance of their features over the modalities present; one head."""

    def __init__(self, encoders: Sequence[nn.Module], *, channels: int, outputs: int) -> None:
        """Takes the last layer off each of the `encoders`, in place, and makes one head instead."""
        super().__init__()
        self.channels = channels
        self.margin_voxels = margin_of(encoders[0])
        self.head_name, last = last_layer(encoders[0])
        known = stages(encoders[0])
        for encoder in encoders:
            encoder.set_submodule(self.head_name, nn.Identity())
        self.encoders = nn.ModuleList(encoders)
        left = tuple(name for name, _ in encoders[0].named_parameters())
        prefixes = {  # a stage of all encoders is one stage, so that model.freeze means what it means for one of them
            stage.name: tuple(f"encoders.{n}.{prefix}" for n in range(len(encoders)) for prefix in stage.prefixes)
            for stage in known
            if any(name.startswith(stage.prefixes) for name in left)
        }
        self.stage_prefixes: Mapping[str, tuple[str, ...]] = {**prefixes, "head": (*prefixes.get("head", ()), "head.")}
        self.head: nn.Module
        if isinstance(last, nn.Linear):
            self.head = nn.Linear(2 * last.in_features, outputs)
            nn.init.zeros_(self.head.bias)
        else:
            kind = nn.Conv2d if isinstance(last, nn.Conv2d) else nn.Conv3d
            self.head = kind(2 * last.in_channels, outputs, kernel_size=1)
            nn.init.kaiming_normal_(self.head.weight)
            if self.head.bias is not None:
                nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, outputs, …) for images (N, modalities * channels, …)."""
        if images.shape[1] != self.channels * len(self.encoders):
            raise ModelError(
                f"late fusion of {len(self.encoders)} modalities needs {self.channels * len(self.encoders)} channels, "
                f"got {images.shape[1]}"
            )
        parts = torch.split(images, self.channels, dim=1)  # modalities x (N, channels, …)
        present = torch.stack([(part != 0).flatten(1).any(dim=1) for part in parts])  # (modalities, N)
        features = torch.stack([encoder(part) for encoder, part in zip(self.encoders, parts, strict=True)])
        logits: Tensor = self.head(fused(features, present))  # (N, outputs, …)
        return logits


def require_separate(network: nn.Module) -> None:
    """Refuse an encoder whose images see each other, those that are missing among them.

    Raises:
        ModelError: a BatchNorm layer of late fusion is not frozen.
    """
    if isinstance(network, LateFusion) and any(
        isinstance(module, _BatchNorm) and not isinstance(module, FixedBatchNorm2d | FixedBatchNorm3d)
        for module in network.modules()
    ):
        raise ModelError(
            "late fusion leaves missing modalities out, but BatchNorm would count their zeros in its statistics; set "
            'model.norm = "group" or "instance", or freeze the encoders'
        )


def fused(features: Tensor, present: Tensor) -> Tensor:
    """Returns mean and variance of features over the modalities K that are present (Havaei et al. 2016, section 2).

    Mean: Σ_k C_k / |K|. Variance: Σ_k (C_k − mean)² / (|K| − 1), and 0 for one modality. Both 0 for none.

    Args:
        features: (modalities, N, F, …).
        present: (modalities, N), true where the modality is there.

    Returns:
        (N, 2 F, …), means first.
    """
    weight = present.to(features.dtype)
    count = weight.sum(dim=0)  # (N,)
    shape = (*count.shape, *([1] * (features.dim() - 2)))  # (N, 1, …)
    weight = weight.reshape(present.shape[0], *shape)
    mean = (weight * features).sum(dim=0) / count.clamp(min=1).reshape(shape)
    variance = (weight * (features - mean).square()).sum(dim=0) / (count - 1).clamp(min=1).reshape(shape)
    return torch.cat((mean, variance), dim=1)


def last_layer(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d | nn.Conv3d]:
    """Returns the last linear layer or convolution of a network's head, with its name.

    Raises:
        ModelError: If the head has no such layer, or others before it.
    """
    prefixes = stages(network)[-1].prefixes
    inside = [(name, module) for name, module in network.named_modules() if f"{name}.".startswith(prefixes)]
    layers = [(n, module) for n, module in inside if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]
    if len(layers) != 1:
        raise ModelError(
            f"late fusion needs a network whose last stage holds one linear layer or convolution, got {len(layers)}; "
            "leave model.deep-supervision off"
        )
    return layers[0]
