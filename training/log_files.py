"""A log file -> its JSON values, one after another: JSON lines, JSON documents, CSV and Parquet, plain, .gz or .zst.

Nothing is held but the value at hand: a document's array is decoded item by item (the array itself, or the one under
`resourceSpans` or `data`), so that a file may be larger than the memory. One value may take MAX_LINE_BYTES. What cannot
be read comes as its problem in its place: a bad line costs that line, a break inside a document, a table or a
compressed stream costs the rest of the file. Knows nothing of what a value means.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.quarantine import QuarantineRow

MAX_LINE_BYTES = 64 * 1024 * 1024
"""Most bytes of one line, of one item of a document's array, or of a document that has no such array."""
MAX_DEPTH = 100
"""Deepest nesting of a value; Python's own JSON fails, depending on who calls, near 1,000."""
COMPRESSIONS = (".gz", ".zst")
KNOWN_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_CHUNK_BYTES = 64 * 1024
_HEAD = 4 * 1024
"""Bytes of a document that are looked at for an envelope."""
_ROWS_PER_BATCH = 256
_LIST_KEY = re.compile(
    r'\s*\{(?:\s*"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,)*\s*"(?P<key>resourceSpans|data)"\s*:\s*\[', re.ASCII
)
"""Start of a document that is a list in an envelope: OTLP, or one page of an API."""
_BROKEN = (OSError, EOFError, zlib.error, pa.ArrowException)


class Unusable(Exception):
    """A value or record that cannot become a call: few fixed words, and where; never what it says."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def to_row(self, source: str, position: int) -> QuarantineRow:
        """`position` counts from 1: the line of a file of lines or of a table, else the item of the document."""
        return QuarantineRow(source=source, line=position, reason=self.reason, detail=self.detail)


class LogFile:
    """One file of values; iterate once. `num_bytes` is how far the file on disk has been read, for a progress bar."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._raw: BinaryIO | None = None
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        if self._raw is not None and not self._raw.closed:
            self._num_bytes = self._raw.tell()
        return self._num_bytes

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Position and value, or position and an Unusable; blank lines are left out.

        Raises:
            OSError: the file cannot be opened.
        """
        if plain_name(self._path).endswith(".parquet"):
            yield from _iterate_parquet(self._path)
            return
        shape = self._shape()
        with open(self._path, "rb") as self._raw, _decompress(self._raw, self._path.name) as stream:
            yield from {"lines": _iterate_lines, "document": _iterate_document, "csv": _iterate_csv}[shape](stream)
            self._num_bytes = self._raw.tell()

    def _shape(self) -> str:
        """By the name where it says so, else by whether the first line is a value of its own."""
        name = plain_name(self._path)
        if name.endswith((".jsonl", ".ndjson")):
            return "lines"
        if name.endswith(".csv"):
            return "csv"
        with open(self._path, "rb") as raw, _decompress(raw, self._path.name) as stream:
            line = _first_line(stream)
        start = line.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if start == b"[":
            return "document"
        if start != b"{":
            return "lines"
        envelope = _LIST_KEY.match(line[:_HEAD].decode("utf-8", errors="replace").removeprefix("\ufeff"))
        if envelope and envelope["key"] == "data":
            return "document"
        try:
            parse_json(line)
        except Unusable:
            return "document"
        return "lines"


def plain_name(path: pathlib.Path) -> str:
    """Name of the file without its compression."""
    return path.name.removesuffix(".gz").removesuffix(".zst")


def parse_json(content: bytes | str) -> Any:
    """One JSON value, strictly.

    Raises:
        Unusable: it is none, has a number or text that nothing could store, or is nested deeper than MAX_DEPTH.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeError as error:
        raise Unusable("not UTF-8", f"{error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise Unusable("not JSON", f"{error.msg} at column {error.colno} of {len(content)}") from None
    except ValueError:
        raise Unusable("not JSON", "an integer of more than 4300 digits") from None
    except RecursionError:
        raise Unusable("not JSON", "nested too deeply") from None
    return _checked(value, text)


def _checked(value: Any, text: str) -> Any:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            break
    else:
        raise Unusable("not JSON", "nested too deeply")
    if "\\ud" in text or "\\uD" in text:
        # An escaped half of a surrogate pair parses but is no text: nothing could store it.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeError:
            raise Unusable("not UTF-8", "half of a surrogate pair") from None
    return value


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is not JSON", "", 0)


def _decompress(raw: BinaryIO, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return io.BufferedReader(raw) if not isinstance(raw, io.BufferedReader) else raw


def _first_line(stream: Any) -> bytes:
    """The first line that is not blank; of one that cannot be read to its end the beginning."""
    line = b""
    try:
        while not line.strip() and (line := stream.readline(_HEAD)):
            pass
        if not line.endswith(b"\n"):
            line += stream.readline(MAX_LINE_BYTES)
    except _BROKEN:
        pass
    return line


def _iterate_lines(stream: Any) -> Iterator[tuple[int, Any]]:
    position = 0
    while True:
        position += 1
        try:
            content = _read_line(stream)
        except _BROKEN as error:
            yield position, _unreadable(error)
            return
        if not content:
            return
        content = content.removeprefix(codecs.BOM_UTF8) if position == 1 else content
        if len(content) > MAX_LINE_BYTES:
            yield position, Unusable("line too long", f"more than {MAX_LINE_BYTES} bytes")
        elif content.strip():
            try:
                yield position, parse_json(content)
            except Unusable as problem:
                yield position, problem


def _unreadable(error: Exception) -> Unusable:
    return Unusable("corrupt file", f"unreadable from here on: {type(error).__name__}")


def _read_line(stream: Any) -> bytes:
    """One line; of a longer one than MAX_LINE_BYTES its beginning, the rest skipped."""
    content = stream.readline(MAX_LINE_BYTES + 1)
    rest = content
    while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_LINE_BYTES + 1)
    return content


class _Text:
    """Sliding window over a document's text."""

    _decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    _blank = re.compile(r"[ \t\r\n]*")

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0
        self._is_over = False
        self.problem: Unusable | None = None
        """What broke the text, once all before it has been read."""

    def fill(self) -> bool:
        """Read as much again as is waiting, so that retries of a long value cost twice its length at most."""
        if self._is_over:
            return False
        more = ""
        try:
            data = self._stream.read(max(_CHUNK_BYTES, len(self.text) - self.at))
            self._is_over = not data
            more = self._utf8.decode(data, final=self._is_over)
        except UnicodeDecodeError as error:
            more = error.object[: error.start].decode("utf-8")
            self.problem = Unusable("not UTF-8", "unreadable from here on")
        except _BROKEN as error:
            self.problem = _unreadable(error)
        self._is_over = self._is_over or self.problem is not None
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more) or not self._is_over

    def peek(self) -> str:
        """The next character that is no blank, or "" at the end."""
        while True:
            self.at = self._blank.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def value(self) -> tuple[Any, str]:
        """Decode the value that starts here and step over it; the value and its text."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self.fill():
                    raise self.problem or Unusable("not JSON", f"{error.msg}; unreadable from here on") from None
            except ValueError:
                raise Unusable("not JSON", "an integer of more than 4300 digits; unreadable from here on") from None
            except RecursionError:
                raise Unusable("not JSON", "nested too deeply; unreadable from here on") from None
            else:
                if end < len(self.text) or not self.fill():
                    text, self.at = self.text[self.at : end], end
                    return value, text
            if len(self.text) - self.at > MAX_LINE_BYTES and not self._is_over:
                detail = f"an item of more than {MAX_LINE_BYTES} characters; split it: jq -c '.[]' FILE > FILE.jsonl"
                raise Unusable("document too long", detail)


def _iterate_document(stream: Any) -> Iterator[tuple[int, Any]]:
    """Items of an array, of a list in an envelope, or documents one after another."""
    position, text = 1, _Text(stream)
    while len(text.text) < _HEAD and text.fill():
        pass
    start = text.peek()
    envelope = _LIST_KEY.match(text.text)
    is_list = envelope is not None or start == "["
    if is_list:
        text.at = envelope.end() if envelope else text.at + 1
    wraps_spans = envelope is not None and envelope["key"] == "resourceSpans"
    while (start := text.peek()) and not (is_list and start == "]"):
        if is_list and start == ",":
            text.at += 1
            continue
        try:
            item, source = text.value()
        except Unusable as problem:
            yield position, problem
            return
        try:
            item = _checked(item, source)
            yield position, {"resourceSpans": [item]} if wraps_spans else item
        except Unusable as problem:
            yield position, problem
        position += 1
    if not start and (is_list or text.problem):
        yield position, text.problem or Unusable("not JSON", "the document ends inside its list")


def _iterate_csv(stream: Any) -> Iterator[tuple[int, Any]]:
    """Rows as objects of text cells; an empty cell is null."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, strict=True)
    try:
        for row in rows:
            if None in row:
                yield rows.line_num, Unusable("not CSV", "more cells than columns")
            else:
                yield rows.line_num, {name: cell or None for name, cell in row.items()}
    except csv.Error:
        yield rows.line_num, Unusable("not CSV", "unreadable from here on")
    except UnicodeError:
        yield rows.line_num + 1, Unusable("not UTF-8", "unreadable from here on")
    except _BROKEN as error:
        yield rows.line_num + 1, _unreadable(error)
    finally:
        text.detach()


def _iterate_parquet(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    position = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    position += 1
                    yield position, row
    except (*_BROKEN, UnicodeError) as error:
        yield position + 1, _unreadable(error)
