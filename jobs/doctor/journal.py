"""The journal of capture: its folder's place, rights and room, and what waits in it. Creates nothing."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from cluster.errors import ConfigError
from jobs.doctor.check import Check, Reporter
from jobs.recipe import Recipe
from serving.capture import journal_folder
from serving.folding import ASIDE
from serving.journal import SUFFIX

_say = Reporter("journal")


def check_journal(recipe: Recipe) -> Iterator[Check]:
    """Look at the folder that the recipe's capture would use."""
    is_sync = recipe.capture.durability == "sync"
    try:
        folder = journal_folder(recipe.capture, recipe.store)
    except ConfigError as error:
        yield _say.told("folder", error, "capture.journal=/PATH")
        return
    if folder is None or (not is_sync and not folder.is_dir()):
        yield _say.ok("folder", "none: capture.durability=async keeps calls in memory for a second")
        return
    yield _rights(folder)
    if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK):
        yield from _waiting(folder)


def _rights(folder: pathlib.Path) -> Check:
    if not folder.exists():
        above = next(one for one in folder.parents if one.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            return _say.failed("folder", f"{above} cannot be written to", f"give this user the right to make {folder}")
        return _say.ok("folder", f"{folder} is made by the first `serve`")
    facts = folder.stat()
    if not folder.is_dir() or facts.st_uid != os.geteuid() or not os.access(folder, os.W_OK | os.X_OK):
        return _say.failed("folder", f"{folder} is not a folder of this user's", "capture.journal=/PATH of one that is")
    if facts.st_mode & 0o077:
        return _say.failed("folder", f"others can open {folder}", f"chmod 700 {folder}")
    return _say.ok("folder", f"{folder}, mode {facts.st_mode & 0o777:o}")


def _waiting(folder: pathlib.Path) -> Iterator[Check]:
    waiting = len(list(folder.glob(f"*{SUFFIX}")))
    yield _say.ok("waiting", f"{waiting} journals not yet folded" if waiting else "nothing")
    if aside := len(list((folder / ASIDE).glob("*"))):
        advice = f"keep {folder / ASIDE}: calls in it could not be read or stored; the gateway's log says why"
        yield _say.warning("set aside", f"{aside} journals", advice)
