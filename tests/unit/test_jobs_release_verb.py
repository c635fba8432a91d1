"""`understudy release`: what a person is told of releases, and what a person may change."""

from __future__ import annotations

import json
import pathlib
import sys
import types
from typing import Any

import pytest
from fakes import make_specialist, promote_release

from cluster import registry
from cluster.access import API_KEY_ENV, KEYS_FILE, ApiKeys
from cluster.events import Cause, read_events
from cluster.records import Release, Rollout
from cluster.store import Store
from jobs.__main__ import main
from serving.evidence import begin
from serving.steward import STATE_FILE, State

SHADOW = Rollout(stage="shadow")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_ENV, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    store = Store(str(tmp_path / "store"))
    promote_release(store, tmp_path / "scratch", make_specialist())
    return store


def served(store: Store) -> tuple[str, Release]:
    found = registry.current(store)
    assert found is not None
    return found


def run(capsys: pytest.CaptureFixture[str], store: Store, *words: str) -> tuple[int, str, str]:
    code = main(["release", *words, f"store={store.uri}"])
    return code, *capsys.readouterr()


def with_other(store: Store) -> str:
    """A release with a second specialist, published."""
    _, release = served(store)
    other = make_specialist().model_copy(update={"task_id": "other"})
    specialists = {**release.specialists, "other": other}
    return registry.publish_release(
        store, release.model_copy(update={"specialists": specialists, "created_ts": 2.0, "snapshot": "two"})
    )


def test_list_marks_what_is_served_and_what_is_not_live(store: Store, capsys: Any) -> None:
    first, second = served(store)[0], with_other(store)
    derived = registry.promote_at(store, second, SHADOW)
    code, out, _ = run(capsys, store, "list")
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in out.splitlines()[1:]}
    assert code == 0 and set(lines) == {first[:12], second[:12], derived[:12]}
    assert lines[derived[:12]][1:] == ["served", "2", "0", "other: shadow"]
    assert lines[first[:12]] == ["1970-01-01 00:00:01", "", "1", "0", ""]


def test_show_tells_evidence_and_refusals(store: Store, capsys: Any) -> None:
    name, specialist = make_specialist().name, make_specialist()
    known = begin(specialist, "live", 0.05, 0.0)
    known = known.model_copy(update={"risk": known.risk.after([False] * 39 + [True])})
    store.write_json(STATE_FILE, State(evidence={name: known}).model_dump(mode="json"))
    sha, release = served(store)
    promoted = registry.publish_release(store, registry.derive(sha, release, refuse={"reply": "too few examples"}))
    registry.promote(store, promoted)
    code, out, _ = run(capsys, store, "show")
    assert code == 0 and f"release {promoted} (served)" in out and "refused reply: too few examples" in out
    row = next(line.split("\t") for line in out.splitlines() if line.startswith("triage\t"))
    assert row[1:6] == ["f" * 12, "live", "0.05", "40", "1"] and row[7].endswith(" of 20")
    facts = json.loads(run(capsys, store, "show", promoted[:8], "--json")[1])
    assert facts["tasks"]["triage"]["evidence"]["num_disagreements"] == 1 and facts["previous"] == sha


def test_promote_begins_new_specialists_at_the_stage_and_leaves_served_ones(store: Store, capsys: Any) -> None:
    sha = with_other(store)
    code, out, _ = run(capsys, store, "promote", sha[:10], "--stage", "canary", "--share", "0.25")
    release = served(store)[1]
    assert code == 0 and out.strip() == served(store)[0] != sha
    assert release.rollout == {"other": Rollout(stage="canary", canary_share=0.25)} and release.previous == sha
    # A stage that was reached is kept by a release with the same specialist.
    assert registry.promote_at(store, sha, SHADOW) == out.strip() and served(store)[1].stage_of("other") == "canary"
    run(capsys, store, "promote", sha, "--stage", "live")
    assert served(store) == (sha, registry.load_release(store, sha)), "live is the release itself"


@pytest.mark.parametrize("verb", [["release", "promote"], ["promote"]], ids=" ".join)
def test_new_specialists_begin_where_the_recipe_says_and_that_is_told(
    verb: list[str], store: Store, capsys: Any
) -> None:
    sha, where = with_other(store), f"store={store.uri}"
    first = served(store)[0]
    assert main([*verb, sha, where]) == 0
    out, err = capsys.readouterr()
    name, release = served(store)
    assert out.strip() == name != sha and release.rollout == {"other": SHADOW} and release.stage_of("triage") == "live"
    assert "other in shadow; evidence moves them on" in err and f"release promote {sha[:12]} --stage live" in err
    registry.promote(store, first)
    assert main([*verb, sha, where, "rollout.start=canary", "rollout.canary_share=0.3"]) == 0
    assert served(store)[1].rollout == {"other": Rollout(stage="canary", canary_share=0.3)}
    capsys.readouterr()
    registry.promote(store, first)
    assert main([*verb, sha, where, "rollout.start=live"]) == 0
    assert served(store)[0] == sha and capsys.readouterr() == (f"{sha}\n", "")


def test_a_conversion_that_is_promoted_begins_there_too(
    store: Store, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha, first, where = with_other(store), served(store)[0], f"store={store.uri}"
    monkeypatch.setattr("jobs.convert.convert", lambda recipe: types.SimpleNamespace(release=sha, moved=None))
    monkeypatch.setattr("jobs.plan.connect_for", lambda plan, recipe: None)
    monkeypatch.setattr("jobs.__main__._save_report", lambda store, conversion, copy: "report.html")
    assert main(["convert", "--promote", where, "select.base=scratch-tiny"]) == 0
    name, release = served(store)
    lines = capsys.readouterr().out.splitlines()
    assert release.rollout == {"other": SHADOW} and lines[0] == name and lines[-1] == f"{store.uri}/releases/{sha}.json"
    registry.promote(store, first)
    assert main(["convert", "--promote", where, "select.base=scratch-tiny", "rollout.start=live"]) == 0
    assert served(store)[0] == sha


def test_canary_and_rollback(store: Store, capsys: Any) -> None:
    before = served(store)[0]
    assert run(capsys, store, "canary", "triage", "--share", "0.5")[0] == 0
    assert served(store)[1].rollout["triage"] == Rollout(stage="canary", canary_share=0.5)
    assert run(capsys, store, "rollback")[1].strip() == before == served(store)[0]
    assert [(event.kind, event.by) for event in read_events(store)] == [
        ("promote", "person"),
        ("canary", "person"),
        ("roll_back", "person"),
    ]


def test_freeze_is_shown_and_ended(store: Store, capsys: Any) -> None:
    assert run(capsys, store, "freeze", "--reason", "the LLM is being changed")[0] == 0
    assert "(frozen)" in run(capsys, store, "show")[1]
    assert run(capsys, store, "unfreeze")[0] == 0 and not registry.is_frozen(store)
    _, out, _ = run(capsys, store, "events")
    assert [line.split("\t")[1] for line in out.splitlines()[1:]] == ["promote", "freeze", "unfreeze"]
    assert "the LLM is being changed" in out


def test_events_tell_evidence_in_words_and_whole(store: Store, capsys: Any) -> None:
    sha, release = served(store)
    facts = {"from": "live", "to": "refused", "num_compared": 130, "num_disagreements": 30}
    derived = registry.publish_release(store, registry.derive(sha, release, refuse={"triage": "demoted"}))
    registry.promote(store, derived, cause=Cause(kind="demote", by="steward", evidence={"triage": facts}))
    line = run(capsys, store, "events")[1].splitlines()[-1]
    assert line.split("\t")[1:] == [
        "demote", "steward", derived[:12], sha[:12], "triage: live -> refused, 30 of 130 differ"
    ]  # fmt: skip
    assert json.loads(run(capsys, store, "events", "--json")[1].splitlines()[-1])["evidence"] == {"triage": facts}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["show", "abcdef"], ["SHA='abcdef': names no release", "next: understudy release list"]),
        (["promote", "a"], ["SHA='a': names no release"]),
        (["canary", "reply"], ["TASK_ID='reply': has no specialist in the served release; allowed: triage"]),
        (["canary", "triage", "--share", "1.5"], ["--share 1.5: allowed: above 0 and at most 1"]),
    ],
)
def test_what_cannot_be_done_is_told(store: Store, capsys: Any, words: list[str], parts: list[str]) -> None:
    code, _, err = run(capsys, store, *words)
    assert code == 2 and all(part in err for part in parts)


@pytest.mark.parametrize(
    "words", [["promote", "0" * 64], ["canary", "triage"], ["rollback"], ["freeze"], ["unfreeze"]], ids=lambda w: w[0]
)
def test_only_an_admin_changes_what_is_served(
    store: Store, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    from cluster.access import keys_folder

    folder = keys_folder(store.uri)
    assert folder is not None
    monkeypatch.setenv(API_KEY_ENV, ApiKeys(folder / KEYS_FILE).create("eve", "curator"))
    before = served(store)[0]
    code, _, err = run(capsys, store, *words)
    assert code == 2 and "this needs role admin" in err and served(store)[0] == before
    assert run(capsys, store, "show")[0] == 0


def test_promoting_a_model_that_a_running_endpoint_has_no_engine_for_says_so(store: Store, capsys: Any) -> None:
    second = with_other(store)
    assert "on a model" not in run(capsys, store, "promote", second, "--stage", "live")[2]
    _, release = served(store)
    one = make_specialist().model_copy(update={"merged": "merged/triage/1"})
    store.publish("merged/triage/1", pathlib.Path(store.fetch(one.adapter)), {})
    third = registry.publish_release(
        store, release.model_copy(update={"specialists": {**release.specialists, one.task_id: one}, "created_ts": 3.0})
    )
    code, _, err = run(capsys, store, "promote", third, "--stage", "live")
    assert code == 0 and err.startswith(f"{one.task_id}: on a model")
    assert "starts an engine" in err
