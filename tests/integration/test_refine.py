"""S6 on real Ray Train: a store is refined task by task, training goes on from the served weights, and worse ones stay out."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeEngine

from cluster import registry
from cluster.calls import write_calls
from cluster.config import validate
from cluster.engine import EngineAnswer
from cluster.errors import InputError
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, Release
from cluster.store import Store
from jobs.convert import convert
from jobs.recipe import Recipe
from jobs.refine import make_plan
from jobs.refine_run import run_plan
from serving.evidence import Comparison, begin, count
from serving.steward import STATE_FILE, State
from training.refine import Plan, read_plan

pytestmark = pytest.mark.integration

DEVICES, LEVELS = ("lamp", "heater", "fan", "radio"), ("low", "medium", "high")
SYSTEMS = {
    "device": "Turn the command into JSON with device and level.",
    "level": "Say as JSON how strong it shall be.",
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DAY = 86_400.0


class RuleEngine(FakeEngine):
    """Answers by the rule that the calls follow; some adapters are wrong about every fifth call."""

    def __init__(self, bad: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__()
        self.bad = bad
        self.asked: set[str | None] = set()

    async def answer(
        self,
        adapter: str | None,
        prompt_format: PromptFormat,
        request: dict[str, Any],
        max_answer_tokens: int,
        stop_below: float = 0.0,
    ) -> EngineAnswer:
        self.asked.add(adapter)
        text = _answer(request["messages"][0]["content"], request["messages"][1]["content"])
        if adapter in self.bad and int(request["messages"][1]["content"].split()[-2]) % 5 == 0:
            text = '{"level":"none"}'
        message = {"role": "assistant", "content": text}
        return EngineAnswer(
            text=text, message=message, confidence=0.9, finish_reason="stop", completion_tokens=5, prompt_tokens=9
        )


class Refinery:
    """A store with two tasks that are served, and what is done with it."""

    def __init__(self, root: pathlib.Path, base: str) -> None:
        self.store = Store(str(root / "store"))
        settings = {
            "store": self.store.uri,
            "select": {"base": base},
            "specialists": {"max_model_tokens": 256},
            "gate": {"epsilon": 0.2, "delta": 0.2},
            "curate": {"near_duplicate_similarity": 1.0, "max_near_duplicates": 10_000},
            "finetune": {"num_steps": 6, "batch_size": 8, "warmup_steps": 1, "checkpoint_every": 6},
            # So slow that the weights can be told from where they began.
            "refine": {"min_new_examples": 10, "replay_share": 0.25, "learning_rate_factor": 1e-6, "margin": 0.15},
        }
        self.recipe = validate(Recipe, settings)
        self.engine = RuleEngine()
        self.said: list[str] = []

    @contextlib.contextmanager
    def engine_of(self, base: str) -> Iterator[RuleEngine]:
        yield self.engine

    def plan(self) -> Plan:
        return make_plan(self.recipe, self.store, self.said.append)

    def run(self, plan: Plan) -> Any:
        return run_plan(self.recipe, self.store, plan, self.said.append, self.engine_of)

    def served(self) -> Release:
        found = registry.current(self.store)
        assert found is not None
        return found[1]


@pytest.fixture(scope="module")
def refinery(ray_cluster: None, toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Refinery:
    root = tmp_path_factory.mktemp("refine")
    base = root / "base"
    _write_base(base, toy)
    made = Refinery(root, str(base))
    write_calls(made.store, [_call(number) for number in range(320)])
    conversion = convert(made.recipe, say=made.said.append, engine_of=made.engine_of)
    assert conversion.refused == {} and len(conversion.tasks) == 2, made.said
    registry.promote(made.store, conversion.release)
    return made


def test_a_store_is_refined_where_evidence_asks_for_it_and_nowhere_else(
    refinery: Refinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, before = refinery.store, refinery.served()
    calm = refinery.plan()
    assert [(one.decision, one.reason) for one in calm.tasks] == [("keep", "nothing speaks against it")] * 2
    assert calm == refinery.plan() and not calm.is_refit
    assert refinery.run(calm).release == registry.current_sha(store), "nothing changes where all is kept"

    # Later calls, and audits that speak against one of the two.
    write_calls(store, [_call(number) for number in range(320, 720)])
    bad, good = sorted(before.specialists)
    _speak_against(store, before, bad)
    plan = refinery.plan()
    assert plan == refinery.plan() and plan == read_plan(json.dumps(plan.model_dump(mode="json")), "plan")
    decided = {one.task_id: one for one in plan.tasks}
    assert (decided[bad].decision, decided[bad].is_warm) == ("retrain", True), decided[bad]
    assert decided[good].decision == "keep" and decided[bad].facts.num_new >= 10
    assert 0 < plan.delta < refinery.recipe.gate.delta

    result = refinery.run(plan)
    old, new = before.specialists[bad], registry.load_release(store, result.release).specialists
    assert new[good] == before.specialists[good], "a task that is kept keeps its specialist and gate"
    assert result.outcomes[bad].released == new[bad].name != old.name and new[bad].base == old.base
    manifest = store.manifest(new[bad].adapter)
    assert manifest["start"]["adapter"] == old.adapter and manifest["start"]["replay_share"] == 0.25
    assert manifest["start"]["num_new"] == decided[bad].facts.num_new
    assert manifest["start"]["num_replayed"] == round(manifest["start"]["num_new"] / 3)
    report = store.read_json(new[bad].report)
    assert report["regression"]["replaced"] == old.name and report["regression"]["failed"] is None
    assert old.adapter in refinery.engine.asked
    _check_weights(store, old.adapter, new[bad].adapter)

    waits = next(one for one in refinery.plan().tasks if one.task_id == bad)
    assert waits.decision == "keep" and f"{new[bad].name} in release {result.release[:12]} waits" in waits.reason
    monkeypatch.setattr("jobs.refine_run._train", None)
    assert refinery.run(plan) == result, "a plan that was run is not run again"


def test_what_is_not_shown_to_be_as_good_stays_out(refinery: Refinery) -> None:
    store, before = refinery.store, refinery.served()
    (plan,) = [
        one
        for path in store.list("refinements", ".json")
        if ".result." not in path and (one := read_plan(store.read_bytes(path).decode(), path)).trained()
    ]
    (task,) = [one.task_id for one in plan.trained()]
    edited = plan.model_copy(update={"config": plan.config.model_copy(update={"margin": 0.03})})
    (retrained,) = {
        path.rsplit("/", 1)[0] for path in store.list(f"adapters/{task}") if path.endswith("manifest.json")
    } - {before.specialists[task].adapter}
    refinery.engine = RuleEngine(bad={retrained})
    result = refinery.run(edited)
    assert result.outcomes[task].released is None, refinery.said[-5:]
    assert result.release == registry.current_sha(store) and refinery.served() == before
    again = next(one for one in refinery.plan().tasks if one.task_id == task)
    assert again.decision == "keep" and "at 360 calls, 360 now; tried again from 396" in again.reason

    with pytest.raises(InputError, match="is not served and nothing that is was derived from it"):
        refinery.run(edited.model_copy(update={"release": "0" * 64}))


def _write_base(folder: pathlib.Path, toy: Any) -> None:
    """The toy's untrained base, with a chat template, as a user's folder has one."""
    from transformers import AutoTokenizer

    shutil.copytree(toy.base_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def _check_weights(store: Store, old: str, new: str) -> None:
    """The new adapter is the old one, moved a little; an untrained one's second matrix would be all zeros at first."""
    import torch
    from safetensors.torch import load

    weights = [load(store.read_bytes(f"{path}/adapter_model.safetensors")) for path in (old, new)]
    distance = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert distance < 1e-6 < max(float(one.abs().max()) for name, one in weights[1].items() if "lora_B" in name)
    assert isinstance(next(iter(weights[0].values())), torch.Tensor)


def _speak_against(store: Store, release: Release, task: str) -> None:
    """As much evidence as asks for a retraining, and too little to withdraw the specialist."""
    one = release.specialists[task]
    evidence = {one.name: begin(one, "live", 0.05, 0.0)}
    seen = [Comparison(f"a{n}", n, f"s{n}", "audit", one.name, n % 2 == 0) for n in range(1, 16)]
    state = State(evidence=count(evidence, seen, now=1_000.0, idle_s=300.0))
    assert 5 <= state.evidence[one.name].risk.e_value < 20
    store.write_json(STATE_FILE, state.model_dump(mode="json"))


def _answer(system: str, text: str) -> str:
    device, level = text.split()[3], text.split()[5]
    found = {"level": level} if system == SYSTEMS["level"] else {"device": device, "level": level}
    return json.dumps(found, separators=(",", ":"))


def _call(number: int) -> AgentCall:
    system = SYSTEMS["device" if number % 2 else "level"]
    text = f"Please put the {DEVICES[number // 2 % 4]} on {LEVELS[number // 8 % 3]} for {number} minutes"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    message = {"role": "assistant", "content": _answer(system, text)}
    return AgentCall(
        call_id=f"call-{number}",
        ts=DAY + 60.0 * number,
        client_id="client",
        agent="home",
        session_id=f"session-{number}",
        step=0,
        request={"messages": messages, "response_format": {"type": "json_object"}},
        response={"choices": [{"message": message, "finish_reason": "stop"}]},
    )
