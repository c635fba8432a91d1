"""`understudy VERB` = `python -m jobs VERB`: what a person types and what `ray job submit` runs.

Exit codes: 0 done, 1 failed run, 2 bad configuration or input. The last line of a conversion is its release.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from cluster.errors import ConfigError, InputError, UnderstudyError


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="understudy", description="LLM traffic in, gated specialists out.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    words = {"nargs": "*", "metavar": "key=value", "help": "recipe=NAME|PATH and overrides such as gate.epsilon=0.02"}
    ingest = verbs.add_parser("ingest", help="read call logs into the store")
    ingest.add_argument("paths", nargs="+", help="*.calls.jsonl[.gz], *.sessions.jsonl[.gz], and key=value words")
    ingest.set_defaults(run=_ingest)
    convert = verbs.add_parser("convert", help="captured calls -> gated specialists -> a release")
    convert.add_argument("words", **words)
    convert.add_argument("--promote", action="store_true", help="serve the release at once")
    convert.add_argument("--report", default="report.html", help="where to write the page with pictures")
    convert.set_defaults(run=_convert)
    release = verbs.add_parser("promote", help="make a release the served one")
    release.add_argument("release")
    release.add_argument("words", **words)
    release.set_defaults(run=_promote)
    back = verbs.add_parser("rollback", help="serve the release that was served before")
    back.add_argument("words", **words)
    back.set_defaults(run=_roll_back)
    demo = verbs.add_parser("demo", help="the whole journey on this machine with a scripted LLM")
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


def _ingest(options: argparse.Namespace) -> None:
    from cluster.access import Pseudonyms, load_pseudonym_key
    from cluster.store import Store
    from jobs.ingest import ingest
    from jobs.recipe import load_recipe

    words = [word for word in options.paths if "=" in word]
    recipe = load_recipe(words)
    paths = [pathlib.Path(word) for word in options.paths if "=" not in word]
    counts = ingest(Store(recipe.store), paths, Pseudonyms(load_pseudonym_key(recipe.store)))
    print(json.dumps(counts.model_dump(mode="json"), indent=1))


def _convert(options: argparse.Namespace) -> None:
    from cluster.registry import promote
    from cluster.session import connect
    from cluster.store import Store
    from jobs.convert import convert, write_conversion_report
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.words)
    connect()
    conversion = convert(recipe)
    if options.promote:
        promote(Store(recipe.store), conversion.release)
    report = pathlib.Path(options.report)
    write_conversion_report(report, conversion, None, [])
    print(f"report: {report}")
    print(f"{recipe.store}/releases/{conversion.release}.json")


def _promote(options: argparse.Namespace) -> None:
    from cluster.registry import promote
    from cluster.store import Store
    from jobs.recipe import load_recipe

    promote(Store(load_recipe(options.words).store), options.release)


def _roll_back(options: argparse.Namespace) -> None:
    from cluster.registry import roll_back
    from cluster.store import Store
    from jobs.recipe import load_recipe

    print(roll_back(Store(load_recipe(options.words).store)))


def _demo(options: argparse.Namespace) -> None:
    from jobs.demo.run import run_demo

    run_demo(options.out, options.words, options.summary, options.provider)


if __name__ == "__main__":
    sys.exit(main())
