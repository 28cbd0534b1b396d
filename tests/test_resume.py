"""Pausing, resuming, and what a run folder keeps."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from safetensors.numpy import load_file
from typer.testing import CliRunner
from visits import Visits, mean_of

from fedmed import config as run_file
from fedmed.cli import app
from fedmed.config import RunConfig
from fedmed.errors import ConfigError, RunFailed, RunInterrupted
from fedmed.federated.federation import _with_earlier
from fedmed.federated.resume import record, take_up
from fedmed.federated.run_folder import RunFolder
from fedmed.federated.server_app import be_alone
from fedmed.federated.simulation import local_grid, run_on
from fedmed.types import Weights

pytestmark = pytest.mark.simulation


class Stop(Exception):
    """A test's own way to end a run."""


def stop_at(kind: str, round: int):
    def watch(event):
        if (event["kind"], event["round"]) == (kind, round):
            raise Stop

    return watch


def begun(path: Path, config: RunConfig) -> RunFolder:
    folder = RunFolder.create(path, config)
    record(folder, config)
    return folder


def go_on(folder: RunFolder, config: RunConfig) -> dict:
    folder = RunFolder.resume(folder.path)
    with local_grid(config, folder) as grid:
        return run_on(grid, config, folder, lambda event: None)


def changed(config: RunConfig, section: str, **keys: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=keys)})


def test_a_paused_run_keeps_every_finished_round_and_goes_on_when_the_quorum_is_lowered(toy_config, tmp_path):
    strategy = {"min_sites": 2, "checkpoint_every": 10, "lost_after": 0}
    config = toy_config("a-20", "b-20", train={"rounds": 4}, strategy=strategy)
    folder = begun(tmp_path / "run", config)
    with local_grid(config, folder) as grid:
        push = grid.push_messages

        def lose_the_second_site_in_round_three(messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.group_id == "3" and message.metadata.dst_node_id == 2:
                    message.metadata.__dict__["_message_type"] = "train.nobody"  # no app answers that
            return push(messages)

        grid.push_messages = lose_the_second_site_in_round_three
        paused = run_on(grid, config, folder, lambda event: None)
    assert (paused["status"], paused["rounds"]) == ("paused", 2)
    assert paused["reason"] == "1 of 2 sites took part; 2 are needed (strategy.min-sites, min-fraction)"
    assert [entry["round"] for entry in paused["rounds_log"]] == [1, 2, 3]
    assert paused["rounds_log"][2]["failed"][0]["site"] == "b-20"
    assert (folder.path / "checkpoints" / "round-0002.safetensors").exists()
    lower = changed(config, "strategy", min_sites=1)
    assert take_up(folder, lower)
    result = go_on(folder, lower)
    assert (result["status"], result["rounds"]) == ("degraded", 4)
    assert "b-20" in result["reason"]
    assert [entry["round"] for entry in result["rounds_log"]] == [1, 2, 3, 4]
    assert result["timing"]["total_s"] > paused["timing"]["total_s"]


def test_a_run_that_misses_its_quorum_in_the_first_round_is_paused_and_resumed_as_well(toy_config, tmp_path, simulate):
    config = toy_config("a-20", "nan-20", strategy={"min_sites": 2})
    paused, folder = simulate(config)
    assert (paused["status"], paused["rounds"]) == ("paused", 0)
    result = go_on(folder, changed(config, "strategy", min_sites=1))
    assert (result["status"], result["rounds"]) == ("degraded", 2)


def test_a_paused_run_that_is_resumed_while_its_sites_are_still_away_is_paused_again(toy_config, tmp_path, simulate):
    config = toy_config("a-20", "nan-20", strategy={"min_sites": 2, "round_timeout_s": 1.0})
    _, folder = simulate(config)
    network = (folder.path / "checkpoints" / "round-0000.safetensors").read_bytes()
    for nodes in ([], [1]):
        RunFolder.resume(folder.path)
        with local_grid(config, folder) as grid:
            grid.get_node_ids = lambda nodes=nodes: nodes
            again = run_on(grid, config, folder, lambda event: None)
        assert (again["status"], again["rounds"]) == ("paused", 0)
        assert again["reason"].startswith(f"{len(nodes)} sites are connected")
        assert [site["site"] for site in again["sites"]] == ["a-20", "nan-20"], "those that are away are still told"
        assert (folder.path / "checkpoints" / "round-0000.safetensors").read_bytes() == network
    result = go_on(folder, changed(config, "strategy", min_sites=1))
    assert (result["status"], result["rounds"]) == ("degraded", 2)


def test_a_resumed_run_without_one_of_its_sites_is_degraded_and_still_tells_of_it(toy_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fedmed.federated.membership.RETURN_S", 0.1)
    config = toy_config("a-20", "b-20", "c-20", train={"rounds": 4}, strategy={"min_sites": 2})
    folder = begun(tmp_path / "run", config)
    with local_grid(config, folder) as grid, pytest.raises(Stop):
        run_on(grid, config, folder, stop_at("checkpoint_saved", 2))
    (folder.path / "result.json").unlink()  # as after a kill
    folder = RunFolder.resume(folder.path)
    with local_grid(config, folder) as grid:
        grid.get_node_ids = lambda: [1, 2]
        result = run_on(grid, config, folder, lambda event: None)
    assert (result["status"], result["reason"]) == ("degraded", "c-20: not connected (2 times)")
    assert [(site["site"], site["rounds_joined"]) for site in result["sites"]] == [
        ("a-20", 4),
        ("b-20", 4),
        ("c-20", 2),
    ]


def test_a_site_that_crashes_in_a_resumed_run_is_named_with_its_reason_once_a_round(toy_config, tmp_path, monkeypatch):
    config = toy_config("a-20", "b-20", "c-20", train={"rounds": 4}, strategy={"min_sites": 2})
    folder = begun(tmp_path / "run", config)
    with local_grid(config, folder) as grid, pytest.raises(Stop):
        run_on(grid, config, folder, stop_at("checkpoint_saved", 2))
    whole = toy.dataset

    def dying(reference: Path, config: RunConfig):
        return os.kill(os.getpid(), signal.SIGKILL) if reference.name == "c-20" else whole(reference, config)

    monkeypatch.setattr(toy, "dataset", dying)  # before the workers are forked
    result = go_on(folder, config)
    reason = "the worker process was killed by signal 9"
    assert [entry["failed"] for entry in result["rounds_log"][2:]] == [[{"site": "c-20", "reason": reason}]] * 2
    assert result["reason"] == f"c-20: {reason} (3 times)", "at the start, and in both rounds"


def test_a_site_that_is_missing_after_the_last_round_is_named_as_well(toy_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fedmed.federated.membership.RETURN_S", 0.1)
    config = toy_config("a-20", "b-20", "c-20", strategy={"min_sites": 2})
    folder = begun(tmp_path / "run", config)
    with local_grid(config, folder) as grid, pytest.raises(Stop):
        run_on(grid, config, folder, stop_at("checkpoint_saved", config.train.rounds))
    folder = RunFolder.resume(folder.path)
    with local_grid(config, folder) as grid:
        grid.get_node_ids = lambda: [1, 2]
        result = run_on(grid, config, folder, lambda event: None)
    assert (result["status"], result["reason"]) == ("degraded", "c-20: not connected")


def test_a_sites_word_of_its_budget_is_never_replaced_by_a_lower_one(toy_config, tmp_path):
    folder = begun(tmp_path / "run", toy_config("a-20"))
    said = {
        name: {"site": name, "privacy": {"epsilon": value}} for name, value in {"a": 2.0, "b": 2.0, "c": 9.0}.items()
    }
    folder.write_json("result.json", {"sites": [*said.values(), {"site": "d", "privacy": None}]})
    now = {"a": 3.0, "b": 1.0}
    sites = [{"site": name, "privacy": {"epsilon": value}} for name, value in now.items()]
    sites += [{"site": "c", "privacy": None}, {"site": "e", "privacy": {"epsilon": None}}]
    found = {site["site"]: site["privacy"] for site in _with_earlier(sites, folder)}
    assert {name: privacy and privacy["epsilon"] for name, privacy in found.items()} == {
        "a": 3.0, "b": 2.0, "c": 9.0, "d": None, "e": None,
    }  # fmt: skip
    assert found["e"] == {"epsilon": None} and found["d"] is None


def test_the_update_of_a_site_that_comes_late_is_used(toy_config, tmp_path):
    sites, strategy = ("a-20", "b-20", "c-20"), {"min_sites": 2, "weight_by": "uniform"}
    config = toy_config(*sites, strategy=strategy, evaluate={"keep": "last"})
    folder = begun(tmp_path / "run", config)
    there = [1, 2]

    def watch(event):
        if event["kind"] == "round_finished":
            there[:] = [1, 2, 3]

    with local_grid(config, folder) as grid:
        grid.get_node_ids = lambda: there
        result = run_on(grid, config, folder, watch)
    assert [entry["joined"] for entry in result["rounds_log"]] == [["a-20", "b-20"], ["a-20", "b-20", "c-20"]]
    assert result["status"] == "completed"
    first, second = (load_file(folder.path / "checkpoints" / f"round-000{n}.safetensors") for n in (1, 2))
    visits, sent = Visits(config, None), Weights(parameters=first["parameters"], buffers=first["buffers"])
    mean = mean_of([visits.train(name, 2, sent) for name in sites])
    np.testing.assert_allclose(second["parameters"], mean.parameters, rtol=0, atol=1e-6)


def test_a_round_with_too_few_sites_for_its_rule_pauses_before_anybody_trains(toy_config, tmp_path):
    names = [f"{letter}-20" for letter in "abcde"]
    config = toy_config(*names, strategy={"combine": "krum", "round_timeout_s": 2.0})
    folder = begun(tmp_path / "run", config)
    there, asked = [1, 2, 3, 4, 5], []

    def watch(event):
        if event["kind"] == "round_finished":
            there.pop()

    with local_grid(config, folder) as grid:
        push = grid.push_messages

        def noting(messages):
            messages = list(messages)
            asked.extend(m.metadata.group_id for m in messages if m.metadata.message_type == "train")
            return push(messages)

        grid.push_messages, grid.get_node_ids = noting, lambda: there
        result = run_on(grid, config, folder, watch)
    assert (result["status"], result["rounds"]) == ("paused", 1)
    assert result["reason"].endswith("needs 5 sites; there are 4")
    assert asked == ["1"] * 5


def test_an_update_that_is_refused_ends_a_row_of_misses(toy_config, tmp_path):
    config = toy_config("a-20", "nan-20", train={"rounds": 5}, strategy={"lost_after": 3})
    folder = begun(tmp_path / "run", config)
    with local_grid(config, folder) as grid:
        push = grid.push_messages

        def lose_all_but_the_third(messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.group_id in "1245" and message.metadata.dst_node_id == 2:
                    message.metadata.__dict__["_message_type"] = "train.nobody"
            return push(messages)

        grid.push_messages = lose_all_but_the_third
        result = run_on(grid, config, folder, lambda event: None)
    assert [len(entry["failed"]) for entry in result["rounds_log"]] == [1] * 5
    assert "not finite" in result["rounds_log"][2]["failed"][0]["reason"]
    assert "not asked again" not in result["reason"]


def test_where_sites_take_turns_that_of_one_that_fails_passes_to_the_next_and_it_is_named(toy_config, simulate):
    strategy = {"name": "cyclic", "min_sites": 1}
    result, _ = simulate(toy_config("a-20", "nan-20", "z-20", train={"rounds": 6}, strategy=strategy))
    assert [entry["joined"] for entry in result["rounds_log"]] == [["a-20"], ["z-20"], ["z-20"]] * 2
    assert [[each["site"] for each in entry["failed"]] for entry in result["rounds_log"]] == [[], ["nan-20"], []] * 2
    assert result["status"] == "degraded" and "nan-20" in result["reason"]
    nobody, _ = simulate(toy_config("nan-20", "nan2-20", train={"rounds": 6}, strategy=strategy))
    assert nobody["status"] == "paused"
    assert nobody["reason"].startswith("no site took its turn: nan-20: ") and "; nan2-20: " in nobody["reason"]


def test_a_run_that_stopped_early_and_was_killed_trains_no_round_more(toy_config, tmp_path, simulate):
    config = toy_config(
        "a-20", "b-20", server="server-40", train={"rounds": 50, "learning_rate": 1e-9}, evaluate={"patience": 2}
    )
    whole, _ = simulate(config)
    folder = begun(tmp_path / "run", config)
    with local_grid(config, folder) as grid, pytest.raises(Stop):
        run_on(grid, config, folder, stop_at("checkpoint_saved", 3))
    result = go_on(folder, config)
    assert result["rounds"] == whole["rounds"] == 3
    assert result["server"] == whole["server"]


def test_a_finished_run_has_nothing_to_do_until_it_is_asked_for_more_rounds(toy_config, tmp_path):
    config = toy_config("a-20", "b-20")
    folder = begun(tmp_path / "run", config)
    assert take_up(folder, config)
    go_on(folder, config)
    assert not take_up(folder, config)
    more = changed(config, "train", rounds=3)
    assert take_up(folder, more)
    assert go_on(folder, more)["rounds"] == 3
    assert not take_up(folder, more)


@pytest.mark.parametrize(
    ("section", "keys", "named"),
    [
        ("train", {"learning_rate": 0.2}, "train.learning-rate"),
        ("strategy", {"fraction": 0.5}, "strategy.fraction"),
        ("data", {"sites": ("a-20",)}, "data.sites"),
    ],
)
def test_a_changed_configuration_is_refused_by_its_key(toy_config, tmp_path, section, keys, named):
    config = toy_config("a-20", "b-20")
    folder = begun(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=f"{named} is not what this run was begun with"):
        take_up(folder, changed(config, section, **keys))


def test_a_run_keeps_its_name_and_private_noise_its_rounds(toy_config, tmp_path):
    private = {"mode": "dp-sgd", "epsilon": 3.0}
    for number, privacy in enumerate((private, {**private, "mode": "central", "sites": 9})):
        config = toy_config("a-20", privacy=privacy, strategy={"weight-by": "uniform"})
        folder = begun(tmp_path / f"run-{number}", config)
        with pytest.raises(ConfigError, match=r"train\.rounds is not what .* and the noise follows from it"):
            take_up(folder, changed(config, "train", rounds=5))
    with pytest.raises(ConfigError, match="name is not what this run was begun with, so it would be another run"):
        take_up(folder, config.model_copy(update={"name": "other"}))
    given = toy_config("a-20", privacy={**private, "noise-multiplier": 2.0})
    assert take_up(begun(tmp_path / "given", given), changed(given, "train", rounds=5))


def test_the_command_says_that_nothing_is_left_and_refuses_a_changed_key(toy_config, tmp_path):
    (tmp_path / "toy.toml").write_text(run_file.to_toml(toy_config("a-20", "b-20", train={"rounds": 1})))
    folder = begun(tmp_path / "run", run_file.load(tmp_path / "toy.toml"))
    go_on(folder, run_file.load(folder.path / "run.toml"))
    command = CliRunner().invoke(app, ["simulate", "--resume", str(folder.path)])
    assert command.exit_code == 0, command.output
    assert command.stdout.startswith("completed already: 1 rounds, nothing left to do.")
    path = folder.path / "run.toml"
    path.write_text(path.read_text().replace("learning-rate = 0.1", "learning-rate = 0.3"))
    command = CliRunner().invoke(app, ["simulate", "--resume", str(folder.path)])
    assert isinstance(command.exception, ConfigError)
    assert "train.learning-rate is not what this run was begun with" in str(command.exception)


def test_the_last_checkpoints_stay_and_with_each_the_network_that_was_best_then(tmp_path, toy_config):
    folder = RunFolder.create(tmp_path / "run", toy_config("a-4"))
    weights = Weights(parameters=np.zeros(3, np.float32), buffers=np.zeros(0, np.float32))
    for round, best in enumerate((1, 2, 2, 4), start=1):
        if best == round:
            folder.save_best(round, weights)
        folder.save_checkpoint(round, weights, {}, {"best_round": best}, [{"round": round}], keep=2)
    folder.close()
    kept = {path.stem for path in (folder.path / "checkpoints").glob("*.safetensors")}
    assert kept == {"round-0003", "round-0004", "best-0002", "best-0004"}


def test_between_checkpoints_only_the_best_network_and_those_that_checkpoints_name_stay(tmp_path, toy_config):
    folder = RunFolder.create(tmp_path / "run", toy_config("a-4"))
    weights = Weights(parameters=np.zeros(3, np.float32), buffers=np.zeros(0, np.float32))
    for round in range(1, 20):
        folder.save_best(round, weights)
        if round in (5, 9):
            folder.save_checkpoint(round, weights, {}, {"best_round": round}, [{"round": round}], keep=2)
        kept = {path.stem for path in (folder.path / "checkpoints").glob("best-*.safetensors")}
        named = {f"best-{each:04d}" for each in (5, 9) if each <= round}
        assert kept == named | {f"best-{round:04d}"}, "what a resumed run would load, and the best one"
    folder.close()


def test_a_damaged_last_checkpoint_costs_a_round_and_not_the_run(toy_config, simulate):
    config = toy_config("a-20", "b-20", train={"rounds": 3}, evaluate={"keep": "last"})
    _, folder = simulate(config)
    final = folder.path / "checkpoints" / "round-0003.safetensors"
    good = final.read_bytes()
    final.write_bytes(good[: len(good) // 2])
    result = go_on(folder, config)
    assert final.read_bytes() == good
    assert [entry["round"] for entry in result["rounds_log"]] == [1, 2, 3]
    for path in (folder.path / "checkpoints").glob("round-*.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(RunFailed, match="none of its 2 checkpoints can be read"):
        go_on(folder, config)


def test_a_torn_line_of_the_events_is_cut_before_the_next_one(tmp_path, toy_config):
    folder = RunFolder.create(tmp_path / "run", toy_config("a-4"))
    folder.event("run_started", 0)
    folder.close()
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    folder = RunFolder.resume(folder.path)
    folder.event("round_started", 1)
    folder.close()
    kinds = [json.loads(line)["kind"] for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["run_started", "round_started"]


def test_a_run_folder_that_a_full_disk_left_half_made_is_made_again(tmp_path, toy_config, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = toy_config("a-4")
    with monkeypatch.context() as disk:
        disk.setattr("fedmed.federated.run_folder.write_atomically", full)
        with pytest.raises(RunFailed, match="No space left"):
            RunFolder.create(tmp_path / "run", config)
    (tmp_path / "run" / ".run.toml.partial").write_text("of a process that was killed")
    folder = RunFolder.create(tmp_path / "run", config)
    assert run_file.load(folder.path / "run.toml") == run_file.resolve_paths(config, folder.path)
    with pytest.raises(RunFailed, match="exists and is not empty"):
        RunFolder.create(tmp_path / "run", config)


def test_checkpoints_above_round_9999_stay_in_order(tmp_path, toy_config):
    folder = RunFolder.create(tmp_path / "run", toy_config("a-4"))
    weights = Weights(parameters=np.zeros(2, np.float32), buffers=np.zeros(0, np.float32))
    for round in (9_998, 9_999, 10_000):
        folder.save_checkpoint(round, weights, {}, {}, [{"round": round}])
    saved = folder.checkpoint()
    folder.close()
    assert saved is not None and saved[0]["round"] == 10_000


def test_a_sample_trains_and_everybody_evaluates_the_kept_network(toy_config, simulate):
    sites = [f"s{number}-20" for number in range(8)]
    strategy = {"fraction": 0.25, "min_sites": 2, "required_sites": ["s3-20"]}
    config = toy_config(*sites, strategy=strategy, train={"rounds": 6})
    result, _ = simulate(config)
    assert result["status"] == "completed"
    joined = [entry["joined"] for entry in result["rounds_log"]]
    assert all(len(each) == 2 and "s3-20" in each for each in joined)
    assert len({tuple(each) for each in joined}) > 1
    assert all(site["metrics"]["auroc"]["n"] for site in result["sites"])
    again, _ = simulate(config)
    assert [entry["joined"] for entry in again["rounds_log"]] == joined


def test_an_update_that_went_too_far_is_refused(toy_config, simulate):
    config = toy_config("a-20", "b-20", train={"learning_rate": 50.0}, strategy={"max_update_norm": 1e-3})
    result, _ = simulate(config)
    assert result["status"] == "paused"
    assert "above strategy.max-update-norm = 0.001" in result["rounds_log"][0]["failed"][0]["reason"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_with_sites_dropping_out_at_random_the_run_goes_on_and_names_them(toy_config, tmp_path, share):
    sites = [f"s{number}-30" for number in range(6)]
    config = toy_config(*sites, train={"rounds": 8}, strategy={"min_sites": 1, "lost_after": 0}, server="server-60")
    folder = begun(tmp_path / "run", config)
    rng = np.random.default_rng(3)
    dropped: set[tuple[str, str]] = set()
    with local_grid(config, folder) as grid:
        push = grid.push_messages

        def losing(messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train" and rng.random() < share:
                    message.metadata.__dict__["_message_type"] = "train.nobody"
                    dropped.add((message.metadata.group_id, sites[message.metadata.dst_node_id - 1]))
            return push(messages)

        grid.push_messages = losing
        result = run_on(grid, config, folder, lambda event: None)
    failed = {(str(entry["round"]), each["site"]) for entry in result["rounds_log"] for each in entry["failed"]}
    assert failed == dropped
    assert (result["status"], result["rounds"]) == ("degraded" if dropped else "completed", 8)
    assert bool(dropped) == (share > 0)
    assert load_file(folder.path / "model.safetensors")


HOLD = """
import sys
from pathlib import Path
from fedmed.federated.server_app import be_alone
be_alone(Path(sys.argv[1]))
print("alone", flush=True)
sys.stdin.readline()
"""


def test_a_simulation_that_still_runs_is_not_resumed(toy_config, tmp_path):
    (tmp_path / "toy.toml").write_text(run_file.to_toml(toy_config("a-10", "b-10", train={"rounds": 1})))
    folder = begun(tmp_path / "run", run_file.load(tmp_path / "toy.toml"))
    before = sorted(path.name for path in folder.path.rglob("*"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"alone\n"
        refused = CliRunner().invoke(app, ["simulate", "--resume", str(folder.path)])
        assert isinstance(refused.exception, RunFailed)
        assert "another process still trains this run" in str(refused.exception)
        assert sorted(path.name for path in folder.path.rglob("*")) == before
        first.stdin.close()
    for _ in range(2):  # neither does a run that has ended hold its folder
        assert CliRunner().invoke(app, ["simulate", "--resume", str(folder.path)]).exit_code == 0


def test_a_second_process_of_a_run_waits_for_the_first_to_end_and_not_for_ever(tmp_path, capsys):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"alone\n"
        with pytest.raises(RunInterrupted, match="an earlier process of this run"):
            be_alone(tmp_path, wait_s=0.0)
        first.stdin.close()
        first.wait(30)
        be_alone(tmp_path)
    assert "waiting for its end" in capsys.readouterr().out
