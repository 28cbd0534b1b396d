"""Data of sites whose own code lies: in the place of their network's values they send others, and too many."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import toy
from flwr.app import ArrayRecord

from fedmed.federated import wire
from fedmed.imaging.dataset import Dataset
from fedmed.types import Weights

SIZES = {"wide": 1_000, "huge": 20_000_000}  # values, by what the site's name begins with


def dataset(reference: Path, config) -> Dataset:
    """Toy data, in the process that will encode the update."""
    honest, count = wire._network, SIZES[reference.name.partition("-")[0]]

    def lie(weights: Weights, copy: bool) -> ArrayRecord:
        return honest(replace(weights, parameters=np.zeros(count, np.float32)), copy)

    wire._network = lie
    return toy.dataset(reference, config)
