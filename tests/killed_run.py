"""A run that is killed by SIGKILL at the n-th write, fsync or rename of its server process, and then resumed.

    python tests/killed_run.py FOLDER fedavgm write:3 fsync:1 …     # kill there, resume, say what came out
    python tests/killed_run.py FOLDER scaffold all                  # at every call that an unbroken run makes

Everything is imported once; every run is a forked process of its own. One JSON object a line comes out.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

from conftest import toy_run

from fedmed.config import RunConfig, load, resolve_paths
from fedmed.federated.resume import record, take_up
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import local_grid, prepare_fork, run_on

KINDS = {"write": "write", "fsync": "fsync", "rename": "replace"}  # what it is called in `os`


def config_of(strategy: str) -> RunConfig:
    """A run of three sites, of which two take part in a round; with scaffold they keep something."""
    given = toy_run(
        "a-10",
        "b-8",
        "c-6",
        server="server-20",
        model={"norm": "batch"},
        train={
            "rounds": 3,
            "local_epochs": 2,
            "batch_size": 4,
            "momentum": 0.5 if strategy == "fedavgm" else 0.0,
            "schedule": "plateau",
            "plateau_patience": 1,
        },
        strategy={"name": strategy, "fraction": 0.5, "min_sites": 2, "keep_checkpoints": 2},
        evaluate={"bootstrap": 5, "sites": "every"},
        simulation={"workers": 1, "device": "cpu"},
    )
    return resolve_paths(given, Path("/hospitals"))  # as a run file's are


def count_calls(at: str = "") -> Counter[str]:
    """Count calls of this process from here on, and end it at one of them: "write:3" is the third write.

    A write is cut in half first, as a full page of a real one would be.
    """
    calls: Counter[str] = Counter()
    kind_at, _, number_at = at.partition(":")

    def counted(kind, call):
        def wrapper(*arguments, **options):
            calls[kind] += 1
            if kind == kind_at and calls[kind] == int(number_at):
                if kind == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for kind, name in KINDS.items():
        setattr(os, name, counted(kind, getattr(os, name)))
    return calls


def begin(config: RunConfig, path: Path, at: str = "") -> None:
    folder = RunFolder.create(path, config)
    record(folder, config)
    with local_grid(config, folder) as grid:
        calls = count_calls(at)
        run_on(grid, config, folder, lambda event: None)
    (path / "calls").write_text(json.dumps(calls))


def resume(path: Path) -> None:
    config = load(path / "run.toml")
    if not take_up(RunFolder(path), config):
        return
    folder = RunFolder.resume(path)
    with local_grid(config, folder) as grid:
        run_on(grid, config, folder, lambda event: None)


def forked(act, *arguments) -> int:
    """Run a function in a process of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kept_at_sites(home: Path) -> dict[str, str]:
    """By site and file, the digest of what it keeps, in a folder for each run: a first one may not have come far."""
    folders = sorted(home.glob("*/*/"), key=lambda folder: folder.stat().st_mtime_ns)
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    return {f"{file.parts[-3]}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def outcome(path: Path) -> dict:
    """All of a run that must not depend on whether it was interrupted."""
    files = ["model.safetensors", "checkpoints/round-0002.safetensors", "checkpoints/round-0003.safetensors"]
    result = json.loads((path / "result.json").read_text())
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return {
        "files": {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files},
        "sites": kept_at_sites(path / "sites"),
        "result": {key: result[key] for key in ("status", "reason", "rounds", "server", "sites")},
        "log": [
            [entry["round"], entry["joined"], entry["failed"], entry["server_metrics"]]
            for entry in result["rounds_log"]
        ],
        "kept": sorted(file.name for file in (path / "checkpoints").iterdir()),
        "spool": (path / "spool").exists(),
        "last_event": events[-1]["kind"],
        "times_add_up": result["timing"]["total_s"] >= result["timing"]["train_s"] > 0,
    }


def main(home: Path, strategy: str, *what: str) -> None:
    config = config_of(strategy)
    prepare_fork(config)  # the imports that take seconds
    whole = home / "whole"
    assert forked(begin, config, whole) == 0, "the unbroken run failed"
    calls = json.loads((whole / "calls").read_text())
    print(json.dumps({"calls": calls, **outcome(whole)}), flush=True)
    if what == ("all",):
        what = tuple(f"{kind}:{number}" for kind, count in calls.items() for number in range(1, count + 1))
    for at in what:
        path = home / at.replace(":", "-")
        killed = forked(begin, config, path, at)
        resumed = forked(resume, path)
        print(
            json.dumps({"at": at, "killed": killed, "resumed": resumed, **(outcome(path) if not resumed else {})}),
            flush=True,
        )


if __name__ == "__main__":
    os.environ["FEDMED_CACHE"] = str(Path(sys.argv[1]) / "cache")
    main(Path(sys.argv[1]), *sys.argv[2:])
