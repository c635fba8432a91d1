"""The packing benchmark at small size: it runs, and what it compares are the same losses."""

from cluster.records import Example, TaskSpec
from jobs.bench.packing import measure_packing
from jobs.bench.selection import SelectionTask


def make_task(name: str) -> SelectionTask:
    examples = []
    for k in range(24):
        text = f"{name} " + "please bring the thing back " * (k % 5 + 1)
        request = {"messages": [{"role": "system", "content": "Say it."}, {"role": "user", "content": text}]}
        example = Example(
            example_id=f"{name}-{k}",
            split="train",
            session_id=f"{name}-{k}",
            ts=1.0,
            request=request,
            target={"role": "assistant", "content": f"thing {k % 3}"},
            reference="gold",
            source_call_ids=(f"{name}-{k}",),
        )
        examples.append(example)
    spec = TaskSpec(
        task_id=name,
        name=name,
        signature=name,
        kind="label",
        reference="gold",
        num_calls=24,
        share_calls=1.0,
        share_cost=1.0,
        num_examples={"train": 24},
        static_lines=("Say it.",),
    )
    return SelectionTask(spec, examples, [], [])


def test_it_measures_every_layout_and_equal_losses():
    found = measure_packing(lambda line: None, [make_task("one"), make_task("two")], quick=True)
    assert set(found["sets"]) == {"one", "two", "all together"}
    facts = found["sets"]["all together"]
    assert set(facts["filled"]) == {"padded", "bucketed", "packed x1", "packed x2", "packed x4"}
    assert all(0 < share <= 1 for share in facts["filled"].values())
    assert facts["filled"]["bucketed"] > facts["filled"]["padded"]
    assert found["packing_ratio"] > 0 and found["max_loss_diff"] < 1e-5
