"""`understudy plan`: what a conversion would ask for and where its training would live in memory, with the arithmetic.

Time and money are carried over from the store's earlier conversions, else counted up (jobs/plan_time.py).

Nothing is started and no weights are read. With RAY_ADDRESS the cluster is asked for its memory; else this machine's is
taken, or finetune.device_gib, which also plans for GPUs that are elsewhere. The rows are as long as the longest that the
store's calls make (jobs/plan_rows.py); where there are no calls, or nothing on this machine can count a base's tokens, as
the engine's window. A run is planned again from its own rows before it starts. What is printed holds counts, no content.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from cluster.errors import BaseUnavailableError, ConfigError, StoreError
from cluster.records import Record
from jobs.plan_rows import TaskRows

if TYPE_CHECKING:
    from cluster.resources import Node, Part
    from jobs.plan_rows import Sample
    from jobs.plan_time import TimePlan
    from jobs.recipe import Recipe
    from training.finetune import FinetuneConfig
    from training.memory import ModelShape

_ANSWER_FRACTION = 4
"""An answer may take a quarter of the engine's window (jobs/train.py)."""


def add_verb(verbs: Any, words: dict[str, Any], sections: tuple[str, ...]) -> None:
    """Add `plan` to the verbs of the command line."""
    plan = verbs.add_parser(
        "plan",
        help="show resources, memory base by base, time and money of a conversion; starts nothing",
        sections=sections,
        examples=[
            "understudy plan recipe=local store=store",
            "understudy plan select.base=qwen3-8b finetune.gpus_per_worker=1 finetune.device_gib=80",
        ],
    )
    plan.add_argument("words", **words)
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes and tokens")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from jobs.plan import plan_conversion, show_plan
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    require_role(recipe.store, "viewer")
    parts = plan_conversion(recipe)
    sample, unread = _read(recipe)
    trainings = plan_training(recipe, sample)
    time, unknown = _time(recipe, sample, trainings)
    problems = [f"{one.base}, {one.section}: {one.problem}" for one in trainings if one.problem]
    if options.json:
        told = [one.model_dump(mode="json", exclude={"lines"}) for one in trainings]
        known = {"trainings": told, "time": time and time.model_dump(mode="json")}
        print(json.dumps({**show_plan(recipe, parts), **known}, indent=1))
        return _refuse(parts, problems, recipe)
    for part in parts:
        print(
            f"{part.name}: {part.groups} x {part.workers} workers of {part.cpus:g} CPUs and {part.gpus:g} GPUs "
            f"({part.total_cpus:g} CPUs, {part.total_gpus:g} GPUs)"
        )
    _show_teacher(show_plan(recipe, parts).get("teacher"))
    for one in trainings:
        print("\n".join([f"\n{one.base}, {one.section}:", *(f"  {line}" for line in one.lines)]))
    print("\n".join(["", *([unread] if unread else []), *(time.lines() if time else [unknown])]))
    _refuse(parts, problems, recipe)


def _read(recipe: Recipe) -> tuple[Sample | None, str]:
    """(the store's calls, or why what is there could not be read)."""
    from jobs.plan_rows import read_sample

    try:
        return read_sample(recipe), ""
    except StoreError as error:
        return None, f"rows: as long as the engine's window, because the store's calls could not be read: {error}"


def _time(recipe: Recipe, sample: Sample | None, trainings: list[Training]) -> tuple[TimePlan | None, str]:
    """(what a conversion will take, or why nobody can say)."""
    from jobs.plan_time import estimate_first, plan_time, time_step

    if told := plan_time(recipe):
        return told, ""
    unknown = "time: not known before a first conversion of this store: {}; a recipe with few steps tells it soon"
    by_section = {one.section: one for one in trainings}
    if sample is None:
        return None, unknown.format("it has no calls to tell it from")
    if len({one.base for one in trainings}) > 1:
        return None, unknown.format("several bases are probed first")
    if not sample.tasks:
        return None, unknown.format("none of its calls recur often enough to be certified")
    if any(not one.tasks for one in trainings):
        return None, unknown.format("nothing on this machine counts the base's tokens")
    if any(one.problem or getattr(recipe, one.section).gpus_per_worker for one in trainings):
        return None, unknown.format("this machine's CPU does not tell a GPU's speed")
    work = {
        section: time_step(getattr(recipe, section), _shape(one.base, getattr(recipe, section)), one.tasks)
        for section, one in by_section.items()
    }
    places, cpus = _num_places(recipe, "finetune"), sum(node.cpus for node in _nodes())
    return estimate_first(recipe, sample.num_stored, work.get("pretrain"), work["finetune"], places, cpus), ""


def _show_teacher(found: dict[str, Any] | None) -> None:
    """What asking the LLM again would cost."""
    if found is None:
        return
    questions = found["max_questions"]
    asked = f"{found['calls_per_task']} calls of each task" if questions is None else f"{questions} calls"
    usd = "not known" if found["expected_usd"] is None else f"about {found['expected_usd']:.4f} USD"
    bound = (
        "no bound on money, as upstream.0 has no prices; next: upstream.0.prompt_usd_per_million=USD"
        if found["max_usd"] is None
        else f"never more than {found['max_usd']:g} USD"
    )
    print(f"teacher: at most {asked} asked again of upstream.0, {usd}, {bound}")


def _refuse(parts: list[Part], problems: list[str], recipe: Recipe) -> None:
    """Raises ConfigError where a training fits nowhere, or a part not on this machine."""
    from jobs.plan import check_here

    if problems:
        raise ConfigError("\n".join(problems))
    # GPUs that device_gib describes are elsewhere.
    if recipe.finetune.device_gib is None:
        check_here(parts, recipe)


class Training(Record):
    """One training of a conversion, as it would be placed."""

    base: str
    section: str
    """Of the recipe: pretrain or finetune."""
    plan: dict[str, Any] | None = None
    """A ZeroPlan, or a ManyPlan where fleet.mode=multi_lora, as JSON values, in bytes and tokens; None where it fits
    nowhere."""
    lines: list[str]
    """The arithmetic, for a person."""
    problem: str = ""
    """Why it fits nowhere, and what would."""
    tasks: tuple[TaskRows, ...] = ()
    """What it would learn from; () where nobody knows before it."""


def plan_training(recipe: Recipe, sample: Sample | None = None) -> list[Training]:
    """Where every named base's trainings would live in memory.

    Args:
        sample: the store's calls; None takes rows as long as the engine's window.
    """
    from jobs.plan_rows import rows_of
    from training.catalog import ScratchModel, find_entry
    from training.selection import named_bases

    found = []
    for name in named_bases(recipe.select):
        trainings = [("finetune", recipe.finetune)]
        if isinstance(find_entry(name), ScratchModel):
            trainings.insert(0, ("pretrain", recipe.pretrain))
        for section, config in trainings:
            tasks = tuple(rows_of(sample, recipe, name, section)) if sample else ()
            facts = {"base": name, "section": section, "tasks": tasks}
            try:
                plan, lines = _place(recipe, name, section, config, tasks)
            except ConfigError as error:
                found.append(Training(**facts, lines=["does not fit"], problem=str(error)))
            else:
                told = [_tell_rows(sample, tasks), *lines] if sample and tasks else lines
                found.append(Training(**facts, plan=plan.model_dump(mode="json"), lines=told))
    return found


def _tell_rows(sample: Sample, tasks: tuple[TaskRows, ...]) -> str:
    num_rows, longest = sum(one.num_train for one in tasks), max(one.longest_tokens for one in tasks)
    mean = sum(one.mean_tokens * one.num_train for one in tasks) / num_rows
    read = "the store's calls" if sample.num_read >= sample.num_stored else f"the first {sample.num_read:,} calls"
    return f"rows: about {num_rows:,} of {len(tasks)} task{'s' * (len(tasks) > 1)}, {mean:.0f} tokens on average, the longest {longest}, by {read}"


def _place(
    recipe: Recipe, name: str, section: str, config: FinetuneConfig, tasks: tuple[TaskRows, ...]
) -> tuple[Record, list[str]]:
    """(the plan of one training, its arithmetic), for the tasks' longest rows, or rows as long as the engine's window.

    Raises:
        ConfigError: it fits nowhere.
    """
    from training.memory import Load
    from training.multi_finetune import tokens_per_pass
    from training.multi_memory import AdapterLoad, explain_many, plan_many
    from training.zero import explain, plan_zero

    shape, num_bytes = _shape(name, config), _device_bytes(recipe, section)
    rows = {"examples": config.batch_size, "row_tokens": recipe.specialists.max_model_tokens}
    rows["answer_tokens"] = rows["row_tokens"] // _ANSWER_FRACTION
    if tasks:
        rows["row_tokens"] = max(one.longest_tokens for one in tasks)
        rows["answer_tokens"] = max(one.longest_answer_tokens for one in tasks)
    if section == "finetune" and recipe.fleet.mode == "multi_lora":
        one = AdapterLoad(name="a task", trainable=shape.trainable, **rows)
        many = plan_many(shape, config, [one], num_bytes, tokens_per_pass(config))
        return many, explain_many(many, one)
    plan = plan_zero(shape, config, Load(**rows), num_bytes)
    return plan, explain(plan, config)


def _shape(name: str, config: FinetuneConfig) -> ModelShape:
    """Of a base by its catalog entry, its own description, or its size alone.

    Raises:
        ConfigError: nothing says how large it is.
    """
    from training.bases import open_base
    from training.catalog import ScratchModel, find_entry, num_parameters
    from training.memory import estimate_shape, shape_of_config, shape_of_scratch

    entry = find_entry(name)
    if isinstance(entry, ScratchModel):
        return shape_of_scratch(entry, config)
    try:
        return shape_of_config(open_base(name).config, config)
    except BaseUnavailableError:
        parameters = None if entry is None else num_parameters(entry)
        if parameters is None:
            raise
        return estimate_shape(parameters, config)


def _device_bytes(recipe: Recipe, section: str) -> int:
    """Memory of one worker's device.

    Raises:
        ConfigError: GPUs that nothing describes.
    """
    from cluster.resources import local_memory_bytes, local_nodes
    from cluster.session import joins_cluster
    from training.memory import device_bytes

    config = getattr(recipe, section)
    if config.device_gib is not None:
        return device_bytes(config, 1)
    if joins_cluster():
        return device_bytes(config, _num_places(recipe, section))
    if config.gpus_per_worker:
        raise ConfigError(
            f"{section}.gpus_per_worker={config.gpus_per_worker}: nobody to ask for a GPU's memory; allowed: RAY_ADDRESS of a "
            f"cluster, or its size; next: {section}.device_gib=80"
        )
    seats = max(1, int(local_nodes()[0].cpus // config.cpus_per_worker))
    num_workers = _num_places(recipe, section) * config.num_workers
    return int(local_memory_bytes() / min(seats, num_workers))


def _num_places(recipe: Recipe, section: str) -> int:
    """Runs of a training at a time on the cluster that RAY_ADDRESS names, else on this machine: a base is trained alone."""
    from jobs.plan import plan_run
    from training.fleet import num_places

    return 1 if section == "pretrain" else num_places(recipe.fleet, plan_run(recipe.finetune), _nodes(), recipe.limits)


def _nodes() -> list[Node]:
    """Of the cluster that RAY_ADDRESS names, else this machine."""
    from cluster.resources import local_nodes
    from cluster.session import cluster_nodes, connect, joins_cluster

    if not joins_cluster():
        return local_nodes()
    connect()
    return cluster_nodes()
