"""Loops, length, scripts and languages: what is told to be no answer of the task, and what the task's own answers excuse."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import REQUEST, engine_answer
from hypothesis import given
from hypothesis import strategies as st

from cluster.acceptance import AnswerForm, deformed_reason, language_of, learn_form
from cluster.faces import FacesConfig, Facing
from cluster.prompts import PromptFormat
from cluster.servable import invalid_reason

EN = "Thank you for the order, it is on its way and will be with you in a few days."
DE = "Vielen Dank für die Bestellung, sie ist auf dem Weg und wird nicht später als morgen bei ihnen sein."
FORM = AnswerForm(max_chars=4000, scripts=("LATIN",), follows_language=False, repeats=False)


def _request(text: str, system: str = "Answer the customer.") -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]}


@given(unit=st.text("abc de", min_size=1, max_size=64), before=st.text("xyz "), after=st.text("xyz "))
def test_eight_copies_in_a_row_are_a_loop_wherever_they_stand(unit: str, before: str, after: str) -> None:
    num_copies = max(8, -(-64 // len(unit)))
    text = before + unit * num_copies + after
    is_word = any(map(str.isalpha, unit))
    assert (deformed_reason(text, REQUEST, FORM) == "the answer repeats itself") == is_word


@pytest.mark.parametrize(
    "text",
    [
        "-" * 80 + "\n| a | b |\n" + "=" * 80,
        "[" + "0, " * 100 + "0]",
        '{"note":"' + " " * 300 + '"}',
        "ha" * 20,
        ", ".join(f"order {number} was sent" for number in range(40)),
    ],
    ids=["rules", "zeros", "spaces", "short", "counted"],
)
def test_what_only_looks_like_a_loop_is_kept(text: str) -> None:
    assert deformed_reason(text, REQUEST, FORM) is None


def test_a_loop_that_the_request_or_the_tasks_answers_have_is_kept() -> None:
    text = "again and " * 20
    assert deformed_reason(text, REQUEST, None) == "the answer repeats itself"
    assert deformed_reason(text, _request(f"Copy this: {text}!"), FORM) is None
    learned = learn_form([(REQUEST, text)])
    assert learned is not None and learned.repeats and deformed_reason(text, REQUEST, learned) is None


def test_an_answer_may_have_twice_the_characters_of_the_longest_train_answer() -> None:
    form = learn_form([(REQUEST, "refund"), (REQUEST, "exchange")])
    assert form is not None and learn_form([]) is None
    assert deformed_reason("x y z w q v u t", REQUEST, form) is None
    assert deformed_reason("x y z w q v u tt.", REQUEST, form) == "the answer is far longer than the task's answers"


@pytest.mark.parametrize(
    ("text", "request_text", "learned_from", "is_kept"),
    [
        ("The 订单 is late", "Where is it?", "It is late", False),
        ("The 订单 is late", "Where is 订单 7?", "It is late", True),
        ("The 订单 is late", "Where is it?", "订单: late", True),
        ("7 µm, 3 ª, ½", "Where is it?", "It is late", True),
    ],
    ids=["slipped", "asked", "usual", "symbols"],
)
def test_letters_of_another_script_come_from_the_request_or_the_task(
    text: str, request_text: str, learned_from: str, is_kept: bool
) -> None:
    form = learn_form([(REQUEST, 2 * learned_from)])
    assert (deformed_reason(text, _request(request_text), form) is None) == is_kept


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (EN, "en"),
        (DE, "de"),
        ("Je ne sais pas pour vous, mais la commande est dans le train avec les autres.", "fr"),
        ("No sé si el pedido está en camino, pero los otros son para usted.", "es"),
        ("Где находится мой заказ?", "CYRILLIC"),
        ("我的订单在哪里", "CJK"),
        ("注文はどこにありますか", "HIRAGANA"),
        ("refund", None),
        ("order AB-1234 SHIPPED", None),
        ("", None),
    ],
)
def test_a_language_is_named_only_where_it_is_clear(text: str, name: str | None) -> None:
    assert language_of(text) == name


def test_an_answer_follows_the_requests_language_where_the_tasks_answers_do() -> None:
    following = learn_form([(_request(EN), EN)] * 10 + [(_request(DE), DE)] * 10)
    translating = learn_form([(_request(EN), DE)] * 20)
    few = learn_form([(_request(EN), EN)] * 19)
    reason = "the answer is in another language than the request"
    assert deformed_reason(EN, _request(DE), following) == reason
    assert deformed_reason(DE, _request(DE), following) is None
    assert deformed_reason("OK, AB-12", _request(DE), following) is None, "no language is no other language"
    assert deformed_reason(DE, _request(EN), translating) is None
    assert deformed_reason(DE, _request(EN), few) is None, "too few to know"


def test_a_specialists_answer_is_refused_for_its_form_after_its_validity() -> None:
    prompt_format = PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=9, answer_form=FORM)
    facing = Facing(FacesConfig(), None)
    asked = {"messages": REQUEST["messages"]}
    looping = engine_answer("and again " * 50, 1.0)
    assert invalid_reason(looping, prompt_format, asked, facing) == "the answer repeats itself"
    assert invalid_reason(engine_answer(EN, 1.0), prompt_format, asked, facing) is None
    # What an older release has stored knows no form.
    assert (
        PromptFormat.model_validate({"kind": "chat", "answer_kind": "text", "max_prompt_tokens": 9}).answer_form is None
    )
