"""What a site keeps from round to round: versions, tearing, kills, and where the folder is."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from visits import Visits, flat

from fedmed import config as run_file
from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.federated.sites import SIMULATION, site_of
from fedmed.training.site_state import SiteState, resume_reach
from fedmed.types import Task, Weights

VECTORS = {"control": np.arange(50, dtype=np.float32), "empty": np.zeros(0, np.float32)}


def numbered(value: int) -> dict[str, np.ndarray]:
    return {"control": np.full(4, value, np.float32)}


def value_of(kept: dict[str, np.ndarray]) -> int:
    return int(kept["control"][0]) if kept else 0


@settings(max_examples=60, deadline=None)
@given(
    every=st.integers(1, 4),
    checkpoints=st.integers(1, 4),
    moves=st.lists(st.tuples(st.sampled_from(["round", "missed", "resumed"]), st.integers(0, 9)), max_size=25),
)
def test_a_round_starts_from_the_newest_round_before_it_however_often_a_run_is_resumed(
    tmp_path_factory, every, checkpoints, moves
):
    state = SiteState(folder=tmp_path_factory.mktemp("state"))
    history: dict[int, int] = {}  # round -> what was kept in it the last time
    saved = [0]  # rounds of which the server has a checkpoint
    round, count = 1, 0
    for move, back in moves:
        if move == "resumed":  # from one of them; those after it could not be read
            saved = saved[: len(saved) - back % len(saved)]
            round = saved[-1] + 1
            continue
        before = max((known for known in history if known < round), default=None)
        assert value_of(state.before(round)) == (history[before] if before else 0)
        if move == "round":
            count += 1
            state.keep(round, numbered(count), reach=resume_reach(every, checkpoints))
            history = {known: value for known, value in history.items() if known < round} | {round: count}
            assert value_of(state.before()) == count
        if round % every == 0:
            saved = [*saved, round][-checkpoints:]
        round += 1
    assert len(list(state.folder.iterdir())) <= 2 * resume_reach(every, checkpoints) + 1


def test_vectors_come_back_with_the_same_bits(tmp_path):
    state = SiteState(folder=tmp_path / "run")
    vectors = {**VECTORS, "odd": np.array([-0.0, np.inf, 1e-45, np.float32(1) / 3], np.float32)}
    state.keep(3, vectors, reach=2)
    kept = state.before(4)
    assert kept.keys() == vectors.keys()
    assert all(kept[name].tobytes() == vector.tobytes() for name, vector in vectors.items())
    assert state.before(3) == {}


def test_old_rounds_are_removed_once_no_run_can_come_back_to_them(tmp_path):
    state = SiteState(folder=tmp_path)
    for round in range(1, 12):
        state.keep(round, numbered(round), reach=resume_reach(1, 2))
        assert len(list(tmp_path.iterdir())) <= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{n:04d}.safetensors" for n in (9, 10, 11)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    SiteState(folder=folder).keep(1, VECTORS, reach=2)
    return (folder / "round-0001.safetensors").read_bytes()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_state_that_is_torn_or_rotten_never_loads(tmp_path_factory, whole, data):
    place = data.draw(st.integers(0, len(whole) - 1))
    harm = data.draw(st.sampled_from(["cut", "zeros", "flip"]))
    damaged = {
        "cut": whole[:place],
        "zeros": whole[:place] + bytes(len(whole) - place),  # as after a power cut without fsync
        "flip": whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :],
    }[harm]
    folder = tmp_path_factory.mktemp("torn")
    (folder / "round-0001.safetensors").write_bytes(damaged)
    kept, text = None, ""
    try:
        kept = SiteState(folder=folder).before(2)
    except DataError as error:
        text = f"{error} {error.public}"
    assert str(folder) not in text
    assert kept is None or (harm != "cut" and kept.keys() == VECTORS.keys()), "a torn file never loads"
    for name, vector in (kept or {}).items():  # harmless: a byte of the header that means the same, or a zero made zero
        assert vector.tobytes() == VECTORS[name].tobytes()


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from fedmed.training.site_state import SiteState

number, calls = int(sys.argv[2]), 0

def counted(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call

state = SiteState(folder=Path(sys.argv[1]))
os.fsync, os.rename, os.replace, os.unlink = map(counted, (os.fsync, os.rename, os.replace, os.unlink))
state.keep(4, {"control": np.full(4, 4, np.float32)}, reach=2)
print(calls)
"""


def test_a_site_killed_at_any_step_of_keeping_has_the_old_state_or_the_new_one(tmp_path):
    for number in range(1, 20):
        state = SiteState(folder=tmp_path / str(number))
        for round in (1, 2, 3):
            state.keep(round, numbered(round), reach=2)
        command = [sys.executable, "-c", KILLED, str(state.folder), str(number)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert value_of(state.before(4)) == 3, "the round can be repeated"
        assert value_of(state.before()) in (3, 4)
        state.keep(4, numbered(4), reach=2)
        assert value_of(state.before()) == 4
        assert not list(state.folder.glob(".*")), "nothing half written is left"
        if done.returncode == 0:
            assert number == int(done.stdout) + 1 > 4, "every step was tried"
            return
        assert done.returncode == -signal.SIGKILL, done.stderr
    pytest.fail("the child made more calls than were tried")


def test_a_folder_that_cannot_be_written_is_one_public_line_without_its_name(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match="cannot be written") as refusal:
        SiteState(folder=tmp_path / "file" / "run").keep(1, VECTORS, reach=2)
    assert str(tmp_path) not in f"{refusal.value} {refusal.value.public}"


def test_what_ditto_keeps_enters_no_run_of_fedbn_even_in_its_folder(toy_config, tmp_path):
    def visits(name: str) -> Visits:
        return Visits(
            toy_config("a-40", model={"norm": "group"}, strategy={"name": name, "min_sites": 1}), tmp_path / name
        )

    ditto, fedbn = visits("ditto"), visits("fedbn")
    weights = flat(fedbn.config).weights()
    ditto.train("a-40", 1, weights)
    fedbn.train("a-40", 1, weights)
    names, values = load_file(ditto.kept("a-40", 1)), load_file(fedbn.kept("a-40", 1))
    kept = {name: values["buffers" if "buffers" in name else "parameters"] for name in names}  # of sizes that fit
    SiteState(folder=fedbn.kept("a-40", 1).parent).keep(1, kept, reach=2)
    with pytest.raises(ModelError, match="norm layers that this site kept"):
        fedbn.train("a-40", 2, weights)


def test_other_runs_and_other_networks_have_other_folders(tmp_path):
    empty = np.zeros(0, np.float32)
    task = Task(kind="train", round=1, settings="{}", layout="a", weights=Weights(parameters=empty, buffers=empty))

    def folder(name: str = "first", **changes: str) -> Path:
        return SiteState.of(tmp_path, name=name, task=replace(task, **changes)).folder

    assert folder() == folder()
    others = {folder(settings='{"seed": 1}'), folder(layout="b"), folder(run="another"), folder("second")}
    assert len({folder(), *others}) == 5
    assert re.fullmatch(r"first-[0-9a-f]{64}", folder().name), "what the server chooses is not to collide"
    with pytest.raises(ConfigError, match="needs a folder at the site"):
        SiteState.of(None, name="first", task=task)


def test_a_resumed_run_goes_on_from_what_sites_keep_whatever_it_may_change(tmp_path, toy_config):
    sections = {"train": {"rounds": 3}, "strategy": {"name": "ditto"}}
    first = Visits(toy_config("a-20", **sections), tmp_path)
    weights = flat(first.config).weights()
    first.train("a-20", 1, weights)
    sections = {"train": {"rounds": 9, "save_every_s": 5}, "strategy": {"name": "ditto", "min_sites": 3, "retries": 0}}
    resumed = Visits(toy_config("a-20", **sections), tmp_path)
    resumed.train("a-20", 2, weights)
    assert first.kept("a-20", 1).parent == resumed.kept("a-20", 2).parent
    Visits(resumed.config.model_copy(update={"name": "other"}), tmp_path).train("a-20", 2, weights)
    assert len(list((tmp_path / "a-20").glob("*/round-*"))) == 3, "another name is another run"


def test_a_site_keeps_as_many_rounds_as_the_server_keeps_checkpoints(tmp_path, toy_config):
    strategy = {"name": "ditto", "keep_checkpoints": 4}
    visits = Visits(toy_config("a-20", train={"rounds": 7}, strategy=strategy), tmp_path)
    for round in range(1, 8):
        visits.train("a-20", round, flat(visits.config).weights())
    assert sorted(path.name for path in visits.kept("a-20", 7).parent.iterdir()) == [
        f"round-{round:04d}.safetensors" for round in range(3, 8)
    ]


def test_every_engine_gives_a_site_its_folder_where_there_is_a_run_folder(tmp_path, toy_config, monkeypatch):
    config = toy_config("a-40", "b-20")
    flat = run_file.flatten(config)
    ours = site_of({"partition-id": 1, "virtual": True, "states": str(tmp_path / "sites")}, flat)
    assert ours.state_dir == tmp_path / "sites" / "b-20"
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "run.toml").write_text(run_file.to_toml(config))
    monkeypatch.setenv(SIMULATION, str(tmp_path / "sites" / "run.toml"))  # as `--engine ray` sets it
    assert site_of({"partition-id": 1, "virtual": True}, {}).state_dir == ours.state_dir
    monkeypatch.delenv(SIMULATION)
    assert site_of({"partition-id": 1, "virtual": True}, flat).state_dir is None
    (tmp_path / "site.toml").write_text('name = "here"\nmanifest = "manifest.csv"')
    assert site_of({"site": str(tmp_path / "site.toml")}, {}).state_dir == tmp_path / "state"
