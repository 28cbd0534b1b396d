"""A site's own page: tables and pictures only, so that a thousand virtual hospitals cost little."""

from __future__ import annotations

from pathlib import Path

from fedmed.errors import DataError
from fedmed.reporting.facts import Estimate, Findings
from fedmed.reporting.pages import fill, write_page
from fedmed.reporting.read_evaluation import read_findings
from fedmed.reporting.words import interval, number, plural, title

FINDINGS = "findings.json"
MODE = 0o600  # it shows patients


def write_site_report(folder: Path) -> Path:
    """Writes `report.html` beside a site's `findings.json`, readable by its owner alone.

    Args:
        folder: the site's state folder, at a hospital or `RUN/sites/SITE` of a simulation.

    Raises:
        DataError: the findings cannot be read, or the page cannot be written.
    """
    found = read_findings(folder / FINDINGS)
    if found is None:
        raise DataError(f"{FINDINGS} cannot be read. Evaluate the network at this site again.")
    return write_page(render_site(found), folder / "report.html", mode=MODE)


def render_site(found: Findings) -> str:
    """The page as text."""
    told = [(name, value) for name, value in found.metrics.items() if value.value is not None or value.patients != 0]
    metrics = sorted(told, key=lambda item: (item[0] != found.primary, "/" in item[0]))
    return fill("site.html.j2", found=found, metrics=metrics, labels=[(name, value) for name, value in metrics if "/" in name], summary=_summary(found), baseline=[])


def _summary(found: Findings) -> str:
    reached = found.metrics.get(found.primary, Estimate())
    model = title(found.model) if found.model else "The network"
    if reached.value is None:
        return f"{model}: {title(found.primary)} at this site is undefined."
    spread = "" if reached.low is None else f" (95 % interval {interval(reached)})"
    return (
        f"{model} reaches {title(found.primary)} {number(reached.value)}{spread} at "
        f"{plural(found.held_out_patients or 0, 'held-out patient')} of this site."
    )
