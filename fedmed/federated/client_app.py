"""The Flower ClientApp: records in, one library call, records out."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

import fedmed
from fedmed.errors import NO_ROOM, FedmedError
from fedmed.federated.identity import package_hash
from fedmed.federated.sites import site_of
from fedmed.federated.wire import decode_task, encode_update
from fedmed.training.site import Site
from fedmed.training.site_round import evaluate_round, site_card, train_round, unmask_round
from fedmed.types import Scalar, Task, Update

app = ClientApp()
NO_MEMORY = ("can't allocate memory", "out of memory")  # torch's own words, of the machine and of a GPU


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received network on this site's images."""
    return _answer(message, context, _update_from(train_round, context))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received network on the patients that this site holds out."""
    return _answer(message, context, _update_from(evaluate_round, context))


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Help to open a secure sum that this site's update is in."""
    return _answer(message, context, _update_from(unmask_round, context))


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this site is, what code it runs and how much data it brings."""

    def card(content: RecordDict, site: Site) -> RecordDict:
        code: dict[str, Scalar] = {"site": site.name, "version": fedmed.__version__, "code": package_hash()}
        try:
            facts = {**site_card(decode_task(content), site), "problem": ""}
        except Exception as error:  # said by name, so that the server can tell whose data need mending
            facts = {"problem": _reason(error, context)}
        return RecordDict({"card": ConfigRecord({**code, **facts})})

    return _answer(message, context, card)


def public_reason(error: Exception) -> str:
    """What a server may learn of an error at a site: never its text, unless it was written to be public."""
    if isinstance(error, FedmedError):
        return error.public
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "out of memory; smaller batches, or more memory for the site's tasks (task-memory-gib)"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"the site's disk is full ({os.strerror(error.errno)}); it needs room (task.disk)"
    home = Path(fedmed.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if home in Path(frame.filename).parents]
    place = f" in {Path(frames[-1].filename).relative_to(home.parent)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _reason(error: Exception, context: Context) -> str:
    """The public reason. At a hospital its own log gets all that fedmed says, on one line; no library's text."""
    public = public_reason(error)
    if context.node_config.get("site"):
        said = " ".join(str(error).split()) if isinstance(error, FedmedError) else public
        print(f"the task failed: {said}", file=sys.stderr, flush=True)
    return public


def _update_from(run: Callable[[Task, Site], Update], context: Context) -> Callable[[RecordDict, Site], RecordDict]:
    copy = not context.node_config.get("virtual")  # fedmed's workers write the reply to shared memory themselves
    return lambda content, site: encode_update(run(decode_task(content), site), copy=copy)


def _answer(message: Message, context: Context, act: Callable[[RecordDict, Site], RecordDict]) -> Message:
    try:
        return Message(act(message.content, site_of(context.node_config, context.run_config)), reply_to=message)
    except Exception as error:  # whatever happens here, its text stays here
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _reason(error, context)), reply_to=message)
