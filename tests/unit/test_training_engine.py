"""engine.py, loop.train_step, averaging.py: one process of its own with DeepSpeed on gloo, as each worker of a run has it."""

import pathlib
from collections.abc import Iterator

import pytest
from tiny_models import make_rows, save_tiny_base, tiny_settings

from training.averaging import MovingAverage
from training.batches import Rows
from training.dataset import save_dataset
from training.engine import build_engine
from training.grading import grade_rows
from training.loop import train_step
from training.methods import build_model
from training.speed import Speed, time_collectives

# Both are of DeepSpeed and torch, in code that every run on a CPU passes.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("engine")
    save_dataset(make_rows(32), folder / "rows")
    return {"base_path": str(save_tiny_base(folder / "base")), "train_path": str(folder / "rows")}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        store = tmp_path_factory.mktemp("group") / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def train(paths: dict[str, str], num_steps: int = 3, **changes) -> tuple[list[float], object]:
    import torch

    settings = tiny_settings(**paths, **changes)
    torch.manual_seed(0)
    engine = build_engine(build_model(settings), settings)
    engine.train()
    rows = Rows(paths["train_path"], settings, 0, 1)
    return [train_step(engine, rows.micro_batches(step)) for step in range(num_steps)], engine


@pytest.fixture(scope="module")
def whole(one_process, paths) -> list[float]:
    return train(paths)[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_batch_in_parts_trains_as_a_whole_one_under_every_stage(one_process, paths, whole, stage):
    parts, _ = train(paths, zero_stage=stage, micro_batch_size=3)
    assert parts == pytest.approx(whole, abs=2e-5)
    assert whole[-1] != pytest.approx(whole[0], abs=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_timing_the_collectives_changes_no_step_and_sees_them_under_every_stage(
    one_process, paths, whole, stage, monkeypatch
):
    import deepspeed.comm.comm as comm

    train(paths, num_steps=0)  # DeepSpeed has a backend from its first engine on
    monkeypatch.setattr(comm, "cdb", comm.cdb)
    settings = tiny_settings(**paths, zero_stage=stage)
    speed = Speed(world_size=2, blocks=True)
    losses, engine = train(paths, zero_stage=stage, num_steps=1)
    time_collectives(speed)
    rows = Rows(paths["train_path"], settings, 0, 1)
    for step in (1, 2):
        with speed.step(rows.num_tokens(step)):
            losses.append(train_step(engine, rows.micro_batches(step)))
    assert losses == pytest.approx(whole, abs=2e-5)
    found = speed.read()
    # DeepSpeed's collectives are called by a process that is alone, too.
    assert found["tokens_per_s"] > 0 and 0 < found["communication_share"] < 1


def test_the_average_is_in_place_for_a_block_and_survives_a_checkpoint(one_process, paths):
    import torch

    _, engine = train(paths, num_steps=1)
    average = MovingAverage(engine.module, 0.5)
    weight = next(p for p in engine.module.parameters() if p.requires_grad)
    start = weight.detach().clone()
    rows = Rows(paths["train_path"], tiny_settings(), 0, 1)
    for step in range(4):
        train_step(engine, rows.micro_batches(step))
        average.update()
    own = weight.detach().clone()
    with average.in_place():
        mean = weight.detach().clone()
    torch.testing.assert_close(weight.detach(), own, atol=0, rtol=0)
    assert not torch.equal(mean, own) and not torch.equal(mean, start)
    other = MovingAverage(engine.module, 0.5)
    other.load_state(average.state())
    with other.in_place():
        torch.testing.assert_close(weight.detach(), mean, atol=0, rtol=0)


def test_grading_is_what_greedy_decoding_says(paths):
    import torch

    model = build_model(tiny_settings(**paths, method="full")).eval()
    rows = Rows(paths["train_path"], tiny_settings(micro_batch_size=3), 0, 1)
    graded = grade_rows(model, rows, "cpu")
    assert len(graded.is_right) == 32 and graded.agreement < 0.5
    learnt = []
    for row in make_rows(6, seed=9):
        prompt = row["input_ids"][: row["num_prompt"]]
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3, do_sample=False)[0].tolist()
        learnt.append({"input_ids": answer, "num_prompt": len(prompt)})
    learnt[2]["input_ids"][-1] ^= 1
    folder = pathlib.Path(paths["train_path"]).parent / "learnt"
    save_dataset(learnt, folder)
    order = Rows(str(folder), tiny_settings(batch_size=6, micro_batch_size=2), 0, 1)
    graded = grade_rows(model, order, "cpu")
    assert sorted(graded.is_right) == [False] + [True] * 5
    assert graded.agreement == pytest.approx(5 / 6) and graded.loss > 0
