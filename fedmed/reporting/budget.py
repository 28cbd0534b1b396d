"""The curve of ε over the rounds of a plan, as one HTML page that opens offline or as a small SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from fedmed.errors import ConfigError
from fedmed.reporting.canvas import BLUE, VERMILLION

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 60, 40, 20, 50  # pixels


@dataclass(frozen=True, kw_only=True)
class BudgetCurve:
    """ε after rounds, by the tighter bound and by RDP alone."""

    title: str
    rounds: Sequence[int]
    epsilon: Sequence[float]
    epsilon_rdp: Sequence[float]
    budget: float


def check_plot_name(path: Path) -> None:
    """Refuse a file that is neither HTML nor SVG, or whose folder is not there, before anything is computed.

    Raises:
        ConfigError: always then.
    """
    if path.suffix not in (".html", ".svg"):
        raise ConfigError(f"a plot is written as FILE.html or FILE.svg; got {path.name}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.parent}")


def write_budget_plot(path: Path, curve: BudgetCurve) -> None:
    """Write the plot.

    Raises:
        ConfigError: the file's name ends neither in .html nor in .svg.
    """
    check_plot_name(path)
    path.write_text(_svg(curve) if path.suffix == ".svg" else _html(curve), encoding="utf-8")


def _html(curve: BudgetCurve) -> str:
    import plotly.io

    lines = [
        {"type": "scatter", "mode": "lines+markers", "name": name, "x": list(curve.rounds), "y": list(values), **style}
        for name, values, style in (
            ("ε", curve.epsilon, {"line": {"color": BLUE}}),
            ("ε by RDP", curve.epsilon_rdp, {"line": {"color": VERMILLION, "dash": "dash"}}),
        )
    ]
    layout = {
        "title": {"text": escape(curve.title)},
        "xaxis": {"title": {"text": "round"}},
        "yaxis": {"title": {"text": "ε"}, "rangemode": "tozero"},
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": curve.budget, "y1": curve.budget}
            | {"line": {"color": "#6b6b6b", "dash": "dot"}}
        ],
    }
    page: str = plotly.io.to_html({"data": lines, "layout": layout}, include_plotlyjs=True, full_html=True)
    return page


def _svg(curve: BudgetCurve) -> str:
    most = max(*curve.epsilon_rdp, *curve.epsilon, curve.budget)
    last = curve.rounds[-1]

    def across(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * number / last

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / most

    def line(values: Sequence[float], style: str) -> str:
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip((0, *curve.rounds), (0, *values), strict=True))
        return f'<polyline fill="none" stroke-width="2" {style} points="{points}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f"<title>{escape(curve.title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22">{escape(curve.title)}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="black"/>',
        f'<path d="M{LEFT} {up(curve.budget):.1f}H{WIDTH - RIGHT}" stroke="#6b6b6b" stroke-dasharray="2 4"/>',
        line(curve.epsilon, f'stroke="{BLUE}"'),
        line(curve.epsilon_rdp, f'stroke="{VERMILLION}" stroke-dasharray="7 4"'),
        *(
            f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            for value in (0, most / 2, most)
        ),
        f'<text x="{across(last):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="end">{last}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 10}">round · solid: ε · dashed: ε by RDP · dotted: budget</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
