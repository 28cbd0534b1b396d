"""The rounds of a federation: welcome, select, exchange, validate, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmed.config import RunConfig
from fedmed.errors import TooFewSites, UpdateRefused
from fedmed.federated.admission import (
    decoded_update,
    privacy_in,
    public_facts,
    validated_counts,
    validated_masked,
    validated_weights,
)
from fedmed.federated.aggregation import Aggregate
from fedmed.federated.central import ServerNoise
from fedmed.federated.combiners import Combiner, RoundTerms, combiner
from fedmed.federated.combiners.masked_sum import MaskedSum
from fedmed.federated.exchange import Failure, ask
from fedmed.federated.local_grid import LocalGrid
from fedmed.federated.member import Member
from fedmed.federated.membership import Membership
from fedmed.federated.progress import Progress
from fedmed.federated.result import Status, metric, metrics_json, model_facts, summary_of
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.server_evaluation import Judgement, ServerEvaluation, server_device
from fedmed.federated.site_evaluation import metrics_of_sites
from fedmed.federated.strategies import State, server_step
from fedmed.federated.unmasking import masking_of, open_sum
from fedmed.federated.wire import encode_task
from fedmed.training.local_algorithms import FOLLOWS_SERVER
from fedmed.training.local_algorithms.fedbn import no_single_network
from fedmed.training.local_algorithms.fine_tune import has_personal_network
from fedmed.training.network import FlatNetwork, network_of, weights_report
from fedmed.training.schedule import plateau_factor
from fedmed.training.site import settings_for_sites
from fedmed.types import Event, Layout, Masking, Task, Update, Weights

Watch = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """What has come of a round's sites."""

    aggregate: Aggregate | str  # what they agree on, or why the round cannot count
    joined: list[str]  # sites whose updates are in it
    failed: list[Failure]


class Rounds:
    """The rounds of one run: its configuration, its folder, its grid. `federation.run_federation` is the way in."""

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder, watch: Watch, cache_dir: Path | None) -> None:
        """Nothing is built or asked before `run`."""
        self.grid, self.config, self.folder, self.watch = grid, config, folder, watch
        self.cache_dir = cache_dir
        self.step = server_step(config)
        self.noise = ServerNoise(config, folder) if config.privacy.mode == "central" else None
        self.settings = settings_for_sites(config)
        self.progress = Progress()
        self.layout: Layout  # of the network, which `run` builds
        self.evaluation: ServerEvaluation | None = None
        self.sites: Membership | None = None
        self.server_metrics: dict[str, Any] = {}
        self.site_metrics: dict[str, dict[str, Any]] = {}
        self._best: tuple[int, Judgement] | None = None
        self.pretrained = ""  # what the file of weights gave, in words
        self._began = time.perf_counter()

    def run(self) -> tuple[Status, str | None]:
        """Train all rounds, keep the best network, and have every site evaluate it. The protocol, on one screen."""
        weights, state = self._start()
        try:
            sites = self._gather()
        except TooFewSites as problem:
            if not (self.progress.rounds or self.progress.broken):
                raise
            return "paused", str(problem)  # as it was, or nearly: nothing has changed since the last checkpoint
        saved = self.progress.round
        if self.noise is not None:
            self.noise.begin(saved, parameters=self.layout.num_parameters)
        for round in range(saved + 1, self.config.train.rounds + 1):
            if self._stops():
                break
            # ── welcome, select, configure ────────────────────────────────────────────────────────────────────────
            started = time.perf_counter()
            arrivals = sites.welcome(round)
            self._note_absent(arrivals.refused, round)
            nodes = sites.asked(round)
            self._tell("round_started", round, sites=sorted(nodes), **self._preamble(sites, round, arrivals.joined))
            hidden = masking_of(map(sites.__getitem__, nodes)) if self.config.strategy.secure_sum else None
            task = self._task("train", round, weights, self.step.outgoing(state), hidden)

            # ── exchange, validate, aggregate: one update in memory at a time, in the order of the sites' names ───
            arrived = self._collect(task, sites, nodes, state, arrivals.unreachable)
            seconds = time.perf_counter() - started
            self.progress.train_s += seconds
            if isinstance(arrived.aggregate, str):
                self.progress.pause(self._entry(round, arrived, seconds, {}))
                self._save(weights, state, saved)
                return "paused", arrived.aggregate
            weights, state = self.step(weights, arrived.aggregate, state)

            # ── evaluate, checkpoint, tell ────────────────────────────────────────────────────────────────────────
            judgement = self._judge(round, weights)
            metrics = metrics_json(judgement.metrics) if judgement else {}
            self.progress.rounds.append(self._entry(round, arrived, seconds, metrics))
            last = self._stops() or round == self.config.train.rounds
            if last or round % self.config.strategy.checkpoint_every == 0:
                saved = self._save(weights, state, saved)
            self._tell("round_finished", round, seconds=time.perf_counter() - started, **arrived.aggregate.facts)
        self._finish(weights, sites)
        failures = self.progress.failures()
        return ("degraded", summary_of(failures)) if failures else ("completed", None)

    @property
    def members(self) -> list[Member]:
        """Every site that ever joined."""
        return self.sites.members if self.sites else []

    @property
    def total_s(self) -> float:
        """Wall time of the run so far, that of earlier processes included."""
        return time.perf_counter() - self._began

    # Before the first round.

    def _start(self) -> tuple[Weights, State]:
        """Build the network, load the server's set, and take up the last checkpoint if there is one."""
        network = FlatNetwork(network_of(self.config), torch.device(server_device(self.config)))
        self.layout = network.layout
        judged = not no_single_network(self.config.strategy)
        self.evaluation = ServerEvaluation.load(self.config, network, self.cache_dir) if judged else None
        if self.config.model.weights:
            self.pretrained = weights_report(self.config, self.evaluation.few() if self.evaluation else None)
        saved = self.folder.checkpoint()
        if saved is None:
            return network.weights(), self.step.start(self.layout)
        facts, weights, state = saved
        self.progress = Progress.from_json(facts)
        self._began -= self.progress.total_s
        self.folder.prune(keep=self.config.strategy.keep_checkpoints)
        return weights, state

    def _gather(self) -> Membership:
        """Greet the sites, waiting until enough of them are there.

        Raises:
            TooFewSites: they are not.
        """
        empty = np.zeros(0, np.float32)

        def hello() -> RecordDict:
            return encode_task(self._task("evaluate", 0, Weights(parameters=empty, buffers=empty)))

        turns = self.step.turns  # one site a round: the algorithm's own wish
        most = self.noise.sites if self.noise else 0

        def waits(sites: str, seconds: float) -> None:
            self._tell("waiting", self.progress.round, sites=sites, seconds=round(seconds))

        sites = Membership(
            self.grid, self.config.strategy, self.config.seed, self.progress, hello, waits=waits, turns=turns, most=most
        )
        self.sites = sites
        absent = sites.gather(self._greeted)
        self._note_absent(absent, 0)
        if missing := sites.missing(sites.here):
            raise TooFewSites(f"{missing}. {summary_of(absent) or ''}".strip())
        return sites

    def _greeted(self, site: str, done: int, all: int) -> None:
        """For a display alone: the run's events begin with the first round."""
        self.watch({"kind": "greeted", "round": 0, "site": site, "done": done, "all": all})

    def _note_absent(self, failures: Sequence[Failure], round: int) -> None:
        self.progress.note_absent(failures)
        for failure in failures:
            self._tell("site_failed", round, **asdict(failure))

    # In a round.

    def _preamble(self, sites: Membership, round: int, late: Sequence[str]) -> dict[str, Any]:
        """Who came late and who has left; in the first round what the file of weights gave and what was unreadable."""
        facts: dict[str, Any] = {"joined_late": list(late)} if late else {}
        facts |= {"left": sites.away} if sites.away else {}
        if round > 1:
            return facts
        left_out = {m.name: {"images": m.unreadable, "reasons": m.reasons} for m in sites.members if m.unreadable != 0}
        facts |= {"weights": self.pretrained} if self.pretrained else {}
        unjudged = no_single_network(self.config.strategy)
        facts |= {"server_metrics": f"null: {unjudged}"} if unjudged else {}
        return {**facts, **({"unreadable": left_out} if left_out else {})}

    def _task(
        self,
        kind: Literal["train", "evaluate"],
        round: int,
        weights: Weights,
        vectors: State = MappingProxyType({}),
        masking: Masking | None = None,
    ) -> Task:
        every = self.config.evaluate.sites == "every" and round > 1
        followed = kind == "train" and self.config.strategy.name in FOLLOWS_SERVER
        return Task(
            kind=kind,
            round=round,
            settings=self.settings,
            layout=self.layout.hash,
            weights=weights,
            learning_rate_factor=plateau_factor(self.config.train, self.progress.falls),
            centres=tuple(self.progress.centres),
            vectors=vectors,
            evaluate=every,
            run=self.progress.run,
            masking=masking,
            counted=self.progress.last_joined() if followed else {},
        )

    def _ask(
        self, task: Task, nodes: Mapping[str, int], needed: Callable[[str], bool] = lambda site: False
    ) -> Iterator[tuple[str, RecordDict | str]]:
        return ask(
            self.grid,
            encode_task(task, copy=not isinstance(self.grid, LocalGrid)),
            "query.unmask" if task.kind == "unmask" else task.kind,
            nodes,
            group=str(task.round),
            timeout_s=self.config.strategy.round_timeout_s,
            retries=self.config.strategy.retries,
            needed=needed,
        )

    def _collect(
        self, task: Task, sites: Membership, nodes: Mapping[str, int], state: State, unreachable: Sequence[Failure]
    ) -> Arrived:
        """Ask the sites of a round, and add up the updates that can be used."""
        combined = combiner(
            RoundTerms(
                layout=self.layout,
                sent=task.weights,
                state=state,
                step=self.step,
                strategy=self.config.strategy,
                known=len(sites.members),
                round=task.round,
                plateau=task.learning_rate_factor,
                noise=self.noise,
                folder=self.folder.spool,
            )
        )
        joined: list[str] = []
        failed = [*unreachable]
        for failure in failed:
            self._tell("site_failed", task.round, **asdict(failure))
        if missing := sites.missing(list(nodes)):
            return Arrived(aggregate=missing, joined=joined, failed=failed)
        for site, answer in self._answers(task, sites, nodes, failed, done=lambda: bool(joined)):
            gone = isinstance(answer, str)  # who answers what cannot be used is still there
            if not gone:
                sites.answered(site)
            try:
                update, trained = self._admitted(answer, sites[site], task.weights)
                combined.add(site, update, trained)
            except UpdateRefused as error:
                reason = str(error)
                failed.append(sites.missed(site, reason, task.round) if gone else Failure(site=site, reason=reason))
                self._tell("site_failed" if gone else "update_refused", task.round, **asdict(failed[-1]))
                continue
            joined.append(site)
            self._tell("update_received", task.round, site=site, **public_facts(update, self.config.task))
        missing = sites.missing(joined, failed) or combined.too_few() or self._opened(combined, task, nodes)
        return Arrived(aggregate=missing or combined.result(), joined=joined, failed=failed)

    def _answers(
        self,
        task: Task,
        sites: Membership,
        nodes: Mapping[str, int],
        failed: Sequence[Failure],
        done: Callable[[], bool],
    ) -> Iterator[tuple[str, RecordDict | str]]:
        """What the sites of a round answer; where they take turns, until `done`."""
        passed: set[str] = set()
        while nodes:
            # Whoever takes these answers adds to `failed` and settles `done` before the next one is asked for.
            yield from self._ask(task, nodes, partial(sites.needs, nodes, failed))
            passed |= set(nodes)
            nodes = sites.asked(task.round, passed) if self.step.turns and not done() else {}

    def _admitted(self, answer: RecordDict | str, member: Member, sent: Weights) -> tuple[Update, Weights]:
        update = decoded_update(answer, self.config.task)
        self.progress.spent(member.name, privacy_in(update.facts))  # it left the site, whether it is used or not
        validated_counts(update, images=member.images, patients=member.patients)
        if self.config.strategy.secure_sum:
            validated_masked(update, self.layout)
            return update, sent
        return update, validated_weights(update, self.layout, sent=sent, max_norm=self.config.strategy.max_update_norm)

    def _opened(self, combined: Combiner, task: Task, nodes: Mapping[str, int]) -> str | None:
        """Have the sites open a secure sum; why it stays closed, or None."""
        if not isinstance(combined, MaskedSum) or task.masking is None:
            return None
        inside = {site: nodes[site] for site in combined.sites}
        return open_sum(combined, task, task.masking, lambda question: self._ask(question, inside, lambda site: True))

    def _judge(self, round: int, weights: Weights) -> Judgement | None:
        due = round % self.config.evaluate.every == 0 or round == self.config.train.rounds
        if self.evaluation is None or not due:
            return None
        judgement = self.evaluation.judge(weights, replicates=self.config.evaluate.bootstrap)
        self.progress.centres = list(judgement.centres)
        best = self.progress.select(round, judgement.selection, plateau_patience=self.config.train.plateau_patience)
        if best and self.config.evaluate.keep == "best":
            self.folder.save_best(round, weights)
            self._best = (round, judgement)
        self._tell(
            "evaluated", round, metrics=metrics_json(judgement.metrics), selection=metric(judgement.selection)["value"]
        )
        return judgement

    def _stops(self) -> bool:
        return 0 < self.config.evaluate.patience <= self.progress.stale

    @staticmethod
    def _entry(round: int, arrived: Arrived, seconds: float, metrics: dict[str, Any]) -> dict[str, Any]:
        return {
            "round": round,
            "joined": arrived.joined,
            "failed": [asdict(failure) for failure in arrived.failed],
            "seconds": seconds,
            "server_metrics": metrics,
        }

    def _save(self, weights: Weights, state: Mapping[str, Any], saved: int) -> int:
        """Write a checkpoint of the last finished round, and return its number."""
        round, self.progress.total_s = self.progress.round, self.total_s
        since = [entry for entry in self.progress.rounds if entry["round"] > saved]
        keep = self.config.strategy.keep_checkpoints
        self.folder.save_checkpoint(round, weights, state, self.progress.to_json(), since, keep=keep)
        self._tell("checkpoint_saved", round)
        return round

    # After the last round.

    def _finish(self, weights: Weights, sites: Membership) -> None:
        """Report the kept network: on the server's test part, and at every site."""
        kept, round = weights, self.progress.round
        if self.config.evaluate.keep == "best" and self.progress.best_round:
            round = self.progress.best_round
            kept = self.folder.best(round)
        if self.evaluation is not None:
            distances = self.config.task.kind == "segmentation" and bool(self.config.scored_spacing_mm)
            if self._best is not None and self._best[0] == round and not distances:
                judgement = self._best[1]
            else:
                replicates = self.config.evaluate.bootstrap
                judgement = self.evaluation.judge(kept, replicates=replicates, distances=distances)
            self.progress.centres = list(judgement.centres)
            self.server_metrics = metrics_json(judgement.metrics)
            self.folder.write_json("evaluation.json", self.evaluation.details(judgement))
        elif no_single_network(self.config.strategy):
            self.server_metrics = {self.config.primary: metric(None)}
        facts = model_facts(self.config, round, self.layout.hash, modalities=self._modalities(sites))
        self.folder.save_model(kept, self.layout, facts)
        every = self.config.privacy.mode == "dp-sgd" or has_personal_network(self.config.strategy)
        nodes = {name: node for name, node in sites.connected().items() if every or sites[name].holds_out}
        answers = self._ask(self._task("evaluate", round, kept), nodes) if nodes else ()
        self.site_metrics, failed = metrics_of_sites(
            answers, self.config.task, self.progress.spent, replicates=self.config.evaluate.bootstrap
        )
        told = {each["site"] for each in self.progress.rounds[-1]["failed"]} if self.progress.rounds else set()
        gone = [Failure(site=name, reason="not connected") for name in sites.unreachable if name not in told]
        self._note_absent([*failed, *gone], round)

    def _modalities(self, sites: Membership) -> int:
        """Places in a row of the manifests; 0 = they differ, or there are none."""
        said = {member.modalities for member in sites.members if member.modalities}
        if self.evaluation is not None and self.evaluation.data.modalities:
            said.add(self.evaluation.data.modalities)
        return said.pop() if len(said) == 1 else 0

    def _tell(self, kind: str, round: int, **facts: Any) -> None:
        self.watch(self.folder.event(kind, round, **facts))
