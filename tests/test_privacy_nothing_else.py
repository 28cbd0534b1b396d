"""Claim 7 as one law: what leaves a site is made of the noised sums of its steps, and of nothing else of its patients.

A run is trained, and what its mechanism releases is written down. Then a hospital with other patients, as many, trains
the same run, and its mechanism is made to release the same numbers: whatever else of the patients reached an answer
would change it.
"""

from pathlib import Path

import numpy as np
import pytest
from private_sites import network_of, site_in, task_of
from toy import dataset

from fedmed.imaging.dataset import Dataset
from fedmed.privacy.egress import HEAD
from fedmed.training import private
from fedmed.training.private import SecretNoiseOptimizer
from fedmed.training.site_round import evaluate_round, site_card, train_round

ROUNDS = (1, 2)


class Tape:
    """Writes down what a site's mechanism releases, and later releases it again in place of what it would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sums, self.clips, self.played = [], [], None
        noised, moved = SecretNoiseOptimizer.add_noise, private.following_clip

        def add_noise(optimizer):
            noised(optimizer)
            if self.played is None:
                self.sums.append([parameter.grad.clone() for parameter in optimizer.params])
                return
            for parameter, released in zip(optimizer.params, self.sums[self.played], strict=True):
                parameter.grad = released.clone()
            self.played += 1

        def following_clip(*given, **named):
            clip = moved(*given, **named)
            if self.played is None:
                self.clips.append(clip)
            return clip if self.played is None else self.clips[self.played - 1]

        monkeypatch.setattr(SecretNoiseOptimizer, "add_noise", add_noise)
        monkeypatch.setattr(private, "following_clip", following_clip)


def uneven(reference: Path, config) -> Dataset:
    """A hospital with other labels, with images that are not numbers, and with more of them of every second patient."""
    data = dataset(reference, config)
    data.images[::8] = np.nan
    more = np.append(np.arange(len(data)), np.arange(0, len(data), 4))
    return Dataset(
        images=data.images[more],
        targets=1 - data.targets[more],
        patients=tuple(data.patients[row] for row in more),
        evaluation=data.evaluation[more],
    )


def said_by(config, site) -> list[object]:
    """All that leaves the site in a run, but for hash and signature of a ledger whose keys it has made itself."""
    control = np.linspace(-1e-3, 1e-3, network_of(config).weights().parameters.size, dtype=np.float32)
    vectors = {"vectors": {"control": control}} if config.strategy.name == "scaffold" else {}
    first = task_of(config, "train", 1, **vectors)
    answers = [train_round(task_of(config, "train", round, **vectors), site) for round in ROUNDS]
    answers.append(evaluate_round(task_of(config, "evaluate", ROUNDS[-1]), site))
    said: list[object] = [site_card(first, site)]
    for answer in answers:
        weights = () if answer.weights is None else (answer.weights.parameters, answer.weights.buffers)
        facts = {name: fact for name, fact in answer.facts.items() if name not in HEAD[1:]}
        said.append([each.tobytes() for each in weights])
        said.append([answer.num_examples, facts, sorted(answer.metrics)])
    return said


SGD = {"rounds": 2, "batch-size": 64, "learning-rate": 0.5, "local-steps": 2}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"optimizer": "adamw", "ema": 0.9, "schedule": "cosine"}},
        {"train": {"momentum": 0.9, "augment": ["flip", "noise"]}, "privacy": {"unit": "image"}},
        {"privacy": {"clipping": "adaptive"}},
        {"privacy": {"clipping": "per-layer", "images-per-patient": 1}, "evaluate": {"sites": "every"}},
        {"strategy": {"name": "fedprox"}},
        {"strategy": {"name": "scaffold"}},
        {"strategy": {"name": "fedbn"}},
        {"strategy": {"name": "ditto"}},
        {"strategy": {"name": "fedavg", "personal-steps": 2}},
    ],
    ids=["sgd", "adamw", "images", "adaptive", "per-layer", "fedprox", "scaffold", "fedbn", "ditto", "fine-tuned"],
)
def test_p07_what_leaves_follows_from_the_noised_sums_alone(sections, toy_config, tmp_path, monkeypatch):
    sections = {name: dict(keys) for name, keys in sections.items()}
    sections["train"] = {**SGD, **sections.get("train", {})}
    sections["privacy"] = {"mode": "dp-sgd", "noise-multiplier": 1.66, **sections.get("privacy", {})}
    config = toy_config("a-400", **sections)
    tape = Tape(monkeypatch)
    first = said_by(config, site_in(tmp_path / "first"))
    assert len(tape.sums) == 2 * len(ROUNDS)
    tape.played = 0
    others = site_in(tmp_path / "others", manifest=Path("b-400"), dataset="test_privacy_nothing_else:uneven")
    assert said_by(config, others) == first
    assert tape.played == len(tape.sums)
