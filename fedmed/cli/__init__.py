"""The commands. Heavy imports happen inside a command, so that `--help` answers at once.

* On one machine: `simulate`, `compare` and `sweep`; `report` of what came out, `predict` with it.
* At a hospital: `site`, `ledger`, and `data` with its `pull`, `quarantine`, `intake` and `cache`.
* At a coordinator: `server`; `privacy` for what a budget buys.
* What is shown: `display` of long work, `experiment_progress` of many runs, `hospital_table` before one starts.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import click
import typer
import typer.core

from fedmed.cli import compare, data, ledger, predict, privacy, report, server, simulate, site, sweep
from fedmed.errors import FedmedError, one_line

typer.core.HAS_RICH = False  # with it "[required]" gets a backslash, for a markup that is not read
app = typer.Typer(
    name="fedmed",
    help="Federated learning across hospitals: networks train where the images are.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        import fedmed
        from fedmed.federated.identity import package_hash

        print(f"fedmed {fedmed.__version__}, code {package_hash()[:12]}")
        raise typer.Exit


@app.callback()
def fedmed(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show version and code, and exit")
    ] = False,
) -> None:
    """Federated learning across hospitals: networks train where the images are."""


app.command("simulate")(simulate.simulate)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("predict")(predict.predict)
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.add_typer(privacy.app, name="privacy")
app.add_typer(ledger.app, name="ledger")
app.add_typer(site.app, name="site")
app.add_typer(server.app, name="server")


def main() -> None:
    """Run a command; end with 0, or 1 and one line, or 2 for bad syntax, or 130 after Ctrl-C."""
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            _say("interrupted")
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        code = 130
    except FedmedError as error:
        _say(str(error))
        code = 1
    except BrokenPipeError:
        code = 1
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        _say(f"{os.strerror(error.errno) if error.errno else error}{place}")
        code = 1
    sys.exit(code or 0)


def _say(text: str) -> None:
    print(f"error: {one_line(text)}", file=sys.stderr)
