"""training/bounding.py: a task of which only a part fits the base is learned from that part, and the rest stays on the LLM."""

import asyncio

import pytest
from fakes import FakeEngine, engine_answer

from cluster.acceptance import AnswerForm
from cluster.errors import InputError
from cluster.faces import FacesConfig
from cluster.prompts import PromptFormat, render_prompt
from cluster.records import Example, TaskSpec
from cluster.store import Store
from training.bounding import describe_left_out, refuse_lengths
from training.dataset import TaskData, tokenise_tasks
from training.evaluation import Candidate, evaluate
from training.gate import GateConfig
from training.ledger import CalibrationLedger
from training.scratch import texts_of, train_tokenizer

LIMIT = 64
LONG = "and another sentence of the long document that nobody could learn from "


def make_example(number: int, is_long: bool) -> Example:
    text = f"please route item {number} " + LONG * (8 if is_long else 0)
    return Example(
        example_id=f"e{number}",
        split="train",
        session_id=f"s{number}",
        ts=float(number),
        request={"messages": [{"role": "user", "content": text}]},
        target={"role": "assistant", "content": "yes"},
        reference="llm",
        source_call_ids=(f"c{number}",),
    )


def make_examples(first: int, num: int) -> list[Example]:
    """Three in four are far longer than the base takes."""
    return [make_example(n, n % 4 > 0) for n in range(first, first + num)]


TASK = TaskSpec(
    task_id="t", name="t", signature="s", kind="label", reference="llm", num_calls=400, share_calls=1.0, share_cost=1.0,
    num_examples={"calibration": 240},
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple[TaskData, object]:
    train = make_examples(0, 80)
    tokenizer = train_tokenizer(texts_of(train, ()), 2048)
    found = tokenise_tasks([TASK], {"t": train}, {"t": []}, tokenizer, is_scratch=True, max_prompt_tokens=LIMIT)
    return found["t"], tokenizer


def test_the_part_that_fits_is_learned_whole_and_the_rest_is_named(data):
    found, _ = data
    assert (len(found.train), found.num_skipped) == (20, 60)
    assert all(row["num_prompt"] <= LIMIT for row in found.train), "nothing is cut short"
    assert refuse_lengths(found, "b", 32, num_calibration=240, num_needed=59) is None
    assert describe_left_out(found).startswith("60 of 80 train examples have prompts longer than 64 tokens")


def test_the_form_of_answers_is_learned_from_the_train_split_and_goes_with_the_prompt_format(data):
    form = data[0].prompt_format.answer_form
    assert form == AnswerForm(max_chars=2 * len("yes"), scripts=("LATIN",), follows_language=False, repeats=False)
    assert PromptFormat.model_validate(data[0].prompt_format.model_dump(mode="json")) == data[0].prompt_format


def test_a_task_of_which_too_little_fits_is_refused_with_the_numbers(data):
    found, _ = data
    reason = refuse_lengths(found, "b", 32, num_calibration=200, num_needed=59)
    assert reason.startswith("60 of 80 examples do not fit base b: prompts longer than 64 tokens")
    assert reason.endswith("about 50 calibration calls do, and 59 are needed")
    assert refuse_lengths(found._replace(train=[]), "b", 32, 9999, 59).startswith("60 of 60 examples do not fit")
    assert "answers are longer than 1 tokens" in refuse_lengths(found, "b", 1, 9999, 59)
    assert describe_left_out(found._replace(num_skipped=0)) is None


def test_the_gate_of_such_a_task_is_about_the_part_that_fits_and_long_calls_escalate(data, tmp_path):
    """The engine refuses by the prompt alone, as in serving; validation counts that as no confidence."""
    found, tokenizer = data

    class Engine(FakeEngine):
        async def answer(self, adapter, prompt_format: PromptFormat, request, max_answer_tokens, stop_below=0.0):
            render_prompt(request, prompt_format, tokenizer)
            return engine_answer("yes", 0.99)

    with pytest.raises(InputError, match="this call goes to the LLM"):
        render_prompt(make_example(1, True).request, found.prompt_format, tokenizer)
    candidate = Candidate(
        task=TASK, base="b", base_arm="untrained", adapter="a", prompt_format=found.prompt_format, max_answer_tokens=8
    )
    splits = {
        s: make_examples(1000 * k, n)
        for k, (s, n) in enumerate([("validation", 200), ("calibration", 400), ("test", 40)], 1)
    }
    ledger = CalibrationLedger(Store(str(tmp_path)))
    evaluation = asyncio.run(
        evaluate(candidate, Engine(), splits, GateConfig(), 0.05, ledger, 1.0, FacesConfig(), asyncio.Semaphore(64))
    )
    assert evaluation.gate.is_open and evaluation.gate.coverage == 0.25
    assert evaluation.gate.num_accepted == 100 and evaluation.gate.num_disagreements == 0
