"""Ditto: beside the shared network every site trains one of its own, which is held near the shared one."""

from __future__ import annotations

from collections.abc import Mapping

from fedmed.training.gradients import proximal
from fedmed.training.local_algorithms.visit import Outcome, Visit
from fedmed.types import FloatVector, Weights

OWN = ("own-parameters", "own-buffers")  # v on the site's disk: un-noised, so no other algorithm knows these names


def ditto(visit: Visit) -> Outcome:
    """min_v F_i(v) + λ/2 · ‖v − w‖²  (Li et al. 2021, arXiv:2012.04221, algorithm 1).

    The site trains the received w and sends the result, as under FedAvg. Then v, which never leaves, takes as many
    steps v ← v − η·(∇F_i(v) + λ·(v − w)) on the same batches; λ is `strategy.personal-penalty`, η
    `strategy.personal-learning-rate`. v starts as the first network that the site receives.
    """
    trained = visit.train_()
    weights = visit.network.weights()
    if visit.kept:
        visit.network.load_(own_weights(visit.kept))
    else:
        visit.network.load_(visit.received)
    strength = visit.config.strategy.personal_penalty
    visit.train_(
        correction=proximal(visit.network, visit.received.parameters, strength) if strength else None, personal=True
    )
    own = visit.network.weights()
    kept = dict(zip(OWN, (own.parameters, own.buffers), strict=True))
    return Outcome(trained=trained, weights=weights, kept=kept)


def own_weights(kept: Mapping[str, FloatVector]) -> Weights:
    """The site's own network as it was kept of a round."""
    parameters, buffers = (kept[name] for name in OWN)
    return Weights(parameters=parameters, buffers=buffers)
