"""What a release moves is weighed by the calls, tokens and money that were captured, agent by agent."""

import pytest

from cluster.calls import write_calls
from cluster.records import AgentCall, RouteDecision, Usage
from cluster.store import Store
from jobs.traffic import measure_moved
from training.curate import CurateConfig, curate
from training.evaluation import Evaluation
from training.gate import refused_gate
from training.snapshot import read_rows
from training.splits import SPLITS


def call(number: int, agent: str, site: str, tokens: int, usd: float, **more) -> AgentCall:
    messages = [{"role": "system", "content": f"Say {site}."}, {"role": "user", "content": f"thing {number}"}]
    return AgentCall(
        call_id=f"{agent}-{site}-{number}",
        ts=float(number),
        client_id="c",
        agent=agent,
        session_id=f"{agent}-{site}-{number}",
        step=0,
        request={"messages": messages},
        response={
            "choices": [{"message": {"role": "assistant", "content": f"word {number}"}, "finish_reason": "stop"}]
        },
        usage=Usage(prompt_tokens=tokens, completion_tokens=0),
        cost_usd=usd,
        **more,
    )


def evaluated(task: str, num_accepted: int, refused: str | None = None) -> Evaluation:
    facts = {"reference": "llm", "population": "p", "epsilon": 0.05, "delta": 0.05, "fingerprint": "f"}
    gate = refused_gate(refused or "", num_calibration=100, **facts)
    if refused is None:
        gate = gate.model_copy(update={"refused": None, "threshold": 0.5, "num_accepted": num_accepted})
    return Evaluation(task_id=task, gate=gate, arms=(), curve=())


def test_calls_tokens_money_and_agents_are_weighed_each_by_their_own(tmp_path) -> None:
    store = Store(str(tmp_path / "store"))
    cheap = [call(k, "helpdesk", "colours", 10, 0.001) for k in range(60)]
    dear = [call(k, "helpdesk", "essays", 90, 0.009) for k in range(30)]
    others = [call(k, "planner", "colours", 10, 0.001) for k in range(10)]
    audit = RouteDecision(action="audit", reason="reference stream")
    unseen = [call(k, "helpdesk", "audits", 999, 9.0, audit_of="x", route=audit) for k in range(5)]
    write_calls(store, [*cheap, *dear, *others, *unseen])
    snapshot = curate(store, CurateConfig(), b"k" * 32)
    assignment = {}
    for split in SPLITS:
        for row in read_rows(store, snapshot.id, split, ["example_id", "source_call_ids"]).to_pylist():
            assignment[row["example_id"]] = "essays" if "essays" in row["source_call_ids"][0] else "colours"
    found = measure_moved(store, snapshot.id, assignment, [evaluated("colours", 80)], {"essays": "too few calls"})
    shares = {name: one.share for name, one in found.totals.items()}
    assert shares["calls"] == pytest.approx(0.8 * 70 / 100, abs=0.02), "near duplicates that train lost count too"
    assert shares["tokens"] == pytest.approx(0.8 * 700 / 3400, abs=0.02)
    assert shares["money"] == pytest.approx(0.8 * 0.07 / 0.34, abs=0.02)
    by_agent = {one.agent: one for one in found.agents}
    assert by_agent["planner"].share == pytest.approx(0.8)
    assert by_agent["helpdesk"].share == pytest.approx(0.8 * 60 / 90, abs=0.03)
    assert sum(one.num_calls for one in found.agents) == 100
    assert all(one.interval[0] < one.share < one.interval[1] for one in found.agents)
    withdrawn = measure_moved(
        store, snapshot.id, assignment, [evaluated("colours", 80)], {"essays": "few", "colours": "by hand"}
    )
    assert withdrawn.totals["calls"].share == 0.0 and withdrawn.totals["calls"].interval == (0.0, 0.0)
