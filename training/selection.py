"""S4: TaskSpec* -> base model: the catalog filtered by the tasks' needs, then the base named by the recipe."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

from pydantic import Field

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.records import Example, Record, TaskSpec
from cluster.store import Store
from training.catalog import Catalog, Needs, ScratchModel, filter_candidates, load_catalog, resolve_base

SCRATCH_ARM = "scratch base (has seen the tasks)"


class SelectConfig(Config):
    """Which base model the specialists grow on."""

    base: str = "scratch-small"
    """Catalog name, hub id or local folder. `scratch-*` is trained from scratch on the train split."""
    allowed_licenses: tuple[str, ...] | None = None
    """Licences a hub model may have; None allows all."""
    memory_gib: float = Field(default=20.0, gt=0)
    """Memory for the base's weights."""


class Selection(Record):
    """The base of a conversion, and why the others were left out."""

    base: str
    is_scratch: bool
    arm: str
    rejected: dict[str, str]


def select_base(config: SelectConfig, tasks: list[TaskSpec], p99_prompt_tokens: int) -> Selection:
    """Check the recipe's base against the tasks' needs and list what the catalog's filter says of the others.

    Raises:
        ConfigError: the base is unknown.
    """
    catalog = load_catalog()
    needs = Needs(
        p99_prompt_tokens=p99_prompt_tokens,
        needs_tool_use=any(task.kind == "tool_call" for task in tasks),
        allowed_licenses=config.allowed_licenses,
        memory_gib=config.memory_gib,
    )
    _, rejections = filter_candidates(catalog.entries, needs)
    entry = find_entry(catalog, config.base)
    is_scratch = isinstance(entry, ScratchModel)
    return Selection(
        base=config.base,
        is_scratch=is_scratch,
        arm=SCRATCH_ARM if is_scratch else "untrained base",
        rejected={rejection.name: rejection.reason for rejection in rejections},
    )


def find_entry(catalog: Catalog, name: str) -> Any:
    """The catalog's entry of that name, or None for a hub id or local folder."""
    if "/" in name or pathlib.Path(name).is_dir():
        return None
    return catalog.get(name)


def publish_loaded_base(store: Store, name: str) -> str:
    """Copy a hub or local model into the store, once; returns its store path.

    Raises:
        ConfigError: it cannot be loaded from where it is said to be.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_base(name).location
    folder = f"bases/{name.strip('/').replace('/', '--')}"
    if store.is_published(folder):
        return folder
    try:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"select.base={name!r}: cannot be loaded ({type(error).__name__}); allowed: a reachable hub id, a local "
            "folder, or scratch-tiny, scratch-small, scratch-medium"
        ) from None
    with tempfile.TemporaryDirectory() as local:
        model.save_pretrained(local, safe_serialization=True)
        tokenizer.save_pretrained(local)
        store.publish(folder, pathlib.Path(local), {"base": name})
    return folder


def group_by_task(examples: list[Example], assignment: dict[str, str | None]) -> dict[str, list[Example]]:
    """Examples of each task; those of no task are left out."""
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        task_id = assignment.get(example.example_id)
        if task_id is not None:
            grouped.setdefault(task_id, []).append(example)
    return grouped
