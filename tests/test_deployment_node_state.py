"""A SuperNode waits for the answer to a message as long as it runs, so each has one: with Flower's own functions."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory, nodestate_factory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.servicer.runtime.runtime_handlers import pull_messages
from flwr.supernode.start_client_internal import _pull_and_store_message, _push_messages

from fedmed.deployment.node_state import AnsweringState, MessageLost, keep_answering

RUN, NODE = 7, 3


@pytest.fixture(autouse=True)
def task(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", RUN)


class SuperNode:
    """A SuperNode's state, and Flower's own loop around it, whose server is the test."""

    def __init__(self, kind: type[InMemoryNodeState]) -> None:
        self.store = ObjectStoreFactory(":flwr-in-memory:").store()
        self.state = kind(self.store)
        self.state.set_node_id(NODE)
        self.state.store_run(Run.create_empty(RUN))
        self.sent: list[Message] = []
        self.objects: dict[str, bytes] = {}
        self.lost = False

    def take(self) -> int:
        """A message comes from the server; gives its task."""
        message = Message(RecordDict({"config": ConfigRecord({"round": 1})}), NODE, "train", ttl=60)
        message.metadata.__dict__.update(_run_id=RUN, _message_id=message.object_id)
        self.objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        _pull_and_store_message(
            state=self.state, object_store=self.store, node_config={},
            receive=lambda: (message, get_object_tree(message)), get_run=None, get_fab=None,
            pull_object=self.fetched, confirm_message_received=lambda run, name: None, trusted_entities=None,
        )  # fmt: skip
        return max(self.state.get_tasks(), key=lambda task: task.pending_at).task_id

    def fetched(self, run: int, name: str) -> bytes:
        if self.lost:
            raise ConnectionResetError
        return self.objects[name]

    def read(self) -> int:
        """How many messages the task that runs now is given."""
        return len(pull_messages(PullAppMessagesRequest(), self.state, SimpleNamespace(run_id=RUN)).messages_list)

    def answered(self, within_s: float = 5.0) -> bool:
        """Whether the loop sends an answer."""
        push = (lambda run, session, name, content: bytes(content),)
        loop = threading.Thread(target=_push_messages, args=(self.state, self.store, self.send, *push), daemon=True)
        loop.start()
        loop.join(within_s)
        return not loop.is_alive()

    def send(self, message: Message, tree: object, runtime: float) -> tuple[set[str], str]:
        self.sent.append(message)
        return {each.object_id for each in iterate_object_tree(tree)}, ""

    def hand_over(self) -> None:
        """The task announces its answer, and sends no piece of it."""
        (message,) = [entry.message for entry in self.state.msg_store.values()]
        reply = Message(RecordDict({"metrics": MetricRecord({"loss": 0.5})}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.state.store_message_and_object_tree(reply, get_object_tree(reply), self.state.start_session(RUN))

    def silence(self) -> None:
        """No heartbeat came for long."""
        for record in self.state.task_token_store.values():
            record.active_until -= timedelta(hours=1)


def killed_before_it_read(node: SuperNode) -> None:
    task = node.take()
    node.state.claim_task(task)
    node.state.activate_task(task)
    node.silence()


def failed_before_it_read(node: SuperNode) -> None:
    task = node.take()
    node.state.claim_task(task)
    node.state.activate_task(task)
    node.state.finish_task(task, SubStatus.FAILED, "no memory")


@pytest.mark.parametrize("end", [killed_before_it_read, failed_before_it_read])
def test_a_task_that_ends_before_it_read_its_message_is_answered_for(end):
    node = SuperNode(AnsweringState)
    end(node)
    assert node.answered()
    (answer,) = node.sent
    assert answer.error.code == ErrorCode.CLIENT_APP_CRASHED, "by which the server asks once more"
    assert node.take() and node.read() == 1, "the next message is taken and read"
    flower = SuperNode(InMemoryNodeState)
    end(flower)
    assert not flower.answered(within_s=2.0), "Flower answers by itself; the state of our own is needed no more"


@pytest.mark.parametrize("sending", [False, True], ids=["before-it-is-sent", "while-it-is-sent"])
def test_an_answer_of_which_pieces_are_missing_for_ever_is_not_waited_for(sending):
    def killed(node: SuperNode) -> threading.Thread:
        task = node.take()
        node.state.claim_task(task)
        node.state.activate_task(task)
        assert node.read() == 1
        node.hand_over()
        loop = threading.Thread(target=node.answered, args=(30.0,), daemon=True)
        if sending:
            loop.start()
            time.sleep(0.2)
        node.silence()
        node.state.get_messages_legacy(run_ids=[0], is_reply=True)  # as anything that looks whether tasks are alive
        if not sending:
            loop.start()
        loop.join(3.0)
        return loop

    node = SuperNode(AnsweringState)
    assert not killed(node).is_alive()
    assert [message.has_error() for message in node.sent] == [not sending]
    assert node.take() and node.read() == 1, "and nothing of it is left in the way of the next"
    assert not node.answered(within_s=0.5)
    assert killed(SuperNode(InMemoryNodeState)).is_alive(), "Flower gives up by itself; ours is needed no more"


def test_a_late_word_of_a_task_that_failed_does_not_answer_the_next_message():
    node = SuperNode(AnsweringState)
    first = node.take()
    node.state.claim_task(first)
    node.state.activate_task(first)
    assert node.read() == 1
    node.state.delete_messages()  # it was answered, and the answer is sent
    node.take()
    node.state.finish_task(first, SubStatus.FAILED, "it failed")
    assert not node.answered(within_s=1.0)


def test_a_task_that_is_quicker_than_its_message_waits_for_it():
    node = SuperNode(AnsweringState)
    waiting = threading.Timer(0.5, node.take)
    waiting.start()
    began = time.monotonic()
    assert node.read() == 1 and time.monotonic() - began > 0.4
    waiting.join()


def test_a_message_that_cannot_be_fetched_ends_the_connection():
    node = SuperNode(AnsweringState)
    node.lost = True
    with pytest.raises(MessageLost):
        node.take()


def test_a_supernode_of_this_process_has_such_a_state(monkeypatch):
    monkeypatch.setattr(nodestate_factory, "InMemoryNodeState", InMemoryNodeState)
    keep_answering()
    assert type(NodeStateFactory(ObjectStoreFactory(":flwr-in-memory:")).state()) is AnsweringState
