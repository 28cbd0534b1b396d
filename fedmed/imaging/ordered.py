"""Jobs done side by side, their outcomes in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

Job = TypeVar("Job")
Tool = TypeVar("Tool")
Outcome = TypeVar("Outcome")


def in_order(
    jobs: Sequence[Job],
    one: Callable[[Tool, Job], Outcome],
    tool: Callable[[], AbstractContextManager[Tool]],
    *,
    processes: int,
    ahead: int,
) -> Generator[Outcome, None, None]:
    """What `one` makes of every job, in order. One process starts no thread, and begins no job before its turn.

    Args:
        jobs: what is to be done.
        one: does a job with a tool that nobody else has meanwhile.
        tool: opens one, which has a process of its own; closed at the end, or when this is.
        processes: that work, at most one a job; each has a tool.
        ahead: jobs that each process has waiting, so that none is idle while outcomes are used.
    """
    if not jobs:
        return
    processes = max(1, min(processes, len(jobs)))
    with ExitStack() as stack:
        idle: SimpleQueue[Tool] = SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(tool()))
        if processes == 1:
            yield from map(partial(_with_idle, idle, one), jobs)
            return
        pool = ThreadPoolExecutor(processes)  # its threads only wait for the processes
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[Outcome]] = deque()
        for job in jobs:
            waiting.append(pool.submit(_with_idle, idle, one, job))
            if len(waiting) >= ahead * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _with_idle(idle: SimpleQueue[Tool], one: Callable[[Tool, Job], Outcome], job: Job) -> Outcome:
    tool = idle.get()
    try:
        return one(tool, job)
    finally:
        idle.put(tool)
