"""Two fine-tunes that fill the cluster, and a Serve deployment that finds no room: the smaller one makes it."""

from __future__ import annotations

import pathlib
import threading
import time
from typing import Any

import pytest

from cluster.session import num_replicas_without_place
from training.dataset import save_dataset
from training.finetune import FinetuneConfig, ask_to_yield, finetune
from training.fleet import FleetRun, run_fleet

pytestmark = pytest.mark.integration

CONFIG = FinetuneConfig(num_steps=30, batch_size=256, warmup_steps=2, checkpoint_every=30, seed=5)
APP = "needs-a-cpu"


def _serve_for_a_moment(begun: threading.Event, served: list[float]) -> None:
    """Deploy a replica that takes one CPU once both runs train; gone again as soon as it ran."""
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 1})
    class Answer:
        def __call__(self) -> str:
            return "here"

    assert begun.wait(120)
    handle = serve.run(Answer.bind(), name=APP, route_prefix=None)
    assert handle.remote().result(timeout_s=30) == "here"
    served.append(time.monotonic())
    serve.delete(APP)


def test_a_run_makes_room_for_serving_and_ends_as_if_undisturbed(
    serve_port: int, toy: Any, tmp_path: pathlib.Path
) -> None:
    import datasets

    save_dataset(list(datasets.load_from_disk(str(toy.rows_path))) * 300, tmp_path / "rows")
    storage = tmp_path / "runs"

    def run(name: str) -> dict[str, Any]:
        return finetune(
            name,
            CONFIG,
            base_path=toy.base_path,
            train_path=tmp_path / "rows",
            validation_path=None,
            pad_token_id=toy.tokenizer.pad_token_id,
            storage=storage,
        )[1]

    begun, served, ended = threading.Event(), [], {}

    def wanted() -> int:
        if all((storage / f"{name}.progress").exists() for name in ("small", "large")):
            begun.set()
        return num_replicas_without_place()

    serving = threading.Thread(target=_serve_for_a_moment, args=(begun, served))
    serving.start()
    runs = {
        name: FleetRun(size, lambda name=name: run(name), lambda name=name: ask_to_yield(name, storage))
        for name, size in {"small": 1, "large": 2}.items()
    }
    fleet = run_fleet(
        runs, 2, lambda name, *_: ended.setdefault(name, time.monotonic()), wanted_by_serving=wanted, poll_s=0.5
    )
    serving.join(60)

    assert fleet.errors == {}
    assert fleet.report.num_yields == 1
    assert served and served[0] < ended["small"], "it was served before the run that made room was over"
    small, large = fleet.results["small"], fleet.results["large"]
    assert small["step"] == large["step"] == CONFIG.num_steps
    assert small["loss"] == pytest.approx(large["loss"], abs=1e-6)
