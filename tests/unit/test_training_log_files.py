"""training/log_files.py: every value of a file comes once, whatever its shape, and a break costs no more than it must."""

import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training import log_files
from training.log_files import LogFile, Unusable, parse_json

VALUES = [{"a": index, "t": "é\n" * 3} for index in range(5)]


def read(tmp_path, name: str, data: bytes) -> list:
    path = tmp_path / name
    path.write_bytes(data)
    return [value.reason if isinstance(value, Unusable) else value for _, value in LogFile(path)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


SHAPES = {
    "lines.jsonl": "\n".join(map(json.dumps, VALUES)),
    "lines.json": "\n".join(map(json.dumps, VALUES)),
    "lines.log": "\n\n" + "\n".join(map(json.dumps, VALUES)) + "\n",
    "bom.jsonl": "\ufeff" + "\n".join(map(json.dumps, VALUES)),
    "array.json": json.dumps(VALUES),
    "pretty.json": json.dumps(VALUES, indent=2),
    "bom.json": "\ufeff" + json.dumps(VALUES, indent=1),
    "documents.json": "\n".join(json.dumps(value, indent=1) for value in VALUES),
    "page.json": json.dumps({"object": "list", "n": 3, "data": VALUES, "meta": {"page": 1}}),
    "prettypage.json": json.dumps({"object": "list", "n": 3, "data": VALUES, "meta": {"page": 1}}, indent=1),
}


@pytest.mark.parametrize("compress", [None, "gz", "zst"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 64 * 1024])
def test_the_values_come_whatever_the_shape_and_the_compression(tmp_path, monkeypatch, name, compress, chunk):
    monkeypatch.setattr(log_files, "_CHUNK_BYTES", chunk)
    data = SHAPES[name].encode()
    data = {None: data, "gz": gzip.compress(data), "zst": zstd(data)}[compress]
    assert read(tmp_path, f"{name}.{compress}" if compress else name, data) == VALUES


def test_the_spans_of_one_document_come_group_by_group(tmp_path):
    document = json.dumps({"resourceSpans": VALUES}, indent=1).encode()
    assert read(tmp_path, "traces.json", document) == [{"resourceSpans": [value]} for value in VALUES]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"a":1}\n{"a":\n{"a":2}', [{"a": 1}, "not JSON", {"a": 2}]),
        ("a.jsonl", b'{"a":1}\n\xff\n{"a":2}', [{"a": 1}, "not UTF-8", {"a": 2}]),
        ("a.jsonl", b'{"a":NaN}\n{"a":2}', ["not JSON", {"a": 2}]),
        ("a.jsonl", b'{"a":"\\ud800"}\n{"a":2}', ["not UTF-8", {"a": 2}]),
        ("a.jsonl", b'{"a":' + b"1" * 5000 + b'}\n{"a":2}', ["not JSON", {"a": 2}]),
        ("a.jsonl", b"[" * 300 + b"]" * 300 + b'\n{"a":2}', ["not JSON", {"a": 2}]),
        ("a.jsonl", b"[" * 90_000 + b"]" * 90_000 + b'\n{"a":2}', ["not JSON", {"a": 2}]),
        ("a.json", b'[{"a":1},{"a":"\\ud800"},{"a":2}]', [{"a": 1}, "not UTF-8", {"a": 2}]),
        ("a.json", b'[{"a":1},{"a":' + b"1" * 5000 + b'},{"a":2}]', [{"a": 1}, "not JSON"]),
        ("a.json", b'[{"a":1},' + b"[" * 90_000, [{"a": 1}, "not JSON"]),
        ("a.json", b'[{"a":1},{"a":', [{"a": 1}, "not JSON"]),
        ("a.json", b'[{"a":1}', [{"a": 1}, "not JSON"]),
        ("a.json", b'[{"a":1},{"a":"\xff"}]', [{"a": 1}, "not UTF-8"]),
        ("a.json", b'[{"a":1},NaN]', [{"a": 1}, "not JSON"]),
        ("a.json", b"{", ["not JSON"]),
        ("a.csv", b"a,b\n1,2\n3,4,5\n6,\n", [{"a": "1", "b": "2"}, "not CSV", {"a": "6", "b": None}]),
        ("a.csv", b'a,b\n1,"2\n3,4', ["not CSV"]),
        ("a.csv", b"a,b\n1,\xff\n", ["not UTF-8"]),
        ("a.parquet", b"no parquet", ["corrupt file"]),
        ("a.jsonl.gz", b"no gzip", ["corrupt file"]),
        ("a.jsonl.zst", b"no zstd", ["corrupt file"]),
        ("a.json.gz", b"no gzip", ["corrupt file"]),
        ("a.csv.gz", b"no gzip", ["corrupt file"]),
        ("a.json", b"", []),
        ("a.csv", b"", []),
    ],
)
def test_what_is_broken_is_told_in_its_place(tmp_path, name, data, expected):
    assert read(tmp_path, name, data) == expected


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst"])
def test_a_cut_stream_keeps_what_came_before_the_cut(tmp_path, name):
    values = [{"a": index} for index in range(40_000)]
    text = "\n".join(map(json.dumps, values)) if "jsonl" in name else json.dumps(values)
    data = gzip.compress(text.encode()) if name.endswith("gz") else zstd(text.encode())
    *kept, problem = read(tmp_path, name, data[: len(data) * 2 // 3])
    assert problem in ("corrupt file", "not JSON")
    assert len(kept) > 10_000 and kept == values[: len(kept)]


def test_an_item_longer_than_the_limit_is_refused_with_the_next_command(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(log_files, "_CHUNK_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, {"a": "x" * 50_000}, {"a": 2}]))
    (_, first), (position, problem) = LogFile(path)
    assert (first, position, problem.reason) == ({"a": 1}, 2, "document too long")
    assert "jq -c" in problem.detail


def test_a_document_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": "x" * 1000} for _ in range(5000)]))
    file = LogFile(path)
    values = iter(file)
    next(values)
    assert 0 < file.num_bytes < 1_000_000 < path.stat().st_size
    assert sum(1 for _ in values) == 4999 and file.num_bytes == path.stat().st_size


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON.filter(lambda value: value is not None), max_size=5), indent=st.sampled_from([None, 1]))
def test_an_array_gives_exactly_its_items(tmp_path_factory, values, indent):
    path = tmp_path_factory.mktemp("logs") / "a.json"
    path.write_text(json.dumps(values, indent=indent))
    assert [value for _, value in LogFile(path)] == values


@given(content=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_are_a_value_or_a_reason(content):
    try:
        json.dumps(parse_json(content))
    except Unusable as problem:
        assert problem.reason in ("not JSON", "not UTF-8")
