"""K LoRA adapters over one frozen base: the layout of a batch, the adapters' part of a linear layer, and its gradients.

A batch is one line of tokens [1, N]: each adapter's own batch, padded as its solo run pads it, flattened, one after
another. So no adapter pays for another's length, the base's linear layers run once over all tokens, and an adapter's
products and attention have the shapes of its solo run. The base learns nothing: no gradient of its weights is computed,
and none of its activations below the lowest adapter. Adapters act through forward hooks: the base stays the model it was,
whether DeepSpeed shards it or not.

Legend: N tokens of all adapters, B rows and T tokens of one adapter's batch, R rank, A tokens of answers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.errors import ConfigError

_ATTENTION = "per_adapter_sdpa"
_RANK_MULTIPLE = 8
"""grouped_mm wants rows of a multiple of 16 bytes, and takes bfloat16 on GPUs."""


class Segments(NamedTuple):
    """Whose tokens are where in a batch of several adapters."""

    adapters: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    """(B, T) of each of them."""
    ends: tuple[int, ...]
    """Where each one's tokens end among the N."""
    offsets: Any
    """The same as int32 [adapters], on the device of the tokens."""

    def spans(self) -> list[slice]:
        return [slice(begin, end) for begin, end in zip((0, *self.ends[:-1]), self.ends, strict=True)]


class Batch(NamedTuple):
    """Several adapters' batches as one line of tokens."""

    input_ids: Any
    """[1, N]"""
    position_ids: Any
    """[1, N], from 0 in each row."""
    before_answer: Any
    """[A]: places in N whose next token is of an answer."""
    answer_ids: Any
    """[A]"""
    weights: Any
    """[A]: 1 / (tokens of the answer x examples of the adapter, as a mean over the workers)."""
    row_starts: tuple[tuple[int, ...], ...]
    """Of each adapter: where in A each of its rows begins, and where the last one ends."""
    segments: Segments


class Factors(NamedTuple):
    """One adapter's matrices at one linear layer."""

    down: Any
    """[R, in]; PEFT's lora_A."""
    up: Any
    """[out, R]; PEFT's lora_B."""
    scale: float


class Graded(NamedTuple):
    """What a batch says about one of its adapters."""

    loss: Any
    """As `training.objective.answer_loss` defines it."""
    num_right: int
    """Rows that greedy decoding would answer exactly as the reference."""


def join_batches(batches: Mapping[int, Mapping[str, Any]], device: Any) -> Batch:
    """Lay several adapters' padded batches out as one line.

    Args:
        batches: number of the adapter -> {input_ids, labels}, both [B, T], and num_examples to divide by where that is
            another number than B, as `training.batches.Rows` gives them.
    """
    import torch

    shapes = tuple((int(one["labels"].shape[0]), int(one["labels"].shape[1])) for one in batches.values())
    places, answers, weights, starts, ends, begin, num_answers = [], [], [], [], [], 0, 0
    for one, (num_rows, length) in zip(batches.values(), shapes, strict=True):
        is_answer = one["labels"] != -100
        lengths = is_answer.sum(dim=1)
        places.append(is_answer.flatten().nonzero().squeeze(1) + begin - 1)
        answers.append(one["labels"][is_answer])
        weights.append((1 / (lengths * one.get("num_examples", num_rows))).repeat_interleave(lengths))
        starts.append((num_answers, *(num_answers + lengths.cumsum(0)).tolist()))
        num_answers, begin = starts[-1][-1], begin + num_rows * length
        ends.append(begin)
    positions = [torch.arange(length).repeat(num_rows) for num_rows, length in shapes]
    return Batch(
        input_ids=torch.cat([one["input_ids"].flatten() for one in batches.values()])[None].to(device),
        position_ids=torch.cat(positions)[None].to(device),
        before_answer=torch.cat(places).to(device),
        answer_ids=torch.cat(answers).to(device),
        weights=torch.cat(weights).to(device),
        row_starts=tuple(starts),
        segments=Segments(tuple(batches), shapes, tuple(ends), torch.tensor(ends, dtype=torch.int32, device=device)),
    )


class MultiLora:
    """A frozen base with adapters on its linear layers."""

    def __init__(self, base: Any, adapters: Sequence[Mapping[str, Factors]]) -> None:
        """Hook the adapters in.

        Args:
            adapters: of each, the name of a linear layer -> its matrices there.

        Raises:
            ConfigError: the base does not attend to the whole text.
        """
        from transformers import AttentionInterface

        _check_attention(base.config)
        AttentionInterface.register(_ATTENTION, _attend)
        base.config._attn_implementation = _ATTENTION
        self._base = base
        self._segments: Segments | None = None
        for name in sorted({name for one in adapters for name in one}):
            factors = {number: one[name] for number, one in enumerate(adapters) if name in one}
            base.get_submodule(name).register_forward_hook(functools.partial(self._adapt, factors))

    def losses(self, batch: Batch) -> list[Any]:
        """Each adapter's loss, in the order of the batch's segments."""
        weighted = self._token_losses(batch, self._logits(batch))
        return [weighted[starts[0] : starts[-1]].sum() for starts in batch.row_starts]

    def grade(self, batch: Batch) -> list[Graded]:
        """Each adapter's loss and right answers, in the order of the batch's segments; without gradients."""
        import torch

        with torch.no_grad():
            logits = self._logits(batch)
            weighted = self._token_losses(batch, logits)
            wrong = (logits.argmax(dim=-1) != batch.answer_ids).cumsum(0).tolist()
        wrong = [0, *wrong]
        return [
            Graded(
                weighted[starts[0] : starts[-1]].sum(),
                sum(wrong[begin] == wrong[end] for begin, end in zip(starts[:-1], starts[1:], strict=True)),
            )
            for starts in batch.row_starts
        ]

    def _logits(self, batch: Batch) -> Any:
        """[A, vocabulary]; no others are computed."""
        self._segments = batch.segments
        return self._base(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=batch.before_answer,
            segments=batch.segments,
        ).logits[0]

    def _token_losses(self, batch: Batch, logits: Any) -> Any:
        from torch.nn import functional as F

        return F.cross_entropy(logits.float(), batch.answer_ids, reduction="none") * batch.weights

    def _adapt(self, factors: Mapping[int, Factors], _module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of a linear layer: [1, N, out] -> the same with what its adapters add."""
        assert self._segments is not None, "no batch was announced"
        chosen = [factors.get(number) for number in self._segments.adapters]
        matrices = [matrix for one in chosen if one for matrix in (one.down, one.up)]
        if not matrices:
            return output
        scales = [one and one.scale for one in chosen]
        return _add_lora().apply(inputs[0][0], output[0], self._segments, scales, *matrices)[None]


def _check_attention(config: Any) -> None:
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ConfigError(
            f"fleet.mode='multi_lora': base {config.name_or_path!r} attends to a window of {config.sliding_window} tokens; "
            "allowed: a base that attends to the whole text; next: fleet.mode=solo"
        )


def _attend(
    module: Any, query: Any, key: Any, value: Any, _mask: None, *, segments: Segments, **options: Any
) -> tuple[Any, None]:
    """Causal attention within each row: [1, heads, N, dim] -> [1, N, heads, dim]."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs = []
    for span, (num_rows, length) in zip(segments.spans(), segments.shapes, strict=True):
        rows = [
            one[0, :, span].transpose(0, 1).reshape(num_rows, length, *one.shape[1::2]).transpose(1, 2)
            for one in (query, key, value)
        ]
        output, _ = sdpa_attention_forward(module, *rows, None, **options)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


@functools.cache
def _add_lora() -> Any:
    """The autograd function, made late because importing this module must not load torch."""
    import torch

    class AddLora(torch.autograd.Function):
        """y + scale * x down^T up^T on each adapter's tokens.

        Its gradients are by hand: autograd's own would add up a tensor of all tokens for each adapter and product.
        """

        @staticmethod
        def forward(
            ctx: Any, x: Any, y: Any, segments: Segments, scales: Sequence[float | None], *matrices: Any
        ) -> Any:
            ctx.segments, ctx.scales = segments, scales
            ctx.dtypes = [one.dtype for one in matrices]
            products = _GroupedProducts if x.is_cuda and x.dtype == torch.bfloat16 else _SegmentProducts
            ctx.products = products(segments, scales, [one.to(x.dtype) for one in matrices])
            out, middle = ctx.products.forward(x, y)
            ctx.save_for_backward(x, *middle)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
            x, *middle = ctx.saved_tensors
            grad_x, grads = ctx.products.backward(x, middle, grad, ctx.needs_input_grad[0])
            return grad_x, grad, None, None, *(one.to(kind) for one, kind in zip(grads, ctx.dtypes, strict=True))

    return AddLora


class _SegmentProducts:
    """The products adapter by adapter, as plain matrix products: what a CPU does best, and any dtype."""

    def __init__(self, segments: Segments, scales: Sequence[float | None], matrices: Sequence[Any]) -> None:
        pairs = iter(zip(matrices[::2], matrices[1::2], strict=True))
        spans = zip(segments.spans(), scales, strict=True)
        self._parts = [(span, scale, *(next(pairs) if scale is not None else (None, None))) for span, scale in spans]

    def forward(self, x: Any, y: Any) -> tuple[Any, list[Any]]:
        import torch

        middles, out = [], torch.empty_like(y)
        for span, scale, down, up in self._parts:
            if scale is None:
                out[span] = y[span]
                continue
            middles.append(x[span] @ down.t())
            torch.addmm(y[span], middles[-1], up.t(), alpha=scale, out=out[span])
        return out, middles

    def backward(self, x: Any, middles: Sequence[Any], grad: Any, is_x_asked: bool) -> tuple[Any, list[Any]]:
        import torch

        grad_x, grads, rest = torch.empty_like(x) if is_x_asked else None, [], iter(middles)
        for span, scale, down, up in self._parts:
            if scale is None:
                if grad_x is not None:
                    grad_x[span] = 0
                continue
            grad_middle = (grad[span] @ up).mul_(scale)
            grads += [grad_middle.t() @ x[span], (grad[span].t() @ next(rest)).mul_(scale)]
            if grad_x is not None:
                torch.mm(grad_middle, down, out=grad_x[span])
        return grad_x, grads


class _GroupedProducts:
    """The same in one grouped product for all adapters each (`torch.nn.functional.grouped_mm`), ranks padded to one size.

    Zero rows and columns of the padding give zeros, and their gradients are dropped. An adapter that does not target the
    layer is a group of zeros.
    """

    def __init__(self, segments: Segments, scales: Sequence[float | None], matrices: Sequence[Any]) -> None:
        self._offsets, self._has = segments.offsets, [scale is not None for scale in scales]
        self._ranks = [one.shape[0] for one in matrices[::2]]
        rank = -(-max(self._ranks) // _RANK_MULTIPLE) * _RANK_MULTIPLE
        downs, ups = matrices[0], matrices[1]
        self._down = downs.new_zeros(len(scales), rank, downs.shape[1])
        self._up = ups.new_zeros(len(scales), ups.shape[0], rank)
        pairs = iter(zip(matrices[::2], matrices[1::2], strict=True))
        for number, scale in enumerate(scales):
            if scale is not None:
                down, up = next(pairs)
                self._down[number, : down.shape[0]] = down
                # The scale once here, not on every token.
                self._up[number, :, : up.shape[1]] = up * scale
        self._scales = [scale for scale in scales if scale is not None]

    def forward(self, x: Any, y: Any) -> tuple[Any, list[Any]]:
        middle = self._multiply(x, self._down.transpose(1, 2))
        return y + self._multiply(middle, self._up.transpose(1, 2)), [middle]

    def backward(self, x: Any, middle: Sequence[Any], grad: Any, is_x_asked: bool) -> tuple[Any, list[Any]]:
        grad = grad.contiguous()
        grad_middle = self._multiply(grad, self._up)
        downs = self._multiply(grad_middle.t(), x)[self._has]
        ups = self._multiply(grad.t(), middle[0])[self._has]
        grads = []
        for down, up, rank, scale in zip(downs, ups, self._ranks, self._scales, strict=True):
            grads += [down[:rank], up[:, :rank] * scale]
        return self._multiply(grad_middle, self._down) if is_x_asked else None, grads

    def _multiply(self, left: Any, right: Any) -> Any:
        from torch.nn import functional as F

        return F.grouped_mm(left, right, offs=self._offsets)
