"""Wrong input as a user types it: one clear line, the right exit status, no traceback, and nothing lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from full_disks import needs_mount
from PIL import Image

from fedmed import config as run_file

pytestmark = pytest.mark.simulation


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    """Two hospitals and a server with PNG images and masks, and a run file."""
    rng = np.random.default_rng(0)
    for name in ("one", "two", "server"):
        folder = tmp_path / name
        folder.mkdir()
        rows = ["patient_id,image,mask,finding"]
        for number in range(12):
            Image.fromarray(rng.integers(0, 255, (24, 24), np.uint8)).save(folder / f"{number}.png")
            Image.fromarray(np.full((24, 24), 255, np.uint8)).save(folder / f"{number}-mask.png")
            rows.append(f"P{number // 2},{number}.png,{number}-mask.png,{number // 2 % 2}")
        (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "run.toml").write_text(
        """
[model]
name = "small-cnn"
[task]
labels = ["finding"]
[data]
sites = ["one/manifest.csv", "two/manifest.csv"]
server = "server/manifest.csv"
image-size = 24
[train]
rounds = 2
[evaluate]
bootstrap = 20
"""
    )
    return tmp_path


def refused(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line that a refusal prints."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_the_good_run_passes(fedmed_process, hospitals):
    done = fedmed_process("simulate", hospitals / "run.toml", "--out", hospitals / "run", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["status"] == "completed"
    assert (hospitals / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("train.learnig-rate=1", "did you mean train.learning-rate?"),
        ("trian.rounds=1", "unknown key trian; did you mean train?"),
        ("train.rounds=five", "train.rounds: should be a valid integer, got 'five'"),
        ("train.rounds=0", "train.rounds: should be greater than or equal to 1, got 0"),
        ("train.rounds", "expected KEY=VALUE"),
        ("strategy.name=fedavgg", 'did you mean "fedavg"?'),
        ("strategy.min-sites=3", "data.sites names 2 sites, but strategy.min-sites = 3"),
        ("strategy.required-sites=three", 'there is no site "three"'),
        ("model.name=chexnett", "chexnet"),
        ("model.name=nowhere:network", "nowhere"),
        ("data.dataset=nowhere:data", "nowhere"),
        ("data.preset=cxx", "cxr"),
        ("task.labels=fnding", "finding"),
        ("task.kind=segmentation", 'model.name = "small-cnn" does not fit task.kind = "segmentation"'),
        ("model.name=unet", 'model.name = "unet" does not fit task.kind = "classification"'),
        ("data.preset=color", "model.in-channels = 1 does not fit"),
        ("model.name=vgg16", "raise data.image-size"),
        ("model.freeze=block1", "it needs a file in model.weights"),
        ("privacy.mode=central", "strategy.weight-by"),
    ],
)
def test_a_wrong_key_is_one_line_before_any_run_folder(fedmed, hospitals, assignment, line):
    out = hospitals / "run"
    message = refused(fedmed("simulate", hospitals / "run.toml", "--set", assignment, "--out", out))
    assert line in message
    assert not out.exists()


def test_wrong_files_are_one_line_before_any_run_folder(fedmed, hospitals):
    out, manifest = hospitals / "run", hospitals / "one" / "manifest.csv"
    good = manifest.read_text()

    def message() -> str:
        text = refused(fedmed("simulate", hospitals / "run.toml", "--out", out))
        assert not out.exists()
        return text

    assert "no such run file" in refused(fedmed("simulate", hospitals / "other.toml"))
    manifest.write_text("")
    assert "empty" in message()
    manifest.write_text(good.splitlines()[0] + "\n")
    assert "no rows" in message() or "empty" in message()
    manifest.write_text(good.replace("patient_id", "patient"))
    assert "patient_id" in message()
    manifest.write_text(good.replace(",0\n", ",maybe\n", 1))
    assert "row" in message()
    lines = good.replace("finding", "finding,split").splitlines()
    split = [lines[0], *(f"{line},{'train' if number % 2 else 'test'}" for number, line in enumerate(lines[1:]))]
    manifest.write_text("\n".join(split) + "\n")
    text = message()
    assert "split" in text
    assert "P0" not in text
    manifest.unlink()
    assert "manifest.csv" in message()
    (hospitals / "run.toml").write_text("[model\n")
    assert "not valid TOML" in message()


def test_a_mask_of_another_size_names_the_row_and_drops_the_site(fedmed, hospitals):
    Image.fromarray(np.zeros((9, 24), np.uint8)).save(hospitals / "one" / "3-mask.png")
    arguments = ["--set", "task.kind=segmentation", "--set", "model.name=unet", "--set", "model.width=4"]
    done = fedmed("simulate", hospitals / "run.toml", *arguments, "--out", hospitals / "run")
    line = refused(done)
    assert "one: row 5: the mask is 9 " in line
    assert json.loads((hospitals / "run" / "result.json").read_text())["status"] == "failed"


def test_unreadable_images_are_counted_and_refused_above_the_share(fedmed, hospitals):
    (hospitals / "one" / "4.png").write_bytes(b"no image")
    done = fedmed("simulate", hospitals / "run.toml", "--out", hospitals / "run")
    line = refused(done)
    assert "1 of 12 images (8.3 %) cannot be read, above data.max-unreadable = 5 %: row 6" in line
    allowed = fedmed(
        "simulate", hospitals / "run.toml", "--set", "data.max-unreadable=0.1", "--out", hospitals / "allowed"
    )
    assert allowed.returncode == 0, allowed.stderr
    assert json.loads((hospitals / "allowed" / "result.json").read_text())["sites"][0]["images"] == 11
    assert "one: 1 image left out" in allowed.stderr
    assert "neither DICOM, PNG nor JPEG: 1" in allowed.stderr


def test_bad_command_line_syntax_is_status_2(fedmed):
    assert fedmed("simulate", "--no-such-option").returncode == 2
    assert fedmed("no-such-command").returncode == 2


def test_an_existing_run_folder_is_never_overwritten(fedmed, hospitals):
    out = hospitals / "run"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    assert "exists and is not empty" in refused(fedmed("simulate", hospitals / "run.toml", "--out", out))
    assert (out / "precious.txt").read_text() == "keep me"
    assert "exists" in refused(fedmed("data", "synth", out))


def test_dry_run_checks_everything_and_writes_nothing(fedmed, hospitals):
    before = sorted(hospitals.rglob("*"))
    done = fedmed("simulate", hospitals / "run.toml", "--dry-run", cwd=hospitals)
    assert done.returncode == 0, done.stderr
    assert "97,521 parameters" in done.stdout
    assert sorted(hospitals.rglob("*")) == before


def test_dry_run_looks_for_the_files_that_manifests_name(fedmed, hospitals):
    """So many missing that the run would drop the hospital are refused; fewer are told."""
    manifest = hospitals / "one" / "manifest.csv"
    (hospitals / "one" / "3.png").unlink()
    line = refused(fedmed("simulate", hospitals / "run.toml", "--dry-run"))
    assert f"{manifest}: 1 of 12 images or masks are not there (row 5)" in line
    few = fedmed("simulate", hospitals / "run.toml", "--dry-run", "--set", "data.max-unreadable=0.1")
    assert few.returncode == 0 and f"warning: {manifest}: 1 of 12" in few.stderr
    (hospitals / "two" / "5-mask.png").unlink()
    masks = ("--set", "task.kind=segmentation", "--set", "model.name=unet", "--set", "data.max-unreadable=0.1")
    assert "two/manifest.csv: 1 of 12" in fedmed("simulate", hospitals / "run.toml", "--dry-run", *masks).stderr


def test_dry_run_says_what_privacy_costs_before_it_costs_it(fedmed, hospitals):
    private = ("--set", "privacy.mode=dp-sgd", "--set", "privacy.epsilon=3", "--set", "model.norm=group")
    said = fedmed("simulate", hospitals / "run.toml", "--dry-run", *private).stdout
    assert "each site charges its patients ε = 3 (δ = 1e-06), all of it before the first round" in said


def test_a_run_that_is_resumed_is_not_tried_dry(fedmed, hospitals):
    """It has a folder already: nothing is trained where the user asked for nothing to be."""
    assert "--resume takes the run folder alone" in refused(fedmed("simulate", "--resume", hospitals, "--dry-run"))


def long_run(toy_config, tmp_path: Path) -> tuple[list[str], Path]:
    """A command that would train toys for a long time, and its run folder."""
    config = toy_config("a-40", "b-20", train={"rounds": 100_000})
    (tmp_path / "run.toml").write_text(run_file.to_toml(config))
    out = tmp_path / "run"
    return [sys.executable, "-m", "fedmed", "simulate", str(tmp_path / "run.toml"), "--out", str(out)], out


def wait_for_checkpoint(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "state.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_what_there_is(toy_config, tmp_path, number):
    command, out = long_run(toy_config, tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_checkpoint(out, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-2:] == [f"go on with: fedmed simulate --resume {out}", "error: interrupted"]
    result = json.loads((out / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("failed", "interrupted by the user")
    assert result["rounds"] >= 1
    assert (out / "report.html").exists()


def test_a_killed_run_is_resumed_and_loses_a_round_at_most(toy_config, tmp_path, fedmed):
    command, out = long_run(toy_config, tmp_path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_checkpoint(out, process)
        process.kill()
    reached = json.loads((out / "checkpoints" / "state.json").read_text())["round"]
    text = (out / "run.toml").read_text()
    (out / "run.toml").write_text(text.replace("rounds = 100000", f"rounds = {reached + 2}"))
    done = fedmed("simulate", "--resume", out)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert [entry["round"] for entry in result["rounds_log"]] == list(range(1, reached + 3))


def test_resuming_what_is_no_run_is_one_line(fedmed, tmp_path):
    assert "no such run file" in refused(fedmed("simulate", "--resume", tmp_path))


@needs_mount
@pytest.mark.parametrize("size_kib", [64, 4000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_keeps_what_was_written(toy_config, tmp_path, size_kib):
    """A run folder on a disk of its own that is too small, at several moments of the run."""
    config = toy_config("a-4", "b-4", model={"name": "toy:heavy", "width": 1000}, train={"rounds": 3})
    (tmp_path / "run.toml").write_text(run_file.to_toml(config))
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size={size_kib}k none {disk} && "
        f"{sys.executable} -m fedmed simulate {tmp_path / 'run.toml'} --out {disk / 'run'}; status=$?; "
        f"cp -r {disk} {tmp_path / 'kept'}; exit $status"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    line = refused(done)
    assert "No space left on device" in line
    assert (tmp_path / "kept" / "run" / "run.toml").exists()
    result = json.loads((tmp_path / "kept" / "run" / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("failed", "No space left on device")
    assert not list((tmp_path / "kept").rglob("*.partial"))


def test_help_answers_at_once(fedmed_process):
    fedmed_process("--help")  # the first start compiles the files
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fedmed_process("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # the time of a machine at rest
    assert done.returncode == 0
    for command in (["simulate"], ["report"], ["predict"], ["data", "synth"], ["data", "cache"]):
        assert "Example: fedmed" in fedmed_process(*command, "--help").stdout
    heavy = "import sys, fedmed.cli; sys.exit(any(name in sys.modules for name in ('torch', 'pydantic', 'flwr')))"
    assert subprocess.run([sys.executable, "-c", heavy], check=False, env=os.environ).returncode == 0
