"""The scaling laboratory without Ray: cells are measured once, pages stand alone, and the verb refuses what it cannot do."""

from __future__ import annotations

import json
import pathlib
import random
import re
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from jobs.__main__ import main
from jobs.bench.mixed_adapters import draw_adapters
from jobs.recipe import load_recipe
from jobs.scale.cells import Cell, CellBook, Measured, describe, measure_here
from jobs.scale.charts import Axes, Dot, draw_groups, draw_lines, drawable, plain
from jobs.scale.data import sizes_of
from jobs.scale.fleet import RunTime, foretell
from jobs.scale.material import load_logs, read_material, save_material
from jobs.scale.report import Findings, write_findings
from jobs.scale.serve import pace_of
from jobs.scale.tasks import group_tasks
from jobs.scale.trial import HELD_OUT, draw, judge, wrong_of
from training.fleet import plan_fleet
from training.gate import Outcome

CELL = Cell(experiment="data", parameters={"task": "a", "examples": 50, "seed": 0}, code="c", data="d")


def write_calls(path: pathlib.Path, count: int, system: str = "Turn the command into JSON.") -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            device, level = rng.choice(("lamp", "fan", "radio")), rng.choice(("low", "high"))
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": f"put the {device} in room {number} on {level}"},
            ]
            answer = {"role": "assistant", "content": json.dumps({"device": device, "level": level})}
            request = {"messages": messages, "response_format": {"type": "json_object"}}
            response = {"choices": [{"message": answer, "finish_reason": "stop"}]}
            file.write(
                json.dumps({"id": f"c{number}", "session": f"s{number}", "request": request, "response": response})
            )
            file.write("\n")


def test_train_holds_no_request_that_a_later_split_asks_too(tmp_path: pathlib.Path) -> None:
    """Each request comes in two sessions, which the split may part."""
    path, twice = tmp_path / "calls.jsonl", tmp_path / "twice.jsonl"
    write_calls(path, 400)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = [{**row, "id": f"again-{row['id']}", "session": f"again-{row['session']}"} for row in rows]
    twice.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    (task,) = load_logs([twice], load_recipe(["gate.epsilon=0.2"]))
    asked = {s: {json.dumps(e.request["messages"]) for e in own} for s, own in task.splits.items()}
    assert len(asked["train"]) > 50
    assert not asked["train"] & (asked["validation"] | asked["calibration"] | asked["test"])


def test_quick_takes_few_answers_of_many_and_leaves_alone_what_has_too_few_calls_of_them(
    tmp_path: pathlib.Path,
) -> None:
    """A model of seconds learns none of 40 answers; ten it learns, and the task says that it is not whole."""
    found = {}
    for name, places in (("many", 40), ("few", 4), ("own", 10_000)):
        path = tmp_path / f"{name}.jsonl"
        write_calls(path, 1200)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            content = json.dumps({"room": number % places, "level": "low"})
            row["response"]["choices"][0]["message"]["content"] = content
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (found[name],) = load_logs([path], load_recipe(["gate.epsilon=0.2"]), is_quick=True)
    answers = {n: [{e.target["content"] for e in own} for own in one.splits.values()] for n, one in found.items()}
    assert all(len(own) <= 10 for own in answers["many"]) and len(set.union(*answers["many"])) == 10
    assert found["many"].name.endswith(" (10 answers)") and len(found["many"].splits["train"]) > 100
    assert len(set.union(*answers["few"])) == 4 and "answers" not in found["few"].name
    assert len(set.union(*answers["own"])) > 500 and "answers" not in found["own"].name
    assert len(found["own"].splits["test"]) <= 150


def test_no_example_stays_on_disk_where_an_experiment_fails(tmp_path: pathlib.Path, monkeypatch) -> None:
    from jobs.scale import data

    write_calls(tmp_path / "calls.jsonl", 400)
    monkeypatch.setattr("jobs.scale_verb._connect", lambda: None)
    seen = []

    def run(lab: Any) -> Findings:
        folder, _ = lab.save(lab.load())
        seen.extend(folder.iterdir())
        raise InputError("no luck")

    monkeypatch.setattr(data, "run", run)
    words = ["--quick", "--calls", str(tmp_path / "calls.jsonl"), "--out", str(tmp_path / "out"), "gate.epsilon=0.2"]
    assert main(["scale", "data", *words]) == 2
    assert seen and not any(path.exists() for path in seen)


def test_a_finished_cell_is_not_measured_again_and_a_cut_one_is(tmp_path: pathlib.Path) -> None:
    cells = [CELL.model_copy(update={"parameters": {**CELL.parameters, "seed": seed}}) for seed in range(4)]
    book, asked, said = CellBook(tmp_path), [], []

    def measure(parameters: dict[str, Any]) -> dict[str, Any]:
        asked.append(parameters["seed"])
        if asked == [0, 1, 2]:
            raise KeyboardInterrupt
        return {"value": parameters["seed"] * 10, "told": "well"}

    with pytest.raises(KeyboardInterrupt):
        measure_here(cells, measure, book, said.append)
    # What a killed process was writing is no cell.
    (book.folder / f".{cells[2].key}.4711").write_text('{"cell"')
    found = measure_here(cells, measure, book, said.append)
    assert asked == [0, 1, 2, 2, 3] and [one.result["value"] for one in found] == [0, 10, 20, 30]
    assert said[-1] == "cell 4 of 4: task a, examples 50, seed 3: well"
    assert measure_here(cells, measure, book, said.append) == found and len(asked) == 5


def test_a_cell_says_where_it_comes_from_and_other_code_or_data_is_another_cell(tmp_path: pathlib.Path) -> None:
    book = CellBook(tmp_path)
    measure_here([CELL], lambda parameters: {"value": 1}, book, print)
    written = json.loads((book.folder / f"{CELL.key}.json").read_text())
    assert written["cell"] == CELL.model_dump() and written["result"] == {"value": 1}
    assert {"git_sha", "packages", "hardware", "date", "data", "seconds"} <= set(written["provenance"])
    changes = [
        {"code": "other"},
        {"data": "other"},
        {"experiment": "rank"},
        {"recipe": "r"},
        {"parameters": {"seed": 1}},
    ]
    others = [CELL.model_copy(update=change) for change in changes]
    assert len({one.key for one in [CELL, *others]}) == 6 and all(book.read(one) is None for one in others)


def test_a_file_that_is_no_cell_is_named(tmp_path: pathlib.Path) -> None:
    book = CellBook(tmp_path)
    book.folder.mkdir()
    (book.folder / f"{CELL.key}.json").write_text("{}")
    with pytest.raises(InputError, match=f"{CELL.key}.json: is no finished cell"):
        book.read(CELL)


def test_parameters_in_one_line_leave_out_what_is_long() -> None:
    assert describe({"task": "a", "rate": 0.5, "tasks": ["x"], "base": {"layers": 2}}) == "task a, rate 0.5"


def test_a_page_stands_alone_and_says_first_what_was_found(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "<b>$x$ \u4f60</b>"
    picture = draw_lines(
        {name: [Dot(50, 0.5, 0.4, 0.6), Dot(100, 0.7)]},
        Axes("examples", "agreement", is_x_log=True),
        "A caption.",
        laws={name: [(50, 0.5), (400, 0.9)]},
        levels={"wanted": 0.9},
    )
    findings = Findings(
        sentence="Found <this>.",
        head=["task", "agreement"],
        rows=[[name, 0.51234], ["b", None]],
        laws={"a": {"rate": 0.5}},
        records=[{"task": "a", "deep": [1, 2]}, {"task": "b", "more": 1.5}],
        pictures=[picture],
        notes=["a note"],
    )
    write_findings(tmp_path / "out", "data", findings, ["understudy", "scale", "data"])
    page = (tmp_path / "out" / "report.html").read_text()
    body = page.split("<body>")[1]
    assert body.startswith('<h1>understudy scale data</h1><p class="lead">Found &lt;this&gt;.</p>')
    assert 'name="viewport"' in page, "a telephone shows the page at a quarter of its size"
    assert "<b>" not in page and "default-src 'none'" in page and not {"<script", "<link", "src="} & set(page.split())
    assert page.count("<svg") == 1 and 'aria-label="A caption.' in page and "0.5 at 50" in page
    assert "understudy scale data on " in page
    told = json.loads((tmp_path / "out" / "laws.json").read_text())
    assert (
        told["table"] == [{"task": name, "agreement": 0.51234}, {"task": "b", "agreement": None}] and not told["quick"]
    )
    table = pq.read_table(tmp_path / "out" / "cells.parquet").to_pylist()
    assert table == [{"task": "a", "deep": "[1, 2]", "more": None}, {"task": "b", "deep": None, "more": 1.5}]
    out = capsys.readouterr().out
    assert "task\tagreement" in out and out.splitlines()[-2] == "Found <this>." and "note: a note" in out


def test_names_from_traffic_are_drawn_plain() -> None:
    assert drawable("a$b\u4f60") == "a?b?" and len(drawable("x" * 99)) == 40


def ticks_of(picture: str) -> set[str]:
    return set(re.findall(r">([^<>]+)</text>", picture))


def test_axes_tell_plain_numbers_and_names_are_rows_of_their_own() -> None:
    """A reader looks for 200 examples and for a task, not for 10^2 and for the fourth."""
    axes = Axes("examples", "agreement", is_x_log=True)
    assert {"50", "200", "2,051"} <= ticks_of(
        draw_lines({"a": [Dot(50, 0.1), Dot(200, 0.2), Dot(2051, 0.3)]}, axes, "c")
    )
    near = draw_lines({"a": [Dot(1000, 0.1), Dot(1100, 0.2), Dot(2051, 0.3)]}, axes, "c")
    assert {"1,500", "2,000"} <= ticks_of(near), "labels of 1,000 and 1,100 would lie over each other"
    points = {"clinc150: domain": Dot(0, 0.5, 0.4, 0.6), "snips": Dot(0, 0.7)}
    groups = draw_groups({"apart": points, "shared": {"snips": Dot(0, 0.1)}}, "agreement", "A caption.")
    assert {"clinc150: domain", "snips", "apart", "shared", "agreement"} <= ticks_of(groups)
    assert "0.5 of clinc150: domain" in groups and plain(0.2826) == "0.283"


@pytest.mark.parametrize("most", [50, 51, 60, 99, 400, 850, 5000])
def test_sizes_grow_by_a_factor_and_end_with_all_there_is(most: int) -> None:
    sizes = sizes_of(most, 2)
    assert sizes[-1] == most and sizes == sorted(set(sizes))
    assert all(later >= 1.25 * earlier for earlier, later in zip(sizes, sizes[1:], strict=False))


def test_examples_of_a_smaller_draw_are_among_those_of_a_larger_one(tmp_path: pathlib.Path) -> None:
    write_calls(tmp_path / "calls.jsonl", 300)
    recipe = load_recipe(["gate.epsilon=0.2", f"store={tmp_path / 'store'}"])
    (one,) = load_logs([tmp_path / "calls.jsonl"], recipe)
    few, many, other = (draw(one.splits["train"], *drawn) for drawn in ((20, 0), (60, 0), (20, 1)))
    assert many[:20] == few and few != other and len(many) == 60
    sessions = [{example.session_id for example in own} for own in one.splits.values()]
    assert sum(map(len, sessions)) == len(set.union(*sessions)) == 300
    sha = save_material([one], tmp_path / "material")
    again = read_material(tmp_path / "material", one.task.task_id)
    assert again == one and save_material([again], tmp_path / "material") == sha


def test_answers_find_their_calls_and_a_gate_keeps_what_it_certified() -> None:
    recipe = load_recipe(["gate.epsilon=0.1"])
    splits: dict[Any, list[Outcome]] = {}
    for split in HELD_OUT:
        # Sure answers are right, the others are wrong half of the time.
        splits[split] = [
            Outcome(confidence=0.99 if k % 2 else 0.4, agrees=bool(k % 2 or k % 4), session_id=f"{split}{k}")
            for k in range(400)
        ]
    facts = judge(recipe, splits)
    assert facts["refused"] == "" and facts["certified_coverage"] == 0.5 and facts["kept_disagreement"] == 0
    assert facts["agreement"] == 0.75 == 1 - sum(wrong_of(facts)) / 400
    assert [not one for one in wrong_of(facts, "kept")] == [k % 2 == 1 for k in range(400)]
    hopeless = {split: [one.model_copy(update={"agrees": False}) for one in own] for split, own in splits.items()}
    refused = judge(recipe, hopeless)
    assert refused["refused"] and refused["certified_coverage"] == 0 and refused["kept_disagreement"] is None


def test_a_simulated_engine_is_as_slow_as_the_measured_one() -> None:
    def one(adapters: int, clients: int, p50_ms: float) -> Measured:
        parameters = {"replicas": 1, "adapters": adapters, "clients": clients}
        return Measured(CELL.model_copy(update={"parameters": parameters}), {"p50_ms": p50_ms})

    assert pace_of([one(1, 1, 5.0)]) is None and pace_of([one(4, 1, 5.0)]) is None
    found = pace_of([one(4, 1, 100.0), one(4, 8, 170.0), one(1, 8, 1.0)])
    assert found == pytest.approx((0.1, 0.01))


def test_zipf_asks_for_few_adapters_and_uniform_for_all_alike() -> None:
    zipf, uniform = (Counter(draw_adapters(64, spread, 6400)) for spread in ("zipf", "uniform"))
    assert max(uniform.values()) < 200 < zipf[0] and zipf[0] > 5 * zipf[9]


def test_groups_are_of_one_kind_of_answer(tmp_path: pathlib.Path) -> None:
    found = []
    for number, system in enumerate(("Name the device.", "Name the level.", "Sort the mail.", "Rate the film.")):
        write_calls(tmp_path / f"{number}.jsonl", 200, system)
        found += load_logs([tmp_path / f"{number}.jsonl"], load_recipe(["gate.epsilon=0.2"]))
    found[0] = found[0]._replace(task=found[0].task.model_copy(update={"kind": "label"}))
    groups = group_tasks(found)
    assert sorted(task_id for group in groups for task_id in group) == sorted(one.task.task_id for one in found)
    assert (found[0].task.task_id,) in groups and len(groups) == 3


@given(st.lists(st.integers(0, 500), min_size=1, max_size=12), st.integers(1, 4), st.floats(0.1, 30), st.floats(0, 1))
def test_a_fleet_whose_runs_do_not_slow_each_other_down_is_foretold_by_the_order_that_runs_it(
    steps: list[int], places: int, start_s: float, s_per_step: float
) -> None:
    seconds = {f"{number:02}": start_s + n * s_per_step for number, n in enumerate(steps)}
    sizes = {f"{number:02}": n for number, n in enumerate(steps)}
    told = foretell(steps, places, [RunTime(start_s, s_per_step)] * places)
    assert told == pytest.approx(plan_fleet(seconds, places, sizes).makespan_s)


def test_the_last_run_of_a_fleet_has_the_machine_for_itself() -> None:
    alone, beside = RunTime(10, 0.1), RunTime(20, 0.3)
    assert foretell([100], 2, [alone, beside]) == pytest.approx(20)
    assert foretell([100, 100], 2, [alone, beside]) == pytest.approx(20 + 30)
    assert foretell([100, 100, 100], 2, [alone, beside]) == pytest.approx(50 + 20)
    # Both start, both take 100 steps, and the longer one takes the other 100 by itself.
    assert foretell([200, 100], 2, [alone, beside]) == pytest.approx(20 + 30 + 10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quick", "--full"], "--quick and --full"),
        (["--given", "kept=0.5"], "--given: data measures"),
        (["--calls", "LOG", "store=store"], "--calls and store="),
        (["--out", "LOG"], "--out LOG: is no folder"),
        (["--calls", "LOG"], "1 tasks, none with 50 train"),
        (["--calls", "nowhere"], "nowhere"),
        ([], "no such file; next: set UNDERSTUDY_DATA"),
        (["gate.epsilonn=1"], "gate.epsilonn"),
        (["--calls", "LOG", "gate.epsilon=0.2", "select.candidates=['scratch-tiny']"], "select.candidates="),
    ],
)
def test_what_cannot_be_done_is_told_before_ray_starts(
    words: list[str], said: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDERSTUDY_DATA", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    write_calls(tmp_path / "LOG", 150)
    assert main(["scale", "data", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "scale" / "data" / "cells").exists()
