"""The plots of rounds and sites, as plotly.js values: `(run) -> Plot | None`, None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedmed.reporting.canvas import (
    BLUE,
    CROSS,
    GREY,
    PALETTE,
    SKY,
    VERMILLION,
    Json,
    Plot,
    hover,
    layout_of,
    names_axis,
    plain,
    whole_ticks,
    wrap,
)
from fedmed.reporting.facts import Estimate, Round, RunFacts, Site, metric_of
from fedmed.reporting.words import count, lower_is_better, number, plural, title

MOST_SITES = 50
MOST_MARKS = 2000  # crosses in the heat map


def per_round(run: RunFacts) -> Plot | None:
    """The primary metric and the loss after every round, with 95 % bands."""
    names = [name for name in dict.fromkeys((run.primary, "loss")) if _known(run.log, name)]
    if not names:
        return None
    rows = [entry.number for entry in run.log]
    layout = layout_of(height=190 + 170 * len(names), margin={"l": 70, "r": 20, "t": 12, "b": 50})
    layout["xaxis"] = {
        "title": {"text": "round"},
        "range": [rows[0] - 0.3, rows[-1] + 0.3],
        "anchor": "y2" if len(names) > 1 else "y",
        **whole_ticks(rows),
    }
    data: list[Json] = []
    for place, name in enumerate(names):
        axis = "y" if place == 0 else "y2"
        colour = PALETTE[place]
        data += _band(run.log, name, axis, colour)
        layout[axis.replace("y", "yaxis")] = {
            "title": {"text": plain(title(name))},
            "domain": ([0.42, 1] if place == 0 else [0, 0.34]) if len(names) > 1 else [0, 1],
        }
    alt = "; ".join(f"{title(name)} {_path(run.log, name)}" for name in names)
    return Plot(data=data, layout=layout, alt=f"Lines per round. {alt}.")


def per_site(run: RunFacts) -> Plot | None:
    """The final network at every site's held-out patients; the worst sites when there are many."""
    falling = lower_is_better(run.primary)
    known = [(site, found) for site in run.sites if (found := metric_of(site.metrics, run.primary)).value is not None]
    known.sort(key=lambda pair: (pair[1].value or 0.0) * (-1 if falling else 1))
    shown, unknown = known[:MOST_SITES], len(run.sites) - len(known)
    if not shown:
        return None
    places = list(range(len(shown)))
    values = [found.value or 0.0 for _, found in shown]
    bars: Json = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": places,
        "marker": {"color": SKY},
        "hovertext": [hover(site.name, found) for site, found in shown],
        "hoverinfo": "text",
        "showlegend": False,
    }
    whiskers: Json = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [x for _, found in _spanned(shown) for x in (found.low, found.high, None)],
        "y": [y for place, _ in _spanned(shown) for y in (place, place, None)],
        "line": {"color": "#6b6b6b", "width": 1.5},
        "marker": {"symbol": "line-ns", "size": 9, "line": {"color": "#6b6b6b", "width": 1.5}},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    layout = layout_of(
        height=90 + max((26 if len(shown) <= 20 else 18) * len(shown), 80), margin={"l": 20, "r": 20, "t": 30, "b": 45}
    )
    layout |= {
        "bargap": 0.35,
        "xaxis": {"title": {"text": plain(title(run.primary))}, "rangemode": "tozero"},
        "yaxis": {**names_axis([site.name for site, _ in shown]), "zeroline": False},
    }
    if (pooled := metric_of(run.server, run.primary).value) is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": pooled,
                "x1": pooled,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": VERMILLION, "dash": "dash"},
            }
        ]
        layout["annotations"] = [
            {
                "x": pooled,
                "yref": "paper",
                "y": 1,
                "yanchor": "bottom",
                "showarrow": False,
                "text": f"server {number(pooled)}",
            }
        ]
    notes = []
    if len(known) > len(shown):
        notes.append(f"Shown: the {len(shown)} worst of {plural(len(known), 'site')}; the table below lists all.")
    if unknown:
        notes.append(f"Not shown: {plural(unknown, 'site')} where {title(run.primary)} is undefined.")
    worst, best = shown[0], known[-1]
    alt = (
        f"Bars of {title(run.primary)} for {plural(len(shown), 'site')}, from {worst[0].name} {number(worst[1].value)} "
        f"(worst) to {best[0].name} {number(best[1].value)} (best)."
    )
    return Plot(data=[bars, whiskers], layout=layout, alt=alt, note=" ".join(notes))


def participation(run: RunFacts) -> Plot | None:
    """Who joined, who failed and who was absent, site by round."""
    log = [entry for entry in run.log if entry.number or entry.joined or entry.failed]
    names = dict.fromkeys(site.name for site in run.sites)
    for entry in log:
        names |= dict.fromkeys(sorted(entry.joined | entry.failed.keys()))
    if not log or not names:
        return None
    order = list(names)
    if len(order) > MOST_SITES:
        order.sort(key=lambda name: (-sum(name in e.failed for e in log), sum(name in e.joined for e in log)))
    shown = order[:MOST_SITES]
    states = [[_state(name, entry) for entry in log] for name in shown]
    rounds = [entry.number for entry in log]
    marks = len(shown) * len(log) <= MOST_MARKS
    cells: Json = {
        "type": "heatmap",
        "x": rounds,
        "y": list(range(len(shown))),
        "z": states,
        "zmin": 0,
        "zmax": 2,
        "showscale": False,
        "colorscale": [[0, GREY], [0.33, GREY], [0.33, BLUE], [0.67, BLUE], [0.67, VERMILLION], [1, VERMILLION]],
        "xgap": 2 if len(log) <= 100 else 0,
        "ygap": 2,
        "text": [[CROSS if state == 2 and marks else "" for state in row] for row in states],
        "texttemplate": "%{text}",
        "textfont": {"color": "#fff"},
        "hovertext": [[_cell(name, entry) for entry in log] for name in shown],
        "hoverinfo": "text",
    }
    keys: list[Json] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [None],
            "y": [None],
            "name": name,
            "hoverinfo": "skip",
            "marker": {"symbol": "square", "size": 12, "color": colour},
        }
        for name, colour in (("joined", BLUE), (f"{CROSS} failed", VERMILLION), ("absent", GREY))
    ]
    layout = layout_of(
        height=110 + max((22 if len(shown) <= 20 else 16) * len(shown), 60), margin={"l": 20, "r": 20, "t": 40, "b": 45}
    )
    layout |= {
        "xaxis": {"title": {"text": "round"}, **whole_ticks(rounds), "showgrid": False, "zeroline": False},
        "yaxis": {**names_axis(shown), "zeroline": False},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    }
    failures = sum(len(entry.failed) for entry in log)
    note = ""
    if len(order) > len(shown):
        note = f"Shown: the {len(shown)} sites that failed most or joined least, of {count(len(order))}."
    size = f"{plural(len(shown), 'site')} by {plural(len(log), 'round')}"
    alt = f"Heat map of {size}; {plural(failures, 'failure')} in all."
    return Plot(data=[cells, *keys], layout=layout, alt=alt, note=note)


def _band(log: Sequence[Round], name: str, axis: str, colour: str) -> list[Json]:
    points = [(entry.number, metric_of(entry.metrics, name)) for entry in log]
    outline_x: list[float | None] = []
    outline_y: list[float | None] = []
    for stretch in _stretches(points):
        low = [(x, found.low) for x, found in stretch]
        high = [(x, found.high) for x, found in reversed(stretch)]
        outline_x += [x for x, _ in low + high] + [None]
        outline_y += [y for _, y in low + high] + [None]
    band: Json = {
        "type": "scatter",
        "mode": "lines",
        "x": outline_x,
        "y": outline_y,
        "yaxis": axis,
        "fill": "toself",
        "fillcolor": colour + "33",
        "line": {"width": 1, "color": colour + "55"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    line: Json = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [x for x, _ in points],
        "y": [found.value for _, found in points],
        "yaxis": axis,
        "name": plain(title(name)),
        "line": {"color": colour, "width": 2},
        "marker": {"size": 7},
        "hovertext": [hover(f"round {x}", found) for x, found in points],
        "hoverinfo": "text",
        "showlegend": False,
    }
    return [band, line] if outline_x else [line]


def _stretches(points: Sequence[tuple[int, Estimate]]) -> Iterator[list[tuple[int, Estimate]]]:
    """Runs of neighbouring rounds that all have an interval: a band never bridges a gap."""
    stretch: list[tuple[int, Estimate]] = []
    for point in points:
        if point[1].value is not None and point[1].low is not None and point[1].high is not None:
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _state(name: str, entry: Round) -> int:
    return 2 if name in entry.failed else 1 if name in entry.joined else 0


def _cell(name: str, entry: Round) -> str:
    state = ("absent", "joined", f"failed: {entry.failed.get(name) or 'no reason was given'}")[_state(name, entry)]
    return f"{plain(name)}, round {entry.number}<br>{wrap(state)}"


def _path(log: Sequence[Round], name: str) -> str:
    known = [(entry.number, value) for entry in log if (value := metric_of(entry.metrics, name).value) is not None]
    (first, start), (last, end) = known[0], known[-1]
    return f"from {number(start)} in round {first} to {number(end)} in round {last}"


def _known(log: Sequence[Round], name: str) -> bool:
    return any(metric_of(entry.metrics, name).value is not None for entry in log)


def _spanned(shown: Sequence[tuple[Site, Estimate]]) -> list[tuple[int, Estimate]]:
    """Places of the sites that have an interval: plotly's own error bars draw a missing one as if it were exact."""
    spans = ((place, found) for place, (_, found) in enumerate(shown))
    return [(place, found) for place, found in spans if found.low is not None and found.high is not None]
