"""The laws of combining: permutation, equal updates, convex hull, sums; every rule against a loop by hand."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds_by_hand import LINEAR, NORMED, Sent, add, combined_of, made_up, run_of, terms_of
from scipy.optimize import minimize

from fedmed.config import StrategyConfig
from fedmed.errors import UpdateRefused
from fedmed.federated.combiners import RULES, combiner, too_few_sites
from fedmed.federated.combiners.bulyan import around_the_median, selection
from fedmed.federated.combiners.geometric_median import geometric_median
from fedmed.federated.combiners.krum import krum, multi_krum
from fedmed.federated.combiners.mean import Mean, weight_limit
from fedmed.federated.combiners.rows import Rows

SIZE = LINEAR.num_parameters
ROBUST = [name for name in RULES if name != "mean"]
LEAST = {"median": 3, "trimmed-mean": 3, "geometric-median": 3, "krum": 5, "multi-krum": 5, "bulyan": 7}  # for f = 1
counts = st.integers(7, 12)
seeds = st.integers(0, 2**32 - 1)


def changes(updates) -> np.ndarray:
    return np.array([each.change for each in updates])


def squared_distances(values) -> np.ndarray:
    return ((values[:, None] - values[None]) ** 2).sum(axis=2)


# Laws


def test_the_table_is_the_key():
    assert set(StrategyConfig.model_fields["combine"].annotation.__args__) == set(RULES)


@pytest.mark.parametrize("rule", ROBUST)
@settings(max_examples=15, deadline=None)
@given(count=counts, seed=seeds)
def test_permuting_the_sites_changes_no_bit(rule, count, seed):
    updates = made_up(count, seed)
    order = np.random.default_rng(seed).permutation(count)
    one = combined_of(run_of(combine=rule), *updates)
    other = combined_of(run_of(combine=rule), *(updates[number] for number in order))
    np.testing.assert_array_equal(one.change, other.change)
    assert one.facts == other.facts


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 12), seed=seeds, share=st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.9, 1.0]))
def test_permuting_the_sites_changes_the_mean_by_rounding_alone(count, seed, share):
    updates, config = made_up(count, seed), run_of(max_weight_share=share)
    order = np.random.default_rng(seed).permutation(count)
    one, other = combined_of(config, *updates), combined_of(config, *(updates[number] for number in order))
    np.testing.assert_allclose(one.change, other.change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(count=counts, seed=seeds)
def test_equal_updates_give_that_update(rule, count, seed):
    first = made_up(1, seed)[0]
    updates = [replace(first, site=chr(97 + number), images=number + 1) for number in range(count)]
    expected = first.change.astype(np.float32)
    np.testing.assert_allclose(combined_of(run_of(combine=rule), *updates).change, expected, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(count=counts, seed=seeds, spread=st.sampled_from([1e-6, 1.0, 1e6]))
def test_no_rule_leaves_the_convex_hull_of_a_coordinate(rule, count, seed, spread):
    updates = made_up(count, seed, spread=spread)
    found, values = combined_of(run_of(combine=rule), *updates).change, changes(updates).astype(np.float32)
    slack = 1e-5 * np.abs(values).max(axis=0)
    assert (found >= values.min(axis=0) - slack).all() and (found <= values.max(axis=0) + slack).all()


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 12), seed=seeds, cut=st.integers(1, 11))
def test_means_of_groups_add_up_to_the_mean_of_all(count, seed, cut):
    updates = made_up(count, seed)
    groups = [group for group in (updates[:cut], updates[cut:]) if group]
    total = sum(each.images for each in updates)
    parts = [combined_of(run_of(), *group).change * sum(e.images for e in group) / total for group in groups]
    np.testing.assert_allclose(combined_of(run_of(), *updates).change, sum(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ROBUST)
def test_what_a_site_claims_to_weigh_moves_no_robust_rule(rule):
    updates = made_up(8)
    heavy = [replace(updates[0], images=10**9), *updates[1:]]
    one, other = (combined_of(run_of(combine=rule), *each).change for each in (updates, heavy))
    np.testing.assert_array_equal(one, other)


# Each rule by hand


def test_median_and_trimmed_mean_by_hand():
    for count in (7, 8):
        updates = made_up(count)
        values = changes(updates).astype(np.float32)
        found = combined_of(run_of(combine="median"), *updates).change
        np.testing.assert_allclose(found, np.median(values, axis=0), rtol=1e-6)
        found = combined_of(run_of(combine="trimmed-mean", dishonest_sites=2), *updates).change
        by_hand = [np.mean(sorted(column)[2:-2]) for column in values.T.tolist()]
        np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found, trim_mean(values, 2 / count), rtol=1e-5, atol=1e-6)  # Flower's


def krum_scores(values, dishonest) -> list[float]:
    scores = []
    for one in values:
        squares = sorted(float(((one - other) ** 2).sum()) for other in values)
        scores.append(sum(squares[1 : len(values) - dishonest - 1]))  # the first is the distance to itself
    return scores


@settings(max_examples=15, deadline=None)
@given(count=st.integers(7, 12), seed=seeds, dishonest=st.integers(0, 2))
def test_krum_and_multi_krum_by_hand(count, seed, dishonest):
    updates = made_up(count, seed)
    values = changes(updates).astype(np.float32).astype(np.float64)
    order = np.argsort(krum_scores(values, dishonest), kind="stable")
    one = combined_of(run_of(combine="krum", dishonest_sites=dishonest), *updates)
    np.testing.assert_allclose(one.change, values[order[0]], rtol=1e-6)
    assert len(one.facts["discarded"]) == count - 1
    several = combined_of(run_of(combine="multi-krum", dishonest_sites=dishonest), *updates)
    np.testing.assert_allclose(several.change, values[order[: count - dishonest]].mean(0), rtol=1e-5, atol=1e-6)
    discarded = sorted(updates[number].site for number in order[count - dishonest :])
    assert several.facts.get("discarded", []) == discarded


def test_multi_krum_selects_what_flower_selects_on_one_array():
    values = changes(made_up(9)).astype(np.float32)
    records = [
        RecordDict({"arrays": ArrayRecord({"flat": Array(row)}), "metrics": MetricRecord({"number": number})})
        for number, row in enumerate(values)
    ]
    chosen = select_multikrum(records, num_malicious_nodes=2, num_nodes_to_select=7)
    ours = np.flatnonzero(multi_krum(squared_distances(values.astype(np.float64)), 2))
    assert sorted(record["metrics"]["number"] for record in chosen) == ours.tolist()


def test_krum_takes_the_first_name_of_equal_scores():
    assert krum(squared_distances(np.array([[0.0], [1.0], [0.0], [1.0]])), 1).tolist() == [1, 0, 0, 0]


@settings(max_examples=10, deadline=None)
@given(seed=seeds, dishonest=st.integers(0, 2))
def test_bulyan_by_hand(seed, dishonest):
    count = 4 * dishonest + 4
    updates = made_up(count, seed)
    values = changes(updates).astype(np.float32).astype(np.float64)
    left, chosen = list(range(count)), []
    while len(chosen) < count - 2 * dishonest:
        scores = []
        for one in left:
            squares = sorted(float(((values[one] - values[other]) ** 2).sum()) for other in left if other != one)
            scores.append(sum(squares[: max(len(left) - dishonest - 2, 1)]))
        chosen.append(left.pop(int(np.argmin(scores))))
    by_hand = []
    for column in values[chosen].T:
        middle = np.median(column)
        by_hand.append(np.mean(sorted(column, key=lambda value: abs(value - middle))[: len(chosen) - 2 * dishonest]))
    found = combined_of(run_of(combine="bulyan", dishonest_sites=dishonest), *updates)
    np.testing.assert_allclose(found.change, by_hand, rtol=1e-4, atol=1e-5)
    assert set(np.flatnonzero(selection(squared_distances(values), dishonest))) == set(chosen)


def test_bulyan_keeps_the_values_around_the_median():
    column = np.array([[0.0], [1.0], [1.1], [1.3], [9.0]], np.float32)
    np.testing.assert_allclose(around_the_median(column, 1), [(1 + 1.1 + 1.3) / 3], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_is_where_an_optimiser_finds_the_smallest_sum_of_distances(seed):
    values = np.random.default_rng(seed).normal(size=(6, 3))
    values[0] *= 50

    def total(point):
        return np.linalg.norm(values - point, axis=1).sum()

    found = geometric_median(squared_distances(values), 1) @ values
    best = minimize(total, values.mean(axis=0), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12})
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert total(found) <= best.fun + 1e-6


def test_geometric_median_survives_points_that_coincide_and_one_far_beyond_float32():
    same = np.zeros((5, 5))
    np.testing.assert_allclose(geometric_median(same, 1), np.full(5, 0.2))
    values = np.array([[0.0], [1.0], [2.0], [3.0], [1e18]])
    assert 1 <= float(geometric_median(squared_distances(values), 1)[:4] @ values[:4, 0]) <= 3


# The share that one site may have


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(1, 1e6), min_size=1, max_size=30), share=st.floats(0.05, 1.0))
def test_no_site_has_more_than_its_share_and_as_little_as_possible_is_taken(weights, share):
    limit = weight_limit(weights, share)
    capped = np.minimum(weights, limit)
    if len(weights) * share > 1:
        assert capped.max() <= share * capped.sum() * (1 + 1e-9)
        if limit < math.inf:  # those that were lowered are exactly at it
            assert capped.max() == pytest.approx(share * capped.sum())
        else:
            assert share == 1 or max(weights) <= share * sum(weights) * (1 + 1e-9)
    elif share < 1:
        assert (capped == capped[0]).all()
    assert sum(weight > limit for weight in weights) <= 1 / share


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 12), seed=seeds, share=st.sampled_from([0.1, 0.2, 0.34, 0.5, 0.7]))
def test_the_streamed_mean_with_a_share_is_numpys_average_with_lowered_weights(count, seed, share):
    updates = [replace(each, facts={"steps": 2}) for each in made_up(count, seed)]
    updates[0] = replace(updates[0], images=5000)
    weights = np.minimum([e.images for e in updates], weight_limit([e.images for e in updates], share))
    config = run_of("scaffold", {"local-steps": 2, "learning-rate": 0.25}, max_weight_share=share)
    found = combined_of(config, *updates)
    expected = np.average(changes(updates), axis=0, weights=weights)
    np.testing.assert_allclose(found.change, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.scaled_sum, expected * sum(weights) / 0.5, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose([each.weight for each in found.contributions], weights)
    assert found.facts.get("capped", []) == [e.site for e, w in zip(updates, weights, strict=True) if e.images > w]


def test_at_most_one_update_for_each_share_is_held_in_memory():
    terms = terms_of(run_of(max_weight_share=0.3))
    mean = combiner(terms)
    assert isinstance(mean, Mean)
    for sent in made_up(25):
        add(mean, terms.sent, LINEAR, sent)
        assert len(mean._held) <= 3  # 4 of them would be more than all weight
    assert combiner(terms_of(run_of()))._room == 0


def test_by_default_one_update_is_held_and_two_sites_still_count_alike():
    terms = terms_of(run_of(max_weight_share=0.5))
    mean = combiner(terms)
    assert isinstance(mean, Mean)
    for site, images in (("a", 90), ("b", 30)):
        add(mean, terms.sent, LINEAR, Sent(site=site, change=np.zeros(SIZE), images=images))
        assert len(mean._held) == 1
    assert [each.weight for each in mean.result().contributions] == [30, 30]


def test_the_default_lets_no_site_outweigh_all_others():
    assert StrategyConfig().max_weight_share == 0.5
    brought = (("a", 1.0, 900), ("b", 0.0, 60), ("c", 0.0, 40))
    updates = [Sent(site=site, change=np.full(SIZE, value), images=images) for site, value, images in brought]
    found = combined_of(run_of(max_weight_share=0.5), *updates)
    np.testing.assert_allclose(found.change, 0.5, rtol=1e-6)
    assert found.facts == {"capped": ["a"]}


# Clipping


@settings(max_examples=20, deadline=None)
@given(seed=seeds, bound=st.sampled_from([0.1, 4.0, 1e3]))
def test_clipping_bounds_every_sites_change_before_the_mean(seed, bound):
    updates = made_up(5, seed)
    clipped = [each.change * min(1, bound / np.linalg.norm(each.change)) for each in updates]
    expected = np.average(clipped, axis=0, weights=[each.images for each in updates])
    found = combined_of(run_of(clip_norm=bound), *updates)
    np.testing.assert_allclose(found.change, expected, rtol=1e-4, atol=1e-6)
    assert found.facts.get("clipped", []) == [e.site for e in updates if np.linalg.norm(e.change) > bound]
    median = combined_of(run_of(clip_norm=bound, combine="median"), *updates)
    np.testing.assert_allclose(median.change, np.median(clipped, axis=0), rtol=1e-4, atol=1e-6)


# Running statistics


def with_statistics(count: int) -> list[Sent]:
    rng = np.random.default_rng(3)
    return [
        Sent(
            site=chr(97 + number),
            change=rng.normal(size=6),
            buffers=np.array([*rng.normal(size=3), *rng.uniform(1, 2, 3), number], np.float32),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("change", [0.0, 100.0])
def test_running_statistics_withstand_a_site_whatever_its_parameters_look_like(rule, change):
    updates = with_statistics(7)
    updates[0] = replace(updates[0], change=updates[1].change + change, buffers=np.full(7, 1e6, np.float32))
    honest = np.array([each.buffers for each in updates[1:]])
    found = combined_of(run_of(combine=rule), *updates, layout=NORMED).buffers
    assert (found >= honest.min(axis=0)).all() and (found <= honest.max(axis=0)).all()
    assert found[6] == round(float(found[6]))


def test_the_running_statistics_of_a_selecting_rule_are_the_median_of_all():
    updates = with_statistics(7)
    values = np.array([each.buffers for each in updates])
    for rule in ("median", "krum", "multi-krum", "geometric-median"):
        found = combined_of(run_of(combine=rule), *updates, layout=NORMED).buffers
        np.testing.assert_allclose(found, np.median(values, axis=0), rtol=1e-6)


def test_an_algorithm_that_weighs_sites_pools_their_statistics_as_the_mean_does():
    facts = {"held-out-loss-received": 1.0, "held-out-loss-trained": 1.0}
    updates = [replace(each, facts=facts) for each in with_statistics(6)]
    pooled = combined_of(run_of(weight_by="uniform"), *updates, layout=NORMED)
    weighed = combined_of(run_of("feddg-ga"), *updates, layout=NORMED)
    np.testing.assert_allclose(weighed.buffers, pooled.buffers, rtol=1e-5)
    np.testing.assert_allclose(weighed.change, pooled.change, rtol=1e-5, atol=1e-6)


# What is refused


@pytest.mark.parametrize("rule", ROBUST)
def test_refuses_fewer_sites_than_the_rule_is_defined_for(rule):
    strategy, least = run_of(combine=rule).strategy, LEAST[rule]
    assert too_few_sites(strategy, least) is None
    assert f"needs {least} sites; there are {least - 1}" in too_few_sites(strategy, least - 1)
    terms = terms_of(run_of(combine=rule))
    combined = combiner(terms)
    for sent in made_up(least - 1):
        add(combined, terms.sent, LINEAR, sent)
    assert f"needs {least} sites" in combined.too_few()
    with pytest.raises(UpdateRefused, match="needs"):
        combined.result()
    more = run_of(combine=rule, dishonest_sites=2).strategy
    assert too_few_sites(more, {3: 5, 5: 7, 7: 11}[least]) is None
    assert too_few_sites(more, {3: 5, 5: 7, 7: 11}[least] - 1)


@pytest.mark.parametrize("patients", [None, 0, -4, float("nan"), float("inf"), "many"])
def test_refuses_an_update_without_a_weight_and_goes_on_without_it(patients):
    terms = terms_of(run_of(weight_by="patients"))
    combined = combiner(terms)
    good, bad = made_up(2)
    with pytest.raises(UpdateRefused, match="patients"):
        add(combined, terms.sent, LINEAR, replace(bad, facts={"patients": patients}))
    add(combined, terms.sent, LINEAR, replace(good, facts={"patients": 3}))
    np.testing.assert_allclose(combined.result().change, good.change, rtol=1e-6)


@pytest.mark.simulation
def test_a_round_with_too_few_answers_for_its_rule_pauses_with_the_reason(toy_config, simulate):
    config = toy_config("a-20", "b-20", "c-20", "d-20", "nan-20", strategy={"combine": "krum"})
    result, _ = simulate(config)
    assert result["status"] == "paused"
    assert result["reason"] == 'strategy.combine = "krum" with strategy.dishonest-sites = 1 needs 5 sites; there are 4'
    assert [failure["site"] for failure in result["rounds_log"][0]["failed"]] == ["nan-20"]


@pytest.mark.simulation
def test_the_log_of_a_round_names_whom_the_rule_discarded(toy_config, simulate):
    events = []
    config = toy_config("a-20", "b-20", "c-20", "d-20", "e-20", strategy={"combine": "krum"})
    simulate(config, events.append)
    discarded = [event["discarded"] for event in events if event["kind"] == "round_finished"]
    assert [len(sites) for sites in discarded] == [4, 4]


# Side by side, on disk


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(1, 5000), seed=seeds)
def test_rows_come_back_as_they_were_in_any_order(rows, width, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, width)).astype(np.float32)
    cut = int(rng.integers(0, width + 1))
    matrix = Rows(width, None)
    for row in values:
        matrix.append(row[:cut], np.zeros(cut, np.float32), 1.0, row[cut:])
    order = rng.permutation(rows).tolist()
    back = np.concatenate([part.copy() for _, part in matrix.columns(order, 0, width)], axis=1)
    np.testing.assert_array_equal(back, values[order])
    matrix.close()


def test_long_rows_are_read_in_pieces_and_leave_no_file(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 700_000)).astype(np.float32)
    matrix = Rows(700_000, tmp_path)
    for row in values:
        matrix.append(row, np.zeros_like(row), 1.0, np.zeros(0, np.float32))
    assert list(tmp_path.iterdir()) == []  # it has no name, so a killed run leaves nothing
    assert len(list(matrix.columns([0, 1, 2], 0, 700_000))) == 3
    distances = matrix.squared_distances([0, 1, 2], 700_000)
    for one, other in combinations(range(3), 2):
        expected = ((values[one].astype(np.float64) - values[other]) ** 2).sum()
        assert distances[one, other] == distances[other, one] == pytest.approx(expected, rel=1e-12)
    matrix.close()


@pytest.mark.parametrize(("count", "width"), [(1, 5), (2, 70_001), (60, 3001), (700, 90)])
def test_distances_of_many_or_long_rows_are_those_of_each_pair(count, width):
    values = np.random.default_rng(count).normal(size=(count, width)).astype(np.float32)
    matrix = Rows(width, None)
    for row in values:
        matrix.append(row, np.zeros_like(row), 1.0, np.zeros(0, np.float32))
    distances = matrix.squared_distances(range(count), width)
    for one in range(0, count, 7):
        expected = ((values[one].astype(np.float64) - values) ** 2).sum(axis=1)
        np.testing.assert_allclose(distances[one], expected, rtol=1e-12)
    matrix.close()


def test_distances_keep_their_digits_where_vectors_are_long_and_close():
    base = np.full(1000, 3e4, np.float32)
    matrix = Rows(1000, None)
    for step in (0.0, 0.0078125, 0.015625):  # exact in float32 beside 3e4, lost in ‖x‖² + ‖y‖² - 2·x·y
        matrix.append(base + np.float32(step), np.zeros_like(base), 1.0, np.zeros(0, np.float32))
    distances = matrix.squared_distances([0, 1, 2], 1000)
    assert distances[0, 1] == pytest.approx(1000 * 0.0078125**2, rel=1e-12)
    assert distances[0, 2] == pytest.approx(1000 * 0.015625**2, rel=1e-12)
    matrix.close()
