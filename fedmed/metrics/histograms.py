"""Scores as histograms: what a site sends instead of scores, the metrics of them, and the most that bins can hide.

A site counts how many positives and negatives fell into each of 4096 bins of the logit, which is clipped to ±16, where
the probability is within 10⁻⁶ of 0 or 1. Histograms with the same bins add up over sites. Scores in one bin are in an
unknown order, which is all that is lost; how much that can be is computed from the counts themselves.

Bins are even steps of asinh((logit - centre) / 0.03): about as wide everywhere as 1/290 of the distance to the centre,
and 10⁻⁴ wide within 0.03 of it. Two overlapping normal distributions around the centre, of any standard deviation from
0.02 to 5, keep an AUROC that the order within bins can move by less than 10⁻³, where even bins of 1/128 need one above
1. Precision at the top of the list weighs more in the average precision, whose bound is up to five times as large.

A network that was barely trained has logits of such a small spread, but around the bias of its last layer: those of
CheXNet, two to eight steps into chest X-rays, lie at -2 to -6 with standard deviations of 0.01 to 0.03. Only bins
around a centre near them tell those apart. Histograms add up only if the centre is the same at all sites, so the server
names it, from the logits of its own patients (`bin_centres`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from fedmed.errors import DataError
from fedmed.metrics.ranking import SLACK, SPECIFICITY, Array, RankingMetrics, metrics_of_counts

BINS = 4096
LIMIT = 16.0  # logits are clipped to ±LIMIT
LINEAR = 0.03  # logits this near to the centre have bins of about the same width


class HistogramRanking(NamedTuple):
    """Ranking metrics of L labels, and how far each can be from that of the scores; NaN where a class is absent."""

    value: RankingMetrics  # each (L,)
    bound: RankingMetrics  # each (L,)


def bin_edges(centre: float = 0.0, bins: int = BINS) -> Array:
    """Returns the 4097 ascending edges of the bins, from -16 to 16. Bin i holds edge i < logit ≤ edge i + 1.

    Around 0, which is an edge, the bins of positive and of negative logits mirror each other.

    Args:
        centre: The logit around which the bins are finest, from -16 to 16.
        bins: Fewer of them, coarser everywhere, where every bin has to bear noise.
    """
    first, last = np.arcsinh((-LIMIT - centre) / LINEAR), np.arcsinh((LIMIT - centre) / LINEAR)
    edges: Array = centre + LINEAR * np.sinh(np.linspace(first, last, bins + 1))
    return edges


def bin_centres(logits: NDArray[np.floating]) -> list[float]:
    """Returns L centres for the bins of other patients: the medians of logits (N, L), 0 without any, within ±16."""
    medians = np.median(logits, axis=0) if len(logits) else np.zeros(logits.shape[1])
    return [float(median) for median in np.clip(medians, -LIMIT, LIMIT)]


def check_centres(centres: Sequence[float] | None, labels: int) -> None:
    """Refuses centres that are not one for each label, or not between -16 and 16, with a DataError."""
    if centres is not None and not (len(centres) == labels and (np.abs(np.asarray(centres)) <= LIMIT).all()):
        raise DataError(f"expected {labels} centres of histograms, one for each label, between ±{LIMIT:g}")


def score_histograms(
    logits: NDArray[np.floating], chosen: NDArray[np.bool_], centres: Sequence[float] | None = None
) -> Array:
    """Returns (L * 4096,) counts of the chosen (N, L) logits, label after label and in each from the lowest bin up.

    Args:
        logits: (N, L), finite.
        chosen: (N, L), which of them count.
        centres: L logits around which the bins are finest; 0 for every label if None.
    """
    histograms = np.zeros((logits.shape[1], BINS))
    for label, column in enumerate(logits.T):
        inner = bin_edges(centres[label] if centres is not None else 0.0)[1:-1]  # beyond the last edge: the last bin
        bins = np.searchsorted(inner, column[chosen[:, label]].astype(np.float64))
        histograms[label] = np.bincount(bins, minlength=BINS)
    return histograms.ravel()


def ranking_of_histograms(positives: Array, negatives: Array) -> HistogramRanking:
    """Returns the ranking metrics of histograms, and for each the most that the order within bins can change it.

    * AUROC counts each pair in one bin as half. Its bound is half of the share of such pairs: all positives of a bin
      above its negatives, or all below.
    * Average precision counts half of a bin's cases before its middle positive. Counting them all first, as if tied,
      would be off by up to 0.01 for a few hundred images whose scores all differ. Its bound is reached with the
      negatives of every bin first, or with its positives first and tied.
    * Sensitivity is that of a bin's edge, so that a threshold reaches it. The exact one may be larger, by no more than
      the share of positives in the bin in which the false positives become too many.

    Args:
        positives: (L, 4096) counts of positives, from the lowest bin up.
        negatives: (L, 4096) counts of negatives.
    """
    here, others = positives[:, ::-1].T, negatives[:, ::-1].T  # (4096, L), highest bin first
    true, false = np.cumsum(here, axis=0), np.cumsum(others, axis=0)  # (4096, L)
    tied = metrics_of_counts(true, false)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = true - (here - 1) / 2
        average = np.nansum(here * middle / (middle + false - others / 2), axis=0) / true[-1]
        low, high = (values.sum(axis=0) / true[-1] for values in _extreme_precisions(here, others, true, false))
        area_bound = 0.5 * (here * others).sum(axis=0) / (true[-1] * false[-1])
        crossed = np.argmax(false > (1 - SPECIFICITY + SLACK) * false[-1], axis=0)  # (L,)
        sensitivity_bound = here[crossed, np.arange(here.shape[1])] / true[-1]
    undefined = np.isnan(tied.auroc)
    return HistogramRanking(
        RankingMetrics(tied.auroc, np.where(undefined, np.nan, average), tied.sensitivity),
        RankingMetrics(
            *(
                np.where(undefined, np.nan, bound)
                for bound in (area_bound, np.maximum(high - average, average - low), sensitivity_bound)
            )
        ),
    )


def _extreme_precisions(here: Array, others: Array, true: Array, false: Array) -> tuple[Array, Array]:
    """Returns the least and the most that a bin's positives can add to P times the average precision.

    With T positives and F negatives above a bin of p and n, its j-th positive has at least the precision
    (T + j) / (T + j + F + n) and at most (T + p) / (T + p + F). The sum of the former over j is
    p - C (ψ(T + C + p + 1) - ψ(T + C + 1)) with C = F + n and the digamma function ψ.
    """
    above = true - here
    least = here - false * (digamma(true + false + 1) - digamma(above + false + 1))
    most = here * true / np.maximum(true + false - others, 1)
    return least, most
