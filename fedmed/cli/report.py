"""`fedmed report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write RUN/report.html, one page that opens offline, and RUN/MODEL_CARD.md.

    Example: fedmed report runs/20260102T150000-quickstart
    """
    from fedmed.reporting import write_model_card, write_report

    print(write_report(run))
    write_model_card(run)
