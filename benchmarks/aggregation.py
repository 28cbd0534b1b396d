"""What it costs to receive, validate and add one DenseNet-121 update, beside a memory copy and Flower's FedAvg.

    .venv/bin/python benchmarks/aggregation.py              # about two minutes

Every way runs in a process of its own and is given the same updates; the ways take turns. Time is CPU time of one
thread. fedmed's way is all that its round loop does with an answer under the default strategy, but for the line in the
log: reading the reply's records as views, checking layout, counts, budget, finiteness (and the norm, where asked), and
adding the change, with the heaviest sites held back until the end of the round, whose mean is timed too. Flower's is
`FedAvg.aggregate_train`, which has to be given all replies at once. The table goes to benchmarks/aggregation.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fedmed import config as run_file
from fedmed.federated.admission import decoded_update, privacy_in, validated_counts, validated_weights
from fedmed.federated.combiners import RoundTerms, combiner
from fedmed.federated.strategies import server_step
from fedmed.federated.wire import encode_update
from fedmed.models.chexnet import chexnet
from fedmed.training.network import FlatNetwork
from fedmed.types import Update, Weights

HERE = Path(__file__).parent
BAR = 3.0  # × a memory copy, for fedmed as it is by default
WAYS = {
    "copy": "memory copy of the vector",
    "fedmed": "fedmed: receive, validate, add",
    "fedmed-norm": "fedmed with max-update-norm",
    "flower": "Flower: FedAvg.aggregate_train",
}


def network() -> FlatNetwork:
    torch.manual_seed(0)
    return FlatNetwork(chexnet(in_channels=1, outputs=14, norm="batch", width=0), torch.device("cpu"))


def vectors(start: Weights, updates: int) -> Iterator[Weights]:
    for number in range(updates):
        yield Weights(parameters=start.parameters + np.float32(1e-3 * (number + 1)), buffers=start.buffers.copy())


def seconds_of(act: Callable[[], None]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


def copied(flat: FlatNetwork, updates: int) -> float:
    target, total = np.empty(flat.layout.num_parameters, np.float32), 0.0
    for weights in vectors(flat.weights(), updates):
        total += seconds_of(lambda: np.copyto(target, weights.parameters))  # noqa: B023  # called at once
    return total


def fedmed(flat: FlatNetwork, updates: int, *, max_norm: float = 0.0) -> float:
    start, total = flat.weights(), 0.0
    config = run_file.validate({"strategy": {"max-update-norm": max_norm}})
    step = server_step(config)
    combined = combiner(
        RoundTerms(
            layout=flat.layout,
            sent=start,
            state=step.start(flat.layout),
            step=step,
            strategy=config.strategy,
            known=updates,
            round=1,
        )
    )
    for number, weights in enumerate(vectors(start, updates)):
        reply = encode_update(Update(weights=weights, layout=flat.layout.hash, num_examples=10, facts={"patients": 5}))

        def receive() -> None:
            update = decoded_update(reply, config.task)  # noqa: B023  # called at once
            privacy_in(update.facts)
            validated_counts(update, images=100, patients=100)
            trained = validated_weights(update, flat.layout, sent=start, max_norm=config.strategy.max_update_norm)
            combined.add(f"site-{number}", update, trained)  # noqa: B023

        total += seconds_of(receive)
    changes = []
    total += seconds_of(lambda: changes.append(combined.result().change))
    expected = start.parameters + np.float32(1e-3 * (updates + 1) / 2)
    np.testing.assert_allclose(start.parameters + changes[0], expected, atol=1e-5)
    return total


def flower(flat: FlatNetwork, updates: int) -> float:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    shapes = flat.layout.parameters
    replies = []
    for weights in vectors(flat.weights(), updates):
        tensors = {each.name: torch.from_numpy(weights.parameters[each.span].reshape(each.shape)) for each in shapes}
        content = RecordDict({"arrays": ArrayRecord(tensors), "metrics": MetricRecord({"num-examples": 10})})
        replies.append(SimpleNamespace(content=content, has_error=lambda: False))
    return seconds_of(lambda: FedAvg(fraction_evaluate=0.0).aggregate_train(1, replies))


def verdict(way: str, ratio: float) -> str:
    """Whether a way keeps to the bar, by the ratio as the table shows it; only the default one has to."""
    return "–" if way != "fedmed" else "met" if round(ratio, 1) <= BAR else "missed"


def one(way: str, updates: int) -> None:
    torch.set_num_threads(1)
    flat = network()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act = {
        "copy": copied,
        "fedmed": fedmed,
        "fedmed-norm": lambda *given: fedmed(*given, max_norm=1e6),
        "flower": flower,
    }[way]
    act(flat, 2)  # the first touches pages and imports
    cpu = act(flat, updates)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"ms": 1e3 * cpu / updates, "peak": peak, "mb": 4e-6 * flat.layout.num_parameters}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, action="append", help="default: 8 and 64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", choices=[*WAYS], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.updates[0])
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    rows = []
    for updates in given.updates or [8, 64]:
        samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--one", way, "--updates", str(updates)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                samples[way].append(json.loads(done.stdout.splitlines()[-1]))
        base = statistics.median(each["ms"] for each in samples["copy"])
        for way, title in WAYS.items():
            times = [each["ms"] for each in samples[way]]
            ratio = statistics.median(times) / base
            peak = statistics.median(each["peak"] for each in samples[way])
            rows.append(
                f"| {updates} | {title} | {statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f}) | "
                f"{ratio:.1f} | {verdict(way, ratio)} | {peak:.0f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    text = (
        "# Aggregation\n\n"
        f"`{' '.join(['python benchmarks/aggregation.py', *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}, one "
        f"thread, DenseNet-121 ({samples['copy'][0]['mb']:.1f} MB), {given.repeats} repeats in turn, each a "
        f"process of its own. The bar, for fedmed's default, is {BAR:g} × a memory copy.\n\n"
        "| updates | way | CPU ms an update, median (min-max) | × a copy | bar | peak beyond the network, MiB |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    print(text)
    if given.updates is None:
        (HERE / "aggregation.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
