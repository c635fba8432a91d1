"""The command line as a newcomer meets it: an example for every verb that parses, and completion in a real shell."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import describe_fields
from jobs.__main__ import build_parser, main
from jobs.completion_verb import write_completion
from jobs.recipe import Recipe, load_recipe

ROOT = pathlib.Path(__file__).parents[2]
BEFORE = [("doctor", "demo"), ("keys", "serve"), ("serve", "calls"), ("plan", "convert"), ("convert", "tasks")]
BEFORE += [("tasks", "release"), ("release", "compact"), ("compact", "bench")]


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Any]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, one in action.choices.items():
                yield f"{name} {verb}".strip(), one
                yield from parsers(one, f"{name} {verb}".strip())


VERBS = dict(parsers(build_parser()))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_examples_that_parse(verb: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert VERBS[verb].examples
    for example in VERBS[verb].examples:
        program, *words = shlex.split(example)
        options = build_parser().parse_args(words)
        assert program == "understudy" and example.startswith(f"understudy {verb}") and callable(options.run)
        given = [word for word in [*getattr(options, "words", []), *getattr(options, "paths", [])] if "=" in word]
        load_recipe([word for word in given if word != "recipe=my.toml"])


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_shows_its_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*verb.split(), "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert [one for one in VERBS[verb].examples if f"  {one}\n" not in out] == []


def test_verbs_stand_in_the_order_of_the_journey() -> None:
    order = [verb for verb in VERBS if " " not in verb]
    assert [pair for pair in BEFORE if order.index(pair[0]) > order.index(pair[1])] == []
    assert order[0] == "doctor" and order[-1] == "completion"


def test_verbs_that_tell_numbers_tell_them_as_json(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    store = f"store={tmp_path / 'store'}"
    assert main(["release", "list", "--json", store]) == 0 and json.loads(capsys.readouterr().out) == []
    assert main(["keys", "create", "--client", "ann", "--role", "viewer", store]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", "list", "--json", store]) == 0
    out = capsys.readouterr().out
    assert [(one["client"], one["role"]) for one in json.loads(out)] == [("ann", "viewer")] and key not in out
    assert main(["plan", "--json", "recipe=demo", "fleet.max_parallel=1", store]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in told["resources"]] == ["base training", "fine-tunes", "validation engine"]
    assert [(one["base"], one["section"], one["problem"]) for one in told["trainings"]] == [
        ("scratch-tiny", "pretrain", ""), ("scratch-tiny", "finetune", "")
    ]  # fmt: skip
    assert all(0 < one["plan"]["memory"]["weights"] < one["plan"]["device_bytes"] for one in told["trainings"])
    tight = ["select.base=qwen3-8b", "finetune.gpus_per_worker=1", "finetune.bf16=true", "finetune.device_gib=8"]
    assert main(["plan", "--json", *tight, "finetune.zero_stage=0", store]) == 2
    (one,) = json.loads(capsys.readouterr().out)["trainings"]
    assert one["plan"] is None and "a device has 8.000 GiB" in one["problem"]


def test_the_command_line_itself_loads_nothing_slow() -> None:
    code = "import sys; from jobs.__main__ import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    slow = {"jobs.recipe", "scipy", "pandas", "duckdb", "fastapi", "aiohttp", "openai", "shtab", "ray", "torch", "vllm"}
    assert not slow & set(loaded.split())


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    # `true` has ended long before Python has started.
    command = f"{sys.executable} -m jobs catalog --json | true"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


BASH = """
source "$1"
read -ra COMP_WORDS <<< "${2//=/ = }"
[[ "$2" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_understudy 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_verbs_flags_choices_keys_and_recipes(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "understudy.bash"
    script.write_text(write_completion(build_parser(), "bash"))
    (tmp_path / "mine.toml").touch()

    def complete(line: str) -> list[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", BASH, "bash", script, line],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return [one for one in done.stdout.split("\n") if one]

    assert complete("understudy ") == [verb for verb in VERBS if " " not in verb]
    assert complete("understudy conv") == ["convert"]
    assert complete("understudy release pro") == ["promote"]
    assert complete("understudy release promote SHA --stage ") == ["shadow", "canary", "live"]
    assert set(complete("understudy convert --")) >= {"--promote", "--address", "--no-wait", "--dry-run"}
    assert complete("understudy convert gate.eps") == ["gate.epsilon="]
    assert complete("understudy serve gate.eps") == [], "serve reads no gate"
    assert complete("understudy serve upstream.0.base_") == ["upstream.0.base_url="]
    assert complete("understudy convert recipe=lo") == ["local"]
    assert set(complete("understudy convert recipe=")) == {"demo", "local", "mine.toml"}
    assert complete("understudy convert store=mi") == ["mine.toml"]
    keys = set(complete("understudy convert "))
    sections = VERBS["convert"].sections
    assert {
        f"{key}=" for key, *_ in describe_fields(Recipe) if key.split(".")[0] in sections and ".N." not in key
    } <= keys


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_knows_whom_to_ask(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "understudy.bash"
    script.write_text(write_completion(build_parser(), "bash"))
    done = subprocess.run(
        ["bash", "--norc", "-c", 'source "$1"; complete -p understudy', "bash", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "complete -o bashdefault -F _understudy understudy"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh on this machine")
def test_zsh_reads_its_script(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "_understudy"
    script.write_text(write_completion(build_parser(), "zsh"))
    subprocess.run(["zsh", "-n", script], check=True)


def test_zsh_gets_the_verbs_and_the_keys_of_each() -> None:
    script = write_completion(build_parser(), "zsh")
    assert script.startswith("#compdef understudy")
    assert re.search(r"_understudy_words_convert\(\) \{.*?gate\.epsilon=.*?\n\}", script, re.DOTALL)
    assert all(f"\n    {verb}:" in script for verb in VERBS if " " not in verb)
