"""Opacus' numerical accountant, and nothing else of Opacus: it needs numpy and scipy, the rest brings torch along.

A plan is a matter of a second; importing Opacus takes five. Its accountants' folder is therefore imported under a name
of its own, and the base class of accountants, whose file alone imports optimizers, is given here.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAME = "fedmed_opacus_accountants"


class IAccountant:
    """What Opacus' accountants inherit for the analysis: a history of (noise multiplier, sample rate, steps)."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.history: list[tuple[float, float, int]] = []


@cache
def prv() -> Any:
    """The module `opacus.accountants.analysis.prv`.

    Raises:
        ImportError: Opacus is not installed.
    """
    spec = find_spec("opacus")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("opacus is not installed")
    folder, base = ModuleType(NAME), ModuleType(f"{NAME}.accountant")
    folder.__path__ = [f"{place}/accountants" for place in spec.submodule_search_locations]
    base.__dict__["IAccountant"] = IAccountant
    sys.modules |= {NAME: folder, f"{NAME}.accountant": base}
    return importlib.import_module(f"{NAME}.analysis.prv")
