"""`understudy compact` and `understudy forget`: their flags, progress and what they print.

Knows nothing of how it is done (jobs/compact.py, jobs/forget.py do).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from cluster.errors import InputError


def add_verbs(verbs: Any, words: dict[str, Any]) -> None:
    """Add both to the verbs of the command line."""
    compact = verbs.add_parser(
        "compact",
        help="fold journals of dead gateways, merge small files of calls/",
        sections=("store", "capture"),
        examples=["understudy compact store=store"],
    )
    compact.add_argument("words", **words)
    compact.set_defaults(run=_compact)
    forget = verbs.add_parser(
        "forget",
        help="remove a client's calls and tell who learned from them",
        sections=("store", "work", "capture"),
        examples=["understudy forget --client billing-agent store=store", "understudy forget --client-id PSEUDONYM"],
    )
    whose = forget.add_mutually_exclusive_group(required=True)
    whose.add_argument("--client", metavar="NAME", help="the client's own name")
    whose.add_argument("--client-id", metavar="PSEUDONYM", help="its pseudonym, as `understudy calls` shows it")
    forget.add_argument("words", **words)
    forget.set_defaults(run=_forget)


def _compact(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from cluster.access import require_role
    from cluster.store import Store
    from jobs.compact import compact
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    require_role(recipe.store, "curator")
    with tqdm(desc="compact", unit="day", disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folded, counts = compact(Store(recipe.store), recipe.capture, advance)
    print(json.dumps({"journals": folded._asdict(), "calls": counts.model_dump()}, indent=1))


def _forget(options: argparse.Namespace) -> None:
    from cluster.access import Pseudonyms, load_pseudonym_key, require_role
    from cluster.store import Store
    from jobs.compact import fold_journals
    from jobs.forget import forget
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    require_role(recipe.store, "admin")
    client_id = options.client_id or Pseudonyms(load_pseudonym_key(recipe.store)).of("client", options.client)
    store = Store(recipe.store)
    fold_journals(store, recipe.capture)
    done = forget(store, client_id, pathlib.Path(recipe.work) if recipe.work else None)
    print(json.dumps(done.model_dump(mode="json"), indent=1))
    if not (done.calls or done.feedback or done.seen.snapshots):
        # Forgotten all the same: calls may still lie in a journal of another machine.
        raise InputError(
            f"client {options.client or options.client_id!r}: has no calls in this store; it is marked as forgotten; "
            "next: understudy calls count --by client"
        )
