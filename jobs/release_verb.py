"""`understudy release ACTION`: which releases there are, what is known of the served one, and a person's changes of it.

A person's word goes before the steward's (serving/steward.py): every change here is an event `by` person, and `freeze` keeps
the steward from changing anything. Stages stand in the release, so a change of stage is a release derived from another.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from typing import Any

from cluster import registry
from cluster.access import Role, require_role
from cluster.errors import InputError
from cluster.events import Cause, read_events
from cluster.records import Stage
from cluster.store import Store
from jobs.tables import show_table
from serving.rollout import RolloutConfig
from serving.status_facts import release_facts

_MIN_PREFIX = 6


def add_verb(verbs: Any, words: dict[str, Any], verb_class: Any) -> None:
    """Add `release` and its actions to the verbs of the command line."""
    release = verbs.add_parser(
        "release",
        help="list, show, promote, canary, rollback, freeze: what is served, and how far",
        examples=[
            "understudy release list",
            "understudy release promote SHA --stage shadow",
            "understudy release show",
        ],
    )
    actions = release.add_subparsers(dest="action", required=True, parser_class=verb_class)

    def add(name: str, run: Any, meaning: str, *examples: str) -> Any:
        lines = [f"understudy release {' '.join([name, *example.split()])} store=store" for example in examples or [""]]
        action = actions.add_parser(name, help=meaning, examples=lines)
        action.set_defaults(run=run)
        return action

    listed = add("list", _list, "all releases, the newest last", "", "--json")
    listed.add_argument("--json", action="store_true", help="print JSON")
    shown = add("show", _show, "one release: tasks, stages, evidence; without SHA the served one", "", "SHA --json")
    shown.add_argument("--json", action="store_true", help="all facts as JSON")
    promoted = add("promote", _promote, "serve a release; its new specialists begin at --stage", "SHA --stage shadow")
    promoted.add_argument("sha", metavar="SHA", help="its name, or the beginning of it")
    promoted.add_argument(
        "--stage",
        choices=("shadow", "canary", "live"),
        help="shadow compares and serves nobody, canary serves a share of sessions; evidence moves them on; live lets all of "
        "its specialists answer, also those that stood at an earlier stage; default: the recipe's rollout.start",
    )
    canary = add("canary", _canary, "let a task's specialist answer a share of the sessions", "TASK_ID --share 0.2")
    canary.add_argument("task", metavar="TASK_ID")
    for parser in (promoted, canary):
        parser.add_argument(
            "--share",
            type=float,
            metavar="X",
            help="of sessions in a canary; default: the recipe's rollout.canary_share",
        )
    promoted.sections = canary.sections = ("store", "rollout")
    back = add("rollback", _roll_back, "serve the release that was served before")
    frozen = add("freeze", _freeze, "nothing but a person changes what is served, until unfreeze", "--reason holidays")
    frozen.add_argument("--reason", default="", help="for whoever finds it frozen")
    thawed = add("unfreeze", _unfreeze, "let evidence change what is served again")
    events = add("events", _events, "every change, by whom and on what evidence")
    events.add_argument("--json", action="store_true", help="with all evidence, one event a line")
    shown.add_argument(
        "words", **{**words, "metavar": "SHA|key=value", "help": "a release, else the served one; store=..."}
    )
    for parser in (listed, promoted, canary, back, frozen, thawed, events):
        parser.add_argument("words", **{**words, "help": "store=..., recipe=NAME|PATH"})


def _list(options: argparse.Namespace) -> None:
    store = _open(options, "viewer")
    served = registry.current_sha(store)
    found = sorted(
        ((sha, registry.load_release(store, sha)) for sha in registry.release_names(store)),
        key=lambda one: one[1].created_ts,
    )
    if options.json:
        facts = [
            {"release": sha, "created_ts": one.created_ts, "is_served": sha == served, "specialists": sorted(one.specialists),
             "refused": dict(one.refused), "stages": {task: at.stage for task, at in one.rollout.items()}}
            for sha, one in found
        ]  # fmt: skip
        return print(json.dumps(facts, indent=1))
    rows = []
    for sha, release in found:
        stages = sorted(f"{task}: {one.stage}" for task, one in release.rollout.items())
        mark = "served" if sha == served else ""
        rows.append(
            [
                sha[:12],
                _time(release.created_ts),
                mark,
                len(release.specialists),
                len(release.refused),
                ", ".join(stages),
            ]
        )
    show_table(["release", "made", "", "specialists", "refused", "not live"], rows, sys.stdout)


def _show(options: argparse.Namespace) -> None:
    names = [word for word in options.words if "=" not in word]
    options.words = [word for word in options.words if "=" in word]
    store = _open(options, "viewer")
    if len(names) > 1:
        raise InputError(f"SHA={names[1]!r}: a second name; allowed: one release, or none for the served one")
    sha = _resolve(store, names[0]) if names else registry.current_sha(store)
    if sha is None:
        raise InputError(f"store={store.uri}: no release is served; next: understudy release list store={store.uri}")
    release = registry.load_release(store, sha)
    facts = release_facts(store, sha, release)
    if options.json:
        return print(json.dumps(facts, indent=1))
    print(f"release {sha}{' (served)' if facts['is_served'] else ''}{' (frozen)' if facts['is_frozen'] else ''}")
    head = ["task", "specialist", "stage", "epsilon", "compared", "differ", "95% interval", "evidence against", "for"]
    rows = [_task_row(task, one) for task, one in facts["tasks"].items()]
    show_table(head, rows, sys.stdout)
    for task, reason in sorted(release.refused.items()):
        print(f"refused {task}: {reason}")


def _task_row(task: str, facts: dict[str, Any]) -> list[Any]:
    stage = facts["stage"]
    if stage == "canary":
        stage += f" {facts['rollout']['canary_share']:.0%}"
    row = [task, facts["specialist"].split("@")[1], stage, facts["epsilon"]]
    evidence = facts["evidence"]
    if not evidence:
        return [*row, 0, 0, "", None, None]
    lower, upper = evidence["interval"]
    needed = 1 / evidence["alpha"]
    against, safe = (f"{evidence[name]:.3g} of {needed:g}" for name in ("e_value_risk", "e_value_safety"))
    counts = [evidence["num_compared"], evidence["num_disagreements"]]
    return [*row, *counts, f"{lower:.1%} to {upper:.1%}", against, safe if facts["stage"] != "live" else ""]


def _promote(options: argparse.Namespace) -> None:
    store = _open(options, "admin")
    serve_release(store, _resolve(store, options.sha), _rollout(options), options.stage)


def serve_release(store: Store, sha: str, rollout: RolloutConfig, stage: Stage | None = None) -> None:
    """Serve a release, its new specialists at a stage or where the recipe has them start; prints the served one's name.

    Raises:
        ReleaseError: see `registry.promote_at`.
    """
    before = registry.current(store)
    served = registry.promote_at(store, sha, rollout.at(stage))
    release = registry.load_release(store, served)
    has_engine = before[1].models() if before else set()
    if new := sorted(task for task, one in release.specialists.items() if one.model not in has_engine):
        print(
            f"{', '.join(new)}: on a model that the release before did not have; an endpoint that runs starts an engine for "
            "it where its cluster has room, and has the LLM answer until that is up",
            file=sys.stderr,
        )
    if waiting := release.rollout:
        stages = ", ".join(f"{task} in {one.stage}" for task, one in sorted(waiting.items()))
        print(
            f"{stages}; evidence moves them on (understudy release show store={store.uri}); at once: understudy release "
            f"promote {sha[:12]} --stage live store={store.uri}",
            file=sys.stderr,
        )
    print(served)


def _canary(options: argparse.Namespace) -> None:
    store = _open(options, "admin")
    served = registry.current(store)
    if served is None or options.task not in served[1].specialists:
        known = ", ".join(sorted(served[1].specialists)) if served else ""
        raise InputError(
            f"TASK_ID={options.task!r}: has no specialist in the served release; allowed: {known or 'none yet'}"
        )
    derived = registry.derive(*served, rollout={options.task: _rollout(options).at("canary")})
    sha = registry.publish_release(store, derived)
    registry.promote(store, sha, expected=served[0], cause=Cause(kind="canary"))
    print(sha)


def _roll_back(options: argparse.Namespace) -> None:
    print(registry.roll_back(_open(options, "admin")))


def _freeze(options: argparse.Namespace) -> None:
    registry.freeze(_open(options, "admin"), options.reason)


def _unfreeze(options: argparse.Namespace) -> None:
    registry.unfreeze(_open(options, "admin"))


def _events(options: argparse.Namespace) -> None:
    found = read_events(_open(options, "viewer"))
    if options.json:
        for event in found:
            print(event.model_dump_json())
        return
    rows = [[_time(e.ts), e.kind, e.by, (e.release or "")[:12], (e.before or "")[:12], _why(e.evidence)] for e in found]
    show_table(["time", "change", "by", "release", "before", "evidence"], rows, sys.stdout)


def _why(evidence: dict[str, Any]) -> str:
    said = []
    for task, facts in evidence.items():
        if isinstance(facts, dict) and "num_compared" in facts:
            counts = f"{facts['num_disagreements']} of {facts['num_compared']} differ"
            said.append(f"{task}: {facts['from']} -> {facts['to']}, {counts}")
        elif isinstance(facts, str):
            said.append(facts)
    return "; ".join(said)


def _rollout(options: argparse.Namespace) -> RolloutConfig:
    """The recipe's, with the share that a person named."""
    from jobs.recipe import load_recipe

    config, share = load_recipe(options.words).rollout, options.share
    if share is None:
        return config
    if not 0 < share <= 1:
        raise InputError(f"--share {share:g}: allowed: above 0 and at most 1; next: --share 0.1")
    return config.model_copy(update={"canary_share": share})


def _open(options: argparse.Namespace, role: Role) -> Store:
    from jobs.recipe import load_recipe

    uri = load_recipe(options.words).store
    require_role(uri, role)
    return Store(uri)


def _resolve(store: Store, sha: str) -> str:
    """The whole name that begins so."""
    found = [name for name in registry.release_names(store) if name.startswith(sha)] if len(sha) >= _MIN_PREFIX else []
    if len(found) != 1:
        what = "names several releases" if found else "names no release"
        raise InputError(f"SHA={sha!r}: {what} in store {store.uri}; next: understudy release list store={store.uri}")
    return found[0]


def _time(ts: float) -> str:
    return datetime.datetime.fromtimestamp(ts, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
