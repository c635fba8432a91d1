"""One rendering for training and serving: what is written with copy tokens reads back as what was meant."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.answers import to_text
from cluster.errors import InputError
from cluster.prompts import PromptFormat, encode_answer, find_words, read_answer, render_prompt, split_units
from training.copying import CopyRule, fit_copy_rule, point
from training.scratch import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(['order A-1 please {"order_id":"A-1"}', "hello there, thanks"] * 20, 700)


def prompt_format(kind="json", **changes):
    return PromptFormat(**{"kind": "compact", "answer_kind": kind, "max_prompt_tokens": 2000, **changes})


def request(*contents):
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def answer(value):
    return {"role": "assistant", "content": json.dumps(value)}


WORDS = st.text(alphabet="abcXYZ019-. \n\"\\'<|>copy{}", max_size=60)


@settings(max_examples=80, deadline=None)
@given(text=WORDS, value=st.text(alphabet='abc 01-"\\\n<|copy0|>', max_size=12))
def test_a_pointed_json_answer_reads_back_as_itself(tokenizer, text, value):
    fmt = prompt_format()
    prompt = render_prompt(request(text + " " + value), fmt, tokenizer)
    target = answer({"x": value, "y": 2, "z": None, "list": [value]})
    rule = CopyRule(kind="json", fields=frozenset({".x", ".y", ".list[]"}))
    ids = encode_answer(point(target, prompt, rule), tokenizer)
    assert read_answer(ids[:-1], prompt, fmt, tokenizer)[0] == to_text(target)


@settings(max_examples=50, deadline=None)
@given(text=WORDS)
def test_units_join_to_the_text(text):
    assert "".join(unit + space for unit, space in split_units(text)) == text


def test_special_tokens_in_a_request_are_plain_text(tokenizer):
    fmt = prompt_format()
    ids = render_prompt(request("<|answer|> <|end|> <|copy3|>"), fmt, tokenizer).ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|answer|>")) == 1
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in ids


def test_an_unseen_value_is_copied_and_not_spelled(tokenizer):
    fmt = prompt_format()
    train = [
        (render_prompt(request(f"my order is A-{n} ok"), fmt, tokenizer), answer({"id": f"A-{n}"})) for n in range(20)
    ]
    rule = fit_copy_rule("json", train)
    assert rule.fields == {".id"}
    prompt = render_prompt(request("the order QQ-98765 is late"), fmt, tokenizer)
    pieces = point(answer({"id": "QQ-98765"}), prompt, rule)
    assert pieces == ['{"id":"', 2, '"}']


def test_a_label_is_not_copied_even_where_its_word_occurs(tokenizer):
    fmt = prompt_format()
    texts = ["where is it", "cancel it", "hello", "send it back"] * 5
    pairs = [(render_prompt(request(text), fmt, tokenizer), answer({"intent": "cancel"})) for text in texts]
    assert fit_copy_rule("json", pairs).fields == frozenset()


def test_json_text_is_split_into_its_values():
    text = '{"id":"A-1","product":"trail tent","n":2}'
    assert [text[w.begin : w.end] for w in find_words(text)] == ["A-1", "trail tent", "2"]


def test_static_sentences_are_left_out(tokenizer):
    fmt = prompt_format(static_lines=("You are a clerk.", "Be brief."))
    short = render_prompt(request("You are a clerk. Today is Monday. Be brief."), fmt, tokenizer)
    assert short.ids == render_prompt(request("Today is Monday."), prompt_format(), tokenizer).ids


def test_a_prompt_that_is_too_long_is_refused(tokenizer):
    with pytest.raises(InputError, match="allowed: 5"):
        render_prompt(request("one two three four five six"), prompt_format(max_prompt_tokens=5), tokenizer)


def test_a_copy_token_without_a_word_is_no_answer(tokenizer):
    fmt = prompt_format("text")
    prompt = render_prompt(request("one"), fmt, tokenizer)
    ids = encode_answer([7], tokenizer)[:-1]
    assert read_answer(ids, prompt, fmt, tokenizer) == ("", None)
