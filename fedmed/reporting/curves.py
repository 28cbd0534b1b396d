"""What the server's held-out patients show of a classifier: ROC, precision-recall and calibration curves with bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedmed.reporting.canvas import DASHES, PALETTE, Json, Plot, layout_of, plain
from fedmed.reporting.facts import Curve, RunFacts, metric_of
from fedmed.reporting.words import number

MOST_POINTS = 500  # of one curve
BANDS_TOGETHER = 4  # labels whose bands may lie over each other; of more, one is chosen at a time
Kind = Literal["roc", "precision-recall", "calibration"]
AXES: dict[Kind, tuple[str, str]] = {
    "roc": ("false positive rate", "true positive rate"),
    "precision-recall": ("recall (sensitivity)", "precision (positive predictive value)"),
    "calibration": ("predicted probability", "share that is positive"),
}
AREAS = {"roc": "auroc", "precision-recall": "auprc", "calibration": "ece"}
AREA_NAMES = {"roc": "AUROC", "precision-recall": "AUPRC", "calibration": "ECE"}


def curves(run: RunFacts, kind: Kind) -> Plot | None:
    """One curve per label; with many labels a menu shows the band of one at a time."""
    found = _found(run, kind)
    drawn = {label: curve for label, curve in found.items() if curve is not None}
    if not drawn:
        return None
    banded, together = any(curve.at for curve in drawn.values()), len(drawn) <= BANDS_TOGETHER
    data: list[Json] = [_reference(kind)] if kind != "precision-recall" else []
    first = len(data)
    for place, (label, curve) in enumerate(drawn.items()):
        colour = PALETTE[place % len(PALETTE)]
        area = metric_of(run.server, f"{AREAS[kind]}/{label}").value
        name = f"{label}, {AREA_NAMES[kind]} {number(area)}" if area is not None else label
        if banded:
            data.append(_band(curve, colour, label, shown=together))
        data.append(_line(curve, kind, plain(name), label, colour, DASHES[place // len(PALETTE) % len(DASHES)]))
    across, up = AXES[kind]
    layout = layout_of(height=430 + 22 * len(drawn), margin={"l": 60, "r": 15, "t": 12 if together else 52, "b": 50})
    layout |= {
        "xaxis": {"title": {"text": across}, "range": [-0.01, 1.01], "constrain": "domain"},
        "yaxis": {"title": {"text": up}, "range": [-0.01, 1.02], "scaleanchor": "x", "constrain": "domain"},
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
    }
    if banded and not together:
        layout["updatemenus"] = [_menu(list(drawn), first)]
    missing = [label for label, curve in found.items() if curve is None]
    note = f"No curve for {', '.join(missing)}: only one class among the held-out patients." if missing else ""
    names = {"roc": "ROC", "precision-recall": "Precision-recall", "calibration": "Calibration"}
    return Plot(data=data, layout=layout, alt=f"{names[kind]} curves for {', '.join(drawn)}.", note=note)


def _found(run: RunFacts, kind: Kind) -> Mapping[str, Curve | None]:
    if run.evaluation is None:
        return {}
    by_kind: dict[Kind, Mapping[str, Curve | None]] = {
        "roc": run.evaluation.curves,
        "precision-recall": run.evaluation.precision_recall,
        "calibration": run.evaluation.calibration,
    }
    return by_kind[kind]


def _reference(kind: Kind) -> Json:
    """Of ROC, what chance reaches; of calibration, what a calibrated network shows."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "#808080", "dash": "dot", "width": 1},
        "hoverinfo": "skip",
        "name": "chance" if kind == "roc" else "perfect",
    }


def _line(curve: Curve, kind: Kind, name: str, label: str, colour: str, dash: str) -> Json:
    kept = _thin(len(curve.x))
    across, up = AXES[kind]
    trace: Json = {
        "type": "scatter",
        "mode": "lines+markers" if kind == "calibration" else "lines",
        "x": [curve.x[i] for i in kept],
        "y": [curve.y[i] for i in kept],
        "name": name,
        "legendgroup": plain(label),
        "line": {"color": colour, "dash": dash, "width": 2},
        "hovertemplate": f"{across} %{{x:.3f}}<br>{up} %{{y:.3f}}",
    }
    if curve.images:
        trace["customdata"] = [curve.images[i] for i in kept]
        trace["hovertemplate"] = f"{across} %{{x:.3f}}<br>{up} %{{y:.3f}}<br>%{{customdata}} images"
    if kind == "calibration":
        trace["marker"] = {"size": 7}
    if kind == "precision-recall":
        trace["line"] = {"color": colour, "dash": dash, "width": 2, "shape": "vh"}
    return trace


def _band(curve: Curve, colour: str, label: str, *, shown: bool) -> Json:
    """There and back along the places where the band is known."""
    places = [
        (x, low, high)
        for x, low, high in zip(curve.at, curve.low, curve.high, strict=True)
        if x is not None and low is not None and high is not None
    ]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _, _ in places] + [x for x, _, _ in reversed(places)],
        "y": [low for _, low, _ in places] + [high for _, _, high in reversed(places)],
        "fill": "toself",
        "fillcolor": colour + "26",
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": plain(label),
        "visible": shown,
    }


def _menu(labels: list[str], first: int) -> Json:
    """All lines without bands, or one label with its own."""
    everything = [True] * first + [False, True] * len(labels)
    buttons: list[Json] = [{"label": "all labels", "method": "restyle", "args": [{"visible": everything}]}]
    for place, label in enumerate(labels):
        alone = [True] * first + [False, False] * len(labels)
        alone[first + 2 * place] = alone[first + 2 * place + 1] = True
        buttons.append({"label": plain(label), "method": "restyle", "args": [{"visible": alone}]})
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "showactive": True}


def _thin(length: int) -> list[int]:
    """At most `MOST_POINTS` places spread over a curve, both ends among them."""
    if length <= MOST_POINTS:
        return list(range(length))
    return [round(i * (length - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]
