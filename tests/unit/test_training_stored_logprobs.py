"""stored_logprobs.py: from what a provider says of its tokens to targets in a base's tokens, or to none, and counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cluster.prompts import PromptFormat
from cluster.records import Example
from training.batches import Rows
from training.dataset import build_task_data, save_dataset
from training.stored_logprobs import Vocabulary, read_logprobs

END = "<|end|>"
TEXTS = ("turn the lamp low", "turn the heater high", "lamp", "heater", "höchste Stufe", "the lamp the heater")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, as that of most bases, with a chat template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END, chat_template=template)


def pieces_of(text: str, tokenizer: Any) -> list[bytes]:
    """The tokens of a text as bytes, by decoding: what a provider with this tokenizer would tell."""
    encoding = tokenizer.backend_tokenizer.encode(text)
    chars = {char: byte for byte, char in enumerate_bytes()}
    return [bytes(chars[char] for char in token) for token in encoding.tokens]


def enumerate_bytes() -> list[tuple[int, str]]:
    """Byte -> its character, read off the tokenizers library's own pre-tokenizer."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = []
    for byte in range(128):
        found.append((byte, split.pre_tokenize_str(chr(byte))[0][0]))
    for lead, low, high in ((0xC2, 0x80, 0xBF), (0xC3, 0x80, 0xBF)):
        for tail in range(low, high + 1):
            first, second = split.pre_tokenize_str(bytes([lead, tail]).decode())[0][0]
            found += [(lead, first), (tail, second)]
    return found


def tell(pieces: list[bytes], others: tuple[bytes, ...] = (b"x",), with_bytes: bool = True) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` as OpenAI gives it."""

    def token(data: bytes, value: float) -> dict[str, Any]:
        known = {"bytes": list(data)} if with_bytes else {"bytes": None}
        return {"token": data.decode(errors="replace"), "logprob": value, **known}

    return [
        {**token(piece, -0.5), "top_logprobs": [token(piece, -0.5), *(token(one, -2.0) for one in others)]}
        for piece in pieces
    ]


def example(text: str, content: Any) -> Example:
    return Example(
        example_id=text,
        split="train",
        session_id="s",
        ts=1.0,
        request={"messages": [{"role": "user", "content": "which?"}]},
        target={"role": "assistant", "content": text},
        reference="llm",
        source_call_ids=("c",),
        logprobs=read_logprobs(content),
    )


def test_every_byte_of_a_vocabulary_is_the_librarys_own(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        assert b"".join(vocabulary._bytes[number] for number in ids) == text.encode() + END.encode()


@pytest.mark.parametrize("with_bytes", [True, False])
def test_an_answer_of_the_same_tokens_has_a_target_at_each_and_none_at_its_end(
    tokenizer: Any, with_bytes: bool
) -> None:
    text = "turn the lamp low"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    other = tokenizer.encode("heater")[0]
    spoken = tokenizer.decode([other]).encode()
    stored = read_logprobs(tell(pieces_of(text, tokenizer), (spoken, END.encode(), b"\xff\xfe??"), with_bytes))
    targets = Vocabulary(tokenizer).map_answer(stored, ids)
    assert [one.ids for one in targets[:-1]] == [[number, other, tokenizer.eos_token_id] for number in ids[:-1]]
    assert targets[0].logprobs == [-0.5, -2.0, -2.0] and targets[-1].ids == []
    with_end = read_logprobs(tell([*pieces_of(text, tokenizer), END.encode()], (spoken,)))
    assert Vocabulary(tokenizer).map_answer(with_end, ids)[-1].ids == [tokenizer.eos_token_id, other]


def test_an_answer_that_is_cut_or_written_otherwise_has_none(tokenizer: Any) -> None:
    text = "höchste Stufe"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    pieces = pieces_of(text, tokenizer)
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.map_answer(read_logprobs(tell(pieces)), ids) is not None
    by_letter = [bytes([byte]) for byte in text.encode()]
    for others in (by_letter, pieces[:-1], [*pieces, b"!"], [b" ", *pieces]):
        assert others != pieces and vocabulary.map_answer(read_logprobs(tell(others)), ids) is None


def test_a_tokenizer_that_is_not_byte_level_fits_no_answer(tokenizer: Any) -> None:
    made = Tokenizer(models.WordLevel({"lamp": 0, END: 1}, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    assert Vocabulary(words).map_answer(read_logprobs(tell([b"lamp"])), [0, 1]) is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "text",
        [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}],
        [{"token": "a", "logprob": -1.0, "bytes": [97]}],
        [{"token": "a", "logprob": None, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -1.0}]}],
        [{"token": "a", "logprob": -1.0, "bytes": [300], "top_logprobs": [{"token": "a", "logprob": -1.0}]}],
        [{"token": "a", "logprob": math.nan, "top_logprobs": [{"token": "a", "logprob": -1.0}]}],
        [{"token": "a", "logprob": -1.0, "top_logprobs": [{"logprob": -1.0}]}],
    ],
)
def test_what_is_not_of_openais_shape_is_not_read(content: Any) -> None:
    assert read_logprobs(content) is None


def test_rows_carry_targets_only_where_asked_and_others_are_counted(tokenizer: Any, tmp_path: Any) -> None:
    prompt_format = PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=100)
    examples = [
        example("lamp", tell(pieces_of("lamp", tokenizer))),
        example("turn the lamp low", tell([b"turn the ", b"lamp low"])),
        example("heater", None),
    ]
    plain = build_task_data(examples, [], prompt_format, tokenizer)
    assert not plain.stored and all("top_ids" not in row for row in plain.train)
    data = build_task_data(examples, [], prompt_format, tokenizer, with_stored=True)
    assert data.stored == {"used": 1, "of other tokens": 1, "not told": 1}
    assert [row["input_ids"] for row in data.train] == [row["input_ids"] for row in plain.train]
    save_dataset(data.train, tmp_path / "rows")
    for packing in (False, True):
        rows = Rows(str(tmp_path / "rows"), {"batch_size": 3, "seed": 1, "pad_token_id": 0, "packing": packing}, 0, 1)
        batch = rows.batch(0)
        answers = batch["labels"][batch["labels"] != -100].tolist()
        tops, known = batch["top_ids"][:, 0].tolist(), batch["top_logprobs"][:, 0].isfinite().tolist()
        assert len(answers) == len(tops)
        assert sum(known) == len(tokenizer.encode("lamp"))
        assert [top for top, is_known in zip(tops, known, strict=True) if is_known] == tokenizer.encode("lamp")
        assert all(top == answer for top, answer, is_known in zip(tops, answers, known, strict=True) if is_known)
