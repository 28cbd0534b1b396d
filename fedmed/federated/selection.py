"""Which sites a round asks: all of them, a sample, or one in turn. The same seed and round give the same sites."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection

import numpy as np


def share_of(count: int, fraction: float) -> int:
    """The fraction of a count, rounded up; 0.28 of 25 is 7, though the product of the two floats is a bit more."""
    return math.ceil(fraction * count - 1e-9)


def sample_size(count: int, *, fraction: float, least: int) -> int:
    """How many of `count` sites a round asks: the fraction, rounded up, and never fewer than `least` of them."""
    return min(count, max(share_of(count, fraction), least))


def sampled(
    sites: Collection[str], *, size: int, always: Collection[str] = (), seed: int, round: int
) -> tuple[str, ...]:
    """A sample of sites, uniform without replacement, by name.

    The generator is seeded by SHA-256 over (seed, round): the sample does not depend on what was drawn before, so a
    resumed run draws the same one.

    Args:
        sites: who can be asked.
        size: how many of them are asked, if there are as many.
        always: sites that are in every sample; they count towards its size.
        seed: of the run.
        round: of the run, 1-based.

    Returns:
        Names in alphabetical order.
    """
    names = sorted(sites)
    chosen = {name for name in names if name in always}
    others = [name for name in names if name not in chosen]
    digest = hashlib.sha256(f"selection/{seed}/{round}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:16], "big")).permutation(len(others))
    chosen.update(others[place] for place in order[: max(size - len(chosen), 0)])
    return tuple(sorted(chosen))


def in_turn(sites: Collection[str], *, here: Collection[str], round: int) -> tuple[str, ...]:
    """Who is asked one after the other until one has done its part: by name, from the site whose turn it is.

    Turns count all `sites` of the run, so that nobody's depends on who is away; only those that are `here` are asked.
    """
    names = sorted(sites)
    first = (round - 1) % max(len(names), 1)
    return tuple(name for name in [*names[first:], *names[:first]] if name in here)
