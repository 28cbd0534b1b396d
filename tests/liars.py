"""Data of sites whose own code misbehaves when it sends their update: too many values, or far too late."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import toy
from flwr.app import ArrayRecord

from fedmed.federated import wire
from fedmed.imaging.dataset import Dataset
from fedmed.types import Weights

SIZES = {"wide": 1_000, "huge": 20_000_000}  # values, by what the site's name begins with
LATE_S = 150.0


def dataset(reference: Path, config) -> Dataset:
    """Toy data, in the process that will encode the update."""
    honest, kind = wire._network, reference.name.partition("-")[0]

    def lie(weights: Weights, copy: bool) -> ArrayRecord:
        if kind == "late":
            time.sleep(LATE_S)
            return honest(weights, copy)
        return honest(replace(weights, parameters=np.zeros(SIZES[kind], np.float32)), copy)

    wire._network = lie
    return toy.dataset(reference, config)
