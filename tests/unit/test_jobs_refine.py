"""`understudy refine` up to where something is trained: plans from a store, plans that train nothing, and the verb."""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
from types import SimpleNamespace

import pytest
from fakes import engine_answer, make_specialist

from cluster import registry
from cluster.calls import write_calls
from cluster.errors import ConfigError, InputError
from cluster.feedback import Feedback, write_feedback
from cluster.prompts import PromptFormat
from cluster.records import (
    AgentCall,
    Example,
    Gate,
    Release,
    Rollout,
    RouteDecision,
    Specialist,
    TaskSpec,
    TextGrader,
)
from cluster.store import Store
from jobs.__main__ import main
from jobs.forget import forget
from jobs.lineage import find_seen
from jobs.recipe import Recipe, load_recipe
from jobs.refine import make_plan
from jobs.refine_run import _compare, run_plan
from serving.steward import DEMOTED
from training.curate import curate
from training.discover import discover, save_discovery
from training.evaluation import Candidate, Evaluation
from training.gate import Outcome
from training.refine import Plan
from training.snapshot import load_split
from training.splits import SPLITS
from training.trace_checks import OUTDATED

DAY = 86_400.0
WORDS = ("amber", "birch", "cedar", "delta", "ember", "frost", "grove", "hazel", "iris", "jade")
SITES = {
    "tone": "Give the tone of the word.\nAnswer in English, whatever the language is.\nNever explain the answer to the reader.",
    "size": "Say how large the thing is, as JSON.",
    "mood": "Name the mood as JSON.",
}
BASE = "bases/tiny"
CHRF = TextGrader(name="chrf", agree_at=0.8)


def _call(site: str, number: int, day: float, route: RouteDecision | None = None) -> AgentCall:
    text = f"{WORDS[number % 10]} {WORDS[number // 10 % 10]} {number}"
    answer = {"role": "assistant", "content": json.dumps({"tone": WORDS[number % 10]})}
    return AgentCall(
        call_id=f"{site}-{number}", ts=day * DAY + 60 * number, client_id=f"client{number % 3}", agent="a",
        session_id=f"{site}-s{number}", step=0, response={"choices": [{"message": answer, "finish_reason": "stop"}]},
        request={"messages": [{"role": "system", "content": SITES[site]}, {"role": "user", "content": text}],
                 "response_format": {"type": "json_object"}}, route=route,
    )  # fmt: skip


def _recipe(folder: pathlib.Path) -> Recipe:
    words = [
        f"store={folder / 'store'}",
        "recipe=local",
        "gate.epsilon=0.2",
        "gate.delta=0.2",
        "discover.min_clients=1",
    ]
    return load_recipe([*words, "curate.max_near_duplicates=1000", "curate.near_duplicate_similarity=1.0"])


@pytest.fixture
def served(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Store, dict[str, str]]:
    """A store whose tasks "tone" and "size" are served, as if a conversion had trained them; site -> task id."""
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = _recipe(tmp_path)
    store = Store(recipe.store)
    write_calls(store, [_call(site, number, day=0) for site in ("tone", "size") for number in range(200)])
    snapshot = curate(store, recipe.curate).id
    by_split = {s: load_split(store, snapshot, s, as_served=s != "train") for s in SPLITS}
    found = discover(by_split, recipe.discover)
    route_model = save_discovery(store, snapshot, found)
    (tmp_path / "empty").mkdir()
    store.publish(BASE, tmp_path / "empty", {"base": "tiny", "snapshot": None})
    facts = {"snapshot": snapshot, "base": BASE, "config": recipe.finetune.model_dump(mode="json")}
    specialists = {}
    for task in found.tasks:
        adapter = f"adapters/{task.task_id}/run1"
        store.publish(adapter, tmp_path / "empty", {**facts, "task_id": task.task_id})
        specialists[task.task_id] = _specialist(task.task_id, adapter)
    release = Release(specialists=specialists, refused={}, route_model=route_model, snapshot=snapshot, created_ts=1.0)
    registry.promote(store, registry.publish_release(store, release))
    where = {site: found.assignment[e.example_id] for e in by_split["train"] for site in SITES if site in e.session_id}
    by_site = {
        site: found.assignment[e.example_id]
        for e in by_split["train"]
        for site, text in SITES.items()
        if e.request["messages"][0]["content"] == text
    }
    assert len(set(by_site.values())) == 2, where
    return recipe, store, by_site  # type: ignore[return-value]


def _specialist(task_id: str, adapter: str) -> Specialist:
    gate = Gate(
        reference="llm", population="p", epsilon=0.2, delta=0.08, threshold=0.5, num_calibration=50, num_accepted=50,
        num_disagreements=0, upper_bound=0.05, coverage=1.0, fingerprint="f",
    )  # fmt: skip
    prompt_format = {"kind": "chat", "answer_kind": "json", "max_prompt_tokens": 100}
    return Specialist(
        task_id=task_id, sha=(adapter.encode().hex() * 3)[:64], base=BASE, adapter=adapter, prompt_format=prompt_format,
        gate=gate, report="r", max_answer_tokens=9,
    )  # fmt: skip


def _plan(recipe: Recipe, store: Store) -> Plan:
    return make_plan(recipe, store, say=lambda line: None)


def _decisions(plan: Plan) -> dict[str, str]:
    return {one.task_id: one.decision for one in plan.tasks}


def test_without_a_release_there_is_nothing_to_refine(tmp_path):
    recipe = _recipe(tmp_path)
    write_calls(Store(recipe.store), [_call("tone", 1, day=0)])
    with pytest.raises(InputError, match="no release is served.*next: understudy convert"):
        _plan(recipe, Store(recipe.store))


def test_a_dying_task_is_retired_and_all_else_stays_what_it_was(served):
    recipe, store, site = served
    write_calls(store, [_call("tone", number, day=30) for number in range(200, 240)])
    plan = _plan(recipe, store)
    assert plan == _plan(recipe, store) and plan.name.startswith("refinements/1970-01-31-")
    assert _decisions(plan) == {site["tone"]: "keep", site["size"]: "retire"}
    sha, before = registry.current(store)
    # The steward goes on meanwhile: what it does is not undone.
    staged = registry.derive(sha, before, rollout={site["tone"]: Rollout(stage="shadow")})
    registry.promote(store, registry.publish_release(store, staged))

    result = run_plan(recipe, store, plan, say=lambda line: None)
    after = registry.load_release(store, result.release)
    assert after.specialists == {site["tone"]: before.specialists[site["tone"]]}
    assert after.refused[site["size"]].startswith("retired: dying: no call in the last 7 days, 60 were to come")
    assert after.stage_of(site["tone"]) == "shadow" and after.route_model == before.route_model
    assert run_plan(recipe, store, plan, say=lambda line: None) == result
    registry.promote(store, result.release)
    assert _decisions(_plan(recipe, store)) == {site["tone"]: "keep", site["size"]: "keep"}

    write_calls(store, [_call("size", number, day=40) for number in range(200, 400)])
    write_calls(store, [_call("tone", number, day=40) for number in range(240, 400)])
    back = next(one for one in _plan(recipe, store).tasks if one.task_id == site["size"])
    assert (back.decision, back.is_warm, back.facts.stage) == ("retrain", True, None) and "came back" in back.reason


def test_what_the_steward_withdrew_is_trained_again_from_its_last_weights_and_a_demotion_after_the_plan_stays(served):
    recipe, store, site = served
    calm = _plan(recipe, store)
    sha, before = registry.current(store)
    demoted = registry.derive(sha, before, refuse={site["tone"]: f"{DEMOTED}9 of 20 audited conversations differ"})
    registry.promote(store, registry.publish_release(store, demoted))
    assert run_plan(recipe, store, calm, say=lambda line: None).release == registry.current_sha(store)

    write_calls(store, [_call("tone", number, day=1) for number in range(200, 400)])
    (task,) = _plan(recipe, store).trained()
    name = before.specialists[site["tone"]].name
    assert (task.task_id, task.decision, task.is_warm, task.facts.specialist) == (site["tone"], "retrain", True, name)
    assert task.facts.num_learned > 0 and task.facts.num_new >= 20 and task.facts.is_withdrawn


def test_a_task_that_came_is_new_and_moves_nobody_else(served):
    recipe, store, site = served
    write_calls(store, [_call("mood", number, day=1) for number in range(300)])
    plan = _plan(recipe, store)
    assert plan.is_refit and "birth" in plan.refit_reason and plan.route_model.startswith("route_model/")
    (new,) = plan.trained()
    assert new.decision == "new" and new.task_id not in site.values()
    assert {one.facts.moved_share for one in plan.tasks if one.task_id in site.values()} == {0.0}
    held = sum(one.gate.delta for one in registry.current(store)[1].specialists.values())
    assert plan.delta == pytest.approx(recipe.gate.delta - held)


def test_a_run_that_was_cut_off_after_it_had_written_the_new_tasks_ends_as_it_would_have(served, monkeypatch):
    recipe, store, site = served
    write_calls(store, [_call("mood", number, day=1) for number in range(300)])
    plan = _plan(recipe, store)
    kept = [one.model_copy(update={"decision": "keep"}) for one in plan.tasks]
    plan = plan.model_copy(update={"tasks": tuple(kept)})
    assert plan.is_refit
    with monkeypatch.context() as cut:
        cut.setattr("jobs.refine_run.registry.publish_release", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_plan(recipe, store, plan, say=lambda line: None)
    assert len(store.read_json("tasks/identity.json")["tasks"]) == 3, "the new tasks stand already"
    before = registry.current(store)[1]
    after = registry.load_release(store, run_plan(recipe, store, plan, say=lambda line: None).release)
    assert after.route_model == plan.route_model != before.route_model and after.specialists == before.specialists


def test_an_edited_template_is_learned_without_what_was_said_under_the_old_one_or_waits(served, monkeypatch):
    recipe, store, site = served
    sites = {**SITES, "tone": SITES["tone"] + "\nBe brief."}
    monkeypatch.setattr(sys.modules[__name__], "SITES", sites)
    write_calls(store, [_call(one, number, day=30) for one in ("tone", "size") for number in range(200, 230)])
    assert not _plan(recipe, store).is_refit, "so few calls are no template yet"
    write_calls(store, [_call(one, number, day=30) for one in ("tone", "size") for number in range(230, 400)])
    plan = _plan(recipe, store)
    (task,) = plan.trained()
    assert plan.is_refit and f"50% of the calls of {site['tone']} nowhere" in plan.refit_reason
    assert (task.task_id, task.decision, task.is_warm, task.facts.moved_share) == (site["tone"], "retrain", True, 0.5)
    old = [one for one in load_split(store, plan.snapshot, "train", as_served=False) if one.ts < DAY]
    assert task.facts.quarantined == {OUTDATED: sum("tone" in one.source_call_ids[0] for one in old)}
    held = load_split(store, plan.snapshot, "calibration", as_served=True)
    assert task.facts.num_sessions == sum("tone" in one.source_call_ids[0] and one.ts > DAY for one in held)

    poor = recipe.model_copy(update={"refine": recipe.refine.model_copy(update={"min_new_examples": 150})})
    waits = _plan(poor, store)
    assert not waits.is_refit and f"it would send {site['tone']} other calls" in waits.refit_reason
    assert waits.route_model == registry.current(store)[1].route_model and waits.trained() == []


def test_a_forgotten_client_has_the_weights_that_saw_it_replaced_by_others(served):
    recipe, store, site = served
    forget(store, "client1", clock=lambda: 90 * DAY)
    found = {one.task_id: one for one in _plan(recipe, store).tasks}
    assert {(one.decision, one.is_warm) for one in found.values()} == {("retrain", False)}
    assert "asked to be forgotten" in found[site["tone"]].reason


def test_what_went_on_from_weights_that_saw_a_client_has_seen_it(served, tmp_path):
    _, store, site = served
    for path, start in (("run2", "run1"), ("run3", "run2")):
        folder, parent = (f"adapters/{site['tone']}/{name}" for name in (path, start))
        store.publish(
            folder, tmp_path / "empty", {"task_id": site["tone"], "snapshot": "later", "start": {"adapter": parent}}
        )
    calls = {f"tone-{number}" for number in range(200)}
    assert {f"adapters/{site['tone']}/run{n}" for n in (1, 2, 3)} <= set(find_seen(store, calls).adapters)
    assert not any(site["tone"] in path for path in find_seen(store, {f"size-{n}" for n in range(200)}).adapters)


def test_escalations_and_feedback_are_counted_of_recent_calls_and_of_who_may_judge(served):
    recipe, store, site = served
    name = registry.current(store)[1].specialists[site["tone"]].name

    def route(number: int) -> RouteDecision:
        action = "accept" if number % 4 == 0 else "escalate"
        named = {"is_named": number >= 300}
        return RouteDecision(action=action, reason="r", task_id=site["tone"], specialist=name, confidence=0.5, **named)

    # The last forty were asked of the specialist by its name: the router did not choose it, so they count nowhere here.
    write_calls(store, [_call("tone", number, day=30, route=route(number)) for number in range(200, 340)])
    rows = [
        Feedback(
            feedback_id=f"f{n}",
            ts=31 * DAY,
            client_id=f"client{n % 3 if n != 208 else 2}",
            call_id=f"tone-{n}",
            score=0.0,
        )
        for n in (200, 204, 208, 201)
    ]
    write_feedback(store, [*rows, rows[0].model_copy(update={"feedback_id": "late", "ts": 32 * DAY, "score": 1.0})])
    facts = next(one.facts for one in _plan(recipe, store).tasks if one.task_id == site["tone"])
    assert (facts.num_asked, facts.num_escalated, facts.num_recent) == (100, 75, 140)
    assert (facts.num_scored, facts.num_bad) == (3 if 208 % 3 == 2 else 2, 1 + (208 % 3 == 2))
    assert (facts.num_scored_llm, facts.num_bad_llm) == (1, 1)


def test_a_plan_about_another_release_and_gates_that_hold_all_of_delta_are_told(served):
    recipe, store, _ = served
    plan = _plan(recipe, store)
    sha, release = registry.current(store)
    other = release.model_copy(update={"snapshot": "other"})
    registry.promote(store, registry.publish_release(store, other))
    with pytest.raises(InputError, match="nothing that is was derived from it; next: understudy refine plan"):
        run_plan(recipe, store, plan, say=lambda line: None)
    tight = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"delta": 0.1})})
    with pytest.raises(ConfigError, match="gate.delta=0.1: the gates of the served release hold 0.16"):
        _plan(tight, store)


def test_the_verb_plans_shows_and_runs(served, capsys, tmp_path):
    recipe, store, site = served
    words = [f"store={recipe.store}", "recipe=local", "gate.epsilon=0.2", "gate.delta=0.2", "discover.min_clients=1"]
    assert main(["refine", "--dry-run", *words]) == 0 and not store.list("refinements")
    capsys.readouterr()
    assert main(["refine", "plan", "--json", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    (path,) = store.list("refinements", ".json")
    assert shown == store.read_json(path)

    edited = tmp_path / "mine.json"
    next(one for one in shown["tasks"] if one["task_id"] == site["size"])["decision"] = "retire"
    edited.write_text(json.dumps(shown))
    assert main(["refine", "run", str(edited), "--stage", "live", *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    sha, release = registry.current(store)
    assert last == f"{recipe.store}/releases/{sha}.json" and set(release.specialists) == {site["tone"]}
    assert main(["refine", "run", str(edited), "--stage", "live", *words]) == 0, "once more changes nothing"
    assert registry.current_sha(store) == sha
    assert main(["refine", "run", path, *words]) == 0, "a plan whose release is an ancestor of the served one"

    registry.freeze(store, "")
    assert main(["refine", "run", str(edited), "--stage", "live", *words]) == 1
    assert "next: understudy release unfreeze" in capsys.readouterr().err
    for wrong in (["run"], ["train"], ["run", "nowhere.json"]):
        assert main(["refine", *wrong, *words]) == 2
        assert "allowed: " in capsys.readouterr().err


def test_the_served_specialist_is_judged_by_the_measure_of_the_one_that_would_replace_it(tmp_path) -> None:
    """The old one was certified word for word; the recipe has taken a similarity since, which both are held to."""
    gates = {"old": make_specialist().gate, "new": make_specialist().gate.model_copy(update={"text_grader": CHRF})}
    old = make_specialist().model_copy(
        update={
            "prompt_format": PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=99).model_dump(
                mode="json"
            ),
            "gate": gates["old"],
        }
    )
    spec = TaskSpec(
        task_id="triage", name="t", signature="s", kind="text", reference="llm", num_calls=1, share_calls=1.0,
        share_cost=1.0, num_examples={},
    )  # fmt: skip
    calls = [
        Example(
            example_id=f"e{k}", split="calibration", session_id=f"s{k}", ts=1.0, reference="llm",
            request={"messages": [{"role": "user", "content": "When?"}]}, source_call_ids=(f"c{k}",),
            target={"role": "assistant", "content": "Your order ships on Sunday"},
        )
        for k in range(200)
    ]  # fmt: skip

    class Engine:
        async def fingerprint(self) -> str:
            return old.gate.fingerprint

        async def load(self, adapter: str) -> None:
            pass

        async def answer(self, *args, **options):
            return engine_answer("Your order ships on Sunday.", 0.99)

    recipe = _recipe(tmp_path)
    config = SimpleNamespace(margin=0.05, level=0.05)
    work = SimpleNamespace(
        recipe=recipe, store=Store(recipe.store), by_split={"calibration": {"triage": calls}}, say=print,
        plan=SimpleNamespace(config=config),
    )  # fmt: skip
    candidate = Candidate(
        task=spec, base=BASE, base_arm="b", adapter="a", max_answer_tokens=9, text_grader=CHRF,
        prompt_format=PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=99),
    )  # fmt: skip
    evaluation = Evaluation(task_id="triage", gate=gates["new"], arms=(), curve=())
    new = [Outcome(confidence=0.99, agrees=k >= 30, session_id=one.session_id) for k, one in enumerate(calls)]
    _, found = asyncio.run(_compare(work, Engine(), old, candidate, evaluation, new))
    assert found.regression is not None and found.regression.wrong.old_share == 0.0
    assert found.regression.failed is not None, "worse in 30 of 200 calls"
