"""The plots of an experiment: `(content of the JSON) -> Plot | None`, None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmed.reporting.canvas import BLUE, DASHES, PALETTE, VERMILLION, Json, Plot, layout_of, names_axis, plain
from fedmed.reporting.words import number, title

Found = Mapping[str, Any]
MOST_NETWORKS = 60


def endpoint(found: Found) -> Plot | None:
    """Every arm at the endpoint, with its interval, and each seed as a faint mark."""
    arms = [arm for arm in found["arms"] if arm["endpoint"]["value"] is not None]
    if not arms:
        return None
    marks: Json = {
        "type": "scatter",
        "mode": "markers",
        "x": [value for arm in arms for value in arm["by_seed"] if value is not None],
        "y": [place for place, arm in enumerate(arms) for value in arm["by_seed"] if value is not None],
        "marker": {"symbol": "line-ns-open", "size": 12, "color": "rgba(128,128,128,0.7)"},
        "hovertemplate": "one seed: %{x:.3f}<extra></extra>",
        "showlegend": False,
    }
    layout = layout_of(height=110 + 44 * len(arms), margin={"l": 20, "r": 20, "t": 10, "b": 50})
    layout |= {
        "xaxis": {"title": {"text": plain(title(found["primary"]))}, "zeroline": False},
        "yaxis": {**names_axis([arm["arm"] for arm in arms]), "zeroline": False},
    }
    points = _whiskers([arm["endpoint"] for arm in arms], "value", BLUE, symbol="circle")
    alt = "; ".join(f"{arm['arm']} {number(arm['endpoint']['value'])}" for arm in arms)
    return Plot(data=[marks, points], layout=layout, alt=f"Arms at the endpoint. {alt}.")


def differences(found: Found) -> Plot | None:
    """The declared differences with their intervals, around a line of no difference."""
    known = [one for one in found["comparisons"] if one["difference"] is not None]
    if not known:
        return None
    names = [f"{one['first']} − {one['second']}" for one in known]
    layout = layout_of(height=110 + 44 * len(known), margin={"l": 20, "r": 20, "t": 10, "b": 50})
    layout |= {
        "xaxis": {"title": {"text": f"difference in {plain(title(found['primary']))}"}, "zeroline": False},
        "yaxis": {**names_axis(names), "zeroline": False},
        "shapes": [
            {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1}
            | {"line": {"color": VERMILLION, "dash": "dash"}}
        ],
    }
    alt = "; ".join(f"{name} {number(one['difference'])}" for name, one in zip(names, known, strict=True))
    points = _whiskers(known, "difference", BLUE, symbol="square")
    return Plot(data=[points], layout=layout, alt=f"Differences. {alt}.")


def matrix(found: Found) -> Plot | None:
    """The cross-site matrix: every network at every place, as a heat map."""
    networks = list(dict.fromkeys(cell["network"] for cell in found["matrix"]))[:MOST_NETWORKS]
    places = [place["place"] for place in found["places"]]
    values = {
        (cell["network"], cell["place"]): cell["metrics"].get(found["primary"], {}).get("value")
        for cell in found["matrix"]
    }
    rows = [[values.get((network, place)) for place in places] for network in networks]
    if not any(value is not None for row in rows for value in row):
        return None
    heat: Json = {
        "type": "heatmap",
        "z": rows,
        "x": list(range(len(places))),
        "y": list(range(len(networks))),
        "colorscale": "Cividis",
        "text": [[number(value) for value in row] for row in rows],
        "texttemplate": "%{text}" if len(places) * len(networks) <= 200 else "",
        "hovertext": [[f"{plain(network)} at {plain(place)}" for place in places] for network in networks],
        "hovertemplate": "%{hovertext}: %{text}<extra></extra>",
        "colorbar": {"title": {"text": plain(title(found["primary"]))}, "thickness": 12},
        "xgap": 2,
        "ygap": 2,
    }
    layout = layout_of(height=160 + 30 * len(networks), margin={"l": 20, "r": 20, "t": 40, "b": 20})
    layout |= {
        "xaxis": {
            "tickvals": list(range(len(places))),
            "ticktext": [plain(place[:24]) for place in places],
            "side": "top",
            "automargin": True,
            "showgrid": False,
        },
        "yaxis": {**names_axis(networks), "zeroline": False},
    }
    return Plot(data=[heat], layout=layout, alt="Every network at every place; the values are in the table below.")


def sweep_lines(found: Found) -> Plot | None:
    """The primary metric over the first varied key, one line for every choice of the others, with error bars."""
    points = [point for point in found["points"] if point["endpoint"]["value"] is not None]
    if not points:
        return None
    first, *others = found["keys"]
    numeric = all(isinstance(point["values"][first], int | float) for point in points)
    lines: dict[str, list[Found]] = {}
    for point in points:
        lines.setdefault(", ".join(f"{key} = {point['values'][key]}" for key in others), []).append(point)
    data: list[Json] = []
    for place, (name, mine) in enumerate(lines.items()):
        mine = sorted(mine, key=lambda point: point["values"][first]) if numeric else mine
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(name),
                "showlegend": bool(others),
                "x": [p["values"][first] if numeric else plain(str(p["values"][first])) for p in mine],
                "y": [p["endpoint"]["value"] for p in mine],
                "error_y": _bars([p["endpoint"] for p in mine], "value"),
                "line": {"color": PALETTE[place % 6], "dash": DASHES[place // 6 % 4]},
                "marker": {"size": 7},
            }
        )
    xs = [point["values"][first] for point in points]
    wide = numeric and min(xs) > 0 and max(xs) / min(xs) >= 20
    axis: Json = {"title": {"text": plain(first)}, "type": "log" if wide else "linear" if numeric else "category"}
    layout = layout_of(height=440 + 18 * len(lines), margin={"l": 70, "r": 20, "t": 12, "b": 60})
    layout |= {
        "xaxis": axis
        | ({"tickvals": sorted(set(xs)), "ticktext": [f"{x:g}" for x in sorted(set(xs))]} if wide else {}),
        "yaxis": {"title": {"text": plain(title(found["primary"]))}, "zeroline": False},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top"},
    }
    return Plot(data=data, layout=layout, alt=f"{title(found['primary'])} over {first}; the table lists every point.")


def _whiskers(found: Sequence[Found], key: str, colour: str, *, symbol: str) -> Json:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [one[key] for one in found],
        "y": list(range(len(found))),
        "error_x": _bars(found, key),
        "marker": {"color": colour, "size": 10, "symbol": symbol},
        "hovertemplate": "%{x:.3f}<extra></extra>",
        "showlegend": False,
    }


def _bars(found: Sequence[Found], key: str) -> Json:
    """Error bars from a value up to `high` and down to `low`; none where there is no interval."""
    up = [0.0 if one["high"] is None else one["high"] - one[key] for one in found]
    down = [0.0 if one["low"] is None else one[key] - one["low"] for one in found]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5}
