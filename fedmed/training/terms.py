"""On what terms a site's gradients leave it: who is sampled, how they are clipped, how much noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal

from torch import nn

from fedmed.config import PrivacyConfig, TrainConfig
from fedmed.privacy.central import AdaptiveClip, shared_noise
from fedmed.training.clipping import layers_of
from fedmed.types import PrivacyEvent

CLIP = "clip"  # among what a site keeps: the bound that an adaptive clip came to, which is made of noised counts


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms a site's gradients leave it. All of it is public."""

    unit: str  # "patient" or "image": whose gradient is clipped
    units: int  # N: how many of them the site trains on, public by the site's word
    expected_batch: float  # q·N
    steps: int  # in a round
    noise_multiplier: float  # σ, of all that a step releases
    max_grad_norm: float  # C; where it adapts, of the first step
    images_per_patient: int  # k
    augmentations: int
    physical_batch: int  # images in memory at once
    clipping: Literal["flat", "per-layer", "adaptive"] = "flat"
    clip_quantile: float = 0.5  # γ, of an adaptive clip

    @property
    def sample_rate(self) -> float:
        """The chance of a unit to take part in a step, q."""
        return self.expected_batch / self.units

    @property
    def gradient_noise(self) -> float:
        """Standard deviation of the noise on the sum / C: a little more than σ where a count is released beside it."""
        return shared_noise(self.noise_multiplier, self.clip_quantile)[0] if self.adaptive else self.noise_multiplier

    @property
    def adaptive(self) -> AdaptiveClip | None:
        """How the clip moves after every step; None where it stays."""
        return shared_noise(self.noise_multiplier, self.clip_quantile)[1] if self.clipping == "adaptive" else None

    def bounds(self, network: nn.Module) -> float | dict[str, float]:
        """C; or C/√L for each of a network's L layers, so that no unit's whole gradient is longer than C.

        Per-layer clipping: McMahan et al. 2018, arXiv:1710.06963, section 3.
        """
        if self.clipping != "per-layer":
            return self.max_grad_norm
        layers = layers_of(network)
        return dict.fromkeys(layers, self.max_grad_norm / sqrt(len(layers)))

    def event(self, *, steps: int, cohort: str = "") -> PrivacyEvent:
        """What `steps` steps on these terms release, the counts behind an adaptive clip included.

        Sum and count of a step come from one sample, so they are one event: two would count the sampling twice.
        """
        return PrivacyEvent(
            mechanism="sampled-gaussian",
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=steps,
            unit="patient" if self.unit == "patient" else "image",
            images_per_patient=self.images_per_patient,
            release="gradients",
            cohort=cohort,
        )


def terms_for(privacy: PrivacyConfig, train: TrainConfig, *, units: int, noise_multiplier: float) -> Terms:
    """The terms of a round.

    Args:
        privacy: unit, clip, caps.
        train: `batch-size` is the expected number of units in a step; `local-steps`, or `local-epochs` of N / batch.
        units: patients (or images) that the site trains on.
        noise_multiplier: σ.
    """
    batch = min(train.batch_size * train.accumulate, units)
    return Terms(
        unit=privacy.unit,
        units=units,
        expected_batch=batch,
        steps=train.local_steps or train.local_epochs * ceil(units / batch),
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        images_per_patient=privacy.images_per_patient,
        augmentations=privacy.augmentations,
        physical_batch=privacy.physical_batch_size,
        clipping=privacy.clipping,
        clip_quantile=privacy.clip_quantile,
    )
