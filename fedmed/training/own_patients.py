"""A network and the patients of one site: how it trains on them, and what it loses on those held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedmed.config import RunConfig, TrainConfig
from fedmed.errors import ConfigError, DataError
from fedmed.imaging.dataset import Dataset
from fedmed.imaging.split import held_out
from fedmed.metrics import Form
from fedmed.models.low_rank import merged
from fedmed.training.evaluate import mean_loss
from fedmed.training.local_algorithms.ditto import own_weights
from fedmed.training.local_algorithms.fine_tune import fine_tuning
from fedmed.training.loop import RoundContext, Trained, train_
from fedmed.training.losses import Loss, loss_for
from fedmed.training.network import FlatNetwork
from fedmed.training.sampling import Rows, balanced_positive_weights, balanced_weights
from fedmed.training.site_state import write_durably
from fedmed.types import FloatVector

if TYPE_CHECKING:
    from fedmed.training.account import Account


def site_generator(seed: int, site: str, round: int) -> np.random.Generator:
    """The generator of one site in one round: the same for any number of workers and any order of sites."""
    digest = hashlib.sha256(f"{seed}/{site}/{round}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@dataclass(frozen=True, kw_only=True)
class OwnPatients:
    """The network that a process keeps, and the patients of the site that it stands for."""

    network: FlatNetwork
    data: Dataset
    config: RunConfig
    site: str

    @property
    def rows(self) -> Rows:
        """Rows of the training patients."""
        return np.flatnonzero(~self.data.evaluation)

    @property
    def held_out(self) -> Rows:
        """Rows of the patients that the site holds out."""
        return np.flatnonzero(self.data.evaluation)

    @property
    def people(self) -> tuple[int, int]:
        """How many patients are trained on, and how many held out, as the site declares it.

        In a private run these are all of the manifest: the number of those whose images a run can read would answer
        any question that its settings ask.
        """
        return self.data.people(named=self.config.privacy.mode != "none")

    def train_(self, settings: TrainConfig, context: RoundContext, account: Account | None = None) -> Trained:
        """Train the network in place from the weights that it holds; the order of images follows from the round.

        Args:
            settings: of the training.
            context: the round.
            account: of a round that is to leave the site under differential privacy; what is trained without one
                stays there.
        """
        task = self.config.task
        generator = site_generator(self.config.seed, self.site, context.round)
        if account is not None:
            from fedmed.training.private import train_privately_  # heavy: opacus

            loss = self._loss(settings)
            terms, source, units = account.terms, account.source, account.units
            return train_privately_(
                self.network,
                self.data,
                units,
                settings,
                loss,
                terms,
                source=source,
                generator=generator,
                context=context,
            )
        rows, validation = self._parted(settings)
        balanced = settings.sampling == "balanced"
        context = replace(
            context,
            weights=balanced_weights(self.data, rows, task) if balanced else None,
            validation=self._validation(settings, validation),
        )
        loss = self._loss(settings, self._positive_weights(settings, rows))
        return train_(self.network, self.data, rows, settings, loss, generator, context)

    def held_out_loss(self, *, form: Form) -> float:
        """The loss on the patients held out, for an algorithm that has to know it.

        Args:
            form: in which the site lets metrics leave.

        Raises:
            ConfigError: it lets none leave.
            DataError: it holds no patient out.
        """
        name = self.config.strategy.name
        if form == "none":
            text = f'strategy.name = "{name}" needs the loss on held-out patients, and this site lets no metric leave'
            raise ConfigError.told(text)
        if len(self.held_out) == 0:
            text = f'strategy.name = "{name}" needs the loss on held-out patients, and this site holds none out'
            raise DataError.told(text)
        return mean_loss(self.network, self.data, self.held_out, self._loss(self.config.train))

    def _parted(self, settings: TrainConfig) -> tuple[Rows, Rows]:
        """Rows that are trained on, and rows that tell when to stop; nobody's images are on both sides.

        Those who stop the training are training patients: the patients held out judge the network afterwards.
        """
        patients = [self.data.patients[row] for row in self.rows]
        if not settings.patience or len(set(patients)) < 2:
            return self.rows, self.rows[:0]
        name = f"validation/{self.site}"
        aside = held_out(patients, share=settings.validation_share, seed=self.config.split_seed, name=name)
        return self.rows[~aside], self.rows[aside]

    def _loss(self, settings: TrainConfig, positive_weights: torch.Tensor | None = None) -> Loss:
        """The loss of a training, and of judging it, on these masks: class numbers exclude each other."""
        exclusive = self.data.labels > 1 and settings.class_weights == "none"  # softmax knows no weights of positives
        return loss_for(self.config.task, settings, positive_weights, exclusive=exclusive)

    def _positive_weights(self, settings: TrainConfig, rows: Rows) -> torch.Tensor | None:
        """What a positive of each label weighs in the loss, ready to be broadcast over pixels."""
        if settings.class_weights == "none":
            return None
        weights = torch.from_numpy(balanced_positive_weights(self.data, rows)).to(self.network.device)
        pixels = 0 if self.config.task.kind == "classification" else self.config.dimensions
        return weights.view(-1, *[1] * pixels)

    def _validation(self, settings: TrainConfig, rows: Rows) -> Callable[[], float] | None:
        """The loss on the patients who tell when to stop within a round."""
        if len(rows) == 0:
            return None
        return partial(mean_loss, self.network, self.data, rows, self._loss(settings))


def become_personal_(own: OwnPatients, kept: Mapping[str, FloatVector]) -> bool:
    """Turn the kept network of a run, which `own.network` holds, into the site's own one, in place.

    Returns:
        Whether it is another network now. Under FedBN without `strategy.personal-steps` it already is the site's own;
        under Ditto a site that never trained has none but the shared one.
    """
    if own.config.strategy.personal_steps:
        own.train_(fine_tuning(own.config), RoundContext(round=0))  # no round of the run draws from 0
        return True
    if own.config.strategy.name == "ditto" and kept:
        own.network.load_(own_weights(kept))
        return True
    return False


def write_personal(network: FlatNetwork, path: Path) -> None:
    """Write a network tensor by tensor, as the `model.safetensors` of a run folder.

    Raises:
        DataError: the disk is full or read-only.
    """
    named = {**dict(network.module.named_parameters()), **dict(network.module.named_buffers())}
    write_durably(path, merged({name: tensor.detach().cpu().numpy() for name, tensor in named.items()}), {})
