"""The store's copies of remote artifacts: written whole, repaired when broken, readable by their owner alone."""

import os
import pathlib
import tempfile

import pyarrow.fs as pafs
import pytest

from cluster.errors import StoreError
from cluster.store import Store, cache_folder

WEIGHTS = b"weights" * 1000


@pytest.fixture
def remote(tmp_path) -> Store:
    """A store that is not known to be local, with one artifact."""
    store = Store(str(tmp_path / "store"))
    store._fs = pafs.SubTreeFileSystem("/", pafs.LocalFileSystem())
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "weights.bin").write_bytes(WEIGHTS)
    (source / "sub" / "config.json").write_bytes(b"{}")
    store.publish("bases/one", source, {})
    return store


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fetched_artifact_is_whole_and_fetched_once(remote, tmp_path):
    copy = remote.fetch("bases/one", tmp_path / "cache")
    assert files_of(copy) == {"weights.bin": WEIGHTS, "sub/config.json": b"{}"}
    written = (copy / "weights.bin").stat().st_mtime_ns
    assert remote.fetch("bases/one", tmp_path / "cache") == copy
    assert (copy / "weights.bin").stat().st_mtime_ns == written


def test_what_a_killed_process_left_is_fetched_again(remote, tmp_path):
    copy = remote.fetch("bases/one", tmp_path / "cache")
    (copy / "weights.bin").write_bytes(WEIGHTS[:100])
    assert files_of(remote.fetch("bases/one", tmp_path / "cache"))["weights.bin"] == WEIGHTS


def test_a_write_that_breaks_off_leaves_no_file_under_the_name(remote, tmp_path, monkeypatch):
    def break_off(self: pathlib.Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(pathlib.Path, "write_bytes", break_off)
        remote.fetch("bases/one", tmp_path / "cache")
    assert files_of(tmp_path / "cache") == {}
    assert len(files_of(remote.fetch("bases/one", tmp_path / "cache"))) == 2


def test_an_artifact_that_differs_from_its_manifest_is_refused_after_one_more_try(remote, tmp_path):
    path = tmp_path / "store" / "bases" / "one" / "weights.bin"
    path.write_bytes(b"other")
    with pytest.raises(StoreError, match="bases/one/weights.bin: differs from its manifest"):
        remote.fetch("bases/one", tmp_path / "cache")
    path.write_bytes(WEIGHTS)
    assert len(files_of(remote.fetch("bases/one", tmp_path / "cache"))) == 2


def test_the_users_cache_is_closed_to_others(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = remote.fetch("bases/one")
    folder = cache_folder()
    assert copy.parent == folder and str(os.getuid()) in folder.name
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert cache_folder().stat().st_mode & 0o777 == 0o700


def test_a_cache_that_is_somebody_elses_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"understudy-cache-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not this user's own folder; remove it, or set TMPDIR"):
        cache_folder()


def test_a_local_store_is_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    store = Store(str(tmp_path / "store"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"a")
    store.publish("bases/one", tmp_path / "source", {})
    assert store.fetch("bases/one") == tmp_path / "store" / "bases" / "one"
