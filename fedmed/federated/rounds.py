"""The rounds of a federation: select, exchange, validate, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmed.config import RunConfig
from fedmed.errors import RunFailed, UpdateRefused
from fedmed.federated.aggregation import WeightedMean, validated_weights
from fedmed.federated.exchange import Failure, Member, ask, greet
from fedmed.federated.local_grid import LocalGrid
from fedmed.federated.progress import Progress
from fedmed.federated.result import (
    Status,
    metric,
    metrics_json,
    model_facts,
    summary_of,
)
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.server_evaluation import Judgement, ServerEvaluation
from fedmed.federated.strategies import server_step
from fedmed.federated.wire import decode_update, encode_task
from fedmed.models import build, build_with_report
from fedmed.training.evaluate import bounds_from, checked_sums, metrics_from
from fedmed.training.network import FlatNetwork
from fedmed.training.schedule import plateau_factor
from fedmed.training.site_round import settings_for_sites
from fedmed.types import Task, Update, Weights

Event = Mapping[str, Any]
Watch = Callable[[Event], None]


class Federation:
    """One run: its configuration, its folder, its grid. `federation.run_federation` is the way in."""

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder, watch: Watch, cache_dir: Path | None) -> None:
        """Nothing is built or asked before `run`."""
        self.grid, self.config, self.folder, self.watch = grid, config, folder, watch
        self.cache_dir = cache_dir
        self.step = server_step(config.strategy)
        self.settings = settings_for_sites(config)
        self.progress = Progress()
        self.members: list[Member] = []
        self.server_metrics: dict[str, Any] = {}
        self.site_metrics: dict[str, dict[str, Any]] = {}
        self._best: tuple[int, Judgement] | None = None
        self._centres: tuple[float, ...] = ()
        self.pretrained = ""  # what the file of weights gave, in words

    def run(self) -> tuple[Status, str | None]:
        """Train all rounds, keep the best network, and have every site evaluate it. The protocol, on one screen."""
        weights, state = self._start()
        self.members = self._gather()
        saved = self.progress.round
        for round in range(saved + 1, self.config.train.rounds + 1):
            # ── select and configure ──────────────────────────────────────────────────────────────────────────────
            started = time.perf_counter()
            nodes = {member.name: member.node for member in self.members}
            self._tell("round_started", round, sites=sorted(nodes), **(self._preamble() if round == 1 else {}))
            task = self._task("train", round, weights)

            # ── exchange, validate, aggregate: one update in memory at a time, in the order of the sites' names ───
            mean, joined, failed = WeightedMean(self.layout, weights), [], []
            for site, answer in self._ask(task, nodes):
                try:
                    update, trained = self._admitted(answer)
                except UpdateRefused as error:
                    failed.append(Failure(site=site, reason=str(error)))
                    self._tell(
                        "site_failed" if isinstance(answer, str) else "update_refused", round, **asdict(failed[-1])
                    )
                    continue
                mean.add(trained, self._weight(update))
                joined.append(site)
                self._tell("update_received", round, site=site, **self._public_facts(update))
            seconds = time.perf_counter() - started
            self.progress.train_s += seconds
            missing = self._missing(joined, known=len(nodes))
            if missing:
                self._log(round, joined, failed, seconds, {})
                return "paused", missing
            weights, state = self.step(weights, mean.result(), state)

            # ── evaluate, checkpoint, tell ────────────────────────────────────────────────────────────────────────
            judgement = self._judge(round, weights)
            self._log(round, joined, failed, seconds, metrics_json(judgement.metrics) if judgement else {})
            stop = self._stops(judgement)
            if stop or round == self.config.train.rounds or round % self.config.strategy.checkpoint_every == 0:
                since = [entry for entry in self.progress.rounds if entry["round"] > saved]
                self.folder.save_checkpoint(round, weights, state, self.progress.to_json(), since)
                saved = round
                self._tell("checkpoint_saved", round)
            self._tell("round_finished", round, seconds=time.perf_counter() - started)
            if stop:
                break
        self._finish(weights)
        failures = self.progress.failures()
        return ("degraded", summary_of(failures)) if failures else ("completed", None)

    # Before the first round.

    def _start(self) -> tuple[Weights, Mapping[str, Any]]:
        """Build the network, load the server's set, and take up the last checkpoint if there is one."""
        outputs, seed, dimensions = len(self.config.task.labels), self.config.seed, self.config.dimensions
        module = build(self.config.model, outputs=outputs, seed=seed, dimensions=dimensions)
        network = FlatNetwork(module, torch.device(server_device(self.config)))
        self.layout = network.layout
        self.evaluation = ServerEvaluation.load(self.config, network, self.cache_dir)
        if self.config.model.weights:
            images = (
                self.evaluation.data.batch(np.arange(min(8, len(self.evaluation.data))))[0] if self.evaluation else None
            )
            built = build_with_report(
                self.config.model, outputs=outputs, seed=seed, dimensions=dimensions, images=images
            )
            self.pretrained = str(built)
        saved = self.folder.checkpoint()
        if saved is None:
            return network.weights(), self.step.start(self.layout)
        facts, weights, state = saved
        self.progress = Progress.from_json(facts)
        return weights, state

    def _gather(self) -> list[Member]:
        """Greet the sites, waiting until enough of them are there."""
        strategy, empty = self.config.strategy, np.zeros(0, np.float32)
        nodes = self._nodes(strategy.round_timeout_s)
        hello = encode_task(self._task("evaluate", 0, Weights(parameters=empty, buffers=empty)))
        members, absent = greet(self.grid, hello, nodes, timeout_s=strategy.round_timeout_s)
        self.progress.absent = [asdict(failure) for failure in absent]
        for failure in absent:
            self._tell("site_failed", 0, **asdict(failure))
        missing = self._missing([member.name for member in members], known=len(nodes))
        if missing:
            raise RunFailed(f"{missing}. {summary_of(absent) or ''}".strip())
        return members

    def _nodes(self, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while len(nodes := sorted(self.grid.get_node_ids())) < self.config.strategy.min_sites:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{len(nodes)} sites are connected; strategy.min-sites = {self.config.strategy.min_sites}"
                )
            time.sleep(0.5)
        return nodes

    def _preamble(self) -> dict[str, Any]:
        """What the file of weights gave; how many images which site could not read, and why."""
        left_out = {m.name: {"images": m.unreadable, "reasons": m.reasons} for m in self.members if m.unreadable}
        weights = {"weights": self.pretrained} if self.pretrained else {}
        return {**weights, **({"unreadable": left_out} if left_out else {})}

    # In a round.

    def _task(self, kind: str, round: int, weights: Weights) -> Task:
        every = self.config.evaluate.sites == "every" and round > 1
        return Task(
            kind="train" if kind == "train" else "evaluate",
            round=round,
            settings=self.settings,
            layout=self.layout.hash,
            weights=weights,
            learning_rate_factor=plateau_factor(self.config.train, self.progress.stale),
            centres=self._centres,
            evaluate=every,
        )

    def _ask(self, task: Task, nodes: Mapping[str, int]) -> Any:
        return ask(
            self.grid,
            encode_task(task, copy=not isinstance(self.grid, LocalGrid)),
            task.kind,
            nodes,
            group=str(task.round),
            timeout_s=self.config.strategy.round_timeout_s,
            retries=self.config.strategy.retries,
        )

    def _admitted(self, answer: RecordDict | str) -> tuple[Update, Weights]:
        if isinstance(answer, str):
            raise UpdateRefused(answer)
        update = decode_update(answer)
        if update.metrics:
            checked_sums(update.metrics, self.config.task)
        return update, validated_weights(update, self.layout)

    def _weight(self, update: Update) -> float:
        by = self.config.strategy.weight_by
        return 1.0 if by == "uniform" else float(update.facts["patients"] if by == "patients" else update.num_examples)

    def _public_facts(self, update: Update) -> dict[str, Any]:
        known: dict[str, Any] = {key: update.facts[key] for key in ("steps", "seconds") if key in update.facts}
        known["loss"] = metric(float(update.facts.get("loss", math.nan)))["value"]
        metrics = metrics_from(update.metrics, self.config.task) if update.metrics else {}
        return {"images": update.num_examples, **known, **({"metrics": dict(metrics)} if metrics else {})}

    def _missing(self, joined: list[str], *, known: int) -> str | None:
        """Why these sites are too few, or None."""
        strategy = self.config.strategy
        needed = max(strategy.min_sites, math.ceil(strategy.min_fraction * known))
        absent = sorted(set(strategy.required_sites) - set(joined))
        if absent:
            return f"required site {absent[0]} did not take part"
        if len(joined) < needed:
            return f"{len(joined)} of {known} sites took part; {needed} are needed (strategy.min-sites, min-fraction)"
        return None

    def _judge(self, round: int, weights: Weights) -> Judgement | None:
        due = round % self.config.evaluate.every == 0 or round == self.config.train.rounds
        if self.evaluation is None or not due:
            return None
        judgement = self.evaluation.judge(weights, replicates=self.config.evaluate.bootstrap)
        self._centres = judgement.centres
        if self.progress.select(round, judgement.selection) and self.config.evaluate.keep == "best":
            self.folder.save_best(weights)
            self._best = (round, judgement)
        self._tell(
            "evaluated", round, metrics=metrics_json(judgement.metrics), selection=metric(judgement.selection)["value"]
        )
        return judgement

    def _stops(self, judgement: Judgement | None) -> bool:
        patience = self.config.evaluate.patience
        return judgement is not None and 0 < patience <= self.progress.stale

    def _log(
        self, round: int, joined: list[str], failed: list[Failure], seconds: float, metrics: dict[str, Any]
    ) -> None:
        self.progress.rounds.append(
            {
                "round": round,
                "joined": joined,
                "failed": [asdict(failure) for failure in failed],
                "seconds": seconds,
                "server_metrics": metrics,
            }
        )

    # After the last round.

    def _finish(self, weights: Weights) -> None:
        """Report the kept network: on the server's test part, and at every site."""
        kept, round = weights, self.progress.round
        if self.config.evaluate.keep == "best" and self.progress.best_round:
            kept, round = self.folder.best(), self.progress.best_round
        if self.evaluation is not None:
            distances = self.config.task.kind == "segmentation" and bool(self.config.data.spacing_mm)
            if self._best is not None and self._best[0] == round and not distances:
                judgement = self._best[1]
            else:
                replicates = self.config.evaluate.bootstrap
                judgement = self.evaluation.judge(kept, replicates=replicates, distances=distances)
            self._centres = judgement.centres
            self.server_metrics = metrics_json(judgement.metrics)
            self.folder.write_json("evaluation.json", self.evaluation.details(judgement))
        self.folder.save_model(kept, self.layout, model_facts(self.config, round, self.layout.hash))
        nodes = {member.name: member.node for member in self.members if member.held_out_patients}
        failed = []
        for site, answer in self._ask(self._task("evaluate", round, kept), nodes) if nodes else ():
            try:
                if isinstance(answer, str):
                    raise UpdateRefused(answer)
                received = decode_update(answer).metrics
                sums = checked_sums(received, self.config.task) if received else {}
            except UpdateRefused as error:
                failed.append({"site": site, "reason": f"final evaluation: {error}"})
                self._tell("site_failed", round, **failed[-1])
                continue
            patients = int(sums["patients"][0]) if "patients" in sums else 0
            values = metrics_from(sums, self.config.task) if sums else {}
            bounds = bounds_from(sums, self.config.task) if sums else {}
            self.site_metrics[site] = {
                name: metric(value, n=patients, bound=bounds.get(name)) for name, value in values.items()
            }
        self.progress.absent += failed

    def _tell(self, kind: str, round: int, **facts: Any) -> None:
        self.watch(self.folder.event(kind, round, **facts))


def server_device(config: RunConfig) -> str:
    """The device of the server's evaluation."""
    cuda = config.simulation.device == "cuda" or (config.simulation.device == "auto" and torch.cuda.is_available())
    return "cuda" if cuda else "cpu"
