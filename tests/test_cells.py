"""The equations, against numbers worked out by hand and against torch.nn's cells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sire_fast.cells import CELLS


def _sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def test_one_unit_by_hand() -> None:
    x = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    u = torch.tensor([0.1, 0.3, -0.4, 1.0], dtype=torch.float64)
    h, c = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.2], dtype=torch.float64)

    assert CELLS["rnn_tanh"].step(x[:1], u[:1], (h,))[0].item() == pytest.approx(math.tanh(0.6))
    assert CELLS["rnn_relu"].step(x[1:2], u[1:2], (h,))[0].item() == 0

    r, z = _sigmoid(0.6), _sigmoid(-0.7)
    n = math.tanh(2.0 + r * -0.4)  # r gates W h + b, not h
    assert CELLS["gru"].step(x[:3], u[:3], (h,))[0].item() == pytest.approx((1 - z) * n + z * 0.7)

    new_c = _sigmoid(-0.7) * -0.2 + _sigmoid(0.6) * math.tanh(1.6)
    stepped = CELLS["lstm"].step(x, u, (h, c))
    assert stepped[1].item() == pytest.approx(new_c)
    assert stepped[0].item() == pytest.approx(_sigmoid(1.25) * math.tanh(new_c))


@pytest.mark.parametrize("cell", CELLS)
def test_torch_cell(cell: str) -> None:
    theirs = {
        "rnn_tanh": lambda: nn.RNNCell(3, 5),
        "rnn_relu": lambda: nn.RNNCell(3, 5, nonlinearity="relu"),
        "gru": lambda: nn.GRUCell(3, 5),
        "lstm": lambda: nn.LSTMCell(3, 5),
    }[cell]().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    states = tuple(torch.randn(4, 5, dtype=torch.float64) for _ in range(CELLS[cell].states))
    projected = nn.functional.linear(x, theirs.weight_ih, theirs.bias_ih)
    recurrent = nn.functional.linear(states[0], theirs.weight_hh, theirs.bias_hh)
    expected = theirs(x, states if cell == "lstm" else states[0])
    ours = CELLS[cell].step(projected, recurrent, states)
    torch.testing.assert_close(ours, expected if cell == "lstm" else (expected,))
