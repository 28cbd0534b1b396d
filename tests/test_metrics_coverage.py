"""How often a 95 % interval holds the true value, where images of a patient are alike. See docs/compare.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedmed.metrics import Cases, classification_measures, percentiles, replicate, segmentation_measures
from fedmed.metrics.bootstrap import Measures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Trial = Callable[[np.random.Generator], tuple[Measures, Sequence[str]]]  # measures of images, and whose they are
TRIALS = 1200
SHARED = 0.7  # of the variance of a score is between patients
MIDDLE = 0.7602499389065233  # Φ(1 / √2)


def coverage(name: str, truth: float, trial: Trial) -> float:
    covered = 0
    for number in range(TRIALS):
        rng = np.random.default_rng(number)
        measures, patients = trial(rng)
        place = measures.names.index(name)

        def one(weights: np.ndarray, measures: Measures = measures, place: int = place) -> np.ndarray:
            return measures.statistic(weights)[place]

        low, high = percentiles(replicate(one, patients, 1000, rng)[0])
        covered += low <= truth <= high
    return covered / TRIALS


def resembling(of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Standard normal values of images of the given patients."""
    people = rng.normal(size=of[-1] + 1)
    return np.sqrt(SHARED) * people[of] + np.sqrt(1 - SHARED) * rng.normal(size=len(of))


def ranked(people: int, share: float, apart: float) -> Trial:
    """Three images of each patient; scores of those with the finding are normal and so far above the others'."""

    def trial(rng: np.random.Generator) -> tuple[Measures, Sequence[str]]:
        of = np.repeat(np.arange(people), 3)
        targets = (rng.random(people) < share).astype(float)[of]
        scores = apart * targets + resembling(of, rng)
        return classification_measures(scores[:, None], targets[:, None], ["x"]), [f"p{i}" for i in of]

    return trial


def average_precision(share: float, apart: float) -> float:
    """∫ P(positive | score ≥ s) over the scores s of positives, of normal scores."""

    def precision_at(score: float) -> float:
        true, false = share * norm.sf(score - apart), (1 - share) * norm.sf(score)
        return norm.pdf(score - apart) * true / (true + false)

    return quad(precision_at, -8, 8 + apart)[0]


def segmented(people: int) -> Trial:
    """One to five cases of each patient, whose Dice has a tail to the left and the mean `MIDDLE`."""

    def trial(rng: np.random.Generator) -> tuple[Measures, Sequence[str]]:
        of = np.repeat(np.arange(people), 1 + np.arange(people) % 5)
        dice = norm.cdf(1 + resembling(of, rng))[:, None]
        nothing, voxels = np.zeros_like(dice), np.full_like(dice, 1000.0)
        cases = Cases(
            loss=nothing[:, 0],
            intersection=1000 * dice,
            predicted=voxels,
            true=voxels,
            hd95=nothing,
            assd=nothing,
            lesions=nothing,
            lesions_found=nothing,
            lesions_invented=nothing,
        )
        return segmentation_measures(cases, ["x"]), [f"p{i}" for i in of]

    return trial


def test_auroc() -> None:
    assert 0.93 <= coverage("auroc/x", MIDDLE, ranked(150, 0.4, 1.0)) <= 0.97


@pytest.mark.parametrize(
    ("people", "share", "apart", "least", "most"),
    [
        (300, 0.2, 1.0, 0.93, 0.97),
        (300, 0.2, 2.0, 0.93, 0.97),
        (100, 0.2, 1.0, 0.93, 0.97),
        (100, 0.1, 1.0, 0.91, 0.93),  # ten who have it
        (100, 0.4, 2.0, 0.91, 0.93),  # the true value is 0.89
    ],
)
def test_auprc_unless_few_have_the_label_or_it_is_near_one(people, share, apart, least, most) -> None:
    assert least <= coverage("auprc/x", average_precision(share, apart), ranked(people, share, apart)) <= most


@pytest.mark.parametrize(
    ("people", "least", "most"),
    [(150, 0.93, 0.97), (60, 0.93, 0.97), (40, 0.91, 0.93), (20, 0.91, 0.93), (10, 0.87, 0.9)],
)
def test_mean_dice_from_sixty_patients_on(people, least, most) -> None:
    assert least <= coverage("dice/x", MIDDLE, segmented(people)) <= most
