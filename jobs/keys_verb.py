"""`understudy keys ACTION`: its flags and what it prints. Knows nothing of how keys rest (jobs/keys.py, jobs/rotate.py do)."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, get_args

from cluster.access import Role


def add_verb(verbs: Any, words: dict[str, Any], verb_class: Any) -> None:
    """Add `keys` and its actions to the verbs of the command line."""
    keys = verbs.add_parser(
        "keys",
        help="make, list and revoke API keys of the endpoint; rotate the content key",
        examples=["understudy keys create --role agent --client my-agent", "understudy keys list"],
    )
    actions = keys.add_subparsers(dest="action", required=True, parser_class=verb_class)

    def add(name: str, run: Any, meaning: str, *examples: str) -> Any:
        action = actions.add_parser(name, help=meaning, examples=[f"understudy keys {one}" for one in examples])
        action.set_defaults(run=run)
        return action

    create = add(
        *("create", _create, "make a key and print it, once"),
        "create --role agent --client my-agent store=store",
        "create --role viewer --client ann --days 30 --rate-per-minute 600 store=store",
    )
    create.add_argument("--client", metavar="NAME", help="who holds it, such as billing-agent")
    create.add_argument(
        "--role", choices=get_args(Role), help="agent calls models, viewer counts, curator reads (default agent)"
    )
    create.add_argument(
        "--rate-per-minute", type=int, metavar="N", help="requests a minute at each gateway replica (default no limit)"
    )
    create.add_argument("--days", type=int, metavar="N", help="how long it is valid (default for ever)")
    create.add_argument("words", **{**words, "help": "store=...; NAME and role=ROLE serve for --client and --role"})
    known = add("list", _list, "whose keys there are, with their ids", "list store=store", "list --json store=store")
    known.add_argument("--json", action="store_true", help="print JSON")
    revoke = add(
        "revoke", _revoke, "remove all keys of one holder, or one key by its id", "revoke my-agent store=store"
    )
    revoke.add_argument("name", metavar="NAME|KEY_ID")
    rotate = add("rotate", _rotate, "wrap all content with a new version of the master key", "rotate store=store")
    retire = add(
        *("retire", _retire, "forget the master key's older versions, 20 minutes after a rotation"),
        "retire store=store",
    )
    for action in (known, revoke, rotate, retire):
        action.add_argument("words", **words)


def _create(options: argparse.Namespace) -> None:
    from jobs.keys import create_key

    facts = {"role": options.role, "rate_per_minute": options.rate_per_minute, "days": options.days}
    key = create_key(options.client, options.words, **facts)
    print("The key is stored hashed and shown only here; an agent sends it as its api_key.", file=sys.stderr)
    print(key)


def _list(options: argparse.Namespace) -> None:
    from jobs.keys import list_keys, read_holders

    if options.json:
        print(json.dumps([one.model_dump() for one in read_holders(options.words)], indent=1))
        return
    for line in list_keys(options.words):
        print(line)


def _revoke(options: argparse.Namespace) -> None:
    from jobs.keys import revoke_keys

    print(f"revoked: {revoke_keys(options.name, options.words)}")


def _rotate(options: argparse.Namespace) -> None:
    from jobs.rotate import open_for_rotation, rotate

    store, _ = open_for_rotation(options.words)
    print(json.dumps(rotate(store).model_dump()))


def _retire(options: argparse.Namespace) -> None:
    from jobs.rotate import open_for_rotation, retire

    print(f"only version {retire(*open_for_rotation(options.words))} is left")
