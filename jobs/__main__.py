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
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, InputError, UnderstudyError
from jobs import (
    assess_verb,
    bench_verb,
    calls_verb,
    catalog,
    completion_verb,
    doctor_verb,
    ingest_verb,
    keys_verb,
    plan_verb,
    refine_verb,
    release_verb,
    sbom,
    scale_verb,
    submit,
    tasks_verb,
    upkeep_verb,
)

if TYPE_CHECKING:
    from cluster.store import Store
    from jobs.convert import Conversion


_PIPE_CLOSED = 141
"""What a shell says of a process that SIGPIPE ended."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb."""
    options = build_parser().parse_args(arguments)
    try:
        code = options.run(options)
    except (ConfigError, InputError) as error:
        print(f"understudy {options.verb}: {error}", file=sys.stderr)
        return 2
    except UnderstudyError as error:
        print(f"understudy {options.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `understudy ... | head` has read enough; what Python flushes at its end would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return code or 0


class _Verb(argparse.ArgumentParser):
    """A verb whose --help ends with examples, and with the recipe's fields that it reads; all but `sections` stay out."""

    def __init__(self, *args: Any, sections: tuple[str, ...] = ("store",), examples: list[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = examples
        """Whole command lines; a test sees that each parses."""
        self.sections = sections
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

        examples = "\n".join(f"  {one}" for one in self.examples)
        fields = f"\n{describe_recipe(self.sections)}\n" if self.sections else ""
        return f"{super().format_help()}\nexamples:\n{examples}\n{fields}"


def build_parser() -> argparse.ArgumentParser:
    """The command line: verbs in the order of the journey."""
    parser = argparse.ArgumentParser(
        prog="understudy",
        description="LLM traffic in, gated specialists out. The verbs stand in the order of the journey.",
        epilog="understudy VERB --help shows examples and the recipe's fields; start with `understudy doctor`.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Verb)
    words = {"nargs": "*", "metavar": "key=value", "help": "recipe=NAME|PATH and overrides such as gate.epsilon=0.02"}
    stages = ("store", "work", "curate", "discover", "select", "pretrain", "finetune", "fleet", "gate", "specialists")
    stages += ("gateway.max_temperature", "faces", "limits", "evaluation", "prices")
    doctor_verb.add_verb(verbs, words)
    _add_demo(verbs, words, stages)
    keys_verb.add_verb(verbs, words, _Verb)
    _add_serve(verbs, words)
    ingest_verb.add_verb(verbs)
    calls_verb.add_verb(verbs)
    assess_verb.add_verb(verbs)
    catalog.add_verb(verbs)
    plan_verb.add_verb(verbs, words, stages)
    _add_convert(verbs, words, stages)
    tasks_verb.add_verb(verbs)
    release_verb.add_verb(verbs, words, _Verb)
    _add_changes(verbs, words)
    refine_verb.add_verb(verbs, stages)
    upkeep_verb.add_verbs(verbs, words)
    bench_verb.add_verb(verbs)
    scale_verb.add_verb(verbs, words, (*stages, "prices"))
    sbom.add_verb(verbs)
    completion_verb.add_verb(verbs, build_parser)
    return parser


def _add_convert(verbs: Any, words: dict[str, Any], stages: tuple[str, ...]) -> None:
    convert = verbs.add_parser(
        "convert",
        help="captured calls -> gated specialists -> a release",
        sections=(*stages, "rollout"),
        examples=[
            "understudy convert --dry-run recipe=local store=store",
            "understudy convert recipe=local store=store --promote --report out/report.html",
            "understudy convert --address http://127.0.0.1:8265 --working-dir . recipe=local store=/shared/store",
        ],
    )
    convert.add_argument("words", **words)
    convert.add_argument(
        "--promote", action="store_true", help="serve the release, its new specialists from rollout.start on"
    )
    convert.add_argument("--report", type=pathlib.Path, help="write the page with pictures here too")
    convert.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the resources; no Ray")
    submit.add_flags(convert)
    convert.set_defaults(run=_convert)


def _add_serve(verbs: Any, words: dict[str, Any]) -> None:
    parts = ("store", "upstream", "gateway", "capture", "audit", "faces", "specialists", "steward", "prices", "serve")
    serve = verbs.add_parser(
        "serve",
        help="run the endpoint until Ctrl-C: specialists first, else the LLM",
        sections=(*parts, "limits"),
        examples=[
            "understudy serve store=store upstream.0.base_url=https://api.openai.com/v1",
            "understudy serve --dry-run recipe=my.toml",
            "understudy serve --print-config recipe=my.toml",
            "understudy serve --address http://127.0.0.1:8265 recipe=my.toml store=/shared/store",
        ],
    )
    serve.add_argument("words", **words)
    serve.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the resources; no Ray")
    serve.add_argument(
        "--print-config", action="store_true", help="print what `serve deploy` and a RayService take instead; no Ray"
    )
    submit.add_flags(serve)
    serve.set_defaults(run=_serve)


def _add_changes(verbs: Any, words: dict[str, Any]) -> None:
    promoted = verbs.add_parser(
        "promote",
        help="serve a release, its new specialists from rollout.start on; see also release promote --stage",
        sections=("store", "rollout"),
        examples=["understudy promote SHA store=store", "understudy promote SHA store=store rollout.start=live"],
    )
    promoted.add_argument("release")
    promoted.add_argument("words", **words)
    promoted.set_defaults(run=_promote)
    back = verbs.add_parser(
        "rollback", help="serve the release that was served before", examples=["understudy rollback store=store"]
    )
    back.add_argument("words", **words)
    back.set_defaults(run=_roll_back)


def _add_demo(verbs: Any, words: dict[str, Any], sections: tuple[str, ...]) -> None:
    demo = verbs.add_parser(
        "demo",
        help="the whole journey on this machine with a scripted LLM",
        sections=sections,
        examples=[
            "understudy demo --out out/demo",
            "understudy demo --provider env --summary out/summary.json gate.epsilon=0.05",
        ],
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


def _convert(options: argparse.Namespace) -> int | None:
    if options.address:
        flags = ["--promote"] if options.promote else []
        if options.report:
            raise ConfigError("--report: with --address no file is written here; the report stands beside the release")
        return submit.submit("convert", options.words, flags, options)
    submit.check_flags(options)
    from cluster.access import require_role
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
        check_here(plan, recipe)
        return None
    connect_for(plan, recipe)
    conversion = convert(recipe)
    if options.promote:
        release_verb.serve_release(Store(recipe.store), conversion.release, recipe.rollout)
    _show_moved(conversion)
    print(f"report: {_save_report(Store(recipe.store), conversion, options.report)}")
    print(f"{recipe.store}/releases/{conversion.release}.json", flush=True)
    return None


def _show_moved(conversion: Conversion) -> None:
    """What moves, and how replaceable each agent is, as the report has it."""
    if conversion.moved is None:
        return
    from jobs.tables import show_table
    from training.arm_tables import moved_tables

    for table in moved_tables(conversion.moved):
        print(f"{table.caption}:")
        show_table(table.header, table.rows, sys.stdout)


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


def _serve(options: argparse.Namespace) -> int | None:
    if options.address:
        return _submit_serve(options)
    submit.check_flags(options)
    from jobs.plan import check_here, plan_serving, show_plan
    from jobs.recipe import load_recipe
    from jobs.serve import count_bases, name_upstream, resolve_upstream, serve, serve_config, show_room

    if options.print_config:
        import yaml

        config = serve_config(name_upstream(load_recipe(options.words)))
        print(yaml.safe_dump(config, sort_keys=False, width=120), end="")
        return None
    recipe = resolve_upstream(load_recipe(options.words))
    plan = plan_serving(recipe, count_bases(recipe.store))
    if options.dry_run:
        print(json.dumps({**show_plan(recipe, plan), "adapters": show_room(recipe)}, indent=1))
        check_here(plan, recipe)
        return None
    serve(recipe, plan)
    return None


def _submit_serve(options: argparse.Namespace) -> int:
    """The endpoint as a job: its LLM may be named by this machine's environment, its key must be in the nodes'."""
    from jobs.recipe import load_recipe
    from jobs.serve import name_upstream

    if options.print_config:
        raise ConfigError("--print-config: submits nothing; next: leave --address out")
    recipe = load_recipe(options.words)
    named = name_upstream(recipe).upstream
    words = [] if recipe.upstream else [f"upstream.0.base_url={named[0].base_url}"]
    return submit.submit("serve", [*options.words, *words], [], options)


def _promote(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.store import Store
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    require_role(recipe.store, "admin")
    release_verb.serve_release(Store(recipe.store), options.release, recipe.rollout)


def _roll_back(options: argparse.Namespace) -> None:
    from cluster.access import require_role
    from cluster.registry import roll_back
    from cluster.store import Store
    from jobs.recipe import load_recipe

    store = load_recipe(options.words).store
    require_role(store, "admin")
    print(roll_back(Store(store)))


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
