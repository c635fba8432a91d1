"""`understudy bench all | compare | results`: their flags, and what they print. What is measured is a benchmark's own affair."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

from cluster.errors import ConfigError, InputError

PARTS = ("curate", "discover", "train", "serve", "gate")


def add_verbs(names: Any) -> None:
    """Add them before the benchmarks they are about."""
    everything = names.add_parser(
        "all",
        help="every benchmark beside its peers, into one JSON and one table",
        sections=(),
        examples=[
            "understudy bench all --quick",
            "understudy bench all --part gate discover --repeat 5 --out out/bench --results RESULTS.md",
        ],
    )
    everything.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these; default all")
    everything.add_argument(
        "--quick", action="store_true", help="show that they run, in half an hour; measures nothing"
    )
    everything.add_argument("--repeat", type=int, default=1, metavar="N", help="repetitions, for medians and intervals")
    everything.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("out/bench"),
        help="folder of JSON and logs (default out/bench)",
    )
    everything.add_argument(
        "--results", type=pathlib.Path, metavar="PATH", help="write RESULTS.md, with this run in it"
    )
    everything.set_defaults(run=_all)
    compare = names.add_parser(
        "compare",
        help="two measurements beside each other: ratios, and what differs beyond its interval",
        sections=(),
        examples=["understudy bench compare before.json after.json"],
    )
    compare.add_argument("before", type=pathlib.Path)
    compare.add_argument("after", type=pathlib.Path)
    compare.add_argument("--across-machines", action="store_true", help="compare though the hardware is not the same")
    compare.set_defaults(run=_compare)
    results = names.add_parser(
        "results",
        help="RESULTS.md from the committed measurements",
        sections=(),
        examples=["understudy bench results", "understudy bench results --out out/RESULTS.md"],
    )
    results.add_argument("--out", type=pathlib.Path, default=pathlib.Path("RESULTS.md"), help="default RESULTS.md")
    results.set_defaults(run=_results)


def _all(options: argparse.Namespace) -> int:
    from jobs.bench.book import BOOK, PART_HEADER, PEER_HEADER, interval_note, peer_rows, rows_of, write_book
    from jobs.bench.results import FOLDER, write_results
    from jobs.provenance import provenance
    from jobs.tables import show_table

    if options.repeat < 1:
        raise ConfigError(f"--repeat {options.repeat}: allowed: 1 or more")
    if options.results and not options.results.absolute().parent.is_dir():
        raise ConfigError(
            f"--results {options.results}: its folder is not there; allowed: a path in a folder that exists"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    say = functools.partial(print, file=sys.stderr, flush=True)
    facts = provenance(sys.argv[1:])
    book = write_book(options.part, options.out, facts, say, quick=options.quick, repeat=options.repeat)
    show_table(PART_HEADER, rows_of(book), sys.stdout)
    if peers := peer_rows(book):
        print()
        show_table(PEER_HEADER, peers, sys.stdout)
    print(interval_note(book))
    if options.results:
        committed = FOLDER / f"all{'-quick' if options.quick else ''}.json"
        committed.write_text((options.out / BOOK).read_text())
        options.results.write_text(write_results(FOLDER))
    print(options.out / BOOK)
    return int(any(run["error"] for one in book["parts"].values() for run in one["runs"]))


def _compare(options: argparse.Namespace) -> None:
    from jobs.bench.book import read_numbers
    from jobs.bench.figures import compare, describe
    from jobs.tables import show_table

    before, after = (_read(path) for path in (options.before, options.after))
    machines = [one.get("provenance", {}).get("hardware") for one in (before, after)]
    if machines[0] != machines[1]:
        said = f"{options.before} is of {machines[0]}, {options.after} of {machines[1]}"
        if not options.across_machines:
            raise InputError(
                f"{said}: speeds of two machines say nothing of the code; allowed: the same hardware; next: measure both on "
                "one machine, or --across-machines to read them for what they are"
            )
        print(f"NOT THE SAME HARDWARE: {said}")
    if before.get("quick") or after.get("quick"):
        print("QUICK: shows that it runs; these numbers measure nothing")
    rows, alone = [], []
    numbers = [read_numbers(one) for one in (before, after)]
    for part in dict.fromkeys([*numbers[0], *numbers[1]]):
        both, rest = compare(*(one.get(part, {}) for one in numbers))
        alone += [f"{part}.{name}" for name in rest]
        for one in both:
            ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
            rows.append([part, one.name, describe(one.before), describe(one.after), ratio, one.verdict])
    order = {"differs": 0, "no interval": 1, "within": 2, "equal": 3}
    rows.sort(key=lambda row: order[row[-1]])
    show_table(("part", "number", "before", "after", "after / before", "verdict"), rows, sys.stdout)
    counts = {verdict: sum(row[-1] == verdict for row in rows) for verdict in order}
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + f"; {len(alone)} in one file alone")


def _results(options: argparse.Namespace) -> None:
    from jobs.bench.results import FOLDER, write_results

    if not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out}: its folder is not there; allowed: a path in a folder that exists")
    options.out.write_text(write_results(FOLDER))
    print(options.out)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({type(error).__name__}); allowed: what `understudy bench` writes"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: no measurement; allowed: what `understudy bench` writes")
    return found
