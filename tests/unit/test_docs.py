"""The pages: their code runs, their commands parse, their keys, links, files and versions exist."""

from __future__ import annotations

import asyncio
import pathlib
import re
import shlex
import sys
import tomllib
from asyncio.subprocess import PIPE
from typing import Any

import notice
import pytest
from fakes import LLM_TEXT, gateway
from loopback import served

from cluster.config import describe_fields
from cluster.feedback import read_feedback
from cluster.store import Store
from jobs.__main__ import build_parser
from jobs.recipe import Recipe, load_recipe

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
}
BASE_URL, KEY = "http://127.0.0.1:8000/v1", "us-..."
NOT_INSTALLED = ("langchain_openai", "litellm")
BLOCKS = [
    (name, number, code)
    for name, text in PAGES.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
]
RUN = [
    one for one in BLOCKS if not any(f"import {name}" in one[2] or f"from {name}" in one[2] for name in NOT_INSTALLED)
]


def test_all_pages_are_looked_at() -> None:
    assert {
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "serving/README.md",
        "k8s/README.md",
    } <= set(PAGES)
    assert len(RUN) >= 4 and len(BLOCKS) - len(RUN) == len(NOT_INSTALLED)


@pytest.mark.parametrize(
    ("page", "number", "code"), BLOCKS, ids=lambda one: one if isinstance(one, str) and one in PAGES else ""
)
def test_code_compiles_and_points_at_the_gateway(page: str, number: int, code: str) -> None:
    compile(code, f"{page} block {number}", "exec")
    assert BASE_URL in code and f'"{KEY}"' in code


@pytest.mark.parametrize(
    ("page", "number", "code"), RUN, ids=lambda one: one if isinstance(one, str) and one in PAGES else ""
)
def test_code_runs_against_the_gateway(page: str, number: int, code: str, tmp_path: pathlib.Path) -> None:
    async def scenario() -> tuple[Store, list[Any], str]:
        async with gateway(tmp_path) as run, served(run.api) as url:
            here = code.replace(BASE_URL, f"{url}/v1").replace(KEY, run.key)
            # A script of its own, as a reader would run it: clients that it leaves open end with it.
            script = await asyncio.create_subprocess_exec(sys.executable, "-c", here, stdout=PIPE, stderr=PIPE)
            out, err = await script.communicate()
            assert script.returncode == 0, err.decode()
            await run.core.feedback.backlog.close()
            return run.store, await run.captured(), out.decode()

    store, calls, out = asyncio.run(scenario())
    assert calls and {call.status for call in calls} == {200} and {call.client_id for call in calls} != {""}
    # The fake engine's word or the fake LLM's: a block that names the intent is of the specialist's task.
    assert ("print(" in code) == (LLM_TEXT in out or "refund" in out)
    if "x-agent" in code:
        assert {call.agent for call in calls} == {"desk"} and len({call.session_id for call in calls}) == 2
    if "/feedback" in code:
        (told,) = read_feedback(store)
        assert told.call_id == calls[0].call_id and told.score == 1.0


def commands(text: str) -> list[str]:
    """Command lines of blocks, without comments and what else stands on the line."""
    lines = re.findall(r"^ {4}(?:\S+=\S+ )*understudy (.+)$", text, re.MULTILINE)
    return [re.split(r"\s{2,}[#;]|\s#\s|;", line)[0].strip() for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_parse(page: str) -> None:
    for command in commands(PAGES[page]):
        words = shlex.split(command.replace("PATH...", "PATH"))
        options = build_parser().parse_args(words)
        load_recipe(
            [word for word in getattr(options, "words", []) if "=" in word and "=..." not in word and "$" not in word]
        )


def test_there_are_commands_to_parse() -> None:
    assert len(commands(PAGES["README.md"])) >= 12


@pytest.mark.parametrize("page", PAGES)
def test_recipe_keys_that_a_page_names_exist(page: str) -> None:
    known = {re.sub(r"\.N\b", "", key) for key, *_ in describe_fields(Recipe)}
    sections = {key.split(".")[0] for key in known if "." in key}
    files = {path.name for path in ROOT.rglob("*.py")}
    missing = []
    for word in re.findall(r"`([a-z][a-z_]*(?:\.(?:[a-z0-9_]+|\*))+)(?:=[^`]*)?`", PAGES[page]):
        key = re.sub(r"\.\d+\b", "", word).removesuffix(".*")
        is_key = (
            key.split(".")[0] in sections and word.rsplit("/")[-1] not in files and not key.endswith((".py", ".toml"))
        )
        if is_key and key not in known and not any(one.startswith(f"{key}.") for one in known):
            missing.append(word)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        titles = re.findall(r"^#+ (.+)$", place.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES)
def test_code_files_that_a_page_names_exist(page: str) -> None:
    for path in re.findall(
        r"\b(?:cluster|training|serving|jobs|tests|k8s)/[\w/]+\.(?:py|json|toml|yaml|md)\b", PAGES[page]
    ):
        assert (ROOT / path).exists(), path


def test_the_picture_names_what_there_is() -> None:
    (picture,) = re.findall(r"^```mermaid\n(.*?)^```$", PAGES["ARCHITECTURE.md"], re.MULTILINE | re.DOTALL)
    nodes = set(re.findall(r"\b([a-z]+)[\[({]", picture)) | {"curate", "discover", "select"}
    edges = re.findall(r"^\s*(\w+).*?--?>.*?(\w+)(?:\[|\(|$)", picture, re.MULTILINE)
    assert edges and {end for edge in edges for end in edge} <= nodes | {"finetune", "gate"}
    assert picture.count("subgraph") == len(re.findall(r"^\s*end$", picture, re.MULTILINE))


def test_the_notice_is_current() -> None:
    assert (ROOT / "NOTICE").read_text() == notice.notice(), "next: python -m tests.notice > NOTICE"


def test_licence_and_version_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE", "NOTICE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == project["version"] and PAGES["CHANGELOG.md"].index("## [Unreleased]") > 0
