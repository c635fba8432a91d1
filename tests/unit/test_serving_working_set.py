"""Room for adapters: twice what the served release has, and of these in a batch what late calls asked for together."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
from fakes import BASE, ROUTES, make_specialist

from cluster import registry
from cluster.calls import write_calls
from cluster.records import AgentCall, Release, RouteDecision, Specialist
from cluster.store import Store
from jobs.__main__ import main
from serving import working_set
from serving.specialist_config import SpecialistConfig
from serving.working_set import WorkingSet, measure_working_set, size_specialists

DAY = 1_700_000_000.0 // 86_400 * 86_400


def _specialist(number: int, base: str = BASE, **facts: Any) -> Specialist:
    task_id = f"{base[-4:]}-{number}"
    named = {"task_id": task_id, "adapter": f"adapters/{task_id}"}
    return make_specialist(base=base, **facts).model_copy(update=named)


def _release(*specialists: Specialist) -> Release:
    by_task = {one.task_id: one for one in specialists}
    return Release(specialists=by_task, refused={}, route_model=ROUTES, snapshot="one", created_ts=1.0)


def _call(number: int, ts: float, task_id: str | None, action: Any = "accept", client: str = "c") -> AgentCall:
    return AgentCall(
        call_id=f"{ts}-{task_id}-{number}",
        ts=ts,
        client_id=client,
        agent="a",
        session_id="s",
        step=0,
        request={"messages": []},
        response=None,
        route=RouteDecision(action=action, reason="", task_id=task_id),
    )


def _store(tmp_path: pathlib.Path, *calls: AgentCall) -> Store:
    store = Store(str(tmp_path / "store"))
    write_calls(store, calls)
    return store


def test_the_working_set_is_what_one_minute_of_one_base_asked_for(tmp_path: pathlib.Path) -> None:
    ours = [_specialist(number) for number in range(5)]
    others = [_specialist(number, "bases/other") for number in range(3)]
    shut = _specialist(9, threshold=None)
    calls = [_call(n, DAY + 60 * n, one.task_id) for n, one in enumerate(ours)]
    calls += [_call(n, DAY + 600 + n, f"tiny-{n % 3}", "escalate") for n in range(30)]
    # Asked of another base, of none, of a task without a specialist, or of the LLM alone.
    calls += [_call(n, DAY + 601, f"ther-{n}") for n in range(2)]
    calls += [_call(0, DAY + 602, None), _call(0, DAY + 602, "unknown"), _call(0, DAY + 602, shut.task_id)]
    calls += [_call(0, DAY + 602, "tiny-4", "llm"), _call(0, DAY + 602, "tiny-4", "audit")]
    store = _store(tmp_path, *calls)
    assert measure_working_set(store, _release(*ours, *others, shut)) == WorkingSet(5, 3, 37)
    assert measure_working_set(store, _release(*others)) == WorkingSet(3, 2, 2)
    assert measure_working_set(store, None) == WorkingSet(0, 0, 0)


def test_two_tasks_of_one_adapter_need_one_place(tmp_path: pathlib.Path) -> None:
    both = [_specialist(0), _specialist(1).model_copy(update={"adapter": _specialist(0).adapter})]
    store = _store(tmp_path, *(_call(0, DAY, one.task_id) for one in both))
    assert measure_working_set(store, _release(*both)) == WorkingSet(1, 1, 2)


def test_the_newest_parts_count(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_set, "MAX_PARTS", 1)
    store = _store(tmp_path, *(_call(n, DAY, f"tiny-{n}") for n in range(3)))
    write_calls(store, [_call(0, DAY + 86_400, "tiny-0")])
    assert measure_working_set(store, _release(*map(_specialist, range(3)))) == WorkingSet(3, 1, 1)


@pytest.mark.parametrize(
    ("config", "found", "resident", "at_once"),
    [
        ({}, (0, 0, 0), 64, 8),
        ({"max_adapters": 4}, (0, 0, 0), 4, 4),
        ({}, (3, 2, 50), 8, 8),
        ({}, (40, 0, 0), 80, 80),
        ({}, (40, 13, 50), 80, 13),
        ({}, (40, 2, 50), 80, 8),
        ({"max_adapters": 50}, (40, 13, 50), 50, 13),
        ({"max_adapters": 4}, (2, 2, 50), 4, 4),
        ({"max_batch_adapters": 3}, (40, 13, 50), 80, 3),
        ({"max_batch_adapters": 99, "max_adapters": 40}, (40, 13, 50), 40, 40),
    ],
)
def test_the_rules(config: dict[str, int], found: tuple[int, int, int], resident: int, at_once: int) -> None:
    sized = size_specialists(SpecialistConfig(**config), WorkingSet(*found))
    assert (sized.num_resident, sized.num_at_once) == (resident, at_once)


def test_a_dry_run_shows_them(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    specialists = [_specialist(number) for number in range(12)]
    store = _store(tmp_path, *(_call(n, DAY, one.task_id) for n, one in enumerate(specialists[:10])))
    (tmp_path / "made").mkdir()
    for path in {BASE, ROUTES, *(one.adapter for one in specialists)}:
        store.publish(path, tmp_path / "made", {"kind": "test"})
    registry.promote(store, registry.publish_release(store, _release(*specialists)))
    words = ["upstream.0.base_url=http://127.0.0.1:9/v1", f"store={store.uri}"]
    assert main(["serve", "--dry-run", *words]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == {
        **{"resident": 24, "in_one_batch": 10, "of_release_on_one_base": 12, "most_called_in_a_minute": 10},
        "calls_looked_at": 10,
    }
    assert main(["serve", "--dry-run", words[0], f"store={tmp_path / 'none'}"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"]["resident"] == 64
    assert not (tmp_path / "none").exists()
