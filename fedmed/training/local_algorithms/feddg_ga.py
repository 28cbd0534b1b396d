"""What FedDG-GA asks of a site: by how much local training changes the loss on patients that it holds out."""

from __future__ import annotations

from fedmed.training.local_algorithms.visit import Outcome, Visit
from fedmed.types import Scalar


def feddg_ga(visit: Visit) -> Outcome:
    """Send the held-out loss of the received and of the trained network.

    From them the server has the site's generalization gap, by which it adjusts weights (Zhang et al. 2023, CVPR,
    "Federated Domain Generalization with Generalization Adjustment", algorithm 1).

    Raises:
        DataError: the site holds no patient out.
        ConfigError: the site lets no metric leave.
    """
    received = visit.held_out_loss()
    trained = visit.train_()
    facts: dict[str, Scalar] = {
        "held-out-loss-received": received,
        "held-out-loss-trained": visit.held_out_loss(),
    }
    return Outcome(trained=trained, weights=visit.network.weights(), facts=facts)
