"""FedProx: sites are held near the network that they were sent."""

from __future__ import annotations

from fedmed.training.gradients import proximal
from fedmed.training.local_algorithms.fedavg import fedavg
from fedmed.training.local_algorithms.visit import Outcome, Visit


def fedprox(visit: Visit) -> Outcome:
    """min_w F_i(w) + μ/2 · ‖w − w_received‖²  (Li et al. 2018, arXiv:1812.06127, eq. 2), over trained parameters.

    μ is `strategy.proximal`; with 0 it is FedAvg bit for bit. The norm is squared, so that its gradient is
    μ · (w − w_received). The reported training loss is that of the images, without the penalty.
    """
    strength = visit.config.strategy.proximal
    if strength == 0:
        return fedavg(visit)
    trained = visit.train_(correction=proximal(visit.network, visit.received.parameters, strength))
    return Outcome(trained=trained, weights=visit.network.weights())
