"""The recurrent cells in Triton, one step and its gradient: values in, values out.

Equation numbers are those of sire_fast/cells.py, names those of csrc/cells.h:

  x      input halves W_ih x + b_ih of the gates, in torch.nn's order
  u      recurrent halves W_hh h + b_hh, in the same order
  s      the state before the step that the equations read: h, or c
  after  states after it; to a gradient, the one that s is before
  kept   what the gradient needs beside the states
  d*     gradient of the loss with respect to *; dafter of all states; ds leaves out the path through u, which is a
         product with W_hh

Nothing here loads or stores. All are tuples of blocks, (rows, units).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    a = tl.abs(x)
    # the difference loses the digits of a small x: there, the series, in float32 to where it is as exact as an exp of
    # 22 bits
    least: tl.constexpr = 0.1 if x.dtype.scalar == tl.float64 else 0.35
    q = a * a
    series = a * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 - q * 1382 / 155925)))))
    y = tl.where(a < least, series, 1 - 2 / (1 + tl.exp(2 * a)))
    return tl.where(x < 0, -y, y)


@triton.jit
def rnn_tanh(x, u, s):
    return (tanh(x[0] + u[0]),), ()  # (1)


@triton.jit
def rnn_tanh_backward(dafter, s, after, kept):
    da = dafter[0] * (1 - after * after)
    return (da,), (da,), tl.zeros_like(da)


@triton.jit
def rnn_relu(x, u, s):
    a = x[0] + u[0]
    return (tl.where(a < 0, 0, a),), ()  # (2)


@triton.jit
def rnn_relu_backward(dafter, s, after, kept):
    da = tl.where(after > 0, dafter[0], 0)
    return (da,), (da,), tl.zeros_like(da)


@triton.jit
def gru(x, u, s):
    r = tl.sigmoid(x[0] + u[0])  # (3)
    z = tl.sigmoid(x[1] + u[1])  # (4)
    n = tanh(x[2] + r * u[2])  # (5)
    return (n + z * (s - n),), (r, z, n, u[2])  # (6)


@triton.jit
def gru_backward(dafter, s, after, kept):
    r, z, n, u_n = kept
    dx_n = dafter[0] * (1 - z) * (1 - n * n)
    dz = dafter[0] * (s - n) * z * (1 - z)
    dr = dx_n * u_n * r * (1 - r)
    return (dr, dz, dx_n), (dr, dz, dx_n * r), dafter[0] * z


@triton.jit
def lstm(x, u, s):
    i = tl.sigmoid(x[0] + u[0])
    f = tl.sigmoid(x[1] + u[1])
    o = tl.sigmoid(x[3] + u[3])  # (7)
    g = tanh(x[2] + u[2])  # (8)
    c = f * s + i * g  # (9)
    return (o * tanh(c), c), (i, f, g, o)  # (10)


@triton.jit
def lstm_backward(dafter, s, after, kept):
    i, f, g, o = kept
    tanh_c = tanh(after)
    dc = dafter[1] + dafter[0] * o * (1 - tanh_c * tanh_c)
    da = (dc * g * i * (1 - i), dc * s * f * (1 - f), dc * i * (1 - g * g), dafter[0] * tanh_c * o * (1 - o))
    return da, da, dc * f


class Cell(NamedTuple):
    """What the loops need of a cell; jit functions are passed to them as constants.

    Attributes:
        step: (x, u, s) -> after, kept.
        backward: (dafter, s, after, kept) -> dx, du, ds.
        kept: how many blocks `kept` has.
        gradients: how many different blocks dx and du have; the last of dx is the last of them, the others are du's.
    """

    step: Any
    backward: Any
    kept: int
    gradients: int


CELLS = {
    "rnn_tanh": Cell(rnn_tanh, rnn_tanh_backward, 0, 1),
    "rnn_relu": Cell(rnn_relu, rnn_relu_backward, 0, 1),
    "gru": Cell(gru, gru_backward, 4, 4),
    "lstm": Cell(lstm, lstm_backward, 4, 4),
}
