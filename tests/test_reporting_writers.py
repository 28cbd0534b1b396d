"""Events as TensorBoard and MLflow series."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from real_consortium import command
from report_files import result, write_run
from test_reporting_live import EVENTS, event

from fedmed.errors import ConfigError, DataError
from fedmed.reporting.writers import check_writers, measures, writing


def test_the_numbers_of_an_event_have_names_and_undefined_ones_none() -> None:
    (received, failed, evaluated, finished) = EVENTS[2:6]
    assert dict(measures(received)) == {"site/a/loss": 0.7, "site/a/seconds": 1.0}
    assert dict(measures(failed)) == {"site/b/failed": 1.0}
    assert dict(measures(evaluated)) == {
        "server/auroc": 0.81,
        "server/auroc-low": pytest.approx(0.78),
        "server/auroc-high": pytest.approx(0.84),
    }
    assert dict(measures(finished)) == {"round/seconds": 2.0}
    undefined = event("evaluated", 1, metrics={"auroc": {"value": None, "low": None, "high": None, "n": 3}})
    assert dict(measures(undefined)) == dict(measures(event("update_received", 1, site="a", loss=None))) == {}


def test_an_unknown_or_missing_program_is_refused_before_a_run() -> None:
    check_writers([])
    with pytest.raises(ConfigError, match="expected tensorboard or mlflow"):
        check_writers(["wandb"])


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'mlflow-skinny>=3\.4'"):
        check_writers(["mlflow"])


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's use of numpy and protobuf
def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writing(["tensorboard"], tmp_path) as write:
        for each in EVENTS:
            write(each)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["tensors"]) == {
        "site/a/loss", "site/a/seconds", "site/b/failed", "server/auroc", "server/auroc-low", "server/auroc-high",
        "round/seconds",
    }  # fmt: skip
    (point,) = found.Tensors("site/a/loss")
    assert point.step == 1 and point.wall_time == pytest.approx(1767225601.0)
    assert point.tensor_proto.float_val[0] == pytest.approx(0.7)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's use of numpy and protobuf
def test_the_report_logs_what_can_be_read_and_says_what_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", result(), events=EVENTS)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{damaged}\n{"time": "half wr')
    command("report", run, "--log", "tensorboard")
    assert "note: events.jsonl: 2 line(s) are damaged and left out." in capsys.readouterr().err
    assert list((run / "tensorboard").iterdir())
    (run / "events.jsonl").unlink()
    with pytest.raises(DataError, match="no event that could be logged"):
        command("report", run, "--log", "tensorboard")


@pytest.mark.slow  # MLflow takes ten seconds to import and to make its database
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="the extra mlflow is not installed")
@pytest.mark.filterwarnings("ignore")  # MLflow's use of SQLAlchemy
def test_mlflow_reads_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with writing(["mlflow"], tmp_path) as write:
        for each in [*EVENTS, event("run_finished", 1, status="completed")]:
            write(each)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedmed")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["server/auroc"] == 0.81
    assert [point.step for point in client.get_metric_history(run.info.run_id, "site/a/loss")] == [1]
