"""Free text agrees by a stated similarity, or by a judge asked in both orders; how often either errs is measured."""

import asyncio
import json
from collections import Counter

import pytest
from fakes import tool_message
from hypothesis import given
from hypothesis import strategies as st

from cluster.answers import grade
from cluster.judgements import Judgements
from cluster.judging import Judge, read_verdict
from cluster.records import Example, TaskSpec, TextGrader
from cluster.store import Store
from cluster.text_grading import chrf, embedding_cosine, rouge_l
from training.evaluation_config import EvaluationConfig
from training.text_graders import agrees, describe_errors, measure_grader, refusal_of

CHRF = TextGrader(name="chrf", agree_at=0.8)
JUDGED = TextGrader(name="judge")
REQUEST = {"messages": [{"role": "user", "content": "Where is it?"}]}
TASK = TaskSpec(
    task_id="t",
    name="t",
    signature="s",
    kind="text",
    reference="llm",
    num_calls=1,
    share_calls=1.0,
    share_cost=1.0,
    num_examples={},
)
WORDS = st.lists(st.sampled_from("the order ships on sunday to paris with a refund".split()), min_size=1, max_size=12)


def saying(text: str) -> dict:
    return {"role": "assistant", "content": text}


def make_example(number: int, text: str) -> Example:
    return Example(
        example_id=f"e{number}",
        split="validation",
        session_id=f"s{number}",
        ts=float(number),
        request=REQUEST,
        target=saying(text),
        reference="llm",
        source_call_ids=(f"c{number}",),
    )


@pytest.mark.parametrize(
    ("answer", "reference", "by_chrf", "by_rouge"),
    [
        ("the order ships on Sunday", "the order ships on Monday morning", 0.581488, 0.727273),
        ("refund of 20 euros", "a refund of 20 euros was made", 0.658794, 0.727273),
    ],
)
def test_similarities_are_those_of_sacrebleu_and_rouge_score(answer, reference, by_chrf, by_rouge) -> None:
    assert chrf(answer, reference) == pytest.approx(by_chrf, abs=1e-6)
    assert rouge_l(answer, reference) == pytest.approx(by_rouge, abs=1e-6)


@given(WORDS, WORDS)
def test_similarities_are_shares_and_equal_texts_are_alike(one, other) -> None:
    left, right = " ".join(one), " ".join(other)
    for measure in (chrf, rouge_l, lambda a, b: embedding_cosine(a, b, "hashed")):
        assert 0 <= measure(left, right) <= 1
        assert measure(left, left) == pytest.approx(1)
    common = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, its in enumerate(other):
            common[i + 1][j + 1] = common[i][j] + 1 if word == its else max(common[i][j + 1], common[i + 1][j])
    assert rouge_l(left, right) == pytest.approx(2 * common[-1][-1] / (len(one) + len(other)))


def test_text_agrees_from_the_stated_similarity_and_other_kinds_by_value() -> None:
    near, far = saying("Your order ships on Sunday."), saying("We have refunded 20 euros.")
    reference = saying("Your order ships on Sunday")
    assert not grade(near, reference, "text", {}).agrees and grade(near, reference, "text", {}, text_grader=CHRF).agrees
    found = grade(far, reference, "text", {}, text_grader=CHRF)
    assert not found.agrees and 0 < found.score < 0.5
    assert not grade(saying("refunds"), saying("refund"), "label", {}, text_grader=CHRF).agrees
    assert not grade(None, reference, "text", {}, text_grader=CHRF).agrees


def test_a_recipe_names_the_grader_of_free_text_alone() -> None:
    config = EvaluationConfig(text_grader="rouge_l", text_agree_at=0.7)
    assert config.grader_of("text") == TextGrader(name="rouge_l", agree_at=0.7)
    assert config.grader_of("json") is None and EvaluationConfig().grader_of("text") is None
    assert EvaluationConfig(text_grader="judge").grader_of("text") == JUDGED


@pytest.mark.parametrize("name", ["chrf", "rouge_l", "embedding"])
def test_false_agreement_is_measured_on_answers_of_other_calls(name) -> None:
    """Half of the answers differ in a number alone: a lax grader takes them for the same, and is refused."""
    texts = [f"Your order number {k:04} ships from the warehouse on Sunday morning." for k in range(60)]
    lax, strict = (TextGrader(name=name, agree_at=at) for at in (0.6, 0.999))
    examples = [make_example(k, text) for k, text in enumerate(texts)]
    wrong = asyncio.run(measure_grader(TASK, examples, lax, None))
    assert wrong.num_shuffled == wrong.num_false_agreements == 60 and wrong.false_agreement[0] > 0.9
    assert "evaluation.text_agree_at" in str(refusal_of(wrong, 0.05)) and "60 of 60" in str(refusal_of(wrong, 0.05))
    if name != "embedding":  # its features abstract numbers
        right = asyncio.run(measure_grader(TASK, examples, strict, None))
        assert right.num_false_agreements == 0 and refusal_of(right, 0.05) is None
        assert "Of 60 pairs of unrelated answers it finds 0 alike" in describe_errors(right)


def test_pairs_that_say_the_very_same_are_no_error() -> None:
    found = asyncio.run(measure_grader(TASK, [make_example(k, "All is well.") for k in range(9)], CHRF, None))
    assert (found.num_shuffled, found.num_false_agreements, found.false_agreement) == (0, 0, (0.0, 1.0))
    assert refusal_of(found, 0.0) is None


class Scripted:
    """A judge's LLM that prefers by a rule and counts what it is asked."""

    def __init__(self, rule) -> None:
        self.rule, self.asked = rule, Counter()

    async def __call__(self, system: str, user: str) -> str | None:
        shown = json.loads(user)
        self.asked[shown["first"], shown["second"]] += 1
        verdict = self.rule(shown["first"], shown["second"])
        return verdict and json.dumps({"verdict": verdict})


def by_first_word(first: str, second: str) -> str:
    return "same" if first.split()[0] == second.split()[0] else "second"


def judged(rule, answer: str, reference: str, remembered=None) -> tuple[bool | None, Judge, Scripted]:
    chat = Scripted(rule)
    judge = Judge(chat, {} if remembered is None else remembered, b"k" * 32)
    return asyncio.run(judge.agrees(REQUEST, answer, reference)), judge, chat


def test_a_judge_is_asked_in_both_orders_and_a_taste_for_a_place_never_agrees() -> None:
    agreed, judge, chat = judged(by_first_word, "yes indeed", "yes")
    assert agreed is True and chat.asked == {("yes indeed", "yes"): 1, ("yes", "yes indeed"): 1}
    for rule in (lambda *_: "first", lambda *_: "second"):
        agreed, judge, _ = judged(rule, "a", "b")
        assert agreed is False and judge.num_contradictions == 1
    better = {("a", "b"): "first", ("b", "a"): "second"}
    assert judged(lambda *pair: better[pair], "a", "b")[0] is True, "an answer that is better is no disagreement"
    worse = {("a", "b"): "second", ("b", "a"): "first"}
    agreed, judge, _ = judged(lambda *pair: worse[pair], "a", "b")
    assert agreed is False and judge.num_contradictions == 0


@pytest.mark.parametrize("target", [{"content": None, "refusal": "no"}, tool_message(("send", {"to": "x"}))])
def test_no_judge_is_asked_whether_text_agrees_with_what_is_none(target: dict) -> None:
    chat = Scripted(lambda first, second: "first" if first else "second")
    example = make_example(1, "yes").model_copy(update={"target": {"role": "assistant", **target}})
    found = agrees(saying("yes"), example, TASK, TextGrader(name="judge"), Judge(chat, {}, b"k"))
    assert asyncio.run(found) is False and not chat.asked


def test_without_a_verdict_nothing_is_said() -> None:
    agreed, judge, _ = judged(lambda *_: None, "a", "b")
    assert agreed is None and judge.num_unjudged == 1
    assert read_verdict('{"verdict": "same"} or {"verdict": "first"}') is None and read_verdict("same") is None
    assert read_verdict('```json\n{"verdict": "second"}\n```') == "second"


def test_what_was_judged_is_kept_encrypted_and_paid_for_once(tmp_path) -> None:
    store = Store(str(tmp_path / "store"))
    kept = Judgements(store)
    assert judged(by_first_word, "yes indeed", "yes", kept)[0] is True
    kept.save()
    kept.save()
    (path,) = store.list("judgements", ".parquet")
    raw = store.read_bytes(path)
    assert b"same" not in raw and b"indeed" not in raw
    agreed, judge, chat = judged(by_first_word, "yes indeed", "yes", Judgements(store))
    assert agreed is True and not chat.asked and judge.num_remembered == 2
    other = Judge(Scripted(by_first_word), Judgements(store), b"j" * 32)
    assert asyncio.run(other.agrees(REQUEST, "yes indeed", "yes")) is True and other.num_asked == 2, "the key matters"


def test_a_judges_own_errors_are_measured_on_pairs_that_are_known() -> None:
    examples = [make_example(k, f"{'no' if k % 5 == 0 else 'yes'} {k}") for k in range(20)]
    kind, harsh = Judge(Scripted(lambda *_: "same"), {}, b""), Judge(Scripted(lambda *_: "second"), {}, b"")
    found = asyncio.run(measure_grader(TASK, examples, JUDGED, kind))
    assert (found.num_shuffled, found.num_false_agreements, found.num_false_disagreements) == (20, 20, 0)
    assert "judge" in str(refusal_of(found, 0.05))
    found = asyncio.run(measure_grader(TASK, examples, JUDGED, harsh))
    assert (found.num_false_agreements, found.num_same, found.num_false_disagreements) == (0, 20, 20)
    assert "it parts 20" in describe_errors(found)


def test_a_judge_that_seldom_speaks_does_not_seem_to_err_seldom() -> None:
    """It speaks of one answer in ten, and takes all for the same: no better than one that speaks always."""
    examples = [make_example(k, f"answer {k}") for k in range(30)]
    shy = Judge(Scripted(lambda first, second: "same" if "answer 7" in (first, second) else None), {}, b"")
    found = asyncio.run(measure_grader(TASK, examples, JUDGED, shy))
    assert (found.num_shuffled, found.num_false_agreements) == (2, 2) and found.num_unjudged == 57
    assert "2 of 2" in str(refusal_of(found, 0.1))
