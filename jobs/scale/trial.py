"""What a cell that trains does: examples -> tokens -> a model -> answers to held-out calls -> a gate.

Everything a specialist learns from, its tokenizer and its copy rule included, comes from the cell's own examples: a task
with a hundred calls has no more. Training and scoring are those of a probe (training/probe_loop.py); an answer is right if
it is the reference's token for token. The released weights are those of half or of all of the steps, whichever agrees better
on validation; the gate is certified on calibration calls and counted on test calls, as a conversion does it.
"""

from __future__ import annotations

import json
import pathlib
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import TrainingError
from cluster.records import Example, Split, TaskSpec
from jobs.recipe import Recipe
from jobs.scale.material import Material, read_material
from training.candidates import Scope, examine
from training.catalog import Needs, ScratchModel, find_entry, num_parameters
from training.dataset import TaskData, find_written, tokenise_tasks
from training.gate import Outcome, certify, plan_grid
from training.grading import Graded
from training.paired import keys_in_order, row_key
from training.probe import Contender, Measuring, ProbeConfig, ProbePlan, train_flops, trial_settings
from training.probe_loop import run_probe
from training.scratch import pretrain, texts_of, train_tokenizer

HELD_OUT: tuple[Split, ...] = ("validation", "calibration", "test")
_RATE_TIMES_WIDTH = 0.64
_RUNGS = (2, 4)
"""Quarters of the steps after which a model is scored."""
_ANY_GIB = 1e6
"""Whether a base fits in memory shows when it is loaded."""
NUMBERS_FILE = "task_numbers.json"
"""Beside a scratch base: task_id -> the task token that it learned."""
_FINGERPRINT = "training/grading.py"


class Workbench(NamedTuple):
    """What all cells of an experiment share."""

    recipe: Recipe
    material: pathlib.Path
    """Folder of `save_material`."""


class _Asked(NamedTuple):
    """The held-out calls of one task and split, and how their answers are known."""

    examples: list[Example]
    places: dict[str, list[int]]
    """Key of a row -> places in `examples`."""


def train_cell(bench: Workbench, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Train one model and grade it.

    Args:
        parameters: tasks (ids), base (name, or the fields of a ScratchModel), examples (a task, at most), steps, seed;
            maybe batch_size, finetune (changed fields of its config), start (folder of a scratch base that is trained
            already, as `pretrain_base` makes it: it is fine-tuned and not trained anew).

    Returns:
        {tasks: {task_id: facts}, parameters, steps, released_step, num_tokens, flops, seconds, cpu_seconds, told}.

    Raises:
        TrainingError: the base cannot be had, or nothing fits it.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    material = [read_material(bench.material, task_id) for task_id in parameters["tasks"]]
    seed, count = int(parameters["seed"]), int(parameters["examples"])
    train = {one.task.task_id: draw(one.splits["train"], count, seed) for one in material}
    contender, asked = _tokenise(bench.recipe, material, train, parameters["base"], parameters.get("start"))
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(bench.recipe, contender, asked, parameters, pathlib.Path(folder))
        orders = {name: keys_in_order(path, settings) for name, path in settings["validation_paths"].items()}
        rungs: dict[int, Mapping[str, Graded]] = {}
        reports: list[dict[str, Any]] = []
        run_probe(settings, reports.append, on_graded=rungs.__setitem__)
    outcomes = {
        step: {name: _outcomes(asked[name], orders.get(name, []), graded.get(name)) for name in asked}
        for step, graded in rungs.items()
    }
    ids = [one.task.task_id for one in material]
    # The first of equals: fewer steps are as good.
    released = max(outcomes, key=lambda step: (sum(_share(outcomes[step][f"{i}@validation"]) for i in ids), -step))
    facts = {i: judge(bench.recipe, {s: outcomes[released][f"{i}@{s}"] for s in HELD_OUT}) for i in ids}
    num_tokens = reports[-1]["rungs"][-1]["num_tokens"]
    mean = sum(one["agreement"] for one in facts.values()) / len(facts)
    certified = sum(one["certified_coverage"] for one in facts.values()) / len(facts)
    return {
        "tasks": {i: {**facts[i], "num_train": len(train[i])} for i in ids},
        "parameters": num_parameters(contender.entry),
        "steps": int(parameters["steps"]),
        "released_step": released,
        "num_tokens": num_tokens,
        "flops": train_flops(contender, num_tokens, is_full=settings["method"] == "full"),
        "seconds": round(time.monotonic() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu_began, 2),
        "told": f"agreement {mean:.3f}, certified coverage {certified:.3f}, {time.monotonic() - began:.0f} s",
    }


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many examples at random; those of a smaller count are among those of a larger one of the same seed."""
    order = list(examples)
    random.Random(f"scale:{seed}").shuffle(order)
    return order[:count]


def pretrain_base(
    recipe: Recipe, material: Sequence[Material], entry: ScratchModel, steps: int, work: pathlib.Path
) -> pathlib.Path:
    """Train a scratch base on all tasks, as a conversion does, for cells that fine-tune it. Returns its folder."""
    train = {one.task.task_id: list(one.splits["train"]) for one in material}
    tokenizer = _scratch_tokenizer(entry, material, train)
    data = tokenise_tasks(
        [one.task for one in material],
        train,
        {one.task.task_id: list(one.splits["validation"]) for one in material},
        tokenizer,
        is_scratch=True,
        max_prompt_tokens=recipe.specialists.max_model_tokens * 3 // 4,
    )
    length = {"num_steps": steps, "checkpoint_every": steps, "warmup_steps": steps // 10}
    config = recipe.pretrain.model_copy(update={**length, **_rate(recipe, entry)})
    folder, _ = pretrain(entry, config, tokenizer, list(data.values()), work)
    numbers = {task_id: one.prompt_format.task_number for task_id, one in data.items()}
    (folder / NUMBERS_FILE).write_text(json.dumps(numbers))
    return folder


def mean_tokens(recipe: Recipe, material: Material, base: Any) -> float:
    """Tokens of a train example, prompt and answer, in a base's tokens; from a sample."""
    contender, _ = _tokenise(
        recipe,
        [material._replace(splits={**material.splits, **{split: [] for split in HELD_OUT}})],
        {material.task.task_id: draw(material.splits["train"], 500, 0)},
        base,
    )
    lengths = [len(row["input_ids"]) for row in contender.data[material.task.task_id].train]
    return sum(lengths) / len(lengths)


def _tokenise(
    recipe: Recipe,
    material: Sequence[Material],
    train: Mapping[str, list[Example]],
    base: Any,
    start: str | None = None,
) -> tuple[Contender, dict[str, _Asked]]:
    """The base, the tasks' rows in its tokens, and by `TASK@SPLIT` who is asked."""
    max_prompt_tokens = recipe.specialists.max_model_tokens * 3 // 4
    tasks = [one.task for one in material]
    held_out = {one.task.task_id: [e for split in HELD_OUT for e in one.splits[split]] for one in material}
    entry = ScratchModel.model_validate(base) if isinstance(base, dict) else find_entry(base)
    if isinstance(entry, ScratchModel):
        contender = Contender(entry.name, entry, "", _scratch_tokenizer(entry, material, train, start), {}, 0)
        numbers = json.loads((pathlib.Path(start) / NUMBERS_FILE).read_text()) if start else {}
    else:
        contender, numbers = _open(recipe, base, tasks, train), {}
    data = tokenise_tasks(
        tasks,
        train,
        held_out,
        contender.tokenizer,
        is_scratch=contender.is_scratch,
        max_prompt_tokens=max_prompt_tokens,
        numbers=numbers,
    )
    rows, asked = {}, {}
    for one in material:
        own = data[one.task.task_id]
        if not own.train:
            raise TrainingError(f"task {one.task.name}: none of its examples fits base {contender.name}")
        rows[one.task.task_id] = own._replace(validation=[])
        for split, held, found in _split_rows(one, own, contender.tokenizer):
            rows[f"{one.task.task_id}@{split}"] = own._replace(train=[], validation=held)
            asked[f"{one.task.task_id}@{split}"] = found
    return contender._replace(data=rows), asked


def _scratch_tokenizer(
    entry: ScratchModel, material: Sequence[Material], train: Mapping[str, list[Example]], start: str | None = None
) -> Any:
    """That of a base that is trained already, or one made of the train examples."""
    if start:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(start, trust_remote_code=False)
    texts = [t for one in material for t in texts_of(train[one.task.task_id], one.task.static_lines)]
    return train_tokenizer(texts, entry.vocab_size)


def _open(recipe: Recipe, base: str, tasks: Sequence[TaskSpec], train: Mapping[str, list[Example]]) -> Contender:
    """A base of a hub or a folder, as selection opens it.

    Raises:
        TrainingError: it cannot be had, or does not fit.
    """
    window = recipe.specialists.max_model_tokens
    by_split: dict[Split, Mapping[str, list[Example]]] = {"train": train, "validation": train}
    scope = Scope(tasks, by_split, window, window * 3 // 4, _ANY_GIB, recipe.gate.epsilon)
    needs = Needs(
        p99_prompt_tokens=0, needs_tool_use=False, allowed_licenses=None, memory_gib=_ANY_GIB, max_model_tokens=window
    )
    found = examine(base, find_entry(base), needs, scope, num_validation=1)
    if not isinstance(found, Contender):
        raise TrainingError(f"base {found.name}: {found.status}: {found.reason}")
    return found


def _split_rows(one: Material, data: TaskData, tokenizer: Any) -> list[tuple[Split, list[dict[str, Any]], _Asked]]:
    """The held-out rows of each split, and which example each row is of."""
    everyone = [example for split in HELD_OUT for example in one.splits[split]]
    written = find_written(everyone, data.prompt_format, tokenizer)
    row_of = {example.example_id: row for example, row in zip(written, data.validation, strict=True)}
    found = []
    for split in HELD_OUT:
        rows, places = [], {}
        for place, example in enumerate(one.splits[split]):
            if row := row_of.get(example.example_id):
                rows.append(row)
                places.setdefault(row_key(row["input_ids"]), []).append(place)
        found.append((split, rows, _Asked(one.splits[split], places)))
    return found


def _settings(
    recipe: Recipe,
    contender: Contender,
    asked: Mapping[str, _Asked],
    parameters: Mapping[str, Any],
    folder: pathlib.Path,
) -> dict[str, Any]:
    seed, steps = int(parameters["seed"]), int(parameters["steps"])
    changes = {"seed": seed, "num_workers": 1, "min_workers": None}
    batch = {"batch_size": parameters["batch_size"]} if "batch_size" in parameters else {}
    pretrain = recipe.pretrain.model_copy(update={**changes, **batch, **_rate(recipe, contender.entry)})
    finetune = recipe.finetune.model_copy(update={**changes, **batch, **parameters.get("finetune", {})})
    scored = {name: len(one.examples) for name, one in asked.items()}
    scored |= {name: 1 for name in contender.data if name not in scored}
    measuring = Measuring(
        ProbeConfig(probe_steps=steps), pretrain, finetune, scored, recipe.gate.epsilon, folder, with_answers=False
    )
    plan = ProbePlan(contender, None, int(parameters["examples"]))
    settings = trial_settings(plan, measuring, folder / "base", {})
    if start := parameters.get("start"):
        settings |= {**finetune.model_dump(mode="json"), "zero_stage": 0, "num_steps": steps, "base_path": start}
    # Untrained, a scratch base answers nothing: its zero-shot score is not worth its seconds.
    return {**settings, "rungs": [quarter * steps // 4 for quarter in _RUNGS], "size_penalty": 0.0}


def _rate(recipe: Recipe, entry: Any) -> dict[str, float]:
    """The learning rate of a scratch base where the recipe says none: .01 for one of 64 wide, with which 800 steps learn what
    .002 does not; wider ones take less in proportion (Yang et al. 2022, arXiv 2203.03466)."""
    is_said = "learning_rate" in recipe.pretrain.model_fields_set or not isinstance(entry, ScratchModel)
    return {} if is_said else {"learning_rate": _RATE_TIMES_WIDTH / entry.hidden_size}


def _outcomes(asked: _Asked, order: Sequence[str], graded: Graded | None) -> list[Outcome]:
    """One for each call, in its order; what has no row could not be asked."""
    found = [Outcome(confidence=0.0, agrees=False, session_id=one.session_id) for one in asked.examples]
    waiting = {key: list(places) for key, places in asked.places.items()}
    if graded is None:
        return found
    for key, is_right, confidence in zip(order, graded.is_right, graded.confidences, strict=True):
        place = waiting[key].pop(0)
        found[place] = found[place].model_copy(
            update={"agrees": bool(is_right), "confidence": min(1.0, max(0.0, float(confidence)))}
        )
    return found


def _share(outcomes: Sequence[Outcome]) -> float:
    return sum(one.agrees for one in outcomes) / max(1, len(outcomes))


def judge(recipe: Recipe, outcomes: Mapping[Split, list[Outcome]]) -> dict[str, Any]:
    """Agreement on test, and what a gate that is certified on calibration keeps of it."""
    calibration, test = outcomes["calibration"], outcomes["test"]
    config = recipe.gate
    grid = plan_grid(outcomes["validation"], len(calibration), config, config.delta)
    refused, threshold = (grid, None) if isinstance(grid, str) else ("", None)
    if not isinstance(grid, str):
        gate = certify(
            grid,
            calibration,
            epsilon=config.epsilon,
            delta=config.delta,
            reference="gold",
            population="test calls, token for token",
            fingerprint=_FINGERPRINT,
        )
        refused, threshold = gate.refused or "", gate.threshold
    kept = [threshold is not None and one.confidence >= threshold for one in test]
    num_kept = sum(kept)
    return {
        "agreement": _share(test),
        "certified_coverage": num_kept / len(test),
        "kept_disagreement": sum(k and not o.agrees for k, o in zip(kept, test, strict=True)) / num_kept
        if num_kept
        else None,
        "refused": refused,
        "right": _bits(one.agrees for one in test),
        "kept": _bits(kept),
        "num_calibration": len(calibration),
    }


def _bits(values: Any) -> str:
    return "".join("1" if value else "0" for value in values)


def wrong_of(facts: Mapping[str, Any], what: str = "right") -> list[bool]:
    """Of each test call, whether it was answered wrongly (`right`) or not kept (`kept`)."""
    return [letter == "0" for letter in facts[what]]
