"""The book of benchmarks: one part that fails loses nothing, numbers keep their intervals, and RESULTS.md is what the JSON says."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest

from cluster.errors import InputError
from jobs.__main__ import main
from jobs.bench import book, results
from jobs.bench.book import peer_rows, read_numbers, rows_of, write_book
from jobs.bench.figures import Compared, Spread, compare, flatten, spread
from jobs.bench.processes import Watched, watch
from jobs.scale.laws import Interval, Law

ROOT = pathlib.Path(__file__).parents[2]
HARDWARE = {"processor": "P", "cores": 2, "memory_gib": 4.0}
FACTS = {"command": "understudy bench all", "git_sha": "f" * 40, "date": "2026-01-01", "hardware": HARDWARE}


def test_a_part_that_fails_keeps_what_it_had_and_the_others_go_on(tmp_path: pathlib.Path) -> None:
    seen = []

    def run(command, log: pathlib.Path, limit_s: float | None) -> Watched:
        name, path = command[4], pathlib.Path(command[command.index("--json") + 1])
        seen.append((name, "--quick" in command, limit_s))
        log.write_text("ValueError: at https://host/x: no luck")
        if name != "train":
            path.write_text(json.dumps({"bench": name, "coverage": {"a": {"ours": 0.5, "tracer": 0.4}}}))
        # The serve part had written before it failed.
        return Watched(1 if name in ("train", "serve") else 0, 2.0, 3.0, name == "gate")

    found = write_book(["curate", "train", "serve", "gate"], tmp_path, FACTS, print, quick=True, run=run)
    assert json.loads((tmp_path / "book.json").read_text()) == found
    assert [name for name, quick, limit in seen if quick and limit] == ["curate", "train", "serve", "gate"]
    ended = {row[0]: row[1] for row in rows_of(found)}
    assert ended["curate"] == "done" and "status 1" in ended["train"] and "no luck" in ended["serve"]
    # Each of the four takes 2 s, and leaves the rest of its time to those after it.
    limits = [book.QUICK_LIMITS_S[name] for name in ("curate", "train", "serve", "gate")]
    assert [limit for _, _, limit in seen] == [sum(limits[: k + 1]) - 2 * k for k in range(4)]
    assert f"took more than {sum(limits) - 6} s" in ended["gate"] and "https" not in json.dumps(found)
    assert read_numbers(found)["serve"]["coverage.a.ours"].median == 0.5
    assert read_numbers(found)["train"] == {"wall_s": Spread(2, 2, 2, 1), "cpu_s": Spread(3, 3, 3, 1)}
    assert peer_rows(found) == [["gate", "share kept, a", "0.5", "0.4", "TRACER's gate", "1.25"]]
    assert sum(book.QUICK_LIMITS_S.values()) <= 30 * 60


def test_a_part_that_is_ended_while_it_writes_leaves_the_book_whole(tmp_path: pathlib.Path) -> None:
    def run(command, log: pathlib.Path, limit_s: float | None) -> Watched:
        name, path = command[4], pathlib.Path(command[command.index("--json") + 1])
        log.write_text("")
        path.write_text('{"bench": "curate", "cov' if name == "curate" else json.dumps({"bench": name, "a": 1}))
        return Watched(-9 if name == "curate" else 0, 1.0, 1.0, name == "curate")

    found = write_book(["curate", "gate"], tmp_path, FACTS, print, quick=True, run=run)
    ended = {row[0]: row[1] for row in rows_of(found)}
    assert "its JSON is not whole" in ended["curate"] and "took more than" in ended["curate"]
    assert ended["gate"] == "done" and read_numbers(found)["gate"]["a"].median == 1


def test_a_command_is_watched_with_all_that_it_starts_and_ended_in_time(tmp_path: pathlib.Path) -> None:
    burn = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    done = watch([sys.executable, "-c", burn], tmp_path / "log", limit_s=2.0)
    assert done.timed_out and done.status != 0 and done.cpu_s > 0.5
    assert watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log").status == 3


def test_repetitions_become_medians_with_what_they_reached() -> None:
    one, two, three = ({"a": {"b": value}, "ok": True, "machine": {"cores": 9}, "text": "x"} for value in (3, 1, 9))
    assert flatten(one) == {"a.b": 3, "ok": 1}
    assert spread([one, two, three])["a.b"] == Spread(3, 1, 9, 3)
    both, alone = compare(spread([one]), spread([{"a": {"b": 6}, "new": 1}]))
    assert [(row.name, row.ratio, row.verdict) for row in both] == [("a.b", 2, "no interval")]
    assert alone == ["new", "ok"]
    low, high = Spread(2, 1, 3, 3), Spread(5, 4, 6, 3)
    assert (
        Compared("n", low, high).verdict == "differs" and Compared("n", low, low._replace(median=3)).verdict == "within"
    )


def write(path: pathlib.Path, value: int, **others: object) -> str:
    path.write_text(json.dumps({"bench": "gate", "risk": value, "quick": False, "provenance": FACTS, **others}))
    return str(path)


def test_other_hardware_is_refused_unless_asked_for_and_then_marked(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = write(tmp_path / "a.json", 2), write(tmp_path / "b.json", 3)
    assert main(["bench", "compare", before, after]) == 0
    assert "gate\trisk\t2\t3\t1.500\tno interval" in capsys.readouterr().out
    other = write(tmp_path / "c.json", 3, provenance={**FACTS, "hardware": {**HARDWARE, "cores": 64}})
    assert main(["bench", "compare", before, other]) == 2
    assert "speeds of two machines" in capsys.readouterr().err
    assert main(["bench", "compare", before, other, "--across-machines"]) == 0
    assert "NOT THE SAME HARDWARE" in capsys.readouterr().out
    (tmp_path / "d.json").write_text("[]")
    assert main(["bench", "compare", before, str(tmp_path / "d.json")]) == 2


def test_the_page_takes_any_subset_and_refuses_what_has_no_provenance(tmp_path: pathlib.Path) -> None:
    assert results.write_results(tmp_path).startswith("# Results")
    write(tmp_path / "gate.json", 7, quick=True, coverage={"edge": {"0.05": {"ours": 0.25, "tracer": 0.5}}})
    machine = {**HARDWARE, "git_sha": "abc", "date": "2026-02-02"}
    laws = {"experiment": "data", "found": "More | calls help.", "laws": {"exponent": {"value": 0.31, "low": 0.2}}}
    laws |= {"table": [{"calls": 1000, "agreement": 0.5, "interval": [0.4, 0.6]}]}
    laws |= {"provenance": {"command": "understudy scale data", "machine": machine}}
    (tmp_path / "scale-data.json").write_text(json.dumps(laws))
    page = results.write_results(tmp_path)
    assert "QUICK" in page and "| gate | share kept, edge.0.05 | 0.25 | 0.5 | TRACER's gate | 0.50 |" in page
    assert "## Scaling: data" in page and "More | calls help." in page and "| exponent.value | 0.31 |" in page
    assert "| 1,000 | 0.5 | 0.4 to 0.6 |" in page and "2026-02-02" in page
    write(tmp_path / "x.json", 1, provenance={"command": "understudy"})
    with pytest.raises(InputError, match=r"x\.json: provenance\.date"):
        results.write_results(tmp_path)


def test_the_page_says_a_law_with_its_intervals(tmp_path: pathlib.Path) -> None:
    law = Law(
        variables=("parameters", "examples"), rates=(-0.1, 0.42), floor=0.05, scale=2.0, num_points=9, num_seeds=3,
        rate_intervals=(Interval(low=-0.2, high=0.01), Interval(low=0.3, high=0.5)),
        floor_interval=Interval(low=0.0, high=0.1), residual=0.02, num_missed=1,
    )  # fmt: skip
    laws = {"snips": {"agreement": {"law": law.model_dump(), "needed": [{"error": 0.1}]}}, "pace": {"answer_s": 0.25}}
    one = {"experiment": "data", "quick": True, "found": "It falls.", "laws": laws, "provenance": FACTS}
    (tmp_path / "scale-data.json").write_text(json.dumps(one))
    page = results.write_results(tmp_path)
    assert "| snips, agreement | examples | -0.42 (-0.50 to -0.30) | 0.050 (0.000 to 0.100) | 1 of 9 |" in page
    assert "| snips, agreement | parameters | +0.10 (-0.01 to +0.20) |" in page
    assert "| pace.answer_s | 0.25 |" in page and "num_missed" not in page
    assert "QUICK: few calls" in page


def test_results_md_is_what_its_json_says() -> None:
    page = (ROOT / "RESULTS.md").read_text()
    assert page == results.write_results(results.FOLDER), (
        "RESULTS.md is not of its JSON; next: understudy bench results"
    )


def measured_numbers(section: str) -> list[str]:
    """Numbers of the paragraphs that name a commit, which is how the page says that something was measured."""
    found = []
    for paragraph in section.split("\n\n"):
        if re.search(r"\bcommit [0-9a-f]{7,}", paragraph):
            plain = re.sub(r"`[^`]*`|\]\([^)]*\)|\bcommit [0-9a-f]{7,}", " ", paragraph)
            found += re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?%?", plain)
    return found


def test_every_number_that_the_readme_says_was_measured_is_in_results_md() -> None:
    section = (ROOT / "README.md").read_text().split("## What is promised, and what was measured")[1].split("\n## ")[0]
    page = (ROOT / "RESULTS.md").read_text()
    numbers = measured_numbers(section)
    assert numbers, "the section states nothing that was measured"
    missing = [one for one in numbers if not re.search(rf"(?<![\d.,]){re.escape(one)}(?![\d%])", page)]
    assert missing == [], "state numbers of RESULTS.md alone, as they stand there"
    assert measured_numbers("At commit 972e642 it kept 39.8% of 1,500 calls (`gate.delta` 5).\n\nNot 7.") == [
        "39.8%",
        "1,500",
        "5",
    ]


def test_a_part_that_only_the_later_file_has_is_counted_as_alone(tmp_path: pathlib.Path, capsys) -> None:
    for name, parts in (("before", ("gate",)), ("after", ("gate", "serve"))):
        found = {part: {"runs": [], "numbers": {"a": [1, 1, 1, 1], "b": [2, 2, 2, 1]}} for part in parts}
        book = {"bench": "all", "provenance": FACTS, "parts": found}
        (tmp_path / f"{name}.json").write_text(json.dumps(book))
    for pair in (("before", "after"), ("after", "before")):
        assert not main(["bench", "compare", *(str(tmp_path / f"{name}.json") for name in pair)])
        assert "2 equal; 2 in one file alone" in capsys.readouterr().out
