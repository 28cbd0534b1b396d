"""Every algorithm of the server against a loop by hand, and what each of them refuses."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds_by_hand import LINEAR, SGD, Sent, after, combined_of, made_up, run_of, terms_of, zeros

from fedmed.errors import ConfigError, RunFailed, UpdateRefused
from fedmed.federated.combiners import combiner
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import check
from fedmed.federated.strategies import STRATEGIES, server_step
from fedmed.training.sampling import batches, steps_allowed
from fedmed.training.site import settings_for_sites, settings_from
from fedmed.types import Weights

SIZE = LINEAR.num_parameters
ROUNDS = [made_up(3, seed) for seed in range(4)]


def mean(updates) -> np.ndarray:
    return np.average([each.change for each in updates], axis=0, weights=[each.images for each in updates])


def test_fedavg_and_what_differs_only_at_the_sites_take_the_mean():
    expected = sum(map(mean, ROUNDS))
    for name in ("fedavg", "fedprox", "fedbn", "ditto"):
        np.testing.assert_allclose(after(run_of(name), *ROUNDS)[0].parameters, expected, rtol=1e-5, atol=1e-6)


def test_fedavgm_is_a_loop_by_hand():
    velocity, weights = np.zeros(SIZE), np.zeros(SIZE)
    for updates in ROUNDS:
        velocity = 0.7 * velocity - mean(updates)
        weights = weights - 0.5 * velocity
    config = run_of("fedavgm", server_momentum=0.7, server_learning_rate=0.5)
    np.testing.assert_allclose(after(config, *ROUNDS)[0].parameters, weights, rtol=1e-5, atol=1e-6)


SECOND_MOMENTS = {
    "fedadagrad": lambda v, squares, beta: v + squares,
    "fedadam": lambda v, squares, beta: beta * v + (1 - beta) * squares,
    "fedyogi": lambda v, squares, beta: v - (1 - beta) * squares * np.sign(v - squares),
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_adaptive_algorithms_are_algorithm_2_by_hand(name):
    eta, beta, second_beta, tau = 0.05, 0.8, 0.95, 0.01
    momentum, weights, second = np.zeros(SIZE), np.zeros(SIZE), np.full(SIZE, tau**2)
    for updates in ROUNDS:
        change = mean(updates)
        momentum = beta * momentum + (1 - beta) * change
        second = SECOND_MOMENTS[name](second, change**2, second_beta)
        weights = weights + eta * momentum / (np.sqrt(second) + tau)
    keys = {"server_learning_rate": eta, "server_momentum": beta, "server_second_momentum": second_beta}
    config = run_of(name, **keys, server_adaptivity=tau)
    np.testing.assert_allclose(after(config, *ROUNDS)[0].parameters, weights, rtol=1e-4, atol=1e-6)


def test_a_learning_rate_of_zero_is_the_algorithms_own():
    for name, own in (("fedavgm", 1.0), ("scaffold", 1.0), ("fedadam", 0.01), ("fedyogi", 0.01), ("fedadagrad", 0.01)):
        assert server_step(run_of(name)).learning_rate == own
        assert server_step(run_of(name, server_learning_rate=0.3)).learning_rate == 0.3


# SCAFFOLD


PACE = {"local-steps": 5, "learning-rate": 0.1}  # K·η = 0.5


def stepped(updates, steps=5):
    return [replace(each, facts={**each.facts, "steps": steps}) for each in updates]


def test_scaffold_is_algorithm_1_by_hand():
    weights, control, own = np.zeros(SIZE), np.zeros(SIZE), {site: np.zeros(SIZE) for site in "abcde"}
    for updates in ROUNDS:  # lines 16 and 17: three of five sites take part
        following = {each.site: own[each.site] - control - each.change / 0.5 for each in updates}  # line 12, option II
        weights = weights + 0.5 * np.mean([each.change for each in updates], axis=0)
        control = control + sum(following[site] - own[site] for site in following) / 5
        own |= following
    config = run_of("scaffold", PACE, weight_by="uniform", server_learning_rate=0.5)
    found, state = after(config, *map(stepped, ROUNDS), known=5)
    np.testing.assert_allclose(found.parameters, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["control"], control, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["control"], sum(own.values()) / 5, rtol=1e-4, atol=1e-5)
    assert server_step(config).outgoing(state)["control"] is state["control"]


def test_scaffold_with_step_one_moves_the_network_as_fedavg_does_bit_for_bit():
    scaffold, _ = after(run_of("scaffold", PACE), *map(stepped, ROUNDS), known=3)
    np.testing.assert_array_equal(scaffold.parameters, after(run_of(), *ROUNDS)[0].parameters)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scaffolds_variate_is_the_mean_of_the_sites_variates_by_their_weights_after_every_round(share):
    """Weights 50, 30 and 20, two of three in a round; the one not seen yet weighs what the others do on average."""
    config, images = run_of("scaffold", PACE, max_weight_share=share), {"a": 50, "b": 30, "c": 20}
    step, current, own = server_step(config), zeros(LINEAR), dict.fromkeys(images, np.zeros(SIZE))
    state, rng, counts = step.start(LINEAR), np.random.default_rng(3), {}
    for names in ("ab", "bc", "ac", "ab", "bc", "ac", "bc"):
        control = np.array(state["control"], np.float64)
        updates = stepped([Sent(site=name, change=rng.normal(size=SIZE), images=images[name]) for name in names])
        aggregate = combined_of(config, *updates, current=current, state=state, known=len(images))
        counts = {each.site: each.weight for each in aggregate.contributions} | counts
        current, state = step(current, aggregate, state)
        own |= {each.site: own[each.site] - control - each.change / 0.5 for each in updates}
        weights = [counts.get(name, np.mean(list(counts.values()))) for name in images]
        expected = np.average(list(own.values()), axis=0, weights=weights)
        np.testing.assert_allclose(state["control"], expected, rtol=1e-4, atol=1e-4)
    assert counts == (images if share == 1 else {"a": 30, "b": 30, "c": 20})


def test_scaffold_forgets_no_site_that_is_away_after_a_resume():
    """Line 17 of algorithm 1 divides by all sites, whoever is there."""
    config = run_of("scaffold", PACE, weight_by="uniform")
    first, step = after(config, stepped(ROUNDS[0]), known=5), server_step(config)
    for known in (5, 3):
        aggregate = combined_of(config, *stepped(ROUNDS[1]), current=first[0], state=first[1], known=known)
        controls = step(first[0], aggregate, first[1])[1]["control"]
        moved = controls - first[1]["control"]
        by_hand = sum(-each.change / 0.5 - first[1]["control"] for each in ROUNDS[1]) / 5
        np.testing.assert_allclose(moved, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weight_by", "weights"), [("images", (10, 80, 30)), ("uniform", (1, 1, 1))])
def test_scaffold_reaches_the_optimum_of_the_weighted_objective_where_fedavg_does_not(weight_by, weights):
    """fᵢ(x) = ½ hᵢ·‖x - tᵢ‖², ten steps of gradient descent at each site in every round."""
    curvatures, targets = np.array([0.5, 2.0, 4.0]), np.random.default_rng(0).normal(size=(3, SIZE))
    pull = np.array(weights) * curvatures
    optimum = (pull[:, None] * targets).sum(axis=0) / pull.sum()
    errors = {}
    for name in ("fedavg", "scaffold"):
        config = run_of(name, {"local-steps": 10, "learning-rate": 0.05}, weight_by=weight_by)
        step, current = server_step(config), zeros(LINEAR)
        state, controls = step.start(LINEAR), np.zeros((3, SIZE))
        for _ in range(150):
            control, updates = dict(step.outgoing(state)).get("control", np.zeros(SIZE)), []
            for number, (curvature, target) in enumerate(zip(curvatures, targets, strict=True)):
                local = current.parameters.astype(np.float64)
                for _ in range(10):
                    correction = control - controls[number] if name == "scaffold" else 0
                    local = local - 0.05 * (curvature * (local - target) + correction)
                controls[number] += (current.parameters - local) / (10 * 0.05) - control
                images, change = (10, 80, 30)[number], local - current.parameters
                updates.append(Sent(site="abc"[number], change=change, images=images, facts={"steps": 10}))
            aggregate = combined_of(config, *updates, current=current, state=state, known=3)
            current, state = step(current, aggregate, state)
        errors[name] = np.abs(current.parameters - optimum).max()
    assert errors["scaffold"] < 1e-4
    assert errors["fedavg"] > 0.05


@pytest.mark.parametrize("steps", [None, 0, 1, 6])
def test_scaffold_refuses_an_update_of_steps_that_its_site_cannot_have_taken(steps):
    """Fewer steps would make its variate longer, beyond what `max-update-norm` lets in."""
    with pytest.raises(UpdateRefused, match="steps"):
        combined_of(run_of("scaffold", PACE), Sent(site="a", change=np.ones(SIZE), facts={"steps": steps}))


# FedNova


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 50), rho=st.sampled_from([0.0, 0.5, 0.9]))
def test_fednovas_norm_counts_every_gradient_as_momentum_does(steps, rho):
    velocity = distance = 0.0
    for _ in range(steps):  # torch's SGD on a constant gradient of 1: the distance is the sum of all coefficients
        velocity = rho * velocity + 1
        distance += velocity
    step = server_step(run_of("fednova", {"momentum": rho}))
    assert step.norm({"steps": steps}) == pytest.approx(distance, rel=1e-9)


def test_fednova_is_a_loop_by_hand():
    taken = (3, 11, 40)
    one_by_one = [[replace(e, images=s, facts={"steps": s}) for e, s in zip(u, taken, strict=True)] for u in ROUNDS]
    weights = np.zeros(SIZE)
    for updates in one_by_one:
        p = np.array([each.images for each in updates]) / sum(each.images for each in updates)
        effective = sum(p * taken)
        weights = weights + effective * sum(
            share * each.change / steps for share, each, steps in zip(p, updates, taken, strict=True)
        )
    config = run_of("fednova", {"batch-size": 1})
    np.testing.assert_allclose(after(config, *one_by_one)[0].parameters, weights, rtol=1e-5, atol=1e-5)


def test_fednova_with_equal_steps_is_fedavg():
    rounds = [[replace(each, facts={"steps": 7}) for each in updates] for updates in ROUNDS]
    for momentum in (0.0, 0.9):
        found = after(run_of("fednova", {**SGD, "momentum": momentum, "local-steps": 7}), *rounds)[0].parameters
        np.testing.assert_allclose(found, after(run_of(), *ROUNDS)[0].parameters, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [None, 0, -3, 2.5, "many", 7, 10, 10**9, 10**400])
def test_fednova_refuses_an_update_of_steps_that_its_site_cannot_have_taken(steps):
    """41 images in batches of 8, three passes, two batches a step: the 41st image is a batch or is in the fifth."""
    config = run_of("fednova", {"batch-size": 8, "local-epochs": 3, "accumulate": 2})
    with pytest.raises(UpdateRefused, match="steps"):
        combined_of(config, Sent(site="a", change=np.ones(SIZE), images=41, facts={"steps": steps}))
    combined_of(config, Sent(site="a", change=np.ones(SIZE), images=41, facts={"steps": 8}))


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 60),
    alone=st.booleans(),
    train=st.fixed_dictionaries(
        {"batch-size": st.integers(1, 9), "local-epochs": st.integers(1, 4), "accumulate": st.integers(1, 4)},
        optional={"local-steps": st.integers(0, 5)},
    ),
)
def test_the_steps_that_a_site_takes_are_among_those_that_it_can_have_taken(images, alone, train):
    config = run_of("fednova", train)
    order = list(batches(np.arange(images), config.train, np.random.default_rng(0), alone=alone))
    assert -(-len(order) // config.train.accumulate) in steps_allowed(config, images)


# FedDG-GA


def losses(received, trained):
    return {"held-out-loss-received": received, "held-out-loss-trained": trained}


def test_feddg_ga_moves_weight_to_where_the_global_network_generalises_worst():
    changes = [each.change for each in made_up(3)]
    first = [(1.0, 0.5), (1.0, 0.4), (1.0, 0.9)]  # (loss of the received network, of the trained one)
    second = [(0.9, 0.4), (1.0, 0.3), (1.1, 0.8)]  # gaps 0.9 - 0.5, 1.0 - 0.4, 1.1 - 0.9
    third = [(0.8, 0.2), (0.7, 0.2), (1.6, 0.7)]  # gaps 0.4, 0.4, 0.8
    rounds = [
        [
            Sent(site=s, change=c, images=i, facts=losses(*f))
            for s, c, i, f in zip("abc", changes, (5, 1, 9), facts, strict=True)
        ]
        for facts in (first, second, third)
    ]
    weights, shares = np.zeros(SIZE), np.full(3, 1 / 3)
    for number, gaps in enumerate((None, np.array([0.4, 0.6, 0.2]), np.array([0.4, 0.4, 0.8]))):
        if gaps is not None:
            step = 0.3 * (1 - number / 4)  # d · (1 - (r - 1)/R)
            shares = np.clip(shares + step * (gaps - gaps.mean()) / np.abs(gaps - gaps.mean()).max(), 0, 1)
            shares = shares / shares.sum()
        weights = weights + shares @ np.array(changes)
    config = run_of("feddg-ga", {"rounds": 4}, adjustment=0.3)
    found, state = after(config, *rounds)
    np.testing.assert_allclose(found.parameters, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([state[f"site/{site}"][0] for site in "abc"], shares, rtol=1e-6)


def test_feddg_ga_keeps_the_weight_of_a_site_that_misses_a_round():
    change = np.ones(SIZE)
    full = [Sent(site=site, change=change, facts=losses(1.0, 0.5)) for site in "abcd"]
    some = [Sent(site=s, change=change, facts=losses(r, 0.5)) for s, r in (("a", 0.9), ("b", 0.6))]
    _, state = after(run_of("feddg-ga", {"rounds": 4}), full, some)
    entries = {site: float(state[f"site/{site}"][0]) for site in "abcd"}
    assert entries["a"] > 0.25 > entries["b"]
    assert entries["c"] == entries["d"] == 0.25
    assert sum(entries.values()) == pytest.approx(1)


@pytest.mark.parametrize("facts", [{}, losses(1.0, None), losses(float("nan"), 1.0)])
def test_feddg_ga_refuses_an_update_without_the_losses(facts):
    with pytest.raises(UpdateRefused, match="holds out"):
        combined_of(run_of("feddg-ga"), Sent(site="a", change=np.ones(SIZE), facts=facts))


# Cyclic


ZEROS = {"a": 0, "b": 0, "c": 1}


def test_feddg_ga_counts_sites_alike_that_would_all_weigh_nothing():
    """The third site, which has all the weight, does not answer."""
    config = run_of("feddg-ga")
    state = {"round": np.ones(1, np.float32), **{f"site/{site}": np.array([k, 1], "f4") for site, k in ZEROS.items()}}
    facts = {"steps": 5, "patients": 3, **losses(1.0, 0.5)}
    updates = [Sent(site=site, change=np.full(SIZE, change), facts=facts) for site, change in (("a", 1.0), ("b", 3.0))]
    aggregate = combined_of(config, *updates, state=state, known=3)
    np.testing.assert_allclose(aggregate.change, 2.0)
    found, after_it = server_step(config)(zeros(LINEAR), aggregate, state)
    np.testing.assert_allclose(found.parameters, 2.0)
    assert after_it["site/a"][0] == after_it["site/b"][0] == 0.5


def test_cyclic_takes_over_the_one_site_of_the_round():
    one = made_up(1)
    np.testing.assert_allclose(after(run_of("cyclic"), one)[0].parameters, one[0].change, rtol=1e-6)
    assert server_step(run_of("cyclic")).turns
    assert not server_step(run_of()).turns
    with pytest.raises(RunFailed, match="one site"):
        after(run_of("cyclic"), made_up(2))


# All of them


def everything(updates):
    """Updates that every algorithm can use."""
    facts = {"steps": 5, "patients": 3, **losses(1.0, 0.5)}
    return [replace(each, facts=facts) for each in updates]


@pytest.mark.parametrize("name", STRATEGIES)
def test_neither_the_network_nor_the_state_that_was_given_is_changed(name):
    count = 1 if name == "cyclic" else 3
    config = run_of(name, {"local-steps": 5})
    step, current = server_step(config), Weights(parameters=np.ones(SIZE, np.float32), buffers=np.zeros(0, np.float32))
    state = step.start(LINEAR)
    for vector in (current.parameters, *state.values()):
        vector.flags.writeable = False
    step(current, combined_of(config, *everything(made_up(count)), current=current, state=state), state)


@pytest.mark.parametrize("name", STRATEGIES)
def test_going_on_from_a_checkpoint_gives_the_same_bits(name, tmp_path):
    count, config = 1 if name == "cyclic" else 3, run_of(name, {"rounds": 4, "local-steps": 5})
    rounds = [everything(made_up(count, seed)) for seed in range(4)]
    folder = RunFolder.create(tmp_path / "run", config)
    unbroken, _ = after(config, *rounds, known=4)
    half, state = after(config, *rounds[:2], known=4)
    folder.save_checkpoint(1, half, state, {}, [{"round": 1}])
    _, current, state = folder.checkpoint()
    folder.close()
    step = server_step(config)
    for updates in rounds[2:]:
        current, state = step(current, combined_of(config, *updates, current=current, state=state, known=4), state)
    np.testing.assert_array_equal(current.parameters, unbroken.parameters)


REFUSED = [
    ("scaffold", {"optimizer": "adam"}, {}, "optimizer"),
    ("scaffold", {"momentum": 0.9}, {}, "momentum"),
    ("scaffold", {}, {"combine": "median"}, "combine"),
    ("scaffold", {}, {"clip_norm": 1.0}, "clip-norm"),
    ("fednova", {"optimizer": "adamw"}, {}, "optimizer"),
    ("fednova", {"ema": 0.9}, {}, "ema"),
    ("fednova", {"patience": 2}, {}, "patience"),
    ("fednova", {}, {"combine": "krum"}, "steps"),
    ("feddg-ga", {}, {"combine": "median"}, "combine"),
    ("cyclic", {}, {"combine": "bulyan"}, "combine"),
    ("cyclic", {}, {"required_sites": ("a",)}, "leave out strategy.required-sites, which in a comparison"),
    ("cyclic", {}, {"min_fraction": 0.5}, "leave out strategy.min-fraction"),
    ("fedawg", {}, {}, '"fedavg"'),
]


@pytest.mark.parametrize(("name", "train", "strategy", "named"), REFUSED)
def test_refuses_what_an_algorithm_does_not_define(name, train, strategy, named):
    with pytest.raises(ConfigError, match=named) as error:
        server_step(run_of(name, train, **strategy))
    assert "\n" not in str(error.value)


def test_momentum_at_the_sites_is_known_to_fednova():
    assert server_step(run_of("fednova", {"momentum": 0.9})).momentum == 0.9


def test_check_refuses_before_anything_is_written(toy_config):
    with pytest.raises(ConfigError, match="adamw"):
        check(toy_config("a-4", "b-4", strategy={"name": "scaffold"}, train={"optimizer": "adamw"}))
    with pytest.raises(ConfigError, match="needs 5 sites; there are 2"):
        check(toy_config("a-4", "b-4", strategy={"combine": "krum"}))


@pytest.mark.simulation
def test_a_run_with_an_adaptive_server_and_a_robust_rule_completes(toy_config, simulate):
    strategy = {"name": "fedyogi", "combine": "trimmed-mean", "clip_norm": 0.5, "min_sites": 1}
    result, folder = simulate(toy_config("a-20", "b-20", "c-20", strategy=strategy))
    assert result["status"] == "completed"
    assert result["strategy"] == "fedyogi"
    assert list(folder.path.glob("spool/*")) == []


# A user's own

OWN = """
import numpy as np
from fedmed.federated.strategies import ServerStep
from fedmed.types import Weights

class Half(ServerStep):
    def __call__(self, current, aggregate, state):
        return Weights(parameters=current.parameters + aggregate.change / 2, buffers=aggregate.buffers), state

class Unfinished(ServerStep):
    pass

class Other:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_steps.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_users_own_algorithm_is_a_dotted_path(own):
    found = after(run_of("own_steps:Half"), *ROUNDS)[0].parameters
    np.testing.assert_allclose(found, after(run_of(), *ROUNDS)[0].parameters / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("own_steps:Nothing", "module:Class"),
        ("nowhere:Half", "module:Class"),
        ("own_steps:Other", "no subclass"),
        ("own_steps:Unfinished", "abstract"),
    ],
)
def test_a_wrong_dotted_path_is_a_configuration_error(own, name, why):
    with pytest.raises(ConfigError, match=why):
        server_step(run_of(name))


def test_a_site_reads_the_settings_without_importing_the_servers_code():
    text = settings_for_sites(run_of("nowhere:Half"))
    assert json.loads(text)["strategy"]["name"] == "nowhere:Half"
    assert settings_from(text).strategy.name == "nowhere:Half"


@pytest.mark.simulation
def test_the_example_in_the_documents_runs(toy_config, simulate, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    module, run = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL).group(1) for kind in ("python", "toml"))
    (tmp_path / "steady.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    strategy = tomllib.loads(run)["strategy"]
    result, folder = simulate(toy_config("a-20", "b-20", "c-20", strategy=strategy))
    assert (result["status"], result["strategy"]) == ("completed", "steady:Steady")
    _, _, state = folder.checkpoint()
    assert state["last"].any()


def test_a_combiner_without_updates_refuses():
    for config in (run_of(), run_of(combine="median"), run_of("feddg-ga")):
        with pytest.raises(UpdateRefused, match="no update"):
            combiner(terms_of(config)).result()
