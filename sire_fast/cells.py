"""The recurrent cells: the equations every kernel of this project computes.

One step maps the input half x = W_ih x_t + b_ih and the recurrent half u = W_hh h + b_hh of the gates, and the
states s of the step before, to the states after it. Weight layout, gate order and both biases are torch.nn's.
There is no gradient here: autograd differentiates these functions, and that is the truth the kernels are tested
against. csrc/cells.h and kernels/cells.py hold the same equations under the same numbers.

    RNN    h' = tanh(x + u)                                  (1)
           h' = relu(x + u)                                  (2)
    GRU    r  = sigmoid(x_r + u_r)                           (3)
           z  = sigmoid(x_z + u_z)                           (4)
           n  = tanh(x_n + r u_n)                            (5)
           h' = n + z (h - n)                                (6)
    LSTM   i, f, o = sigmoid(x + u), each its own gate       (7)
           g  = tanh(x_g + u_g)                              (8)
           c' = f c + i g                                    (9)
           h' = o tanh(c')                                   (10)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        gates: rows of H in w_hh, that is G in (G*H, H).
        states: 1 for h alone, 2 for (h, c).
        mode: torch.nn.RNNBase's name for it.
        step: (x (..., G*H), u (..., G*H), states of (..., H)) -> the next states.
    """

    gates: int
    states: int
    mode: str
    step: Callable[[Tensor, Tensor, States], States]


def _rnn_tanh(x: Tensor, u: Tensor, s: States) -> States:
    return (torch.tanh(x + u),)  # (1)


def _rnn_relu(x: Tensor, u: Tensor, s: States) -> States:
    return (torch.relu(x + u),)  # (2)


def _gru(x: Tensor, u: Tensor, s: States) -> States:
    (h,) = s
    x_r, x_z, x_n = x.chunk(3, -1)
    u_r, u_z, u_n = u.chunk(3, -1)
    r = torch.sigmoid(x_r + u_r)  # (3)
    z = torch.sigmoid(x_z + u_z)  # (4)
    n = torch.tanh(x_n + r * u_n)  # (5)
    return (n + z * (h - n),)  # (6)


def _lstm(x: Tensor, u: Tensor, s: States) -> States:
    _, c = s
    a_i, a_f, a_g, a_o = (x + u).chunk(4, -1)
    i, f, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.sigmoid(a_o)  # (7)
    g = torch.tanh(a_g)  # (8)
    c = f * c + i * g  # (9)
    return o * torch.tanh(c), c  # (10)


CELLS = {
    "rnn_tanh": Cell(1, 1, "RNN_TANH", _rnn_tanh),
    "rnn_relu": Cell(1, 1, "RNN_RELU", _rnn_relu),
    "gru": Cell(3, 1, "GRU", _gru),
    "lstm": Cell(4, 2, "LSTM", _lstm),
}
