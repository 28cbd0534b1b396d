"""Privacy that is broken on purpose: every fault makes the proof fail that is there to find it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_privacy_nothing_else as departures
import test_privacy_training as runs
import test_training_private as steps
import torch

from fedmed.privacy.noise import InsecureGenerator
from fedmed.training import account, private, site_round
from fedmed.training.clipping import GradientClipper
from fedmed.training.private import SecretNoiseOptimizer

FAILED = (AssertionError, pytest.fail.Exception)  # the latter where a proof waits for a refusal
clipped, noised, charged, told = (
    GradientClipper.accumulate_, SecretNoiseOptimizer.add_noise, account.charges_of, site_round._facts_of_training,
)  # fmt: skip


def clip_the_mean(self, loss, images, targets, patients, weights=None):
    return clipped(self, loss, images, targets, torch.zeros_like(patients), weights)


def clip_every_image(self, loss, images, targets, patients, weights=None):
    return clipped(self, loss, images, targets, torch.arange(len(images)), weights)


def forget_the_noise(self):
    for parameter in self.params:
        parameter.grad, parameter.summed_grad = parameter.summed_grad, None


def noise_without_the_clip(self):
    self.max_grad_norm = 1.0
    noised(self)


def leave_batch_norm_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GradientClipper, "refuse_mixing", lambda self: None)
    patch.setattr(private, "require_uncoupled", lambda network, data: None)


def remember_the_newest_round_only(ledger, run):
    charges = charged(ledger, run)
    newest = max(number for number, charge in charges.items() if not charge.events)
    return {number: charge for number, charge in charges.items() if charge.events or number == newest}


class OfTheSeed(InsecureGenerator):
    """Noise that follows from the run's seed and calls itself secret."""

    secret = True


def tell_the_loss(own, outcome, *given):
    return {**told(own, outcome, *given), "loss": outcome.trained.loss}


@dataclass(frozen=True)
class Given:
    """What pytest would give to a proof that is called by hand."""

    toy_config: Callable
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch


def put(target: object, name: str, value: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(target, name, value)


BROKEN = {
    "the mean is clipped": (
        put(GradientClipper, "accumulate_", clip_the_mean),
        lambda given: steps.test_p06_a_step_is_the_sum_of_one_clipped_mean_gradient_of_each_patient(),
    ),
    "every image is clipped, and the patient is not": (
        put(GradientClipper, "accumulate_", clip_every_image),
        lambda given: steps.test_p06_p07_taking_a_patient_away_moves_the_sum_by_the_clip_at_most(7, ()),
    ),
    "BatchNorm is left in": (
        leave_batch_norm_in,
        lambda given: steps.test_p07_refuses_a_network_that_couples_the_images_of_a_batch(),
    ),
    "noise is forgotten": (
        put(SecretNoiseOptimizer, "add_noise", forget_the_noise),
        lambda given: steps.test_p05_noise_has_the_variance_that_it_is_said_to_have(),
    ),
    "noise is not scaled to the clip": (
        put(SecretNoiseOptimizer, "add_noise", noise_without_the_clip),
        lambda given: steps.test_p05_noise_has_the_variance_that_it_is_said_to_have(),
    ),
    "noise follows from the run's seed": (
        put(account, "noise_generator", lambda kind, seed: OfTheSeed(seed)),
        lambda given: runs.test_p05_the_runs_seed_repeats_nothing(given.toy_config, given.tmp_path),
    ),
    "the account begins anew every round": (
        put(account, "charges_of", remember_the_newest_round_only),
        lambda given: runs.test_p14_a_round_that_is_trained_again_is_charged_again(given.toy_config, given.tmp_path),
    ),
    "the loss leaves": (
        put(site_round, "_facts_of_training", tell_the_loss),
        lambda given: departures.test_p07_what_leaves_follows_from_the_noised_sums_alone(
            {}, given.toy_config, given.tmp_path, given.monkeypatch
        ),
    ),
}


@pytest.mark.parametrize(("broken", "proof"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_on_purpose_fails_its_proof(broken, proof, toy_config, tmp_path, monkeypatch):
    given = Given(toy_config, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(FAILED):
            proof(given)
