"""Whose images a site trains on, and whose tell it when to stop."""

import numpy as np
import pytest
from visits import Visits, flat

from fedmed.training import own_patients
from fedmed.training.loop import train_


@pytest.mark.parametrize("patience", [0, 2])
def test_who_stops_the_training_is_neither_trained_on_nor_a_judge(toy_config, monkeypatch, patience):
    rounds = []

    def watched(network, data, rows, *rest):
        rounds.append((rows, rest[-1].validation))
        return train_(network, data, rows, *rest)

    monkeypatch.setattr(own_patients, "train_", watched)
    judged = []
    mean_loss = own_patients.mean_loss
    monkeypatch.setattr(own_patients, "mean_loss", lambda *given: judged.append(given) or mean_loss(*given))
    visits = Visits(toy_config("a-60", train={"patience": patience, "local_epochs": 2}), None)
    weights = flat(visits.config).weights()
    for round in (1, 2):
        weights = visits.train("a-60", round, weights).weights
    (first, asked), (second, _) = rounds
    np.testing.assert_array_equal(first, second)
    if not patience:
        assert asked is None and not judged
        return
    _, data, stop, _ = judged[0]
    sides = [{data.patients[row] for row in rows} for rows in (first, stop, np.flatnonzero(data.evaluation))]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides)) == len(set(data.patients))
    assert len(judged) == 4, "after every epoch of both rounds"
