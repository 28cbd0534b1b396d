"""The sum of clipped changes with the server's noise: all that a round with central privacy shows of its sites."""

from __future__ import annotations

import numpy as np

from fedmed.errors import RunFailed
from fedmed.federated.aggregation import Aggregate, Contribution
from fedmed.federated.central import ServerNoise
from fedmed.federated.combiners.base import RoundTerms
from fedmed.privacy.central import clip_change, noised_mean
from fedmed.types import Update, Weights


class NoisedSum:
    """(Σ clip(Δᵢ, C) + N(0, σ²C²)) / K  (McMahan et al. 2018, arXiv:1710.06963, the fixed-denominator estimator).

    Every site counts alike, and one that does not answer counts as zero. K is the run's own number and no count of
    answers. Buffers stay the server's; facts and vectors of the sites go no farther than this.
    """

    def __init__(self, terms: RoundTerms, noise: ServerNoise) -> None:
        """Start from nothing.

        Raises:
            RunFailed: there are more sites than the sum is divided by.
        """
        self._terms, self._noise = terms, noise
        if terms.known > self._noise.sites:
            raise RunFailed(
                f"{terms.known} sites take part, and the sum is divided by {self._noise.sites}; set privacy.sites "
                "to the number that the run is meant for"
            )
        self._sum = np.zeros(terms.layout.num_parameters, np.float64)  # so that adding up rounds nothing beyond C
        self._sites: list[str] = []
        self._unclipped = 0

    def add(self, site: str, update: Update, weights: Weights) -> None:
        """Add a site's clipped change.

        Raises:
            UpdateRefused: it is not finite.
        """
        clipped = clip_change(weights.parameters - self._terms.sent.parameters, self._noise.clip)
        self._sum += clipped.change
        self._unclipped += clipped.unclipped
        self._sites.append(site)

    def too_few(self) -> str | None:
        """Noise alone is a release too."""
        return None

    def result(self) -> Aggregate:
        """Count the release, draw the noise, and move the clip.

        Raises:
            RunFailed: the budget does not allow it.
            OSError: it cannot be written down; then nothing is released.
        """
        noise, clip = self._noise, self._noise.clip
        noise.released(self._terms.round)
        change = noised_mean(
            self._sum, clip=clip, count=noise.sites, noise_multiplier=noise.noise_multiplier, generator=noise.generator
        )
        noise.follow(self._terms.round, unclipped=self._unclipped, clipped=len(self._sites) - self._unclipped)
        said = noise.facts()
        return Aggregate(
            change=change,
            buffers=self._terms.sent.buffers,
            contributions=tuple(Contribution(site=site, weight=1.0) for site in self._sites),
            known=self._terms.known,
            facts={"epsilon": said["epsilon"], "clip": clip},
        )
