"""Where a run's progress can be watched beside the terminal: Ray's metrics always, TensorBoard or MLflow where a recipe asks.

The first worker writes what its progress file holds (training/progress.py) under the step it is of. Ray exports gauges to
its dashboard's Prometheus. TensorBoard gets event files in a folder beside the checkpoints (tensorboardX writes them, so
TensorBoard itself need not be installed here); MLflow gets a run at the tracking server that MLFLOW_TRACKING_URI names to
the process that starts the fine-tune. A run that goes on from a checkpoint goes on there too. Numbers alone are written,
never content.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from cluster.errors import ConfigError, TrainingError
from cluster.telemetry import Meter, log_event

LogTo = Literal["none", "tensorboard", "mlflow"]
_PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow"}
_ADDRESS = "MLFLOW_TRACKING_URI"
_EXPERIMENT = "understudy"
_RUN_TAG = "understudy.run"
_GAUGES = ("step", "loss", "agreement", "tokens_per_s")


class Watcher(Protocol):
    """What takes a run's numbers."""

    def write(self, facts: Mapping[str, float]) -> None:
        """Take the numbers of one step.

        Args:
            facts: step, and any others by name; `NAME/loss` and the like are of one adapter among several.
        """

    def close(self) -> None:
        """Write what is still held."""


def check_log_to(log_to: LogTo) -> None:
    """Refuse what cannot be written here, before any Ray call.

    Raises:
        ConfigError: the package for it is not installed, or MLflow has no address.
    """
    if reason := _missing(log_to):
        raise ConfigError(f"finetune.log_to={log_to!r}: {reason}, or finetune.log_to=none")
    if log_to == "mlflow" and not os.environ.get(_ADDRESS):
        raise ConfigError(
            f"finetune.log_to='mlflow': {_ADDRESS} is not set; allowed: a tracking server's address; next: "
            f"{_ADDRESS}=http://HOST:5000, or finetune.log_to=none"
        )


def watch_settings(name: str, log_to: LogTo, storage: pathlib.Path) -> dict[str, str]:
    """What the workers of a run need to open its watcher.

    Args:
        name: of the run; the same after a restart.
        storage: its checkpoints' folder.
    """
    folder = storage.resolve() / f"{name}.{log_to}"
    address = os.environ.get(_ADDRESS, "")
    return {"run_name": name, "log_to": log_to, "log_folder": str(folder), "log_address": address}


def open_watcher(settings: Mapping[str, Any], step: int) -> Watcher:
    """Open where a run's numbers go, on its first worker.

    Args:
        settings: with those of `watch_settings`.
        step: that the run goes on from; what an attempt before it wrote of later steps is taken back where that can be.

    Raises:
        TrainingError: the package for it is not installed on this node.
    """
    log_to: LogTo = settings["log_to"]
    if reason := _missing(log_to):
        raise TrainingError(f"finetune.log_to={log_to!r}: on this worker's node {reason}")
    watchers: list[Watcher] = [_RayMetrics(settings["run_name"])]
    if log_to == "tensorboard":
        watchers.append(_TensorBoard(settings["log_folder"], step))
    elif log_to == "mlflow":
        watchers.append(_MLflow(settings["log_address"], settings["run_name"]))
    return _All(watchers)


class Nobody:
    """Nobody watches: a run without Ray, or a worker that is not the first."""

    def write(self, facts: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def _missing(log_to: LogTo) -> str | None:
    package = _PACKAGES.get(log_to)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"the package {package} is not installed; next: pip install {package}"


class _All:
    def __init__(self, watchers: list[Watcher]) -> None:
        self._watchers = watchers

    def write(self, facts: Mapping[str, float]) -> None:
        for watcher in self._watchers:
            watcher.write(facts)

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()


class _RayMetrics:
    def __init__(self, run: str) -> None:
        self._run, self._meter = run, Meter(export=True)

    def write(self, facts: Mapping[str, float]) -> None:
        for name in _GAUGES:
            if name in facts:
                self._meter.set(f"understudy_finetune_{name}", facts[name], run=self._run)

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: str, step: int) -> None:
        from tensorboardX import SummaryWriter

        # Files are named by the second alone: two attempts within one would share a file.
        self._writer = SummaryWriter(folder, purge_step=step + 1, filename_suffix=f".from{step}")

    def write(self, facts: Mapping[str, float]) -> None:
        for name, value in _without_step(facts).items():
            self._writer.add_scalar(name, value, int(facts["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A tracking server that fails later on is told once and costs no training; one that cannot be reached at first does."""

    def __init__(self, address: str, run: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(address)
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        runs = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run}'")
        started = runs[0] if runs else self._client.create_run(experiment, tags={_RUN_TAG: run}, run_name=run)
        self._id = started.info.run_id
        self._has_failed = False

    def write(self, facts: Mapping[str, float]) -> None:
        with self._bearing():
            for name, value in _without_step(facts).items():
                self._client.log_metric(self._id, name, value, step=int(facts["step"]))

    def close(self) -> None:
        with self._bearing():
            self._client.set_terminated(self._id)

    @contextlib.contextmanager
    def _bearing(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if not self._has_failed:
                log_event("mlflow_failed", logging.WARNING, run=self._id, error=type(error).__name__)
            self._has_failed = True


def _without_step(facts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if name != "step"}
