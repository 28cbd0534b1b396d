"""Differential privacy at the server, round after round: what is released, what it costs, and how the clip moves.

The unit is the hospital (docs/privacy-model.md, claim 9). Before a noised sum exists, the round is written to
`checkpoints/releases.jsonl` and is on the disk: a process killed at any moment has counted what it released. A round
that is trained again after a kill draws new noise, which is a release of its own and counted again; the rounds that are
left then get so much noise that the run stays within its budget.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedmed.config import RunConfig
from fedmed.durable import append, sync_folder
from fedmed.errors import ConfigError, RunFailed
from fedmed.federated.run_folder import RunFolder, cut_torn_line
from fedmed.privacy.accounting import spent
from fedmed.privacy.balance import read_events, written_events
from fedmed.privacy.calibration import noise_multiplier_for
from fedmed.privacy.central import AdaptiveClip, central_events, next_clip, shared_noise
from fedmed.privacy.noise import NoiseGenerator, noise_generator
from fedmed.privacy.planning import plan_central
from fedmed.types import PrivacyEvent

ADJACENCY = "add or remove one hospital; who takes part is public"
RELEASES = "releases.jsonl"  # in checkpoints/


def central_sites(config: RunConfig, names: Sequence[str] | None = None) -> int:
    """K: the number of hospitals that every sum is divided by, fixed and public, whoever answers.

    Args:
        config: of the run.
        names: of its virtual hospitals, if they are not those of `data.sites`.
    """
    return config.privacy.sites or len(config.data.sites if names is None else names)


def check_central(config: RunConfig, *, sites: int, parameters: int) -> None:
    """Refuse a run whose noise would drown all learning, as `fedmed privacy plan --central` does.

    Args:
        config: of a run with `privacy.mode = "central"`.
        sites: K.
        parameters: d, trained values of the network.

    Raises:
        ConfigError: it cannot train, or δ is no protection for so few hospitals.
    """
    privacy, rounds = config.privacy, config.train.rounds
    plan = plan_central(
        sites=sites,
        epsilon=privacy.epsilon,
        rounds=rounds,
        parameters=parameters,
        clip=privacy.max_grad_norm,
        delta=privacy.delta,
        noise_multiplier=privacy.noise_multiplier,
    )
    if plan.refusal:
        raise ConfigError(f'privacy.mode = "central": {plan.refusal}')
    if privacy.clipping == "adaptive":
        _, adaptive = shared_noise(plan.plan.noise_multiplier, privacy.clip_quantile)
        if adaptive.rate * adaptive.count_noise * math.sqrt(rounds) > sites:
            raise ConfigError(
                f'privacy.clipping = "adaptive": over {rounds} rounds the noise alone would move the clip by more than '
                f"a factor of e, with {sites} hospitals; use a fixed clip"
            )


class ServerNoise:
    """The noise of one run at its server, and the record of every release."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        """Nothing is drawn or written before `begin`."""
        self.config, self.sites = config, central_sites(config)
        self.path: Path = folder.path / "checkpoints" / RELEASES
        self.generator: NoiseGenerator = noise_generator(config.privacy.noise, seed=config.seed)
        self.clip = config.privacy.max_grad_norm  # of the coming round
        self.noise_multiplier = 0.0  # of the sum
        self._sigma = 0.0  # of all that a round releases
        self.adaptive: AdaptiveClip | None = None
        self._planned: tuple[PrivacyEvent, ...] = ()  # what one round releases

    def begin(self, finished: int, *, parameters: int) -> None:
        """Take up what earlier processes of the run released, and fix the noise of the rounds that are left.

        Args:
            finished: the last round of the checkpoint that the run goes on from; 0 = none.
            parameters: of the network.

        Raises:
            ConfigError: the run cannot train, or what was released has spent its budget.
            RunFailed: the record of releases is damaged or does not reach so far.
        """
        privacy, left = self.config.privacy, self.config.train.rounds - finished
        check_central(self.config, sites=self.sites, parameters=parameters)
        cut_torn_line(self.path)  # it was written before anything of its round was released
        lines = self._lines()
        if not set(range(1, finished + 1)) <= {line["round"] for line in lines}:
            raise RunFailed(f"{self.path}: releases of finished rounds are missing, so nothing can be said of ε")
        for line in lines:
            if line["round"] == finished and "next-clip" in line:
                self.clip = float(line["next-clip"])
        if left > 0:
            self._share_out(privacy.noise_multiplier or self._least_noise(left))

    def released(self, round: int) -> None:
        """Count one round's release, before its noise is drawn.

        Raises:
            RunFailed: it would exceed `privacy.epsilon`, which happens if another process ran the same folder.
        """
        facts = {"clip": self.clip, "noise-multiplier": self._sigma, "events": written_events(self._planned)}
        self._write({"round": round, **facts})
        over = not self.config.privacy.noise_multiplier and self._epsilon() > self.config.privacy.epsilon
        if over:
            raise RunFailed(f"round {round} would raise ε above privacy.epsilon; does another process train this run?")

    def follow(self, round: int, *, unclipped: int, clipped: int) -> None:
        """Move an adaptive clip after a round; a fixed one stays."""
        if self.adaptive is None:
            return
        self.clip = next_clip(
            self.clip,
            unclipped=unclipped,
            clipped=clipped,
            count=self.sites,
            adaptive=self.adaptive,
            generator=self.generator,
        )
        self._write({"round": round, "next-clip": self.clip})

    @property
    def events(self) -> tuple[PrivacyEvent, ...]:
        """All releases of the run so far, in all its processes, equal ones added up."""
        return _added_up([event for line in self._lines() for event in read_events(line.get("events", ()))])

    def facts(self) -> dict[str, Any]:
        """What the run has spent of every hospital's budget, as `result.json` holds it.

        Every hospital is charged for every round. What other runs spent is not known here: `epsilon_total` is null.
        """
        events, privacy = self.events, self.config.privacy
        cost = spent(events, delta=privacy.delta)
        secret = self.generator.secret and math.isfinite(cost.epsilon)
        facts: dict[str, Any] = {
            "unit": "site",
            "adjacency": ADJACENCY,
            "delta": privacy.delta,
            "images_per_patient": None,
            "accountant": cost.accountant,
            "events": [asdict(event) for event in events],
            "epsilon": cost.epsilon if secret else None,
            "epsilon_total": None,
            "accountant_total": None,
        }
        if not self.generator.secret:
            facts["void"] = 'privacy.noise = "insecure-test": this noise can be predicted and protects nobody'
        return facts

    def _share_out(self, sigma: float) -> None:
        self._sigma = self.noise_multiplier = sigma
        if self.config.privacy.clipping == "adaptive":
            self.noise_multiplier, self.adaptive = shared_noise(sigma, self.config.privacy.clip_quantile)
        self._planned = central_events(noise_multiplier=self.noise_multiplier, rounds=1, adaptive=self.adaptive)

    def _least_noise(self, rounds: int) -> float:
        """σ with which so many more rounds stay within the budget: that of the rounds before, if it serves."""
        privacy, events = self.config.privacy, self.events
        before = [float(line["noise-multiplier"]) for line in self._lines() if "events" in line]
        if before:
            self._share_out(before[-1])
            further = [replace(event, steps=rounds) for event in self._planned]
            if spent(_added_up([*events, *further]), delta=privacy.delta).epsilon <= privacy.epsilon:
                return before[-1]
        return noise_multiplier_for(
            epsilon=privacy.epsilon, delta=privacy.delta, sample_rate=1.0, steps=rounds, further=events, unit="site"
        )

    def _epsilon(self) -> float:
        return spent(self.events, delta=self.config.privacy.delta).epsilon

    def _write(self, line: dict[str, Any]) -> None:
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            append(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)
        if new:
            sync_folder(self.path.parent)

    def _lines(self) -> list[dict[str, Any]]:
        """The record, line by line.

        Raises:
            RunFailed: a line is damaged.
        """
        if not self.path.exists():
            return []
        try:
            lines = [dict(json.loads(line)) for line in self.path.read_text(encoding="utf-8").splitlines()]
            return [{**line, "round": int(line["round"])} for line in lines]
        except (OSError, ValueError, TypeError, KeyError):
            raise RunFailed(f"{self.path}: the record of releases is damaged, so nothing can be said of ε") from None


def _added_up(events: Sequence[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Equal events as one with all their steps, so that ε is the same number however a run was cut into processes."""
    found: Counter[PrivacyEvent] = Counter()
    for event in events:
        found[replace(event, steps=1)] += event.steps
    return tuple(replace(event, steps=steps) for event, steps in found.items())
