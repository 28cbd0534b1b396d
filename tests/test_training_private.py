"""DP-SGD at a site. Tests are named after the claims of docs/privacy-model.md that they hold."""

import numpy as np
import pytest
import torch
from torch import nn

from fedmed import config as run_file
from fedmed.config import PrivacyConfig, TrainConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.imaging.dataset import Dataset
from fedmed.privacy.noise import InsecureGenerator, SecureGenerator
from fedmed.training.clipping import GradientClipper
from fedmed.training.loop import RoundContext, Training
from fedmed.training.losses import masked_bce
from fedmed.training.network import FlatNetwork
from fedmed.training.private import drawn, train_privately_, units_of
from fedmed.training.site import settings_for_sites, settings_from
from fedmed.training.terms import Terms, terms_for
from fedmed.training.unfinished import Unfinished


class Chosen:
    """A source of randomness that a test decides: who is sampled, which images, and whether there is noise."""

    secret = False

    def __init__(self, *, sampled=None, noise: float = 0.0) -> None:
        self.sampled, self.noise, self.rates = sampled, noise, []

    def begin(self, step):
        pass

    def normal(self, size):
        return np.full(size, self.noise, np.float32)

    def fine_normal(self, size):
        return np.full(size, self.noise)

    def sample(self, count, rate):
        self.rates.append(rate)
        return np.ones(count, bool) if self.sampled is None else np.isin(np.arange(count), self.sampled)

    def choose(self, count, size):
        return np.arange(size)

    def integers(self, high, size):
        return np.zeros(size, np.int64)


def network(seed: int = 0) -> FlatNetwork:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    return FlatNetwork(layers, torch.device("cpu"))


def patients(*images: int, seed: int = 0, without: int | None = None) -> Dataset:
    """Patients with so many images each; `without` leaves one of them out and nothing else."""
    rng = np.random.default_rng(seed)
    owners = [number for number, count in enumerate(images) for _ in range(count)]
    pixels = rng.random((len(owners), 1, 8, 8), dtype=np.float32)
    targets = rng.integers(0, 2, (len(owners), 2)).astype(np.float32)
    targets[rng.random(targets.shape) < 0.2] = np.nan  # some labels are unknown
    keep = np.array([owner != without for owner in owners])
    names = tuple(f"patient-{owner}" for owner, kept in zip(owners, keep, strict=True) if kept)
    return Dataset(images=pixels[keep], targets=targets[keep], patients=names)


def terms(data: Dataset, **changes) -> Terms:
    values = {
        "unit": "patient",
        "units": len(set(data.patients)),
        "expected_batch": len(set(data.patients)),
        "steps": 1,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "images_per_patient": 8,
        "augmentations": 1,
        "physical_batch": 32,
    }
    return Terms(**{**values, **changes})


PLAIN = TrainConfig(optimizer="sgd", learning_rate=1.0, weight_decay=0.0)


def step(data: Dataset, source, settings: TrainConfig = PLAIN, privacy: PrivacyConfig | None = None, **changes):
    """The change of all parameters in one step at learning rate 1, times the expected batch: the released sum."""
    model = network()
    before = model.vector.clone()
    given = terms(data, **changes)
    units = units_of(data, np.arange(len(data)), privacy or PrivacyConfig(mode="none", unit=given.unit))
    train_privately_(
        model, data, units, settings, masked_bce, given,
        source=source, generator=np.random.default_rng(0), context=RoundContext(),
    )  # fmt: skip
    return (before - model.vector).double() * given.expected_batch


def by_hand(data: Dataset, clip: float, cap: int = 8) -> torch.Tensor:
    """Σ over patients of the clipped mean gradient of their first images, one image at a time."""
    model, total = network(), 0.0
    for patient in dict.fromkeys(data.patients):
        rows = [row for row, owner in enumerate(data.patients) if owner == patient][:cap]
        gradient = 0.0
        for row in rows:
            images, targets = data.batch(np.array([row]))
            model.module.zero_grad()
            masked_bce(model(images), targets).backward()
            gradient = gradient + torch.cat([p.grad.flatten() for p in model.parameters]).double() / len(rows)
        total = total + gradient * min(1.0, clip / float(gradient.norm()))
    return total


def test_p06_a_step_is_the_sum_of_one_clipped_mean_gradient_of_each_patient():
    data = patients(1, 3, 2, 5)
    torch.testing.assert_close(step(data, Chosen()), by_hand(data, 0.5), rtol=1e-3, atol=5e-5)  # norms are rounded up


def test_p06_no_more_than_the_capped_images_of_a_patient_count():
    data = patients(1, 12, 2)
    released = step(data, Chosen(), images_per_patient=3)
    torch.testing.assert_close(released, by_hand(data, 0.5, cap=3), rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
@pytest.mark.parametrize("augment", [(), ("flip", "shift", "noise")])
def test_p06_p07_taking_a_patient_away_moves_the_sum_by_the_clip_at_most(count, augment):
    settings = PLAIN.model_copy(update={"augment": augment, "learning_rate": 1.0})
    changes = {"max_grad_norm": 0.01, "expected_batch": 5.0, "units": 5, "augmentations": 2 if augment else 1}
    whole = step(patients(2, count, 1, 3, 1), Chosen(), settings, **changes)
    apart = step(patients(2, count, 1, 3, 1, without=1), Chosen(), settings, **changes)
    assert float((whole - apart).norm()) == pytest.approx(0.01, rel=1e-2)


def test_p07_no_other_patients_clipped_gradient_depends_on_one_who_is_taken_away():
    settings = PLAIN.model_copy(update={"augment": ("flip", "rotate", "contrast", "noise")})
    whole, apart = patients(2, 3, 1, 4), patients(2, 3, 1, 4, without=1)
    changes = {"expected_batch": 1.0, "units": 4, "augmentations": 3}
    for position, without in ((0, 0), (2, 1), (3, 2)):
        alone = step(whole, Chosen(sampled=[position]), settings, **changes)
        again = step(apart, Chosen(sampled=[without]), settings, **changes)
        assert torch.equal(alone, again)


def test_p07_how_many_others_came_moves_no_bit_of_a_patients_norm(monkeypatch):
    norms, whole = [], GradientClipper.accumulate_

    def told(self, *given):
        norms.append(whole(self, *given))
        return norms[-1]

    monkeypatch.setattr(GradientClipper, "accumulate_", told)
    for physical in (4, 20):
        norms.clear()
        for count in (20, 19, 15, 9, 3):
            step(patients(*[1] * 20), Chosen(sampled=range(count)), physical_batch=physical)
        assert len(norms) == (5 + 5 + 4 + 3 + 1 if physical == 4 else 5)
        assert torch.equal(norms[0].norms[:3], norms[-1].norms[:3])


def test_p05_the_sum_is_divided_by_the_expected_batch_and_not_by_who_came():
    data = patients(1, 1, 1, 1)
    few = step(data, Chosen(sampled=[2]), expected_batch=2.0)
    alone = step(patients(1, 1, 1, 1), Chosen(sampled=[2]), expected_batch=4.0)
    torch.testing.assert_close(few, alone, rtol=1e-5, atol=1e-6)


def test_p05_an_empty_sample_is_a_step_of_noise_alone():
    data = patients(1, 2)
    source = Chosen(sampled=[], noise=1.0)
    released = step(data, source, noise_multiplier=3.0)
    torch.testing.assert_close(released, torch.full_like(released, 3.0 * 0.5), rtol=1e-4, atol=1e-4)
    assert source.rates == [1.0]


def test_p05_physical_batches_change_nothing_and_never_part_a_patient():
    data = patients(3, 4, 1, 2, 2)
    units = units_of(data, np.arange(len(data)), PrivacyConfig())
    parts = list(drawn(units, terms(data, physical_batch=4, augmentations=1), Chosen()))
    assert [sorted(set(part.rows)) for part in parts] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9], [10, 11]]
    assert all(part.weights.sum() == pytest.approx(part.units.max() + 1) for part in parts)
    torch.testing.assert_close(
        step(data, Chosen(), physical_batch=4), step(data, Chosen(), physical_batch=99), rtol=1e-5, atol=1e-6
    )


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 20_000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))[:, :2] * 0.0


def test_p05_noise_has_the_variance_that_it_is_said_to_have():
    data = patients(1, 1, 1)
    model = FlatNetwork(Wide(), torch.device("cpu"))
    before, given = model.vector.clone(), terms(data, noise_multiplier=2.0, expected_batch=1.0, units=3)
    units = units_of(data, np.arange(3), PrivacyConfig())
    train_privately_(
        model, data, units, PLAIN, masked_bce, given,
        source=SecureGenerator(), generator=np.random.default_rng(0), context=RoundContext(),
    )  # fmt: skip
    noise = (before - model.vector).double().numpy()
    assert noise.var() == pytest.approx((2.0 * 0.5) ** 2, rel=0.01)
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5


@pytest.mark.parametrize("make", [SecureGenerator, lambda: InsecureGenerator(3)])
def test_p05_what_masks_of_dropout_are_drawn_from_is_saved_only_where_noise_protects_nobody(make, tmp_path):
    data, source = patients(1, 2), make()
    saved = Unfinished(path=tmp_path / "round.safetensors", identify=lambda: "this", every_s=0.0)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2))
    train_privately_(
        FlatNetwork(layers, torch.device("cpu")), data, units_of(data, np.arange(3), PrivacyConfig()), PLAIN,
        masked_bce, terms(data, steps=2), source=source, generator=np.random.default_rng(0),
        context=RoundContext(unfinished=saved),
    )  # fmt: skip
    found = saved.load()
    assert found is not None and ("random" in found[1]) is not source.secret
    training = Training(FlatNetwork(layers, torch.device("cpu")), PLAIN, RoundContext(unfinished=saved), 2, secret=True)
    before = torch.default_generator.get_state()
    training.take_up()
    assert training.step == 1 and torch.equal(torch.default_generator.get_state(), before)


@pytest.mark.parametrize(("noise", "same"), [(lambda: InsecureGenerator(3), True), (SecureGenerator, False)])
def test_p05_a_private_round_that_was_cut_off_repeats_no_secret_noise(noise, same, tmp_path):
    data, after = patients(1, 2, 3, 2), 3

    def trained(where: Unfinished | None = None, steps: int = 9) -> np.ndarray:
        def correction() -> None:
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise InterruptedError

        model = network()
        train_privately_(
            model, data, units_of(data, np.arange(len(data)), PrivacyConfig()), PLAIN, masked_bce,
            terms(data, steps=5, expected_batch=2.0), source=noise(), generator=np.random.default_rng(0),
            context=RoundContext(unfinished=where, correction=correction),
        )  # fmt: skip
        return model.weights().parameters

    saved = Unfinished(path=tmp_path / "round.safetensors", identify=lambda: "this", every_s=0.0)
    with pytest.raises(InterruptedError):
        trained(saved, steps=after)
    assert np.array_equal(trained(saved, steps=5 - after), trained()) == same


def test_channels_last_reaches_private_training_and_moves_no_sum():
    data, strides = patients(1, 3, 2), []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: strides.append(given[0].stride(1)) if isinstance(module, nn.Conv2d) else None
    )
    plain = step(data, Chosen())
    assert strides.pop() == 64
    ordered = step(data, Chosen(), PLAIN.model_copy(update={"channels_last": True}))
    assert strides.pop() == 1
    hook.remove()
    torch.testing.assert_close(ordered, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_order_of_channels_in_memory_changes_no_step_without_norms_between_convolutions(optimizer):
    rng = np.random.default_rng(0)
    data = Dataset(
        images=rng.random((6, 1, 16, 16), np.float32), targets=np.ones((6, 1), np.float32),
        patients=tuple("abcdef"),
    )  # fmt: skip

    def trained(channels_last):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(64, 1),
        )  # fmt: skip
        flat = FlatNetwork(module, torch.device("cpu"))
        before = flat.weights().parameters.copy()
        settings = PLAIN.model_copy(update={"channels_last": channels_last, "optimizer": optimizer})
        train_privately_(
            flat, data, units_of(data, np.arange(6), PrivacyConfig()), settings, masked_bce,
            terms(data, steps=3, expected_batch=6.0), source=Chosen(), generator=np.random.default_rng(0),
            context=RoundContext(),
        )  # fmt: skip
        return flat.weights().parameters - before

    plain, ordered = trained(False), trained(True)
    assert np.linalg.norm(ordered - plain) < 1e-3 * np.linalg.norm(plain)


def test_noise_that_is_drawn_in_parts_is_one_number_for_every_parameter(monkeypatch):
    data = patients(1, 2, 3)
    whole = step(data, InsecureGenerator(3))
    drawn = []
    normal = InsecureGenerator.normal
    monkeypatch.setattr(InsecureGenerator, "normal", lambda self, size: drawn.append(size) or normal(self, size))
    monkeypatch.setattr("fedmed.training.private.NOISE_AT_ONCE", 5)
    assert torch.equal(step(data, InsecureGenerator(3)), whole)
    assert len(drawn) > 1 and sum(drawn) == network().weights().parameters.size


def test_p05_the_same_seed_repeats_nothing_unless_the_noise_is_insecure():
    data = patients(1, 2, 3)
    assert not torch.equal(step(data, SecureGenerator()), step(data, SecureGenerator()))
    assert torch.equal(step(data, InsecureGenerator(3)), step(data, InsecureGenerator(3)))


def test_image_unit_clips_every_image_alone_and_uses_the_capped_ones_only():
    data = patients(2, 5)
    privacy = PrivacyConfig(unit="image", images_per_patient=3)
    units = units_of(data, np.arange(len(data)), privacy)
    assert [unit.rows.tolist() for unit in units] == [[0], [1], [2], [3], [4]]
    single = Dataset(images=data.images, targets=data.targets, patients=tuple(map(str, range(len(data)))))
    kept = single.select(np.arange(len(data)) < 5)
    released = step(data, Chosen(), privacy=privacy, unit="image", units=5, expected_batch=5.0)
    torch.testing.assert_close(released, by_hand(kept, 0.5), rtol=1e-5, atol=1e-6)


def test_terms_follow_from_the_run_file_and_the_number_of_patients():
    privacy, train = PrivacyConfig(), TrainConfig(batch_size=16, accumulate=2, local_epochs=3)
    given = terms_for(privacy, train, units=100, noise_multiplier=1.5)
    assert (given.sample_rate, given.steps) == (0.32, 3 * 4)
    small = terms_for(privacy, train, units=10, noise_multiplier=1.5)
    assert (small.sample_rate, small.steps) == (1.0, 3)
    assert terms_for(privacy, train.model_copy(update={"local_steps": 7}), units=10, noise_multiplier=1.0).steps == 7
    event = given.event(steps=12)
    assert (event.mechanism, event.sample_rate, event.steps, event.unit) == ("sampled-gaussian", 0.32, 12, "patient")


def test_p07_refuses_a_network_that_couples_the_images_of_a_batch():
    data = patients(1, 1)
    model = FlatNetwork(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 2)), torch.device("cpu")
    )
    units = units_of(data, np.arange(2), PrivacyConfig())
    with pytest.raises(ModelError, match="BatchNorm"):
        train_privately_(
            model, data, units, PLAIN, masked_bce, terms(data),
            source=SecureGenerator(), generator=np.random.default_rng(0), context=RoundContext(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "norm", "batch"),
        ("train", "class-weights", "balanced"),
        ("train", "sampling", "balanced"),
        ("train", "patience", 3),
        ("privacy", "augmentations", 4),
    ],
)
def test_p07_refuses_settings_that_let_private_data_past_the_noise(section, key, value):
    values = {"privacy": {"mode": "dp-sgd"}}
    values[section] = {**values.get(section, {}), key: value}
    with pytest.raises(ConfigError, match=f"{section}.{key}.*dp-sgd"):
        run_file.validate(values)


@pytest.mark.parametrize(
    ("keys", "fits"),
    [
        ({"images-per-patient": 33}, False),
        ({"images-per-patient": 33, "physical-batch-size": 33}, True),
        ({"images-per-patient": 33, "unit": "image"}, True),
        ({"images-per-patient": 8, "augmentations": 5}, False),
    ],
)
def test_a_patient_never_takes_more_memory_than_a_physical_batch(keys, fits):
    values = {"privacy": {"mode": "dp-sgd", **keys}, "train": {"augment": ["flip"]}}
    if fits:
        run_file.validate(values)
    else:
        with pytest.raises(ConfigError, match=r"privacy\.physical-batch-size = 32 must hold them"):
            run_file.validate(values)


@pytest.mark.parametrize("mode", ["dp-sgd", "central"])
@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        ({}, False),
        ({"weights": "w.safetensors"}, False),
        ({"freeze": "block1"}, False),
        ({"freeze": "block1", "weights": "w.safetensors"}, True),
        ({"low-rank": 2, "weights": "w.safetensors"}, True),
    ],
)
def test_p07_batch_norm_is_refused_unless_it_is_frozen_as_given(mode, model, allowed):
    values = {
        "model": {"norm": "batch", **model},
        "task": {"labels": ["a"]},
        "data": {"sites": ["a.csv", "b.csv"]},
        "strategy": {"weight-by": "uniform"},
        "privacy": {"mode": mode},
    }
    if allowed:
        settings_from(settings_for_sites(run_file.validate(values)))  # sites are told of no file
        return
    with pytest.raises(ConfigError, match=r"model\.norm.*model\.freeze"):
        run_file.validate(values)
