"""The artifact store: one folder tree of immutable artifacts, local or in an object store, through pyarrow.fs.

An artifact is a folder that exists once its manifest.json, written last, exists; readers never see a
half-written one. Single files are replaced whole. Paths are store-relative, with forward slashes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import AfterValidator

from cluster.access import keys_folder
from cluster.config import has_credentials
from cluster.content_keys import ContentKeys
from cluster.errors import ConfigError, StoreError
from cluster.kms import find_kms, version_of

MANIFEST = "manifest.json"
_ENCRYPTED = b"understudy.encrypted"
"""In a Parquet file's metadata: its encrypted columns, with commas between."""
KEY_MATERIAL = "_KEY_MATERIAL_FOR_"
"""How Parquet names the file with another file's wrapped keys."""
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

    def __init__(self, uri: str, *, is_made: bool = True) -> None:
        """Open the store, creating its root folder if it is absent.

        Args:
            uri: a local folder, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
            is_made: False creates and writes nothing.

        Raises:
            ConfigError: the uri cannot be opened, or carries credentials.
        """
        self.uri = check_store_address(str(uri))
        try:
            self._fs, self._root = pafs.FileSystem.from_uri(uri if "://" in self.uri else str(_absolute(self.uri)))
            if is_made:
                self._fs.create_dir(self._root, recursive=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(
                f"store={uri!r}: cannot be opened ({error}); allowed: a folder, s3://... or gs://..."
            ) from None

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @functools.cached_property
    def content_keys(self) -> ContentKeys:
        """The keys of this store's content; asks no KMS yet.

        Raises:
            ConfigError: a remote store whose KMS nobody named.
        """
        return ContentKeys(find_kms(self.uri, keys_folder(self.uri)))

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
        with self._publishing(path) as sink:
            sink.write(data)

    @contextlib.contextmanager
    def _publishing(self, path: str) -> Iterator[pa.NativeFile]:
        """A stream whose bytes become the file at `path` when the block ends without an error."""
        target = self._full(path)
        folder, name = target.rsplit("/", 1)
        self._fs.create_dir(folder, recursive=True)
        if not isinstance(self._fs, pafs.LocalFileSystem):
            # An object store has no rename, and would show what a failed block has written so far.
            buffer = pa.BufferOutputStream()
            yield buffer
            with self._fs.open_output_stream(target) as stream:
                stream.write(buffer.getvalue())
            return
        unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}"
        try:
            with self._fs.open_output_stream(unfinished) as sink:
                yield sink
            # Else a power failure may leave the name without the bytes, and a broken file stops every reader.
            sync_path(pathlib.Path(unfinished))
            self._fs.move(unfinished, target)
        finally:
            # Gone already where it has its name.
            self._delete_full(unfinished)

    @contextlib.contextmanager
    def exclusive(self, path: str) -> Iterator[None]:
        """One process at a time runs a block for `path`, others wait. An object store has no such lock: there it holds nobody
        off, and writers compare what they read before with what stands there."""
        if not isinstance(self._fs, pafs.LocalFileSystem):
            yield
            return
        folder, name = self._full(path).rsplit("/", 1)
        with open(f"{folder}/.{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def sync(self, paths: Iterable[str]) -> None:
        """Return once these files with their keys and names outlive a power failure; a process's end they outlive at once.

        An object store needs none of it: what it has taken is durable.

        Raises:
            OSError: one of them does not exist, or the disk fails.
        """
        if not isinstance(self._fs, pafs.LocalFileSystem):
            return
        folders: set[pathlib.Path] = set()
        root = pathlib.Path(self._root)
        for path in paths:
            sync_path(root / path)
            if self.exists(_key_material(path)):
                sync_path(root / _key_material(path))
            folders.update(one for one in (root / path).parents if one == root or root in one.parents)
        for folder in folders:
            sync_path(folder)

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def read_table(self, paths: str | list[str], columns: list[str] | None = None) -> pa.Table:
        """Concatenate Parquet files into one table. Columns that are not encrypted need no key.

        Raises:
            StoreError: a file is missing, or is not Parquet.
            KeyAccessError: an encrypted column is asked for, and its key is not to be had.
        """
        names = [paths] if isinstance(paths, str) else paths
        return pa.concat_tables([self._read_table(name, columns) for name in names], promote_options="default")

    def _read_table(self, name: str, columns: list[str] | None) -> pa.Table:
        full = self._full(name)
        try:
            with self._fs.open_input_file(full) as source:
                file = pq.ParquetFile(source)
                secret = (file.schema_arrow.metadata or {}).get(_ENCRYPTED)
                if secret is None or (columns is not None and not set(columns) & set(secret.decode().split(","))):
                    return file.read(columns)
            with self._fs.open_input_file(full) as source:
                keys = self.content_keys.decryption(full, self._fs)
                return pq.ParquetFile(source, decryption_properties=keys).read(columns)
        except StoreError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{name}: cannot be read as Parquet from store {self.uri}: {error}") from None

    def write_table(self, path: str, table: pa.Table, encrypted: tuple[str, ...] = ()) -> None:
        """Write one Parquet file, published whole.

        Args:
            encrypted: string columns that nobody reads without the content key. Such a file is never written again:
                its keys lie beside it, and the two cannot be replaced at once.
        """
        with self.table_writer(path, table.schema, encrypted) as writer:
            writer.write_table(table)

    @contextlib.contextmanager
    def table_writer(self, path: str, schema: pa.Schema, encrypted: tuple[str, ...] = ()) -> Iterator[pq.ParquetWriter]:
        """Write one Parquet file row group by row group; readers see it once the block has ended without an error.

        Args:
            encrypted: as for `write_table`.
        """
        full = self._full(path)
        options = {}
        with contextlib.ExitStack() as undo:
            if encrypted:
                assert not self.exists(path), f"{path}: an encrypted file is never written again"
                self._fs.create_dir(full.rsplit("/", 1)[0], recursive=True)
                undo.callback(self._delete, _key_material(path))
                options["encryption_properties"] = self.content_keys.encryption(encrypted, full, self._fs)
                schema = schema.with_metadata({**(schema.metadata or {}), _ENCRYPTED: ",".join(encrypted).encode()})
            with (
                self._publishing(path) as sink,
                pq.ParquetWriter(sink, schema, compression="zstd", **options) as writer,
            ):
                yield writer
            undo.pop_all()

    def delete(self, path: str) -> None:
        """Remove one file and its keys; what is absent already is no error."""
        # The file goes first: without keys it could not be read, and without the file keys harm nobody.
        self._delete(path)
        if path.endswith(".parquet"):
            self._delete(_key_material(path))

    def sweep(self, folder: str, older_than_s: float) -> int:
        """Remove what processes that died left below `folder`: unfinished files, and keys of files that never came.

        Returns:
            How many files were removed.
        """
        selector = pafs.FileSelector(self._full(folder), recursive=True, allow_not_found=True)
        before = time.time() - older_than_s
        old = {info.path for info in self._fs.get_file_info(selector) if info.is_file and info.mtime_ns < before * 1e9}
        left = [path for path in old if path.rsplit("/", 1)[-1].startswith(".")]
        for path in old:
            parent, _, name = path.rpartition("/")
            if name.startswith(KEY_MATERIAL):
                owner = f"{parent}/{name.removeprefix(KEY_MATERIAL).removesuffix('.json')}"
                if self._fs.get_file_info(owner).type == pafs.FileType.NotFound:
                    left.append(path)
        for path in left:
            self._delete_full(path)
        return len(left)

    def rewrap_keys(self) -> int:
        """Wrap the keys of all encrypted files with the newest master key; returns how many files there were."""
        paths = [path for path in self.list("", ".parquet") if self.exists(_key_material(path))]
        for path in paths:
            self.content_keys.rewrap(self._full(path), self._fs)
        return len(paths)

    def key_versions(self) -> set[int]:
        """Versions of the master key that the files' keys are wrapped with."""
        versions: set[int] = set()
        for path in self.list("", ".json"):
            if path.rsplit("/", 1)[-1].startswith(KEY_MATERIAL):
                materials = [json.loads(text) for text in self.read_json(path).values()]
                versions |= {version_of(one["wrappedKEK"]) for one in materials if one.get("wrappedKEK")}
        return versions

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

    def _delete(self, path: str) -> None:
        self._delete_full(self._full(path))

    def _delete_full(self, full: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(full)

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}".rstrip("/")


def _key_material(path: str) -> str:
    folder, sign, name = path.rpartition("/")
    return f"{folder}{sign}{KEY_MATERIAL}{name}.json"


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


def sync_path(path: pathlib.Path) -> None:
    """Return once a local file's bytes are durable, or the names in a local folder: new, moved and removed ones."""
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
