"""`understudy keys rotate` and `keys retire`: a new master key for content, and the end of the old ones.

Rotation makes a new version and wraps every file's keys with it; no file of content is written again, and pseudonyms
have a key of their own that stays. Old versions are kept until `retire`, because a running gateway may go on with its
cached key-encryption key for some minutes. Both leave a record under rotations/.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

from cluster.access import require_role
from cluster.content_keys import CACHE_LIFETIME_S
from cluster.errors import ConfigError
from cluster.kms import version_of
from cluster.records import Record
from cluster.store import Store
from jobs.recipe import load_recipe
from serving.capture import journal_folder
from serving.folding import wrapped_keys

ROTATIONS_FOLDER = "rotations"


class Rotation(Record):
    """One rotation, as it is recorded."""

    ts: float
    version: int
    files: int
    """Files whose keys were wrapped anew."""


def open_for_rotation(words: list[str]) -> tuple[Store, pathlib.Path | None]:
    """The store that the words name, and the folder of its journals.

    Raises:
        ConfigError: this user's role may not rotate its key.
    """
    recipe = load_recipe(words)
    require_role(recipe.store, "admin")
    return Store(recipe.store), journal_folder(recipe.capture, recipe.store)


def rotate(store: Store, clock: Callable[[], float] = time.time) -> Rotation:
    """Wrap everything with a new version of the master key.

    Raises:
        KeyAccessError: the KMS lets this process not rotate, or not unwrap.
    """
    version = store.content_keys.kms.rotate()
    done = Rotation(ts=clock(), version=version, files=store.rewrap_keys())
    store.write_json(f"{ROTATIONS_FOLDER}/v{version:06d}.json", done.model_dump())
    return done


def retire(store: Store, journal: pathlib.Path | None, clock: Callable[[], float] = time.time) -> int:
    """Forget every version but the newest that nothing is wrapped with any more; returns that newest version.

    Args:
        journal: folder of this machine's journals; None where there is none. Those of other machines are theirs to look
            at: a journal is older than a few minutes only where its gateway died or its store is away.

    Raises:
        ConfigError: there was no rotation, it is too fresh, or files or journals are there that an old version wraps.
    """
    paths = store.list(ROTATIONS_FOLDER, ".json")
    if not paths:
        raise ConfigError("content key: was never rotated; next: understudy keys rotate")
    last = Rotation.model_validate(store.read_json(paths[-1]))
    # A writer learns of a new master key when its cached key ends; twice that is on the safe side of slow clocks.
    wait_s = last.ts + 2 * CACHE_LIFETIME_S - clock()
    if wait_s > 0:
        raise ConfigError(
            f"content key: version {last.version} is {2 * CACHE_LIFETIME_S - wait_s:.0f} s old, and a running gateway may "
            f"still write under the one before; next: understudy keys retire in {wait_s / 60:.0f} minutes"
        )
    kept = {version_of(wrapped) for wrapped in wrapped_keys(journal)} if journal and journal.exists() else set()
    if any(version < last.version for version in kept):
        raise ConfigError(
            f"content key: a journal in {journal} is still wrapped with version {min(kept)}, and would be lost; next: "
            "understudy compact, and look at what lies in its folder aside/"
        )
    old = sorted(version for version in store.key_versions() if version < last.version)
    if old:
        raise ConfigError(
            f"content key: files are still wrapped with version {old[0]}, and would be lost; next: understudy keys rotate"
        )
    store.content_keys.kms.retire(before=last.version)
    return last.version
