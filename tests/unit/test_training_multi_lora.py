"""training/multi_lora.py: adapters side by side give what each gives alone, by either way of multiplying."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.errors import ConfigError
from training.multi_lora import Factors, MultiLora, Segments, _GroupedProducts, _SegmentProducts, join_batches
from training.objective import answer_loss

OUT, IN = 16, 24


def tiny_base(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape, **changes))
    return model.requires_grad_(False)


def random_batch(num_rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (num_rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    for row in range(num_rows):
        end = length - row % 3
        labels[row, end - 2 - row % 2 : end] = ids[row, end - 2 - row % 2 : end]
        ids[row, end:] = 0
    return {"input_ids": ids, "labels": labels}


def random_factors(base: LlamaForCausalLM, names: list[str], rank: int, scale: float, seed: int) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in names:
        out, into = base.get_submodule(name).weight.shape
        down = torch.randn(rank, into, generator=generator).mul_(0.1).requires_grad_()
        factors[name] = Factors(down, torch.randn(out, rank, generator=generator).mul_(0.1).requires_grad_(), scale)
    return factors


FIRST = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
SECOND = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_adapters_together_have_the_losses_and_gradients_that_each_has_alone() -> None:
    batches = {0: random_batch(3, 11, 1), 1: random_batch(5, 7, 2)}
    base = tiny_base()
    adapters = [random_factors(base, FIRST, 3, 2.0, 1), random_factors(base, SECOND, 8, 0.5, 2)]
    together = MultiLora(base, adapters).losses(join_batches(batches, "cpu"))
    sum(together).backward()

    for number, factors in enumerate(adapters):
        alone = tiny_base()
        for name, one in factors.items():
            layer = alone.get_submodule(name)
            layer.register_forward_hook(lambda _, x, y, one=one: y + one.scale * (x[0] @ one.down.t()) @ one.up.t())
        grads = [one.grad.clone() for pair in factors.values() for one in pair[:2]]
        for pair in factors.values():
            pair.down.grad = pair.up.grad = None
        loss = answer_loss(alone, batches[number], "cpu")
        loss.backward()
        assert loss.item() == pytest.approx(together[number].item(), abs=1e-6)
        for own, one in zip(grads, [one for pair in factors.values() for one in pair[:2]], strict=True):
            torch.testing.assert_close(own, one.grad, atol=1e-6, rtol=1e-5)


def test_grading_counts_the_rows_that_greedy_decoding_would_answer() -> None:
    base = tiny_base()
    batch = random_batch(4, 9, 3)
    joined = join_batches({0: batch}, "cpu")
    model = MultiLora(base, [random_factors(base, FIRST, 2, 1.0, 1)])
    foretold = model._logits(joined).argmax(dim=-1)
    batch["labels"][batch["labels"] != -100] = foretold
    (graded,) = model.grade(join_batches({0: batch}, "cpu"))
    assert graded.num_right == 4
    batch["labels"][0][batch["labels"][0] != -100] = 1
    assert model.grade(join_batches({0: batch}, "cpu"))[0].num_right == 3


def test_no_gradient_reaches_the_base_nor_what_lies_below_the_lowest_adapter() -> None:
    base = tiny_base()
    model = MultiLora(base, [random_factors(base, ["model.layers.1.mlp.up_proj"], 2, 1.0, 1)])
    outputs = {}
    for name in ("model.layers.0", "model.layers.1"):
        base.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: outputs.update({name: y}))
    sum(model.losses(join_batches({0: random_batch(2, 6, 1)}, "cpu"))).backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert not outputs["model.layers.0"].requires_grad and outputs["model.layers.1"].requires_grad


def test_a_base_that_attends_to_a_window_is_refused() -> None:
    base = tiny_base()
    base.config.sliding_window = 5
    with pytest.raises(ConfigError, match="window of 5 tokens.*fleet.mode=solo"):
        MultiLora(base, [])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ranks=st.lists(st.integers(0, 11), min_size=4, max_size=4).filter(any),
    is_x_asked=st.booleans(),
)
def test_grouped_products_are_those_of_each_segment(lengths: list[int], ranks: list[int], is_x_asked: bool) -> None:
    """Rank 0 stands for an adapter that does not target the layer."""
    ranks = ranks[: len(lengths)]
    if not any(ranks):
        return
    torch.manual_seed(sum(lengths))
    ends = tuple(int(one) for one in torch.tensor(lengths).cumsum(0))
    shapes = tuple((1, length) for length in lengths)
    segments = Segments(tuple(range(len(lengths))), shapes, ends, torch.tensor(ends, dtype=torch.int32))
    scales = [0.5 + rank if rank else None for rank in ranks]
    matrices = [m for rank in ranks if rank for m in (torch.randn(rank, IN), torch.randn(OUT, rank))]
    x, y, grad = torch.randn(ends[-1], IN), torch.randn(ends[-1], OUT), torch.randn(ends[-1], OUT)
    plain, grouped = (kind(segments, scales, matrices) for kind in (_SegmentProducts, _GroupedProducts))
    (out, middles), (other, middle) = plain.forward(x, y), grouped.forward(x, y)
    torch.testing.assert_close(out, other, atol=1e-4, rtol=1e-4)
    grad_x, grads = plain.backward(x, middles, grad, is_x_asked)
    other_x, others = grouped.backward(x, middle, grad, is_x_asked)
    torch.testing.assert_close([grad_x, *grads], [other_x, *others], atol=1e-3, rtol=1e-4)
