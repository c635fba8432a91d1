"""How good the choice of a base is, and what halving saves: selection against the full grid on six tasks of shared data.

The tasks are the first four domains of clinc150 (15 intents each), the slots of restaurant8k and the intents of snips: what
a base of this size can begin to learn in so few steps; all else of the shared data stays near 0 for all bases alike. The
bases are the catalog's four to train from scratch, probed with few and with many examples. The selection sees validation examples and stops probes early. The full grid
trains every probe to the end and is scored on test examples that the selection never sees; the same seeds make both train
alike. Regret of a task is the best base's test score minus the chosen base's, both with most examples; the rule itself
gives up to `tolerance` away for a smaller base. Saving is 1 - training operations spent by halving / by the grid.

    python -m jobs.bench.selection
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cluster.access import Pseudonyms
from cluster.errors import InputError, TrainingError
from cluster.prompts import split_units
from cluster.records import AgentCall, AnswerKind, Example, TaskSpec
from training.candidates import Scope, examine
from training.catalog import Needs, find_entry
from training.finetune import FinetuneConfig
from training.formats import LogReader
from training.probe import Contender, Measuring, ProbePlan, ProbeResult, measure, plan_probes, train_flops
from training.scratch import PretrainConfig
from training.selection import SelectConfig, decide, record_results

BASES = ("scratch-micro", "scratch-tiny", "scratch-small", "scratch-medium")
_NUM_DOMAINS = 4
_MOST_TRAIN, _NUM_VALIDATION, _NUM_TEST = 1200, 96, 160
_FEW, _MANY = 120, _MOST_TRAIN
_STEPS, _QUICK_STEPS = 80, 40
_WINDOW = 1024
_MACHINE_GIB = 4.0
_PRETRAIN = PretrainConfig(num_steps=_STEPS, batch_size=16, learning_rate=3e-3)
_PUBLIC_KEY = b"selection benchmark: public data"


class SelectionTask(NamedTuple):
    """One task with its examples; no example is in two splits."""

    spec: TaskSpec
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def measure_selection(
    say: Callable[[str], object], tasks: Sequence[SelectionTask] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Select a base for each task and compare with the full grid, on the connected Ray cluster.

    Args:
        tasks: None takes those of the shared data.
        quick: the last task alone, and fewer steps, after which some base answers it: shows that it runs, and measures
            nothing.

    Returns:
        {selection_regret: mean over tasks, selection_regret_max, halving_saving, tasks: {name: facts}}.

    Raises:
        InputError: no tasks are given and the shared data is not there.
        TrainingError: a probe failed.
    """
    tasks = list(load_tasks() if tasks is None else tasks)[-1 if quick else 0 :]
    steps = _QUICK_STEPS if quick else _STEPS
    config = SelectConfig(candidates=BASES, probe_steps=steps, example_counts=(_FEW, _MANY), shots=0)
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        grids = _measure_grids(tasks, config, pathlib.Path(folder) / "grid")
        for number, task in enumerate(tasks):
            facts[task.spec.name] = _compare(task, config, grids[number], pathlib.Path(folder) / f"halving-{number}")
            say(f"selection {task.spec.name}: {facts[task.spec.name]}")
    spent, grid = (sum(one[key] for one in facts.values()) for key in ("halving_flops", "grid_flops"))
    regrets = [one["regret"] for one in facts.values()]
    return {
        "selection_regret": sum(regrets) / len(regrets),
        "selection_regret_max": max(regrets),
        "halving_saving": 1 - spent / grid,
        "tasks": facts,
    }


def load_tasks(folder: pathlib.Path | None = None, num_domains: int = _NUM_DOMAINS) -> list[SelectionTask]:
    """The six tasks of the shared data.

    Args:
        folder: holds nlu/; None takes UNDERSTUDY_DATA, else ../shared/data beside this repository.
        num_domains: of clinc150, each a task; there are 10.

    Raises:
        InputError: a file is missing.
    """
    default = pathlib.Path(__file__).parents[2] / "../shared/data"
    folder = folder or pathlib.Path(os.environ.get("UNDERSTUDY_DATA", default))
    by_domain: dict[str, list[AgentCall]] = {}
    for call in _read(folder, "clinc150"):
        by_domain.setdefault(call.label or "none", []).append(call)
    domains = sorted(by_domain.keys() - {"none"})[:num_domains]
    tasks = [_task(f"clinc150 {name}", "json", by_domain[name]) for name in domains]
    tasks.append(_task("restaurant8k slots", "json", _read(folder, "restaurant8k")))
    intents = [answering(call, call.label or "") for call in _read(folder, "snips")]
    return [*tasks, _task("snips intents", "label", intents)]


def _read(folder: pathlib.Path, name: str) -> list[AgentCall]:
    found = LogReader(Pseudonyms(_PUBLIC_KEY), 0.0).read(folder / f"nlu/{name}.calls.jsonl.gz")
    return [call for call in found if isinstance(call, AgentCall)]


def answering(call: AgentCall, content: str) -> AgentCall:
    """The call as if its answer were `content`, without tools: a set's labels as a task of their own."""
    request = {key: value for key, value in call.request.items() if key != "tools"}
    answer = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    return call.model_copy(update={"request": request, "response": answer})


def _task(name: str, kind: AnswerKind, calls: list[AgentCall]) -> SelectionTask:
    drawn = random.Random(0).sample(calls, min(len(calls), _MOST_TRAIN + _NUM_VALIDATION + _NUM_TEST))
    examples = [_example(call) for call in drawn]
    train_from = _NUM_TEST + _NUM_VALIDATION
    prompt = str(calls[0].request["messages"][0]["content"])
    spec = TaskSpec(
        task_id=name.replace(" ", "-"),
        name=name,
        signature=name,
        kind=kind,
        reference="gold",
        num_calls=len(calls),
        share_calls=1.0,
        share_cost=1.0,
        num_examples={"train": len(examples) - train_from},
        static_lines=tuple(unit.strip() for unit, _ in split_units(prompt) if unit.strip()),
    )
    return SelectionTask(spec, examples[train_from:], examples[_NUM_TEST:train_from], examples[:_NUM_TEST])


def _example(call: AgentCall) -> Example:
    assert call.message is not None
    return Example(
        example_id=call.call_id,
        split="train",
        session_id=call.session_id,
        ts=call.ts,
        request=call.request,
        target=call.message,
        reference="gold",
        source_call_ids=(call.call_id,),
    )


def _measure_grids(
    tasks: Sequence[SelectionTask], config: SelectConfig, folder: pathlib.Path
) -> list[list[tuple[ProbePlan, ProbeResult]]]:
    """Every probe of every task to the end, scored on test examples; one list a task. One run, to start workers once."""
    prepared = [_prepare(task, task.test, config, folder) for task in tasks]
    plans = [
        plan._replace(contender=plan.contender._replace(name=f"{number}/{plan.contender.name}"))
        for number, (own, _) in enumerate(prepared)
        for plan in own
    ]
    num_scored = {task_id: n for _, measuring in prepared for task_id, n in measuring.num_scored.items()}
    results = iter(_run(plans, prepared[0][1]._replace(num_scored=num_scored), halving=False))
    return [[(plan, next(results)) for plan in own] for own, _ in prepared]


def _run(plans: Sequence[ProbePlan], measuring: Measuring, *, halving: bool) -> list[ProbeResult]:
    """Raises TrainingError where a probe failed: a mean over the others would not be of the tasks it names."""
    results = measure(plans, measuring, halving=halving)
    if errors := [result.error for result in results if result.error]:
        raise TrainingError(f"selection benchmark: {len(errors)} of {len(results)} probes failed: {errors[0]}")
    return results


def _compare(
    task: SelectionTask, config: SelectConfig, grid: list[tuple[ProbePlan, ProbeResult]], folder: pathlib.Path
) -> dict[str, Any]:
    """Select on validation examples with halving, and look up in the grid what that gave away."""
    plans, measuring = _prepare(task, task.validation, config, folder)
    results = _run(plans, measuring, halving=True)
    selection = decide(config, _needs(task), record_results(plans, results), "")
    scores: dict[str, float] = {}
    for plan, result in grid:
        scores.setdefault(plan.contender.name, result.rungs[-1].score)  # the first has most examples
    return {
        "chosen": selection.base,
        "regret": max(scores.values()) - scores[selection.base],
        "test_scores": scores,
        "halving_flops": _flops(plans, results),
        "grid_flops": _flops(*zip(*grid, strict=True)),
        "stopped": sum(result.rungs[-1].num_steps < config.probe_steps for result in results),
        "probes": len(plans),
    }


def _prepare(
    task: SelectionTask, held_out: list[Example], config: SelectConfig, folder: pathlib.Path
) -> tuple[list[ProbePlan], Measuring]:
    task_id = task.spec.task_id
    by_split = {"train": {task_id: task.train}, "validation": {task_id: held_out}}
    scope = Scope([task.spec], by_split, _WINDOW, _WINDOW * 3 // 4, machine_gib=_MACHINE_GIB)
    found = [examine(name, find_entry(name), _needs(task), scope, len(held_out)) for name in BASES]
    contenders = [one for one in found if isinstance(one, Contender)]
    assert len(contenders) == len(BASES), f"{task_id}: a base does not fit"
    finetune = FinetuneConfig(cpus_per_worker=1.0)
    measuring = Measuring(config, _PRETRAIN, finetune, {task_id: len(held_out)}, scope.epsilon, folder)
    return plan_probes(contenders, measuring), measuring


def _needs(task: SelectionTask) -> Needs:
    return Needs(
        p99_prompt_tokens=0,
        needs_tool_use=task.spec.kind == "tool_call",
        allowed_licenses=None,
        memory_gib=1.0,
        max_model_tokens=_WINDOW,
    )


def _flops(plans: Sequence[ProbePlan], results: Sequence[ProbeResult]) -> float:
    return sum(
        train_flops(plan.contender, result.rungs[-1].num_tokens) for plan, result in zip(plans, results, strict=True)
    )


def main() -> int:
    """Run by hand; prints one line a task and the numbers as JSON."""
    from cluster.session import connect

    connect()
    try:
        found = measure_selection(lambda line: print(line, file=sys.stderr), quick="--quick" in sys.argv)
    except (InputError, TrainingError) as error:
        print(f"selection: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
