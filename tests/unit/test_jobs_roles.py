"""Every verb against every role of the person at the terminal, taken from the command line's own verbs."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple, get_args

import pytest

from cluster.access import API_KEY_ENV, KEYS_FILE, PSEUDONYM_KEY_ENV, ROLES, ApiKeys, Role, keys_folder
from cluster.store import Store
from jobs.__main__ import build_parser, main

SHA = "a" * 64
BASE = "select.base=scratch-tiny"


class Needs(NamedTuple):
    role: Role
    words: tuple[str, ...] = ()
    """What the verb is tried with, beside the store."""


MATRIX: dict[str, Needs | None] = {
    # These read no store's content and change none: they make their own, look at the machine, or print what is shipped.
    **dict.fromkeys(("doctor", "demo", "catalog", "completion", "sbom", "bench")),
    # Who runs the endpoint holds its keys in the files and the environment; the gateway asks its clients for theirs.
    "serve": None,
    **{f"keys {action}": Needs("admin") for action in ("list", "rotate", "retire")},
    "keys create": Needs("admin", ("--client", "eve")),
    "keys revoke": Needs("admin", ("nobody",)),
    "ingest": Needs("curator", ("LOG",)),
    "calls": Needs("viewer", ("count",)),
    "plan": Needs("viewer", (BASE,)),
    "assess": Needs("curator"),
    "convert": Needs("curator", ("--dry-run", BASE)),
    "tasks": Needs("viewer"),
    **{f"release {action}": Needs("viewer") for action in ("list", "show", "events")},
    "release promote": Needs("admin", (SHA,)),
    "release canary": Needs("admin", ("task",)),
    **{f"release {action}": Needs("admin") for action in ("rollback", "freeze", "unfreeze")},
    "promote": Needs("admin", (SHA,)),
    "rollback": Needs("admin"),
    "refine": Needs("curator", ("--dry-run", BASE)),
    "scale": Needs("curator", ("data",)),
    "compact": Needs("curator"),
    "forget": Needs("admin", ("--client", "ann")),
}
MORE = {
    "calls show": ("calls", Needs("curator", ("show", "c"))),
    "calls --sql": ("calls", Needs("viewer", ("--sql", "SELECT 1"))),
    "tasks --examples": ("tasks", Needs("viewer", ("task", "--examples"))),
    "convert --promote": ("convert", Needs("admin", ("--promote", "--dry-run", BASE))),
    "refine --stage": ("refine", Needs("admin", ("--stage", "shadow", "--dry-run", BASE))),
}
"""What a flag or word of a verb needs beyond the verb. Examples of a task ask for a curator once the task is found."""
TRIED = {verb: (verb, needs) for verb, needs in MATRIX.items() if needs} | MORE


def verbs(parser: argparse.ArgumentParser, name: str = "") -> set[str]:
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, one in action.choices.items():
                whole = f"{name} {verb}".strip()
                found |= {whole} if whole == "bench" else verbs(one, whole) or {whole}
    return found


@pytest.fixture
def store(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name in (API_KEY_ENV, PSEUDONYM_KEY_ENV, "RAY_ADDRESS", "UNDERSTUDY_KMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    request = {"messages": [{"role": "user", "content": "hello"}]}
    response = {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
    (tmp_path / "LOG").write_text(json.dumps({"id": "c", "session": "s", "request": request, "response": response}))
    monkeypatch.chdir(tmp_path)
    return Store(str(tmp_path / "store"))


def test_every_verb_has_a_line() -> None:
    assert verbs(build_parser()) == set(MATRIX), "a new verb needs a line in the table"


@pytest.mark.parametrize("verb", TRIED)
def test_a_verb_is_refused_to_roles_that_may_not(
    verb: str, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, needs = TRIED[verb]
    folder = keys_folder(store.uri)
    assert folder is not None
    keys = ApiKeys(folder / KEYS_FILE)
    # The most allowed last: it may revoke, rotate and forget.
    for role in sorted(get_args(Role), key=lambda one: len(ROLES[one])):
        key = keys.create(f"the {role}", role)
        monkeypatch.setenv(API_KEY_ENV, key)
        before = sorted(path for path in store.list("") if not path.startswith("."))
        code = main([*name.split(), *needs.words, f"store={store.uri}"])
        out, err = capsys.readouterr()
        is_refused = f"role={role}: this needs role" in err
        assert is_refused == (not ROLES[needs.role] <= ROLES[role]), (verb, role, err)
        if is_refused:
            assert (code, out) == (2, "") and store.list("") == before
        assert key not in out + err
    gone = keys.create("gone", "admin")
    keys.revoke("gone")
    monkeypatch.setenv(API_KEY_ENV, gone)
    assert main([*name.split(), *needs.words, f"store={store.uri}"]) == 2
    out, err = capsys.readouterr()
    assert f"{API_KEY_ENV}: is no valid key" in err and gone not in out + err


def test_no_flag_takes_a_secret_which_a_list_of_processes_would_show() -> None:
    def flags(parser: Any) -> set[str]:
        found: set[str] = set()
        for action in parser._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                found |= {flag for one in action.choices.values() for flag in flags(one)}
        return found

    assert not [
        flag for flag in flags(build_parser()) if any(word in flag for word in ("key", "secret", "token", "password"))
    ]
