"""`understudy bench NAME`: which benchmarks there are, and their flags. Each is a file of jobs/bench/."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from cluster.errors import ConfigError


def add_verb(verbs: Any) -> None:
    """Add `bench` to the verbs of the command line."""
    bench = verbs.add_parser("bench", help="reproduce the numbers that the README states", sections=())
    names = bench.add_subparsers(dest="bench", required=True)
    curate = names.add_parser(
        "curate", help="personal data, throughput and memory of curation, cost and loss of capture"
    )
    curate.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers here too")
    curate.add_argument(
        "--pii", type=pathlib.Path, nargs="+", default=[], help="files with spans instead of the shared ones"
    )
    curate.add_argument(
        "--calls", type=pathlib.Path, nargs="+", default=[], help="call logs instead of the shared ones"
    )
    curate.set_defaults(run=_curate)


def _curate(options: argparse.Namespace) -> None:
    from jobs.bench.curate import bench_curate

    _check_output(options.json)
    _show(bench_curate(options.pii, options.calls), options.json)


def _check_output(path: pathlib.Path | None) -> None:
    """Tell before minutes of work what would lose their result."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"--json {path}: no file can be written there; allowed: a path in a folder that exists")


def _show(numbers: dict[str, Any], path: pathlib.Path | None) -> None:
    text = json.dumps(numbers, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
