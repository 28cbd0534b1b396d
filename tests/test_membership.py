"""Rounds that hold: samples, turns, late, lost and returning sites, and what of an answer is not believed."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmed
from fedmed.config import StrategyConfig
from fedmed.errors import TooFewSites, UpdateRefused
from fedmed.federated import exchange as exchange_module
from fedmed.federated import membership as membership_module
from fedmed.federated.admission import decoded_update, validated_counts, validated_weights
from fedmed.federated.exchange import Failure, ask
from fedmed.federated.identity import package_hash
from fedmed.federated.member import member_of
from fedmed.federated.membership import Membership
from fedmed.federated.progress import Progress
from fedmed.federated.selection import in_turn, sample_size, sampled
from fedmed.federated.wire import encode_update
from fedmed.training.network import layout_of
from fedmed.types import Update, Weights

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as a running ServerApp has; messages ask for it
names = st.lists(st.integers(0, 99), min_size=1, max_size=30, unique=True).map(lambda n: [f"s{each}" for each in n])


@settings(max_examples=60, deadline=None)
@given(sites=names, size=st.integers(1, 35), seed=st.integers(0, 9), round=st.integers(1, 9))
def test_a_sample_is_of_the_stated_size_holds_the_required_sites_and_depends_on_no_order(sites, size, seed, round):
    always = sites[:2]
    given_ = {"size": size, "always": always, "seed": seed, "round": round}
    chosen = sampled(sites, **given_)
    assert set(always) <= set(chosen) <= set(sites)
    assert len(chosen) == len(set(chosen))
    assert len(chosen) == max(min(len(sites), size), len(always))
    assert sampled(list(reversed(sites)), **given_) == chosen


def test_the_size_of_a_sample_is_the_share_rounded_up_and_no_fewer_than_the_least():
    shares = {(10, 0.3, 1): 3, (10, 0.31, 1): 4, (25, 0.28, 1): 7, (50, 0.14, 1): 7, (10, 0.01, 2): 2, (3, 1.0, 9): 3}
    for (count, fraction, least), size in shares.items():
        assert sample_size(count, fraction=fraction, least=least) == size


def test_over_many_rounds_every_site_is_sampled_about_equally_often():
    sites = [f"s{number}" for number in range(10)]
    counts = dict.fromkeys(sites, 0)
    for round in range(1, 1001):
        for name in sampled(sites, size=3, seed=7, round=round):
            counts[name] += 1
    assert max(abs(count - 300) for count in counts.values()) < 60  # four standard deviations of a binomial


def test_turns_go_round():
    names = ["b", "a", "c"]
    assert [in_turn(names, here=names, round=round)[0] for round in range(1, 6)] == ["a", "b", "c", "a", "b"]
    assert in_turn([], here=[], round=3) == ()


def test_a_site_that_is_away_moves_nobody_elses_turn():
    assert [in_turn("abcd", here="abd", round=round)[0] for round in range(1, 6)] == ["a", "b", "d", "d", "a"]
    assert in_turn("abcd", here="abd", round=3) == ("d", "a", "b")


class Hospitals:
    """A grid of hospitals that answer a greeting as told; they come and go as `present` says."""

    def __init__(self, *nodes: int) -> None:
        self.present, self.deaf, self.cards, self.greeted = set(nodes), set(), {}, []
        self.registered: dict[int, str] = {}  # names of sites, by node
        self.crashing: set[int] = set()  # nodes whose task dies at a greeting
        self.killed: dict[int, int] = {}  # nodes that a message finds dead, and how often one looks until they are back
        self.cut: set[int] = set()  # nodes whose next answer does not come in whole
        self._sent: dict[str, Message] = {}

    def get_nodes(self):
        for node in self.killed.keys() - self.present:
            self.killed[node] -= 1
            if self.killed[node] == 0:
                self.present.add(node)
                del self.killed[node]
        return [NodeInfo(node_id=node, name=self.registered.get(node, "")) for node in sorted(self.present)]

    def push_messages(self, messages):
        for message in messages:
            number = str(len(self._sent))
            message.metadata.__dict__["_message_id"] = number
            self._sent[number] = message
            self.greeted.append(message.metadata.dst_node_id)
            yield number

    def pull_messages(self, numbers):
        for number in numbers:
            node = self._sent[number].metadata.dst_node_id
            if self._sent[number].metadata.created_at + self._sent[number].metadata.ttl < time.time():
                yield Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=self._sent[number])
            elif node in self.cut:
                self.cut.discard(node)
                yield Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "not sent whole"), reply_to=self._sent[number])
            elif node in self.killed:
                self.present.discard(node)
                yield Message(Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat"), reply_to=self._sent[number])
            elif node in self.crashing:
                yield Message(Error(ErrorCode.CLIENT_APP_CRASHED, "out of memory"), reply_to=self._sent[number])
            elif node in self.present and node not in self.deaf:
                answer = {**card(f"h{node}"), **self.cards.get(node, {})}
                yield Message(RecordDict({"card": ConfigRecord(answer)}), reply_to=self._sent[number])


def card(name: str, **changes: object) -> dict:
    counts = {"patients": 10, "images": 20, "holds-out": True, "modalities": 1, "unreadable": 0, "reasons": ""}
    return {"site": name, "version": fedmed.__version__, "code": package_hash(), "problem": "", **counts, **changes}


def roster(
    grid: Hospitals,
    progress: Progress | None = None,
    *,
    waits: list[str] | None = None,
    turns: bool = False,
    most: int = 0,
    **strategy: object,
) -> Membership:
    given_ = StrategyConfig(**{"min_sites": 1, "round_timeout_s": 0.2, **strategy})
    said = [] if waits is None else waits

    def waiting(names: str, seconds: float) -> None:
        said.append(names)
        assert 0 < seconds <= given_.round_timeout_s

    sites = Membership(grid, given_, 7, progress or Progress(), RecordDict, waits=waiting, turns=turns, most=most)
    sites.failures = sites.gather(lambda site, done, all: None)
    return sites


def progress_of(*names: str, **keys: object) -> Progress:
    """What a checkpoint keeps of a run that these sites have joined."""
    members = {name: member_of(RecordDict({"card": ConfigRecord(card(name))}), 99) for name in names}
    return Progress.from_json(json.loads(json.dumps(Progress(members=members, **keys).to_json())))


def told(failures: list[Failure]) -> list[tuple[str, str]]:
    return [(each.site, each.reason) for each in failures]


def test_a_late_site_is_greeted_at_the_start_of_a_round_and_joins(monkeypatch):
    grid = Hospitals(1, 2)
    sites = roster(grid)
    assert list(sites.asked(1)) == ["h1", "h2"]
    grid.present.add(3)
    assert sites.welcome(2).joined == ["h3"]
    assert list(sites.asked(2)) == ["h1", "h2", "h3"]
    assert sites.welcome(3).joined == []
    assert grid.greeted == [1, 2, 3], "everybody once"


def test_a_slow_newcomer_holds_no_round_up_and_joins_when_its_card_comes(monkeypatch):
    monkeypatch.setattr(membership_module, "NEWCOMER_S", 0.05)
    grid = Hospitals(1, 2)
    sites = roster(grid, round_timeout_s=30.0)
    grid.present.add(3)
    grid.deaf.add(3)
    started = time.monotonic()
    assert sites.welcome(2).joined == []
    assert sites.welcome(3).joined == []
    assert time.monotonic() - started < 5
    grid.deaf.clear()
    assert sites.welcome(4).joined == ["h3"]


def test_it_says_once_which_sites_it_waits_for():
    said: list[str] = []
    grid = Hospitals(1, 2)
    sites = roster(grid, progress_of("h2", "h3"), waits=said, min_sites=2)
    assert said == ["h3"], "a resumed run knows h3"
    grid.present.remove(2)
    sites.welcome(2)
    assert said[1:] == ["h2, h3"]
    said.clear()
    with pytest.raises(TooFewSites):
        roster(Hospitals(1), waits=said, min_sites=3)
    assert said == ["2 more"]
    said.clear()
    roster(Hospitals(1, 2), waits=said)
    assert not said


def test_a_site_that_is_not_connected_is_named_and_is_asked_again_when_it_is_back():
    grid = Hospitals(1, 2, 3)
    sites = roster(grid)
    grid.present.remove(2)
    arrivals = sites.welcome(2)
    assert [(each.site, each.reason) for each in arrivals.unreachable] == [("h2", "not connected")]
    assert list(sites.asked(2)) == ["h1", "h3"]
    grid.present.add(2)
    sites.welcome(3)
    assert list(sites.asked(3)) == ["h1", "h2", "h3"]


def test_after_lost_after_rounds_a_site_is_not_asked_comes_back_and_waits_longer_each_time():
    grid = Hospitals(1, 2)
    sites = roster(grid, lost_after=2)
    asked = {}
    for round in range(1, 20):
        sites.welcome(round)
        asked[round] = "h2" in sites.asked(round)
        if asked[round]:
            failure = sites.missed("h2", "no answer", round)
    assert [round for round, was in asked.items() if was] == [1, 2, 4, 8, 16]
    assert "no longer" not in failure.reason and "not asked again for 16 (strategy.lost-after)" in failure.reason
    assert sites.away == ["h2"]
    sites.answered("h1")
    assert sites.missing(["h1"]) is None


def test_one_update_clears_the_record_of_missed_rounds():
    sites = roster(Hospitals(1, 2), lost_after=2)
    for round in range(1, 10):
        sites.missed("h2", "no answer", round)
        sites.answered("h2")
    assert sites.away == []


def test_a_site_that_left_is_welcome_at_once_when_its_node_comes_back():
    grid = Hospitals(1, 2)
    sites = roster(grid, lost_after=1)
    sites.missed("h2", "no answer", 1)
    grid.present.remove(2)
    assert list(sites.welcome(2).unreachable) == [], "who left is not reported every round"
    grid.present.add(2)
    assert sites.welcome(3).joined == ["h2"]


def test_a_site_that_does_not_answer_when_it_is_greeted_again_is_named_and_left_alone_for_longer(monkeypatch):
    for name, value in (("GRACE_S", 0.0), ("NEWCOMER_S", 0.05)):
        monkeypatch.setattr(membership_module, name, value)
    grid = Hospitals(1, 2)
    sites = roster(grid, lost_after=1, round_timeout_s=0.01)
    sites.missed("h2", "no answer", 1)
    grid.deaf.add(2)
    refused = {round: [each.site for each in sites.welcome(round).refused] for round in range(2, 10)}
    assert {round: who for round, who in refused.items() if who} == {2: ["h2"], 4: ["h2"], 8: ["h2"]}
    grid.deaf.clear()
    assert sites.welcome(15).joined == []
    assert sites.welcome(16).joined == ["h2"]


def test_a_round_waits_for_a_quorum_of_nodes_until_the_deadline_and_no_longer():
    grid = Hospitals(1, 2)
    sites = roster(grid, min_sites=2)
    grid.present.remove(2)
    started = time.monotonic()
    sites.welcome(2)
    assert 0.2 <= time.monotonic() - started < 5
    assert (
        sites.missing(list(sites.asked(2))) == "1 of 2 sites took part; 2 are needed (strategy.min-sites, min-fraction)"
    )


def test_a_quorum_waits_for_a_node_that_dies_before_its_card_and_comes_back():
    grid = Hospitals(1, 2)
    grid.killed[2] = 3
    sites = roster(grid, min_sites=2, round_timeout_s=30.0)
    assert list(sites.asked(1)) == ["h1", "h2"]
    assert sites.failures == []
    assert grid.greeted == [1, 2, 2]


def test_nobody_waits_for_a_node_that_dies_before_its_card_if_the_others_are_enough():
    grid = Hospitals(1, 2)
    grid.registered, grid.killed = {1: "h1", 2: "h2"}, {2: 3}
    sites = roster(grid, round_timeout_s=30.0)
    assert [(each.site, each.reason) for each in sites.failures] == [("h2", "no heartbeat")]
    assert list(sites.asked(1)) == ["h1"]
    while 2 not in grid.present:
        sites.welcome(2)
    assert sites.welcome(3).joined == [] and list(sites.asked(3)) == ["h1", "h2"]


def test_a_node_that_stays_away_ends_the_wait_at_the_deadline():
    grid = Hospitals(1, 2)
    grid.killed[2] = 1_000_000
    started = time.monotonic()
    sites = roster(grid, min_sites=2, round_timeout_s=1.0)
    assert 0.9 <= time.monotonic() - started < 5
    assert sites.missing([each.name for each in sites.members]) is not None


def test_a_round_that_would_have_too_few_waits_for_a_node_that_died_and_asks_it_again():
    grid = Hospitals(1, 2, 3)
    sites = roster(grid, min_sites=2)
    grid.killed = {1: 1_000_000, 3: 2}
    grid.greeted.clear()
    failed: list[Failure] = []

    def needed(site: str) -> bool:
        return sites.needs(["h1", "h2", "h3"], failed, site)

    nodes, answered = {"h1": 1, "h2": 2, "h3": 3}, []
    for site, answer in ask(grid, RecordDict(), "train", nodes, group="4", timeout_s=30.0, retries=1, needed=needed):
        if isinstance(answer, str):
            failed.append(Failure(site=site, reason=answer))
        else:
            answered.append(site)
    assert answered == ["h2", "h3"] and [each.site for each in failed] == ["h1"]
    assert grid.greeted == [1, 2, 3, 3], "h1 was not needed, h3 was"


def test_a_site_that_never_answers_costs_no_other_site_its_answer(monkeypatch):
    for module in (membership_module, exchange_module):
        monkeypatch.setattr(module, "GRACE_S", 0.2)
    grid = Hospitals(1, 2, 3)
    grid.deaf.add(1)
    sites = roster(grid, round_timeout_s=0.3)
    assert [each.name for each in sites.members] == ["h2", "h3"]
    nodes = {"h1": 1, "h2": 2, "h3": 3}
    answers = dict(ask(grid, RecordDict(), "train", nodes, group="4", timeout_s=0.3))
    assert {site: isinstance(answer, str) for site, answer in answers.items()} == {"h1": True, "h2": False, "h3": False}


def test_a_site_that_goes_again_and_again_is_asked_again_as_often_as_said():
    grid = Hospitals(1, 2, 3)
    nodes = {"h1": 1, "h2": 2, "h3": 3}
    grid.killed = {2: 1}
    seen = grid.pull_messages

    def flapping(numbers):
        grid.killed[2] = 1
        return seen(numbers)

    grid.pull_messages = flapping
    given_ = {"group": "4", "timeout_s": 30.0, "needed": lambda site: True, "retries": 2}
    answers = dict(ask(grid, RecordDict(), "train", nodes, **given_))
    assert answers["h2"] == "no heartbeat"
    assert grid.greeted == [1, 2, 3, 2, 2]


def test_a_resumed_run_names_the_sites_that_have_not_come_back_in_every_round(monkeypatch):
    monkeypatch.setattr(membership_module, "RETURN_S", 0.1)
    grid = Hospitals(11, 12)  # another server gives other numbers
    grid.cards = {11: {"site": "h1"}, 12: {"site": "h2"}, 13: {"site": "h3"}}
    started = time.monotonic()
    sites = roster(grid, progress_of("h1", "h2", "h3"), round_timeout_s=30.0)
    assert 0.1 <= time.monotonic() - started < 5
    assert [each.name for each in sites.members] == ["h1", "h2", "h3"] and sites.failures == []
    for round in (5, 6):
        assert told(sites.welcome(round).unreachable) == [("h3", "not connected")]
        assert sites.asked(round) == {"h1": 11, "h2": 12}
    grid.present.add(13)
    assert sites.welcome(7).unreachable == [] and sites.asked(7) == {"h1": 11, "h2": 12, "h3": 13}


def test_a_resumed_run_waits_for_a_site_that_is_about_to_come_back():
    grid = Hospitals(1, 2)
    grid.killed = {3: 2}
    sites = roster(grid, progress_of("h1", "h2", "h3"), round_timeout_s=30.0)
    assert list(sites.asked(5)) == ["h1", "h2", "h3"]
    assert sites.failures == sites.welcome(5).unreachable == []


def test_a_resumed_run_waits_for_nobody_who_has_left():
    started = time.monotonic()
    sites = roster(Hospitals(1, 2), progress_of("h1", "h2", "h3", away={"h3": 9}), round_timeout_s=30.0)
    assert time.monotonic() - started < 5
    assert sites.welcome(5).unreachable == [] and sites.away == ["h3"]


def test_the_share_of_a_resumed_run_is_of_all_sites_that_ever_joined():
    known = [f"h{number}" for number in range(1, 11)]
    sites = roster(Hospitals(*range(1, 5)), progress_of(*known), min_fraction=0.5)
    assert sites.missing(sites.here).startswith("4 of 10 sites took part; 5 are needed")


def test_a_known_site_that_cannot_take_part_any_more_is_told_with_its_own_reason():
    grid = Hospitals(1, 2)
    grid.cards[2] = {"problem": "no disk"}
    started = time.monotonic()
    sites = roster(grid, progress_of("h1", "h2"), round_timeout_s=30.0)
    assert time.monotonic() - started < 5, "it is there; nobody waits for it"
    arrivals = sites.welcome(5)
    assert (told(arrivals.unreachable), arrivals.refused) == ([("h2", "no disk")], [])


def test_a_round_with_too_few_does_not_wait_for_a_site_that_is_there_and_cannot_take_part():
    grid = Hospitals(1, 2)
    grid.cards[2] = {"problem": "no disk"}
    sites = roster(grid, progress_of("h1", "h2", "h3", away={"h3": 9}), min_fraction=0.7, round_timeout_s=30.0)
    started = time.monotonic()
    assert told(sites.welcome(5).unreachable) == [("h2", "no disk")]
    assert time.monotonic() - started < 5


def test_the_start_waits_for_a_required_site_until_the_deadline():
    grid = Hospitals(1, 2)
    grid.killed = {3: 2}
    sites = roster(grid, required_sites=("h3",), round_timeout_s=30.0)
    assert sites.missing(sites.here) is None and list(sites.asked(1)) == ["h1", "h2", "h3"]
    started = time.monotonic()
    sites = roster(Hospitals(1, 2), required_sites=("h3",), round_timeout_s=1.0)
    assert 0.9 <= time.monotonic() - started < 5
    assert sites.missing(sites.here) == "required site h3 did not take part"


@pytest.mark.parametrize(("crashing", "problem"), [({3}, ""), (set(), "no disk")])
def test_the_start_does_not_wait_for_a_required_site_that_is_there_and_cannot_take_part(crashing, problem):
    grid = Hospitals(1, 2, 3)
    grid.crashing, grid.cards[3] = crashing, {"problem": problem}
    started = time.monotonic()
    sites = roster(grid, required_sites=("h3",), round_timeout_s=30.0)
    assert time.monotonic() - started < 5
    assert [each.reason for each in sites.failures] == ["out of memory" if crashing else "no disk"]


def test_a_site_whose_task_dies_at_the_greeting_is_greeted_again_in_the_next_round():
    grid = Hospitals(1, 2)
    grid.crashing.add(2)
    sites = roster(grid)
    assert told(sites.failures) == [("node-2", "out of memory")]
    grid.crashing.clear()
    assert sites.welcome(1).joined == ["h2"] and list(sites.asked(1)) == ["h1", "h2"]
    assert sites.welcome(2).joined == [] and grid.greeted == [1, 2, 2]


def test_a_site_that_cannot_take_part_is_greeted_again_after_longer_and_longer_and_joins_when_it_can():
    grid = Hospitals(1, 2)
    grid.cards[2] = {"problem": "the site's disk is full"}
    sites = roster(grid, lost_after=2)
    refused = {round: told(sites.welcome(round).refused) for round in range(1, 15)}
    again = [("h2", "the site's disk is full")]
    assert {round: who for round, who in refused.items() if who} == {1: again, 3: again, 7: again}
    grid.cards.clear()
    assert sites.welcome(15).joined == ["h2"]
    assert grid.greeted.count(2) == 5


def test_a_run_that_is_meant_for_so_many_sites_takes_no_other():
    grid = Hospitals(1, 2, 3)
    sites = roster(grid, most=2)
    why = "the run is meant for 2 sites, and as many have joined (privacy.sites)"
    assert told(sites.failures) == [("h3", why)] and list(sites.asked(1)) == ["h1", "h2"]
    resumed = roster(grid, progress_of("h2", "h3"), most=2)
    assert told(resumed.failures) == [("h1", why)] and list(resumed.asked(1)) == ["h2", "h3"]


def test_a_round_that_has_too_few_sites_for_its_rule_is_known_before_they_train():
    sites = roster(Hospitals(1, 2, 3, 4, 5), combine="krum")
    assert sites.missing(sites.here) is None
    assert sites.missing(["h1", "h2", "h3", "h4"]).endswith("needs 5 sites; there are 4")


def test_a_sampled_round_needs_its_share_of_the_sample_and_a_required_site_is_in_it():
    grid = Hospitals(*range(1, 11))
    sites = roster(grid, fraction=0.4, min_fraction=0.5, required_sites=("h7",))
    for round in range(1, 20):
        asked = sites.asked(round)
        assert len(asked) == 4
        assert "h7" in asked
    assert sites.missing(["h7", "h1"]) is None
    assert "1 of 4 sites" in sites.missing(["h7"])
    assert sites.missing(["h1", "h2", "h3"]) == "required site h7 did not take part"


def test_a_sample_is_as_large_as_the_quorum_asks_while_sites_are_away():
    grid = Hospitals(*range(1, 11))
    sites = roster(grid, fraction=0.5, min_fraction=1.0)
    grid.present -= {9, 10}
    sites.welcome(2)
    assert len(sites.asked(2)) == 5
    assert sites.missing(list(sites.asked(2))) is None


def test_turns_ask_one_site_a_round():
    sites = roster(Hospitals(1, 2, 3), turns=True, min_sites=2)
    assert [list(sites.asked(round)) for round in (1, 2, 3, 4)] == [["h1"], ["h2"], ["h3"], ["h1"]]
    assert sites.missing(["h2"]) is None
    assert sites.missing([]) is not None
    assert list(sites.asked(2, passed=["h2"])) == ["h3"]
    assert list(sites.asked(2, passed=["h2", "h3", "h1"])) == []
    assert not sites.needs(["h2"], [], "h2"), "another one takes its turn"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": "a\nb"}, "its name is none that a site can have"),
        ({"site": "x" * 81}, "its name is none that a site can have"),
        ({"patients": -1}, "malformed"),
        ({"images": "many"}, "malformed"),
        ({"images": ""}, "malformed"),
        ({"images": 2**62}, "malformed"),
        ({"patients": 10**9 + 1}, "malformed"),
        ({"unreadable": -1}, "malformed"),
        ({"unreadable": "many"}, "malformed"),
        ({"code": "other"}, "with other code than the server's"),
        ({"code": "other", "problem": "the server's message is of another version"}, "with other code than"),
        ({"problem": "no\ndisk" + "x" * 9000}, "no disk"),
    ],
)
def test_a_card_is_text_from_elsewhere(changes, reason):
    with pytest.raises(UpdateRefused, match=reason) as error:
        member_of(RecordDict({"card": ConfigRecord(card("h1", **changes))}), 1)
    assert len(str(error.value)) < 600
    with pytest.raises(UpdateRefused, match="malformed"):
        member_of(RecordDict(), 1)


def test_a_card_may_not_tell_how_many_images_are_unreadable():
    told = [member_of(RecordDict({"card": ConfigRecord(card("h1", unreadable=n))}), 1).unreadable for n in ("", 0, 12)]
    assert told == [None, 0, 12]


def test_two_nodes_with_one_name_are_one_site():
    grid = Hospitals(1, 2)
    grid.cards[2] = {"site": "h1"}
    sites = roster(grid)
    assert [(each.site, each.reason) for each in sites.failures] == [("h1", "two nodes have this name")]
    assert list(sites.asked(1)) == ["h1"]


def test_a_site_takes_part_under_the_name_of_its_key_alone():
    grid = Hospitals(1, 2, 3)
    grid.registered = {1: "h1", 2: "h2", 3: "h3"}
    grid.cards[2] = {"site": "h1"}
    grid.cards[3] = {"site": "h2", "problem": "no disk"}
    sites = roster(grid)
    assert {each.site for each in sites.failures} == {"h2", "h3"}
    assert all("its key is registered for" in each.reason for each in sites.failures)
    assert sites["h1"].node == 1 and list(sites.asked(1)) == ["h1"]


LAYOUT = layout_of(torch.nn.BatchNorm1d(3))


def update_of(
    size: int = 6, *, change: float = 0.0, variance: float = 0.0, examples: object = 5, **facts: object
) -> Update:
    buffers = np.array([0, -1, 0, 0, 0, variance, 0], np.float32)  # three means, three variances, a counter
    weights = Weights(parameters=np.full(size, change, np.float32), buffers=buffers)
    return Update(weights=weights, layout=LAYOUT.hash, num_examples=examples, facts={"patients": 3, **facts})


SENT = Weights(parameters=np.zeros(6, np.float32), buffers=np.zeros(7, np.float32))


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (update_of(examples=0), "claims 0 training images"),
        (update_of(examples=21), "claims 21 training images; the site's card names 20 in all"),
        (update_of(patients=11), "claims 11 training patients; the site's card names 10"),
        (update_of(patients="three"), "no number of training patients"),
        (update_of(patients=True), "training patients"),
        (update_of(patients=None), "no number of training patients"),
        (update_of(size=7), r"\(7, 7\) values"),
        (update_of(change=np.nan), "parameters are not finite"),
        (update_of(change=np.inf), "parameters are not finite"),
        (update_of(change=1e30), "parameters are not finite"),
        (update_of(change=2.0), "moved the network by 4.899, above strategy.max-update-norm = 4"),
        (update_of(variance=-1e-3), "a running variance below 0"),
    ],
)
def test_what_cannot_be_true_is_refused_with_the_reason(update, reason):
    def admit() -> None:
        validated_counts(update, images=20, patients=10)
        validated_weights(update, LAYOUT, sent=SENT, max_norm=4.0)

    with pytest.raises(UpdateRefused, match=reason):
        admit()


def test_the_norm_is_that_of_numpy_and_zero_lets_everything_in():
    rng = np.random.default_rng(0)
    layout = layout_of(torch.nn.Linear(500, 400))
    sent, got = (rng.normal(size=layout.num_parameters).astype(np.float32) for _ in range(2))
    empty = np.zeros(0, np.float32)
    update = Update(weights=Weights(parameters=got, buffers=empty), layout=layout.hash, num_examples=1)
    norm = float(np.linalg.norm(got.astype(np.float64) - sent))
    origin = Weights(parameters=sent, buffers=empty)
    validated_weights(update, layout, sent=origin, max_norm=norm * 1.0001)
    validated_weights(update, layout, sent=origin)
    with pytest.raises(UpdateRefused, match="max-update-norm"):
        validated_weights(update, layout, sent=origin, max_norm=norm * 0.9999)


@pytest.mark.parametrize("count", ["Infinity", "1e999", "[1]", "null", '"x"'])
def test_a_reply_with_impossible_numbers_is_refused_and_ends_nothing(count):
    content = encode_update(update_of())
    facts = json.loads(str(content["update"]["json"]))
    text = json.dumps({**facts, "num-examples": "HERE"}).replace('"HERE"', count)
    content["update"] = ConfigRecord({"json": text})
    with pytest.raises(UpdateRefused, match="the reply is no update"):
        decoded_update(content, SimpleNamespace(kind="classification", labels=("a",)))


class Confused:
    """A grid whose nodes answer something else than they were asked."""

    def __init__(self, replies):
        self._replies, self.sent = replies, []

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(len(self.sent))
            self.sent.append(message)
            yield message.metadata.message_id

    def pull_messages(self, numbers):
        return [self._replies(self.sent[int(number)]) for number in numbers]


def test_an_answer_to_another_round_or_of_another_node_is_not_taken():
    def of(node: int, group: str):
        return lambda asked: Message(RecordDict(), reply_to=Message(RecordDict(), node, "train", group_id=group))

    def asked(replies):
        return dict(ask(Confused(replies), RecordDict(), "train", {"a": 4}, group="3", timeout_s=1.0))["a"]

    assert asked(of(4, "3")) == RecordDict()
    assert asked(of(4, "2")) == "the answer is of another round or of another node"
    assert asked(of(5, "3")) == "the answer is of another round or of another node"
    long = asked(lambda sent: Message(Error(1, "line\n" * 1000), reply_to=sent))
    assert len(long) <= 500 and "\n" not in long


@pytest.mark.parametrize(
    ("there", "timeout_s", "said", "asked"),
    [(True, 30.0, None, [1, 2, 2]), (False, 30.0, "not sent whole", [1, 2]), (True, 0.0, "not sent whole", [1, 2])],
    ids=["there again", "still away", "after the deadline"],
)
def test_a_site_that_was_cut_off_while_it_answered_is_asked_again_once_it_is_there(there, timeout_s, said, asked):
    grid = Hospitals(1, 2)
    grid.cut = {2}
    if not there:
        grid.present.discard(2)
    nodes = {"h1": 1, "h2": 2}
    answers = dict(ask(grid, RecordDict(), "train", nodes, group="4", timeout_s=timeout_s, retries=1))
    assert (answers["h2"] if isinstance(answers["h2"], str) else None) == said
    assert grid.greeted == asked
