"""S6, first half: what a store knows of its tasks -> a plan (training/refine.py) that says what to do with each.

Read are calls and feedback (S1), the steward's evidence, the release that is served, marks of forgotten clients and earlier
refinements; curation and discovery (S2, S3) run again, and discovery writes nothing. The same store gives the same plan: what
is recent is told from the newest stored call, not from a clock.

The route model stays what it is while the tasks do: a gate's promise is about the calls that it was certified on. It is
fitted anew where tasks were born, split or merged, or have calls that it sends nowhere, and then each task whose calls
that moves is trained again; where one of those cannot be, it stays, and new tasks wait.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from cluster import registry
from cluster.errors import ConfigError, InputError
from cluster.records import Example, Release, Split, TaskSpec
from cluster.route_model import RouteModel
from cluster.store import Store
from jobs.convert import find_narrowness
from jobs.paraphrase import paraphrase_of
from jobs.recipe import Recipe, work_folder
from jobs.refine_facts import SECONDS_PER_DAY, Known, facts_of, read_known
from training.curate import curate
from training.discover import ROUTE_MODEL_FOLDER, TASKS_FOLDER, Discovery, discover, load_previous
from training.ledger import CalibrationLedger
from training.merging import num_calls
from training.refine import Plan, RefineConfig, TaskPlan, decide
from training.selection import group_by_task
from training.snapshot import Snapshot, load_split
from training.splits import SPLITS
from training.trace_checks import Checked, check_traces

_REFITTING = ("birth", "split", "merge", "drift")
"""Events after which the served route model no longer knows the tasks."""
_MAX_UNROUTED = 0.05
"""Share of a task's calls that the served route model sends nowhere, as those of an edited template, above which it is
fitted anew."""


class Routing(NamedTuple):
    """The tasks by one route model."""

    tasks: dict[str, TaskSpec]
    assignment: dict[str, str | None]
    """example_id -> task_id."""
    moved: dict[str, float]
    """task_id -> share of its calls that the served route model sends elsewhere, or sent to it from elsewhere."""
    unrouted: Mapping[str, float] = MappingProxyType({})
    """task_id -> share of its calls that the served route model sends to no task."""


class Material(NamedTuple):
    """What of a snapshot a refinement works on; content in memory alone."""

    snapshot: Snapshot
    served: dict[Split, list[Example]]
    """Train redacted, the others as served."""
    redacted: list[Example]
    """Validation as it may be learned from."""
    discovery: Discovery
    variants: dict[str, str]
    """example_id -> its call site's template, tools and response format."""


def make_plan(recipe: Recipe, store: Store, say: Callable[[str], None] = print) -> Plan:
    """Look at everything that is stored and decide; writes a snapshot where there is none of these calls, and nothing else.

    Raises:
        InputError: nothing is served, or there is nothing to learn from.
        ConfigError: the served gates leave nothing of gate.delta.
    """
    release = served_release(store)
    work = work_folder(recipe)
    snapshot = curate(store, recipe.curate, work=work, paraphrase=paraphrase_of(recipe))
    material = load_material(recipe, store, snapshot)
    known = read_known(store, recipe.refine)
    say(
        f"refine: {snapshot.counts.num_calls} calls, release {release[0][:12]}, {len(material.discovery.events)} events"
    )
    ledger = CalibrationLedger(store)
    is_wanted, why = _is_refit_wanted(material, release[1], routing_of(store, material, release[1], is_refit=True))
    decided = _decide(recipe, store, material, release[1], known, ledger, is_refit=is_wanted)
    if is_wanted and (moved := _cannot_move(decided, recipe.refine, release[1])):
        why = f"not fitted anew ({why}): it would send {', '.join(moved)} other calls, which cannot be trained now"
        is_wanted = False
        decided = _decide(recipe, store, material, release[1], known, ledger, is_refit=False)
    folder = f"{ROUTE_MODEL_FOLDER}/{material.discovery.route_model.content_sha()}"
    return Plan(
        date=datetime.datetime.fromtimestamp(known.newest_ts, datetime.UTC).date().isoformat(),
        release=release[0],
        snapshot=snapshot.id,
        route_model=folder if is_wanted else release[1].route_model,
        is_refit=is_wanted,
        refit_reason=why,
        since_ts=known.newest_ts - recipe.refine.recent_days * SECONDS_PER_DAY,
        delta=_delta_left(recipe, release[1], decided),
        config=recipe.refine,
        events=material.discovery.events,
        tasks=tuple(decided),
        spent=ledger.entries,
    )


def served_release(store: Store) -> tuple[str, Release]:
    """Raises InputError where none is served."""
    found = registry.current(store)
    if found is None:
        raise InputError(
            f"store={store.uri}: no release is served, so there is nothing to refine; next: understudy convert"
        )
    return found


def load_material(recipe: Recipe, store: Store, snapshot: Snapshot) -> Material:
    """Read a snapshot and look for its tasks; writes nothing.

    Raises:
        InputError: it holds nothing to learn from.
    """
    served = {split: load_split(store, snapshot.id, split, as_served=split != "train") for split in SPLITS}
    if not served["train"]:
        raise InputError(f"store {store.uri}: no calls to learn from; capture or `understudy ingest PATH...` first")
    discovery = discover(served, recipe.discover, load_previous(store))
    sites = discovery.grouping.sites
    variants = {
        example.example_id: sites.site_of(example.request).variant for own in served.values() for example in own
    }
    redacted = load_split(store, snapshot.id, "validation", as_served=False)
    return Material(snapshot, served, redacted, discovery, variants)


def routing_of(store: Store, material: Material, release: Release, *, is_refit: bool) -> Routing:
    """The tasks by the refitted route model, or by the served one, and what the refitted one moves."""
    model = RouteModel.load(store, release.route_model)
    everything = [example for split in material.served.values() for example in split]
    before = {example.example_id: model.task_of(example.request).task_id for example in everything}
    discovery = material.discovery
    if is_refit:
        tasks = {task.task_id: task for task in discovery.tasks}
        unrouted = {
            task_id: num_calls([one for one in own if before[one.example_id] is None]) / num_calls(own)
            for task_id, own in group_by_task(everything, discovery.assignment).items()
        }
        return Routing(tasks, discovery.assignment, _moved(everything, before, discovery.assignment), unrouted)
    return Routing(_count_tasks(store, discovery, material.served, before), before, {})


def check_task(
    plan_since_ts: float,
    config: RefineConfig,
    material: Material,
    known: Known,
    task: TaskSpec,
    routing: Routing,
) -> Checked:
    """The train examples of a task that may be learned, and why the others may not."""
    train = group_by_task(material.served["train"], routing.assignment).get(task.task_id, [])
    return check_traces(train, task.kind, known.times, material.variants, plan_since_ts, config.min_new_examples)


def in_use(examples: Sequence[Example], material: Material, checked: Checked) -> list[Example]:
    """Held-out examples without those of templates that are no longer asked: the gate is about the calls to come."""
    return [example for example in examples if material.variants[example.example_id] not in checked.outdated]


def _is_refit_wanted(material: Material, release: Release, refitted: Routing) -> tuple[bool, str]:
    found = sorted({event.kind for event in material.discovery.events if event.kind in _REFITTING})
    if found:
        return True, f"tasks changed: {', '.join(found)}"
    known = release.specialists.keys() | release.refused.keys()
    if unknown := sorted(refitted.tasks.keys() - known):
        return True, f"the served release does not know {', '.join(unknown)}"
    if lost := sorted(task for task, share in refitted.unrouted.items() if share > _MAX_UNROUTED):
        return True, f"the served one sends {refitted.unrouted[lost[0]]:.0%} of the calls of {lost[0]} nowhere"
    return False, "the tasks are those of the served release"


def _moved(
    everything: list[Example], before: Mapping[str, str | None], after: Mapping[str, str | None]
) -> dict[str, float]:
    """Share of each task's calls, of both models together, that only one of them sends to it."""
    either: dict[str, int] = {}
    both: dict[str, int] = {}
    for example in everything:
        old, new = before[example.example_id], after[example.example_id]
        for task_id in {old, new} - {None}:
            either[task_id] = either.get(task_id, 0) + len(example.source_call_ids)
        if old is not None and old == new:
            both[old] = both.get(old, 0) + len(example.source_call_ids)
    return {task_id: 1 - both.get(task_id, 0) / total for task_id, total in either.items()}


def _count_tasks(
    store: Store, discovery: Discovery, served: Mapping[Split, list[Example]], assignment: Mapping[str, str | None]
) -> dict[str, TaskSpec]:
    """The tasks that a route model knows, with today's counts; of a task that discovery lost, as it was stored."""
    found = {task.task_id: task for task in discovery.tasks}
    by_split = {split: group_by_task(examples, dict(assignment)) for split, examples in served.items()}
    total = sum(map(num_calls, served.values()))
    tasks = {}
    for task_id in sorted({one for one in assignment.values() if one is not None}):
        path = f"{TASKS_FOLDER}/{task_id}.json"
        if task_id not in found and not store.exists(path):
            continue
        spec = found.get(task_id) or TaskSpec.model_validate(store.read_json(path))
        own = [example for split in by_split.values() for example in split.get(task_id, ())]
        counted = {
            "num_calls": num_calls(own),
            "share_calls": num_calls(own) / total,
            "num_examples": {split: len(by_split[split].get(task_id, ())) for split in SPLITS},
            "num_clients": len({client for one in own for client in one.client_ids}),
            "num_sessions": len({one.session_id for one in own}),
        }
        tasks[task_id] = spec.model_copy(update=counted)
    return tasks


def _decide(
    recipe: Recipe,
    store: Store,
    material: Material,
    release: Release,
    known: Known,
    ledger: CalibrationLedger,
    *,
    is_refit: bool,
) -> list[TaskPlan]:
    routing = routing_of(store, material, release, is_refit=is_refit)
    config = recipe.refine
    since = known.newest_ts - config.recent_days * SECONDS_PER_DAY
    by_task: dict[str, Any] = {s: group_by_task(material.served[s], routing.assignment) for s in SPLITS}
    names = sorted({*routing.tasks, *release.specialists})
    # As if all of them were trained, and none of the served gates given up.
    delta = _delta_left(recipe, release, []) / max(1, len(names))
    decided = []
    for task_id in names:
        spec = routing.tasks.get(task_id)
        if spec is None:
            stored = store.read_json(f"{TASKS_FOLDER}/{task_id}.json")
            spec = TaskSpec.model_validate(stored).model_copy(update={"num_calls": 0})
        checked = check_task(since, config, material, known, spec, routing)
        held = {split: by_task[split].get(task_id, []) for split in SPLITS}
        held["calibration"] = in_use(held["calibration"], material, checked)
        blocked = find_narrowness(spec, recipe.discover.min_clients, material.snapshot.counts.num_clients)
        missing = [split for split in SPLITS if not held[split]]
        blocked = blocked or (f"no examples in {', '.join(missing)}" if missing else None)
        facts = facts_of(recipe, store, release, known, ledger, spec, checked, held, since)
        facts = facts.model_copy(update={"moved_share": routing.moved.get(task_id, 0.0), "blocked": blocked})
        decision, reason, is_warm = decide(facts, config, recipe.gate.epsilon, delta)
        decided.append(
            TaskPlan(task_id=task_id, name=spec.name, decision=decision, reason=reason, is_warm=is_warm, facts=facts)
        )
    return decided


def _cannot_move(decided: list[TaskPlan], config: RefineConfig, release: Release) -> list[str]:
    """Served tasks that would get other calls with a gate that is not about them."""
    return [
        one.task_id
        for one in decided
        if one.decision == "keep" and one.task_id in release.specialists and one.facts.moved_share > config.max_moved
    ]


def _delta_left(recipe: Recipe, release: Release, decided: list[TaskPlan]) -> float:
    """What the gates that may stay in the release leave of its delta, so that all gates of the new one keep it together.

    A specialist that is retrained counts: it stays where the new one fails.
    """
    retired = {one.task_id for one in decided if one.decision == "retire"}
    held = sum(one.gate.delta for task_id, one in release.specialists.items() if task_id not in retired)
    if held >= recipe.gate.delta:
        raise ConfigError(
            f"gate.delta={recipe.gate.delta:g}: the gates of the served release hold {held:g} of it; allowed: more than that; "
            "next: gate.delta as the release was made with, or understudy convert"
        )
    return recipe.gate.delta - held
