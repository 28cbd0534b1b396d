"""The same work as Flower's documentation arranges it: `FedAvg.start` over Ray, a state dict per message."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional as F
from work import WORKS, dataset

from fedmed.config import validate
from fedmed.models import build
from fedmed.training.own_patients import site_generator

client, server = ClientApp(), ServerApp()


def network(name: str) -> torch.nn.Module:
    work = WORKS[name]
    config = validate({"model": {"name": work.network, "in-channels": work.channels}, "task": {"labels": ["x"]}})
    return build(config.model, outputs=work.labels, seed=config.seed)


@client.train()
def train(message: Message, context) -> Message:
    torch.set_num_threads(1)
    name, round = str(message.content["config"]["work"]), int(message.content["config"]["server-round"])
    work, model = WORKS[name], network(name)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    number = context.node_config["partition-id"]
    data = dataset(Path(f"{name}-{number}"), validate({}))
    images, targets = data.batch(np.arange(len(data)))
    generator = site_generator(7, f"{name}-{number}", round)
    generator.integers(2**63)
    optimizer = torch.optim.SGD(model.parameters(), lr=work.learning_rate, fused=True)
    for chosen in torch.from_numpy(generator.permutation(len(images))).split(work.batch):
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(model(images[chosen]), targets[chosen]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(images)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    stamps: list[float] = []

    class Timed(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            stamps.append(time.perf_counter())
            config["work"] = given.work
            return super().configure_train(server_round, arrays, config, grid)

    @server.main()
    def serve(grid, context) -> None:
        sites = WORKS[given.work].sites
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=sites, min_train_nodes=sites)
        start = ArrayRecord(network(given.work).state_dict())
        result = strategy.start(grid=grid, initial_arrays=start, num_rounds=given.rounds)
        stamps.append(time.perf_counter())
        tensors = result.arrays.to_torch_state_dict().values()
        np.save(given.out / "flower.npy", torch.cat([tensor.ravel() for tensor in tensors]).numpy())

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=WORKS[given.work].sites, backend_config=resources)
    print(json.dumps({"round_s": np.diff(stamps).tolist()}))


if __name__ == "__main__":
    main()
