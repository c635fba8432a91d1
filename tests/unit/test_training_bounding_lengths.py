"""training/bounding.py: tasks that have nothing to learn from, or whose examples outgrow the engine's window."""

import pytest

from cluster.prompts import PromptFormat
from training.bounding import keep_fitting, refuse_lengths
from training.dataset import TaskData

FORMAT = PromptFormat(kind="chat", answer_kind="text", max_prompt_tokens=75)


def make_data(*lengths: int, num_prompt: int = 10, num_skipped: int = 0) -> TaskData:
    rows = [{"input_ids": [1] * length, "num_prompt": num_prompt} for length in lengths]
    return TaskData(FORMAT, rows, rows, num_skipped)


def test_examples_that_outgrow_the_window_are_left_out_and_counted():
    data = keep_fitting(make_data(20, 100, 101, 300), 100)
    assert (
        [len(row["input_ids"]) for row in data.train] == [len(row["input_ids"]) for row in data.validation] == [20, 100]
    )
    assert data.num_skipped == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (make_data(), "no example in its train split"),
        (make_data(20), None),
        (keep_fitting(make_data(200, 300), 100), "2 of 2 examples do not fit base b"),
        (make_data(20, num_skipped=3), "3 of 4 examples do not fit base b: prompts longer than 75 tokens"),
        (make_data(60, 60, 20), "2 of 3 answers are longer than 25 tokens"),
    ],
)
def test_a_task_is_refused_with_its_numbers(data, reason):
    found = refuse_lengths(data, "b", 25, 40, 20)
    assert (found is None) == (reason is None)
    assert reason is None or found.startswith(reason)
