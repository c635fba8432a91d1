"""The base models a task may be fine-tuned from: `catalog.json` -> typed entries -> the ones that fit a task's needs.

A hub entry is a pretrained model; each of its looked-up facts carries the address it was read at and the date, and
what was not found is None. A scratch entry is a small Llama-style model that has no weights until it is trained on
the train split. The catalog knows neither tasks nor measured scores, and it never opens a network connection.

Invariants: names are unique; memory is computed from the parameters, never looked up.
"""

from __future__ import annotations

import datetime
import difflib
import pathlib
import re
from collections.abc import Iterable
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from cluster.errors import ConfigError
from cluster.records import Record

CATALOG_PATH = pathlib.Path(__file__).with_name("catalog.json")
BYTES_PER_BF16 = 2
# A hub id is ORG/NAME with one slash; huggingface_hub allows letters, digits, dot, dash and underscore in each part.
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

ValueT = TypeVar("ValueT")
SourceUrl = Annotated[str, Field(pattern=r"^https://\S+$")]
NonEmpty = Annotated[str, Field(min_length=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Released = Annotated[str, Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")]


class Fact(Record, Generic[ValueT]):
    """One looked-up value with where and when it was read."""

    value: ValueT
    source: SourceUrl
    read_on: datetime.date
    note: str = ""
    """How the value was read where the source does not state it as it stands: rounding, a sibling checkpoint, a copy."""


class PublishedScore(Record):
    """A benchmark result somebody published; scores of different sources are not comparable."""

    benchmark: NonEmpty
    value: float = Field(ge=0, le=100)
    """Percent."""
    source: SourceUrl
    read_on: datetime.date


class HubModel(Record):
    """A pretrained model on the Hugging Face hub. None means: looked for and not found."""

    kind: Literal["hub"]
    name: NonEmpty
    hub_id: str = Field(pattern=f"^{HUB_ID.pattern}$")
    released: Fact[Released] | None
    """Day, or month where no more is said."""
    parameters: Fact[PositiveInt] | None
    """Weights counted once where the embedding is tied."""
    license: Fact[NonEmpty] | None
    """SPDX id, or the licence's own name where SPDX has none."""
    context_window_tokens: Fact[PositiveInt] | None
    """Prompt and answer together."""
    has_chat_template: Fact[bool] | None
    has_tool_use: Fact[bool] | None
    """Trained to call functions natively; False: only through instructions in the prompt."""
    published_scores: tuple[PublishedScore, ...]

    @property
    def memory_gib_bf16(self) -> float | None:
        """GiB of the weights alone in bf16; None where the parameters are unknown."""
        return None if self.parameters is None else _weights_gib(self.parameters.value)


class ScratchModel(Record):
    """The shape of a Llama-style model trained from scratch on the train split alone; embeddings are tied."""

    kind: Literal["scratch"]
    name: NonEmpty
    layers: PositiveInt
    hidden_size: PositiveInt
    heads: PositiveInt
    """Attention heads, all with their own keys and values; divides hidden_size."""
    intermediate_size: PositiveInt
    """Width of the gated MLP."""
    vocab_size: PositiveInt
    context_window_tokens: PositiveInt

    @model_validator(mode="after")
    def _check_heads(self) -> ScratchModel:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"heads={self.heads} must split hidden_size={self.hidden_size} into heads of even size")
        return self

    @property
    def parameters(self) -> int:
        """Number of weights: tied embedding, per layer four attention and three MLP matrices and two norms, last norm."""
        per_layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.layers * per_layer + self.hidden_size

    @property
    def memory_gib_bf16(self) -> float:
        """GiB of the weights alone in bf16."""
        return _weights_gib(self.parameters)


class FoundModel(Record):
    """A base outside the catalog, as its own files describe it. Nothing says its licence."""

    kind: Literal["found"] = "found"
    name: NonEmpty
    parameters: PositiveInt
    context_window_tokens: PositiveInt | None
    """None: its config.json names none."""
    has_tool_use: bool
    """Its chat template shows tools to the model."""

    @property
    def memory_gib_bf16(self) -> float:
        """GiB of the weights alone in bf16."""
        return _weights_gib(self.parameters)


BaseModelFacts = HubModel | ScratchModel | FoundModel
CatalogEntry = Annotated[HubModel | ScratchModel, Field(discriminator="kind")]


class Catalog(Record):
    """All entries in file order."""

    entries: tuple[CatalogEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Catalog:
        names = [entry.name for entry in self.entries]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names must be unique; repeated: {', '.join(repeated)}")
        return self

    def get(self, name: str) -> HubModel | ScratchModel:
        """Return the entry called `name`.

        Raises:
            ConfigError: no such entry; the message gives the nearest names.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = [entry.name for entry in self.entries]
        nearest = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4) or names
        raise ConfigError(
            f"base model {name!r} is not in the catalog; nearest: {', '.join(nearest)}; "
            f"allowed: a catalog name, a hub id ORG/NAME, or a folder with config.json; "
            f"next: name several in select.candidates and a probe measures those that fit the tasks"
        )


class Needs(Record):
    """What a task asks of its base model."""

    p99_prompt_tokens: int = Field(ge=0)
    p99_call_tokens: int = Field(default=0, ge=0)
    """99th percentile of prompt and answer together."""
    needs_tool_use: bool
    allowed_licenses: tuple[str, ...] | None
    """Compared without case; None allows any licence, an unknown one too."""
    memory_gib: float = Field(gt=0)
    """Budget in GiB for the weights in bf16."""
    max_model_tokens: int = Field(ge=0)
    """Prompt and answer together that the serving engine is started for; vLLM refuses a base with a smaller window."""


class Rejection(Record):
    """Why an entry does not fit, with the needed and the found value of each need it misses."""

    name: str
    reason: str


class BaseSource(Record):
    """Where `from_pretrained` finds a base model; the same call loads both kinds."""

    kind: Literal["hub", "local"]
    location: str
    """A hub id, or a local folder with config.json."""


def load_catalog(path: str | None = None) -> Catalog:
    """Read a catalog file; None reads the one shipped beside this module.

    Raises:
        ConfigError: the file is missing or breaks the schema; one line per wrong field.
    """
    file = CATALOG_PATH if path is None else pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"catalog {str(file)!r}: no such file; allowed: a JSON file shaped like {CATALOG_PATH.name}")
    try:
        return Catalog.model_validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        lines = (f"catalog {str(file)!r}: {_field_path(item['loc'])}: {item['msg']}" for item in error.errors())
        raise ConfigError("\n".join(lines)) from None


def filter_candidates(entries: Iterable[BaseModelFacts], needs: Needs) -> tuple[list[BaseModelFacts], list[Rejection]]:
    """Split `entries` into those that fit `needs`, in order, and the rest with all their reasons.

    A fact that a need compares with and that is None rejects with "unknown X". A scratch entry has no licence and
    learns tool calls from the train split, so licence and tool use never reject it.
    """
    kept: list[BaseModelFacts] = []
    rejected: list[Rejection] = []
    for entry in entries:
        if reasons := _missed_needs(entry, needs):
            rejected.append(Rejection(name=entry.name, reason="; ".join(reasons)))
        else:
            kept.append(entry)
    return kept, rejected


def missed_policy(entry: BaseModelFacts, needs_tool_use: bool, allowed_licenses: tuple[str, ...] | None) -> list[str]:
    """Why an entry may not be used whatever its size; a scratch entry always may.

    Args:
        allowed_licenses: as in `Needs`.
    """
    if isinstance(entry, ScratchModel):
        return []
    reasons = [_missed_tool_use(entry, needs_tool_use), _missed_license(entry, allowed_licenses)]
    return [reason for reason in reasons if reason]


def find_entry(name: str) -> HubModel | ScratchModel | None:
    """The shipped catalog's entry of that name or hub id, or None for a local folder or another hub id.

    Raises:
        ConfigError: unknown name, or a folder that is missing or without config.json.
    """
    catalog = load_catalog()
    for entry in catalog.entries:
        if name == entry.name:
            return entry
    source = resolve_base(name)
    hub = [entry for entry in catalog.entries if isinstance(entry, HubModel) and source.kind == "hub"]
    return next((entry for entry in hub if entry.hub_id == source.location), None)


def known_license(name: str) -> str | None:
    """Licence of the shipped catalog's entry of that name or hub id; None for any other base, and where it was not found."""
    for entry in load_catalog().entries:
        if isinstance(entry, HubModel) and name in (entry.name, entry.hub_id):
            return entry.license.value if entry.license else None
    return None


def num_parameters(entry: BaseModelFacts) -> int | None:
    """Number of weights, where it is known."""
    return _value(entry.parameters)


def context_window(entry: BaseModelFacts) -> int | None:
    """Tokens of prompt and answer together, where that is known."""
    return _value(entry.context_window_tokens)


def resolve_base(entry_or_path: HubModel | ScratchModel | str) -> BaseSource:
    """Say where to load a base model from: an entry, a name in the shipped catalog, a local folder or a hub id.

    A catalog name wins over a folder of the same name, and an existing folder over a hub id, as in `from_pretrained`.
    Whether the hub has the id is not checked.

    Raises:
        ConfigError: unknown name, folder missing or without config.json, or a scratch entry, which has no weights.
    """
    if not isinstance(entry_or_path, str):
        return _entry_source(entry_or_path)
    catalog = load_catalog()
    if any(entry.name == entry_or_path for entry in catalog.entries):
        return _entry_source(catalog.get(entry_or_path))
    folder = pathlib.Path(entry_or_path).expanduser()
    if entry_or_path and (folder / "config.json").is_file():
        return BaseSource(kind="local", location=str(folder))
    if entry_or_path and folder.exists():
        raise ConfigError(f"base model {entry_or_path!r}: no config.json there; allowed: a folder of save_pretrained")
    if HUB_ID.fullmatch(entry_or_path):
        return BaseSource(kind="hub", location=entry_or_path)
    if "/" in entry_or_path:
        raise ConfigError(
            f"base model {entry_or_path!r}: no such folder and not a hub id; allowed: ORG/NAME or a folder"
        )
    return _entry_source(catalog.get(entry_or_path))


def _weights_gib(num_parameters: int) -> float:
    return num_parameters * BYTES_PER_BF16 / 2**30


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "file"


def _value(fact: Fact[ValueT] | ValueT | None) -> ValueT | None:
    return fact.value if isinstance(fact, Fact) else fact


def _missed_needs(entry: BaseModelFacts, needs: Needs) -> list[str]:
    sizes = [_missed_context(entry, needs), _missed_memory(entry, needs.memory_gib)]
    return [reason for reason in sizes if reason] + missed_policy(entry, needs.needs_tool_use, needs.allowed_licenses)


def _missed_context(entry: BaseModelFacts, needs: Needs) -> str:
    num_tokens = _value(entry.context_window_tokens)
    if num_tokens is None:
        return "unknown context window"
    if needs.p99_prompt_tokens > num_tokens:
        return f"prompt p99 {needs.p99_prompt_tokens} tokens > context window {num_tokens}"
    if needs.p99_call_tokens > num_tokens:
        return f"prompt and answer p99 {needs.p99_call_tokens} tokens > context window {num_tokens}"
    if needs.max_model_tokens > num_tokens:
        return f"specialists.max_model_tokens {needs.max_model_tokens} > context window {num_tokens}"
    return ""


def _missed_memory(entry: BaseModelFacts, budget_gib: float) -> str:
    weights_gib = entry.memory_gib_bf16
    if weights_gib is None:
        return "unknown parameters"
    return f"weights {weights_gib:.3f} GiB in bf16 > budget {budget_gib:.3f} GiB" if weights_gib > budget_gib else ""


def _missed_tool_use(entry: HubModel | FoundModel, is_needed: bool) -> str:
    if not is_needed:
        return ""
    has_tool_use = _value(entry.has_tool_use)
    if has_tool_use is None:
        return "unknown tool use"
    return "" if has_tool_use else "task needs tool use: yes, model has tool use: no"


def _missed_license(entry: HubModel | FoundModel, allowed: tuple[str, ...] | None) -> str:
    if allowed is None:
        return ""
    if isinstance(entry, FoundModel) or entry.license is None:
        return "unknown license"
    if entry.license.value.lower() in {name.lower() for name in allowed}:
        return ""
    return f"license {entry.license.value} not in allowed {', '.join(allowed) or '(none)'}"


def _entry_source(entry: HubModel | ScratchModel) -> BaseSource:
    if isinstance(entry, HubModel):
        return BaseSource(kind="hub", location=entry.hub_id)
    raise ConfigError(
        f"base model {entry.name!r} has no weights to load: it is trained from scratch; "
        f"allowed here: a hub model, or the folder its training wrote"
    )
