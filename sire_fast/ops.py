"""The operators behind sire_fast.functional: schema, fake and gradient of each in one place.

`swap_rnn` runs the pass and keeps what its gradient needs; `swap_rnn_backward` is that gradient. Both look up the
backend that was chosen before; which one is chosen, and the checks of shapes, are sire_fast.functional's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sire_fast.backends import KERNELS
from sire_fast.cells import CELLS
from sire_fast.reference import SwapRNN

_LIBRARY = torch.library.Library("sire_fast", "DEF")
_LIBRARY.define(
    "swap_rnn(str cell, str backend, str arithmetic, bool recompute, Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor w_hh,"
    " Tensor? b_hh, Tensor h0, Tensor? c0, Tensor swaps, Tensor ends, Tensor lengths, SymInt span_rows, bool train)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor variants, Tensor penalty, Tensor cells, Tensor variant_cells,"
    " Tensor gates, Tensor spans)"
)
_LIBRARY.define(
    "swap_rnn_backward(str cell, str backend, str arithmetic, bool recompute, Tensor?[] grads, Tensor x, Tensor? w_ih,"
    " Tensor? b_ih, Tensor w_hh, Tensor? b_hh, Tensor h0, Tensor? c0, Tensor swaps, Tensor ends, Tensor lengths,"
    " Tensor output, Tensor cells, Tensor gates, Tensor spans, bool[] needs)"
    " -> (Tensor dx, Tensor dw_ih, Tensor db_ih, Tensor dw_hh, Tensor db_hh, Tensor dh0, Tensor dc0)"
)


def swap_rnn(
    cell: str,
    backend: str,
    recompute: bool,
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
    longest: int | None,
) -> SwapRNN:
    """The pass on a chosen backend, for arguments whose shapes fit; see sire_fast.functional.swap_rnn."""
    dtype, computed = x.dtype, KERNELS[backend].computed_in(x.dtype)
    tensors = (x, w_ih, b_ih, w_hh, b_hh, h0, c0)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if computed != dtype:
        tensors = tuple(t if t is None else t.to(computed) for t in tensors)
    rows = span_rows(backend, x.shape[0], swaps, ends, lengths, longest) if train else 0
    arithmetic = str(dtype).removeprefix("torch.")
    *outputs, _, _ = torch.ops.sire_fast.swap_rnn.default(
        cell, backend, arithmetic, recompute, *tensors, swaps, ends, lengths, rows, train
    )
    if outputs[0].dtype != dtype:  # but for the penalty: a mean of squares wants the digits
        outputs = [t if n == _PENALTY else t.to(dtype) for n, t in enumerate(outputs)]
    output, h_n, c_n, variants, penalty, cells, variant_cells = outputs
    if CELLS[cell].states == 1:
        return SwapRNN(output, h_n, None, variants, penalty, None, None)
    return SwapRNN(output, h_n, c_n, variants, penalty, cells, variant_cells)


_PENALTY = SwapRNN._fields.index("penalty")


def span_rows(backend: str, steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor, longest: int | None) -> int:
    """Rows for the steps of all variants' spans, which the forward keeps: the largest number that there can be where
    reading the positions would stop a trace."""
    if torch.compiler.is_compiling():
        return swaps.shape[0] * swaps.shape[1] * (steps if longest is None else longest)
    return KERNELS[backend].span_rows(steps, swaps, ends, lengths, longest)


@torch.library.register_fake("sire_fast::swap_rnn")
def _outputs(
    cell: str,
    backend: str,
    arithmetic: str,
    recompute: bool,
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
    span_rows: int,
    train: bool,
) -> tuple[Tensor, ...]:
    """The outputs, not filled; those that a call does not have are empty."""
    steps, batch, _ = x.shape
    hidden, n_variants = h0.shape[1], swaps.shape[1]
    has_cell = CELLS[cell].states == 2
    gates, spans = KERNELS[backend].kept(cell, steps, batch, hidden, span_rows, train, recompute)
    wide = torch.promote_types(x.dtype, torch.float32)
    shapes = (
        (steps, batch, hidden),
        (batch, hidden),
        (batch, hidden) if has_cell else (0,),
        (batch, n_variants, hidden),
        (batch, n_variants),
        (steps, batch, hidden) if has_cell else (0,),
        (batch, n_variants, hidden) if has_cell else (0,),
        spans,
    )
    *states, spans = (x.new_empty(shape, dtype=wide) for shape in shapes)
    return *states, x.new_empty(gates), spans


@torch.library.impl("sire_fast::swap_rnn", "CompositeExplicitAutograd")
def _forward(cell: str, backend: str, arithmetic: str, recompute: bool, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, _, train = arguments
    outputs = _outputs(cell, backend, arithmetic, recompute, *arguments)
    KERNELS[backend].forward(cell, arithmetic, train, recompute, _contiguous(inputs), outputs)
    return outputs


_INPUTS = slice(4, 14)  # of the operator: x to lengths
_DIFFERENTIABLE = 7  # its first inputs, and its first outputs; gates and spans are kept for the backward alone


class _SwapRNN(torch.autograd.Function):
    """The gradient of swap_rnn. Registered by hand: through torch.library.register_autograd a call takes 50 us more,
    as long as a small pass itself."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.sire_fast.swap_rnn.default(*arguments)
        h, _, _, _, _, cells, _, gates, spans = outputs
        ctx.settings = arguments[: _INPUTS.start]
        ctx.save_for_backward(*arguments[_INPUTS], h, cells, gates, spans)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates, spans)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first = _INPUTS.start
        needs = ctx.needs_input_grad[first : first + _DIFFERENTIABLE]
        computed = torch.ops.sire_fast.swap_rnn_backward.default(
            *ctx.settings, grads[:_DIFFERENTIABLE], *ctx.saved_tensors, needs
        )
        wanted = (gradient if need else None for gradient, need in zip(computed, needs, strict=True))
        return *(None,) * first, *wanted, *(None,) * 5


@torch.library.impl("sire_fast::swap_rnn", "Autograd")
def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    return _SwapRNN.apply(*arguments)


@torch.library.register_fake("sire_fast::swap_rnn_backward")
def _gradients(
    cell: str, backend: str, arithmetic: str, recompute: bool, grads: list[Tensor | None], *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients, not filled; those that are not needed are empty."""
    *kept, needs = arguments
    x, w_ih, _, w_hh, _, h0 = kept[:6]
    width = w_hh.shape[0]
    shapes = (x.shape, w_ih.shape if needs[1] else (), (width,), w_hh.shape, (width,), h0.shape, h0.shape)
    return tuple(h0.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


@torch.library.impl("sire_fast::swap_rnn_backward", "CompositeExplicitAutograd")
def _backward(cell: str, backend: str, arithmetic: str, recompute: bool, *arguments: Any) -> tuple[Tensor, ...]:
    computed = _gradients(cell, backend, arithmetic, recompute, *arguments)
    grads, *kept, needs = arguments
    wanted = [gradient if need else None for gradient, need in zip(computed, needs, strict=True)]
    KERNELS[backend].backward(cell, arithmetic, recompute, _contiguous([*grads, *kept]), wanted)
    return computed


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As the kernels, which read raw memory, want them."""
    return [t if t is None else t.contiguous() for t in tensors]


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "sire_fast: the kernels differentiate once; for gradients of gradients use "
        'sire_fast.backends.use("reference") or backend="reference"'
    )


torch.library.register_autograd("sire_fast::swap_rnn_backward", _no_second_gradient)
