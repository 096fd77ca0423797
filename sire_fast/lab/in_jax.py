"""A layer and its penalty in JAX: `jax.lax.scan` over the steps, compiled; forward and backward are a call each.

The fastest of what was tried for the stacked variants. Milliseconds of a GRU on two cores of an AMD EPYC (family 26
model 2), jax 0.10.2, at T=100 B=64 H=128 with Adjacent(8) at the swap and with Uniform(4) at the end, and at T=20 B=16
H=64 with Uniform(8) at the end:

    rows gathered in each step, two calls     175   95  4.0
    the same in one call                      176  115  3.6
    rows gathered before the scan, two calls  239  125  4.3
    the same in one call                      228  138  3.9

Unrolled scans were no faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import torch
from jax import numpy as jnp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# or its threads free the memory of a step after it, in the time of the next one
jax.config.update("jax_cpu_enable_async_dispatch", False)

Arrays = tuple[Any, ...]


# the equations of sire_fast.cells
def _rnn(x: Any, u: Any, states: Arrays) -> Arrays:
    return (jnp.tanh(x + u),)


def _gru(x: Any, u: Any, states: Arrays) -> Arrays:
    (h,) = states
    (x_r, x_z, x_n), (u_r, u_z, u_n) = jnp.split(x, 3, -1), jnp.split(u, 3, -1)
    r, z = jax.nn.sigmoid(x_r + u_r), jax.nn.sigmoid(x_z + u_z)
    n = jnp.tanh(x_n + r * u_n)
    return (n + z * (h - n),)


def _lstm(x: Any, u: Any, states: Arrays) -> Arrays:
    i, f, g, o = jnp.split(x + u, 4, -1)
    c = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


_Cell = Callable[[Any, Any, Arrays], Arrays]
_CELLS: dict[type[nn.Module], tuple[_Cell, int]] = {nn.RNN: (_rnn, 1), nn.GRU: (_gru, 1), nn.LSTM: (_lstm, 2)}


def stacked(layer: nn.Module, x: Tensor, pairs: Tensor, compare: str) -> tuple[Tensor, Tensor]:
    """Originals and variants as one batch of whole sequences: the output of a layer, (T, B, H), and its penalty, for
    x (T, B, I) and pairs (B, K, 2), all float32."""
    return _InJax.apply(_stacked, _CELLS[type(layer)], compare, pairs, x, *layer.parameters())


def shared(layer: nn.Module, x: Tensor, pairs: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The originals first, then the steps of all variants from i to j, at most `reach` further: as `stacked`, compared
    at the swap."""
    return _InJax.apply(_shared, _CELLS[type(layer)], reach, pairs, x, *layer.parameters())


class _InJax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, cell: Any, how: Any, pairs: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
        found, ctx.pull_back = _forward(run, cell, how, _array(pairs.int()), *map(_array, of))
        return tuple(map(torch.from_dlpack, found))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = _backward(ctx.pull_back, tuple(map(_array, gradients)))
        return None, None, None, None, *map(torch.from_dlpack, found)


def _array(tensor: Tensor) -> Any:
    return jnp.from_dlpack(tensor.detach().contiguous())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(run: Callable[..., Arrays], cell: tuple[_Cell, int], how: Any, pairs: Any, *of: Any) -> tuple[Arrays, Any]:
    """Output and penalty, and what maps their gradients to those of x and the weights."""
    return jax.vjp(partial(run, cell, how, pairs), *of)


@jax.jit
def _backward(pull_back: Callable[[Arrays], Arrays], gradients: Arrays) -> Arrays:
    return pull_back(gradients)


def _stacked(cell: tuple[_Cell, int], compare: str, pairs: Any, x: Any, *weights: Any) -> Arrays:
    w_ih, w_hh, b_ih, b_hh = weights
    next_states, n_states = cell
    steps, batch, _ = x.shape
    row, now = jnp.arange(batch)[:, None], jnp.arange(steps)[:, None, None]
    reads = jnp.concatenate((jnp.broadcast_to(now, (steps, batch, 1)), _reads(now, pairs)), -1)
    projected = x @ w_ih.T + b_ih

    def step(states: Arrays, read: Any) -> tuple[Arrays, Any]:
        # the variants' inputs are never built as a whole
        inputs = projected[read, row].reshape(-1, projected.shape[-1])
        states = next_states(inputs, states[0] @ w_hh.T + b_hh, states)
        return states, states[0]

    start = n_states * (jnp.zeros((reads[0].size, w_hh.shape[1]), x.dtype),)
    _, y = jax.lax.scan(step, start, reads)
    y = y.reshape(*reads.shape, -1)  # (T, B, 1 + K, H)
    if compare == "end":
        difference = y[-1, :, 1:] - y[-1, :, :1]
    else:
        j = pairs[..., 1]
        difference = y[j, row, jnp.arange(1, y.shape[2])] - y[j, row, 0]
    return y[:, :, 0], (difference**2).sum(-1).mean()


def _shared(cell: tuple[_Cell, int], reach: int, pairs: Any, x: Any, *weights: Any) -> Arrays:
    w_ih, w_hh, b_ih, b_hh = weights
    next_states, n_states = cell
    projected = x @ w_ih.T + b_ih

    def step(states: Arrays, inputs: Any) -> tuple[Arrays, Arrays]:
        states = next_states(inputs, states[0] @ w_hh.T + b_hh, states)
        return states, states

    start = n_states * (jnp.zeros((x.shape[1], w_hh.shape[1]), x.dtype),)
    _, tracks = jax.lax.scan(step, start, projected)  # (T, B, H) each
    (i, j), row = (pairs[..., 0], pairs[..., 1]), jnp.arange(x.shape[1])[:, None]
    states = tuple(jnp.where((i > 0)[..., None], track[i - 1, row], 0) for track in tracks)  # (B, K, H) each
    for now in (i + n for n in range(reach + 1)):
        after, _ = step(states, projected[_reads(now, pairs), row])
        states = tuple(jnp.where((now <= j)[..., None], s, before) for s, before in zip(after, states, strict=True))
    difference = states[0] - tracks[0][j, row]
    return tracks[0], (difference**2).sum(-1).mean()


def _reads(now: Any, pairs: Any) -> Any:
    """The positions that variants have at a step."""
    i, j = pairs[..., 0], pairs[..., 1]
    return jnp.where(now == i, j, jnp.where(now == j, i, now))
