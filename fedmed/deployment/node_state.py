"""What a SuperNode knows of its messages, kept in such a way that each is answered.

A SuperNode takes one message, waits for its answer as long as it runs, and only then takes the next. Flower 1.41 can
leave it waiting for ever, connected and deaf:

* it announces a task before it keeps the message that it is for: a task that starts at once finds none, and fails;
* for a task that ends before it has read its message, it puts no answer in its place;
* of a task that ends while it hands over its answer, it waits for the rest.

And a message of which a piece cannot be fetched it forgets, so that the server waits until the round's deadline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.proto.task_pb2 import Task
from flwr.supercore.object_store import ObjectStore
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR, InMemoryNodeState

KEPT_S = 20.0  # from a task's announcement until its message is kept: no more than a busy machine needs
NAP_S = 0.05
NOT_FETCHED = "Pulling message objects failed"  # how Flower's word for it begins


class MessageLost(ConnectionError):
    """A message could not be fetched whole. The connection ends with it: that, the server sees, and asks again."""


class AnsweringState(InMemoryNodeState):
    """Flower's, for a SuperNode of which every message is answered."""

    def __init__(self, object_store: ObjectStore) -> None:
        """Nothing is known yet."""
        super().__init__(object_store)
        self._announced = 0  # the last task
        self._message_of: dict[int, str] = {}  # by task, until it ends

    def create_task(self, *arguments: Any, **options: Any) -> int | None:
        """A task, for the message that is kept next."""
        task_id = super().create_task(*arguments, **options)
        self._announced = task_id or 0
        return task_id

    def store_message(self, message: Message) -> str | None:
        """Keep a message, or an answer."""
        if not message.metadata.reply_to_message_id:
            self._message_of[self._announced] = message.metadata.message_id
        return super().store_message(message)

    def get_messages_legacy(
        self, *, run_ids: Sequence[int] | None = None, is_reply: bool | None = None, limit: int | None = None
    ) -> Sequence[Message]:
        """Messages that nobody has had yet. A task that asks for its own waits until it is kept."""
        until = time.monotonic() + KEPT_S
        while not (found := super().get_messages_legacy(run_ids=run_ids, is_reply=is_reply, limit=limit)):
            if is_reply is not False or time.monotonic() > until:
                break
            time.sleep(NAP_S)
        return found

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """End a task, and answer in its place if it did not.

        Raises:
            MessageLost: its message could not be fetched.
        """
        finished = super().finish_task(task_id, sub_status, details)
        if sub_status == SubStatus.FAILED and details.startswith(NOT_FETCHED):
            raise MessageLost(details)
        if finished:
            self._answer(task_id)
        return finished

    def _on_task_tokens_expired(self, tasks: list[Task]) -> None:
        super()._on_task_tokens_expired(tasks)
        for task in tasks:
            self._answer(task.task_id)

    def _answer(self, task_id: int) -> None:
        """Answer a task's message if nobody has. One that was answered and sent is no longer kept."""
        with self._lock_object_push_sessions, self.lock_msg_store:  # in Flower's order
            kept = self.msg_store.get(self._message_of.pop(task_id, ""))
            if kept is None or self._answered(kept.message.metadata.message_id):
                return
            kept.is_retrieved = True  # though by nobody: Flower answers only for what was read
            self.record_message_processing_start(kept.message.metadata.message_id)
            self._store_error_replies({kept.message.metadata.run_id}, CLIENT_APP_CRASHED_ERROR)

    def _answered(self, message_id: str) -> bool:
        """Whether a message has an answer, after one was dropped whose pieces will never all be here.

        If such a one is being sent, that fails, and is told to the server so.
        """
        for number, entry in list(self.msg_store.items()):
            if entry.message.metadata.reply_to_message_id == message_id:
                session = self._object_push_session_by_root.get(number)
                if session is None:  # it is here whole
                    return True
                self._cleanup_push_session(session, cleanup_messages=True)
                return entry.is_retrieved
        return False


def keep_answering() -> None:
    """Have Flower make such a state for the SuperNode of this process."""
    vars(nodestate_factory)["InMemoryNodeState"] = AnsweringState
