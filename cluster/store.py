"""The artifact store: one folder tree of immutable artifacts, local or in an object store, through pyarrow.fs.

An artifact is a folder that exists once its manifest.json, written last, exists; readers never see a
half-written one. Single files are replaced whole. Paths are store-relative, with forward slashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import stat
import tempfile
import uuid
from collections.abc import Iterable
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import AfterValidator

from cluster.config import has_credentials
from cluster.errors import ConfigError, StoreError

MANIFEST = "manifest.json"
_ANONYMOUS = "gs://anonymous@"
"""How pyarrow is told to read a public bucket; no credential."""


def check_store_address(uri: str) -> str:
    """Return a store's address that may be shown and written.

    Raises:
        ConfigError: it carries credentials, which are not repeated.
    """
    if has_credentials(uri.replace(_ANONYMOUS, "gs://", 1) if uri.startswith(_ANONYMOUS) else uri):
        raise ConfigError(
            "the store's address carries credentials, which would be shown and written beside every release; "
            "allowed: s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; next: take them out, and on every node set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS"
        )
    return uri


StoreAddress = Annotated[str, AfterValidator(check_store_address)]
"""A config field that names a store."""


class Store:
    """Reads and writes artifacts below one root. Cheap to build; picklable by its `uri`."""

    def __init__(self, uri: str) -> None:
        """Open the store, creating a local root folder if it is absent.

        Args:
            uri: a local folder, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.

        Raises:
            ConfigError: the uri cannot be opened, or carries credentials.
        """
        self.uri = check_store_address(str(uri))
        try:
            self._fs, self._root = pafs.FileSystem.from_uri(uri if "://" in self.uri else str(_absolute(self.uri)))
            self._fs.create_dir(self._root, recursive=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(
                f"store={uri!r}: cannot be opened ({error}); allowed: a folder, s3://... or gs://..."
            ) from None

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def exists(self, path: str) -> bool:
        return self._fs.get_file_info(self._full(path)).type != pafs.FileType.NotFound

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Store-relative paths of all files below `folder`, sorted; hidden and unfinished ones left out."""
        selector = pafs.FileSelector(self._full(folder), recursive=True, allow_not_found=True)
        names = (
            info.path[len(self._root.rstrip("/")) + 1 :] for info in self._fs.get_file_info(selector) if info.is_file
        )
        return sorted(n for n in names if n.endswith(suffix) and not any(p.startswith(".") for p in n.split("/")))

    def read_bytes(self, path: str) -> bytes:
        """Raises StoreError where `path` does not exist."""
        try:
            with self._fs.open_input_stream(self._full(path)) as stream:
                return stream.read()
        except FileNotFoundError:
            raise StoreError(f"{path}: not in store {self.uri}") from None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Replace `path` whole; a reader sees the old bytes or the new ones."""
        target = self._full(path)
        self._fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        if not isinstance(self._fs, pafs.LocalFileSystem):
            with self._fs.open_output_stream(target) as stream:
                stream.write(data)
            return
        folder, name = target.rsplit("/", 1)
        unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}"
        with self._fs.open_output_stream(unfinished) as stream:
            stream.write(data)
        self._fs.move(unfinished, target)

    def sync(self, paths: Iterable[str]) -> None:
        """Return once these files, their names and what lies beside them under their names outlive a power failure.

        A file written here outlives its process at once, and the machine only after this. An object store needs none
        of it: what it has taken is durable.

        Raises:
            StoreError: one of them does not exist.
        """
        if not isinstance(self._fs, pafs.LocalFileSystem):
            return
        folders: set[pathlib.Path] = set()
        root = pathlib.Path(self._root)
        for target in (root / path for path in paths):
            files = [file for file in target.parent.glob(f"*{target.name}*") if not file.name.startswith(".")]
            if target not in files:
                raise StoreError(f"{target.relative_to(root)}: not in store {self.uri}")
            for file in files:
                _sync_file(file)
            folders.update(one for one in target.parents if one == root or root in one.parents)
        for folder in folders:
            sync_folder(folder)

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def read_table(self, paths: str | list[str], columns: list[str] | None = None) -> pa.Table:
        """Concatenate Parquet files into one table.

        Raises:
            StoreError: a file is missing, or is not Parquet.
        """
        names = [paths] if isinstance(paths, str) else paths
        try:
            tables = [
                pq.read_table(self._full(n), filesystem=self._fs, columns=columns, partitioning=None) for n in names
            ]
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise StoreError(f"cannot read Parquet from store {self.uri}: {error}") from None
        return pa.concat_tables(tables, promote_options="default")

    def write_table(self, path: str, table: pa.Table) -> None:
        """Write one Parquet file, published whole."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(path, sink.getvalue().to_pybytes())

    def publish(self, folder: str, local: pathlib.Path, meta: dict[str, Any]) -> dict[str, Any]:
        """Copy a local folder to `folder` and write its manifest last.

        Returns:
            The manifest: {"files": {name: {"bytes", "sha256"}}, "sha256": content hash, **meta}.
        """
        files = {}
        for file in sorted(p for p in local.rglob("*") if p.is_file()):
            name, data = file.relative_to(local).as_posix(), file.read_bytes()
            self.write_bytes(f"{folder}/{name}", data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {**meta, "files": files, "sha256": content_hash(files)}
        self.write_json(f"{folder}/{MANIFEST}", manifest)
        return manifest

    def manifest(self, folder: str) -> dict[str, Any]:
        """Raises StoreError where the artifact was never finished."""
        return self.read_json(f"{folder}/{MANIFEST}")

    def is_published(self, folder: str) -> bool:
        return self.exists(f"{folder}/{MANIFEST}")

    def fetch(self, folder: str, cache: pathlib.Path | None = None) -> pathlib.Path:
        """Local folder with the artifact's files, checked against the manifest.

        A local store is read in place; a remote one is copied to `cache` once per content hash, and a copy that is
        not what the manifest says once more. Processes may fetch the same artifact at the same time.

        Args:
            cache: None takes this user's own on this machine.

        Raises:
            StoreError: unfinished, or a file differs from its manifest.
        """
        manifest = self.manifest(folder)
        is_local = isinstance(self._fs, pafs.LocalFileSystem)
        target = pathlib.Path(self._full(folder)) if is_local else (cache or cache_folder()) / manifest["sha256"]
        for name, facts in manifest["files"].items():
            copy, sha256 = target / name, facts["sha256"]
            if not is_local and _file_sha256(copy) != sha256:
                _replace(copy, self.read_bytes(f"{folder}/{name}"))
            if _file_sha256(copy) != sha256:
                raise StoreError(f"{folder}/{name}: differs from its manifest; publish the artifact again")
        return target

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}".rstrip("/")


def content_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: the name of a content-addressed artifact."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def cache_folder() -> pathlib.Path:
    """This user's folder for copies of remote artifacts, made where it is absent; nobody else can read or fill it.

    Raises:
        StoreError: the folder is somebody else's.
    """
    folder = pathlib.Path(tempfile.gettempdir()) / f"understudy-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StoreError(f"{folder}: is not this user's own folder; remove it, or set TMPDIR to another place")
    folder.chmod(0o700)
    return folder


def sync_folder(folder: pathlib.Path) -> None:
    """Return once the names in a local folder are durable: new, moved and removed ones."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_file(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _file_sha256(path: pathlib.Path) -> str | None:
    """None where there is no such file."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Write a file whole: a process that is killed leaves the old one or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _absolute(folder: str) -> pathlib.Path:
    return pathlib.Path(folder).expanduser().resolve()
