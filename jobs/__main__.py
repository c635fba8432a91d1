"""`understudy VERB` = `python -m jobs VERB`: what a person types and what `ray job submit` runs.

Exit codes: 0 done, 1 failed run, 2 bad configuration or input. The last line of a conversion is its release.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING, Any, get_args

from cluster.access import Role
from cluster.errors import ConfigError, InputError, UnderstudyError
from jobs import bench_verb, calls_verb, catalog, ingest_verb, plan_verb, refine_verb, release_verb, tasks, upkeep_verb

if TYPE_CHECKING:
    from cluster.store import Store
    from jobs.convert import Conversion


def main(arguments: list[str] | None = None) -> int:
    """Run one verb."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ConfigError, InputError) as error:
        print(f"understudy {options.verb}: {error}", file=sys.stderr)
        return 2
    except UnderstudyError as error:
        print(f"understudy {options.verb}: {error}", file=sys.stderr)
        return 1
    return 0


class _Verb(argparse.ArgumentParser):
    """A verb whose --help ends with the recipe's fields that it reads; all but `sections` stay out."""

    def __init__(self, *args: Any, sections: tuple[str, ...] = ("store",), **options: Any) -> None:
        super().__init__(*args, **options)
        self._sections = sections
        self._is_intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take words and flags in any order; argparse by itself takes words in one place only."""
        if self._is_intermixed or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._is_intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixed = False

    def format_help(self) -> str:
        from jobs.recipe import describe_recipe

        return f"{super().format_help()}\n{describe_recipe(self._sections)}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="understudy", description="LLM traffic in, gated specialists out.")
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Verb)
    words = {"nargs": "*", "metavar": "key=value", "help": "recipe=NAME|PATH and overrides such as gate.epsilon=0.02"}
    ingest_verb.add_verb(verbs)
    calls_verb.add_verb(verbs)
    upkeep_verb.add_verbs(verbs, words)
    tasks.add_verb(verbs)
    catalog.add_verb(verbs)
    bench_verb.add_verb(verbs)
    stages = ("store", "work", "curate", "discover", "select", "pretrain", "finetune", "fleet", "gate", "specialists")
    stages += ("gateway.max_temperature", "faces", "limits")
    convert = verbs.add_parser("convert", help="captured calls -> gated specialists -> a release", sections=stages)
    convert.add_argument("words", **words)
    convert.add_argument("--promote", action="store_true", help="serve the release at once")
    convert.add_argument("--report", type=pathlib.Path, help="write the page with pictures here too")
    convert.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the resources; no Ray")
    convert.set_defaults(run=_convert)
    refine_verb.add_verb(verbs, stages)
    plan_verb.add_verb(verbs, words, stages)
    parts = ("store", "upstream", "gateway", "capture", "audit", "faces", "specialists", "steward", "prices", "serve")
    parts += ("limits",)
    serve = verbs.add_parser(
        "serve", help="run the endpoint until Ctrl-C: specialists first, else the LLM", sections=parts
    )
    serve.add_argument("words", **words)
    serve.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the resources; no Ray")
    serve.add_argument(
        "--print-config", action="store_true", help="print what `serve deploy` and a RayService take instead; no Ray"
    )
    serve.set_defaults(run=_serve)
    promoted = verbs.add_parser("promote", help="make a release the served one; see also release promote --stage")
    promoted.add_argument("release")
    promoted.add_argument("words", **words)
    promoted.set_defaults(run=_promote)
    back = verbs.add_parser("rollback", help="serve the release that was served before")
    back.add_argument("words", **words)
    back.set_defaults(run=_roll_back)
    release_verb.add_verb(verbs, words, _Verb)
    _add_keys(verbs, words)
    demo = verbs.add_parser(
        "demo", help="the whole journey on this machine with a scripted LLM", sections=(*stages, "prices")
    )
    demo.add_argument("words", **words)
    demo.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/demo"))
    demo.add_argument("--summary", type=pathlib.Path, help="also write the machine-readable summary here")
    demo.add_argument(
        "--provider",
        choices=("scripted", "env"),
        default="scripted",
        help="who plays the LLM: a scripted server, or the provider that OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL "
        "and OPENAI_USD_PER_MILLION describe, after printing what it will cost",
    )
    demo.set_defaults(run=_demo)
    return parser


def _add_keys(verbs: Any, words: dict[str, Any]) -> None:
    keys = verbs.add_parser("keys", help="make, list and revoke API keys of the endpoint")
    actions = keys.add_subparsers(dest="action", required=True, parser_class=_Verb)
    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("--client", metavar="NAME", help="who holds it, such as billing-agent")
    create.add_argument(
        "--role", choices=get_args(Role), help="agent calls models, viewer counts, curator reads (default agent)"
    )
    create.add_argument(
        "--rate-per-minute", type=int, metavar="N", help="requests a minute at each gateway replica (default no limit)"
    )
    create.add_argument("--days", type=int, metavar="N", help="how long it is valid (default for ever)")
    create.add_argument("words", **{**words, "help": "store=...; NAME and role=ROLE serve for --client and --role"})
    create.set_defaults(run=_create_key)
    known = actions.add_parser("list", help="whose keys there are, with their ids")
    known.add_argument("words", **words)
    known.set_defaults(run=_list_keys)
    revoke = actions.add_parser("revoke", help="remove all keys of one holder, or one key by its id")
    revoke.add_argument("name", metavar="NAME|KEY_ID")
    revoke.add_argument("words", **words)
    revoke.set_defaults(run=_revoke_keys)
    rotate = actions.add_parser("rotate", help="wrap all content with a new version of the master key")
    rotate.add_argument("words", **words)
    rotate.set_defaults(run=_rotate_key)
    retire = actions.add_parser("retire", help="forget the master key's older versions, 20 minutes after a rotation")
    retire.add_argument("words", **words)
    retire.set_defaults(run=_retire_key)


def _convert(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.registry import promote
    from cluster.store import Store
    from jobs.convert import convert
    from jobs.plan import check_here, connect_for, plan_conversion, show_plan
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    plan = plan_conversion(recipe)
    require_role(recipe.store, "admin" if options.promote else "curator")
    _check_output("--report", options.report)
    if options.dry_run:
        print(json.dumps(show_plan(recipe, plan), indent=1))
        return check_here(plan, recipe)
    connect_for(plan, recipe)
    conversion = convert(recipe)
    if options.promote:
        promote(Store(recipe.store), conversion.release)
    print(f"report: {_save_report(Store(recipe.store), conversion, options.report)}")
    print(f"{recipe.store}/releases/{conversion.release}.json", flush=True)


def _check_output(option: str, path: pathlib.Path | None) -> None:
    """Tell before a run what would stop its last line. Creates nothing.

    Raises:
        ConfigError: no file can be written at `path`.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; allowed: the path of a file; next: {option} {path}/NAME")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ConfigError(f"{option} {path}: {folder} {what}; allowed: a file in a folder that you can write to")


def _save_report(store: Store, conversion: Conversion, copy: pathlib.Path | None) -> str:
    """Write the report beside the release, as a page and as JSON, where it outlives a cluster's job; and to `copy`."""
    from jobs.convert import write_conversion_report

    store.write_json(f"releases/{conversion.release}.report.json", conversion.model_dump(mode="json"))
    path = f"releases/{conversion.release}.report.html"
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder) / "report.html"
        write_conversion_report(page, conversion, None, [])
        store.write_bytes(path, page.read_bytes())
        if copy:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page, copy)
    return f"{store.uri}/{path}"


def _serve(options: argparse.Namespace) -> None:
    from jobs.plan import check_here, plan_serving, show_plan
    from jobs.recipe import load_recipe
    from jobs.serve import count_bases, name_upstream, resolve_upstream, serve, serve_config

    if options.print_config:
        import yaml

        config = serve_config(name_upstream(load_recipe(options.words)))
        return print(yaml.safe_dump(config, sort_keys=False, width=120), end="")
    recipe = resolve_upstream(load_recipe(options.words))
    plan = plan_serving(recipe, count_bases(recipe.store))
    if options.dry_run:
        print(json.dumps(show_plan(recipe, plan), indent=1))
        return check_here(plan, recipe)
    serve(recipe, plan)


def _promote(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.registry import promote
    from cluster.store import Store
    from jobs.recipe import load_recipe

    store = load_recipe(options.words).store
    require_role(store, "admin")
    promote(Store(store), options.release)


def _roll_back(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.registry import roll_back
    from cluster.store import Store
    from jobs.recipe import load_recipe

    store = load_recipe(options.words).store
    require_role(store, "admin")
    print(roll_back(Store(store)))


def _create_key(options: argparse.Namespace) -> None:
    from jobs.keys import create_key

    facts = {"role": options.role, "rate_per_minute": options.rate_per_minute, "days": options.days}
    key = create_key(options.client, options.words, **facts)
    print("The key is stored hashed and shown only here; an agent sends it as its api_key.", file=sys.stderr)
    print(key)


def _list_keys(options: argparse.Namespace) -> None:
    from jobs.keys import list_keys

    for line in list_keys(options.words):
        print(line)


def _revoke_keys(options: argparse.Namespace) -> None:
    from jobs.keys import revoke_keys

    print(f"revoked: {revoke_keys(options.name, options.words)}")


def _rotate_key(options: argparse.Namespace) -> None:
    from jobs.rotate import open_for_rotation, rotate

    store, _ = open_for_rotation(options.words)
    print(json.dumps(rotate(store).model_dump()))


def _retire_key(options: argparse.Namespace) -> None:
    from jobs.rotate import open_for_rotation, retire

    print(f"only version {retire(*open_for_rotation(options.words))} is left")


def _demo(options: argparse.Namespace) -> None:
    from jobs.demo.run import run_demo
    from jobs.plan import check_here, plan_conversion
    from jobs.recipe import load_recipe

    _check_output("--summary", options.summary)
    recipe = load_recipe(["recipe=demo", *options.words])
    check_here(plan_conversion(recipe), recipe)
    run_demo(options.out, options.words, options.summary, options.provider)


if __name__ == "__main__":
    sys.exit(main())
