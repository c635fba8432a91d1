"""packing.py, batches.py and objective.py: what a packed example sees, and that no layout of a batch changes its loss."""

import pathlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PAD, make_rows, save_tiny_base, tiny_settings

from cluster.errors import InputError
from training.batches import Rows
from training.dataset import save_dataset
from training.methods import build_model
from training.objective import answer_loss
from training.packing import collate_packed, collate_padded, pack, plan_batches, split_evenly

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    base = save_tiny_base(tmp_path_factory.mktemp("base"))
    return build_model(tiny_settings(base_path=str(base), method="full")).eval()


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows") / "rows"
    save_dataset(make_rows(39), folder)
    return folder


def columns(rows: list[dict]) -> tuple[list[list[int]], list[int]]:
    return [row["input_ids"] for row in rows], [row["num_prompt"] for row in rows]


@given(LENGTHS, st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_example_once_and_overfills_no_row(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(k for row in rows for k in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[k] for k in row) <= capacity for row in rows)


@given(LENGTHS, st.integers(1, 7), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_example_once(lengths, size, window, seed):
    batches = plan_batches(lengths, size, random.Random(seed), window)
    assert sorted(k for batch in batches for k in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in batches)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_parts_are_even_and_in_order(items, num_parts):
    parts = split_evenly(items, num_parts)
    assert [item for part in parts for item in part] == items
    assert len(parts) == num_parts and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_those_of_each_example_alone(model, attention):
    import torch

    rows = make_rows(9, seed=3)
    ids, num_prompts = columns(rows)
    capacity = 2 * max(map(len, ids))
    packed = collate_packed(ids, num_prompts, PAD, capacity)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits
        blind = model(input_ids=packed["input_ids"]).logits
        places = pack([len(one) for one in ids], capacity)
        assert len(places) < len(ids)
        differs = False
        for line, row in enumerate(places):
            begin = 0
            for k in row:
                alone = model(input_ids=torch.tensor([ids[k]])).logits[0]
                own = slice(begin, begin + len(ids[k]))
                torch.testing.assert_close(together[line, own], alone, atol=1e-5, rtol=1e-5)
                differs |= not torch.allclose(blind[line, own], alone, atol=1e-2)
                begin += len(ids[k])
    assert differs, "without positions that begin again the examples must have seen each other"


@pytest.mark.parametrize("num_examples", [1, 9])
def test_packed_and_padded_batches_have_the_same_loss_and_gradient(model, num_examples):
    import torch

    ids, num_prompts = columns(make_rows(num_examples, seed=4))
    found = []
    for batch in (collate_padded(ids, num_prompts, PAD), collate_packed(ids, num_prompts, PAD, 90)):
        model.zero_grad()
        loss = answer_loss(model, batch, "cpu")
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    alone = [answer_loss(model, collate_padded([ids[k]], [num_prompts[k]], PAD), "cpu") for k in range(num_examples)]
    torch.testing.assert_close(found[0][0], sum(alone).detach() / num_examples, atol=1e-5, rtol=1e-5)


def test_no_example_is_foretold_from_the_one_before_it():
    batch = collate_packed([[5, 6, 7], [8, 9, 10, 11]], [0, 0], PAD, 7)
    assert batch["labels"].tolist() == [[-100, 9, 10, 11, -100, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(model, rows_path, packing, micro):
    rows = Rows(str(rows_path), tiny_settings(packing=packing, micro_batch_size=micro), 0, 1)
    for step in (0, 4):
        parts = rows.micro_batches(step)
        assert len(parts) == -(-rows.batch(step)["num_examples"] // micro)
        whole = answer_loss(model, rows.batch(step), "cpu").item()
        assert sum(answer_loss(model, part, "cpu").item() for part in parts) == pytest.approx(whole, abs=1e-5)


def test_every_rank_has_as_many_micro_batches_and_an_empty_one_counts_nothing(model, rows_path):
    settings = tiny_settings(batch_size=3, micro_batch_size=1)
    ranks = [Rows(str(rows_path), settings, rank, 2) for rank in (0, 1)]
    step = next(k for k in range(ranks[0].num_batches()) if len({len(r.batch(k)["input_ids"]) for r in ranks}) == 2)
    counts = [len(rows.micro_batches(step)) for rows in ranks]
    assert counts[0] == counts[1]
    for rows in ranks:
        whole = answer_loss(model, rows.batch(step), "cpu").item()
        parts = [answer_loss(model, part, "cpu").item() for part in rows.micro_batches(step)]
        assert sum(parts) == pytest.approx(whole, abs=1e-5)


def examples_of(rows: Rows, step: int) -> list[tuple[int, ...]]:
    """The examples of a rank's step that count, read off its tensors."""
    found = []
    for part in rows.micro_batches(step):
        if part["num_examples"] != float("inf"):
            found += [tuple(ids[: ids.index(PAD)] if PAD in ids else ids) for ids in part["input_ids"].tolist()]
    return found


@pytest.mark.parametrize("num_rows", [1, 2, 39])
def test_a_step_is_of_the_same_examples_and_loss_however_many_ranks_share_it(model, tmp_path, num_rows):
    save_dataset(make_rows(num_rows, seed=8), tmp_path / "rows")
    settings = tiny_settings(batch_size=4, micro_batch_size=3)
    by_world = {
        world: [Rows(str(tmp_path / "rows"), settings, rank, world, step_examples=8) for rank in range(world)]
        for world in (1, 2, 3)
    }
    assert {rows.num_batches() for ranks in by_world.values() for rows in ranks} == {-(-num_rows // 8)}
    last = by_world[1][0].num_batches() - 1
    for step in (0, last, last + 3):
        drawn = {
            world: sorted(sum((examples_of(rows, step) for rows in ranks), [])) for world, ranks in by_world.items()
        }
        assert drawn[1] == drawn[2] == drawn[3] and len(drawn[1]) == len(set(drawn[1])) > 0
        tokens = {rows.num_tokens(step) for ranks in by_world.values() for rows in ranks}
        assert tokens == {sum(map(len, drawn[1]))}
        # Gradients are averaged over the ranks, so the mean of their losses must not depend on how many there are.
        for way in (Rows.micro_batches, lambda rows, step: [rows.batch(step)]):
            means = [
                sum(answer_loss(model, part, "cpu").item() for rows in ranks for part in way(rows, step)) / world
                for world, ranks in by_world.items()
            ]
            assert means == pytest.approx([means[0]] * 3, abs=1e-5)


def test_a_step_draws_the_same_batch_whenever_it_is_asked_for(rows_path):
    rows = Rows(str(rows_path), tiny_settings(), 0, 1)
    later = rows.batch(13)["input_ids"].tolist()
    rows.batch(2)
    assert Rows(str(rows_path), tiny_settings(), 0, 1).batch(13)["input_ids"].tolist() == later
    assert rows.batch(13)["input_ids"].tolist() == later


def test_one_example_is_a_dataset_and_none_is_not(tmp_path, model):
    save_dataset(make_rows(1), tmp_path / "one")
    for rank in (0, 1):
        rows = Rows(str(tmp_path / "one"), tiny_settings(), rank, 2)
        assert rows.num_batches() == 1 and len(rows.micro_batches(7)) == 1
    with pytest.raises(InputError, match="none.*no example; allowed: at least one"):
        save_dataset([], tmp_path / "none")
