"""The recurrent pass with its swapped variants, as a function of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sire_fast import backends, ops, reference, validation
from sire_fast.reference import SwapRNN


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
    recompute: bool = False,
    longest: int | None = None,
    backend: str = "auto",
) -> SwapRNN:
    """Run a recurrent layer over sequences and over variants of them in which two positions are exchanged.

    Variant k of sequence b is the sequence with positions i and j exchanged, (i, j) = swaps[b, k], followed until
    step ends[b, k]. Its penalty is the squared distance of the two states there, with a gradient into both,

        penalty[b, k] = || h_variant(end) - h(end) ||^2.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm"; G = 1, 1, 3, 4 gates in the order of torch.nn.
        x_proj: input halves of the gates, x @ w_ih.T + b_ih, (T, B, G*H); or, where w_ih is given, x itself, (T, B, I).
        w_hh: recurrent weights, (G*H, H).
        b_hh: recurrent biases, (G*H), or None for zeros.
        h0: initial h, (B, H).
        c0: initial c, (B, H), for an LSTM; None for the others.
        swaps: positions (i, j), 0 <= i <= j, (B, K, 2) int64; K may be 0. i == j exchanges nothing.
        ends: last step of every variant, j <= end < length, (B, K) int64; the last of the sequence if None.
        lengths: length of every sequence, 1 <= length <= T, (B) int64; T if None.
        w_ih: input weights, (G*H, I), for the kernel to do the projection, which is faster than before it; or None.
        b_ih: input biases, (G*H), or None for zeros; only with w_ih.
        recompute: keep the states alone for the backward, and compute the gates again: less memory, more time. On
            "reference" it changes nothing.
        longest: no variant has a longer span, end - i + 1 steps, for GPUs to keep no more than that of each; T if None.
        backend: "auto" for the fastest that serves the call, or a key of sire_fast.backends.BACKENDS, which is then
            used or refused, never replaced.

    Returns:
        SwapRNN(output, h_n, c_n, variants, penalty, cells, variant_cells). All are differentiable in x_proj, w_hh,
        b_hh, h0, c0, w_ih and b_ih, once ("reference": any number of times).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value. Positions on another device than the CPU
            are not looked at, so that the host need not wait; they, and `longest`, are the caller's responsibility.
        NotImplementedError: the named backend cannot serve the call; the message says why.

    Dtypes: float32, float64 and bfloat16 on "cpu", float32, bfloat16 and float16 on "triton" and "cuda", the halves
        with float32 states inside and, where the processor can, products of halves; whatever torch computes in on
        "reference". The penalty is at least float32. Under autocast all arguments are cast to its dtype first.
        float32 is true float32, on GPUs too, unless torch.set_float32_matmul_precision allows TF32.

    Example:
        >>> import torch                                        # relu(x + h) of positive inputs is their sum,
        >>> x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)     # in whatever order they come
        >>> swaps = torch.tensor([[[0, 2]]])
        >>> swap_rnn("rnn_relu", x, torch.ones(1, 1), None, torch.zeros(1, 1), swaps=swaps).penalty.item()
        0.0

    Source: SIRE, from Cohen-Karlik, Ben David and Globerson, "Regularizing Towards Permutation Invariance in
        Recurrent Models", NeurIPS 2020, arXiv 2010.13055.
    """
    validation.check_tensors(x_proj=x_proj, h0=h0)
    device, given = x_proj.device, h0.dtype
    if torch.is_autocast_enabled(device.type):
        x_proj, w_hh, b_hh, h0, c0, w_ih, b_ih = _autocast(x_proj, w_hh, b_hh, h0, c0, w_ih, b_ih)
    # under autocast on a CPU torch's GRU, which adds to its states, gives results of their dtype
    dtype = torch.promote_types(given, h0.dtype) if cell == "gru" and device.type == "cpu" else h0.dtype
    validation.check_arguments(cell, x_proj, w_hh, b_hh, h0, c0, swaps, ends, lengths, w_ih, b_ih)
    if longest is not None and longest < 1:
        raise ValueError(f"longest: expected at least 1, got {longest}")
    name = backends.choose(backend, cell=cell, dtype=x_proj.dtype, device=device, hidden_size=h0.shape[1])
    if name == "reference":
        found = reference.swap_rnn(
            cell, x_proj, w_hh, b_hh, h0, c0, swaps=swaps, ends=ends, lengths=lengths, w_ih=w_ih, b_ih=b_ih
        )
        in_dtype = {n: t.to(dtype) for n, t in found._asdict().items() if t is not None and n != "penalty"}
        return found._replace(**in_dtype)
    ends, lengths = validation.fill_defaults(x_proj, swaps, ends, lengths)
    return ops.swap_rnn(
        cell, name, recompute, x_proj, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths, longest, dtype
    )


def cast_to(tensor: Tensor) -> torch.dtype:
    """The dtype that torch's autocast gives a tensor where it is on; float64 stays what it is, as it does there."""
    kind = tensor.device.type
    # of meta torch does not know that there is no autocast
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(t if t is None else t.to(cast_to(t)) for t in tensors)
