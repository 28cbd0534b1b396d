"""What tasks of a site meet, tried in processes that are forked as at a hospital; prints one JSON object.

It is a program of its own, because a process with threads must not fork workers.
"""

import json
import os
import resource
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import toy_run
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from real_consortium import recorded

from fedmed.deployment import confinement, task
from fedmed.deployment.site_folder import SiteFolder, read_site_folder
from fedmed.federated.wire import encode_task
from fedmed.training.network import resident_network
from fedmed.training.site import settings_for_sites
from fedmed.types import Task

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
REAL = task.app


def question(network: str) -> Message:
    """A round's first message, for the network of that name."""
    config = toy_run("a-40", model={"name": network}, train={"local_steps": 2}, privacy={})
    built = resident_network(config, "cpu")
    asked = Task(
        kind="train", round=1, settings=settings_for_sites(config), layout=built.layout.hash, weights=built.weights()
    )
    return Message(encode_task(asked), 2, "train", group_id="1")


def ask(site: SiteFolder, message: Message, *, deadline_s: float = 60.0, **limits: object) -> Message:
    """The answer of a worker with these limits."""
    config = site.config.model_copy(update=limits)
    worker = task.ConfinedWorker(replace(site, config=config))
    context = Context(1, 2, {"site": str(site.file)}, RecordDict(), {"strategy.round-timeout-s": deadline_s})
    reply = worker(message, context)
    kept = list((site.flower / "tmp").glob("task-*"))
    said.setdefault("left", []).append(Path(f"/proc/{worker.pid}").exists() or bool(kept))
    return reply


def shown(reply: Message) -> list[object]:
    return [reply.error.code, reply.error.reason] if reply.has_error() else ["ok", sorted(reply.content)]


def tries(message: Message, context: Context) -> Message:
    """An app that tries what a task must not do, and what it may."""
    site = Path(str(context.node_config["site"])).parent

    def outcome(act) -> str:
        try:
            return str(act())
        except OSError as error:
            return type(error).__name__ + f" {error.errno}"

    def send() -> int:
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            return sender.sendto(b"x", ("127.0.0.1", port))

    tried = {
        "connect": outcome(lambda: socket.create_connection(("127.0.0.1", port), timeout=5)),
        "send": outcome(send),
        "write data": outcome(lambda: (site / "images.bin").write_bytes(b"")),
        "remove data": outcome(lambda: (site / "images.bin").unlink()),
        "show data": outcome(lambda: (site / "images.bin").chmod(0o644)),
        "date data": outcome(lambda: os.utime(site / "images.bin", (0, 0))),
        "write shared memory": outcome(lambda: Path(f"/dev/shm/fedmed-try-{os.getpid()}").write_bytes(b"1")),
        "remove shared memory": outcome(lambda: Path(f"/dev/shm/fedmed-try-{os.getpid()}").unlink()),
        "read data": outcome(lambda: len((site / "images.bin").read_bytes())),
        "write key": outcome(lambda: (site / "keys" / "new").write_bytes(b"")),
        "write state": outcome(lambda: (site / "state" / "mark").write_bytes(b"12")),
        "rename state": outcome(lambda: (site / "state" / "mark").rename(site / "state" / "renamed").name),
        "temporary": outcome(lambda: Path(os.environ["TMPDIR"]).relative_to(site)),
        "processors": outcome(lambda: len(os.sched_getaffinity(0))),
    }
    return Message(RecordDict({"tried": ConfigRecord(tried)}), reply_to=message)


def spin(message: Message, context: Context) -> Message:
    while True:
        pass


def die(message: Message, context: Context) -> Message:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


if __name__ == "__main__":
    torch.set_num_threads(1)
    said: dict[str, object] = {}
    site = read_site_folder(Path(sys.argv[1]))
    (site.root / "images.bin").write_bytes(b"pixels")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    toy = question("toy:network")
    said["real"] = shown(ask(site, toy))
    said["ledger"] = (site.root / "state" / "ledger").exists()
    task.app = tries
    said["tried"] = dict(ask(site, toy, task_cpus=1).content["tried"])
    listener.settimeout(0.2)
    try:
        listener.accept()
        said["reached"] = True
    except TimeoutError:
        said["reached"] = False
    task.app = REAL
    said["hangs"] = shown(ask(site, question("toy:hanging"), task_stalls_after_s=2.0))
    said["memory"] = shown(ask(site, question("toy:greedy"), task_memory_gib=2.0))
    task.app = spin
    said["late"] = shown(ask(site, toy, deadline_s=2.0, task_stalls_after_s=1.0))
    said["too long"] = shown(ask(site, toy, deadline_s=1e6, task_longest_s=2.0, task_stalls_after_s=1.0))
    task.app = die
    said["killed"] = shown(ask(site, toy))
    task.app = REAL
    alone, confinement._own_network = confinement._own_network, lambda: ""
    before = recorded(site.root, "audit", "train")
    said["unconfined"] = shown(ask(site, toy, require_confinement=True))
    said["recorded while unconfined"] = recorded(site.root, "audit", "train") - before
    said["unconfined, not asked for"] = shown(ask(site, toy))
    confinement._own_network = alone
    for name, largest in (("no message", 1000), ("no record", 4000)):  # in bytes, of a file: real errors of the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        said[name] = shown(ask(site, toy))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said["room again"] = shown(ask(site, toy))
    print(json.dumps(said))
