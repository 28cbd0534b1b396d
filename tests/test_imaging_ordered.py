"""Jobs side by side: outcomes in their order, a tool for one job at a time, and every tool closed at the end."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedmed.imaging.ordered import in_order


class Tools:
    """Opens tools and counts how many are open, were opened, and are used by two at once."""

    def __init__(self) -> None:
        self.open = self.opened = self.shared = 0

    @contextmanager
    def __call__(self) -> Iterator[threading.Lock]:
        self.opened += 1
        self.open += 1
        try:
            yield threading.Lock()
        finally:
            self.open -= 1

    def square(self, tool: threading.Lock, job: int) -> int:
        alone = tool.acquire(blocking=False)
        self.shared += not alone
        time.sleep(0.001)
        if alone:
            tool.release()
        return job * job


@pytest.mark.parametrize("count", [0, 1, 2, 50])
@pytest.mark.parametrize("processes", [1, 3])
def test_outcomes_come_in_the_order_of_the_jobs(count, processes):
    tools = Tools()
    assert list(in_order(range(count), tools.square, tools, processes=processes, ahead=2)) == [
        n * n for n in range(count)
    ]
    assert (tools.open, tools.opened, tools.shared) == (0, min(processes, count), 0)


def test_one_process_works_in_this_thread_and_begins_nothing_ahead():
    begun = []

    def one(_, job):
        begun.append((job, threading.current_thread()))
        return job

    outcomes = in_order(range(5), one, Tools(), processes=1, ahead=4)
    assert next(outcomes) == 0 and begun == [(0, threading.current_thread())]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_fails_is_told_after_the_outcomes_before_it(processes):
    tools = Tools()

    def one(tool, job):
        if job == 5:
            raise ValueError("the fifth")
        return tools.square(tool, job)

    found = in_order(range(100), one, tools, processes=processes, ahead=2)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ValueError, match="the fifth"):
        next(found)
    assert tools.open == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_who_stops_early_or_fails_leaves_no_tool_open(processes):
    tools = Tools()
    outcomes = in_order(range(100), tools.square, tools, processes=processes, ahead=2)
    next(outcomes)
    assert tools.open == processes
    with pytest.raises(RuntimeError):
        outcomes.throw(RuntimeError())
    assert tools.open == 0
