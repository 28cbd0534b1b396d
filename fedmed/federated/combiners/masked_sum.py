"""The sum of masked updates: the server adds up what it cannot read, and opens the total alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmed.errors import UpdateRefused
from fedmed.federated.aggregation import Aggregate, Contribution
from fedmed.federated.combiners.base import RoundTerms, weight_of
from fedmed.privacy.secure_sum import (
    BUFFER_STEP,
    FEWEST,
    PARAMETER_STEP,
    ROOM,
    add_mask_,
    from_ring,
    own_seed,
    sign_of,
)
from fedmed.training.moments import second_moments, variances
from fedmed.types import Scalar, Update, Weights

SEED = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What one site gives to open a sum, by the other sites' names. All of it is worthless for any other sum."""

    pieces: Mapping[str, bytes]  # of the own seeds of sites whose updates came
    masks: Mapping[str, bytes]  # that it has in common with sites whose updates did not come
    own: Mapping[str, bytes]  # the pieces of its own seed that only those know


class MaskedSum:
    """Σ kᵢ·Δᵢ / Σ kᵢ of which no single Δᵢ is ever known: `fedmed.privacy.secure_sum`.

    Masks of sites that did not answer are taken out by what the others give. The weights kᵢ are in clear, as they are
    without masks. Integer buffers are the rounded mean.
    """

    def __init__(self, terms: RoundTerms) -> None:
        """Start from nothing."""
        self._terms = terms
        self._total = np.zeros(terms.layout.num_parameters + terms.layout.num_buffers, np.uint64)
        self._contributions: list[Contribution] = []

    @property
    def sites(self) -> tuple[str, ...]:
        """Whose updates are in the sum."""
        return tuple(each.site for each in self._contributions)

    def add(self, site: str, update: Update, weights: Weights) -> None:
        """Add a masked update.

        Raises:
            UpdateRefused: it says no weight, or is not masked.
        """
        weight = weight_of(update, self._terms.strategy.weight_by)
        if update.masked is None:
            raise UpdateRefused("the update is not masked")
        np.add(self._total, update.masked, out=self._total)  # modulo 2⁶⁴
        self._contributions.append(Contribution(site=site, weight=weight, facts=update.facts))

    def too_few(self) -> str | None:
        """Of two sites, each would know the other's part."""
        count = len(self._contributions)
        return None if count >= FEWEST else f"{count} sites took part; a secure sum needs {FEWEST}"

    def open_(self, seeds: Mapping[str, Seeds], asked: Sequence[str]) -> None:
        """Take all masks out of the sum.

        Args:
            seeds: of every site in it.
            asked: all sites that have masks in common.

        Raises:
            UpdateRefused: what is left is still noise, which no honest sum looks like.
        """
        here, gone = self.sites, [site for site in asked if site not in self.sites]
        for site in here:
            pieces = {other: seeds[other].pieces[site] for other in here if other != site}
            add_mask_(self._total, own_seed(pieces | {other: seeds[site].own[other] for other in gone}), -1)
            for other in gone:
                add_mask_(self._total, seeds[site].masks[other], -sign_of(site, other))
        values = self._total.view(np.int64)
        if values.size and max(int(values.max()), -int(values.min())) > ROOM:
            raise UpdateRefused("what the sites gave does not open it: one of them gave something else, or masked so")

    def result(self) -> Aggregate:
        """The mean, once the sum is open."""
        terms = self._terms
        weight, size = sum(each.weight for each in self._contributions), terms.layout.num_parameters
        moments = from_ring(self._total[size:], weight, BUFFER_STEP)
        moments += second_moments(terms.sent.buffers, terms.layout)
        buffers = variances(moments, terms.layout)
        for entry in terms.layout.buffers:
            if entry.integer:
                buffers[entry.span] = np.rint(buffers[entry.span])
        return Aggregate(
            change=from_ring(self._total[:size], weight, PARAMETER_STEP),
            buffers=buffers,
            contributions=tuple(self._contributions),
            known=terms.known,
        )


def seeds_in(facts: Mapping[str, Scalar], site: str, *, joined: Sequence[str], asked: Sequence[str]) -> Seeds:
    """What a site gave to open a sum.

    Args:
        facts: of its answer.
        site: its name.
        joined: whose updates are in the sum.
        asked: who was asked for one.

    Raises:
        UpdateRefused: it gave something else than what opens this sum.
    """
    others, gone = set(joined) - {site}, set(asked) - set(joined)
    try:
        given = json.loads(str(facts["seeds"]))
        parts = {name: dict(given[name]) for name in ("pieces", "masks", "own")}
        sound = [set(parts["pieces"]) == others, set(parts["masks"]) == gone, set(parts["own"]) == gone]
        sound += [bool(SEED.fullmatch(seed)) for part in parts.values() for seed in part.values()]
    except (KeyError, TypeError, ValueError, RecursionError):
        sound = [False]
    if not all(sound):
        raise UpdateRefused("its answer does not open the sum")
    return Seeds(**{name: {who: bytes.fromhex(seed) for who, seed in part.items()} for name, part in parts.items()})
