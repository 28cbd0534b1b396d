"""`comparison.html` and `sweep.html`: an experiment on one page that opens offline, from its JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fedmed.errors import DataError
from fedmed.reporting import words
from fedmed.reporting.comparison_figures import differences, endpoint, matrix, sweep_lines
from fedmed.reporting.pages import fill, write_page
from fedmed.reporting.read_evaluation import estimate_of

SCHEMA = 1


def write_comparison(folder: Path) -> Path:
    """Writes `comparison.html` into the folder of an experiment that has a `comparison.json`.

    Raises:
        DataError: there is none, or it is damaged, or the page cannot be written.
    """
    found = _read(folder / "comparison.json", ("arms", "places", "matrix", "comparisons", "subgroups", "notes"))
    plots = {"arms": endpoint(found), "differences": differences(found), "matrix": matrix(found)}
    return _write(folder / "comparison.html", "comparison.html.j2", found, plots)


def write_sweep(folder: Path) -> Path:
    """Writes `sweep.html` into the folder of an experiment that has a `sweep.json`.

    Raises:
        DataError: there is none, or it is damaged, or the page cannot be written.
    """
    found = _read(folder / "sweep.json", ("points", "keys", "seeds"))
    return _write(folder / "sweep.html", "sweep.html.j2", found, {"points": sweep_lines(found)})


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no {path.name} in the folder; fedmed compare and fedmed sweep write them") from None
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{path.name} cannot be read; run the experiment again, which reuses its runs") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not set(keys) <= found.keys():
        raise DataError(
            f"{path.name} is damaged or of another version; run the experiment again, which reuses its runs"
        )
    return found


def _write(target: Path, template: str, found: dict[str, Any], plots: dict[str, Any]) -> Path:
    page = fill(
        template,
        found=found,
        plots=plots,
        plotly_js=get_plotlyjs(),
        estimate=estimate_of,
        signed=words.signed,
        p=words.p_value,
        epsilon=words.epsilon,
    )
    return write_page(page, target)
