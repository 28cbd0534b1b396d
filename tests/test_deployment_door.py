"""What a site does with tasks of the other kinds that Flower knows: the server names the kind, and brings the code."""

import contextlib
import hashlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message
from full_disks import mounted, needs_mount
from real_consortium import Started, free_port, make_consortium, processes_of, wait_for

from fedmed.deployment import door, flower_app
from fedmed.deployment.processes import Child, program
from fedmed.deployment.site_folder import read_site_folder
from fedmed.deployment.supernode import LAUNCHER, _environment, _warm, try_door
from fedmed.errors import ConfigError

RUN, NODE = 7, 9


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site that has joined; nobody runs."""
    root = tmp_path_factory.mktemp("door")
    make_consortium(root, ["a-40"])
    return read_site_folder(root / "a-40")


@contextlib.contextmanager
def tasks_for(site) -> Iterator[NodeState]:
    """The half of a SuperNode that serves its tasks, with its launcher of tasks and the warm process."""
    states, port = NodeStateFactory(ObjectStoreFactory()), free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(states), port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    log = logging.Logger("site")
    log.addHandler(logging.FileHandler(site.root / "site.log"))
    words = [program("flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
    children = [_warm(site, log), Child(words, _environment(site), log)]
    try:
        yield states.state()
    finally:
        for child in children:
            child.end()
        server.should_exit = True
        thread.join()
        for handler in log.handlers:
            handler.close()


@pytest.mark.deployment
@pytest.mark.timeout(300)
def test_a_killed_supernode_is_started_again_and_nothing_outlives_a_killed_runner(site, tmp_path):
    """No server is there: what a kill costs a run, `make test-slow` shows."""
    started = Started("site", "start", site.root, log=tmp_path / "out")
    try:
        started.says("connects to", 60)
        first = processes_of(started.process.pid)["supernode"]
        first.kill()
        started.says("the SuperNode ended: it lost the server, or was killed; again in 15 s", 30)
        wait_for(lambda: "supernode" in processes_of(started.process.pid), 60, started.log.read_text)
        assert processes_of(started.process.pid)["supernode"].pid != first.pid
        below = psutil.Process(started.process.pid).children(recursive=True)
        assert len(below) >= 2
        started.process.kill()
        assert psutil.wait_procs(below, timeout=60)[1] == []
    finally:
        started.stop()


def agent_app(folder: Path) -> bytes:
    """A server's own app, of a kind whose code Flower loads by itself."""
    files = ("pyproject.toml", "server/__init__.py", "server/app.py", "client/__init__.py", "client/app.py")
    content = {name: (flower_app.app_folder() / name).read_bytes() for name in files}
    mark = folder / "mark"
    content["client/app.py"] = f"open({str(mark)!r}, 'w').close()\napp = None\n".encode()
    parts = content["pyproject.toml"].partition(b"[tool.flwr.app.components]")
    content["pyproject.toml"] = parts[0] + parts[1] + b'\nagentapp = "client.app:app"\n' + parts[2]
    return build_fab_from_files(content)[0]


def test_every_name_by_which_flower_starts_a_task_leads_to_the_warm_process(site):
    (path,) = _environment(site)["PATH"].split(":")  # Python tries the next entry when a program cannot be executed
    texts = {(Path(path) / name).read_text() for name in TASK_TYPE_TO_COMMAND.values()}
    (text,) = texts
    assert door.__file__ in text
    assert {entry.name for entry in Path(path).iterdir()} == {*TASK_TYPE_TO_COMMAND.values(), LAUNCHER}


def test_a_door_that_flower_cannot_execute_under_some_name_is_found(site, monkeypatch):
    try_door(site)
    (site.flower / "bin" / "flwr-agentapp").write_text("#!/bin/sh\nexit 0\n")
    try_door(site)  # written anew
    monkeypatch.setattr("fedmed.deployment.supernode.door.__file__", "/nowhere/door.py")
    with pytest.raises(ConfigError, match="cannot be executed"):
        try_door(site)


NOEXEC = """
import sys
from pathlib import Path
from fedmed.deployment.site_folder import read_site_folder
from fedmed.deployment.supernode import start_site
start_site(read_site_folder(Path(sys.argv[1])), print)
"""


@needs_mount
def test_a_site_on_a_disk_without_programs_does_not_start(site):
    done = mounted(site.flower, "noexec", sys.executable, "-c", NOEXEC, str(site.file))
    assert "flower/bin/flwr-agentapp cannot be executed (PermissionError)" in done.stderr, done.stdout + done.stderr


@pytest.mark.deployment
@pytest.mark.timeout(300)
def test_code_that_a_server_calls_an_agent_is_refused_as_any_other_and_never_unpacked(site, tmp_path, monkeypatch):
    content = agent_app(tmp_path)
    for name, number in (("task_id", 1), ("run_id", RUN), ("node_id", 1)):
        monkeypatch.setattr(TaskIdentity, f"_{name}", number)
    with tasks_for(site) as state:
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        run = replace(Run.create_empty(RUN), fab_hash=fab.hash_str, series_id=RUN, fab_id="fedmed/fedmed")
        state.set_node_id(NODE)
        state.store_run(replace(run, fab_version="1.0.0", primary_task_type=TaskType.AGENT_APP))
        state.store_fab(fab)
        state.set_run_series_context(RUN, Context(RUN, NODE, {"site": str(site.file)}, RecordDict(), {}, RUN))
        message = Message(RecordDict({"x": ConfigRecord({"y": 1})}), NODE, "query.hello", group_id="hello")
        _insert_message(message, state, state.object_store)
        assert state.create_task(task_type=TaskType.AGENT_APP, run_id=RUN, fab_hash=fab.hash_str) is not None
        said = (site.root / "site.log").read_text
        replies: list[Message] = []
        wait_for(lambda: bool(replies.extend(state.get_messages_legacy(is_reply=True)) or replies), 90, said)
        assert "kit names (kit.apps)" in replies[0].error.reason
        wait_for(lambda: {task.status.status for task in state.get_tasks()} == {"finished"}, 60, said)
    assert not (tmp_path / "mark").exists()
    assert not (site.flower / "apps").exists()
