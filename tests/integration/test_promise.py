"""The whole promise in one run: shadow -> canary -> live -> a fault -> demoted -> retrained -> live, while a client asks on.

Real HTTP, the real graph on Ray Serve with its steward, a real engine, real fine-tunes. Nobody but the steward moves a stage
or withdraws a specialist. The client looks at every answer and at the release that it is of: none may fail, and none but
the faulty specialist's may be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import openai
import pytest
from background_loop import background_loop
from fakes import FakeLLM
from teaching import teach, teach_adapter

from cluster import registry
from cluster.access import ApiKeys, Pseudonyms, keys_folder, load_pseudonym_key
from cluster.calls import write_calls
from cluster.config import validate
from cluster.events import read_events
from cluster.prompts import PromptFormat
from cluster.records import AgentCall, Example, Release, Specialist
from cluster.store import Store, content_hash
from jobs.convert import convert
from jobs.recipe import Recipe
from jobs.refine import make_plan
from jobs.refine_run import run_plan
from jobs.serve import serve_args
from jobs.validate import EngineOf
from serving.app import KEYS_FILE, build
from serving.specialist import ServeEngine, find_engine
from serving.steward import DEMOTED
from training.dataset import build_task_data, save_dataset

pytestmark = pytest.mark.integration

APP, CLIENT, LLM = "test-promise", "home", "llm-1"
DEVICES, LEVELS = ("lamp", "heater", "fan", "radio"), ("low", "medium", "high")
SYSTEM = "Turn the command into JSON with device and level."
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NUM_LEARNED, NUM_TAUGHT, NUM_TURNED = 240, 120, 20
NUM_AT_ONCE, WAIT_S = 2, 120.0
PAUSE_S, LONG_PAUSE_S = 0.05, 0.5
"""Between two questions; the long one while a fine-tune needs the machine."""


class Answer(NamedTuple):
    """What the client got."""

    route: str
    release: str | None
    specialist: str | None
    is_right: bool


class Client:
    """Asks until it is told to stop, each time in a conversation of its own."""

    def __init__(self, port: int, key: str) -> None:
        self._address, self._key = f"http://127.0.0.1:{port}/v1", key
        self._draw = random.Random(5)
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self.pause_s = PAUSE_S
        self.is_over = False

    async def run(self) -> None:
        async with openai.AsyncOpenAI(base_url=self._address, api_key=self._key, max_retries=0, timeout=30.0) as client:
            await asyncio.gather(*(self._ask_on(client) for _ in range(NUM_AT_ONCE)))

    async def _ask_on(self, client: openai.AsyncOpenAI) -> None:
        while not self.is_over:
            text, said = draw_command(self._draw)
            session = {"x-session-id": f"{self._draw.random()}"}
            try:
                reply = await client.chat.completions.with_raw_response.create(
                    model=LLM, extra_headers=session, **request_of(text)
                )
                message = reply.parse().choices[0].message.content
            except openai.OpenAIError as error:
                self.failures.append(repr(error))
                continue
            names = (reply.headers.get(f"x-understudy-{name}") for name in ("route", "release", "specialist"))
            self.answers.append(Answer(*names, message == said))  # type: ignore[arg-type]
            await asyncio.sleep(self.pause_s)


class House(NamedTuple):
    """What the test has in hand."""

    recipe: Recipe
    store: Store
    client: Client
    loop: asyncio.AbstractEventLoop

    def served(self) -> tuple[str, Release]:
        found = registry.current(self.store)
        assert found is not None
        return found

    def wait(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, f"{what}: not after {WAIT_S:g} s; {read_events(self.store)[-3:]}"
            assert not self.client.failures, self.client.failures[:3]
            time.sleep(0.1)

    def wait_for_stage(self, task: str, stage: str) -> str:
        """Until the steward has moved the task there; returns the release."""
        self.wait(stage, lambda: self.served()[1].stage_of(task) == stage and task in self.served()[1].specialists)
        return self.served()[0]

    def wait_for_answers(self, number: int, release: str, route: str) -> None:
        """Until the client has had so many, done so, since now."""
        begin = len(self.client.answers)

        def are_there() -> bool:
            return sum((one.release, one.route) == (release, route) for one in self.client.answers[begin:]) >= number

        self.wait(f"{number} answers: {route}", are_there)


def draw_command(draw: random.Random) -> tuple[str, str]:
    """(what is asked, the right answer)."""
    device, level = draw.choice(DEVICES), draw.choice(LEVELS)
    text = f"Please put the {device} on {level} for {draw.randrange(100, 10_000)} minutes"
    return text, json.dumps({"device": device, "level": level}, separators=(",", ":"))


def answer_of(text: str, turn: int = 0) -> str:
    """The right answer, or the one whose level is `turn` further."""
    words = text.split()
    level = LEVELS[(LEVELS.index(words[5]) + turn) % len(LEVELS)]
    return json.dumps({"device": words[3], "level": level}, separators=(",", ":"))


def request_of(text: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"messages": messages, "response_format": {"type": "json_object"}}


def example_of(number: int, turn: int = 0) -> Example:
    text = draw_command(random.Random(number))[0]
    return Example(
        example_id=f"e{number}",
        split="train",
        session_id=f"e{number}",
        ts=1.0,
        request=request_of(text),
        target={"role": "assistant", "content": answer_of(text, turn)},
        reference="llm",
        source_call_ids=(f"e{number}",),
    )


def learned_call(number: int, client_id: str) -> AgentCall:
    """One of the calls that were captured in the last hour."""
    example = example_of(number)
    return AgentCall(
        call_id=f"call-{number}",
        ts=time.time() - 3_600 + 10 * number,
        client_id=client_id,
        agent="home",
        session_id=f"session-{number}",
        step=0,
        request=example.request,
        response={"choices": [{"message": example.target, "finish_reason": "stop"}]},
    )


def save_rows(folder: pathlib.Path, prompt_format: PromptFormat, tokenizer: Any, turn: int = 0) -> pathlib.Path:
    """What a specialist with this prompt format learns from, the levels of its answers turned."""
    data = build_task_data([example_of(number, turn) for number in range(1_000, 1_120)], [], prompt_format, tokenizer)
    assert data.num_skipped == 0
    save_dataset(data.train, folder)
    return folder


def make_base(folder: pathlib.Path, toy: Any) -> pathlib.Path:
    """A base in a user's folder, which knows the task already: what is tested is not how well it is learned."""
    from transformers import AutoTokenizer

    base = folder / "base"
    shutil.copytree(toy.base_path, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    prompt_format = PromptFormat(kind="chat", answer_kind="json", max_prompt_tokens=200)
    teach(base, save_rows(folder / "rows", prompt_format, tokenizer), tokenizer.pad_token_id, num_steps=NUM_TAUGHT)
    tokenizer.save_pretrained(base)
    return base


def publish_faulty(house: House, folder: pathlib.Path, good: Specialist) -> Specialist:
    """A specialist like the good one that went on to learn wrong answers, released past every check."""
    from transformers import AutoTokenizer

    store = house.store
    base = store.fetch(good.base, folder / "fetched")
    rows = save_rows(
        folder / "wrong", PromptFormat.model_validate(good.prompt_format), AutoTokenizer.from_pretrained(base), turn=1
    )
    start = store.fetch(good.adapter, folder / "fetched")
    pad = AutoTokenizer.from_pretrained(base).pad_token_id
    taught = teach_adapter(base, rows, pad, house.recipe.finetune, start, folder / "faulty", num_steps=NUM_TURNED)
    known = {key: one for key, one in store.manifest(good.adapter).items() if key in ("snapshot", "config", "task_id")}
    path = f"{good.adapter}-faulty"
    sha = store.publish(path, taught, known)["sha256"]
    return good.model_copy(update={"adapter": path, "sha": content_hash([sha])})


@pytest.fixture
def house(serve_port: int, toy: Any, tmp_path: pathlib.Path) -> Iterator[House]:
    """A store with captured calls, an LLM that answers by the rule, and a recipe that hurries."""
    store, llm = Store(str(tmp_path / "store")), FakeLLM()
    llm.answer_with = lambda request: {"role": "assistant", "content": answer_of(request["messages"][1]["content"])}
    key = ApiKeys(keys_folder(store.uri) / KEYS_FILE).create(CLIENT, "agent")
    pseudonym = Pseudonyms(load_pseudonym_key(store.uri)).of("client", CLIENT)
    write_calls(store, [learned_call(number, pseudonym) for number in range(NUM_LEARNED)])
    with background_loop() as loop:
        address = asyncio.run_coroutine_threadsafe(llm.start(), loop).result()
        settings = {
            "store": store.uri,
            "upstream": [{"base_url": address}],
            "select": {"base": str(make_base(tmp_path, toy))},
            "specialists": {"max_adapters": 3, "max_lora_rank": 8, "max_model_tokens": 256, "max_num_seqs": 16},
            "gate": {"epsilon": 0.2, "delta": 0.2},
            "curate": {"near_duplicate_similarity": 1.0, "max_near_duplicates": 10_000},
            "finetune": {"num_steps": 30, "warmup_steps": 2, "checkpoint_every": 30, "learning_rate": 1e-3},
            "refine": {"min_new_examples": 10, "learning_rate_factor": 1.0},
            "rollout": {"canary_share": 0.5, "audit_share": 1.0},
            "audit": {"share": 1.0},
            "capture": {"flush_interval_s": 0.2},
            "steward": {"interval_s": 0.3, "session_idle_s": 0.0},
        }
        try:
            yield House(validate(Recipe, settings), store, Client(serve_port, key), loop)
        finally:
            asyncio.run_coroutine_threadsafe(llm.close(), loop).result()


@contextlib.contextmanager
def deployed(house: House) -> Iterator[EngineOf]:
    """Whoever asks for the engine of a base deploys the graph with it; it serves until the block is left."""
    from ray import serve

    deployment = serve.deployment

    def without_cpu(*parts: Any, **options: Any) -> Any:
        """Of the tests' two CPUs the engine holds one; a refinement needs the other while the graph serves."""
        changed = {"ray_actor_options": {"num_cpus": 0}} if options.get("name") == "gateway" else {}
        return deployment(*parts, **{**options, **changed})

    @contextlib.contextmanager
    def engine_of(base: str) -> Iterator[ServeEngine]:
        if APP not in serve.status().applications:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(serve, "deployment", without_cpu)
                app = build(serve_args(house.recipe, (base,)))
            serve.run(app, name=APP, route_prefix="/")
        yield find_engine(APP, base)

    try:
        yield engine_of
    finally:
        serve.delete(APP)


@contextlib.contextmanager
def asking(house: House) -> Iterator[None]:
    """The client asks while the block runs; each answer that it had by the end is one that it looked at."""
    running = asyncio.run_coroutine_threadsafe(house.client.run(), house.loop)
    try:
        yield
    finally:
        house.client.is_over = True
        running.result(timeout=60)


def test_a_specialist_that_goes_bad_is_withdrawn_retrained_and_back_without_a_failed_call(
    house: House, tmp_path: pathlib.Path
) -> None:
    store, recipe, client, said = house.store, house.recipe, house.client, list[str]()
    with deployed(house) as engine_of:
        conversion = convert(recipe, say=said.append, engine_of=engine_of)
        first = registry.load_release(store, conversion.release).specialists
        assert len(first) == 1 and not conversion.refused, said
        (task,) = first
        with asking(house):
            house.wait_for_answers(5, None, "llm")  # type: ignore[arg-type]
            shadow = registry.promote_at(store, conversion.release, recipe.rollout.at())
            house.wait_for_answers(3, shadow, "llm")
            house.wait_for_stage(task, "canary")
            live = house.wait_for_stage(task, "live")
            house.wait_for_answers(20, live, "accept")

            faulty = publish_faulty(house, tmp_path, first[task])
            derived = registry.derive(*house.served())
            bad = registry.publish_release(store, derived.model_copy(update={"specialists": {task: faulty}}))
            registry.promote(store, bad, expected=live)
            house.wait("withdrawn", lambda: house.served()[1].refused.get(task, "").startswith(DEMOTED))
            withdrawn = house.served()[0]
            house.wait_for_answers(120, withdrawn, "llm")

            plan = make_plan(recipe, store, said.append)
            (decided,) = plan.tasks
            assert (decided.decision, decided.is_warm) == ("retrain", True) and "withdrawn" in decided.reason, decided
            client.pause_s = LONG_PAUSE_S
            result = run_plan(recipe, store, plan, said.append, engine_of)
            client.pause_s = PAUSE_S
            assert result.outcomes[task].released, (result.outcomes, said[-6:])
            again = registry.promote_at(store, result.release, recipe.rollout.at(), expected=withdrawn)
            house.wait_for_answers(3, again, "llm")
            house.wait_for_stage(task, "canary")
            house.wait_for_answers(20, house.wait_for_stage(task, "live"), "accept")

    assert client.failures == [] and len(client.answers) > 200
    wrong = [one for one in client.answers if not one.is_right]
    assert wrong and {(one.specialist, one.release, one.route) for one in wrong} == {(faulty.name, bad, "accept")}
    for one in client.answers:
        stage = registry.load_release(store, one.release).rollout.get(task) if one.release else None
        assert one.route == "llm" or stage is None or stage.stage == "canary", one
        assert one.release != withdrawn or one.route == "llm", one
    moves = [(event.kind, event.by) for event in read_events(store)]
    up = [("promote", "person"), ("advance", "steward"), ("advance", "steward")]
    assert moves == [*up, ("promote", "person"), ("demote", "steward"), *up]
    back = house.served()[1].specialists[task]
    assert back.name == result.outcomes[task].released not in (first[task].name, faulty.name)
