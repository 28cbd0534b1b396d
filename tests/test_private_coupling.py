"""What would void the bound on a patient is refused or undone: coupling, buffers, predictable masks, lost noise."""

import numpy as np
import pytest
import torch
from torch import nn

from fedmed import config as run_file
from fedmed.errors import ConfigError, ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.privacy.noise import SecureGenerator
from fedmed.training import private
from fedmed.training.coupling import require_uncoupled
from fedmed.training.filling import FEWEST
from fedmed.training.loop import RoundContext
from fedmed.training.losses import masked_bce
from fedmed.training.network import FlatNetwork
from fedmed.training.private import SecretNoiseOptimizer, train_privately_, units_of
from fedmed.training.terms import Terms

IMAGES = 12


class Centred(nn.Module):
    """No parameter, no known layer, and every image is changed by all others."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images - images.mean(dim=0)


class StepsFirst(nn.Module):
    """Reads every image in steps, which come first: as many as a physical batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1).t()[..., None]).squeeze(-1).t()  # (16, n, 1) in between


class Remembering(nn.Module):
    """Keeps a sum over patients in a buffer, which travels with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += images.detach().sum()
        return images


def data() -> Dataset:
    rng = np.random.default_rng(3)
    images = rng.random((IMAGES, 1, 4, 4), dtype=np.float32)
    patients = tuple(f"p{number}" for number in range(IMAGES))
    return Dataset(images=images, targets=np.ones((IMAGES, 1), np.float32), patients=patients,
                   evaluation=np.zeros(IMAGES, bool))  # fmt: skip


def network(*before: nn.Module) -> FlatNetwork:
    torch.manual_seed(0)
    return FlatNetwork(nn.Sequential(*before, nn.Flatten(), nn.Linear(16, 1)), torch.device("cpu"))


def terms(**changes: object) -> Terms:
    values = {"unit": "patient", "units": IMAGES, "expected_batch": 6.0, "steps": 2, "noise_multiplier": 1.0}
    values |= {"max_grad_norm": 1.0, "images_per_patient": 1, "augmentations": 1, "physical_batch": 12}
    return Terms(**{**values, **changes})


def trained(made: FlatNetwork, *, physical_batch: int = 12, **keys: object) -> FlatNetwork:
    config = run_file.validate({"train": {"optimizer": "sgd", **keys}}).train
    given = terms(physical_batch=physical_batch)
    train_privately_(
        made, data(), units_of(data(), np.arange(IMAGES), given), config, masked_bce, given,
        source=SecureGenerator(), generator=np.random.default_rng(7), context=RoundContext(round=1),
    )  # fmt: skip
    return made


def test_p07_a_network_whose_own_code_couples_images_is_refused():
    with pytest.raises(ModelError, match="depends on the other images"):
        trained(network(Centred()))


def test_p07_a_layer_whose_rows_only_happen_to_be_as_many_as_the_images_is_refused():
    assert data().images[0].size == FEWEST
    with pytest.raises(ModelError, match="16 rows for 2 images"):
        trained(network(StepsFirst()), physical_batch=FEWEST)


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.GroupNorm(1, 1), nn.Conv2d(1, 1, 3, padding=1)], ids=repr)
def test_a_network_that_couples_nothing_passes_with_or_without_dropout(between):
    require_uncoupled(network(between), data())


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_p07_buffers_leave_as_they_came(average):
    assert float(trained(network(Remembering()), ema=average).module[0].seen) == 0


def test_p05_masks_of_dropout_follow_from_no_seed_of_the_run(monkeypatch):
    seeds = []
    whole = private.seeded
    monkeypatch.setattr(private, "seeded", lambda seed, device: seeds.append(seed) or whole(seed, device))
    for _ in range(2):
        trained(network(nn.Dropout(0.5)))
    assert len(set(seeds)) == 2


@pytest.mark.parametrize("bound", [1.5e-45, 1e-39, 1e39])
def test_p06_a_bound_at_which_float32_holds_no_noise_is_refused(bound):
    with pytest.raises(ConfigError, match="max-grad-norm"):
        run_file.validate({"privacy": {"max-grad-norm": bound}})
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = SecretNoiseOptimizer([parameter], terms(max_grad_norm=bound), SecureGenerator())
    parameter.summed_grad = torch.zeros(4)
    with pytest.raises(ModelError, match="lost in float32"):
        optimizer.add_noise()
