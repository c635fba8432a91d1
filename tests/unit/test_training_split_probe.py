"""training/split_probe.py and paired.py: probes are compared call by call, and the best cut must hold from another seed."""

import pathlib
import random

import pytest

from cluster.records import Example, TaskSpec
from training import split_probe
from training.candidates import Scope, examine
from training.catalog import Needs, find_entry
from training.dataset import save_dataset
from training.finetune import FinetuneConfig
from training.paired import answers_by_row, row_key
from training.probe import Contender, Measuring, ProbeConfig, ProbeResult
from training.probe_loop import Graded
from training.scratch import PretrainConfig
from training.split_probe import SplitTrial, count_probes, measure_splits

LINES = ("Decide.",)


def make_example(number: int, text: str = "") -> Example:
    said = text or f"word{number % 7} and more {number}"
    messages = [{"role": "system", "content": "Decide."}, {"role": "user", "content": said}]
    return Example(
        example_id=f"e{number}",
        split="train",
        session_id=f"s{number // 2}",
        ts=float(number),
        request={"messages": messages},
        target={"role": "assistant", "content": ("yes", "no")[number % 2]},
        reference="llm",
        source_call_ids=(f"c{number}",),
    )


@pytest.fixture(scope="module")
def trial() -> SplitTrial:
    train, validation = [make_example(n) for n in range(40)], [make_example(n) for n in range(100, 300)]
    validation[0] = make_example(100, "long " * 900)
    task = TaskSpec(task_id="t", name="t", signature="t", kind="label", reference="llm", num_calls=240, share_calls=1.0,
                    share_cost=1.0, num_examples={}, static_lines=LINES)  # fmt: skip
    scope = Scope([task], {"train": {"t": train}, "validation": {"t": validation}}, 1024, 768, machine_gib=1.0)
    needs = Needs(
        p99_prompt_tokens=0, needs_tool_use=False, allowed_licenses=None, memory_gib=1.0, max_model_tokens=1024
    )
    base = examine("scratch-micro", find_entry("scratch-micro"), needs, scope, num_validation=1)
    assert isinstance(base, Contender)
    cuts = [{e.example_id: int(e.example_id[1:]) % n for e in [*train, *validation]} for n in (2, 3)]
    return SplitTrial(task, train, validation, cuts, base)


def run(trial: SplitTrial, monkeypatch, is_right) -> tuple[split_probe.SplitMeasurement, list[int]]:
    """Measure with probes that answer as `is_right(name of the probe, seed)` says; returns the seeds too."""
    seeds = []

    def answer(plans, measuring, *, halving):
        assert measuring.with_answers and not halving
        seeds.append(measuring.pretrain.seed)
        results = []
        for plan in plans:
            ((name, data),) = plan.contender.data.items()
            joint = name.partition("joint")[2]
            assert plan.times_steps == int(joint or 1), "both ways are trained equally long"
            right = is_right(name, measuring.pretrain.seed)
            answers = {(name, row_key(row["input_ids"])): right for row in data.validation}
            results.append(
                ProbeResult((), None, None, answers) if right is not None else ProbeResult((), "probe failed: x")
            )
        return results

    monkeypatch.setattr(split_probe, "measure", answer)
    measuring = Measuring(ProbeConfig(), PretrainConfig(), FinetuneConfig(), {}, 0.05, pathlib.Path("unused"))
    (found,) = measure_splits([trial], measuring, 768)
    return found, seeds


def test_a_cut_that_is_better_from_both_seeds_is_chosen(trial, monkeypatch):
    found, seeds = run(trial, monkeypatch, lambda name, seed: ("cut0" if seed else "cut1") in name)
    assert found.chosen == 1 and [one.num_parts for one in found.compared] == [2, 3] and seeds == [0, 1]
    assert found.compared[0].apart == found.joint == 0.0
    assert found.confirmed.num_parts == 3 and found.confirmed.num_examples == 100, "one call per session"
    assert found.compared[1].apart >= 0.99
    assert count_probes([trial]) == 2 + 2 + 3


def test_what_another_seed_does_not_confirm_and_what_ties_stays_together(trial, monkeypatch):
    found, seeds = run(trial, monkeypatch, lambda name, seed: "cut0" in name and seed == 0)
    assert found.chosen is None and found.confirmed.apart == 0.0 and seeds == [0, 1]
    found, seeds = run(trial, monkeypatch, lambda name, seed: True)
    assert found.chosen is None and found.confirmed is None and seeds == [0]


def test_a_failed_probe_leaves_its_task_together_with_the_reason(trial, monkeypatch):
    found, _ = run(trial, monkeypatch, lambda name, seed: None if "part1" in name else True)
    assert (found.chosen, found.compared, found.error) == (None, (), "probe failed: x")
    found, _ = run(trial, monkeypatch, lambda name, seed: "cut0" in name if seed == 0 else None)
    assert found.chosen is None and found.error == "probe failed: x"


def test_a_call_that_does_not_fit_is_wrong_for_everyone(trial, monkeypatch):
    monkeypatch.setattr(split_probe, "one_call_per_session", lambda calls, seed: list(calls))
    found, _ = run(trial, monkeypatch, lambda name, seed: True)
    assert found.joint == 199 / 200 and {one.apart for one in found.compared} == {199 / 200}


def test_answers_are_known_by_their_rows_whatever_the_order_of_batches(tmp_path):
    rng = random.Random(0)
    rows = [{"input_ids": [rng.randrange(9) for _ in range(2 + n % 5)], "num_prompt": 1} for n in range(37)]
    save_dataset(rows, tmp_path / "rows")
    settings = {"batch_size": 4, "seed": 5, "pad_token_id": 0}
    from training.batches import Rows

    batches = Rows(str(tmp_path / "rows"), settings, 0, 1)
    right = []
    for number in range(batches.num_batches()):
        batch = batches.batch(number)
        # A made-up model: right where the row's tokens sum to an even number; padding is 0.
        right += [int(ids.sum()) % 2 == 0 for ids in batch["input_ids"]]
    found = answers_by_row({"t": Graded(right, [1.0] * 37)}, {"t": str(tmp_path / "rows")}, settings)
    assert dict(((task, key), is_right) for task, key, is_right in found) == {
        ("t", row_key(row["input_ids"])): sum(row["input_ids"]) % 2 == 0 for row in rows
    }
