"""What the server's held-out patients show beyond single numbers: ROC curves, and the Dice of every case."""

from __future__ import annotations

from collections.abc import Sequence

from fedmed.reporting.canvas import DASHES, PALETTE, Json, Plot, layout_of, plain
from fedmed.reporting.facts import Estimate, RunFacts
from fedmed.reporting.words import number, plural

MOST_POINTS = 500  # of one ROC curve or one strip of cases


def roc(run: RunFacts) -> Plot | None:
    """One ROC curve per label, from the server's held-out patients."""
    curves = run.evaluation.curves if run.evaluation else {}
    drawn = {label: curve for label, curve in curves.items() if curve is not None}
    if not drawn:
        return None
    data: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": "#808080", "dash": "dot", "width": 1},
            "hoverinfo": "skip",
            "name": "chance",
        }
    ]
    for place, (label, (false, true)) in enumerate(drawn.items()):
        kept = _thin(len(false))
        area = run.server.get(f"auroc/{label}", Estimate()).value
        name = f"{label}, AUROC {number(area)}" if area is not None else label
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [false[i] for i in kept],
                "y": [true[i] for i in kept],
                "name": plain(name),
                "line": {"color": PALETTE[place % 6], "dash": DASHES[place // 6 % 4], "width": 2},
                "hovertemplate": "false positive %{x:.3f}<br>true positive %{y:.3f}",
            }
        )
    layout = layout_of(height=480 + 12 * len(drawn), margin={"l": 65, "r": 20, "t": 12, "b": 50})
    layout |= {
        "xaxis": {"title": {"text": "false positive rate"}, "range": [0, 1], "constrain": "domain"},
        "yaxis": {
            "title": {"text": "true positive rate"},
            "range": [0, 1.01],
            "scaleanchor": "x",
            "constrain": "domain",
        },
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.17, "yanchor": "top"},
    }
    missing = [label for label, curve in curves.items() if curve is None]
    note = f"No curve for {', '.join(missing)}: only one class among the held-out patients." if missing else ""
    return Plot(data=data, layout=layout, alt=f"ROC curves for {', '.join(drawn)}.", note=note)


def dice(run: RunFacts) -> Plot | None:
    """The Dice of every held-out case, as a box and a strip per label."""
    cases = {label: values for label, values in (run.evaluation.cases if run.evaluation else {}).items() if values}
    if not cases:
        return None
    data: list[Json] = [
        {
            "type": "box",
            "y": values,
            "name": plain(label),
            "boxpoints": "all" if len(values) <= MOST_POINTS else "outliers",
            "jitter": 0.5,
            "pointpos": -1.7 if len(values) <= MOST_POINTS else 0,
            "marker": {"color": PALETTE[place % 6], "size": 5, "opacity": 0.55},
            "line": {"width": 1.5},
            "showlegend": False,
        }
        for place, (label, values) in enumerate(cases.items())
    ]
    layout = layout_of(height=420, margin={"l": 65, "r": 20, "t": 12, "b": 50})
    layout |= {"yaxis": {"title": {"text": "Dice"}, "range": [-0.03, 1.03]}, "xaxis": {"type": "category"}}
    medians = (
        f"{label} median {number(_median(values))} of {plural(len(values), 'case')}" for label, values in cases.items()
    )
    return Plot(data=data, layout=layout, alt=f"Dice of every held-out case: {'; '.join(medians)}.")


def _thin(length: int) -> list[int]:
    """At most `MOST_POINTS` places spread over a curve, both ends among them."""
    if length <= MOST_POINTS:
        return list(range(length))
    return [round(i * (length - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
