"""The sites of a run: who is there, who comes late, who misses rounds, who has left, and whether enough take part."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmed.config import StrategyConfig
from fedmed.errors import TooFewSites
from fedmed.federated.combiners import too_few_sites
from fedmed.federated.exchange import GRACE_S, Failure, answer_in, await_node, await_reply, is_gone, time_to_pull
from fedmed.federated.member import CannotJoin, Member, member_of
from fedmed.federated.progress import Progress
from fedmed.federated.result import summary_of
from fedmed.federated.selection import in_turn, sample_size, sampled, share_of

GROUP = "hello"
NEWCOMER_S = 10.0  # that a round waits for the card of a site that came late; a later card counts from a later round
RETURN_S = 60.0  # that a resumed run waits for sites that it knows, and has enough without


class Arrivals(NamedTuple):
    """What changed between two rounds."""

    joined: list[str]  # sites that came, or came back
    refused: list[Failure]  # nodes that came and cannot take part
    unreachable: list[Failure]  # members that are not connected now


class Greeting(NamedTuple):
    """A question to a node that is not answered yet."""

    number: str  # of the message
    expires: float  # on the monotonic clock


class Refusal(NamedTuple):
    """A node that was greeted and cannot take part."""

    failure: Failure
    times: int  # in a row
    again: int  # the round that greets it again


class Membership:
    """Who is asked in each round. Nothing here waits longer than `strategy.round-timeout-s`.

    A node is greeted when it appears, and again when it was away and comes back; its site joins when its card is
    there. A site that misses `strategy.lost-after` rounds in a row is no longer asked. It is greeted again after as
    many rounds more, then after twice as many, and joins again if it answers. A node that cannot take part is greeted
    in every round, and after as many of them as rarely.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: StrategyConfig,
        seed: int,
        progress: Progress,
        hello: Callable[[], RecordDict],
        *,
        waits: Callable[[str, float], None] = lambda sites, seconds: None,
        turns: bool = False,
        most: int = 0,
    ) -> None:
        """Nobody is asked before `gather`.

        Args:
            grid: how nodes are reached.
            strategy: quorum, deadline, sample.
            seed: of the sample.
            progress: keeps who joined and who missed how many rounds, for a resumed run.
            hello: makes the content of the question who a site is.
            waits: told once a wait for which sites, in words, and for how many seconds at most.
            turns: whether the algorithm wants one site a round.
            most: sites that the run is meant for; 0 = any number.
        """
        self._grid, self._strategy, self._seed, self._progress = grid, strategy, seed, progress
        self._hello, self._waits, self._turns, self._most = hello, waits, turns, most
        self._members = progress.members
        self._open: dict[int, Greeting] = {}  # by node
        self._met: set[int] = set()  # nodes that were greeted since they appeared
        self._refusals: dict[int, Refusal] = {}  # by node, of those that are connected
        self._present: set[int] = set()
        self._registered: dict[int, str] = {}  # the sites that nodes are registered as; "" where none are
        self._at_start = 0  # nodes, whether they could take part or not

    @property
    def members(self) -> list[Member]:
        """Every site that ever joined, by name."""
        return [self._members[name] for name in sorted(self._members)]

    def __getitem__(self, name: str) -> Member:
        """A member by its name."""
        return self._members[name]

    # Who is there.

    def gather(self, seen: Callable[[str, int, int], None]) -> list[Failure]:
        """Wait for enough nodes, greet them, and wait for their cards, and for sites that are needed or known.

        Args:
            seen: told (site or node, done, all) as cards come.

        Returns:
            The sites that cannot take part, and why.

        Raises:
            TooFewSites: too few nodes are connected before the deadline.
        """
        least = self._strategy.min_sites
        self._look(lambda: f"{least - len(self._present)} more" if len(self._present) < least else "")
        if len(self._present) < least:
            raise TooFewSites(
                f"{len(self._present)} sites are connected; strategy.min-sites = {least}; lower it or start more sites"
            )
        self._at_start = len(self._present)
        failures: dict[int, Failure] = {}
        deadline = time.monotonic() + self._strategy.round_timeout_s
        told = ""
        while True:
            new = self._present - self._met
            self._greet(new)
            failures = {node: failure for node, failure in failures.items() if node not in new}
            failures |= self._collect(deadline + GRACE_S - time.monotonic(), seen, round=0)
            until, absent = self._until(deadline, failures)
            if absent != told and until > time.monotonic():
                self._waits(absent, until - time.monotonic())
                told = absent
            if not await_node(self._grid, lambda node: node not in self._met, until):
                break
            self._see()
        return list(failures.values())

    def welcome(self, round: int) -> Arrivals:
        """At the start of a round: greet nodes that came, or came back, since the last one, and see who is gone."""
        self._look(self._short)
        before = set(self._staying())
        due = {node for node, refusal in self._refusals.items() if refusal.again <= round}
        due |= {self._members[name].node for name in self.away if self._progress.away[name] <= round}
        resting = {node for node, refusal in self._refusals.items() if refusal.again > round}
        fresh = ((self._present - self._met) | (due & self._present)) - resting - set(self._open)
        self._greet(fresh)
        refused = self._collect(NEWCOMER_S if fresh else 0.0, lambda site, done, all: None, round=round)
        gone, why = self.unreachable, {each.failure.site: each.failure.reason for each in self._refusals.values()}
        return Arrivals(
            joined=sorted(set(self._staying()) - before),
            refused=[failure for failure in refused.values() if failure.site not in gone],
            unreachable=[self.missed(name, why.get(name, "not connected"), round) for name in gone],
        )

    @property
    def here(self) -> list[str]:
        """Members that are connected now, those that have left as well."""
        return [name for name in sorted(self._members) if self._members[name].node in self._present]

    def connected(self) -> dict[str, int]:
        """The sites that can be asked now, and their nodes."""
        return {name: self._members[name].node for name in self.here if name not in self._progress.away}

    def asked(self, round: int, passed: Collection[str] = ()) -> dict[str, int]:
        """The sites that a round asks, and their nodes: all that are there, a sample of them, or one in turn.

        Args:
            round: of the run.
            passed: sites that had the round's turn already and did not do their part.
        """
        here = list(self.connected())
        if self._turns:
            names = in_turn(self._members, here=set(here) - set(passed), round=round)[:1]
        else:
            always = self._strategy.required_sites
            names = sampled(here, size=self._wanted, always=always, seed=self._seed, round=round)
        return {name: self._members[name].node for name in names}

    @property
    def away(self) -> list[str]:
        """Members that have left."""
        return sorted(name for name in self._progress.away if name in self._members)

    # What they did.

    def answered(self, site: str) -> None:
        """Note that a site's update came, whether it can be used or not."""
        self._progress.missed.pop(site, None)

    def missed(self, site: str, reason: str, round: int) -> Failure:
        """Note that a site did not answer in a round; say in the reason if that was once too often."""
        missed = self._progress.missed[site] = self._progress.missed.get(site, 0) + 1
        if wait := self._rest(missed):
            self._progress.away[site] = round + wait
            reason += f"; {missed} rounds missed in a row, so it is not asked again for {wait} (strategy.lost-after)"
        return Failure(site=site, reason=reason)

    def missing(self, sites: Collection[str], failed: Sequence[Failure] = ()) -> str | None:
        """Why these sites are too few for a round, or None; where sites take turns, with who has `failed` in it.

        A robust rule has a least number of its own.
        """
        strategy = self._strategy
        if self._turns:
            return None if sites else ": ".join(filter(None, ("no site took its turn", summary_of(failed))))
        absent = sorted(set(strategy.required_sites) - set(sites))
        if absent:
            return f"required site {absent[0]} did not take part"
        wanted = self._wanted
        needed = max(strategy.min_sites, share_of(wanted, strategy.min_fraction))
        if len(sites) < needed:
            return f"{len(sites)} of {wanted} sites took part; {needed} are needed (strategy.min-sites, min-fraction)"
        return too_few_sites(strategy, len(sites))

    def needs(self, asked: Collection[str], failed: Collection[Failure], site: str) -> bool:
        """Whether a round, of whose sites these have failed already, would have too few without this one.

        Those whose answers are still to come are taken to answer. Where sites take turns, one is
        needed only if nobody else is left to take it.
        """
        if self._turns:
            return set(self.connected()) - {failure.site for failure in failed} <= {site}
        others = set(asked) - {failure.site for failure in failed} - {site}
        return self.missing(others) is not None

    @property
    def _wanted(self) -> int:
        """How many sites a round should ask, whether they are connected or not."""
        known = max(len(self._members), self._at_start)
        return sample_size(known, fraction=self._strategy.fraction, least=self._strategy.min_sites)

    # Greetings.

    def _staying(self) -> list[str]:
        return [name for name in sorted(self._members) if name not in self._progress.away]

    @property
    def unreachable(self) -> list[str]:
        """Members that have not left and are not connected now."""
        return [name for name in self._staying() if self._members[name].node not in self._present]

    def _short(self) -> str:
        """For which sites a round waits: for none that are there and cannot take part, and for none that left."""
        few = self._strategy.min_sites - len(self._present)
        refused = {each.failure.site for node, each in self._refusals.items() if node in self._present}
        gone = sorted(set(self.unreachable) - refused)
        if few > 0:
            return ", ".join(gone) or f"{few} more"
        return ", ".join(gone) if gone and self.missing(self.connected()) else ""

    def _until(self, deadline: float, failures: Mapping[int, Failure]) -> tuple[float, str]:
        """Until when the start waits for one node more, and for which sites, if they are known; 0 = not at all.

        To the end if sites are too few without those whose cards did not come and those that are known or required;
        else for a minute, for known ones. A node that failed without a name may be any of them.
        """
        lost = self._present - self._met
        known = {*self._staying(), *self._strategy.required_sites} - set(self.here)
        known -= {failure.site for failure in failures.values()}
        unnamed = sum(failure.site == f"node-{node}" for node, failure in failures.items())
        awaited, names = len(known) > unnamed, ", ".join(sorted(known))
        if (lost or awaited) and self.missing(self.here):
            return deadline, names
        until = min(deadline, deadline - self._strategy.round_timeout_s + RETURN_S)
        return (until, names) if awaited else (0.0, "")

    def _look(self, short: Callable[[], str]) -> None:
        """See which nodes are connected, and wait while they are too few.

        Args:
            short: gives the sites that are waited for, in words; "" if there are enough.
        """
        began, told = time.monotonic(), ""
        while True:
            self._see()
            absent, left_s = short(), began + self._strategy.round_timeout_s - time.monotonic()
            if not absent or left_s < 0:
                break
            if absent != told:
                self._waits(absent, left_s)
                told = absent
            time.sleep(0.5)
        self._met &= self._present
        self._refusals = {node: each for node, each in self._refusals.items() if node in self._present}

    def _see(self) -> None:
        """Note which nodes are connected now."""
        self._registered = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._present = set(self._registered)

    def _greet(self, nodes: Collection[int]) -> None:
        if not nodes:
            return
        content, timeout_s, order = self._hello(), self._strategy.round_timeout_s, sorted(nodes)
        live_s = timeout_s + time_to_pull(self._grid, len(order))
        messages = [Message(content, node, "query.hello", ttl=live_s, group_id=GROUP) for node in order]
        expires = time.monotonic() + timeout_s + GRACE_S
        for node, number in zip(order, self._grid.push_messages(messages), strict=True):
            self._open[node] = Greeting(number, expires)
            self._met.add(node)

    def _collect(self, wait_s: float, seen: Callable[[str, int, int], None], *, round: int) -> dict[int, Failure]:
        """Read the cards that are there in time, in the order of the nodes; the others stay open.

        A site that left before a run was resumed stays away until its time comes, as it had in the unbroken run. One
        that left, and does not say who it is when its time comes, has missed once more.

        Args:
            wait_s: for all of them together.
            seen: told (site or node, done, all) as cards come.
            round: that is about to begin; 0 = the run itself.

        Returns:
            By node, who cannot take part and why.
        """
        failures: dict[int, Failure] = {}
        names = {member.node: name for name, member in self._members.items()}
        deadline, total = time.monotonic() + wait_s, len(self._open)
        for place, (node, greeting) in enumerate(sorted(self._open.items()), start=1):
            reply = await_reply(self._grid, greeting.number, deadline)
            if reply is None and time.monotonic() < greeting.expires:
                continue  # still open: it may come in a later round
            del self._open[node]
            label = names.get(node) or self._registered.get(node) or f"node-{node}"
            left = names.get(node) in self._progress.away
            if (reply is None or is_gone(reply)) and not left:
                self._met.discard(node)  # to be greeted once more
            try:
                member = member_of(answer_in(reply, node, GROUP), node, registered=self._registered.get(node, ""))
                label = member.name
                self._join(member)
                self._refusals.pop(node, None)
                if round:
                    self._progress.away.pop(member.name, None)
            except CannotJoin as problem:
                again, label = left and problem.site in ("", label), problem.site or label
                reason = str(problem)
                failures[node] = (
                    self.missed(label, reason, round) if again else self._refused(node, label, reason, round)
                )
            seen(label, place, total)
        return failures

    def _refused(self, node: int, site: str, reason: str, round: int) -> Failure:
        """Note that a node cannot take part, and when it is greeted again."""
        times = self._refusals[node].times + 1 if node in self._refusals else 1
        failure = Failure(site=site, reason=reason)
        self._refusals[node] = Refusal(failure, times, again=round + max(self._rest(times), 1))
        return failure

    def _rest(self, missed: int) -> int:
        """For how many rounds who missed so many in a row is left alone; 0 = it is asked in the next one."""
        after = self._strategy.lost_after
        return after * 2 ** min(missed - after, 20) if after and missed >= after else 0

    def _join(self, member: Member) -> None:
        known = self._members.get(member.name)
        if known is None and self._most and len(self._members) >= self._most:
            text = f"the run is meant for {self._most} sites, and as many have joined (privacy.sites)"
            raise CannotJoin(text, site=member.name)
        if known is not None and known.node != member.node and known.node in self._present:
            raise CannotJoin("two nodes have this name", site=member.name)
        if self._strategy.secure_sum and not member.masking[0]:
            raise CannotJoin("its card holds no key for the secure sum", site=member.name)
        for other in self.members:
            if member.masking[0] and other.name != member.name and other.masking[0] == member.masking[0]:
                raise CannotJoin(f"it has the key for secure sums of {other.name}", site=member.name)
        self._members[member.name] = member
