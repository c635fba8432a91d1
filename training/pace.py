"""How long an optimiser step of a base takes on this machine's CPU: one decoder layer of its width is timed, a few times.

A layer's forward and backward pass with its adapter, the answers' logits and the optimiser are timed for themselves and
added up. What is too large to be timed in a moment is timed smaller and counted up by its operations, as if those cost
the same. Good to a factor of two: other processes, and what a trainer does between its steps, are not seen. Needs torch
and nothing else: no weights are read and nothing is started.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.finetune import FinetuneConfig
    from training.memory import ModelShape

_MAX_WIDTH, _MAX_WORDS = 1024, 8192
_MAX_OPERATIONS = 2e10
"""Of one pass that is timed: some tenths of a second on one core."""
_MAX_WEIGHTS = 20_000_000
_HEAD_WIDTH = 64
_NUM_TIMED = 3


def step_seconds(shape: ModelShape, config: FinetuneConfig, row_tokens: float, answer_tokens: float) -> float:
    """Of one worker's step on a CPU.

    Args:
        row_tokens: of an example, on average.
        answer_tokens: of its answer, on average.

    Side effects: keeps as many cores busy as a worker has, for about a second.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    try:
        layer = _layer_seconds(shape, config, max(1, round(row_tokens)))
        logits = _logit_seconds(shape, config.batch_size * max(1.0, answer_tokens))
        # What is recomputed is a forward pass once more: a third of a step.
        passes = layer * shape.layers * (4 / 3 if config.gradient_checkpointing else 1)
        return passes + logits + _optimizer_seconds(shape.trainable)
    finally:
        torch.set_num_threads(before)


def _layer_seconds(shape: ModelShape, config: FinetuneConfig, row_tokens: int) -> float:
    import torch

    shrunk = min(1.0, _MAX_WIDTH / shape.hidden_size)
    hidden = max(_HEAD_WIDTH, int(shape.hidden_size * shrunk) // _HEAD_WIDTH * _HEAD_WIDTH)
    inner = max(1, int(shape.intermediate_size * shrunk))
    operations = 6 * row_tokens * (4 * hidden**2 + 3 * hidden * inner)
    examples = max(1, min(config.batch_size, int(_MAX_OPERATIONS / operations)))
    is_full = config.method == "full"
    sizes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    weights = [torch.randn(size, requires_grad=is_full) for size in sizes]
    rank = config.lora_rank
    adapters = [
        (torch.randn(rank, wide, requires_grad=True), torch.randn(high, rank, requires_grad=True))
        for high, wide in sizes
    ]

    def apply(place: int, values: Any) -> Any:
        found = torch.nn.functional.linear(values, weights[place])
        if is_full:
            return found
        narrow, wide = adapters[place]
        return found + torch.nn.functional.linear(torch.nn.functional.linear(values, narrow), wide)

    def run() -> None:
        values = torch.randn(examples, row_tokens, hidden, requires_grad=True)
        normed = torch.nn.functional.rms_norm(values, (hidden,))
        heads = [apply(place, normed).unflatten(-1, (-1, _HEAD_WIDTH)).transpose(1, 2) for place in range(3)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        after = values + apply(3, mixed.transpose(1, 2).flatten(2))
        normed = torch.nn.functional.rms_norm(after, (hidden,))
        gated = torch.nn.functional.silu(apply(4, normed)) * apply(5, normed)
        (after + apply(6, gated)).sum().backward()

    whole = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    timed = 4 * hidden**2 + 3 * hidden * inner
    return _timed(run) * (config.batch_size / examples) * (whole / timed)


def _logit_seconds(shape: ModelShape, num_tokens: float) -> float:
    import torch

    hidden = min(shape.hidden_size, _MAX_WIDTH)
    num_words = min(shape.vocab_size, _MAX_WORDS)
    operations = 6 * hidden * num_words
    tokens = max(1, min(round(num_tokens), int(_MAX_OPERATIONS / operations)))
    words = torch.randn(num_words, hidden)

    def run() -> None:
        values = torch.randn(tokens, hidden, requires_grad=True)
        logits = torch.nn.functional.linear(values, words)
        torch.nn.functional.cross_entropy(logits, torch.zeros(tokens, dtype=torch.long)).backward()

    whole = shape.hidden_size * shape.vocab_size
    return _timed(run) * (num_tokens / tokens) * (whole / (hidden * num_words))


def _optimizer_seconds(num_weights: int) -> float:
    import torch

    some = min(num_weights, _MAX_WEIGHTS)
    weights = torch.zeros(some, requires_grad=True)
    weights.grad = torch.zeros(some)
    optimizer = torch.optim.AdamW([weights], fused=True)
    return _timed(lambda: optimizer.step()) * (num_weights / some)


def _timed(run: Callable[[], object]) -> float:
    """Median seconds; the first time is not counted."""
    seconds = []
    for _ in range(_NUM_TIMED + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
