"""`understudy refine`: plan what to do with every task, and do it; also what a scheduled job runs.

`refine plan` writes refinements/DATE-HASH.json and shows it; `refine run PLAN` carries out that file, or an edited copy of it;
`refine` does both. A plan that has been run is not run again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, InputError, ReleaseError
from jobs import submit
from jobs.tables import show_table

if TYPE_CHECKING:
    from cluster.records import Stage
    from cluster.store import Store
    from jobs.recipe import Recipe
    from serving.rollout import RolloutConfig
    from training.refine import Plan

_ACTIONS = "nothing, plan, or run PLAN"


def add_verb(verbs: Any, sections: tuple[str, ...]) -> None:
    """Add `refine` to the verbs of the command line."""
    refine = verbs.add_parser(
        "refine",
        help="plan from audits, escalations, feedback and new calls what to retrain, reselect or retire, and do it",
        sections=("refine", *sections),
        examples=[
            "understudy refine plan recipe=local store=store",
            "understudy refine run refinements/2026-11-26-0123456789ab.json recipe=local store=store",
            "understudy refine recipe=local store=store --stage shadow",
            "understudy refine --address http://127.0.0.1:8265 --working-dir . recipe=local store=/shared/store",
        ],
    )
    refine.add_argument(
        "words",
        nargs="*",
        metavar="plan | run PLAN | key=value",
        help="plan writes the plan alone, run carries one out (its path, here or in the store); else both",
    )
    refine.add_argument("--json", action="store_true", help="print the plan, or what became of it, as JSON")
    refine.add_argument(
        "--dry-run", action="store_true", help="show the plan and the resources; write and train nothing"
    )
    refine.add_argument(
        "--stage",
        choices=("shadow", "canary", "live"),
        help="serve the new release, its new specialists from this stage on; without it nothing that is served changes",
    )
    submit.add_flags(refine)
    refine.set_defaults(run=_refine)


def _refine(options: argparse.Namespace) -> int | None:
    others = [word for word in options.words if "=" not in word]
    action, path = _action(others)
    words = [word for word in options.words if "=" in word]
    if options.address:
        if path and pathlib.Path(path).is_file():
            raise ConfigError(
                f"PLAN={path!r}: a file of this machine, and the job runs at {options.address}; allowed: a plan's name in the "
                "store; next: copy it to refinements/ of the store"
            )
        flags = ["--json"] * options.json + (["--stage", options.stage] if options.stage else [])
        return submit.submit("refine", words, [*others, *flags], options)
    submit.check_flags(options)
    from cluster import registry
    from cluster.access import require_role
    from cluster.store import Store
    from jobs.plan import check_here, plan_conversion, show_plan
    from jobs.recipe import load_recipe
    from jobs.refine import make_plan

    recipe = load_recipe(words)
    parts = plan_conversion(recipe)
    require_role(recipe.store, "admin" if options.stage else "curator")
    store = Store(recipe.store)
    if options.stage and registry.is_frozen(store):
        raise ReleaseError(f"--stage {options.stage}: store {store.uri} is frozen; next: understudy release unfreeze")
    plan = _read(store, path) if path else make_plan(recipe, store, _say(options))
    if options.dry_run:
        _show(plan, as_json=options.json)
        print(json.dumps(show_plan(recipe, parts)["resources"], indent=1), file=sys.stderr)
        return check_here(parts, recipe)
    if action != "run":
        store.write_json(f"{plan.name}.json", plan.model_dump(mode="json"))
    if action == "plan":
        _show(plan, as_json=options.json)
        return print(f"{recipe.store}/{plan.name}.json", file=sys.stderr if options.json else sys.stdout, flush=True)
    _run(recipe, store, plan, options)


def _run(recipe: Recipe, store: Store, plan: Plan, options: argparse.Namespace) -> None:
    from jobs.plan import connect_for, plan_conversion
    from jobs.refine_facts import RESULT_SUFFIX
    from jobs.refine_run import run_plan

    if plan.trained() and not store.exists(f"{plan.name}{RESULT_SUFFIX}"):
        connect_for(plan_conversion(recipe), recipe)
    result = run_plan(recipe, store, plan, _say(options))
    if options.json:
        print(result.model_dump_json(indent=1))
    else:
        rows = [[task, one.decision, one.released, one.reason] for task, one in sorted(result.outcomes.items())]
        show_table(["task", "decision", "released", "why"], rows, sys.stdout)
    served = _serve(store, result.release, recipe.rollout, options.stage) if options.stage else result.release
    print(f"{recipe.store}/releases/{served}.json", file=sys.stderr if options.json else sys.stdout, flush=True)


def _serve(store: Store, sha: str, rollout: RolloutConfig, stage: Stage) -> str:
    """Serve a plan's release if what it was made from is still served; once.

    Raises:
        ReleaseError: something else is served by now.
    """
    from cluster import registry

    served = registry.current_sha(store)
    if served in _descent(store, sha)[1:2]:
        return registry.promote_at(store, sha, rollout.at(stage), expected=served)
    if served is not None and sha in _descent(store, served):
        return served
    raise ReleaseError(
        f"release {sha}: was made from another release than {served}, which is served; next: understudy refine, or "
        f"understudy release promote {sha[:12]} --stage {stage}"
    )


def _descent(store: Store, sha: str) -> list[str]:
    """A release and those it was derived from, the newest first."""
    from cluster import registry

    found, name = [], sha
    while name is not None:
        found.append(name)
        name = registry.load_release(store, name).previous  # type: ignore[assignment]
    return found


def _action(words: list[str]) -> tuple[str, str | None]:
    """What to do, and with which plan."""
    if not words:
        return "both", None
    if words == ["plan"]:
        return "plan", None
    if words[0] == "run" and len(words) == 2:
        return "run", words[1]
    raise InputError(f"refine {' '.join(words)}: allowed: {_ACTIONS}; next: understudy refine plan")


def _read(store: Store, path: str) -> Plan:
    from training.refine import REFINEMENTS_FOLDER, read_plan

    local = pathlib.Path(path)
    if local.is_file():
        return read_plan(local.read_text(), path)
    name = f"{REFINEMENTS_FOLDER}/{local.name}"
    if store.exists(name):
        return read_plan(store.read_bytes(name).decode(), name)
    known = ", ".join(one for one in store.list(REFINEMENTS_FOLDER, ".json") if ".result." not in one) or "none yet"
    raise InputError(
        f"PLAN={path!r}: neither a file nor a plan of store {store.uri}; allowed: a file, or one of {known}"
    )


def _show(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        return print(json.dumps(plan.model_dump(mode="json"), indent=1))
    route = "fitted anew" if plan.is_refit else "stays"
    print(f"release {plan.release[:12]}, calls until {plan.date}; route model {route}: {plan.refit_reason}")
    rows = [
        [one.task_id, one.name, f"{one.decision} warm" if one.is_warm else one.decision, one.reason, _counts(one.facts)]
        for one in plan.tasks
    ]
    show_table(["task", "name", "decision", "why", "counts"], rows, sys.stdout)


def _counts(facts: Any) -> str:
    found = [f"{facts.num_recent} of {facts.num_calls} calls recent", f"{facts.num_new} new examples"]
    found += [f"{count} left out: {reason}" for reason, count in facts.quarantined.items()]
    return ", ".join(found)


def _say(options: argparse.Namespace) -> Any:
    """Progress goes where it does not disturb JSON."""
    return (lambda line: print(line, file=sys.stderr)) if options.json else print
