"""The floor: federated averaging in plain PyTorch, as fast as it can be arranged on the cores of one machine.

As many worker processes as cores, one thread each, forked after all heavy imports; global weights and partial sums in
shared memory; the data of every hospital in memory; no validation, no messages, no files. Same steps, same order of
images and same arithmetic as fedmed, so the networks must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from work import WORKS, Work, dataset

from fedmed.config import validate
from fedmed.models import build
from fedmed.training.own_patients import site_generator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="evaluate on the server's set and save every round")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports torch._dynamo before the fork
    work = WORKS[given.work]
    config = validate({"model": {"name": work.network, "in-channels": work.channels}, "task": {"labels": ["x"]}})
    network = build(config.model, outputs=work.labels, seed=config.seed)
    shapes = [parameter.shape for parameter in network.parameters()]
    current = torch.cat([parameter.detach().ravel() for parameter in network.parameters()]).share_memory_()
    sums = torch.zeros(given.processes, current.numel()).share_memory_()
    context = torch.multiprocessing.get_context("fork")
    barrier = context.Barrier(given.processes + 1)
    arguments = (given.work, config.seed, current, sums, shapes, barrier, given.rounds, network)
    workers = [context.Process(target=train, args=(rank, *arguments)) for rank in range(given.processes)]
    for worker in workers:
        worker.start()
    seconds = []
    server = dataset(Path(f"{given.work}-server"), config) if given.full else None
    for round in range(given.rounds):
        started = time.perf_counter()
        barrier.wait()
        barrier.wait()
        torch.sum(sums, 0, out=current)
        current /= work.sites
        if server is not None:
            torch.set_num_threads(given.processes)
            load(network, current, shapes)
            with torch.inference_mode():
                images, _ = server.batch(np.arange(len(server)))
                for part in images.split(32):
                    network(part)
            torch.set_num_threads(1)
            save(given.out / f"round-{round}.npy", current)
        seconds.append(time.perf_counter() - started)
    for worker in workers:
        worker.join()
    save(given.out / "floor.npy", current)
    print(json.dumps({"round_s": seconds}))


def save(path: Path, vector: torch.Tensor) -> None:
    """Write a vector and wait until the disk has it, as a checkpoint must."""
    import os

    with path.open("wb") as file:
        np.save(file, vector.numpy())
        file.flush()
        os.fsync(file.fileno())


def load(network: torch.nn.Module, vector: torch.Tensor, shapes: list[torch.Size]) -> None:
    with torch.no_grad():
        pieces = vector.split([shape.numel() for shape in shapes])
        for parameter, piece in zip(network.parameters(), pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))


def train(rank, name, seed, current, sums, shapes, barrier, rounds, network) -> None:
    torch.set_num_threads(1)
    work: Work = WORKS[name]
    mine = range(rank, work.sites, len(sums))
    whole = validate({"evaluate": {"site-share": 0.0}})  # as in the run file: every image is trained on
    sets = {number: dataset(Path(f"{name}-{number}"), whole) for number in mine}
    tensors = {number: each.batch(np.arange(len(each))) for number, each in sets.items()}
    network.train()
    for round in range(1, rounds + 1):
        barrier.wait()
        sums[rank].zero_()
        for number in mine:
            load(network, current, shapes)
            optimizer = torch.optim.SGD(network.parameters(), lr=work.learning_rate, fused=True)
            generator = site_generator(seed, f"{name}-{number}", round)
            generator.integers(2**63)  # fedmed draws the seed of dropout here
            images, targets = tensors[number]
            order = torch.from_numpy(generator.permutation(len(images)))
            for chosen in order.split(work.batch):
                optimizer.zero_grad(set_to_none=True)
                F.binary_cross_entropy_with_logits(network(images[chosen]), targets[chosen]).backward()
                optimizer.step()
            sums[rank] += torch.cat([parameter.detach().ravel() for parameter in network.parameters()])
        barrier.wait()


if __name__ == "__main__":
    main()
