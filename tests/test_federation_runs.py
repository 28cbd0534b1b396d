"""Whole runs: what the run folder holds, who is dropped and why, and what never leaves a site."""

import json
import math
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from image_sets import volumes
from safetensors.numpy import load_file
from toy import PLANTED

from fedmed import config as run_file
from fedmed.errors import ConfigError, DataError, RunFailed
from fedmed.federated.progress import Progress
from fedmed.federated.run_folder import RunFolder, stamped
from fedmed.federated.simulation import local_grid, run_on

pytestmark = pytest.mark.simulation
SITES = ("a-40", "b-20", "c-30")
KINDS = {
    "run_started",
    "round_started",
    "update_received",
    "update_refused",
    "site_failed",
    "evaluated",
    "checkpoint_saved",
    "round_finished",
    "run_finished",
}


def events(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]


def test_a_new_run_folder_is_called_by_its_time_and_its_run():
    assert re.fullmatch(r"\d{8}T\d{6}-my-run-7", stamped("my run", "7"))


def test_run_folder_is_as_agreed(toy_config, simulate):
    config = toy_config(*SITES, server="server-50", train={"rounds": 3})
    result, folder = simulate(config)
    assert {path.name for path in folder.path.iterdir()} == {
        "run.toml",
        "events.jsonl",
        "checkpoints",
        "sites",
        "model.safetensors",
        "model.json",
        "result.json",
        "evaluation.json",
    }
    assert json.loads((folder.path / "result.json").read_text()) == result
    assert run_file.load(folder.path / "run.toml") == run_file.resolve_paths(config, folder.path)
    assert (result["schema"], result["status"], result["reason"]) == (1, "completed", None)
    assert (result["rounds"], result["seed"], result["task"]) == (3, 7, "classification")
    assert {"auroc", "auroc/a", "auroc/b", "auprc", "loss"} <= set(result["server"]["metrics"])
    for metric in result["server"]["metrics"].values():
        assert set(metric) == {"value", "low", "high", "n"}
    assert [site["site"] for site in result["sites"]] == ["a-40", "b-20", "c-30"]
    for site in result["sites"]:
        assert set(site) == {"site", "patients", "images", "rounds_joined", "metrics", "privacy"}
        assert site["rounds_joined"] == 3
        assert site["privacy"] is None
    for entry in result["rounds_log"]:
        assert set(entry) == {"round", "joined", "failed", "seconds", "server_metrics"}
    assert set(result["timing"]) == {"total_s", "train_s", "overhead_s"}
    assert result["peak_memory_mib"] > 100
    log = events(folder)
    assert {event["kind"] for event in log} <= KINDS
    assert log[0]["kind"] == "run_started"
    assert log[-1]["kind"] == "run_finished"
    assert all(datetime.fromisoformat(event["time"]).utcoffset().total_seconds() == 0 for event in log)


def test_the_saved_network_is_tensor_by_tensor_the_kept_checkpoint(toy_config, simulate):
    _, folder = simulate(toy_config(*SITES, evaluate={"keep": "last"}))
    saved = load_file(folder.path / "model.safetensors")
    flat = np.concatenate([tensor.ravel() for tensor in saved.values()])
    last = load_file(folder.path / "checkpoints" / "round-0002.safetensors")["parameters"]
    assert sorted(flat) == sorted(last)
    assert saved["0.weight"].shape == (4, 1, 3, 3)
    facts = json.loads((folder.path / "model.json").read_text())
    assert facts["task"]["labels"] == ["a", "b"]


def test_the_best_network_on_the_selection_part_is_kept_and_the_test_part_reported(toy_config, simulate):
    config = toy_config(*SITES, server="server-60", train={"rounds": 6, "learning_rate": 3.0})
    result, folder = simulate(config)
    chosen = [event for event in events(folder) if event["kind"] == "evaluated"]
    best = max(chosen, key=lambda event: event["selection"])
    assert json.loads((folder.path / "model.json").read_text())["round"] == best["round"]
    assert result["server"]["metrics"] == best["metrics"]
    n = result["server"]["metrics"]["auroc"]["n"]
    assert 0 < n < 30, "the test part holds some of the server's 30 patients, not all"


def test_early_stopping_ends_after_patience(toy_config, simulate):
    config = toy_config(
        *SITES, server="server-60", train={"rounds": 50, "learning_rate": 1e-9}, evaluate={"patience": 2}
    )
    result, folder = simulate(config)
    assert (result["rounds"], result["status"]) == (3, "completed")
    assert json.loads((folder.path / "model.json").read_text())["round"] == 1


def test_slices_of_resampled_volumes_are_segmented_and_judged_without_distances(tmp_path, simulate):
    sites = [str(volumes(tmp_path / name, [(6, 20, 20)] * 4)) for name in ("a", "b", "server")]
    config = run_file.validate(
        {
            "name": "slices",
            "model": {"name": "unet", "width": 2},
            "task": {"kind": "segmentation", "labels": ["one", "two"]},
            "data": {
                "sites": sites[:2], "server": sites[2], "items": "slices", "preset": "mr", "image-size": 16,
                "spacing-mm": [2.0, 1.0, 1.0],
            },
            "train": {"rounds": 1},
            "evaluate": {"site-share": 0.5},
            "simulation": {"workers": 2, "device": "cpu"},
        }
    )  # fmt: skip
    result, _ = simulate(config)
    assert (result["status"], result["reason"]) == ("completed", None)
    found = result["server"]["metrics"]
    assert (found["dice"]["value"] is None, found["hd95"]["value"]) == (False, None)


def test_without_a_value_to_select_by_nothing_is_better_or_worse(toy_config, simulate):
    evaluate = {"patience": 1, "selection_share": 0.0}
    train = {"rounds": 4, "schedule": "plateau", "plateau_patience": 1}
    result, _ = simulate(toy_config("a-40", server="server-60", train=train, evaluate=evaluate))
    assert (result["rounds"], result["status"]) == (4, "completed")
    progress = Progress()
    best = [progress.select(n, value, plateau_patience=9) for n, value in enumerate((0.5, None, 0.4, None), start=1)]
    assert best == [True, False, False, False]
    assert (progress.best_round, progress.stale) == (1, 1)


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("broken-20", "the site's data cannot be used for this task"),
        ("bug-20", "ZeroDivisionError in fedmed/training/run_data.py"),
        ("crash-20", "was killed by signal 9"),
        ("slow-20", "deadline"),
    ],
)
def test_a_site_that_cannot_start_makes_the_run_degraded_and_is_named(toy_config, simulate, site, reason):
    strategy = {"min_sites": 2, "round_timeout_s": 3.0 if "slow" in site else 60.0}
    result, folder = simulate(toy_config("a-40", site, "c-30", strategy=strategy))
    assert result["status"] == "degraded"
    assert reason in result["reason"]
    assert [each["site"] for each in result["sites"]] == ["a-40", "c-30"]
    assert any(event["kind"] == "site_failed" for event in events(folder))


def test_an_update_with_nan_is_refused_and_named(toy_config, simulate):
    result, folder = simulate(toy_config("a-40", "nan-20", "c-30"))
    assert result["status"] == "degraded"
    assert "nan-20: the update's parameters are not finite (2 times)" in result["reason"]
    for entry in result["rounds_log"]:
        assert entry["joined"] == ["a-40", "c-30"]
        assert entry["failed"][0]["site"] == "nan-20"
    assert sum(event["kind"] == "update_refused" for event in events(folder)) == 2
    assert all(math.isfinite(value) for value in load_file(folder.path / "model.safetensors")["4.bias"])


def test_too_few_sites_fail_before_the_first_round_with_one_line(toy_config, tmp_path):
    config = toy_config("a-40", "broken-9", strategy={"min_sites": 2})
    folder = RunFolder.create(tmp_path / "run", config)
    with local_grid(config, folder) as grid, pytest.raises(RunFailed, match="1 of 2 sites took part; 2 are needed"):
        run_on(grid, config, folder, lambda event: None)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "broken-9" in result["reason"]


def test_an_error_of_the_servers_own_is_not_told_as_a_sites(toy_config, simulate, tmp_path):
    config = toy_config("a-40", strategy={"name": "fedavgg"})
    with pytest.raises(ConfigError, match="did you mean"):
        simulate(config)
    result = json.loads((tmp_path / "run-1" / "result.json").read_text())
    told = "the server could not go on (ConfigError); its terminal or log says why"
    assert (result["status"], result["reason"]) == ("failed", told)


def test_what_the_raiser_lets_everybody_know_is_the_reason_of_a_failed_run(toy_config, simulate, tmp_path):
    def refuse(event):
        if event["kind"] == "round_started":
            raise DataError.told("the server's images are of another kind")

    with pytest.raises(DataError):
        simulate(toy_config("a-40"), watch=refuse)
    result = json.loads((tmp_path / "run-1" / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("failed", "the server's images are of another kind")


def test_a_quorum_lost_in_mid_run_pauses_and_keeps_the_checkpoint(toy_config, simulate):
    result, folder = simulate(toy_config("a-40", "nan-20", strategy={"required_sites": ["nan-20"], "min_sites": 1}))
    assert result["status"] == "paused"
    assert result["reason"] == "required site nan-20 did not take part"
    assert not (folder.path / "model.safetensors").exists()


def test_no_identifier_leaves_a_site(toy_config, simulate, tmp_path):
    """Patients are called PLANTED-…; errors quote them with the folder's name; no byte of the run may."""
    seen = []
    sites = ("a-40", "b-30", str(tmp_path / "broken-20"), str(tmp_path / "bug-20"))
    config = toy_config(*sites, server="server-30", evaluate={"sites": "every"}, train={"rounds": 3})
    _, folder = simulate(config, seen.append)
    outbound = [path for path in folder.path.rglob("*") if path.is_file() and path.name != "run.toml"]
    assert len(outbound) > 6
    for path in outbound:
        content = path.read_bytes()
        assert PLANTED.encode() not in content, path.name
        assert str(tmp_path).encode() not in content, path.name
    assert PLANTED not in repr(seen)


def test_messages_hold_no_identifier_either(toy_config, tmp_path):
    """Every byte that crosses between a site and the server, as the spool holds it."""
    config = toy_config("a-40", "broken-20", "b-20", evaluate={"sites": "every"})
    folder = RunFolder.create(tmp_path / "run", config)
    crossed = bytearray()
    with local_grid(config, folder) as grid:
        receive = grid._answered

        def record(worker, data):
            crossed.extend(data)
            receive(worker, data)

        grid._answered = record
        keep = folder.close

        def scan() -> None:
            for path in folder.spool.iterdir():
                crossed.extend(path.read_bytes())
            keep()

        object.__setattr__(folder, "close", scan)
        run_on(grid, config, folder, lambda event: None)
    assert len(crossed) > 10_000
    assert PLANTED.encode() not in crossed
    assert str(tmp_path).encode() not in crossed


def test_resuming_gives_the_same_bits_as_the_unbroken_run(toy_config, simulate, tmp_path):
    whole, folder = simulate(toy_config(*SITES, train={"rounds": 4}, server="server-30"))
    config = toy_config(*SITES, train={"rounds": 4}, server="server-30")
    part = RunFolder.create(tmp_path / "part", config)
    stop_after = 2

    class Stop(Exception):
        pass

    def watch(event):
        if event["kind"] == "checkpoint_saved" and event["round"] == stop_after:
            raise Stop

    with local_grid(config, part) as grid, pytest.raises(Stop):
        run_on(grid, config, part, watch)
    with local_grid(config, part) as grid:
        resumed = run_on(grid, config, part, lambda event: None)
    for name in ("model.safetensors", "checkpoints/round-0004.safetensors"):
        assert (folder.path / name).read_bytes() == (part.path / name).read_bytes()
    assert resumed["server"] == whole["server"]
    assert [entry["round"] for entry in resumed["rounds_log"]] == [1, 2, 3, 4]


def test_one_update_in_memory_at_a_time(tmp_path):
    """Sixty hospitals of 8 MB each: the server's own peak grows by a few networks and not by sixty."""
    command = [sys.executable, str(Path(__file__).with_name("server_memory.py")), str(tmp_path / "run"), "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["joined"] == 60
    assert found["mib"] < 200, "sixty networks would be 480"


def test_paths_in_a_run_file_are_relative_to_it(tmp_path):
    (tmp_path / "run.toml").write_text('[task]\nlabels = ["a"]\n[data]\nsites = ["one/manifest.csv"]\n')
    config = run_file.load(tmp_path / "run.toml")
    assert config.data.sites == (str(tmp_path / "one" / "manifest.csv"),)
    assert Path(config.data.sites[0]).is_absolute()
