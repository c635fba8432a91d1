"""Rotation of the content key as an operator does it: nothing is rewritten, nothing is lost, old keys end."""

from __future__ import annotations

import asyncio
import pathlib

import pytest

from cluster.calls import read_calls, write_calls
from cluster.content_keys import CACHE_LIFETIME_S
from cluster.errors import ConfigError, KeyAccessError
from cluster.records import AgentCall
from cluster.store import Store
from jobs.rotate import retire, rotate
from serving.folding import fold_orphans
from serving.journal import Journal, prepare_folder

CALL = AgentCall(
    call_id="c", ts=1.7e9, client_id="p", agent="a", session_id="s", step=0,
    request={"messages": [{"role": "user", "content": "hi"}]}, response=None,
)  # fmt: skip
LATER = 1e6 + 2 * CACHE_LIFETIME_S


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    store = Store(str(tmp_path / "store"))
    write_calls(store, [CALL])
    return store


def test_after_rotation_and_retirement_the_old_key_reads_nothing(store, tmp_path):
    keys = tmp_path / "store.keys" / "content.keys"
    old = keys.read_bytes()
    assert (rotate(store, lambda: 1e6).version, retire(store, None, lambda: LATER)) == (2, 2)
    assert read_calls(Store(store.uri)) == [CALL]
    keys.write_bytes(old)
    with pytest.raises(KeyAccessError, match="no version 2"):
        read_calls(Store(store.uri))


def test_a_fresh_rotation_is_not_retired(store):
    rotate(store, lambda: 1e6)
    with pytest.raises(ConfigError, match="20 minutes"):
        retire(store, None, lambda: 1e6)


def test_nothing_to_retire_without_a_rotation(store):
    with pytest.raises(ConfigError, match="never rotated"):
        retire(store, None)


def test_a_file_that_came_under_the_old_key_is_not_lost(store):
    late = Store(store.uri)
    write_calls(late, [CALL])
    rotate(store, lambda: 1e6)
    # This writer goes on with its cached key-encryption key.
    write_calls(late, [CALL.model_copy(update={"call_id": "late"})])
    assert store.key_versions() == {1, 2}
    with pytest.raises(ConfigError, match="still wrapped with version 1"):
        retire(store, None, lambda: LATER)
    rotate(store, lambda: 1e6)
    assert retire(store, None, lambda: LATER) == 3
    assert {call.call_id for call in read_calls(Store(store.uri))} == {"c", "late"}


def test_a_journal_under_the_old_key_is_not_lost(store, tmp_path):
    prepare_folder(tmp_path / "journal")

    async def keep() -> None:
        journal = Journal(tmp_path / "journal", store.content_keys, 2**20, 2**40)
        await journal.submit(CALL.model_copy(update={"call_id": "journaled"}))
        await journal.close()

    asyncio.run(keep())
    rotate(store, lambda: 1e6)
    with pytest.raises(ConfigError, match="journal in .* version 1"):
        retire(store, tmp_path / "journal", lambda: LATER)
    assert fold_orphans(store, store.content_keys, tmp_path / "journal").num_calls == 1
    rotate(store, lambda: 1e6)
    assert retire(store, tmp_path / "journal", lambda: LATER) == 3
    assert {call.call_id for call in read_calls(Store(store.uri))} == {"c", "journaled"}
