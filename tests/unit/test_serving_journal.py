"""The journal: what was acknowledged is recovered whatever happens to the file, and nothing altered passes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from fakes import REQUEST, FakeKms
from hypothesis import given
from hypothesis import strategies as st

from cluster.calls import read_calls
from cluster.errors import ConfigError, StoreError
from cluster.records import AgentCall
from cluster.store import Store
from serving import folding
from serving.folding import ASIDE, Folded, fold_orphans, wrapped_keys
from serving.journal import SUFFIX, Journal, prepare_folder
from serving.journal_format import DamagedJournalError, JournalReader, JournalSealer, decode_call, encode_call

ROOT = pathlib.Path(__file__).parents[2]
KMS = FakeKms()
MANY = 2**20


def _call(number: int, text: str = "hello", ts: float = 1_700_000_000.0) -> AgentCall:
    return AgentCall(
        call_id=f"c{number}", ts=ts + number, client_id="c", agent="a", session_id="s", step=0,
        request={**REQUEST, "user": text}, response=None,
    )  # fmt: skip


def _write(folder: pathlib.Path, calls: list[AgentCall], max_file_bytes: int = MANY) -> Journal:
    """Journal the calls one by one, and end the file."""

    async def scenario() -> Journal:
        journal = Journal(folder, KMS, max_file_bytes, MANY)
        for call in calls:
            await journal.submit(call)
        await journal.close()
        return journal

    return asyncio.run(scenario())


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _ids(store: Store) -> list[str]:
    return [call.call_id for call in read_calls(store)]


def _sealed(records: list[bytes]) -> tuple[bytes, list[bytes]]:
    sealer = JournalSealer(*KMS.new_data_key())
    return sealer.header, [sealer.seal([record]) for record in records]


def _read(data: bytes) -> tuple[list[bytes], int]:
    reader = JournalReader(data, KMS)
    return list(reader), reader.num_damaged


RECORDS = [b"zero", b"one" * 50, b"", b"\xd6\x5c\x9e\x1b" * 5, b"four"]


def test_a_call_is_on_the_disk_encrypted_and_private_when_submit_is_done(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "journal"

    async def scenario() -> None:
        journal = Journal(folder, KMS, MANY, MANY)
        await journal.submit(_call(1, "a secret word"))
        (path,) = _files(folder)
        data = path.read_bytes()
        assert b"secret" not in data
        assert [decode_call(record) for record in JournalReader(data, KMS)] == [_call(1, "a secret word")]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
        await journal.close()
        with pytest.raises(StoreError):
            await journal.submit(_call(2))

    asyncio.run(scenario())


def test_a_folder_that_others_can_open_is_refused(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"capture\.journal.*chmod 700"):
        prepare_folder(tmp_path)


def test_calls_that_wait_for_an_fsync_share_the_next(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_sync, is_syncing, sync = threading.Event(), threading.Event(), os.fsync

    def hold(fd: int) -> None:
        is_syncing.set()
        assert may_sync.wait(10)
        sync(fd)

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal", KMS, MANY, MANY)
        await journal.submit(_call(0))
        monkeypatch.setattr(os, "fsync", hold)
        first = journal.submit(_call(1))
        await asyncio.to_thread(is_syncing.wait, 10)
        others = [journal.submit(_call(number)) for number in range(2, 50)]
        await asyncio.sleep(0.02)
        assert not first.done() and not any(other.done() for other in others)
        may_sync.set()
        await asyncio.gather(first, *others)
        assert journal.num_commits == 3
        await journal.close()

    asyncio.run(scenario())


def test_a_lone_surrogate_and_a_number_that_is_none_survive() -> None:
    call = _call(1, "\ud800 \u4f60\u597d \U0001f600")
    record = encode_call(call)
    assert isinstance(record, bytes) and decode_call(record) == call


@given(st.data())
def test_a_file_cut_anywhere_gives_the_whole_records_before_the_cut_and_is_not_damaged(data: st.DataObject) -> None:
    header, sealed = _sealed(RECORDS)
    whole = header + b"".join(sealed)
    cut = data.draw(st.integers(len(header), len(whole)))
    ends = [len(header) + len(b"".join(sealed[: number + 1])) for number in range(len(sealed))]
    # Blocks that the file system gave to the file, and that were never filled.
    zeros = data.draw(st.sampled_from([0, 1, 5_000])) if cut in [len(header), *ends] else 0
    assert _read(whole[:cut] + bytes(zeros)) == (RECORDS[: sum(end <= cut for end in ends)], 0)


@given(st.integers(0), st.integers(1, 255))
def test_a_changed_byte_costs_one_record_and_is_noticed(where: int, change: int) -> None:
    header, sealed = _sealed(RECORDS)
    data = bytearray(header + b"".join(sealed))
    at = len(header) + where % (len(data) - len(header))
    data[at] ^= change
    found, num_damaged = _read(bytes(data))
    hit = next(n for n in range(len(sealed)) if at < len(header) + len(b"".join(sealed[: n + 1])))
    assert found == [record for number, record in enumerate(RECORDS) if number != hit]
    assert num_damaged == 1


@given(st.data())
def test_records_that_were_reordered_repeated_dropped_or_exchanged_are_noticed(data: st.DataObject) -> None:
    """Only the end may be missing unnoticed. What is read is genuine, in order, and comes once."""
    key = KMS.new_data_key()
    one, other = JournalSealer(*key), JournalSealer(*key)
    mine = [one.seal([record]) for record in RECORDS]
    foreign = other.seal([b"foreign"])
    order = data.draw(st.lists(st.sampled_from([*range(len(mine)), "foreign"]), max_size=8))
    found, num_damaged = _read(
        one.header + b"".join(foreign if item == "foreign" else mine[int(item)] for item in order)
    )
    numbers = [RECORDS.index(record) for record in found]
    assert numbers == sorted(set(numbers))
    assert (num_damaged == 0) == (order == list(range(len(order))))


@pytest.mark.parametrize("damage", [lambda d: d[:20], lambda d: b"X" + d[1:], lambda d: d[:40] + b"X" + d[41:]])
def test_a_damaged_header_is_named(damage: Callable[[bytes], bytes]) -> None:
    header, sealed = _sealed(RECORDS)
    with pytest.raises(DamagedJournalError):
        JournalReader(damage(header + sealed[0]), KMS)


def test_a_full_disk_fails_the_calls_it_did_not_take_and_no_others(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store, write = tmp_path / "journal", Store(str(tmp_path / "store")), os.write

    def write_half(fd: int, data: memoryview) -> int:
        write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        journal = Journal(folder, KMS, MANY, MANY)
        await journal.submit(_call(0))
        monkeypatch.setattr(os, "write", write_half)
        for number in (1, 2):
            with pytest.raises(StoreError, match="No space left"):
                await journal.submit(_call(number))
        monkeypatch.setattr(os, "write", write)
        await journal.submit(_call(3))
        await journal.close()

    asyncio.run(scenario())
    assert fold_orphans(store, KMS, folder) == Folded(num_files=2, num_calls=2)
    assert _ids(store) == ["c0", "c3"] and os.listdir(folder) == []


def test_a_kms_that_is_away_stops_a_first_file_and_no_later_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.journal._KEY_LIFETIME_S", 0.0)
    kms = FakeKms()

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal", kms, MANY, MANY)
        kms.is_away = True
        with pytest.raises(StoreError, match="away"):
            await journal.submit(_call(0))
        kms.is_away = False
        await journal.submit(_call(1))
        kms.is_away = True
        await journal.rotate()
        await journal.submit(_call(2))
        await journal.close()

    asyncio.run(scenario())
    assert len(_files(tmp_path / "journal")) == 2


def test_files_are_ended_by_size_and_folded_in_order(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(number) for number in range(5)], max_file_bytes=700)
    assert len(_files(folder)) > 1
    folded = fold_orphans(store, KMS, folder)
    assert folded.num_calls == 5 and folded.num_left == 0 and _files(folder) == []
    assert read_calls(store) == [_call(number) for number in range(5)]


def test_a_living_writers_file_is_left_alone(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))

    async def scenario() -> None:
        journal = Journal(folder, KMS, MANY, MANY)
        await journal.submit(_call(0))
        assert fold_orphans(store, KMS, folder) == Folded()
        await journal.submit(_call(1))
        await journal.rotate()
        assert fold_orphans(store, KMS, folder) == Folded(num_files=1, num_calls=2)
        await journal.close()

    asyncio.run(scenario())


def test_a_file_that_another_process_folds_is_left_to_it(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(0)])
    with _files(folder)[0].open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert fold_orphans(store, KMS, folder) == Folded()
    assert fold_orphans(store, KMS, folder).num_calls == 1


def test_what_a_killed_process_had_acknowledged_is_folded_by_the_next(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    code = (
        "import asyncio, pathlib, sys\n"
        "sys.path.insert(0, 'tests')\n"
        "from fakes import FakeKms, REQUEST\n"
        "from cluster.records import AgentCall\n"
        "from serving.journal import Journal\n"
        "async def main():\n"
        "    journal = Journal(pathlib.Path(sys.argv[1]), FakeKms(), 2**20, 2**40)\n"
        "    for number in range(10_000):\n"
        "        call = AgentCall(call_id=f'c{number}', ts=1e9, client_id='c', agent='a', session_id='s', step=0,\n"
        "            request=REQUEST, response=None)\n"
        "        await journal.submit(call)\n"
        "        print(call.call_id, flush=True)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as writer:
        assert writer.stdout is not None
        seen = [writer.stdout.readline().strip() for _ in range(50)]
        assert fold_orphans(store, KMS, folder) == Folded()
        os.kill(writer.pid, signal.SIGKILL)
        seen += writer.stdout.read().split()
    folded = fold_orphans(store, KMS, folder)
    assert folded.num_files == 1 and folded.num_damaged == 0
    assert set(seen) <= set(_ids(store))


def test_a_journal_outlives_a_store_that_fails_and_a_crash_before_its_removal(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(0), _call(1)])
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_table", _fail)
        assert fold_orphans(store, KMS, folder) == Folded(num_left=1)
    with monkeypatch.context() as patch:
        # The parts are there, and yet not known to be durable.
        patch.setattr(Store, "sync", _fail)
        assert fold_orphans(store, KMS, folder) == Folded(num_left=1)
    assert _ids(store) == ["c0", "c1"] and len(_files(folder)) == 1
    assert fold_orphans(store, KMS, folder) == Folded(num_files=1, num_calls=2)
    assert _ids(store) == ["c0", "c1"] and _files(folder) == []


def test_without_its_key_a_journal_waits(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(0)])
    assert fold_orphans(store, FakeKms(b"x" * 32), folder) == Folded(num_left=1)
    assert fold_orphans(store, KMS, folder).num_calls == 1


def test_a_damaged_journal_is_set_aside_and_its_good_calls_are_published(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(number) for number in range(3)])
    (path,) = _files(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert fold_orphans(store, KMS, folder) == Folded(num_files=1, num_calls=2, num_damaged=1, num_aside=1)
    assert _ids(store) == ["c0", "c2"] and _files(folder) == []
    assert (folder / ASIDE / path.name).read_bytes() == data
    assert fold_orphans(store, KMS, folder) == Folded()


def test_the_keys_of_living_and_damaged_journals_are_known(tmp_path: pathlib.Path) -> None:
    """Whoever retires a master key asks for them: what it wrapped could never be read again."""
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    assert wrapped_keys(folder) == []
    _write(folder, [_call(0, ts=1e20)])
    assert fold_orphans(store, KMS, folder).num_aside == 1

    async def scenario() -> None:
        journal = Journal(folder, KMS, MANY, MANY)
        await journal.submit(_call(1))
        keys = wrapped_keys(folder)
        assert len(keys) == 2 and all(len(KMS.unwrap(key)) == 32 for key in keys)
        await journal.close()
        fold_orphans(store, KMS, folder)
        assert len(wrapped_keys(folder)) == 1

    asyncio.run(scenario())


def test_a_call_that_parquet_does_not_take_is_kept_aside(tmp_path: pathlib.Path) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(0), _call(1, ts=1e20), _call(2)])
    assert fold_orphans(store, KMS, folder) == Folded(num_files=1, num_calls=2, num_damaged=1, num_aside=1)
    assert len(_files(folder / ASIDE)) == 1


def test_a_large_journal_is_folded_in_portions(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = tmp_path / "journal", Store(str(tmp_path / "store"))
    _write(folder, [_call(number) for number in range(10)])
    monkeypatch.setattr(folding, "MAX_CALLS_PER_PART", 3)
    assert fold_orphans(store, KMS, folder).num_calls == 10
    assert len(store.list("calls", ".parquet")) == 4


def test_a_file_that_never_got_its_name_is_removed(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "journal"
    prepare_folder(folder)
    for name in ("just-made", "left-behind"):
        (folder / f".{name}{SUFFIX}").write_bytes(b"USJO")
    os.utime(folder / f".left-behind{SUFFIX}", (1.0, 1.0))
    assert fold_orphans(Store(str(tmp_path / "store")), KMS, folder) == Folded()
    assert os.listdir(folder) == [f".just-made{SUFFIX}"]


def test_sync_needs_the_files_it_is_told_of(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("calls/date=2026-01-01/part-1.parquet", b"x")
    store.sync(["calls/date=2026-01-01/part-1.parquet"])
    with pytest.raises(FileNotFoundError, match=r"part-2\.parquet"):
        store.sync(["calls/date=2026-01-01/part-2.parquet"])


def _fail(*_: object, **__: object) -> None:
    raise StoreError("away")
