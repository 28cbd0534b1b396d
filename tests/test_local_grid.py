"""The grid of one machine, with real worker processes."""

import os
import signal
import time

import psutil
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmed.errors import RunFailed
from fedmed.federated.local_grid import LocalGrid
from fedmed.federated.local_pool import Given, WorkerPool
from fedmed.federated.local_worker import answer, read_answer
from fedmed.federated.wire import _record, decode_vector, encode_vector

pytestmark = pytest.mark.simulation
app = ClientApp()
server = {"threads": 0}  # of the parent, as a worker saw it when it was forked


@app.train()
def train(message: Message, context):
    """Do what the message asks, and say who did it."""
    what = message.content["task"]["do"]
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(3600)
    if what == "raise":
        raise ValueError("secret text")
    vector = decode_vector(message.content["network"]["w"]) * context.node_id
    metrics = MetricRecord({"node": context.node_id, "pid": os.getpid(), "threads": server["threads"]})
    return Message(RecordDict({"out": _record({"w": encode_vector(vector)}), "who": metrics}), reply_to=message)


@pytest.fixture
def grid(tmp_path):
    with LocalGrid(app, [{} for _ in range(6)], {}, workers=2, spool=tmp_path) as grid:
        before = grid.worker_pids
        yield grid
        known = {*before, *grid.worker_pids}
    assert not [pid for pid in known if psutil.pid_exists(pid)]


def content(do: str = "double", size: int = 5) -> RecordDict:
    import numpy as np

    vector = np.arange(size, dtype=np.float32)
    return RecordDict({"task": ConfigRecord({"do": do}), "network": _record({"w": encode_vector(vector)})})


def exchange(grid, contents: dict[int, RecordDict], ttl: float = 60.0) -> dict[int, Message]:
    messages = [Message(each, node, "train", ttl=ttl, group_id="1") for node, each in contents.items()]
    ids = dict(zip(contents, grid.push_messages(messages), strict=True))
    replies: dict[int, Message] = {}
    deadline = time.monotonic() + 30
    while len(replies) < len(ids) and time.monotonic() < deadline:
        for node, number in ids.items():
            for reply in grid.pull_messages([number]) if node not in replies else []:
                replies[node] = reply
                if reply.has_content():
                    value = decode_vector(reply.content["out"]["w"])
                    assert value[1] == node, "read before the next pull, as promised"
    return replies


def test_every_node_answers_from_a_worker(grid):
    shared = content()
    replies = exchange(grid, dict.fromkeys(range(1, 7), shared))
    assert {reply.content["who"]["node"] for reply in replies.values()} == set(range(1, 7))
    assert {reply.content["who"]["pid"] for reply in replies.values()} <= set(grid.worker_pids)


@pytest.mark.parametrize("said", [b'{"slot": "slot-1"}', b"error\n2 is", Error(2, "no room, é\nat all"), Error(8, "")])
def test_what_a_worker_says_is_read_as_it_was_meant(said):
    heard = read_answer(answer(said))
    assert vars(heard) == vars(said) if isinstance(said, Error) else heard == said


def test_a_name_that_is_no_text_is_told_with_a_question_mark():
    assert read_answer(answer(Error(2, "caf\udce4.toml: no such file"))).reason == "caf?.toml: no such file"


def test_slots_are_used_again(grid, tmp_path):
    for _ in range(20):
        exchange(grid, dict.fromkeys(range(1, 7), content(size=1000)))
    assert len(list(tmp_path.iterdir())) <= 10


def test_replies_pulled_out_of_order_wait_on_disk(grid, tmp_path):
    messages = [Message(content(), node, "train", group_id="1") for node in range(1, 7)]
    ids = list(grid.push_messages(messages))
    order = [5, 0, 3, 1, 4, 2]
    seen = []
    for index in order:
        while not (replies := list(grid.pull_messages([ids[index]]))):
            pass
        seen.append(decode_vector(replies[0].content["out"]["w"])[1])
    assert seen == [index + 1 for index in order]


def test_a_full_spool_holds_workers_back_and_every_reply_still_comes(tmp_path):
    """Forty replies of 40 kB, room for four; the one that is pulled first was pushed last."""
    with LocalGrid(app, [{} for _ in range(40)], {}, workers=2, spool=tmp_path, spool_limit=160_000) as grid:
        messages = [Message(shared := content(size=10_000), 1, "train", group_id="1")]
        messages += [Message(shared, node, "train", group_id="1") for node in range(2, 41)]
        ids = list(grid.push_messages(messages))
        seen = []
        for place in reversed(range(40)):
            while not (replies := list(grid.pull_messages([ids[place]]))):
                pass
            seen.append(int(decode_vector(replies[0].content["out"]["w"])[1]))
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 600_000
    assert seen == list(range(40, 0, -1))


def test_a_killed_worker_is_one_failed_node_and_is_replaced(grid):
    replies = exchange(grid, {1: content(), 2: content("die"), 3: content(), 4: content()})
    assert replies[2].error.reason == "the worker process was killed by signal 9"
    assert all(replies[node].has_content() for node in (1, 3, 4))
    assert len(exchange(grid, {1: content(), 2: content()})) == 2


def test_a_worker_that_replaces_another_has_nothing_that_the_server_did_since_the_first_were_forked(grid, monkeypatch):
    """Threads and CUDA above all, which a forked process must not have had."""
    monkeypatch.setitem(server, "threads", 8)
    before = set(grid.worker_pids)
    exchange(grid, {1: content("die"), 2: content("die")})
    assert not before & set(grid.worker_pids)
    replies = exchange(grid, {node: content() for node in range(1, 7)})
    assert {reply.content["who"]["threads"] for reply in replies.values()} == {0}


def test_a_run_whose_workers_can_no_longer_be_replaced_fails_in_one_line(tmp_path):
    with LocalGrid(app, [{}], {}, workers=1, spool=tmp_path) as grid:
        forked_from = psutil.Process(grid.worker_pids[0]).parent()
        assert forked_from != psutil.Process()
        forked_from.kill()
        with pytest.raises(RunFailed, match="resume the run"):
            exchange(grid, {1: content("hang")})


def echo(channel, device):
    while data := channel.recv(9):
        channel.sendall(data)


def test_a_worker_that_fails_at_once_is_given_nothing_ahead():
    """It would take all sites of a round, one after the other, from the workers that are well."""
    pool = WorkerPool(echo, ["cpu"], 1)
    (worker,) = pool
    for well in (True, False):
        pool.give(worker, Given("1", "slot-1"), b"one")
        assert next(pool.answers(9)) == (worker, b"one")
        pool.finished(worker, well=well)
        pool.give(worker, Given("2", "slot-2"), b"two")
        assert worker.has_room == well
        assert next(pool.answers(9)) == (worker, b"two")
        pool.finished(worker, well=well)
    pool.close()


def test_an_exception_is_a_failed_node_without_its_text(grid):
    replies = exchange(grid, {1: content("raise"), 2: content()})
    assert replies[1].error.reason == "ValueError"
    assert replies[2].has_content()


def test_a_hanging_node_is_ended_at_its_deadline_and_the_rest_goes_on(grid):
    started = time.monotonic()
    replies = exchange(grid, {1: content("hang"), 2: content(), 3: content()}, ttl=1.5)
    assert replies[1].error.reason == "no answer before the round's deadline"
    assert replies[2].has_content()
    assert replies[3].has_content()
    assert time.monotonic() - started < 10


def test_workers_end_with_a_killed_parent(tmp_path):
    import subprocess
    import sys

    script = (
        "import os, sys, time; from pathlib import Path; from test_local_grid import app\n"
        "from fedmed.federated.local_grid import LocalGrid\n"
        "grid = LocalGrid(app, [{}, {}], {}, workers=2, spool=Path(sys.argv[1]))\n"
        "print(*grid.worker_pids, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive


def test_workers_are_dealt_the_devices_in_turn(tmp_path):
    """What places several hospitals on several GPUs, with the one device that is always there."""
    where = ClientApp()

    @where.query("hello")
    def hello(message, context):
        device = str(context.node_config["device"])
        return Message(RecordDict({"where": ConfigRecord({"device": device, "pid": os.getpid()})}), reply_to=message)

    with LocalGrid(where, [{}] * 4, {}, workers=2, spool=tmp_path, devices=("cpu", "cpu:0")) as grid:
        messages = [Message(RecordDict(), node, "query.hello", group_id="1") for node in range(1, 5)]
        seen = {}
        for number in list(grid.push_messages(messages)):
            while not (replies := list(grid.pull_messages([number]))):
                pass
            where_from = replies[0].content["where"]
            seen[where_from["pid"]] = where_from["device"]
        assert [seen.get(pid, device) for pid, device in zip(grid.worker_pids, ("cpu", "cpu:0"), strict=True)] == [
            "cpu",
            "cpu:0",
        ]


def test_one_process_per_core_or_a_few_per_gpu(toy_config):
    from fedmed.federated.simulation import worker_count

    many = toy_config(*(f"s{number}-4" for number in range(100)), simulation={"workers": 0})
    assert worker_count(many, ["cpu"]) == len(os.sched_getaffinity(0))
    assert worker_count(many, ["cuda:0"]) <= 4
    assert worker_count(toy_config("a-4", "b-4", simulation={"workers": 9}), ["cpu"]) == 2
