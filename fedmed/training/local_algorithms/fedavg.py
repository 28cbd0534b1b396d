"""Plain local training, as FedAvg and every algorithm that works on the server alone has it."""

from __future__ import annotations

from fedmed.training.local_algorithms.visit import Outcome, Visit


def fedavg(visit: Visit) -> Outcome:
    """Train from the received weights and send the result (McMahan et al. 2017, arXiv:1602.05629, ClientUpdate)."""
    trained = visit.train_()
    return Outcome(trained=trained, weights=visit.network.weights())
