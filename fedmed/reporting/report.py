"""`RUN/report.html`: a page that opens offline, prints, and asks the network for nothing."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from fedmed.errors import DataError
from fedmed.reporting import cases, figures, words
from fedmed.reporting.facts import Estimate, RunFacts
from fedmed.reporting.read import read_run

MOST_TROUBLES = 50


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder, whole or not at all.

    Args:
        run: a run folder with `result.json`; `events.jsonl`, `evaluation.json` and `run.toml` are used where present.

    Returns:
        The path of the report.

    Raises:
        DataError: `result.json` is missing or damaged, or the report cannot be written.
    """
    page = render(read_run(run))
    target = run / "report.html"
    part = run / f".report.html.{os.getpid()}"
    try:
        part.write_text(page, encoding="utf-8", errors="replace")
        part.replace(target)
    except OSError as error:
        raise DataError(
            f"report.html cannot be written into the run folder: {error.strerror}. Make room or mend permissions."
        ) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return target


def render(run: RunFacts) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals.update(
        title=words.title,
        number=words.number,
        count=words.count,
        interval=words.interval,
        duration=words.duration,
        memory=words.memory,
        plural=words.plural,
        of=lambda metrics, name: metrics.get(name, Estimate()),
    )
    template = environment.from_string(
        resources.files("fedmed.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    troubles = words.troubles(run)
    return template.render(
        run=run,
        summary=words.summary(run),
        troubles=troubles[:MOST_TROUBLES],
        more_troubles=len(troubles) - len(troubles[:MOST_TROUBLES]),
        server_metrics=_ordered(run),
        sites=[(site, words.privacy(site.privacy, run)) for site in run.sites],
        rounds_plot=figures.per_round(run),
        sites_plot=figures.per_site(run),
        cases_plot=cases.dice(run) if run.evaluation and run.evaluation.kind == "segmentation" else cases.roc(run),
        participation_plot=figures.participation(run),
        repeat=f"fedmed simulate {shlex.quote(run.folder + '/run.toml')}",
        resume=f"fedmed simulate --resume {shlex.quote(run.folder)}" if run.status in ("failed", "paused") else "",
        plotly_js=get_plotlyjs(),
    )


def _ordered(run: RunFacts) -> list[tuple[str, Estimate]]:
    """The primary metric first, then the other pooled ones, then those per label."""
    return sorted(run.server.items(), key=lambda item: (item[0] != run.primary, "/" in item[0]))
