"""Langfuse: who asked may stand in a trace beside its observations, and every export of the same rows reads alike."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from foreign_logs import PSEUDONYMS, SAMPLES, START, as_langfuse_api, as_langfuse_blob, iso, read, what, write

from training.formats import LogReader


def test_a_trace_gives_its_observations_who_and_which_session(tmp_path):
    bare = ("userId", "sessionId", "traceName")
    inner = [
        {key: item for key, item in as_langfuse_api(n, s).items() if key not in bare} for n, s in enumerate(SAMPLES)
    ]
    inner.append({"id": "s", "type": "SPAN", "startTime": iso(START)})
    trace = {"id": "t", "timestamp": iso(START), "userId": "ann", "sessionId": "talk", "name": "desk"}
    legacy = {"id": "trace-0", "timestamp": iso(START), "user_id": "ann", "session_id": "talk", "name": "desk"}
    nested = read(write(tmp_path, [{**trace, "observations": inner}], "nested.json"))
    download = read(write(tmp_path, [{"trace": trace, "observations": inner}], "download.json"))
    observation = {**as_langfuse_blob(0, SAMPLES[0]), "user_id": None, "session_id": None, "trace_name": None}
    files = [write(tmp_path, [observation], "observations.jsonl"), write(tmp_path, [legacy], "traces.jsonl")]
    reader = LogReader(PSEUDONYMS, 0.0)
    joined = [item for path in reader.prepare(files) for item in reader.read(path)]
    assert what(nested) == what(download) == ["call"] * 3 + ["not a chat call: SPAN"]
    assert what(joined) == ["call", "a trace without its observations"]
    for call in (*nested[:3], *download[:3], joined[0]):
        assert (call.client_id, call.agent) == (PSEUDONYMS.of("client", "ann"), "desk")
        assert call.session_id == PSEUDONYMS.session_of("ann", "talk")


def test_langfuse_as_csv_parquet_array_and_page_say_the_same(tmp_path):
    rows = [as_langfuse_blob(number, sample) for number, sample in enumerate(SAMPLES)]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    for row in rows:
        table.writerow({key: json.dumps(item) if isinstance(item, dict) else item for key, item in row.items()})
    (tmp_path / "a.csv").write_text(text.getvalue(), encoding="utf-8-sig")
    counts = pa.map_(pa.string(), pa.int64())
    arrays = {key: [row[key] for row in rows] for key in rows[0] if key != "tool_definitions"}
    schema = pa.schema(
        [(key, counts if key == "usage_details" else pa.array(items).type) for key, items in arrays.items()]
    )
    arrays["usage_details"] = [list(row["usage_details"].items()) for row in rows]
    pq.write_table(pa.table(arrays, schema=schema), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text(json.dumps({"data": rows, "meta": {"page": 1}}))
    (tmp_path / "e.json").write_text(json.dumps({"data": rows, "meta": {"page": 1}}, indent=2))
    lines = read(write(tmp_path, rows))
    assert what(lines) == ["call"] * 3
    for name in ("a.csv", "c.json", "d.json", "e.json"):
        assert read(tmp_path / name) == lines
    # Where no tools are known, none was left out, and nothing tells that the turn has ended.
    without_tools = [
        call.model_copy(
            update={"request": {k: v for k, v in call.request.items() if k != "tools"}, "faces_person": False}
        )
        for call in lines
    ]
    assert read(tmp_path / "b.parquet") == without_tools
