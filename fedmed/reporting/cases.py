"""The segmented cases of the server's held-out patients one by one: Dice and HD95 as boxes and strips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from fedmed.reporting.canvas import PALETTE, Json, Plot, layout_of, plain
from fedmed.reporting.facts import RunFacts
from fedmed.reporting.words import number, plural

MOST_POINTS = 500  # of one strip


def dice(run: RunFacts) -> Plot | None:
    """The Dice of every held-out case."""
    return _boxes("Dice", "Dice", run.evaluation.cases if run.evaluation else {}, [-0.03, 1.03])


def hd95(run: RunFacts) -> Plot | None:
    """The HD95 of every held-out case of which neither mask is empty."""
    return _boxes("HD95", "HD95 (mm)", run.evaluation.hd95 if run.evaluation else {}, None)


def _boxes(name: str, axis: str, values: Mapping[str, list[float]], span: Sequence[float] | None) -> Plot | None:
    """A box and a strip of points per label."""
    cases = {label: found for label, found in values.items() if found}
    if not cases:
        return None
    data: list[Json] = [
        {
            "type": "box",
            "y": found,
            "name": plain(label),
            "boxpoints": "all" if len(found) <= MOST_POINTS else "outliers",
            "jitter": 0.5,
            "pointpos": -1.7 if len(found) <= MOST_POINTS else 0,
            "marker": {"color": PALETTE[place % len(PALETTE)], "size": 5, "opacity": 0.55},
            "line": {"width": 1.5},
            "showlegend": False,
        }
        for place, (label, found) in enumerate(cases.items())
    ]
    layout = layout_of(height=400, margin={"l": 60, "r": 15, "t": 12, "b": 40})
    upright: Json = {"title": {"text": axis}}
    layout |= {
        "yaxis": upright | ({"range": list(span)} if span else {"rangemode": "tozero"}),
        "xaxis": {"type": "category", "automargin": True},
    }
    medians = (
        f"{label} median {number(median(found))} of {plural(len(found), 'case')}" for label, found in cases.items()
    )
    return Plot(data=data, layout=layout, alt=f"{name} of every held-out case: {'; '.join(medians)}.")
