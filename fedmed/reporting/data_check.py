"""The page of a data check, from its facts alone. It shows pictures of patients and stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmed.reporting.pages import fill, write_page

MODE = 0o600  # it shows patients
WORDS = {"pass": "Ready to train.", "warn": "Ready to train; read the warnings.", "fail": "Not ready to train."}


def write_check(facts: Mapping[str, Any], target: Path) -> Path:
    """Write the page, readable by its owner alone.

    Args:
        facts: of `fedmed.intake.check`, as JSON has them.
        target: the file.

    Raises:
        DataError: it cannot be written.
    """
    return write_page(render_check(facts), target, mode=MODE)


def render_check(facts: Mapping[str, Any]) -> str:
    """The page as text."""
    plots = {
        name: {
            "bars": _bars(each["counts"], each["edges"]),
            "range": "{:g} to {:g}".format(*each["range"]),
            "single": _single(each["range"]),
        }
        for name, each in facts["histograms"].items()
    }
    return fill("data_check.html.j2", found=facts, verdict=WORDS[facts["state"]], plots=plots)


def _single(range: list[float]) -> str:
    """Words for a distribution of one value, of which bars would be one slab; else ""."""
    low, high = range
    return f"{low:g} in every case" if low == high else ""


def _bars(counts: list[int], edges: list[float]) -> list[dict[str, Any]]:
    """Bars of a histogram: their range, how many, and their height in percent of the highest."""
    highest = max(counts) or 1
    return [
        {"range": f"{low:g} to {high:g}", "count": count, "height": round(100 * count / highest)}
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
