"""`RUN/report.html`: a page that opens offline, prints, and asks the network for nothing."""

from __future__ import annotations

import shlex
from pathlib import Path

from plotly.offline import get_plotlyjs

from fedmed.reporting import cases, figures, words
from fedmed.reporting.curves import curves
from fedmed.reporting.facts import RunFacts, metric_of
from fedmed.reporting.label_map import by_label
from fedmed.reporting.pages import fill, write_page
from fedmed.reporting.read import read_run
from fedmed.reporting.site_report import is_site, write_site_report, write_site_reports

MOST_TROUBLES = 50


def write_report(run: str | Path) -> Path:
    """Writes `report.html` into a run folder, and one into the folder of each site that left findings there.

    Each page is written whole or not at all.

    Args:
        run: a run folder with `result.json`; `events.jsonl`, `evaluation.json` and `run.toml` are used where present.
            Or a site's own state folder with `findings.json`, of which only the site's page is made.

    Returns:
        The path of the report.

    Raises:
        DataError: `result.json` is missing or damaged, or the report cannot be written.
    """
    run = Path(run)
    if is_site(run) and not (run / "result.json").exists():
        return write_site_report(run)
    report = write_page(render(read_run(run)), run / "report.html")
    write_site_reports(run)
    return report


def render(run: RunFacts) -> str:
    """The page as text."""
    troubles = words.troubles(run)
    metrics, found = words.ordered(run.server, run.primary), run.evaluation
    segments = found is not None and found.kind == "segmentation"
    labels, prevalences = words.prevalences(run)
    intervals_of_sites = [found for site in run.sites for found in site.metrics.values() if found.low is not None]
    return fill(
        "report.html.j2",
        run=run,
        summary=words.summary(run),
        privacy_summary=words.privacy_summary(run),
        troubles=troubles[:MOST_TROUBLES],
        more_troubles=len(troubles) - len(troubles[:MOST_TROUBLES]),
        server_metrics=metrics,
        server_labels=[(name, value) for name, value in metrics if "/" in name],
        sites=[(site, words.privacy(site.privacy, run)) for site in run.sites],
        bounded=any(metric_of(site.metrics, run.primary).bound is not None for site in run.sites),
        noised=any(found.noise is not None for site in run.sites for found in site.metrics.values()),
        sent_variance=any(found.bound is not None for found in intervals_of_sites),
        sent_scores=any(found.bound is None for found in intervals_of_sites),
        prevalence_labels=labels,
        prevalences=prevalences,
        rounds_plot=figures.per_round(run),
        sites_plot=figures.per_site(run),
        labels_plot=by_label(run),
        dice_plot=cases.dice(run) if segments else None,
        hd95_plot=cases.hd95(run) if segments else None,
        roc_plot=curves(run, "roc"),
        pr_plot=curves(run, "precision-recall"),
        calibration_plot=curves(run, "calibration"),
        thresholds_chosen=found is not None and any(each.chosen for each in found.thresholds.values()),
        participation_plot=figures.participation(run),
        repeat=f"fedmed simulate {shlex.quote(run.folder + '/run.toml')}",
        resume=f"fedmed simulate --resume {shlex.quote(run.folder)}" if run.status in ("failed", "paused") else "",
        plotly_js=get_plotlyjs(),
    )
