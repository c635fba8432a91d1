"""jobs/bench/gate.py and its parts: pools whose truth is known, gates that break a promise are seen to, drift is timed right."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import numpy as np
import pytest
from fakes import make_specialist

from cluster.errors import ConfigError, InputError
from cluster.records import Gate
from cluster.sequential import RiskTest
from jobs.__main__ import main
from jobs.bench import gate, gate_drift, gate_pools, gate_refine, gate_tracer
from jobs.bench.gate_pools import Pool
from serving.evidence import Comparison, begin, count

NOTHING = np.zeros(4, int)
SMALL = Pool("small", np.array([0.9, 0.5, 0.9, 0.2]), np.array([True, False, False, True]), NOTHING, NOTHING)


def write_set(path: pathlib.Path, *, begin: int, number: int = 240) -> pathlib.Path:
    """Calls whose class is told by a word of the text, but one in ten says two."""
    names = ("refund", "card", "limit", "login")
    lines = []
    for k in range(begin, begin + number):
        draw = random.Random(k)
        name = draw.choice(names)
        other = f" {draw.choice(names)}" if draw.random() < 0.1 else ""
        lines.append(
            json.dumps(
                {
                    "id": f"c{k}",
                    "session": f"s{k}",
                    "request": {
                        "messages": [{"role": "user", "content": f"my {name}{other} is number {draw.random()}"}]
                    },
                    "response": {
                        "choices": [
                            {
                                "message": {"role": "assistant", "content": json.dumps({"intent": name})},
                                "finish_reason": "stop",
                            }
                        ]
                    },
                }
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_population_tells_risk_and_coverage_at_every_threshold() -> None:
    truth = gate.population_of(SMALL)
    assert truth.thresholds.tolist() == [0.9, 0.5, 0.2]
    assert [truth.at(t) for t in (0.95, 0.9, 0.7, 0.2)] == [(0.0, 0.0), (0.5, 0.5), (0.5, 0.5), (1.0, 0.5)]
    assert (truth.oracle(0.4), truth.oracle(0.5)) == (0.0, 1.0)


@pytest.mark.parametrize("epsilon", gate.EPSILONS)
def test_synthetic_risks_are_what_they_are_called(epsilon: float) -> None:
    steep, edge, dip = (gate.population_of(pool) for pool in gate_pools.synthetic_pools(epsilon))
    assert 0.5 < steep.oracle(epsilon) < 1 and edge.oracle(epsilon) == 0.0
    assert edge.risk[1_000:].max() < 1.1 * epsilon and dip.risk[3_000] < epsilon < dip.risk[9_000]


def test_a_gate_that_takes_the_lowest_threshold_that_passes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = gate_pools.synthetic_pools(0.1)[1]
    ours = gate.measure_gate(edge, 0.1, 60)
    assert ours["violation_lower"] <= gate.DELTA and ours["refused_rate"] + ours["violation_rate"] == pytest.approx(1.0)

    certify = gate.certify

    def greedy(grid: list[float], calibration: Any, **facts: Any) -> Gate:
        """The lowest threshold whose own bound passes, at half the confidence."""
        found = [certify([threshold], calibration, **{**facts, "delta": 0.5}) for threshold in grid]
        return next((one for one in reversed(found) if one.threshold is not None), found[0])

    monkeypatch.setattr(gate, "certify", greedy)
    assert gate.measure_gate(edge, 0.1, 60)["violation_lower"] > gate.DELTA


def test_a_set_is_read_in_two_parts_or_from_two_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "fit").mkdir()
    fit = write_set(tmp_path / "fit" / "desk.calls.jsonl", begin=0)
    calls = write_set(tmp_path / "desk.calls.jsonl", begin=1_000, number=100)
    (whole,) = gate_pools.load_sets([fit], [calls])
    assert (whole.name, len(whole.fit_texts), len(whole.pool_texts), len(whole.class_names)) == ("desk", 240, 100, 4)
    (halved,) = gate_pools.load_sets([], [calls])
    assert len(halved.fit_texts) + len(halved.pool_texts) == 100 and not set(halved.fit_texts) & set(halved.pool_texts)
    stand_in = gate_pools.fit_stand_in(whole.fit_texts, whole.fit_classes)
    assert gate_pools.ask("desk", stand_in, whole.pool_texts, whole.pool_classes).agrees.mean() > 0.85
    with pytest.raises(InputError, match="no file to fit on; allowed: one of desk with --fit"):
        gate_pools.load_sets([fit], [write_set(tmp_path / "other.jsonl", begin=0)])


def test_answers_that_never_repeat_are_told_by_what_they_fill(tmp_path: pathlib.Path) -> None:
    path = write_set(tmp_path / "slots.jsonl", begin=0, number=60)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        filled = {"time": f"{number}"} if number % 2 else {"people": f"{number}", "time": f"{number}"}
        row["response"]["choices"][0]["message"]["content"] = json.dumps(filled)
    path.write_text("\n".join(map(json.dumps, rows)))
    (found,) = gate_pools.load_sets([], [path])
    assert found.class_names == ['["people", "time"]', '["time"]']


def test_every_promised_number_is_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNDERSTUDY_DATA", str(tmp_path))
    monkeypatch.delenv(gate_tracer.PYTHON_ENV, raising=False)
    monkeypatch.setattr(gate_tracer, "install_peer", lambda *words: words[-1]("TRACER is left out"))
    monkeypatch.setattr(gate, "EPSILONS", (0.1, 0.1))
    calls, written = write_set(tmp_path / "desk.jsonl", begin=0, number=400), tmp_path / "gate.json"
    assert main(["bench", "gate", "--quick", "--calls", str(calls), "--json", str(written)]) == 0
    said, found = capsys.readouterr().err, json.loads(written.read_text())
    assert set(found["violation_rate"]) == {"desk", "synthetic_steep", "synthetic_edge", "synthetic_dip"}
    assert set(found["coverage"]["desk"]["0.05"]) == {"ours", "oracle", "tracer"} and found["delta"] == 0.05
    assert found["coverage"]["desk"]["0.05"]["tracer"] is None and "TRACER is left out" in said
    assert (
        found["controls"] == 2 * 2 * gate.QUICK.resamples
        and found["controls_by_name"]["desk, labels shuffled"]["0.1"] == 1.0
    )
    # Whether two of these short texts are alike can be learned; of real ones it cannot.
    assert found["controls"] / 2 <= found["refused_controls"] <= found["controls"]
    assert found["stable_streams"] == 2 and found["false_demotions"] <= 2
    assert found["refine_regressions"] <= found["refine_steps"] == 2 * 2 * 6
    assert 0 <= found["jump_within_200_audits"] <= 1 and found["false_demotions_sessions"] <= 2
    kinds = {
        "jump",
        "gradual",
        "recurring",
        "sessions",
        "renamed_classes:desk",
        "noisy_teacher:desk",
        "new_template:desk",
    }
    assert set(found["detection_delay_calls"]) == kinds


def _rounds(*shares: float) -> list[Pool]:
    """Pools of 1,000 calls of which so large a share is answered rightly, surely so."""
    confidences, classes = np.full(1_000, 0.9), np.arange(1_000) % 4
    rights = [np.arange(1_000) < 1_000 * share for share in shares]
    return [Pool("p", confidences, right, classes, np.where(right, classes, 9)) for right in rights]


def test_what_refinement_lets_through_is_no_worse_and_a_worse_one_is_counted() -> None:
    pools = _rounds(0.99, 0.985, 0.7, 0.6, 0.99, 0.5, 0.4)
    for kind in gate_refine.KINDS:
        chain = gate_refine.run_chain(pools, kind, seed=1)
        assert chain[0] is not None and gate_refine.count_worse(pools, chain) == (0, 0)
        assert {one.round for one in chain if one} <= {0, 1, 4}
    taken = [gate_refine.Serving(number, 0.5) for number in range(7)]
    assert gate_refine.count_worse(pools, taken) == (4, 4)
    assert gate_refine.count_worse(pools, [None, taken[0], taken[0], taken[1]]) == (0, 0)


def test_a_first_rejection_is_the_one_that_single_steps_find() -> None:
    outcomes = [False] * 150 + [True] * 40
    test = RiskTest(epsilon=0.05, alpha=0.05)
    single = next(n for n in range(1, 190) if test.after(outcomes[:n]).is_rejected)
    assert gate_drift.first_rejection(test, outcomes) == single
    assert gate_drift.first_rejection(test, [False] * 200) is None


def test_a_conversation_counts_once_as_the_steward_counts_it() -> None:
    drawn = gate_drift.draw_sessions(3, 40, 0.3)
    assert len(drawn.shares) == 40 and drawn.num_audited.sum() == len(drawn.is_wrong) > 60
    assert np.all(drawn.num_calls >= drawn.num_audited) and 0.1 < drawn.shares.mean() < 0.5
    one, wrong = make_specialist(), iter(drawn.is_wrong.tolist())
    comparisons = [
        Comparison(f"c{k}-{n}", 1.0 + k, f"s{k}", "audit", one.name, not next(wrong))
        for k, number in enumerate(drawn.num_audited)
        for n in range(number)
    ]
    counted = count({one.name: begin(one, "live", 0.05, 0.0)}, comparisons, now=1_000.0, idle_s=300.0)[one.name].risk
    ours = RiskTest(epsilon=counted.epsilon, alpha=counted.alpha).after(drawn.shares.tolist())
    assert counted.num_observed == 40 and counted.wealth == pytest.approx(ours.wealth)


def test_a_tracer_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gate_tracer.PYTHON_ENV, "/nonexistent/python")
    with pytest.raises(ConfigError, match="UNDERSTUDY_TRACER_PYTHON=/nonexistent/python: cannot import tracer"):
        gate_tracer.find_tracer(print)
