"""`scale serve` without Ray: what is real is told apart, a store's release is copied with its calls, and who is asked counts."""

from __future__ import annotations

import contextlib
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import REQUEST, make_specialist, promote_release

from cluster import registry
from cluster.calls import write_calls
from cluster.errors import InputError, ReleaseError
from cluster.records import AgentCall, Rollout
from cluster.store import Store
from jobs import submit
from jobs.__main__ import build_parser, main
from jobs.bench.adapter_room import compare_runs
from jobs.bench.mixed_adapters import count_loads
from jobs.recipe import load_recipe
from jobs.scale import serve
from jobs.scale.cells import Cell, Measured
from jobs.scale.laboratory import Laboratory
from jobs.scale.own_release import MOST_PROMPTS, copy_release, read_own
from jobs.scale.served_graph import Endpoint

HERE = "http://127.0.0.1:8265"


def record(number: int, **request: Any) -> AgentCall:
    return AgentCall(
        call_id=f"c{number}",
        ts=1_000.0 + number,
        client_id="ann",
        agent="desk",
        session_id=f"s{number}",
        step=0,
        request={**REQUEST, **request},
        response=None,
    )


def test_a_store_s_release_is_copied_with_those_calls_that_its_specialists_take(tmp_path: pathlib.Path) -> None:
    source, target = Store(str(tmp_path / "source")), Store(str(tmp_path / "target"))
    with pytest.raises(ReleaseError, match="no release is served"):
        read_own(source, 0.0)
    sha = promote_release(source, tmp_path / "scratch", make_specialist())
    canary = registry.promote_at(source, sha, Rollout(stage="canary"))
    other = [{"role": "system", "content": "Something else."}, {"role": "user", "content": "hello"}]
    write_calls(source, [record(0, messages=other), record(1, n=2), record(2, temperature=1.0)])
    with pytest.raises(InputError, match=f"none of its calls is for a specialist of release {canary[:12]}"):
        read_own(source, 0.0)

    write_calls(source, [record(3 + number, stream=True, user=str(number)) for number in range(MOST_PROMPTS + 5)])
    own = read_own(source, 0.0)
    assert own.sha == canary and list(own.prompts) == ["triage"] and len(own.prompts["triage"]) == MOST_PROMPTS
    assert not any("stream" in one for one in own.prompts["triage"]), "answers come in one piece"
    assert len(read_own(source, 1.0).prompts["triage"]) == MOST_PROMPTS and own.release.models() == {
        make_specialist().base
    }
    before = source.read_bytes(registry.CURRENT), source.list("")
    copy_release(source, own, target)
    copied = registry.current(target)
    assert copied and copied[1].specialists == own.release.specialists and copied[1].rollout == {}
    assert all(
        target.manifest(one) == source.manifest(one) for one in (make_specialist().base, make_specialist().adapter)
    )
    assert (source.read_bytes(registry.CURRENT), source.list("")) == before, "the user's store is only read"


def measured(engine: str, replicas: int, scaling: str, clients: int, requests_per_s: float) -> Measured:
    parameters = {"engine": engine, "replicas": replicas, "adapters": 4, "spread": "uniform", "clients": clients}
    cell = Cell(experiment="serve", parameters={**parameters, "scaling": scaling}, code="c", data="d")
    return Measured(cell, {"requests_per_s": requests_per_s, "p50_ms": 1.0, "p99_ms": 2.0, "adapter_loads": 3})


def test_each_kind_of_engine_is_compared_with_its_own_and_the_sentence_tells_them_apart() -> None:
    found = [
        measured(serve.REAL, 1, "strong", 8, 11.0),
        measured(serve.REAL, 1, "weak", 8, 10.0),
        measured(serve.REAL, 2, "weak", 16, 16.0),
        measured(serve.SIMULATED, 1, "weak", 8, 100.0),
        measured(serve.SIMULATED, 4, "weak", 32, 320.0),
    ]
    rows = serve.rows_of(found)
    assert [row[9] for row in rows] == [None, 1.0, 0.8, 1.0, 0.8] and {row[8] for row in rows} == {3}
    told = serve.tell(rows)
    assert "Real engines answer up to 16.0 requests/s (2 replicas, 4 adapters, 16 clients)" in told
    assert "2 of them keep 80% or more" in told and "4 simulated replicas keep 80% of" in told
    assert serve.tell(serve.rows_of(found[3:])).startswith("4 simulated replicas"), "nothing real is claimed"


def test_the_quick_grid_has_one_and_two_real_engines_and_is_measured_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    seen: set[str] = set()

    @contextlib.contextmanager
    def listening(store: Store, args: Any, replicas: int, bind: Any, cpus: int) -> Iterator[Endpoint]:
        started.append(replicas)
        assert args["specialists"]["min_replicas"] == args["specialists"]["max_replicas"] == replicas
        yield Endpoint("http://127.0.0.1:1", "key", ("specialists-a",), replicas)

    def load_graph(end: Endpoint, asked: Any, clients: int, allowed: Any) -> dict[str, Any]:
        assert len(asked) >= clients, "some client has nothing to ask"
        texts = {one["messages"][1]["content"] for one in asked}
        assert allowed == ("accept",) or not texts & seen, "an engine has these prompts in its cache"
        seen.update(texts)
        numbers = {
            "requests_per_s": 10.0 * end.replicas,
            "p50_ms": 100.0,
            "p99_ms": 200.0,
            "adapter_loads": end.replicas,
        }
        return {**numbers, "routes": {"accept": len(asked)}, "told": "well"}

    async def wait(*_: Any) -> None:
        return None

    monkeypatch.setattr(serve, "_has_vllm", lambda: True)
    monkeypatch.setattr(serve, "make_base", lambda *_: None)
    for name, fake in (("listening", listening), ("load_graph", load_graph), ("wait_for_specialists", wait)):
        monkeypatch.setattr(serve, name, fake)
    lab = Laboratory(
        load_recipe(["gate.epsilon=0.1"]), tmp_path, "quick", list, lambda _: (tmp_path, ""), lambda _: None
    )
    found = serve.run(lab)
    assert started == [1, 2, 1, 4]
    cells = {
        (one["engine"], one["replicas"], one["scaling"], one["clients"], one["is_simulated"]) for one in found.records
    }
    assert cells == {
        *((serve.REAL, 1, *load, False) for load in (("strong", 1), ("strong", 8), ("weak", 8))),
        *((serve.REAL, 2, *load, False) for load in (("strong", 1), ("strong", 8), ("weak", 16))),
        *((serve.SIMULATED, 1, *load, True) for load in (("strong", 16), ("weak", 8))),
        *((serve.SIMULATED, 4, *load, True) for load in (("strong", 16), ("weak", 32))),
    }
    assert {row[0] for row in found.rows} == {serve.REAL, serve.SIMULATED} and "2 of them keep 100%" in found.sentence
    assert serve.run(lab) == found and started == [1, 2, 1, 4], "a finished cell was measured again"


class Replicas:
    """A handle whose calls only some replicas answer, in turn."""

    def __init__(self, *num_loads: int) -> None:
        self._num_loads, self._asked, self.facts = num_loads, 0, self

    def remote(self) -> Replicas:
        return self

    def result(self, timeout_s: float) -> dict[str, int]:
        self._asked += 1
        pid = self._asked % len(self._num_loads)
        return {"pid": pid, "num_loads": self._num_loads[pid]}


def test_loads_are_those_of_all_replicas_or_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_loads(Replicas(3, 4), 2) == 7
    monkeypatch.setattr("jobs.bench.mixed_adapters._PATIENCE_S", 0.01)
    with pytest.raises(RuntimeError, match="2 of 3 replicas tell"):
        count_loads(Replicas(3, 4), 3)


def test_routers_are_compared_by_the_median_of_their_runs() -> None:
    def run(requests_per_s: float, loads: int) -> dict[str, Any]:
        return {"requests_per_s": requests_per_s, "cpu_ms": 10.0, "p50_ms": 5.0, "p99_ms": 9.0, "loads": loads}

    found = compare_runs({"default": [run(10, 30), run(12, 50)], "adapter": [run(20, 1), run(24, 3)]})
    assert found["adapter_vs_default"] == {
        "requests_per_s": 2.0,
        "cpu_ms": 1.0,
        "p50_ms": 1.0,
        "p99_ms": 1.0,
        "more_loads": -38,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "lab"], "--out lab: with --address the job runs elsewhere"),
        (["--out", "/shared/lab", "--calls", "log.jsonl"], "--calls log.jsonl: with --address"),
        ([], "--address: the report stays on the cluster"),
        (["--out", "/shared/lab", "--given", "kept=1"], "--given: data measures"),
    ],
)
def test_what_a_cluster_cannot_see_is_told_before_it_is_asked(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", "data", "--address", HERE, *words]) == 2
    assert said in capsys.readouterr().err


def test_an_experiment_is_submitted_with_its_flags_and_a_store_only_where_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    class Jobs:
        def submit_job(self, **facts: Any) -> str:
            seen.append(facts)
            return facts["submission_id"]

    monkeypatch.setattr(submit, "connect_jobs", lambda address: Jobs())
    on = ["--address", "http://head.example:8265", "--no-wait", "--out", "/shared/lab", "--quick"]
    assert main(["scale", "serve", *on, "gate.epsilon=0.1"]) == 0
    assert main(["scale", "serve", *on, "store=/shared/store"]) == 0
    assert [one["metadata"].get("store") for one in seen] == [None, "/shared/store"]
    bare, own = (build_parser().parse_args(shlex.split(one["entrypoint"])[3:]) for one in seen)
    assert (bare.experiment, bare.quick, bare.out, bare.words) == (
        "serve",
        True,
        pathlib.Path("/shared/lab"),
        ["gate.epsilon=0.1"],
    )
    assert own.words == ["store=/shared/store"] and not own.address
    assert main(["scale", "serve", *on, "store=store"]) == 2
    assert "a folder of this machine" in capsys.readouterr().err
    assert main(["scale", "serve", "--calls", "log.jsonl"]) == 2
    assert "--calls: serve asks what a store serves" in capsys.readouterr().err
