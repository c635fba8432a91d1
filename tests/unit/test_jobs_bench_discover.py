"""jobs/bench/discover.py: the benchmark gives every number it promises, on files of its own making."""

import json
import random

import pytest

from jobs.__main__ import main
from jobs.bench.discover import bench_discover

VERBS = {"AddToPlaylist": "add the song {} to my {} playlist", "GetWeather": "will it rain in {} near {} tomorrow"}
PLACES = "paris rome oslo lima cairo quito delhi tokyo berlin madrid".split()
KEYS = {
    *("site_v_measure", "v_measure", "num_tasks", "stability", "router_p50_ms", "router_p99_ms"),
    *("router_accuracy", "out_of_task_auroc"),
}


def write_calls(path, num: int, first: int = 0) -> None:
    rows = []
    for i in range(first, first + num):
        rng, label = random.Random(i), list(VERBS)[i % 2]
        text = VERBS[label].format(rng.choice(PLACES), rng.choice(PLACES))
        messages = [
            {"role": "system", "content": "You turn what people say into one call of a tool."},
            {"role": "user", "content": f"{text} {rng.choice(PLACES)}"},
        ]
        message = {"role": "assistant", "content": json.dumps({"intent": label})}
        response = {"object": "chat.completion", "model": "m", "choices": [{"index": 0, "message": message}]}
        request = {"model": "m", "messages": messages}
        rows.append(
            {"id": f"c{i}", "session": f"s{i}", "source": "x", "request": request, "response": response, "label": label}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_number_is_there_and_topics_find_the_classes(tmp_path) -> None:
    write_calls(tmp_path / "snips.calls.jsonl", 240)
    found = bench_discover([tmp_path / "snips.calls.jsonl"], [], lambda line: None)
    assert found.keys() >= KEYS
    assert found["site_v_measure"] == 1.0 and found["num_tasks"] == {"snips": 1}
    assert found["v_measure"]["snips"].keys() >= {
        "ours",
        "default_pipeline",
        "kmeans_true_k",
        "ari",
        "purity",
        "clusters",
    }
    assert found["v_measure"]["snips"]["purity"]["ours"] == 1.0
    assert found["stability"] == 1.0 and found["router_accuracy"] == 1.0
    assert 0 < found["router_p50_ms"] <= found["router_p99_ms"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_other_files_may_be_fitted_on_and_the_numbers_are_written(tmp_path, capsys) -> None:
    write_calls(tmp_path / "snips.calls.jsonl", 120, first=1000)
    write_calls(tmp_path / "seen.calls.jsonl", 120)
    out = tmp_path / "out.json"
    main(
        [
            "bench",
            "discover",
            "--without-selection",
            "--calls",
            str(tmp_path / "snips.calls.jsonl"),
            "--fit",
            str(tmp_path / "seen.calls.jsonl"),
            "--json",
            str(out),
        ]
    )
    assert json.loads(out.read_text())["num_tasks"] == {"seen": 1}
