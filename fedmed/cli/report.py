"""`fedmed report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="a run folder, or a site's own state folder")],
    live: Annotated[bool, typer.Option("--live", help="follow a run on a local page until Ctrl-C")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the local page; 0 = any that is free")] = 0,
    log: Annotated[list[str], typer.Option(metavar="NAME", help="write the events for tensorboard or mlflow")] = [],  # noqa: B006  # typer copies it
) -> None:
    """Write RUN/report.html, one page that opens offline, and a run's MODEL_CARD.md; or follow a run while it works.

    Example: fedmed report runs/20260102T150000-quickstart

    Example: fedmed report --live runs/20260102T150000-quickstart
    """
    from fedmed.errors import DataError
    from fedmed.reporting import write_model_card, write_report
    from fedmed.reporting.live import live_server
    from fedmed.reporting.read import read_events
    from fedmed.reporting.writers import check_writers, writing

    if live:
        with live_server(run, port=port) as server:
            print(f"http://127.0.0.1:{server.server_port}/", flush=True)
            print("following the run, for this machine alone; Ctrl-C ends it", file=sys.stderr, flush=True)
            server.serve_forever()
    check_writers(log)
    if log:
        notes: list[str] = []
        events = read_events(run / "events.jsonl", notes)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if not events:
            raise DataError(f"'{run.resolve().name}' holds no event that could be logged. Give the folder of a run.")
        with writing(log, run) as write:
            for event in events:
                write(event)
    print(write_report(run))
    if (run / "result.json").exists():  # a site's own folder has none
        write_model_card(run)
