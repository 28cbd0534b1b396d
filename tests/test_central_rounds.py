"""Privacy at the server, through whole runs. Tests are named after the claims of docs/privacy-model.md they hold."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from rounds_by_hand import LINEAR, NORMED, Sent, add, made_up, terms_of, zeros
from safetensors.numpy import load_file

from fedmed import config as run_file
from fedmed.errors import ConfigError, PolicyRefused, RunFailed, UpdateRefused
from fedmed.federated.central import RELEASES, ServerNoise
from fedmed.federated.combiners.noised_sum import NoisedSum
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.simulation import check, local_grid, run_on
from fedmed.models import build
from fedmed.privacy.central import clip_change
from fedmed.privacy.noise import InsecureGenerator, SecureGenerator
from fedmed.reporting import write_model_card, write_report
from fedmed.training.network import FlatNetwork
from fedmed.training.oversight import Oversight
from fedmed.training.site import Site, settings_for_sites
from fedmed.training.site_round import site_card, train_round
from fedmed.types import Task, Weights

pytestmark = pytest.mark.simulation
CENTRAL = {"mode": "central", "noise-multiplier": 0.05, "max-grad-norm": 0.3, "sites": 4}
TESTED = {**CENTRAL, "noise": "insecure-test"}
BUDGETED = {**CENTRAL, "noise-multiplier": 0.0, "epsilon": 8.0, "sites": 20}
UNIFORM = {"weight-by": "uniform", "checkpoint-every": 10}


@pytest.fixture
def central_run(toy_config):
    def make(*sites, rounds=3, privacy=None, strategy=None, **sections):
        return toy_config(
            *(sites or ("a-20", "b-30")),
            privacy=privacy or CENTRAL,
            strategy={**UNIFORM, **(strategy or {})},
            train={"rounds": rounds, "learning-rate": 0.5},
            evaluate={"keep": "last"},
            **sections,
        )

    return make


class Stop(Exception):
    """A test's own way to kill a run."""


def run_until(folder: RunFolder, config, watch=lambda event: None) -> dict:
    with local_grid(config, folder) as grid:
        return run_on(grid, config, folder, watch)


def killed_at(folder: RunFolder, config, kind: str, round: int) -> None:
    def watch(event):
        if (event["kind"], event["round"]) == (kind, round):
            raise Stop

    with pytest.raises(Stop):
        run_until(folder, config, watch)


def releases(folder: RunFolder) -> list[dict]:
    lines = (folder.path / "checkpoints" / RELEASES).read_text().splitlines()
    return [json.loads(line) for line in lines]


def exact_epsilon(events, delta: float) -> float:
    """Of Gaussians that everybody takes part in: they compose into one, whose ε dp-accounting knows exactly."""
    precision = sum(event["steps"] / event["noise_multiplier"] ** 2 for event in events)
    return dp_accounting.get_epsilon_gaussian(precision**-0.5, delta)


def first_network(config) -> FlatNetwork:
    return FlatNetwork(build(config.model, outputs=2, seed=config.seed), torch.device("cpu"))


def sent_by(config, name: str, round: int, weights: Weights, folder: Path | None = None, **changes):
    """What a site sends in a round, without any server."""
    task = Task(
        kind="train", round=round, settings=settings_for_sites(config), layout=first_network(config).layout.hash,
        weights=weights, evaluate=True,
    )  # fmt: skip
    return train_round(task, Site(name=name, manifest=Path(name), dataset="toy:dataset", virtual=True, **changes))


def kept(folder: RunFolder, config) -> np.ndarray:
    """The parameters of the final network, in the layout's order."""
    tensors = load_file(folder.path / "model.safetensors")
    return np.concatenate([tensors[entry.name].ravel() for entry in first_network(config).layout.parameters])


def test_p09_a_run_equals_central_privacy_made_by_hand(central_run, simulate):
    config = central_run(privacy=TESTED)
    result, folder = simulate(config)
    assert result["status"] == "completed"
    weights, noise = first_network(config).weights(), InsecureGenerator(config.seed)
    for round in (1, 2, 3):
        changes = [sent_by(config, name, round, weights).weights.parameters - weights.parameters
                   for name in ("a-20", "b-30")]  # fmt: skip
        norms = [float(np.linalg.norm(change.astype(np.float64))) for change in changes]
        total = sum(change * min(1.0, 0.3 / norm) for change, norm in zip(changes, norms, strict=True))
        mean = (total + 0.05 * 0.3 * noise.normal(total.size)) / 4
        weights = replace(weights, parameters=(weights.parameters + mean).astype(np.float32))
    assert max(norms) > 0.3, "nothing was clipped"
    np.testing.assert_allclose(kept(folder, config), weights.parameters, rtol=0, atol=2e-6)


def test_p09_taking_a_hospital_away_moves_a_round_by_the_clip_over_the_count_at_most(central_run, simulate):
    def after_a_round(*sites):
        config = central_run(*sites, rounds=1, privacy=TESTED)
        return kept(simulate(config)[1], config).astype(np.float64)

    whole, without, silenced = after_a_round("a-20", "b-30"), after_a_round("a-20"), after_a_round("a-20", "nan-30")
    assert 0.5 * 0.3 / 4 < np.linalg.norm(whole - without) <= 0.3 / 4 * (1 + 1e-6)
    assert np.array_equal(without, silenced), "a site whose update is refused counts as zero"


class Silent(InsecureGenerator):
    """No noise, to see the sum."""

    secret = True

    def normal(self, size):
        return np.zeros(size, np.float32)

    def fine_normal(self, size):
        return np.zeros(size)


def noise_of(folder: Path, rounds: int = 5, **privacy) -> ServerNoise:
    config = run_file.validate(
        {
            "task": {"labels": ["a"]},
            "train": {"rounds": rounds},
            "privacy": {**CENTRAL, "max-grad-norm": 1.5, **privacy},
            "strategy": {"weight-by": "uniform"},
        }
    )
    noise = ServerNoise(config, RunFolder.create(folder, config))
    noise.begin(0, parameters=18)
    noise.generator = Silent(0)
    return noise


def noised(noise: ServerNoise, sent: list[Sent], layout=LINEAR, current: Weights | None = None, known: int = 4):
    terms = replace(terms_of(noise.config, layout, current), noise=noise, round=1, known=known)
    combined = NoisedSum(terms, noise)
    for each in sent:
        add(combined, terms.sent, layout, each)
    return combined.result()


def test_p09_no_hospital_moves_the_sum_by_more_than_the_clip_whoever_else_answers(tmp_path):
    noise, worst = noise_of(tmp_path), 0.0
    everyone = [*made_up(3, spread=3.0), Sent(site="z", change=np.full(18, 0.01), images=10**6)]
    for size in range(1, 5):
        for present in itertools.combinations(everyone, size):
            for gone in present:
                whole = noised(noise, list(present)).change.astype(np.float64)
                less = noised(noise, [each for each in present if each is not gone]).change
                worst = max(worst, float(np.linalg.norm(whole - less)) * 4)
    assert worst == pytest.approx(1.5, rel=1e-5)


def test_p09_buffers_stay_the_servers(tmp_path):
    own = Weights(parameters=zeros(NORMED).parameters, buffers=np.array([1, 2, 3, 4, 5, 6, 16_777_217], np.float32))
    theirs = np.full(7, 99.0, np.float32)
    found = noised(noise_of(tmp_path), [Sent(site="a", change=np.zeros(6), buffers=theirs)], NORMED, own)
    assert np.array_equal(found.buffers, own.buffers), "integer ones too"


def test_p09_zero_updates_and_what_is_not_finite(tmp_path):
    noise = noise_of(tmp_path)
    found = noised(noise, [Sent(site="a", change=np.zeros(6), buffers=np.ones(7, np.float32))], NORMED)
    assert not found.change.any()
    with pytest.raises(UpdateRefused, match="not finite"):
        noised(noise, [Sent(site="a", change=np.array([np.nan] * 18))])
    assert all(not contribution.facts for contribution in found.contributions)
    with pytest.raises(RunFailed, match=r"privacy\.sites"):
        noised(noise, [], known=5)


def test_p09_what_a_release_costs_is_on_disk_before_its_noise_exists(tmp_path):
    class Dies(Silent):
        def normal(self, size):
            raise Stop

    noise = noise_of(tmp_path)
    noise.generator = Dies(0)
    with pytest.raises(Stop):
        noised(noise, made_up(2))
    again = ServerNoise(noise.config, RunFolder(tmp_path))
    assert sum(event.steps for event in again.events) == 1
    assert again.facts()["events"][0]["noise_multiplier"] == 0.05


def test_p09_the_result_charges_every_hospital_and_another_accountant_agrees(central_run, simulate):
    config = central_run("a-20", "b-30", "nan-30", privacy=BUDGETED)
    result, folder = simulate(config)
    assert result["status"] == "degraded" and "nan-30" in result["reason"]
    whole = result["server"]["privacy"]
    assert [site["privacy"] for site in result["sites"]] == [whole] * 3
    assert (whole["unit"], whole["epsilon_total"], whole["delta"]) == ("site", None, 1e-6)
    assert "add or remove one hospital" in whole["adjacency"]
    truth = exact_epsilon(whole["events"], whole["delta"])
    assert truth <= whole["epsilon"] <= min(8.0, truth + 0.015)
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    rounds = [event["epsilon"] for event in events if event["kind"] == "round_finished"]
    assert rounds == sorted(rounds) and rounds[-1] == whole["epsilon"]
    write_report(folder.path)
    write_model_card(folder.path)
    assert "noise at the server" in (folder.path / "MODEL_CARD.md").read_text()
    assert "noise at a server that is trusted" in (folder.path / "report.html").read_text()


def test_p09_nothing_of_a_hospital_leaves_beside_its_change(central_run, simulate):
    config = central_run()
    update = sent_by(config, "a-20", 1, first_network(config).weights())
    assert set(update.facts) == {"patients", "seconds"} and not update.metrics
    assert update.num_examples == update.facts["patients"] == 8
    result, folder = simulate(config)
    assert all(site["metrics"] == {} and site["images"] is None for site in result["sites"])
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    received = [event for event in events if event["kind"] == "update_received"]
    assert len(received) == 6
    assert all(event["loss"] is None and event["steps"] is None and "metrics" not in event for event in received)
    assert not (folder.path / "spool").exists(), "the changes waited there, at the server"


def test_p09_a_round_that_is_trained_again_is_charged_again_and_the_budget_holds(central_run, tmp_path):
    config = central_run(rounds=4, privacy=BUDGETED)
    folder = RunFolder.create(tmp_path / "run", config)
    killed_at(folder, config, "update_received", 3)  # two rounds were released, and no checkpoint was written
    planned = releases(folder)[0]["events"][0]["noise_multiplier"]
    result = run_until(RunFolder.resume(folder.path), config)
    said = result["server"]["privacy"]
    assert [line["round"] for line in releases(folder)] == [1, 2, 1, 2, 3, 4]
    assert sum(event["steps"] for event in said["events"]) == 6
    assert {event["noise_multiplier"] >= planned for event in said["events"]} == {True}
    assert max(event["noise_multiplier"] for event in said["events"]) > planned
    assert exact_epsilon(said["events"], 1e-6) <= said["epsilon"] <= 8.0


def test_p05_the_noise_of_a_repeated_round_is_new(central_run, tmp_path):
    config = central_run(rounds=2)
    networks = []
    folder = RunFolder.create(tmp_path / "run", config)
    for _ in range(2):
        killed_at(folder, config, "round_started", 2)
        folder = RunFolder.resume(folder.path)
    assert isinstance(ServerNoise(config, folder).generator, SecureGenerator)
    for name in "ab":
        other = RunFolder.create(tmp_path / name, config)
        run_until(other, config)
        networks.append(kept(other, config))
    assert (networks[0] != networks[1]).mean() > 0.9
    assert [line["round"] for line in releases(folder)] == [1, 1]


def test_p09_a_given_noise_tells_what_it_costs_however_much(central_run, tmp_path):
    config = central_run(rounds=2)
    folder = RunFolder.create(tmp_path / "run", config)
    killed_at(folder, config, "round_started", 2)
    said = run_until(RunFolder.resume(folder.path), config)["server"]["privacy"]
    assert said["events"][0]["steps"] == 3 and said["epsilon"] > 8.0


def test_p09_another_process_in_the_same_folder_cannot_hide_its_releases(central_run, tmp_path):
    config = central_run(rounds=2, privacy=BUDGETED)
    folder = RunFolder.create(tmp_path / "run", config)
    path = folder.path / "checkpoints" / RELEASES

    def other_process(event):
        if (event["kind"], event["round"]) == ("round_started", 2):
            path.write_text(path.read_text() * 2)

    with pytest.raises(RunFailed, match="another process"):
        run_until(folder, config, other_process)
    said = json.loads((folder.path / "result.json").read_text())["server"]["privacy"]
    assert said["events"][0]["steps"] == 3 and said["epsilon"] > 8.0


def test_p09_a_run_whose_record_of_releases_is_gone_or_damaged_goes_no_further(central_run, tmp_path):
    config = central_run(rounds=3, strategy={"checkpoint-every": 1})
    folder = RunFolder.create(tmp_path / "run", config)
    killed_at(folder, config, "round_started", 3)
    path = folder.path / "checkpoints" / RELEASES
    good = path.read_text()
    for bad, said in ((good.splitlines()[0] + "\n", "missing"), ("{}\n" + good, "damaged"), ("x\n", "damaged")):
        path.write_text(bad)
        with pytest.raises(RunFailed, match=said):
            run_until(RunFolder.resume(folder.path), config)
    path.write_text(good + '{"round": 3, "ev')  # a process was killed as it wrote: nothing was released
    assert run_until(RunFolder.resume(folder.path), config)["server"]["privacy"]["events"][0]["steps"] == 3


def test_p09_an_adaptive_clip_moves_is_charged_and_goes_on_after_a_kill(central_run, tmp_path):
    privacy = {**BUDGETED, "clipping": "adaptive", "clip-quantile": 0.5, "max-grad-norm": 5.0}
    config = central_run(rounds=4, privacy=privacy, strategy={"checkpoint-every": 1})
    folder = RunFolder.create(tmp_path / "run", config)
    killed_at(folder, config, "round_started", 3)
    said = run_until(RunFolder.resume(folder.path), config)["server"]["privacy"]
    clips = [line["clip"] for line in releases(folder) if "clip" in line]
    following = [line["next-clip"] for line in releases(folder) if "next-clip" in line]
    assert clips == [5.0, *following[:-1]] and len(set(clips)) == 4
    assert {event["release"]: event["steps"] for event in said["events"]} == {"update": 4, "count": 4}
    truth = exact_epsilon(said["events"], 1e-6)
    assert truth <= said["epsilon"] <= min(8.0, truth + 0.015)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "ditto"])
def test_p09_server_steps_that_only_see_the_noised_mean_are_allowed(name, central_run, simulate):
    result, _ = simulate(central_run(rounds=2, strategy={"name": name}))
    assert result["status"] == "completed" and result["server"]["privacy"]["events"][0]["steps"] == 2


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("strategy", "name", name) for name in ("scaffold", "fednova", "feddg-ga", "fedbn", "cyclic", "mine:Step")),
        ("strategy", "combine", "median"),
        ("strategy", "weight-by", "images"),
        ("strategy", "fraction", 0.5),
        ("strategy", "clip-norm", 1.0),
        ("strategy", "max-update-norm", 1.0),
        ("privacy", "clipping", "per-layer"),
    ],
)
def test_p09_refuses_what_would_use_a_site_beside_the_noised_sum(section, key, value):
    values = {"privacy": {"mode": "central"}, "strategy": {"weight-by": "uniform"}}
    values[section] = {**values[section], key: value}
    with pytest.raises(ConfigError, match=f"{section}.{key}"):
        run_file.validate(values)


def test_p09_a_site_beyond_those_that_the_sum_is_divided_by_is_refused_and_the_others_train(central_run, simulate):
    result, _ = simulate(central_run("a-20", "b-30", "c-20", privacy={**TESTED, "sites": 2}))
    assert [entry["joined"] for entry in result["rounds_log"]] == [["a-20", "b-30"]] * 3
    assert result["reason"] == "c-20: the run is meant for 2 sites, and as many have joined (privacy.sites)"


def test_p09_a_run_that_cannot_train_is_refused_before_there_is_a_folder(central_run, tmp_path):
    config = central_run(rounds=2, privacy={"mode": "central", "epsilon": 1.0})
    with pytest.raises(ConfigError, match=r"cannot train.*hospitals"):
        check(config)
    with pytest.raises(ConfigError, match="cannot train"):  # a deployed server checks nothing beforehand
        run_until(RunFolder.create(tmp_path / "run", config), config)
    wild = {**CENTRAL, "clipping": "adaptive", "sites": 60, "noise-multiplier": 40.0}
    with pytest.raises(ConfigError, match="move the clip"):
        check(central_run(rounds=200, privacy=wild))


def test_p05_noise_that_can_be_predicted_voids_epsilon_and_stays_in_simulation(central_run, simulate):
    result, _ = simulate(central_run(privacy=TESTED))
    assert result["server"]["privacy"]["epsilon"] is None and "predicted" in result["server"]["privacy"]["void"]
    config = central_run(privacy=TESTED)
    network = first_network(config)
    task = Task(kind="evaluate", round=0, settings=settings_for_sites(config), layout=network.layout.hash,
                weights=network.weights())  # fmt: skip
    with pytest.raises(PolicyRefused, match="simulation"):
        site_card(task, Site(name="a-20", manifest=Path("a-20"), dataset="toy:dataset"))


def test_p09_a_hospital_that_wants_noise_of_its_own_takes_no_part(central_run, tmp_path):
    config, rules = central_run(), tmp_path / "site.toml"
    rules.write_text("[policy.privacy]\nrequired = true\n")
    oversight = Oversight(policy=rules, folder=tmp_path, keys=tmp_path / "keys")
    with pytest.raises(PolicyRefused, match="of its own"):
        sent_by(config, "a-20", 1, first_network(config).weights(), oversight=oversight)


def test_clipping_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="clips nothing"):
        run_file.validate({"privacy": {"clipping": "adaptive"}})
    assert clip_change(np.zeros(3, np.float32), 1.0).unclipped
