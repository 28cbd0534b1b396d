"""Opacus' numerical accountant, and nothing else of Opacus: it needs numpy and scipy, the rest brings torch along.

A plan is a matter of a second; importing Opacus takes eight of CPU time. Its accountants' folder is therefore imported
under a name of its own. The one thing that its numerical accountant takes from elsewhere, a bound on ε by Rényi
divergence for the size of its grid, is given here: from `renyi`, whose integrals equal Opacus' series and are faster.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from fedmed.privacy.renyi import ORDERS, step_curve

NAME = "fedmed_opacus_accountants"
PLACES = [place for place, order in enumerate(ORDERS) if order < 11 or 12 <= order <= 63]  # the orders of Opacus


class RDPAccountant:
    """What Opacus' numerical accountant asks of its RDP accountant."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.history: list[tuple[float, float, int]] = []  # (σ, sample rate, steps)

    def get_epsilon(self, delta: float) -> float:
        """ε of the history, converted as Opacus does (Balle et al. 2020, arXiv:1905.09982, theorem 21)."""
        orders = np.array(ORDERS)
        total = np.zeros(len(orders))
        for sigma, rate, steps in self.history:
            total += steps * (orders / (2 * sigma**2) if rate == 1 else step_curve(ORDERS, sigma, rate, images=1))
        analysis = importlib.import_module(f"{NAME}.analysis.rdp")
        return float(analysis.get_privacy_spent(orders=orders[PLACES], rdp=total[PLACES], delta=delta)[0])


@cache
def prv() -> Any:
    """The module `opacus.accountants.analysis.prv`.

    Raises:
        ImportError: Opacus is not installed.
    """
    spec = find_spec("opacus")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("opacus is not installed")
    folder, bounds = ModuleType(NAME), ModuleType(f"{NAME}.rdp")
    folder.__path__ = [f"{place}/accountants" for place in spec.submodule_search_locations]
    bounds.__dict__["RDPAccountant"] = RDPAccountant
    sys.modules |= {NAME: folder, bounds.__name__: bounds}
    return importlib.import_module(f"{NAME}.analysis.prv")
