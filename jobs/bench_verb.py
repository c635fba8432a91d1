"""`understudy bench NAME`: which benchmarks there are, and their flags. Each is a file of jobs/bench/.

`all`, `compare` and `results`, which run, compare and publish them, stand in jobs/bench_book_verb.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from cluster.errors import ConfigError
from jobs import bench_book_verb


def add_verb(verbs: Any) -> None:
    """Add `bench` to the verbs of the command line."""
    bench = verbs.add_parser(
        "bench",
        help="reproduce the numbers that jobs/bench/README.md states",
        sections=(),
        examples=["understudy bench train --quick", "understudy bench serve --part rollout --json out/serve.json"],
    )
    names = bench.add_subparsers(dest="bench", required=True)
    bench_book_verb.add_verbs(names)
    curate = names.add_parser(
        "curate",
        help="personal data, throughput and memory of curation, cost and loss of capture",
        sections=(),
        examples=["understudy bench curate --json out/curate.json"],
    )
    curate.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    curate.add_argument(
        "--pii", type=pathlib.Path, nargs="+", default=[], help="files with spans instead of the shared ones"
    )
    curate.add_argument(
        "--calls", type=pathlib.Path, nargs="+", default=[], help="call logs instead of the shared ones"
    )
    curate.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    curate.set_defaults(run=_curate)
    discover = names.add_parser(
        "discover",
        help="sites, topics, stability, routing, usefulness of tasks, choice of a base",
        sections=(),
        examples=["understudy bench discover --without-selection --json out/discover.json"],
    )
    discover.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    discover.add_argument("--calls", type=pathlib.Path, nargs="+", default=[], help="call logs that are scored")
    discover.add_argument("--fit", type=pathlib.Path, nargs="+", default=[], help="call logs that are fitted on")
    discover.add_argument("--encoder", default="hashed", help="hashed, a hub id, or a folder with a sentence encoder")
    discover.add_argument("--without-selection", action="store_true", help="leave out the probes, which need Ray")
    discover.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    discover.set_defaults(run=_discover)
    train = names.add_parser(
        "train",
        help="many adapters in one run, packing, memory, scaling, fleets, kills",
        sections=(),
        examples=["understudy bench train --part packing --json out/train.json"],
    )
    train.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    train.add_argument("--part", nargs="+", default=[], metavar="PART", help="only these; default all")
    train.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    train.set_defaults(run=_train)
    _add_running(names)


def _add_running(names: Any) -> None:
    """The benchmarks that come in parts or in draws."""
    gate = names.add_parser(
        "gate",
        help="whether gates and audits keep their promises; coverage beside an oracle's",
        sections=(),
        examples=["understudy bench gate --json out/gate.json", "understudy bench gate --quick"],
    )
    gate.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    gate.add_argument(
        "--calls", type=pathlib.Path, nargs="+", default=[], help="label sets to draw calibration sets from"
    )
    gate.add_argument(
        "--fit", type=pathlib.Path, nargs="+", default=[], help="files of the same names to fit stand-ins on"
    )
    gate.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    gate.set_defaults(run=_gate)
    serve = names.add_parser(
        "serve",
        help="calls passed on, releases that change under load, faults, graph tax, autoscaling, soak",
        sections=(),
        examples=["understudy bench serve --quick --part rollout"],
    )
    serve.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    part_help = "only these, into a file that may hold the others; default all"
    serve.add_argument("--part", nargs="+", default=[], metavar="PART", help=part_help)
    serve.add_argument("--quick", action="store_true", help="show that it runs; measures nothing")
    serve.set_defaults(run=_serve)


def _curate(options: argparse.Namespace) -> None:
    from jobs.bench.curate import bench_curate

    _check_output(options.json)
    say = functools.partial(print, file=sys.stderr, flush=True)
    _show(bench_curate(options.pii, options.calls, say, options.quick), options)


def _discover(options: argparse.Namespace) -> None:
    from jobs.bench.discover import QUICK_FILES, bench_discover, shared_calls

    _check_output(options.json)
    say = functools.partial(print, file=sys.stderr, flush=True)
    calls = options.calls or shared_calls()
    if options.quick and not options.calls:
        calls = [path for path in calls if path.name.split(".")[0] in QUICK_FILES]
    numbers = bench_discover(calls, options.fit, say, encoder=options.encoder)
    _keeper(options)(numbers)
    if not options.without_selection:
        from cluster.session import connect
        from jobs.bench.selection import measure_selection
        from jobs.bench.usefulness import measure_usefulness

        connect()
        numbers |= measure_selection(say, quick=options.quick) | measure_usefulness(say, quick=options.quick)
    _show(numbers, options)


def _train(options: argparse.Namespace) -> None:
    from jobs.bench.train import PARTS, bench_train

    _check_output(options.json)
    say = functools.partial(print, file=sys.stderr, flush=True)
    _show(bench_train(say, options.part or PARTS, options.quick, _keeper(options)), options)


def _gate(options: argparse.Namespace) -> None:
    from jobs.bench.gate import FULL, QUICK, bench_gate

    _check_output(options.json)
    say = functools.partial(print, file=sys.stderr, flush=True)
    _show(bench_gate(options.fit, options.calls, say, QUICK if options.quick else FULL), options)


def _serve(options: argparse.Namespace) -> None:
    from jobs.bench.serve import PARTS, bench_serve

    _check_output(options.json)
    say = functools.partial(print, file=sys.stderr, flush=True)
    before = _earlier_parts(options) if options.part else {}
    facts = _with_facts({}, options)["provenance"]
    _show(bench_serve(say, options.part or PARTS, options.quick, _keeper(options), before, facts), options)


def _earlier_parts(options: argparse.Namespace) -> dict[str, Any]:
    """The parts of an earlier measurement in the same file, each with the provenance that it has or the file's."""
    path: pathlib.Path | None = options.json
    if path is None or not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text())
        parts = {name: {"provenance": earlier["provenance"], **one} for name, one in earlier["parts"].items()}
        is_alike = earlier["bench"] == options.bench and earlier["quick"] == options.quick
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--json {path}: is there and no measurement; allowed: a new path, or one of this benchmark"
        ) from None
    if not is_alike:
        raise ConfigError(
            f"--json {path}: is of bench {earlier['bench']}, quick {earlier['quick']}; next: another path"
        )
    return parts


def _check_output(path: pathlib.Path | None) -> None:
    """Tell before minutes of work what would lose their result."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"--json {path}: no file can be written there; allowed: a path in a folder that exists")


def _with_facts(numbers: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    from jobs.provenance import provenance

    return {"bench": options.bench, "quick": options.quick, **numbers, "provenance": provenance(sys.argv[1:])}


def _keeper(options: argparse.Namespace) -> Callable[[dict[str, Any]], object]:
    """Writes what there is so far, where it is wanted."""
    path: pathlib.Path | None = options.json

    def keep(numbers: dict[str, Any]) -> None:
        if path is None:
            return
        # Whole or not at all: a benchmark may be ended at any moment.
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(json.dumps(_with_facts(numbers, options), indent=1) + "\n")
        draft.replace(path)

    return keep


def _show(numbers: dict[str, Any], options: argparse.Namespace) -> None:
    print(json.dumps(_with_facts(numbers, options), indent=1))
    _keeper(options)(numbers)
