"""Tasks whose parts are measured to be better apart are split: `discover.measure_splits=true` of a conversion (S3).

For every task of one answer form that could be learned: its topics propose cuts (training/partition.py), short
fine-tunes on Ray measure them (training/split_probe.py), the decision is written to tasks/usefulness.json, and what is
surely better apart is split with its ids matched and the numbers in the event. Nothing is measured twice: a decision is
named by all that it was measured on, and a split stands in later runs.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

from cluster.engine import rendering_version
from cluster.records import Example, Split, TaskSpec
from cluster.route_model import TopicMap
from cluster.store import Store, content_hash
from jobs.recipe import Recipe
from jobs.train import scope_of
from jobs.validate import calls_to_certify
from training.candidates import Scope, examine
from training.catalog import find_entry
from training.discover import TASKS_FOLDER, Discovery, split_tasks
from training.merging import Group, num_calls
from training.partition import propose_partitions
from training.probe import Contender, Measuring
from training.selection import group_by_task, named_bases, needs_of
from training.split_probe import SplitMeasurement, SplitTrial, count_probes, measure_splits, validation_sample
from training.splits import SPLITS
from training.usefulness import Usefulness, describe_usefulness

USEFULNESS_FILE = f"{TASKS_FOLDER}/usefulness.json"
_MIN_VALIDATION = 10
"""Calls of validation below which not even parts that are right in all and a joint one in none could be told apart."""

Cut = tuple[TopicMap, list[Group]]


def load_usefulness(store: Store) -> dict[str, Usefulness]:
    """Key of a group -> what was measured of it last; empty where nothing ever was."""
    if not store.exists(USEFULNESS_FILE):
        return {}
    return {key: Usefulness.model_validate(value) for key, value in store.read_json(USEFULNESS_FILE).items()}


def split_by_agreement(
    recipe: Recipe,
    store: Store,
    work: pathlib.Path,
    snapshot: str,
    discovery: Discovery,
    learnable: Sequence[TaskSpec],
    redacted: Mapping[Split, list[Example]],
    say: Callable[[str], None],
) -> Discovery:
    """Measure what could be several tasks, and split what is surely better so. Probes run on the connected Ray cluster.

    Args:
        learnable: tasks that no lack of calls keeps from being learned.
        redacted: examples of train and validation as specialists learn from them.

    Raises:
        ConfigError: the recipe names no base, or the topics' encoder cannot be loaded.
    """
    known = load_usefulness(store)
    tasks = {task.task_id: task for task in learnable}
    groups = {g.key: g for g in discovery.grouping.groups if not g.topics and discovery.ids[g.key] in tasks}
    facts = [snapshot, rendering_version(), recipe.specialists.max_model_tokens]
    facts += [c.model_dump(mode="json") for c in (recipe.discover, recipe.select, recipe.pretrain, recipe.finetune)]
    keys = {key: content_hash([key, *facts]) for key in groups}
    cuts = {key: _propose(recipe, group, len(tasks)) for key, group in groups.items()}
    found = {key: known[key] for key in groups if key in known and known[key].key == keys[key]}
    missing = {key: tasks[discovery.ids[key]] for key in groups if key not in found}
    by_split = {split: group_by_task(examples, discovery.assignment) for split, examples in redacted.items()}
    measured = _measure(recipe, work, missing, cuts, by_split, say)
    found |= {key: one.model_copy(update={"snapshot": snapshot}) for key, one in measured.items()}
    # What failed is tried again by the next run.
    found = {key: one if one.has_failed else one.model_copy(update={"key": keys[key]}) for key, one in found.items()}
    discovery, found = _apply(discovery, cuts, found)
    for one in found.values():
        say(f"discover {' '.join(one.task_ids)}: {describe_usefulness(one)}")
    standing = {key: one for key, one in known.items() if key in discovery.grouping.parts}
    saved = {key: one.model_dump(mode="json") for key, one in (standing | found).items()}
    store.write_json(USEFULNESS_FILE, saved)
    return discovery


def _propose(recipe: Recipe, group: Group, num_tasks: int) -> list[Cut]:
    """Cuts whose every part could be certified."""
    needed = calls_to_certify(recipe, num_tasks + recipe.discover.max_parts - 1)

    def can_stand(examples: list[Example]) -> bool:
        sessions = {e.session_id for e in examples if e.split == "calibration"}
        is_in_all = {e.split for e in examples} == set(SPLITS)
        return is_in_all and len(sessions) >= needed and num_calls(examples) >= recipe.discover.min_calls

    return propose_partitions(group, recipe.discover, can_stand)


def _measure(
    recipe: Recipe,
    work: pathlib.Path,
    tasks: Mapping[str, TaskSpec],
    cuts: Mapping[str, list[Cut]],
    by_split: Mapping[Split, Mapping[str, list[Example]]],
    say: Callable[[str], None],
) -> dict[str, Usefulness]:
    """Key of a group -> what came of it, snapshot and key left to the caller.

    Args:
        tasks: key of a group -> its task.
    """
    found, trials = {}, {}
    scope = scope_of(recipe, list(tasks.values()), dict(by_split)) if any(cuts[key] for key in tasks) else None
    for key, task in tasks.items():
        trial = (
            _prepare(recipe, task, cuts[key], scope)
            if scope and cuts[key]
            else "no topics whose calls could stand alone"
        )
        if isinstance(trial, SplitTrial):
            trials[key] = trial
        else:
            found[key] = Usefulness(task_ids=(task.task_id,), reason=trial)
    if scope and trials:
        steps = recipe.select.probe_steps
        say(
            f"discover: {count_probes(list(trials.values()))} probes of {steps} steps each for splits of {len(trials)} "
            "tasks; those of a split that looks better are trained once more"
        )
        folder = work / f"splits-{content_hash([sorted(trials), recipe.select.model_dump(mode='json')])[:12]}"
        measuring = Measuring(recipe.select, recipe.pretrain, recipe.finetune, {}, scope.epsilon, folder)
        measured = measure_splits(list(trials.values()), measuring, scope.max_prompt_tokens)
        for (key, trial), one in zip(trials.items(), measured, strict=True):
            found[key] = _conclude(trial, one, steps)
    return found


def _prepare(recipe: Recipe, task: TaskSpec, cuts: list[Cut], scope: Scope) -> SplitTrial | str:
    """What is to be measured of a task, or why it cannot be."""
    alone = scope._replace(tasks=[task])
    train, validation = (scope.by_split[split].get(task.task_id, []) for split in ("train", "validation"))
    if (num := len(validation_sample(validation))) < _MIN_VALIDATION:
        return f"{num} sessions of validation, fewer than {_MIN_VALIDATION}: nothing could be told apart"
    needs, reasons = needs_of(recipe.select, alone), []
    for name in named_bases(recipe.select):
        base = examine(name, find_entry(name), needs, alone, num_validation=1)
        if isinstance(base, Contender):
            parts = [{e.example_id: n for n, group in enumerate(own) for e in group.examples} for _, own in cuts]
            return SplitTrial(task, train, validation, parts, base)
        reasons.append(f"{name}: {base.reason}")
    return f"not measured, no base fits: {'; '.join(reasons)}"


def _conclude(trial: SplitTrial, measured: SplitMeasurement, num_steps: int) -> Usefulness:
    if measured.error:
        reason = f"not measured: {measured.error}"
    elif measured.chosen is not None:
        reason = "specialists of the parts surely agree more often, from two seeds"
    elif measured.confirmed:
        reason = "what looked better apart was not so from another seed"
    else:
        reason = "no split is surely better"
    return Usefulness(
        task_ids=(trial.task.task_id,),
        reason=reason,
        base=trial.contender.name,
        num_steps=num_steps,
        compared=measured.compared,
        confirmed=measured.confirmed,
        chosen=measured.chosen,
        has_failed=measured.error is not None,
    )


def _apply(
    discovery: Discovery, cuts: Mapping[str, list[Cut]], found: Mapping[str, Usefulness]
) -> tuple[Discovery, dict[str, Usefulness]]:
    """Split what is to be split, and name the tasks that came of it."""
    topics = {key: cuts[key][one.chosen][0] for key, one in found.items() if one.chosen is not None}
    if not topics:
        return discovery, dict(found)
    discovery = split_tasks(discovery, topics, {key: describe_usefulness(found[key]) for key in topics})
    named = dict(found)
    for key, its in topics.items():
        ids = dict.fromkeys(discovery.ids[str(part)] for part in its.task_ids)
        named[key] = named[key].model_copy(update={"task_ids": tuple(ids)})
    return discovery, named
