"""The conversion: captured calls in, a release out. `understudy convert recipe=NAME`.

| stage        | from -> to                    | code                              | artifact under the store          |
|--------------|-------------------------------|-----------------------------------|-----------------------------------|
| S2 curate    | AgentCall* -> Example*        | training/curate.py                | examples/SNAPSHOT/                |
| S3 discover  | Example* -> TaskSpec*         | training/discover.py              | tasks/TASK_ID.json, route_model/  |
| S4 select    | TaskSpec* -> base model       | training/selection.py, probe.py   | tasks/selection-SNAPSHOT.json     |
|              |                               | training/bases.py, scratch.py     | bases/NAME-HASH/                  |
| S5 fine-tune | TaskSpec + base -> adapter    | training/finetune.py, fleet.py    | adapters/TASK_ID/RUN_ID/          |
|              | merged where so configured    | training/merging.py               | merged/TASK_ID/HASH/              |
| validate     | adapter + held-out -> gate    | training/evaluation.py, gate.py   | reports/SHA256.json               |
| release      | all of it -> Release          | cluster/registry.py               | releases/SHA256.json              |

Beside the release stands SHA256.config.json: the resolved recipe, code, packages and seeds (jobs/provenance.py).

Every artifact is named by what it was made from, so a conversion that is run again continues where it stopped.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import InputError
from cluster.records import Example, Record, Release, Specialist, Split, TaskSpec
from cluster.registry import publish_release
from cluster.store import Store, content_hash
from jobs.following import Followed, followed
from jobs.paraphrase import paraphrase_of
from jobs.provenance import save_config
from jobs.recipe import Recipe, work_folder
from jobs.splits import load_usefulness, split_by_agreement
from jobs.task_names import name_by_llm, namer_of
from jobs.teacher import measure_teacher
from jobs.traffic import measure_moved
from jobs.train import Trained, scope_of, train
from jobs.validate import (
    AnswerRate,
    EngineOf,
    calls_to_certify,
    group_by_model,
    rates_of,
    save_agreements,
    save_evaluation,
    validate_candidates,
    validation_engine,
)
from training.curate import curate
from training.discover import discover, load_previous, save_discovery
from training.evaluation import Candidate, Evaluation
from training.replaceability import Moved
from training.report import write_report
from training.selection import Selection, group_by_task
from training.snapshot import CurationCounts, load_split
from training.splits import SPLITS
from training.text_graders import SelfAgreement
from training.usefulness import Usefulness
from training.watching import check_log_to
from training.worth import Rates, Worth, weigh


class Conversion(Record):
    """What a conversion made."""

    release: str
    snapshot: str
    tasks: tuple[TaskSpec, ...]
    unassigned: dict[str, int]
    selection: Selection | None
    """None where no task could be learned at all."""
    evaluations: tuple[Evaluation, ...]
    refused: dict[str, str]
    losses: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    curation: CurationCounts | None = None
    """What became of every captured call; None in conversions that were written down without it."""
    left_out: dict[str, str] = {}
    """task_id -> which of its calls are too long for its specialist and stay on the LLM."""
    own_names: dict[str, str] = {}
    """task_id -> why the LLM that was asked to name it did not."""
    usefulness: tuple[Usefulness, ...] = ()
    """What was measured of tasks that might be several, in this run or where it stands from earlier ones."""
    teacher: dict[str, SelfAgreement] = {}
    """task_id -> how often the LLM agrees with itself; empty where it was not asked again."""
    moved: Moved | None = None
    """Share of calls, tokens and money, and of each agent's calls; None in conversions that were written down without."""
    worth: dict[str, Worth] = {}
    """task_id -> what its arms' answers cost, and how they stand beside the LLM, a random router and an oracle."""


def convert(recipe: Recipe, say: Callable[[str], None] = print, engine_of: EngineOf | None = None) -> Conversion:
    """Run every stage. Needs Ray to be connected and, for validation, Ray Serve to be allowed to start.

    Args:
        engine_of: where a graph that serves the base runs or will run anyway, its engine; None starts one for
            validation and takes it down again. Asked for each merged model too.
    """
    for config in (recipe.pretrain, recipe.finetune):
        check_log_to(config.log_to)
    with followed(Store(recipe.store)) as clock:
        conversion = _convert(recipe, say, engine_of, clock)
        clock.release = conversion.release
    return conversion


def _convert(recipe: Recipe, say: Callable[[str], None], engine_of: EngineOf | None, clock: Followed) -> Conversion:
    store = Store(recipe.store)
    work = work_folder(recipe)
    namer = namer_of(recipe)
    snapshot = curate(store, recipe.curate, work=work, paraphrase=paraphrase_of(recipe))
    say(
        f"curate: {snapshot.counts.num_calls} calls -> {snapshot.counts.num_examples}; dropped {snapshot.counts.dropped}"
    )
    clock.lap("curate")
    served = {split: load_split(store, snapshot.id, split, as_served=split != "train") for split in SPLITS}
    if not served["train"]:
        raise InputError(f"store {recipe.store}: no calls to learn from; capture or `understudy ingest PATH...` first")
    # What is written to disk to learn from is redacted; what was served is asked of the engine, from memory alone.
    redacted = load_split(store, snapshot.id, "validation", as_served=False)
    discovery = discover(served, recipe.discover, load_previous(store))
    if recipe.discover.measure_splits:
        by_split = {split: group_by_task(served[split], discovery.assignment) for split in SPLITS}
        tasks, _ = _learnable(recipe, discovery.tasks, by_split, snapshot.counts.num_clients)
        learned = {"train": served["train"], "validation": redacted}
        discovery = split_by_agreement(recipe, store, work, snapshot.id, discovery, tasks, learned, say)
    own_names: dict[str, str] = {}
    if namer:
        discovery, own_names = name_by_llm(store, discovery, served["train"], namer, say)
    route_model = save_discovery(store, snapshot.id, discovery)
    by_split = {split: group_by_task(served[split], discovery.assignment) for split in SPLITS}
    say(f"discover: {len(discovery.tasks)} tasks; unassigned {discovery.unassigned}")
    for task in discovery.tasks:
        say(f"discover {task.task_id}: {task.name}, {task.kind}, {task.num_calls} calls")
    clock.lap("discover")
    _check_merge(recipe, discovery.tasks)
    tasks, refused = _learnable(recipe, discovery.tasks, by_split, snapshot.counts.num_clients)
    trained = Trained()
    if tasks:
        held_out = group_by_task(redacted, discovery.assignment)
        scope = scope_of(recipe, tasks, {"train": by_split["train"], "validation": held_out})
        trained = train(recipe, store, work, snapshot.id, scope, refused, clock.lap, say)
    evaluations, rates = _validate(recipe, store, trained, by_split, len(refused), engine_of, say)
    learned = [candidate.task for candidate in trained.candidates]
    teacher = measure_teacher(recipe, learned, by_split, say)
    save_agreements(recipe, store, snapshot.id, evaluations, rates, teacher)
    clock.lap("validate")
    release = _release(store, trained.candidates, evaluations, refused, route_model, snapshot.id)
    sha = publish_release(store, release)
    save_config(store, sha, recipe)
    return Conversion(
        release=sha,
        snapshot=snapshot.id,
        tasks=discovery.tasks,
        unassigned=discovery.unassigned,
        selection=trained.selection,
        evaluations=tuple(evaluations),
        refused=release.refused,
        losses=trained.losses,
        seconds=clock.seconds,
        curation=snapshot.counts,
        left_out=trained.left_out,
        own_names=own_names,
        usefulness=tuple(load_usefulness(store).values()),
        teacher=teacher,
        worth=_weigh_all(evaluations, rates, recipe.evaluation.noninferiority_margin),
        moved=measure_moved(store, snapshot.id, discovery.assignment, evaluations, release.refused),
    )


def _validate(
    recipe: Recipe,
    store: Store,
    trained: Trained,
    by_split: dict[Split, dict[str, list[Example]]],
    num_refused: int,
    engine_of: EngineOf | None,
    say: Callable[[str], None],
) -> tuple[list[Evaluation], Rates]:
    """Ask the engines that serve what every candidate says, one engine after the other; none is started where there is no
    candidate."""
    rate = AnswerRate()
    num_candidates = len(trained.candidates) + num_refused
    found: dict[str, Evaluation] = {}
    for model, group in group_by_model(trained.candidates).items():
        with (engine_of or (lambda model: validation_engine(recipe, model)))(model) as engine:
            done = validate_candidates(recipe, store, group, by_split, engine, num_candidates, rate, say)
        found |= {one.task_id: one for one in done}
    return [found[one.task.task_id] for one in trained.candidates], rates_of(recipe, rate)


def _weigh_all(evaluations: Sequence[Evaluation], rates: Rates, margin: float) -> dict[str, Worth]:
    found = {one.task_id: weigh(one, rates, margin) for one in evaluations}
    return {task_id: worth for task_id, worth in found.items() if worth is not None}


def write_conversion_report(
    path: pathlib.Path, conversion: Conversion, summary: dict[str, Any] | None, notes: list[str]
) -> None:
    """Write the HTML page a person reads: what moved, how sure that is, what stays and why."""
    names = {task.task_id: task.name for task in conversion.tasks}
    unnamed = [
        f"{names[task_id]}: keeps the name of its own words: {reason}"
        for task_id, reason in conversion.own_names.items()
    ]
    write_report(
        path,
        tasks=conversion.tasks,
        evaluations=conversion.evaluations,
        refused=conversion.refused,
        unassigned=conversion.unassigned,
        losses=conversion.losses,
        summary=summary,
        notes=[*notes, *unnamed],
        selection=conversion.selection,
        curation=conversion.curation,
        left_out=conversion.left_out,
        usefulness=conversion.usefulness,
        worth=conversion.worth,
        moved=conversion.moved,
        teacher=conversion.teacher,
    )


def _check_merge(recipe: Recipe, tasks: Sequence[TaskSpec]) -> None:
    known = sorted(task.task_id for task in tasks)
    if wrong := sorted(set(recipe.specialists.merge) - set(known)):
        raise InputError(
            f"specialists.merge: {wrong[0]!r} is no task of store {recipe.store}; allowed: {', '.join(known)}; "
            f"next: understudy tasks list store={recipe.store}"
        )


def _learnable(
    recipe: Recipe, tasks: tuple[TaskSpec, ...], by_split: dict[Split, dict[str, list[Example]]], num_clients: int
) -> tuple[list[TaskSpec], dict[str, str]]:
    """Leave out what no training could get through the gate: it would only cost the others' time."""
    refused: dict[str, str] = {}
    needed = calls_to_certify(recipe, len(tasks))
    for task in tasks:
        narrow = find_narrowness(task, recipe.discover.min_clients, num_clients)
        missing = [split for split in SPLITS if not by_split[split].get(task.task_id)]
        sessions = {example.session_id for example in by_split["calibration"].get(task.task_id, ())}
        if narrow:
            refused[task.task_id] = narrow
        elif missing:
            refused[task.task_id] = f"no examples in {', '.join(missing)} ({task.num_calls} calls in all)"
        elif len(sessions) < needed:
            refused[task.task_id] = (
                f"too few calibration calls: needs {needed - len(sessions)} more examples; of {len(sessions)} sessions "
                f"not even all can certify epsilon {recipe.gate.epsilon:g}, at least {needed} can"
            )
    return [task for task in tasks if task.task_id not in refused], refused


def find_narrowness(task: TaskSpec, min_clients: int, num_clients: int) -> str | None:
    """Why a task comes from too few clients to be learned, or None.

    Args:
        num_clients: distinct clients of the whole store; of one alone, sessions are counted instead.
    """
    if num_clients > 1:
        if task.num_clients >= min_clients:
            return None
        return (
            f"too few clients: {task.num_clients} of the {num_clients}, fewer than discover.min_clients={min_clients}"
        )
    if task.num_sessions >= min_clients:
        return None
    return (
        f"too few sessions: {task.num_sessions}, counted for want of clients (the whole store has one), fewer than "
        f"discover.min_clients={min_clients}"
    )


def make_specialist(store: Store, candidate: Candidate, evaluation: Evaluation) -> Specialist:
    """What a candidate becomes whose gate is open; its report is kept by its content."""
    facts = {
        "task_id": candidate.task.task_id,
        "base": candidate.base,
        "adapter": candidate.adapter,
        "prompt_format": candidate.prompt_format.model_dump(mode="json"),
        "gate": evaluation.gate.model_dump(mode="json"),
        "report": save_evaluation(store, evaluation),
        "max_answer_tokens": candidate.max_answer_tokens,
        **({"merged": candidate.merged} if candidate.merged else {}),
    }
    sha = content_hash([facts, store.manifest(candidate.adapter)["sha256"]])
    return Specialist.model_validate({**facts, "sha": sha})


def _release(
    store: Store,
    candidates: list[Candidate],
    evaluations: list[Evaluation],
    refused: dict[str, str],
    route_model: str,
    snapshot: str,
) -> Release:
    specialists = {}
    refused = dict(refused)
    for candidate, evaluation in zip(candidates, evaluations, strict=True):
        task_id = candidate.task.task_id
        if evaluation.gate.is_open:
            specialists[task_id] = make_specialist(store, candidate, evaluation)
        else:
            refused[task_id] = evaluation.gate.refused or "no threshold"
    return Release(
        specialists=specialists, refused=refused, route_model=route_model, snapshot=snapshot, created_ts=time.time()
    )
