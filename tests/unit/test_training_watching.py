"""watching.py: what is written can be read by the tool it is for, goes on after a restart, and a missing package is named."""

from __future__ import annotations

import importlib.util
import pathlib
import struct
from typing import Any

import pytest

from cluster.errors import ConfigError, TrainingError
from training import watching
from training.watching import check_log_to, open_watcher, watch_settings


def read_events(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all event files in order, restarts taken back as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: list[tuple[int, str, float]] = []
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_reads_what_was_written_and_a_resumed_run_takes_its_place(tmp_path: pathlib.Path) -> None:
    settings = watch_settings("run-1", "tensorboard", tmp_path)
    first = watching._TensorBoard(settings["log_folder"], 0)
    for step in (2, 4, 6):
        first.write({"step": step, "loss": step / 8, "a/agreement": 0.5})
    first.close()
    again = watching._TensorBoard(settings["log_folder"], 4)
    again.write({"step": 6, "loss": 0.25})
    again.close()
    expected = [(step, name, value) for step in (2, 4) for name, value in (("loss", step / 8), ("a/agreement", 0.5))]
    assert read_events(tmp_path / "run-1.tensorboard") == [*expected, (6, "loss", 0.25)]


@pytest.mark.parametrize(("log_to", "package"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow")])
def test_a_missing_package_is_named_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, log_to: Any, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"log_to='{log_to}': the package {package} is not installed; next: pip inst"):
        check_log_to(log_to)
    with pytest.raises(TrainingError, match="on this worker's node the package"):
        open_watcher(watch_settings("run", log_to, tmp_path), 0)
    check_log_to("none")


def test_mlflow_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set; allowed: a tracking server's address"):
        check_log_to("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    check_log_to("mlflow")
    assert watch_settings("run", "mlflow", tmp_path)["log_address"] == "http://tracker:5000"


def test_mlflow_has_one_run_for_a_fine_tune_that_was_started_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = watch_settings("run-1", "mlflow", tmp_path)
    for steps in ((2, 4), (6,)):
        watcher = watching._MLflow(settings["log_address"], "run-1")
        for step in steps:
            watcher.write({"step": step, "loss": step / 8})
        watcher.close()
    client = mlflow.MlflowClient(settings["log_address"])
    (run,) = client.search_runs([client.get_experiment_by_name("understudy").experiment_id])
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")] == [
        (2, 0.25),
        (4, 0.5),
        (6, 0.75),
    ]
