"""A base model on a hub or in a local folder -> its description, its tokenizer, its copy in the store.

One code for both: a hub id is first fetched into the local cache, and all else reads a folder. Code that comes with a
model is never run. The published copy is named by what it was made from, so a hub's new commit or an edited folder
is a new base.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from cluster.errors import BaseUnavailableError
from cluster.store import Store, content_hash
from training.catalog import BaseSource, FoundModel, resolve_base

_DESCRIPTION_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration and tokenizer; the weights are the other files."""


class OpenBase(NamedTuple):
    """A base whose configuration and tokenizer could be read; its weights were not opened."""

    name: str
    """As the recipe gives it."""
    source: BaseSource
    folder: pathlib.Path
    """Holds at least the files of _DESCRIPTION_FILES."""
    config: Any
    tokenizer: Any
    """With a pad token: the end token where the model has none."""

    @property
    def location(self) -> str:
        """What `from_pretrained` takes in any process: a hub id, or the folder's whole path."""
        return self.source.location if self.source.kind == "hub" else str(self.folder)


def open_base(name: str) -> OpenBase:
    """Fetch and read a base's configuration and tokenizer.

    Raises:
        ConfigError: the name is no catalog name, folder or hub id.
        BaseUnavailableError: not reachable, not readable, or it cannot render a chat.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = resolve_base(name)
    try:
        folder = _fetch_description(source)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from None
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        missing = "end token" if tokenizer.chat_template else "chat template"
        raise BaseUnavailableError(f"base model {name!r}: its tokenizer has no {missing}; use an instruct version")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return OpenBase(name, source, folder, config, tokenizer)


def describe_base(base: OpenBase) -> FoundModel:
    """What the files say; parameters are counted on a model without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base.config, trust_remote_code=False)
    except ValueError as error:
        raise _unavailable(base.name, error) from None
    template = base.tokenizer.chat_template
    return FoundModel(
        name=base.name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        context_window_tokens=getattr(base.config.get_text_config(), "max_position_embeddings", None),
        has_tool_use="tool_use" in template if isinstance(template, dict) else "tools" in template,
    )


def publish_loaded_base(store: Store, name: str) -> str:
    """Copy a hub or local model into the store, once; returns its store path.

    Raises:
        ConfigError: the name is no catalog name, folder or hub id.
        BaseUnavailableError: it cannot be loaded from where it is said to be.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    base = open_base(name)
    content = _content_of(base)
    path = f"bases/{_short_name(base)}-{content[:12]}"
    if store.is_published(path):
        return path
    revision = content if base.source.kind == "hub" else "main"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.location, revision=revision, dtype="auto", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _unavailable(name, error) from None
    # Specialists answer greedily and stop where training ends an answer, whatever the model's makers suggest; and a
    # published sampling setting that contradicts itself would refuse to be saved.
    end, pad = base.tokenizer.eos_token_id, base.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    with tempfile.TemporaryDirectory() as local:
        model.save_pretrained(local)
        base.tokenizer.save_pretrained(local)
        store.publish(path, pathlib.Path(local), {"base": name, "source": base.source.model_dump(), "content": content})
    return path


def _fetch_description(source: BaseSource) -> pathlib.Path:
    if source.kind == "local":
        return pathlib.Path(source.location).resolve()
    from huggingface_hub import snapshot_download

    return pathlib.Path(snapshot_download(source.location, allow_patterns=list(_DESCRIPTION_FILES)))


def _content_of(base: OpenBase) -> str:
    """The hub's commit, or a hash of a local folder's files."""
    if base.source.kind == "hub":
        return base.folder.name
    hashes = {}
    for file in sorted(path for path in base.folder.iterdir() if path.is_file()):
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return content_hash(hashes)


def _short_name(base: OpenBase) -> str:
    name = base.source.location if base.source.kind == "hub" else base.folder.name
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "base"


def _unavailable(name: str, error: Exception) -> BaseUnavailableError:
    first_line = next(iter(str(error).splitlines()), "")
    return BaseUnavailableError(
        f"base model {name!r}: cannot be loaded: {type(error).__name__}: {first_line[:300]}; allowed: a reachable hub "
        f"id, a folder of save_pretrained, or a scratch-* entry of the catalog"
    )
