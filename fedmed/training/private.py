"""DP-SGD at a site, the one door to Opacus' optimizer: secret sampling, one clipped gradient per patient, noise.

A step (Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with patients as the unit):

    every patient takes part with probability q, drawn in secret                                    (Poisson sampling)
    ḡ_p = Σᵢ wᵢ ∇ℓᵢ over at most k of the patient's images, times augmentations, Σᵢ wᵢ = 1
    g   = (Σ_p ḡ_p · min(1, C / ‖ḡ_p‖) + N(0, σ²C²)) / (q·N)                          (q·N: never the number that came)

Who is sampled, which images are drawn and the noise come from a generator that nobody outside the site can predict:
the run's seed is known to the coordinator, and whoever knows the sample loses its amplification. None of it is ever
saved. What only spreads out the work, such as augmentation, comes from the run's seed, image by image, so that taking
a patient away changes nothing for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.config import PrivacyConfig, TrainConfig
from fedmed.errors import ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.privacy.central import following_clip
from fedmed.privacy.noise import NoiseGenerator
from fedmed.training.clipping import GradientClipper
from fedmed.training.clipping.optimizer import ClippedSumOptimizer
from fedmed.training.coupling import require_uncoupled
from fedmed.training.filling import FEWEST, filled, numbered
from fedmed.training.loop import Batch, RoundContext, Trained, Training, seeded, training_batch
from fedmed.training.losses import Loss, deeply_supervised
from fedmed.training.network import FlatNetwork, channels_innermost
from fedmed.training.precision import settled
from fedmed.training.sampling import Rows
from fedmed.training.terms import CLIP, Terms

NOISE_AT_ONCE = 1_000_000  # values, 4 MB, unless a single parameter has more
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A patient, or one image: what is sampled, and whose gradient is clipped."""

    rows: Rows  # (n,) of its images
    keys: NDArray[np.int64]  # (n,) from which each image's random changes follow, whoever else there is


def units_of(data: Dataset, rows: Rows, privacy: PrivacyConfig) -> list[Unit]:
    """Every patient with all images, or every image alone, of a patient `images-per-patient` at most.

    The image unit uses the first images of a patient, so that the cap holds for the whole run and group privacy for
    that many images speaks of the patient.
    """
    of_patient: dict[str, list[int]] = {}
    for row in rows:
        of_patient.setdefault(data.patients[row], []).append(int(row))
    whole = [
        Unit(rows=np.array(each, np.int64), keys=_keys(patient, len(each))) for patient, each in of_patient.items()
    ]
    if privacy.unit == "patient":
        return whole
    cap = privacy.images_per_patient
    return [
        Unit(rows=unit.rows[place : place + 1], keys=unit.keys[place : place + 1])
        for unit in whole
        for place in range(min(cap, len(unit.rows)))
    ]


def _keys(patient: str, images: int) -> NDArray[np.int64]:
    """Of the patient's own images, so that nothing moves when another patient leaves."""
    digests = (hashlib.sha256(f"{patient}/{place}".encode()).digest() for place in range(images))
    return np.array([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], np.int64)


@dataclass(frozen=True, kw_only=True)
class Physical:
    """Images that go through the network at once; all of a sampled unit's are together."""

    rows: Rows  # (n,) repeated for every augmentation
    keys: NDArray[np.int64]  # (n,)
    copies: NDArray[np.int64]  # (n,) number of the augmentation
    units: NDArray[np.int64]  # (n,) counted from 0 within this batch
    weights: NDArray[np.float32]  # (n,) of an image in its unit's mean


def drawn(units: Sequence[Unit], terms: Terms, source: NoiseGenerator) -> Iterator[Physical]:
    """One Poisson sample of the units, in batches that fit into memory. Nothing at all comes when nobody was drawn."""
    group: list[Unit] = []
    size = 0
    for number in np.flatnonzero(source.sample(len(units), terms.sample_rate)).tolist():
        unit = units[number]
        if len(unit.rows) > terms.images_per_patient:
            places = source.choose(len(unit.rows), terms.images_per_patient)
            unit = Unit(rows=unit.rows[places], keys=unit.keys[places])
        if group and size + len(unit.rows) * terms.augmentations > terms.physical_batch:
            yield _physical(group, terms.augmentations)
            group, size = [], 0
        group.append(unit)
        size += len(unit.rows) * terms.augmentations
    if group:
        yield _physical(group, terms.augmentations)


def _physical(group: Sequence[Unit], copies: int) -> Physical:
    sizes = np.array([len(unit.rows) * copies for unit in group])
    return Physical(
        rows=np.concatenate([np.repeat(unit.rows, copies) for unit in group]),
        keys=np.concatenate([np.repeat(unit.keys, copies) for unit in group]),
        copies=np.concatenate([np.tile(np.arange(copies), len(unit.rows)) for unit in group]),
        units=np.repeat(np.arange(len(group)), sizes),
        weights=np.repeat(1 / sizes, sizes).astype(np.float32),
    )


class SecretNoiseOptimizer(ClippedSumOptimizer):
    """Opacus' optimizer with noise from the site's own generator."""

    def __init__(self, parameters: Sequence[Tensor], terms: Terms, source: NoiseGenerator) -> None:
        """Opacus wants an optimizer to wrap; this one never makes a step, and the round's own one does."""
        super().__init__(
            torch.optim.SGD(parameters),
            noise_multiplier=terms.gradient_noise,
            max_grad_norm=terms.max_grad_norm,
            expected_batch_size=terms.expected_batch,
        )
        self.source = source

    def add_noise(self) -> None:
        """N(0, σ²C²) on every coordinate.

        Raises:
            ModelError: σC is so small or so large that float32 holds no such noise.
        """
        scale = self.noise_multiplier * self.max_grad_norm
        if not SMALLEST <= scale <= LARGEST:
            raise ModelError(f"noise of standard deviation {scale:g} is lost in float32; change privacy.max-grad-norm")
        for some in _in_parts(self.params):
            sums = [parameter.summed_grad for parameter in some]
            sizes = [each.numel() for each in sums]
            noise = torch.from_numpy(self.source.normal(sum(sizes))).to(sums[0].device)
            parts = [part.view_as(each) for part, each in zip(torch.split(noise, sizes), sums, strict=True)]
            torch._foreach_add_(sums, parts, alpha=scale)
            for parameter, total in zip(some, sums, strict=True):
                parameter.grad, parameter.summed_grad = total, None


def _in_parts(parameters: Sequence[Any]) -> Iterator[list[Any]]:
    """Parameters in their order, so many together that their noise takes no memory worth mentioning."""
    part: list[Any] = []
    for parameter in parameters:
        if part and sum(each.numel() for each in part) + parameter.numel() > NOISE_AT_ONCE:
            yield part
            part = []
        part.append(parameter)
    yield part


class PrivateGradient:
    """Leaves the noised mean of clipped gradients in the parameters, step after step."""

    def __init__(
        self, network: FlatNetwork, config: TrainConfig, loss: Loss, terms: Terms, source: NoiseGenerator
    ) -> None:
        """Look at every layer once.

        Raises:
            ModelError: a layer of the network couples images or cannot be clipped.
        """
        self.network, self.loss, self.terms = network, one_by_one(loss), terms
        self.channels_last = config.channels_last
        self.clip = terms.max_grad_norm  # C, of the coming step
        bounds = terms.bounds(network.module)
        precision = settled(config.precision, network.device)
        self.clipper = GradientClipper(network.module, max_norm=bounds, precision=precision)
        self.noised = SecretNoiseOptimizer(network.parameters, terms, source)

    def __call__(self, group: Iterable[tuple[Physical, Tensor, Tensor]]) -> Tensor:
        """One Poisson sample: g. Returns the mean loss over its images, which must not leave the site."""
        device = self.network.device
        for parameter in self.network.parameters:
            parameter.grad = None
        losses = [torch.zeros(0, device=device)]
        balance = 0.0  # Σ ±½ over the sampled units: + for a gradient that came through as it was
        rows = min(FEWEST, self.terms.physical_batch)
        for part, *batch in group:
            images, targets, weights = filled((*batch, torch.from_numpy(part.weights)), rows)
            images = images.to(device)
            clipped = self.clipper.accumulate_(
                self.loss,
                channels_innermost(images) if self.channels_last else images,
                targets.to(device),
                numbered(torch.from_numpy(part.units), rows).to(device),
                weights.to(device),
            )
            losses.append(clipped.losses[: len(part.rows)].detach())
            if self.terms.adaptive:
                norms = clipped.norms[: part.units[-1] + 1]
                balance += float((norms <= self.clip).sum()) - len(norms) / 2
        for parameter in self.network.parameters:
            if parameter.grad is None:  # nobody was drawn
                parameter.grad = torch.zeros_like(parameter)
        self.noised.pre_step()
        self._follow(balance)
        return torch.cat(losses).sum() / max(sum(map(len, losses)), 1)

    def _follow(self, balance: float) -> None:
        """Move the clip by the noised count of a step's sample (Andrew et al. 2021, arXiv:1905.03871, section 3.1)."""
        adaptive, batch = self.terms.adaptive, self.terms.expected_batch
        if adaptive is None:
            return
        self.clip = following_clip(
            self.clip, balance=balance, expected=batch, adaptive=adaptive, generator=self.noised.source
        )
        self.clipper.max_norm = self.noised.max_grad_norm = self.clip


def train_privately_(
    network: FlatNetwork,
    data: Dataset,
    units: Sequence[Unit],
    config: TrainConfig,
    loss: Loss,
    terms: Terms,
    *,
    source: NoiseGenerator,
    generator: np.random.Generator,
    context: RoundContext,
) -> Trained:
    """Train `network` in place by DP-SGD; what comes back besides the weights must not leave the site.

    Args:
        network: without any layer that couples images.
        data: the site's images.
        units: from `units_of`.
        config: optimizer, schedule, augmentation.
        loss: mean over a batch; it is asked for one image at a time.
        terms: of the release.
        source: secret randomness: sampling, draws within a patient, noise.
        generator: of augmentation, from the run's seed. Dropout is drawn for a whole batch at once, so that its masks
            depend on who else is there; they are independent of that only while nobody can predict them.
        context: what besides data and settings decides the round; nothing in them may come from private data.

    Raises:
        ModelError: a layer of the network couples images or cannot be clipped.
    """
    seed = int(generator.integers(2**63))
    buffers = [buffer.clone() for buffer in network.module.buffers()]
    with seeded(int(source.integers(2**62, 1)[0]), network.device):
        training = Training(network, config, context, terms.steps, secret=source.secret)
        training.take_up()
        network.module.train()
        terms = replace(terms, max_grad_norm=training.clip or terms.max_grad_norm)
        gradient_ = PrivateGradient(network, config, loss, terms, source)
        gradient_.clipper.refuse_mixing()
        require_uncoupled(network, data)
        margin = network.margin_voxels
        while training.step < terms.steps:
            source.begin(training.step)
            parts = drawn(units, terms, source)
            group = ((part, *_batch(data, part, config, (seed, training.step), margin)) for part in parts)
            training.step_(partial(gradient_, group))
            training.clip = gradient_.clip
            training.end_step(at_end_of_pass=False)
    trained = training.result_()
    for buffer, before in zip(network.module.buffers(), buffers, strict=True):  # what they gathered has no noise
        buffer.copy_(before)
    kept = {CLIP: np.array([gradient_.clip], np.float32)} if terms.adaptive else {}
    return replace(trained, kept=kept)


def _batch(data: Dataset, part: Physical, config: TrainConfig, seed: tuple[int, int], margin: int) -> Batch:
    """Images and targets, each changed by numbers of its own: no image's depend on who else was drawn."""
    if not config.augment:
        return training_batch(data, part.rows, config, seed, margin)
    single = [
        training_batch(data, part.rows[n : n + 1], config, (*seed, int(part.keys[n]), int(part.copies[n])), margin)
        for n in range(len(part.rows))
    ]
    return torch.cat([images for images, _ in single]), torch.cat([targets for _, targets in single])


def one_by_one(loss: Loss) -> Loss:
    """(N,) losses of single images: whatever a loss averages over, it is over that image alone."""
    supervised = deeply_supervised(loss)

    def losses(outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        levels = (outputs,) if isinstance(outputs, Tensor) else outputs
        single = (tuple(level[n : n + 1] for level in levels) for n in range(len(targets)))
        values = [
            supervised(of[0] if isinstance(outputs, Tensor) else of, targets[n : n + 1]) for n, of in enumerate(single)
        ]
        return torch.stack(values)

    return losses
