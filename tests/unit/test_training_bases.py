"""What a local folder says of its model before any weights are read, and which folders cannot be a base."""

import pathlib

import pytest

from cluster.errors import BaseUnavailableError
from cluster.store import Store
from training.bases import describe_base, open_base, publish_loaded_base

CHAT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% if tools %}{{ tools }}{% endif %}"


def write_folder(folder: pathlib.Path, **tokenizer_fields: object) -> str:
    """A folder of save_pretrained without weights."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True).save_pretrained(
        folder
    )
    tokenizer = Tokenizer(models.WordLevel({"<|end|>": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokenizer_fields).save_pretrained(folder)
    return str(folder)


def test_a_folder_tells_its_size_window_and_whether_its_chat_shows_tools(tmp_path):
    base = open_base(write_folder(tmp_path / "one", eos_token="<|end|>", chat_template=CHAT))
    found = describe_base(base)
    # 10*8 tied embedding + 4*8*8 attention + 3*8*16 MLP + 2*8 norms + 8 last norm
    assert (found.parameters, found.context_window_tokens, found.has_tool_use) == (744, 64, True)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 0
    assert base.location == str(tmp_path / "one")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"eos_token": "<|end|>"}, "has no chat template"), ({"chat_template": CHAT}, "has no end token")],
)
def test_a_tokenizer_that_cannot_render_a_chat_is_no_base(tmp_path, fields, message):
    with pytest.raises(BaseUnavailableError, match=message):
        open_base(write_folder(tmp_path / "one", **fields))


def test_a_folder_without_weights_cannot_be_published(tmp_path):
    name = write_folder(tmp_path / "one", eos_token="<|end|>", chat_template=CHAT)
    store = Store(str(tmp_path / "store"))
    with pytest.raises(BaseUnavailableError, match="cannot be loaded"):
        publish_loaded_base(store, name)
    assert store.list("bases") == []


def test_a_folder_whose_config_names_no_known_model_is_unavailable_and_its_code_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BaseUnavailableError, match="cannot be loaded: ValueError"):
        open_base(str(tmp_path))
