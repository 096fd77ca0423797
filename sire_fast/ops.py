"""The operators behind sire_fast.functional: schema, fake and gradient of each in one place.

`swap_rnn` runs the pass and keeps what its gradient needs; `swap_rnn_backward` is that gradient. Both look up the
backend that was chosen before; which one is chosen, and the checks of shapes, are sire_fast.functional's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sire_fast import cpu, reference
from sire_fast.cells import CELLS
from sire_fast.reference import SwapRNN

# name -> module with forward and backward
_IMPLEMENTATIONS = {"cpu": cpu}

_LIBRARY = torch.library.Library("sire_fast", "DEF")
_LIBRARY.define(
    "swap_rnn(str cell, str backend, Tensor x_proj, Tensor w_hh, Tensor? b_hh, Tensor h0, Tensor? c0, Tensor swaps,"
    " Tensor ends, Tensor lengths, SymInt span_rows, bool train) -> (Tensor output, Tensor h_n, Tensor c_n,"
    " Tensor variants, Tensor penalty, Tensor cells, Tensor variant_cells, Tensor gates, Tensor spans)"
)
_LIBRARY.define(
    "swap_rnn_backward(str cell, str backend, Tensor?[] grads, Tensor w_hh, Tensor h0, Tensor? c0, Tensor swaps,"
    " Tensor ends, Tensor lengths, Tensor output, Tensor cells, Tensor gates, Tensor spans, bool[] needs)"
    " -> (Tensor dx_proj, Tensor dw_hh, Tensor db_hh, Tensor dh0, Tensor dc0)"
)


def swap_rnn(
    cell: str,
    backend: str,
    x_proj: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
) -> SwapRNN:
    """The pass on a chosen backend, for arguments whose shapes fit; see sire_fast.functional.swap_rnn."""
    differentiable = (t for t in (x_proj, w_hh, b_hh, h0, c0) if t is not None)
    train = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    rows = span_rows(x_proj.shape[0], swaps, ends) if train else 0
    output, h_n, c_n, variants, penalty, cells, variant_cells, _, _ = torch.ops.sire_fast.swap_rnn(
        cell, backend, x_proj, w_hh, b_hh, h0, c0, swaps, ends, lengths, rows, train
    )
    if CELLS[cell].states == 1:
        return SwapRNN(output, h_n, None, variants, penalty, None, None)
    return SwapRNN(output, h_n, c_n, variants, penalty, cells, variant_cells)


def span_rows(steps: int, swaps: Tensor, ends: Tensor) -> int:
    """Steps of all variants together, for which the forward keeps a row each: the spans i..end of those with i < j.

    Where reading the positions would stop a trace or the host, the largest number that there can be.
    """
    if torch.compiler.is_compiling() or swaps.device.type != "cpu":
        return swaps.shape[0] * swaps.shape[1] * steps
    i, j = swaps.unbind(-1)
    return int(torch.where(i < j, ends - i + 1, 0).clamp(min=0).sum())


@torch.library.register_fake("sire_fast::swap_rnn")
def _outputs(
    cell: str,
    backend: str,
    x_proj: Tensor,
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
    steps, batch, _ = x_proj.shape
    hidden, n_variants = h0.shape[1], swaps.shape[1]
    has_cell = CELLS[cell].states == 2
    saved = cpu.SAVED_GATES[cell]
    shapes = (
        (steps, batch, hidden),
        (batch, hidden),
        (batch, hidden) if has_cell else (0,),
        (batch, n_variants, hidden),
        (batch, n_variants),
        (steps, batch, hidden) if has_cell else (0,),
        (batch, n_variants, hidden) if has_cell else (0,),
        (steps, batch, saved * hidden if train else 0),
        (span_rows, (CELLS[cell].states + saved) * hidden),
    )
    return tuple(x_proj.new_empty(shape) for shape in shapes)


@torch.library.impl("sire_fast::swap_rnn", "CompositeExplicitAutograd")
def _forward(cell: str, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, _, train = arguments
    x_proj, *_, swaps, ends, lengths = inputs
    # here and not where shapes are checked, so that a compiled graph checks them too
    reference.check_positions(x_proj.shape[0], swaps, ends, lengths)
    outputs = _outputs(cell, backend, *arguments)
    _IMPLEMENTATIONS[backend].forward(cell, train, inputs, outputs)
    return outputs


_DIFFERENTIABLE = 7  # the first outputs; gates and spans are kept for the backward alone


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cell, backend, _, w_hh, _, h0, c0, swaps, ends, lengths, _, _ = inputs
    h, _, _, _, _, cells, _, gates, spans = output
    ctx.cell, ctx.backend = cell, backend
    ctx.save_for_backward(w_hh, h0, c0, swaps, ends, lengths, h, cells, gates, spans)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[n] for n in (2, 3, 4, 5, 6)]
    computed = torch.ops.sire_fast.swap_rnn_backward(
        ctx.cell, ctx.backend, list(grads[:_DIFFERENTIABLE]), *ctx.saved_tensors, needs
    )
    dx, dw, db, dh0, dc0 = (g if need else None for g, need in zip(computed, needs, strict=True))
    return None, None, dx, dw, db, dh0, dc0, None, None, None, None, None


torch.library.register_autograd("sire_fast::swap_rnn", _backward, setup_context=_setup_context)


@torch.library.register_fake("sire_fast::swap_rnn_backward")
def _gradients(
    cell: str,
    backend: str,
    grads: list[Tensor | None],
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
    output: Tensor,
    cells: Tensor,
    gates: Tensor,
    spans: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients, not filled; those that are not needed are empty."""
    steps, batch, hidden = output.shape
    width = w_hh.shape[0]
    shapes = ((steps, batch, width), (width, hidden), (width,), (batch, hidden), (batch, hidden))
    return tuple(h0.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


@torch.library.impl("sire_fast::swap_rnn_backward", "CompositeExplicitAutograd")
def _backward_op(cell: str, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    computed = _gradients(cell, backend, *arguments)
    grads, *kept, needs = arguments
    wanted = [gradient if need else None for gradient, need in zip(computed, needs, strict=True)]
    _IMPLEMENTATIONS[backend].backward(cell, [*grads, *kept], wanted)
    return computed


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "sire_fast: the kernels differentiate once; for gradients of gradients use "
        'sire_fast.backends.use("reference") or backend="reference"'
    )


torch.library.register_autograd("sire_fast::swap_rnn_backward", _no_second_gradient)
