"""What a robust rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.federated.combiners.rows import Matrix
from fedmed.types import FloatVector

Shares = NDArray[np.float64]  # (n,) ≥ 0, of sum 1


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How n updates, of which f may be anything, become one. Every site counts once, whatever it claims.

    Shares from the updates' distances select or weigh whole updates; a function of the values in each coordinate then
    combines what was selected. Without shares all are selected, without that function their weighted mean is taken.
    """

    name: str  # as in strategy.combine
    least: Callable[[int], int]  # f to the smallest n
    shares: Callable[[NDArray[np.float64], int], Shares] | None = None  # (n, n) squared distances, f
    coordinates: Callable[[Matrix, int], FloatVector] | None = None  # (n, columns), f to (columns,)


def too_few(rule: Rule, dishonest: int, count: int) -> str | None:
    """Why `count` sites are too few for a rule, or None."""
    least = rule.least(dishonest)
    if count >= least:
        return None
    asked = f'strategy.combine = "{rule.name}" with strategy.dishonest-sites = {dishonest}'
    return f"{asked} needs {least} sites; there are {count}"
