"""jobs/bench/selection.py: the six tasks it measures on."""

import pytest
from shared_data import DATA, NO_DATA

from cluster.errors import InputError
from jobs.bench.selection import load_tasks


@pytest.mark.skipif(not DATA.is_dir(), reason=NO_DATA)
def test_six_tasks_have_splits_that_share_no_example_and_prompts_that_say_only_what_varies():
    tasks = load_tasks(DATA)
    assert len({task.spec.task_id for task in tasks}) == 6
    for task in tasks:
        splits = [{example.example_id for example in split} for split in task[1:]]
        assert all(len(split) >= 90 for split in splits) and len(splits[0]) >= 300
        assert sum(map(len, splits)) == len(set.union(*splits))
        assert task.spec.static_lines and not any(example.request.get("tools") for example in task.test[:1])


def test_a_folder_without_the_data_is_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_tasks(tmp_path)
