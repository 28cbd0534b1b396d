"""What all plots share: colours, blank layouts, axes of names and rounds, and texts that plotly shows as they are.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), told apart by people with any colour vision; dashes and marks
repeat what a colour says. Text and grid colours are the page's, set in the browser, so that dark and print both read.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from fedmed.reporting.facts import Estimate
from fedmed.reporting.words import interval, number, plural
from fedmed.types import SMALL

Json = dict[str, object]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot")
CROSS = "×"
GREY = "rgba(128,128,128,0.28)"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure: what plotly.js draws, and what a screen reader says instead."""

    data: list[Json]
    layout: Json
    alt: str
    note: str = ""


def layout_of(*, height: int, margin: Json) -> Json:
    """A blank, transparent plot; height and margins in pixels."""
    return {
        "height": height,
        "margin": margin,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }


def names_axis(names: Sequence[str]) -> Json:
    """An axis of names, first on top; by place, so that equal or shortened names stay apart."""
    texts = [plain(name if len(name) <= 32 else name[:31] + "…") for name in names]
    return {
        "tickvals": list(range(len(names))),
        "ticktext": texts,
        "range": [len(names) - 0.5, -0.5],
        "automargin": True,
        "showgrid": False,
    }


def whole_ticks(rounds: Sequence[int]) -> Json:
    """Ticks at whole rounds."""
    return {"dtick": 1, "tick0": 0} if rounds[-1] - rounds[0] <= 20 else {"tickformat": "d"}


def hover(where: str, found: Estimate) -> str:
    """A metric as text under the pointer."""
    facts = [number(found.value)]
    if found.low is not None and found.high is not None:
        facts.append(f"95 % interval {interval(found)}")
    if found.patients is not None:
        few = 0 < found.patients < SMALL
        facts.append(f"< {SMALL} patients" if few else plural(found.patients, "patient"))
    return f"{plain(where)}<br>" + ", ".join(facts)


def wrap(text: str, width: int = 70) -> str:
    """Long text as up to six lines."""
    return "<br>".join(plain(text[start : start + width]) for start in range(0, min(len(text), 6 * width), width))


def plain(text: str) -> str:
    """Text that plotly shows as it is: it takes tags, even links, in every label."""
    return html.escape(text, quote=False)
