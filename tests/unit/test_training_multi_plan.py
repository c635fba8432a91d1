"""training/multi_plan.py and the checks of training/multi_finetune.py: what may share a run, and how it is split."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from training.dataset import save_dataset
from training.finetune import FinetuneConfig
from training.multi_finetune import AdapterTask, adapter_settings, common_config
from training.multi_plan import TaskLoad, plan_groups, plan_passes

loads = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.builds(TaskLoad, st.sampled_from(["one", "two"]), st.floats(1, 100)),
    min_size=1,
    max_size=12,
)


def test_a_run_takes_no_more_tasks_than_its_memory_holds_and_waits_for_none_that_fits_nowhere() -> None:
    loads = {name: TaskLoad("one", tokens) for name, tokens in (("a", 9), ("b", 7), ("c", 5), ("d", 3), ("e", 1))}
    asked: list[list[str]] = []

    def fits(names: Sequence[str]) -> bool:
        asked.append(list(names))
        return len(names) <= 2

    assert plan_groups(loads, 2, fits) == [["a", "d"], ["b", "c"], ["e"]]
    assert all(len(names) > 1 for names in asked), "a task alone was asked about"
    assert plan_groups(loads, 2, lambda names: "a" not in names) == [["b", "c", "d", "e"], ["a"]]


@settings(max_examples=50, deadline=None)
@given(loads=loads, max_groups=st.integers(1, 4))
def test_every_task_is_in_one_group_of_its_base_and_no_group_is_longer_than_it_must_be(
    loads: dict[str, TaskLoad], max_groups: int
) -> None:
    groups = plan_groups(loads, max_groups)
    assert sorted(name for group in groups for name in group) == sorted(loads)
    for base in {load.base for load in loads.values()}:
        own = [group for group in groups if loads[group[0]].base == base]
        assert all(loads[name].base == base for group in own for name in group)
        tokens = [load.num_tokens for load in loads.values() if load.base == base]
        assert len(own) == min(max_groups, len(tokens))
        # The last task of the longest run was given to the run with least, which was no longer than the mean.
        bound = sum(tokens) / max_groups + (1 - 1 / max_groups) * max(tokens)
        assert max(sum(loads[name].num_tokens for name in group) for group in own) <= bound + 1e-6


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=12), limit=st.integers(1, 80))
def test_passes_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    passes = plan_passes(sizes, limit)
    assert [place for one in passes for place in one] == list(range(len(sizes)))
    assert all(len(one) == 1 or sum(sizes[place] for place in one) <= limit for one in passes)


def task(name: str, **changes: object) -> AdapterTask:
    return AdapterTask(name, FinetuneConfig(**changes), pathlib.Path("x"), None)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("a"), task("a")], "allowed: each name once"),
        ([task("a"), task("b", bf16=True)], "finetune.bf16: False, True in one multi-LoRA run; allowed: one value"),
        ([task("a"), task("b", ema_decay=0.9)], "finetune.ema_decay=0.9: not with fleet.mode=multi_lora; allowed: 0.0"),
        ([task("a", zero_stage=1), task("b", zero_stage=1)], "finetune.zero_stage=1: .*allowed: 0, or 3"),
    ],
)
def test_tasks_that_cannot_share_a_run_are_refused(tasks: list[AdapterTask], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        common_config(tasks)


def test_tasks_that_differ_in_what_is_their_own_share_a_run() -> None:
    assert common_config([task("a", lora_rank=4, seed=1), task("b", num_steps=7, learning_rate=0.1)]).num_workers == 1


def test_a_batch_is_at_most_its_longest_row_times_its_size(tmp_path: pathlib.Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "num_prompt": 2}, {"input_ids": [1, 2, 3, 4, 5], "num_prompt": 2}]
    save_dataset(rows, tmp_path / "some")
    some = task("a", batch_size=4)._replace(train_path=tmp_path / "some")
    assert adapter_settings(some, 0)["max_tokens"] == 20
