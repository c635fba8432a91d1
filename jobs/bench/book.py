"""`understudy bench all`: every benchmark after the other, each in a process of its own, into one JSON and one table.

A part writes its own JSON as it goes, and the book is written after each part: one that fails, or takes longer than its
limit, loses nothing and the others go on, with what went wrong beside what there is. CPU seconds are those of all of
a part's processes. With --quick the parts show that they run and measure nothing; together they have half an hour.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import InputError
from jobs.bench.figures import Pair, Spread, coverage_of, describe, pairs, spread
from jobs.bench.processes import Watched, module, watch

PARTS = ("curate", "discover", "train", "serve", "gate")
QUICK_LIMITS_S = {"curate": 200, "discover": 180, "train": 520, "serve": 700, "gate": 140}
"""Together 29 minutes, with which half an hour is kept whatever hangs; what a part leaves over, those after it may use."""
BOOK = "book.json"
_TAIL_CHARS = 1_500
_ADDRESS = re.compile(r"\b[\w.-]+://\S+")

Run = Callable[[Sequence[str], pathlib.Path, float | None], Watched]


def write_book(
    names: Sequence[str],
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    say: Callable[[str], object],
    *,
    quick: bool = False,
    repeat: int = 1,
    run: Run = watch,
) -> dict[str, Any]:
    """Measure the parts named and write the book after each.

    Args:
        folder: gets NAME-REPETITION.json and .log of every part, and book.json.
        facts: provenance, written as it is.
        repeat: how often each part is run; rounds go over all parts, so that a slow hour falls on all of them.
        run: what runs a command; a test's own.

    Returns:
        {bench, quick, repeat, provenance, parts: {NAME: {runs, numbers, error}}}; see `_part_of`.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    left_s = 0.0
    book: dict[str, Any] = {}
    for number in range(1, repeat + 1):
        for name in names:
            say(f"-- {name}, {number} of {repeat}; its words go to {folder / f'{name}-{number}.log'}")
            limit_s = QUICK_LIMITS_S[name] + left_s if quick else None
            runs[name].append(_run_part(name, number, folder, limit_s, run))
            left_s = limit_s - runs[name][-1]["wall_s"] if limit_s else 0.0
            book = {"bench": "all", "quick": quick, "repeat": repeat, "provenance": dict(facts)}
            book["parts"] = {part: _part_of(folder, own) for part, own in runs.items() if own}
            (folder / BOOK).write_text(json.dumps(book, indent=1) + "\n")
            say(f"{name}: {_told(runs[name][-1])}")
    return book


def _run_part(name: str, number: int, folder: pathlib.Path, limit_s: float | None, run: Run) -> dict[str, Any]:
    """Run a part once, --quick where it has a limit."""
    path, log = (folder / f"{name}-{number}.{ending}" for ending in ("json", "log"))
    path.unlink(missing_ok=True)
    command = module("jobs", "bench", name, "--json", str(path.absolute()), *(["--quick"] if limit_s else []))
    done = run(command, log, limit_s)
    error = None
    if done.timed_out:
        error = f"took more than {limit_s:.0f} s and was ended; what it had measured by then is kept"
    elif done.status:
        tail = _ADDRESS.sub("ADDRESS", log.read_text(errors="replace")[-_TAIL_CHARS:])
        error = f"ended with status {done.status}: {tail}"
    elif not path.exists():
        error = "ended without its JSON"
    file = path.name if path.exists() else None
    if file and not _is_json(path):
        # Ended in the middle of writing it.
        file, error = None, f"{error or 'ended'}; its JSON is not whole"
    return {"file": file, "wall_s": round(done.wall_s, 1), "cpu_s": round(done.cpu_s, 1), "error": error}


def _is_json(path: pathlib.Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


def _part_of(folder: pathlib.Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One part over its repetitions: numbers as [median, low, high, repetitions], and the runs with their errors."""
    found = [json.loads((folder / one["file"]).read_text()) for one in runs if one["file"]]
    times = [{"wall_s": one["wall_s"], "cpu_s": one["cpu_s"]} for one in runs]
    numbers = spread([*found]) | spread(times)
    return {"runs": [dict(one) for one in runs], "numbers": {name: list(value) for name, value in numbers.items()}}


def read_numbers(measured: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    """Part -> its numbers, of a book or of one benchmark's own JSON.

    Raises:
        InputError: it is neither.
    """
    if measured.get("bench") == "all":
        return {
            part: {name: Spread(*value) for name, value in one["numbers"].items()}
            for part, one in measured["parts"].items()
        }
    if measured.get("bench") in PARTS:
        return {str(measured["bench"]): spread([measured])}
    raise InputError(
        f"bench={measured.get('bench')!r}: no such measurement; allowed: all, {', '.join(PARTS)}; next: understudy bench "
        "all --quick"
    )


def rows_of(book: Mapping[str, Any]) -> list[list[str]]:
    """One row for each part: how it ended, and its times."""
    numbers = read_numbers(book)
    rows = []
    for part, one in book["parts"].items():
        errors = [run["error"].splitlines()[-1] for run in one["runs"] if run["error"]]
        times = [describe(numbers[part][key]) for key in ("wall_s", "cpu_s")]
        rows.append([part, "; ".join(errors) if errors else "done", *times])
    return rows


def peer_rows(book: Mapping[str, Any]) -> list[list[str]]:
    """One row for each number that a peer has too."""
    return [
        [part, pair.what, describe(pair.ours), describe(pair.peer), pair.peer_name, _ratio(pair)]
        for part, numbers in read_numbers(book).items()
        for pair in pairs(part, numbers)
    ]


PART_HEADER = ("part", "ended", "wall s", "CPU s")
PEER_HEADER = ("part", "what", "ours", "peer's", "peer", "how many times better")


def interval_note(book: Mapping[str, Any]) -> str:
    """What the intervals of a book are."""
    repeat = int(book.get("repeat", 1))
    if repeat < 2:
        return "One repetition: no intervals."
    return (
        f"Medians of {repeat} repetitions, with the smallest and the largest, which hold the true median with probability "
        f"{coverage_of(repeat):.1%}."
    )


def _ratio(pair: Pair) -> str:
    over, under = (pair.ours, pair.peer) if pair.more_is_better else (pair.peer, pair.ours)
    return f"{over.median / under.median:.2f}" if under.median else "-"


def _told(run: Mapping[str, Any]) -> str:
    times = f"{run['wall_s']:.0f} s, {run['cpu_s']:.0f} CPU s"
    return f"{times}; {run['error'].splitlines()[-1]}" if run["error"] else times
