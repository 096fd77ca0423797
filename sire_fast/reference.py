"""The recurrent pass with its swapped variants, in plain PyTorch: what every kernel is tested against and timed
against. It runs the original and all variants as one stacked batch, whole sequences, and autograd does the rest."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sire_fast import validation
from sire_fast.cells import CELLS


class SwapRNN(NamedTuple):
    """What a recurrent pass with swapped variants returns.

    Attributes:
        output: the original's h at every step, (T, B, H); 0 beyond a sequence's length.
        h_n: the original's last h, (B, H).
        c_n: the original's last c, (B, H); None unless the cell is an LSTM.
        variants: h of every variant at its end, (B, K, H).
        penalty: ||variants[b, k] - output[ends[b, k], b]||^2, summed over H, (B, K).
        cells: the original's c at every step, (T, B, H), 0 beyond the length; None unless an LSTM.
        variant_cells: c of every variant at its end, (B, K, H); None unless an LSTM.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None
    variants: Tensor
    penalty: Tensor
    cells: Tensor | None
    variant_cells: Tensor | None


def swap_rnn(
    cell: str,
    x_proj: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    *,
    swaps: Tensor,
    ends: Tensor | None = None,
    lengths: Tensor | None = None,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
) -> SwapRNN:
    """As sire_fast.functional.swap_rnn in arguments, result and errors, without those that choose and steer a kernel
    (recompute, longest, backend); differentiable any number of times."""
    validation.check_arguments(cell, x_proj, w_hh, b_hh, h0, c0, swaps, ends, lengths, w_ih, b_ih)
    ends, lengths = validation.fill_defaults(x_proj, swaps, ends, lengths)
    validation.check_positions(x_proj.shape[0], swaps, ends, lengths)
    steps, batch, _ = x_proj.shape
    n_variants = swaps.shape[1]
    row = torch.arange(batch, device=x_proj.device)

    inside = torch.arange(steps, device=x_proj.device)[:, None] < lengths  # (T, B)
    # masked here and not only behind the loop: what padding holds (NaN, say) must not reach any gradient
    x = torch.where(inside[..., None], x_proj, 0)
    if w_ih is not None:
        x = torch.nn.functional.linear(x, w_ih, b_ih)
    x = with_variants(x, swaps)  # (T, B, 1 + K, G*H)

    start = (h0,) if c0 is None else (h0, c0)
    states = tuple(s[:, None].expand(-1, 1 + n_variants, -1) for s in start)  # (B, 1 + K, H)
    history = []
    for t in range(steps):
        u = torch.nn.functional.linear(states[0], w_hh, b_hh)
        stepped = CELLS[cell].step(x[t], u, states)
        alive = inside[t, :, None, None]
        states = tuple(torch.where(alive, new, old) for new, old in zip(stepped, states, strict=True))
        history.append(states)

    output, *cells = (
        torch.where(inside[..., None], torch.stack([s[:, 0] for s in track]), 0) for track in zip(*history, strict=True)
    )
    compared = []
    base = [track[ends, row[:, None]] for track in (output, *cells)]
    for track, original in zip(zip(*history, strict=True), base, strict=True):
        variants = torch.stack([s[:, 1:] for s in track])  # (T, B, K, H)
        variants = variants[ends, row[:, None], torch.arange(n_variants, device=ends.device)]
        # a pair that exchanges nothing gives the original to the last bit, whatever order a product sums in
        compared.append(torch.where((swaps[..., 0] == swaps[..., 1])[..., None], original, variants))
    variants, *variant_cells = compared
    penalty = squared_distance(variants, base[0])
    h_n, *c_n = (s[:, 0] for s in states)
    c, ended, last = (each[0] if each else None for each in (cells, variant_cells, c_n))
    return SwapRNN(output, h_n, last, variants, penalty, c, ended)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||^2 over the last dimension; real, and in at least float32: a sum of squares wants the digits."""
    wide = torch.promote_types(a.dtype, torch.float32)
    change = a.to(wide) - b.to(wide)
    if change.is_complex():
        change = torch.view_as_real(change).flatten(-2)
    return change.square().sum(-1)


def with_variants(x: Tensor, swaps: Tensor) -> Tensor:
    """Sequences and their variants: (T, B, ...) and (B, K, 2) give (T, B, 1 + K, ...), the original first."""
    steps, batch = x.shape[:2]
    i, j = swaps.unbind(-1)
    # position[b, v, t]: which element variant v of sequence b has at step t
    position = torch.arange(steps, device=x.device).repeat(batch, 1 + swaps.shape[1], 1)
    position[:, 1:].scatter_(2, i[..., None], j[..., None])
    position[:, 1:].scatter_(2, j[..., None], i[..., None])
    return at_steps(x, position.permute(2, 0, 1), torch.arange(batch, device=x.device)[:, None])


def at_steps(x: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """x[t, b] of sequences (T, B, ...), with a gradient whose bits repeat: several threads sum that of indexing in any
    order."""
    if not (x.requires_grad and x.is_floating_point()):
        return x[t, b]
    row = t * x.shape[1] + b
    flat = x.reshape(x.shape[0] * x.shape[1], math.prod(x.shape[2:]))
    return torch.nn.functional.embedding(row, flat).reshape(*row.shape, *x.shape[2:])
