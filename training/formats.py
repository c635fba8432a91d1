"""Log files -> AgentCalls: which source wrote a file, and every record of it as a call, a row of quarantine or a skip.

A source is a module of its own (format_openai.py, format_otel.py, format_litellm.py, format_langfuse.py,
format_understudy.py) that puts its records into common words; training/log_files.py reads the files and
training/log_records.py builds the calls. One bad record never stops the rest. A record without a time gets that of the
import plus one millisecond for each call before it: this keeps the order and says nothing of when it happened.
"""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from cluster.access import Pseudonyms
from cluster.errors import InputError
from cluster.quarantine import QuarantineRow
from cluster.records import AgentCall
from training.format_langfuse import LangfuseSource
from training.format_litellm import LiteLLMSource
from training.format_openai import OpenAISource
from training.format_otel import OTelSource
from training.format_understudy import UnderstudySource
from training.log_files import COMPRESSIONS, KNOWN_SUFFIXES, LogFile, Unusable, plain_name
from training.log_records import Logged, Place, ReadRules, Skipped, build_call

FORMATS = ("understudy", "openai", "otel", "litellm", "langfuse")
AUTO = "auto"
NUM_SNIFFED = 20
"""Values of a file that are looked at to tell its format."""
_OWN_SUFFIXES = (".calls.jsonl", ".sessions.jsonl")
"""Names that say the format, whatever stands in the file."""
NO_RULES = ReadRules()


class Source(Protocol):
    """One kind of log. May remember what one file says for the reading of another."""

    name: str

    def recognises(self, value: Any) -> bool:
        """Whether `value` is one of this source's records."""

    def is_lookup(self, value: Any) -> bool:
        """Whether `value` belongs to a file that others need first; such a source has `remember(value)`."""

    def read(self, value: Any, place: Place) -> Iterator[Logged | Skipped | Unusable]:
        """Every call in `value`."""


class LogReader:
    """Reads log files one after another; remembers the ids it has seen, over all of them."""

    def __init__(
        self, pseudonyms: Pseudonyms, start_ts: float, format: str = AUTO, rules: ReadRules = NO_RULES
    ) -> None:
        """
        Args:
            start_ts: seconds since the epoch given to the first call that has no time of its own.
            format: one of FORMATS for all files, or AUTO.
        """
        self._pseudonyms = pseudonyms
        self._start_ts = start_ts
        self._rules = rules
        # In the order in which a file is tried: the most telling records first.
        sources = (OTelSource(), LiteLLMSource(), UnderstudySource(), LangfuseSource(), OpenAISource())
        self._sources: dict[str, Source] = {source.name: source for source in sources}
        self._format = format
        self._found: dict[pathlib.Path, str] = {}
        self._seen: set[str] = set()
        self._num_calls = 0
        self.num_untimed = 0
        """Calls whose source has no time for them."""
        self.num_client_fallbacks = 0
        """Calls without the field that `client_field` names."""
        self.num_bytes = 0
        """How far the file that is being read has been read on disk."""

    def prepare(self, paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
        """Tell every file's format and read what one file says for another.

        Returns:
            The same files in the order to read them in.

        Raises:
            InputError: a path is no readable file, or its format cannot be told.
        """
        for path in paths:
            self._found[path] = self._detect(path)
        lookups = [path for path in paths if self._remember(path)]
        return [*(path for path in paths if path not in lookups), *lookups]

    def format_of(self, path: pathlib.Path) -> str:
        """The format of a prepared file."""
        return self._found[path]

    def read(self, path: pathlib.Path) -> Iterator[AgentCall | QuarantineRow | Skipped]:
        """Yield each record of one file, in the file's order.

        Raises:
            InputError: as `prepare`, which it does for a file that is not prepared. Raised at once, not at the first
                item.
        """
        if path not in self._found:
            self.prepare([path])
        return self._read(path)

    def _detect(self, path: pathlib.Path) -> str:
        check_path(path)
        if self._format != AUTO:
            return self._format
        if plain_name(path).endswith(_OWN_SUFFIXES):
            return UnderstudySource.name
        for value in _first_values(path):
            for name, source in self._sources.items():
                if source.recognises(value):
                    return name
        raise InputError(
            f"{path}: its first {NUM_SNIFFED} records are of no known format; allowed: {', '.join(FORMATS)}; "
            f"next: understudy ingest {path} --format NAME"
        )

    def _remember(self, path: pathlib.Path) -> bool:
        source = self._sources[self._found[path]]
        if not any(source.is_lookup(value) for value in _first_values(path)):
            return False
        for _, value in LogFile(path):
            source.remember(value)  # type: ignore[attr-defined]
        return True

    def _read(self, path: pathlib.Path) -> Iterator[AgentCall | QuarantineRow | Skipped]:
        source, file = self._sources[self._found[path]], LogFile(path)
        for position, value in file:
            self.num_bytes = file.num_bytes
            try:
                if isinstance(value, Unusable):
                    raise value
                for item in source.read(value, Place(plain_name(path), position)):
                    yield self._to_item(item, str(path), position)
            except Unusable as problem:
                yield problem.to_row(str(path), position)
        self.num_bytes = file.num_bytes

    def _to_item(
        self, item: Logged | Skipped | Unusable, path: str, position: int
    ) -> AgentCall | QuarantineRow | Skipped:
        if isinstance(item, Skipped):
            return item
        try:
            if isinstance(item, Unusable):
                raise item
            built = build_call(item, self._pseudonyms, self._start_ts + self._num_calls / 1000, self._rules)
            if built.call.call_id in self._seen:
                raise Unusable("duplicate id", "id: that of a record before it")
        except Unusable as problem:
            return problem.to_row(path, position)
        self._seen.add(built.call.call_id)
        self._num_calls += 1
        self.num_untimed += built.is_untimed
        self.num_client_fallbacks += built.fell_back
        return built.call


def _first_values(path: pathlib.Path) -> Iterator[Any]:
    for number, (_, value) in enumerate(LogFile(path)):
        if number >= NUM_SNIFFED:
            return
        if not isinstance(value, Unusable):
            yield value


def check_path(path: pathlib.Path) -> None:
    """Raises InputError where `path` cannot be a log file."""
    allowed = f"allowed: a file of {', '.join(FORMATS)} records, or a folder of such"
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "cannot be opened"
        raise InputError(f"{path}: {why}; {allowed}; next: ls -l {path.parent}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError(f"{path}: is {what}; {allowed}; next: understudy ingest {path}/NAME.jsonl")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: may not be read by this user; {allowed}; next: ls -l {path}")


def find_files(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The files themselves, and of each folder all files below it with a known ending; each file once.

    Symlinks to folders are not followed and empty files of a folder left out.

    Raises:
        InputError: a folder without such a file.
    """
    found: dict[str, pathlib.Path] = {}
    for path in paths:
        files = _files_below(path) if path.is_dir() else [path]
        if not files:
            endings = ", ".join(f"{suffix}[{'|'.join(COMPRESSIONS)}]" for suffix in KNOWN_SUFFIXES)
            raise InputError(f"{path}: no log file in this folder; allowed: {endings}; next: ls -R {path}")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (pathlib.Path(root, name) for name in names if not name.startswith("."))
        found += [file for file in files if plain_name(file).endswith(KNOWN_SUFFIXES) and _has_content(file)]
    return sorted(found)


def _has_content(file: pathlib.Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
