"""Strict configuration: defaults < `recipe=NAME|PATH` (TOML) < `key.sub=value`, into frozen pydantic models.

Unknown keys, wrong types and values out of bounds raise ConfigError naming the field, the value and what is
allowed, before any Ray call. Config classes live beside the code they configure and import nothing heavy.
"""

from __future__ import annotations

import datetime
import difflib
import json
import pathlib
import re
import tomllib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration class: no unknown keys, no later change, no coercion of types, finite numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], arguments: list[str], recipe_dir: pathlib.Path) -> ConfigT:
    """Resolve command-line words such as `recipe=demo gate.epsilon=0.03` into `cls`.

    Args:
        arguments: `key=value` words; a value is read as TOML (`3`, `true`, `[1, 2]`), else as a string. An item of a
            list is named by its number: `upstream.0.base_url=URL` changes the recipe's first one, or adds it.
        recipe_dir: where a bare recipe NAME is looked up as NAME.toml.

    Raises:
        ConfigError: unknown recipe or key, wrong type, value out of bounds, or a word without `=`.
    """
    merged: dict[str, Any] = {}
    for key, raw in map(_split_argument, arguments):
        if key == "recipe":
            merged = _merge(merged, _read_recipe(raw, recipe_dir))
    for key, raw in map(_split_argument, arguments):
        if key != "recipe":
            merged = _merge(merged, _nest(key, _parse_value(raw)))
    return validate(cls, _number_lists(merged))


def validate(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Build `cls` from plain values, or from configs at any depth. Lists serve as tuples and integers as floats.

    Raises:
        ConfigError: one line per wrong field, with the nearest valid keys for unknown ones.
    """
    try:
        # As JSON: pydantic's strict mode takes a list for a tuple only there.
        return cls.model_validate_json(json.dumps(_plain(values)))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, item) for item in error.errors())) from None


def describe_fields(cls: type[Config], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """List (key, type and bounds, default, meaning) of every field, nested ones with dotted keys.

    Fields of the items of a list stand under its key with N for the item's number.
    """
    rows: list[tuple[str, str, str, str]] = []
    for name, field in cls.model_fields.items():
        kind, key = field.annotation, prefix + name
        if isinstance(kind, type) and issubclass(kind, Config):
            rows += describe_fields(kind, f"{key}.")
            continue
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        label = ", ".join([_type_name(kind), *_bounds(field.metadata)])
        rows.append((key, label, default, " ".join((field.description or "").split())))
        for item in _item_classes(kind):
            known = {row[0] for row in rows}
            rows += [row for row in describe_fields(item, f"{key}.N.") if row[0] not in known]
    return rows


def has_credentials(address: str) -> bool:
    """Whether an address carries a name or password before its host. A password may hold a slash as it stands.

    Example:
        >>> has_credentials("https://user:pw@host/v1"), has_credentials("https://host:443/v1/@me")
        (True, False)
    """
    _, _, rest = address.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_cut = bool(re.search(r":(?!\d*$)", authority.rpartition("]")[2]))
    return "@" in authority or (is_cut and "@" in rest)


def mask_credentials(text: str) -> str:
    """Text that quotes an address, without what may be a name or password in it."""
    return re.sub(r"://\S*@", "://...@", text)


def _plain(value: Any) -> Any:
    """What TOML and callers give, as JSON has it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def _item_classes(kind: Any) -> list[type[Config]]:
    """Config classes that items of a list may have: one, or those of a union; its alias is looked through."""
    if isinstance(kind, type) and issubclass(kind, Config):
        return [kind]
    return [one for item in get_args(getattr(kind, "__value__", kind)) for one in _item_classes(item)]


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return re.sub(r"\b(?:typing|\w+(?:\.\w+)*)\.(?=[A-Z])", "", str(kind))


def _bounds(metadata: list[Any]) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "pattern": "matches"}
    found = ((sign, getattr(item, name, None)) for item in metadata for name, sign in signs.items())
    return [f"{sign} {value}" for sign, value in found if value is not None]


def _split_argument(word: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    if not sign or not key:
        raise ConfigError(
            f"argument {mask_credentials(repr(word))} is not of the form key=value; allowed: recipe=NAME or key.sub=value"
        )
    return key, value


def _read_recipe(name: str, recipe_dir: pathlib.Path) -> dict[str, Any]:
    path = pathlib.Path(name) if name.endswith(".toml") else recipe_dir / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in recipe_dir.glob("*.toml")))
        raise ConfigError(f"recipe={name}: no such recipe; allowed: a path ending in .toml, or one of: {known}")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe={name}: {path} is not valid TOML: {error}") from None


def _parse_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries merge key by key, lists with numbered items item by item; everything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, list) and _is_numbered(value):
            old = {str(number): item for number, item in enumerate(old)}
        both = isinstance(value, dict) and isinstance(old, dict)
        merged[key] = _merge(old, value) if both else value
    return merged


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(key.isdecimal() for key in value)


def _number_lists(value: Any, where: str = "") -> Any:
    """Turn {"0": a, "1": b} into [a, b], at every depth.

    Raises:
        ConfigError: a number is left out.
    """
    if not isinstance(value, dict):
        return value
    items = {key: _number_lists(item, f"{where}{key}.") for key, item in value.items()}
    if not _is_numbered(items):
        return items
    missing = next((number for number in range(len(items)) if str(number) not in items), None)
    if missing is not None:
        key = max(items, key=int)
        raise ConfigError(f"{where}{key}: given without {where}{missing}; allowed: numbers from 0 without a gap")
    return [items[str(number)] for number in range(len(items))]


def _explain(cls: type[Config], item: Any) -> str:
    # The choice within a union is part of pydantic's place and of no key; its tags are written in angle brackets.
    where = ".".join(str(part) for part in item["loc"] if not str(part).startswith("<"))
    if item["type"] == "extra_forbidden":
        known = [row[0] for row in describe_fields(cls)]
        asked = ".".join("N" if part.isdecimal() else part for part in where.split("."))
        near = difflib.get_close_matches(asked, known, n=3, cutoff=0.4) or sorted({k.split(".")[0] for k in known})
        return f"{where}: unknown key; nearest valid: {', '.join(near)}; see `understudy convert --help`"
    if item["type"] == "missing":
        return f"{where}: required and not given; set it with {where}=VALUE or in the recipe"
    if item["type"] == "value_error":  # of our own validators, which name the values themselves
        return f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
    if not where:
        return item["msg"]
    return f"{where}: got {mask_credentials(repr(item['input']))}; {_allowed(item['msg'])}"


def _allowed(message: str) -> str:
    """Pydantic's "Input should be a valid integer" as "allowed: a valid integer"."""
    _, sign, rest = message.partition(" should ")
    if not sign:
        return f"{message[:1].lower()}{message[1:]}"
    return f"allowed: {re.sub('^(be|have) ', '', rest).replace('match pattern', 'a match of pattern')}"
