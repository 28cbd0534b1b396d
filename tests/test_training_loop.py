"""A site's training in one round: optimizer steps, schedules, averages, early stopping, and going on after a kill."""

import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F
from toy import FRAGILE, PLANTED
from visits import Visits, flat

from fedmed import config as run_file
from fedmed.errors import ConfigError
from fedmed.federated.progress import Progress
from fedmed.imaging.dataset import Dataset
from fedmed.training import precision
from fedmed.training.loop import RoundContext, train_
from fedmed.training.losses import masked_bce
from fedmed.training.network import FlatNetwork, channels_innermost
from fedmed.training.sampling import balanced_positive_weights, balanced_weights, batches
from fedmed.training.schedule import learning_rate_factor, plateau_factor
from fedmed.training.site import settings_for_sites, settings_from
from fedmed.training.site_round import train_round
from fedmed.training.unfinished import Unfinished

SGD = {"optimizer": "sgd", "learning-rate": 0.1, "weight-decay": 0.0, "batch-size": 8}


def train_config(**keys):
    return run_file.validate({"train": {**SGD, **{k.replace("_", "-"): v for k, v in keys.items()}}}).train


def data_of(rows: int) -> Dataset:
    rng = np.random.default_rng(3)
    images = rng.random((rows, 1, 4, 4), dtype=np.float32)
    targets = (images.mean((1, 2, 3))[:, None] > 0.5).astype(np.float32)
    return Dataset(images=images, targets=targets, patients=tuple(map(str, range(rows))))


def linear() -> FlatNetwork:
    torch.manual_seed(0)
    return FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), torch.device("cpu"))


def trained(config, *, rows: int = 24, context: RoundContext | None = None) -> np.ndarray:
    network, data = linear(), data_of(rows)
    train_(network, data, np.arange(rows), config, masked_bce, np.random.default_rng(5), context)
    return network.weights().parameters


def test_accumulated_batches_are_one_step_of_the_whole_batch():
    whole, parts = train_config(batch_size=24), train_config(batch_size=8, accumulate=3)
    np.testing.assert_allclose(trained(parts), trained(whole), atol=1e-6)


def test_a_last_group_of_fewer_images_is_a_mean_over_them():
    # 20 images: batches of 8, 8 and 4, accumulated in pairs; the second step has 4 images alone.
    network, data = linear(), data_of(20)
    train_(network, data, np.arange(20), train_config(accumulate=2), masked_bce, np.random.default_rng(5))
    generator = np.random.default_rng(5)
    generator.integers(2**63)
    order, by_hand = generator.permutation(np.arange(20)), linear()
    optimizer = torch.optim.SGD(by_hand.module.parameters(), lr=0.1)
    for chosen in (order[:16], order[16:]):
        images, targets = data.batch(chosen)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(by_hand(images), targets).backward()
        optimizer.step()
    np.testing.assert_allclose(network.weights().parameters, by_hand.weights().parameters, atol=1e-6)


def test_accumulated_batches_are_the_whole_batch_where_labels_are_unknown():
    data = data_of(24)
    data.targets[3:20] = np.nan
    changed = []
    for keys in ({"batch_size": 24}, {"batch_size": 8, "accumulate": 3}):
        network = linear()
        train_(network, data, np.arange(24), train_config(**keys), masked_bce, np.random.default_rng(5))
        changed.append(network.weights().parameters)
    np.testing.assert_allclose(changed[1], changed[0], atol=1e-6)


def with_batch_norm() -> FlatNetwork:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 3, 4), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 1))
    return FlatNetwork(layers, torch.device("cpu"))


@pytest.mark.parametrize(("rows", "sizes"), [(17, [8, 9]), (9, [9]), (8, [8]), (10, [8, 2])])
def test_no_batch_of_one_image_reaches_batch_norm(rows, sizes):
    network, seen = with_batch_norm(), []
    network.module.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    train_(network, data_of(rows), np.arange(rows), train_config(), masked_bce, np.random.default_rng(5))
    assert seen == sizes  # 1 x 1 maps: torch refuses a batch of one


def test_without_batch_norm_the_last_image_of_a_pass_may_be_alone():
    assert [len(batch) for batch in batches(np.arange(17), train_config(), np.random.default_rng(0))] == [8, 8, 1]


def test_the_moving_average_is_what_a_site_sends():
    config = train_config(ema=0.5, batch_size=8)
    path = [trained(train_config(local_steps=steps)) for steps in (1, 2, 3)]
    average = linear().weights().parameters
    for weights, decay in zip(path, (2 / 11, 3 / 12, 4 / 13), strict=True):  # all below 0.5
        average = decay * average + (1 - decay) * weights
    np.testing.assert_allclose(trained(config), average, atol=1e-6)


def test_the_decay_of_the_moving_average_rises_to_what_was_asked_for():
    low = 0.25  # from the second step on
    path = [trained(train_config(local_steps=steps)) for steps in (1, 2, 3)]
    average = linear().weights().parameters
    for weights, decay in zip(path, (2 / 11, low, low), strict=True):
        average = decay * average + (1 - decay) * weights
    np.testing.assert_allclose(trained(train_config(ema=low)), average, atol=1e-6)


def test_a_short_round_with_a_slow_average_sends_what_it_learned():
    start, last = linear().weights().parameters, trained(train_config(local_steps=10))
    sent = trained(train_config(local_steps=10, ema=0.999))
    assert np.linalg.norm(sent - last) < 0.2 * np.linalg.norm(start - last)


def test_early_stopping_keeps_the_best_pass():
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.5])
    context = RoundContext(validation=lambda: next(losses))
    stopped = trained(train_config(local_epochs=5, patience=2), context=context)
    assert next(losses) == 0.5, "two passes without improvement end the round"
    np.testing.assert_array_equal(stopped, trained(train_config(local_epochs=2)))


@pytest.mark.parametrize(
    ("accumulate", "after"), [(1, [3, 6, 9, 12]), (2, [2, 3, 5, 6]), (3, [1, 2, 3, 4]), (5, [1, 2, 3]), (99, [1])]
)
def test_patience_judges_after_every_pass_whatever_is_accumulated(accumulate, after):
    judged, taken = [], []

    def validation() -> float:
        judged.append(len(taken))
        return 0.0

    context = RoundContext(validation=validation, correction=lambda: taken.append(1))
    trained(train_config(local_epochs=4, patience=9, accumulate=accumulate), context=context)  # three batches in a pass
    assert judged == after


def test_the_best_pass_leaves_with_the_statistics_of_that_pass():
    losses = iter([1.0, 2.0, 3.0])
    context = RoundContext(validation=lambda: next(losses))
    sent = []
    for config, circumstances in ((train_config(local_epochs=3, patience=9), context), (train_config(), None)):
        network = with_batch_norm()
        train_(network, data_of(24), np.arange(24), config, masked_bce, np.random.default_rng(5), circumstances)
        sent.append(network.weights())
    np.testing.assert_array_equal(sent[0].parameters, sent[1].parameters)
    np.testing.assert_array_equal(sent[0].buffers, sent[1].buffers)


def test_the_moving_average_is_of_running_statistics_too():
    network = with_batch_norm()
    config = train_config(ema=0.5, batch_size=24)
    train_(network, data_of(24), np.arange(24), config, masked_bce, np.random.default_rng(5))
    images, start = torch.from_numpy(data_of(24).images), with_batch_norm().module
    last = 0.9 * start[1].running_mean + 0.1 * start[0](images).mean((0, 2, 3))
    torch.testing.assert_close(network.module[1].running_mean, (9 / 11 * last).detach())
    assert int(network.module[1].num_batches_tracked) == 1


def test_an_average_and_the_best_pass_are_not_asked_for_at_once():
    with pytest.raises(ConfigError, match=r"train\.patience.*train\.ema"):
        train_config(ema=0.5, patience=2)


@pytest.mark.parametrize(
    ("keys", "progress", "factor"),
    [
        ({}, 3.2, 1.0),
        ({"schedule": "cosine", "rounds": 10}, 0.0, 1.0),
        ({"schedule": "cosine", "rounds": 10}, 5.0, 0.5),
        ({"schedule": "cosine", "rounds": 10}, 10.0, 0.0),
        ({"warmup_rounds": 2.0}, 0.5, 0.25),
        ({"warmup_rounds": 2.0, "schedule": "cosine", "rounds": 10}, 5.0, 0.5),
        ({"schedule": "plateau"}, 1.0, 0.09),
    ],
)
def test_learning_rate_factor_by_hand(keys, progress, factor):
    assert learning_rate_factor(train_config(**keys), progress, 0.09) == pytest.approx(factor)


def test_a_plateau_lowers_the_rate_once_for_every_patience_and_for_good():
    config, progress = train_config(schedule="plateau", plateau_factor=0.1), Progress()
    factors = []
    for round, value in enumerate((0.5, 0.4, 0.4, 0.4, 0.4, 0.6, 0.5, None, 0.5), start=1):
        progress.select(round, value, plateau_patience=2)
        factors.append(plateau_factor(config, progress.falls))
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001])


def test_a_plateau_needs_a_set_of_the_servers():
    values = {"task": {"labels": ["a"]}, "data": {"sites": ["a.csv"]}, "train": {"schedule": "plateau"}}
    with pytest.raises(ConfigError, match=r"data\.server"):
        run_file.validate(values)
    settings_from(settings_for_sites(run_file.validate({**values, "data": {"sites": ["a.csv"], "server": "b.csv"}})))


def test_a_warm_up_trains_less_in_the_first_round():
    start = linear().weights().parameters
    warm = trained(train_config(warmup_rounds=2.0), context=RoundContext(round=1))
    full = trained(train_config(warmup_rounds=2.0), context=RoundContext(round=3))
    assert np.abs(warm - start).max() < 0.5 * np.abs(full - start).max()


def test_bfloat16_stays_close_and_keeps_weights_in_float32():
    half, full = trained(train_config(precision="bfloat16")), trained(train_config())
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.01


def test_a_loss_is_of_float32_whatever_the_precision():
    seen = []

    def loss(logits, targets):
        seen.append(logits.dtype)
        return masked_bce(logits, targets)

    for config in (train_config(precision="bfloat16"), train_config()):
        train_(linear(), data_of(8), np.arange(8), config, loss, np.random.default_rng(5))
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize(("units", "same_as"), [(True, "bfloat16"), (False, "float32")])
def test_precision_auto_is_bfloat16_where_the_machine_multiplies_it(units, same_as, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: units)
    np.testing.assert_array_equal(trained(train_config(precision="auto")), trained(train_config(precision=same_as)))


def test_the_machine_says_itself_whether_it_multiplies_bfloat16():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert precision.multiplies_bfloat16("cpu") == ("amx_bf16" in flags)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 4, 5), (2, 1, 3, 4, 5)], ids=str)
def test_channels_last_reaches_convolutions_of_one_channel_too(shape):
    images = torch.rand(shape)
    ordered = channels_innermost(images)
    assert torch.equal(ordered, images)
    assert ordered.stride(1) == 1 and ordered.stride(-1) == shape[1]
    convolution = (nn.Conv2d if images.ndim == 4 else nn.Conv3d)(shape[1], 6, 3, padding=1)
    assert convolution(ordered).stride(1) == 1


def test_channels_last_changes_nothing_but_the_order_of_memory():
    np.testing.assert_allclose(trained(train_config(channels_last=True)), trained(train_config()), atol=1e-6)


def test_augmentation_depends_on_the_seed_alone():
    changed = train_config(augment=["flip", "noise"])
    np.testing.assert_array_equal(trained(changed), trained(changed))
    assert np.abs(trained(changed) - trained(train_config())).max() > 0


def test_frozen_parameters_stay():
    network, data = linear(), data_of(8)
    network.module[1].bias.requires_grad_(False)
    before = network.weights().parameters.copy()
    train_(network, data, np.arange(8), train_config(optimizer="adamw"), masked_bce, np.random.default_rng(1))
    assert network.weights().parameters[16] == before[16]
    assert (network.weights().parameters[:16] != before[:16]).all()


def test_balanced_sampling_brings_rare_labels_as_often():
    targets = np.zeros((100, 2), np.float32)
    targets[:4, 0] = 1
    data = Dataset(images=np.zeros((100, 1, 2, 2), np.float32), targets=targets, patients=tuple(map(str, range(100))))
    rows = np.arange(100)
    task = run_file.validate({"task": {"labels": ["a", "b"]}}).task
    weights = balanced_weights(data, rows, task)
    assert weights[:4].sum() == pytest.approx(weights[4:].sum())
    drawn = np.concatenate(list(batches(rows, train_config(local_epochs=20), np.random.default_rng(0), weights)))
    assert len(drawn) == 2000
    assert 0.45 < (drawn < 4).mean() < 0.55


def test_balanced_class_weights_by_hand():
    targets = np.array([[1, 1], [0, 1], [0, 1], [np.nan, 1]], np.float32)
    data = Dataset(images=np.zeros((4, 1, 2, 2), np.float32), targets=targets, patients=tuple("abcd"))
    np.testing.assert_allclose(balanced_positive_weights(data, np.arange(4)), [2, 1])  # no negative: left alone


def test_labels_are_counted_without_reading_an_image():
    class Unread(Dataset):
        def batch(self, rows, **keys):
            raise AssertionError("an image was read")

    whole, rows = data_of(200), np.arange(0, 200, 3)
    task = run_file.validate({"task": {"labels": ["a"]}}).task
    unread = Unread(whole.images, whole.targets, whole.patients)
    positive = whole.targets[rows].mean()
    np.testing.assert_allclose(balanced_positive_weights(unread, rows), [(1 - positive) / positive], rtol=1e-6)
    assert balanced_weights(unread, rows, task).sum() == pytest.approx(2)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_round_that_was_cut_off_ends_with_the_same_bits(tmp_path, optimizer, at):
    average = {"ema": 0.9} if optimizer == "sgd" else {"patience": 9}
    config = train_config(optimizer=optimizer, momentum=0.9, local_epochs=2, augment=["noise"], **average)

    def unfinished(task: str) -> Unfinished:
        return Unfinished(path=tmp_path / "state" / "round.safetensors", identify=lambda: task, every_s=0.0)

    def network() -> FlatNetwork:
        torch.manual_seed(0)
        hidden = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        module = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 1))
        return FlatNetwork(module, torch.device("cpu"))

    def go(flat: FlatNetwork, loss, where: Unfinished | None) -> np.ndarray:
        passes = iter(range(9))
        context = RoundContext(unfinished=where, validation=lambda: float(next(passes)))  # the first is the best
        train_(flat, data_of(24), np.arange(24), config, loss, np.random.default_rng(5), context)
        return np.concatenate([flat.weights().parameters, flat.weights().buffers])

    steps = 0

    def loss_that_is_killed(logits, targets):
        nonlocal steps
        steps += 1
        if steps > at:
            raise Killed
        return masked_bce(logits, targets)

    whole = go(network(), masked_bce, None)
    with pytest.raises(Killed):
        go(network(), loss_that_is_killed, unfinished("this"))
    steps = at - 100  # from here on it counts how many steps the second process takes
    np.testing.assert_array_equal(go(network(), loss_that_is_killed, unfinished("this")), whole)
    assert steps == 6 - 100, "only the missing steps were taken"
    assert unfinished("another").load() is None


def test_a_round_that_early_stopping_had_ended_before_a_kill_trains_no_further(tmp_path):
    config = train_config(local_epochs=5, patience=2, momentum=0.9)
    steps, judged = [], iter([1.0, 2.0, 3.0, 0.5, 0.4])

    def go(where: Unfinished | None) -> np.ndarray:
        context = RoundContext(unfinished=where, validation=lambda: next(judged), correction=lambda: steps.append(1))
        return trained(config, context=context)

    saved = Unfinished(path=tmp_path / "round.safetensors", identify=lambda: "this", every_s=0.0)
    whole = go(saved)
    assert len(steps) == 9, "three passes of three batches"
    assert saved.load()[0]["stale"] == 2, "it is killed before the state is cleared"
    np.testing.assert_array_equal(go(saved), whole)
    assert len(steps) == 9
    assert next(judged) == 0.5


def test_an_unreadable_state_of_a_round_is_ignored(tmp_path):
    path = tmp_path / "round.safetensors"
    path.write_bytes(b"torn")
    assert Unfinished(path=path, identify=lambda: "x", every_s=0.0).load() is None


@pytest.mark.simulation
def test_a_site_killed_inside_a_round_goes_on_in_that_round(toy_config, simulate, tmp_path, monkeypatch):
    train = {"local_epochs": 4, "save_every_s": 1e-6, "batch_size": 8, "rounds": 2}
    parameters = {}
    for name, marker in (("whole", ""), ("killed", str(tmp_path / "marker"))):
        monkeypatch.setenv(FRAGILE, marker)
        result, folder = simulate(toy_config("a-40", "b-40", model={"name": "toy:fragile"}, train=train))
        assert result["status"] == "completed", result["reason"]
        parameters[name] = load_file(folder.path / "checkpoints" / "round-0002.safetensors")["parameters"]
        assert not list((folder.path / "sites").glob("*/unfinished*")), "a finished round leaves no state"
    assert (tmp_path / "marker").read_text() == "killed"
    np.testing.assert_array_equal(parameters["killed"], parameters["whole"])


def test_nothing_is_left_of_a_patient_who_withdrew_between_a_kill_and_the_retry(toy_config, tmp_path, monkeypatch):
    monkeypatch.setenv(FRAGILE, str(tmp_path / "marker"))
    train = {"local_epochs": 2, "save_every_s": 1e-6, "batch_size": 4}
    config = toy_config("a-40", model={"name": "toy:fragile"}, train=train, evaluate={"site_share": 0.2})
    sent = {}
    for name in ("killed", "anew"):
        visits = Visits(config, tmp_path / name)
        task, site = visits.task(1, flat(config).weights()), visits.site("a-40")
        if name == "killed":  # after 14 of 16 steps
            process = multiprocessing.get_context("fork").Process(target=train_round, args=(task, site))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert (tmp_path / name / "a-40" / "unfinished-round.safetensors").exists() == (name == "killed")
        sent[name] = train_round(task, replace(site, withdrawn=frozenset({f"{PLANTED}-a-3"})))
    assert sent["killed"].num_examples == sent["anew"].num_examples == 30
    np.testing.assert_array_equal(sent["killed"].weights.parameters, sent["anew"].weights.parameters)
