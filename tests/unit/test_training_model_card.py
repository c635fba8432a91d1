"""The card beside an adapter's weights: what it says, and that a name from traffic cannot say more."""

import huggingface_hub
import pytest

from cluster.records import TaskSpec
from training.finetune import FinetuneConfig
from training.model_card import CARD_FILE, write_card


@pytest.fixture
def task():
    return TaskSpec(
        task_id="task-0123456789ab",
        name="extract </td> | [x](http://evil) fields",
        signature="s",
        kind="json",
        reference="llm",
        num_calls=40,
        share_calls=0.5,
        share_cost=0.25,
        num_examples={"train": 30, "validation": 4, "calibration": 4, "test": 2},
        num_clients=3,
        num_sessions=20,
    )


def test_the_card_is_read_by_the_hub_library_and_tells_what_made_the_adapter(task, tmp_path):
    (tmp_path / CARD_FILE).write_text("what PEFT leaves")
    metrics = {"step": 300, "loss": 0.25, "validation_loss": None, "curve": []}
    write_card(tmp_path, task, "bases/scratch-tiny-abc", "apache-2.0", FinetuneConfig(seed=9), metrics, "snap-1")
    card = huggingface_hub.ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.base_model == "bases/scratch-tiny-abc" and card.data.license == "apache-2.0"
    for told in ("task-0123456789ab", "train 30", "3 clients, 20 sessions", "`snap-1`", "0.25", "300"):
        assert told in card.text
    assert "validation_loss" not in card.text and "what PEFT leaves" not in card.text
    title = next(line for line in card.text.splitlines() if line.startswith("# "))
    assert not set(title) & set("<>|[]()/"), "a task's name is no markup"


def test_equal_runs_have_equal_cards_and_an_unknown_licence_is_said(task, tmp_path):
    texts = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, task, "bases/b", None, FinetuneConfig(), {"step": 1, "loss": 1.0}, "s")
        texts.add((tmp_path / name / CARD_FILE).read_text())
    assert len(texts) == 1 and 'license: "unknown"' in texts.pop()
