"""`--address`: what is submitted, what is refused before, how a job is followed, and that Ctrl-C leaves it running.

FakeJobs is a second implementation of the few methods of Ray's client that are used.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from subprocess import PIPE
from typing import Any, NamedTuple

import pytest
from fakes import make_specialist, promote_release
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, UnderstudyError
from cluster.store import Store
from jobs.__main__ import build_parser, main
from jobs.recipe import load_recipe
from jobs.submit import connect_jobs, plan_submission, spell_out, submit

ROOT = pathlib.Path(__file__).parents[2]
HERE, ELSEWHERE = "http://127.0.0.1:8265", "http://head.example:8265"
BASE = "select.base=scratch-small"
MARKER = "sk-marker-of-a-secret"


class Facts(NamedTuple):
    status: str
    message: str | None
    driver_exit_code: int | None


class FakeJobs:
    """Keeps what is submitted and tells of it what it was given."""

    def __init__(self, log: list[str], *ends: Facts) -> None:
        self.submitted: list[dict[str, Any]] = []
        self._log, self._ends = log, list(ends)
        self.break_with: BaseException | None = None
        self.refuse_with: Exception | None = None

    def submit_job(self, **facts: Any) -> str:
        if self.refuse_with:
            raise self.refuse_with
        self.submitted.append(facts)
        return facts["submission_id"]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self._log:
            yield text
        if self.break_with is not None:
            raise self.break_with

    def get_job_info(self, job_id: str) -> Facts:
        return self._ends.pop(0)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "OPENAI_BASE_URL",
        "UNDERSTUDY_API_KEY",
        "UNDERSTUDY_GIT_SHA",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", MARKER)


def options_of(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["convert", *words])


def run(jobs: FakeJobs, *words: str) -> int:
    options = options_of("--address", HERE, *words)
    return submit("convert", options.words, [], options, lambda _: jobs)


def resolved(entrypoint: str) -> Any:
    """The recipe that the job would run with."""
    python, dash, jobs, verb, *words = shlex.split(entrypoint)
    assert (python, dash, jobs, verb) == ("python", "-m", "jobs", "convert")
    return load_recipe(build_parser().parse_args([verb, *words]).words)


def test_the_job_runs_the_same_recipe_with_a_file_of_this_machine_spelt_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "my recipe.toml"
    path.write_text(
        '[gate]\nepsilon = 0.1\n[curate.redact]\ndeny = ["O\'Hara & \\"Sons\\"", "Jos\\u00e9"]\n'
        '[[upstream]]\nbase_url = "https://a.example/v1"\n[[upstream]]\ncluster_model = "ORG/NAME"\ndevice = "gpu"\n'
    )
    words = [f"recipe={path}", BASE, "upstream.0.model=big", f"store={tmp_path / 'store'}", "gate.delta=0.2"]
    plan = plan_submission("convert", words, ["--promote"], options_of("--address", ELSEWHERE))
    assert resolved(plan.entrypoint) == load_recipe(words) and "--promote" in plan.entrypoint
    assert str(path) not in plan.entrypoint and plan.runtime_env == {}
    with pytest.raises(ConfigError, match="beside another recipe"):
        spell_out([*words, "recipe=local"])


@given(st.floats(0.001, 0.999), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_value_comes_through(tmp_path_factory: pytest.TempPathFactory, epsilon: float, text: str) -> None:
    denied = f"abc{text}"
    written = json.dumps([denied], ensure_ascii=False).replace("\x7f", "\\u007f")
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_text(f"[gate]\nepsilon = {epsilon!r}\n[curate.redact]\ndeny = {written}\n")
    spelt = spell_out([f"recipe={path}", "store=/shared/store"])
    recipe = load_recipe(shlex.split(shlex.join(spelt)))
    assert (recipe.gate.epsilon, recipe.curate.redact.deny) == (epsilon, (denied,))


def test_no_secret_of_the_environment_is_submitted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", MARKER)
    jobs = FakeJobs([], Facts("SUCCEEDED", None, 0))
    assert run(jobs, BASE, f"store={tmp_path / 'store'}", "--working-dir", str(ROOT)) == 0
    assert MARKER not in json.dumps(jobs.submitted)
    (facts,) = jobs.submitted
    assert facts["runtime_env"]["working_dir"] == str(ROOT)
    assert set(facts["runtime_env"].get("env_vars", {})) <= {"UNDERSTUDY_GIT_SHA"}


def test_the_commit_is_that_of_the_folder_that_is_uploaded(tmp_path: pathlib.Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__main__.py").touch()
    options = options_of("--address", HERE, "--working-dir", str(tmp_path))
    words = [BASE, "store=/shared/store"]
    assert plan_submission("convert", words, [], options).runtime_env == {"working_dir": str(tmp_path)}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    environment = plan_submission("convert", words, [], options).runtime_env["env_vars"]
    assert environment == {"UNDERSTUDY_GIT_SHA": sha}


def test_metadata_name_the_store_and_what_stands_in_it(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    sha = promote_release(store, tmp_path / "scratch", make_specialist())
    store.write_json("tasks/identity.json", {"snapshot": "two", "tasks": {}})
    plan = plan_submission("convert", [BASE, f"store={store.uri}"], [], options_of("--address", HERE))
    assert plan.metadata == {"understudy": "convert", "store": store.uri, "release": sha, "snapshot": "two"}
    store.write_bytes("CURRENT", b"{")
    plan = plan_submission("convert", [BASE, f"store={store.uri}"], [], options_of("--address", HERE))
    assert plan.metadata == {"understudy": "convert", "store": store.uri}


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (Facts("SUCCEEDED", None, 0), 0),
        (Facts("FAILED", "bad configuration", 2), 2),
        (Facts("FAILED", "killed", -9), 1),
        (Facts("FAILED", "never started", None), 1),
        (Facts("STOPPED", None, None), 1),
    ],
)
def test_a_job_is_followed_and_its_exit_code_is_this_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, end: Facts, code: int
) -> None:
    monkeypatch.setattr("jobs.submit._POLL_S", 0)
    jobs = FakeJobs(["line 1\nli", "ne 2\n"], Facts("RUNNING", None, None), end)
    assert run(jobs, BASE, "store=/shared/store") == code
    out, err = capsys.readouterr()
    assert out == "line 1\nline 2\n"
    name = jobs.submitted[0]["submission_id"]
    assert f"ray job stop --address {HERE} {name}" in err and ((end.message or "") in err)


def test_a_log_that_breaks_off_does_not_end_the_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = FakeJobs(["begun\n"], Facts("SUCCEEDED", None, 0))
    jobs.break_with = RuntimeError("WebSocket closed")
    assert run(jobs, BASE, "store=/shared/store") == 0
    assert "WebSocket closed" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = FakeJobs(["begun\n"])
    jobs.break_with = KeyboardInterrupt()
    assert run(jobs, BASE, "store=/shared/store") == 130
    name = jobs.submitted[0]["submission_id"]
    assert capsys.readouterr().err.count(f"ray job stop --address {HERE} {name}") == 2


INTERRUPTED = """
import asyncio, signal, sys
# A shell that runs the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from test_jobs_submit import BASE, FakeJobs, run

class Endless(FakeJobs):
    async def tail_job_logs(self, job_id):
        yield "begun\\n"
        await asyncio.sleep(60)

sys.exit(run(Endless([]), BASE, "store=/shared/store"))
"""


def test_a_real_ctrl_c_ends_the_following_alone() -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "unit")))
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(20) == 130
    assert "goes on" in err and "Traceback" not in err


def test_serve_names_the_llm_of_this_machine_s_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["serve", "--dry-run", "--address", HERE, "store=/shared/store"]
    assert main(words) == 2 and "OPENAI_BASE_URL" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_BASE_URL", "https://llm.example/v1")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "serve upstream.0.base_url=https://llm.example/v1 store=/shared/store" in out and MARKER not in out
    assert main([*words, "--print-config"]) == 2


def test_without_waiting_the_name_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = FakeJobs(["never read"])
    assert run(jobs, "--no-wait", BASE, "store=/shared/store") == 0
    assert capsys.readouterr().out == f"{jobs.submitted[0]['submission_id']}\n"


def test_a_dry_run_shows_what_would_be_submitted_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--dry-run", "--address", "http://127.0.0.1:9", BASE, "store=/shared/store"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["entrypoint"] == f"python -m jobs convert {BASE} store=/shared/store"


def test_a_cluster_that_refuses_the_job_is_a_failed_run() -> None:
    jobs = FakeJobs([])
    jobs.refuse_with = RuntimeError("Request failed with status code 500")
    with pytest.raises(UnderstudyError, match="refused: Request failed"):
        run(jobs, BASE, "store=/shared/store")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["gate.epsilom=1"], ["gate.epsilom: unknown key"]),
        (["--working-dir", "/tmp", BASE], ["--working-dir /tmp: has no jobs/__main__.py"]),
        (["--report", "page.html", BASE], ["--report", "beside the release"]),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_submitted(
    capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    assert main(["convert", "--address", HERE, "store=/shared/store", *words]) == 2
    err = capsys.readouterr().err
    assert [part for part in parts if part not in err] == []


def test_a_folder_of_this_machine_is_no_store_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([BASE], [BASE, "store=store"]):
        assert main(["convert", "--address", ELSEWHERE, *words]) == 2
        assert "next: store=/shared/store" in capsys.readouterr().err
    assert main(["convert", "--no-wait", BASE]) == 2 and "needs --address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:8265", "allowed: http://HOST:PORT"),
        (f"http://me:{MARKER}@127.0.0.1:8265", "without credentials"),
        ("http://127.0.0.1:9", "no dashboard answers"),
    ],
)
def test_an_address_that_is_none_or_answers_not_is_told(address: str, part: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:1")
    with pytest.raises(ConfigError, match=part) as told:
        connect_jobs(address)
    assert MARKER not in str(told.value) and "10.0.0.1" not in str(told.value)


def test_a_refinement_is_submitted_with_its_action(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    refine = [
        "refine",
        "run",
        "2026-11-26-0a.json",
        "--stage",
        "shadow",
        "--json",
        "--dry-run",
        BASE,
        "store=/shared/store",
    ]
    assert main([*refine, "--address", HERE]) == 0
    shown = json.loads(capsys.readouterr().out)
    run = "run 2026-11-26-0a.json --json --stage shadow"
    assert shown["entrypoint"] == f"python -m jobs refine {run} {BASE} store=/shared/store"
    assert build_parser().parse_args(shlex.split(shown["entrypoint"])[3:]).stage == "shadow"
    own = tmp_path / "plan.json"
    own.write_text("{}")
    assert main(["refine", "run", str(own), BASE, "store=/shared/store", "--address", HERE]) == 2
    assert "a file of this machine" in capsys.readouterr().err
    assert (
        main(["refine", "--no-wait", BASE, "store=/shared/store"]) == 2 and "needs --address" in capsys.readouterr().err
    )
