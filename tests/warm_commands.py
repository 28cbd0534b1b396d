"""fedmed's commands as a user types them, each in a fork of one process that has imported torch: seconds less for each.

`fedmed.cli.main` runs whole; only the interpreter's start and the imports are not repeated.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fedmed.experiments.running
import fedmed.reporting.report
import fedmed.training.predict.batch  # noqa: F401  # imported for the forks, as the two above are
from fedmed.cli import main

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([__name__])


def run_command(*arguments: object, timeout: float = 280, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The finished command, with what it printed."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _server.Process(target=_command, args=(words, str(cwd or Path.cwd()), dict(os.environ), out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(["fedmed", *words], timeout)
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _command(words: list[str], cwd: str, environment: dict[str, str], out: Path, err: Path) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["fedmed", *words]
    main()
