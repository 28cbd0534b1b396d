"""The final network at every site and for every label, as a table of colours: where it is weak, and for whom."""

from __future__ import annotations

from fedmed.reporting.canvas import Json, Plot, layout_of, names_axis, plain
from fedmed.reporting.facts import Metrics, RunFacts, metric_of
from fedmed.reporting.words import number, plural, title

MOST_ROWS = 50
MOST_TEXTS = 8  # labels up to which a cell has room for its number
SERVER = "server"


def by_label(run: RunFacts) -> Plot | None:
    """Site by label; the server's own patients are the first row."""
    metric = run.primary.partition("/")[0]
    rows: list[tuple[str, Metrics]] = [(SERVER, run.server), *((site.name, site.metrics) for site in run.sites)]
    labels = list(
        dict.fromkeys(key.partition("/")[2] for _, found in rows for key in found if key.startswith(f"{metric}/"))
    )
    rows = [(name, found) for name, found in rows if any(f"{metric}/{label}" in found for label in labels)]
    if len(labels) < 2 or len(rows) < 2:
        return None
    shown = rows[:MOST_ROWS]
    values = [[metric_of(found, f"{metric}/{label}").value for label in labels] for _, found in shown]
    known = [value for row in values for value in row if value is not None]
    if not known:
        return None
    names = [name for name, _ in shown]
    cells: Json = {
        "type": "heatmap",
        "x": list(range(len(labels))),
        "y": list(range(len(names))),
        "z": values,
        "colorscale": [[0, "#eef4fb"], [0.5, "#86b8dd"], [1, "#08519c"]],
        "zmin": min(known) if min(known) < max(known) else min(known) - 0.01,
        "zmax": max(known),
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "x": 1.01, "xpad": 4},
        "hovertext": [
            [f"{plain(name)}, {plain(label)}<br>{number(value)}" for label, value in zip(labels, row, strict=True)]
            for name, row in zip(names, values, strict=True)
        ],
        "hoverinfo": "text",
    }
    if len(labels) <= MOST_TEXTS:
        cells |= {"text": [[number(value) for value in row] for row in values], "texttemplate": "%{text}"}
    layout = layout_of(height=150 + 30 * len(names), margin={"l": 20, "r": 10, "t": 12, "b": 30})
    layout |= {
        "xaxis": {
            "tickvals": list(range(len(labels))),
            "ticktext": [plain(label if len(label) <= 20 else label[:19] + "…") for label in labels],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
        "yaxis": {**names_axis(names), "zeroline": False},
    }
    note = f"Shown: the first {len(shown)} of {plural(len(rows), 'row')}." if len(rows) > len(shown) else ""
    alt = f"Heat map of {title(metric)} by site and label, from {number(min(known))} to {number(max(known))}."
    return Plot(data=[cells], layout=layout, alt=alt, note=note)
