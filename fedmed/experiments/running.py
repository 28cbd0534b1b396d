"""The runs of an experiment: each in a forked process of its own, several at once where cores and memory allow.

This process imports what a run needs once and starts no thread before the last run has ended, so that a fork is safe
and a small run takes no longer than its training. Whatever happens to a run happens to its process alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.config import RunConfig
from fedmed.errors import FedmedError, RunFailed
from fedmed.experiments.arms import Trial
from fedmed.experiments.predictions import write_predictions
from fedmed.experiments.reuse import folder_of, result_of
from fedmed.federated.run_folder import RunFolder, only_writer
from fedmed.federated.simulation import check, devices, local_grid, most_workers, prepare_fork, run_on, worker_count

POLL_S = 0.05
GUESS_MIB = 1500  # of a run, before one of the experiment has told
Said = Callable[["Standing"], None]
Failed = Callable[[Path, str], None]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far an experiment is, whenever that changes."""

    done: int  # runs that ended or were found finished
    reused: int
    runs: int  # all
    rounds_done: int  # of all runs
    rounds: int
    running: tuple[str, ...]  # labels of the runs at work


@dataclass
class _Run:
    """A run at work, in its own process."""

    trial: Trial
    path: Path
    pid: int
    workers: int
    rounds: int = 0
    read: int = 0  # bytes of events.jsonl


@dataclass
class _Experiment:
    waiting: list[tuple[Trial, Path]]
    working: list[_Run] = field(default_factory=list)
    ended: int = 0
    reused: int = 0
    rounds_done: int = 0
    memory_mib: int = 0  # of the largest run so far


def stop(run: Path, why: str) -> None:
    """End an experiment with the first run that fails.

    Raises:
        RunFailed: always.
    """
    raise RunFailed(why)


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    jobs: int = 0,
    watch: Said = lambda standing: None,
    failed: Failed = stop,
) -> dict[tuple[str, int], Path]:
    """Train every trial that is not finished, and have every network predict for all held-out patients.

    A finished run of the same configuration, data and code is taken as it is; one that was cut off goes on after its
    last checkpoint.

    Args:
        trials: what to run.
        folder: of the experiment; runs lie in `runs/`, what they printed in `logs/`.
        jobs: runs at once; 0 = as many as cores and free memory allow.
        watch: called whenever something has changed.
        failed: called with the folder of a run that failed, and why; the others go on if it returns.

    Returns:
        The run folder of every network and seed.

    Raises:
        FedmedError: a configuration or its data cannot work; nothing was run.
        RunFailed: a run failed; the others that were at work have ended, and all is kept.
    """
    runs = folder.absolute() / "runs"
    for name in ("runs", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    paths = {_key(trial): folder_of(trial, runs) for trial in trials}
    unfinished = [trial for trial in trials if result_of(paths[_key(trial)]) is None]
    for config in {trial.network: trial.config for trial in unfinished}.values():
        check(config)
    prepare_fork(trials[0].config)
    state = _Experiment(waiting=[(trial, paths[_key(trial)]) for trial in _distinct(trials, paths)])
    total = len(state.waiting)
    rounds = sum(trial.config.train.rounds for trial, _ in state.waiting)

    def say() -> None:
        done = state.rounds_done + sum(run.rounds for run in state.working)
        working = tuple(run.trial.label for run in state.working)
        watch(
            Standing(
                done=state.ended, reused=state.reused, runs=total, rounds_done=done, rounds=rounds, running=working
            )
        )

    with _ending_all(state.working):
        while state.waiting or state.working:
            changed = _start(state, folder, jobs)
            changed |= _advance(state, failed)
            if changed:
                say()
            elif state.working:
                time.sleep(POLL_S)
    return paths


def _key(trial: Trial) -> tuple[str, int]:
    return trial.network, trial.seed


def _distinct(trials: Sequence[Trial], paths: dict[tuple[str, int], Path]) -> list[Trial]:
    """One trial for every run folder: two arms may train the same thing."""
    return list({paths[_key(trial)]: trial for trial in reversed(trials)}.values())[::-1]


def _start(state: _Experiment, folder: Path, jobs: int) -> bool:
    """Start runs while there is room, and let finished ones pass; whether anything changed."""
    changed = False
    while state.waiting:
        trial, path = state.waiting[0]
        workers = worker_count(trial.config, devices(trial.config))
        if state.working and not _room(state, workers, jobs, trial.config):
            break
        state.waiting.pop(0)
        state.reused += result_of(path) is not None
        pid = _fork(trial, path, folder / "logs" / f"{path.name}.txt")
        state.working.append(_Run(trial=trial, path=path, pid=pid, workers=workers))
        changed = True
    return changed


def _room(state: _Experiment, workers: int, jobs: int, config: RunConfig) -> bool:
    if jobs:
        return len(state.working) < jobs
    taken = sum(run.workers for run in state.working)
    free = free_memory_mib()
    enough = free is None or free > 1.2 * (state.memory_mib or GUESS_MIB)
    return enough and taken + workers <= most_workers(devices(config))


def _advance(state: _Experiment, failed: Failed) -> bool:
    """Read what runs have written and take leave of those that ended; whether anything changed."""
    changed = False
    for run in list(state.working):
        changed |= _count_rounds(run)
        pid, status = os.waitpid(run.pid, os.WNOHANG)
        if pid == 0:
            continue
        state.working.remove(run)
        result, code = result_of(run.path), os.waitstatus_to_exitcode(status)
        state.ended += 1
        state.rounds_done += run.trial.config.train.rounds
        changed = True
        if code != 0 or result is None:
            failed(run.path, _why(run, code))
        else:
            state.memory_mib = max(state.memory_mib, int(result["peak_memory_mib"]))
    return changed


def _count_rounds(run: _Run) -> bool:
    try:
        with (run.path / "events.jsonl").open("rb") as file:
            file.seek(run.read)
            new = file.read()
    except OSError:
        return False
    run.read += len(new)
    finished = new.count(b'"kind": "round_finished"')
    run.rounds = min(run.rounds + finished, run.trial.config.train.rounds)
    return finished > 0


def _why(run: _Run, code: int) -> str:
    log = run.path.parent.parent / "logs" / f"{run.path.name}.txt"
    try:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        last = f"its process ended with {code}"
    return f"{run.trial.label}: {last.removeprefix('error: ')} (all of it in {log})"


def _fork(trial: Trial, path: Path, log: Path) -> int:
    """Start a process that trains one trial; it ends by itself, with 0 if the run is whole."""
    parent, threads = os.getpid(), 0 if _is_alone() else 1
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:  # nothing of this process may ever return into the code that forked it
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _write_to(log)
        _run(trial, path, parent, threads)
        code = 0
    except FedmedError as error:
        print(f"error: {error}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _write_to(log: Path) -> None:
    """Let this process print into a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # lives as long as the process
    sys.stderr = sys.stdout


def _is_alone() -> bool:
    """Whether this process has one thread; a fork would wait for ever for others that torch has made."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) == 1 if tasks.exists() else threading.active_count() == 1


def _run(trial: Trial, path: Path, parent: int, threads: int) -> None:
    def watch(event: Any) -> None:
        if os.getppid() != parent:  # killed: nobody waits for this run any more, and another may take it up
            raise KeyboardInterrupt

    if result_of(path) is None:
        folder = RunFolder(path) if (path / "run.toml").exists() else RunFolder.create(path, trial.config)
        with only_writer(path), local_grid(trial.config, folder) as grid:
            run_on(grid, trial.config, folder, watch, threads=threads)
    if result_of(path) is not None:
        write_predictions(path, trial.judges)
    else:
        raise RunFailed("the run paused: too few sites took part")


@contextlib.contextmanager
def _ending_all(working: list[_Run]) -> Iterator[None]:
    """Interrupt every run at work if anything goes wrong here, and wait until they have saved and ended."""
    try:
        yield
    except BaseException:
        for run in working:
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGINT)
        for run in working:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(run.pid, 0)
        raise


def free_memory_mib() -> int | None:
    """Memory that new processes can have, in MiB; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
