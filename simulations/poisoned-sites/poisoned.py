"""Hospitals with pictures of 8 by 8 pixels, a small network, and what a dishonest hospital may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedmed.config import RunConfig
from fedmed.federated import client_app
from fedmed.federated.wire import decode_task, decode_update, encode_update
from fedmed.imaging.dataset import Dataset
from fedmed.types import Update, Weights

PATIENTS, SERVER_PATIENTS = 120, 1000
SPOT, ELSEWHERE = (1, 1), (5, 5)  # where the finding brightens three by three pixels
Tamper = Callable[[Update, Weights], Update]  # (honest update, the weights that the site was sent)


def network(*, in_channels: int, outputs: int, norm: str, width: int) -> nn.Module:
    """Two layers, so that a change of scale is more than a change of scale."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, 16), nn.ReLU(), nn.Linear(16, outputs))


def dataset(path: Path, config: RunConfig) -> Dataset:
    """`KIND-NUMBER`: a "flipped" hospital calls every finding none; in an "unusual" one they lie elsewhere, denser."""
    kind, _, number = path.name.partition("-")
    rng = np.random.default_rng(int(number))
    count = SERVER_PATIENTS if kind == "server" else PATIENTS
    findings = rng.integers(0, 2, count)
    images = rng.normal(0.5, 0.25, (count, 1, 8, 8)).astype(np.float32)
    (row, column), brighter = (ELSEWHERE, 0.75) if kind == "unusual" else (SPOT, 0.25)
    images[:, 0, row : row + 3, column : column + 3] += brighter * findings[:, None, None]
    targets = (1 - findings if kind == "flipped" else findings)[:, None].astype(np.float32)
    held = np.arange(count) >= count * (1 - config.evaluate.site_share)
    return Dataset(images=images, targets=targets, patients=tuple(map(str, range(count))), evaluation=held)


def _with_parameters(update: Update, parameters: np.ndarray) -> Update:
    assert update.weights is not None
    return replace(update, weights=replace(update.weights, parameters=parameters.astype(np.float32)))


def _scaled(update: Update, sent: Weights, by: float) -> Update:
    assert update.weights is not None
    return _with_parameters(update, sent.parameters + by * (update.weights.parameters - sent.parameters))


def _not_a_number(update: Update, sent: Weights) -> Update:
    return _with_parameters(update, np.full_like(sent.parameters, np.nan))


TAMPERS: dict[str, Tamper] = {
    "sign flip": lambda update, sent: _scaled(update, sent, -1),
    "sign flip × 10": lambda update, sent: _scaled(update, sent, -10),
    "× 100": lambda update, sent: _scaled(update, sent, 100),
    "NaN": _not_a_number,
    "wrong layout": lambda update, sent: replace(update, layout=update.layout[::-1]),
}


def app_with(tamper: Tamper | None, dishonest: int) -> ClientApp:
    """Fedmed's own ClientApp, in which the first hospitals change their updates before they answer."""
    app = ClientApp()
    app.query("hello")(client_app.hello)
    app.evaluate()(client_app.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        if tamper is None or int(context.node_config["partition-id"]) >= dishonest:
            return reply
        update = tamper(decode_update(reply.content), decode_task(message.content).weights)
        return Message(encode_update(update, copy=False), reply_to=message)

    return app
