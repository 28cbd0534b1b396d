"""A site's own page: tables and pictures only, so that a thousand virtual hospitals cost little."""

from __future__ import annotations

from pathlib import Path

from fedmed.errors import DataError
from fedmed.reporting.facts import Findings, Gain, metric_of
from fedmed.reporting.pages import fill, write_page
from fedmed.reporting.read_evaluation import findings_of, read_findings, read_gains
from fedmed.reporting.words import interval, number, ordered, plural, signed, title

FINDINGS, COMPARISON = "findings.json", "comparison.json"
MODE = 0o600  # it shows patients


def is_site(folder: Path) -> bool:
    """Whether a folder holds what a site found for itself."""
    return (folder / FINDINGS).exists()


def write_site_reports(folder: Path) -> list[Path]:
    """Writes the page of every site of a run or of an experiment, `sites/SITE/report.html`.

    Raises:
        DataError: as `write_site_report`.
    """
    found = {file.parent for name in (FINDINGS, COMPARISON) for file in folder.glob(f"sites/*/{name}")}
    return [write_site_report(site) for site in sorted(found)]


def write_site_report(folder: Path) -> Path:
    """Writes `report.html` beside a site's `findings.json` or `comparison.json`, readable by its owner alone.

    Args:
        folder: the site's state folder at a hospital; `RUN/sites/SITE` of a simulation or of `fedmed compare`.

    Raises:
        DataError: neither file can be read, or the page cannot be written.
    """
    found, compared = read_findings(folder / FINDINGS), read_gains(folder / COMPARISON)
    if found is None and compared is None:
        raise DataError(f"{FINDINGS} cannot be read. Evaluate the network at this site again.")
    page = render_site(found, compared)
    return write_page(page, folder / "report.html", mode=MODE)


def render_site(found: Findings | None, compared: tuple[Findings, tuple[Gain, ...]] | None) -> str:
    """The page as text; a comparison alone says nothing of the site's data, so there are no sections about it."""
    empty, gains = compared or (findings_of({}), ())
    shown = found or empty
    metrics = ordered(shown.metrics, shown.primary)
    return fill(
        "site.html.j2",
        found=shown,
        judged=found is not None,
        summary=_summary(found) if found else "",
        metrics=metrics,
        labels=[(name, value) for name, value in metrics if "/" in name],
        gains=gains,
        signed=signed,
    )


def _summary(found: Findings) -> str:
    reached = metric_of(found.metrics, found.primary)
    model = title(found.model) if found.model else "The network"
    if reached.value is None:
        return f"{model}: {title(found.primary)} at this site is undefined."
    spread = "" if reached.low is None else f" (95 % interval {interval(reached)})"
    return (
        f"{model} reaches {title(found.primary)} {number(reached.value)}{spread} at "
        f"{plural(found.held_out_patients or 0, 'held-out patient')} of this site."
    )
