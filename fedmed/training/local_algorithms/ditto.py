"""Ditto: beside the shared network every site trains one of its own, which is held near the shared one."""

from __future__ import annotations

from fedmed.training.gradients import proximal
from fedmed.training.local_algorithms.visit import Outcome, Visit
from fedmed.types import Weights


def ditto(visit: Visit) -> Outcome:
    """min_v F_i(v) + λ/2 · ‖v − w‖²  (Li et al. 2021, arXiv:2012.04221, algorithm 1).

    The site trains the received w and sends the result, as under FedAvg. Then v, which never leaves, takes as many
    steps v ← v − η·(∇F_i(v) + λ·(v − w)) on the same batches; λ is `strategy.personal-penalty`, η
    `strategy.personal-learning-rate`. v starts as the first network that the site receives.
    """
    trained = visit.train_()
    weights = visit.network.weights()
    if visit.kept:
        visit.network.load_(Weights(parameters=visit.kept["parameters"], buffers=visit.kept["buffers"]))
    else:
        visit.network.load_(visit.received)
    strength = visit.config.strategy.personal_penalty
    visit.train_(
        correction=proximal(visit.network, visit.received.parameters, strength) if strength else None, personal=True
    )
    own = visit.network.weights()
    return Outcome(trained=trained, weights=weights, kept={"parameters": own.parameters, "buffers": own.buffers})
