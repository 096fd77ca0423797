"""The reference against torch.nn's layers, run on sequences that were swapped by hand."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_padding_does_not_matter
from torch import Tensor, nn

from sire_fast import reference
from sire_fast.cells import CELLS

TORCH = {
    "rnn_tanh": lambda: nn.RNN(3, 5),
    "rnn_relu": lambda: nn.RNN(3, 5, nonlinearity="relu"),
    "gru": lambda: nn.GRU(3, 5),
    "lstm": lambda: nn.LSTM(3, 5),
}


def _project(layer: nn.RNNBase, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)


@pytest.mark.parametrize("cell", CELLS)
def test_is_the_definition(cell: str) -> None:
    """penalty[b, k] compares the layer's state at `end` for the sequence and for its copy with i and j exchanged."""
    layer = TORCH[cell]().double()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 4])
    swaps = torch.tensor([[[0, 5], [1, 2], [3, 3]], [[0, 1], [2, 3], [1, 1]]])
    ends = torch.tensor([[5, 3, 4], [1, 3, 2]])
    h0 = torch.randn(2, 5, dtype=torch.float64)
    c0 = torch.randn(2, 5, dtype=torch.float64) if cell == "lstm" else None

    def start(b: int) -> Tensor | tuple[Tensor, Tensor]:
        h = h0[b].view(1, 1, -1)
        return h if c0 is None else (h, c0[b].view(1, 1, -1))

    got = reference.swap_rnn(
        cell,
        _project(layer, x),
        layer.weight_hh_l0,
        layer.bias_hh_l0,
        h0,
        c0,
        swaps=swaps,
        ends=ends,
        lengths=lengths,
    )
    for b in range(2):
        sequence = x[: lengths[b], b : b + 1]
        output, last = layer(sequence, start(b))
        torch.testing.assert_close(got.output[: lengths[b], b], output[:, 0])
        assert (got.output[lengths[b] :, b] == 0).all()
        torch.testing.assert_close(got.h_n[b], output[-1, 0])
        if cell == "lstm":
            torch.testing.assert_close(got.c_n[b], last[1][0, 0])
            torch.testing.assert_close(got.cells[lengths[b] - 1, b], last[1][0, 0])
        for k in range(3):
            i, j = swaps[b, k].tolist()
            order = list(range(int(lengths[b])))
            order[i], order[j] = order[j], order[i]
            end = int(ends[b, k]) + 1
            swapped, swapped_last = layer(sequence[order][:end], start(b))
            torch.testing.assert_close(got.variants[b, k], swapped[-1, 0])
            torch.testing.assert_close(got.penalty[b, k], (swapped[-1, 0] - output[end - 1, 0]).square().sum())
            if cell == "lstm":
                torch.testing.assert_close(got.variant_cells[b, k], swapped_last[1][0, 0])


def test_end_defaults_to_the_last_step_of_each_sequence() -> None:
    layer = nn.GRU(3, 5).double()
    x_proj = _project(layer, torch.randn(6, 2, 3, dtype=torch.float64))
    fixed = {"swaps": torch.tensor([[[0, 3]], [[1, 2]]]), "lengths": torch.tensor([6, 4])}
    arguments = ("gru", x_proj, layer.weight_hh_l0, None, torch.zeros(2, 5, dtype=torch.float64))
    default = reference.swap_rnn(*arguments, **fixed)
    explicit = reference.swap_rnn(*arguments, **fixed, ends=torch.tensor([[5], [3]]))
    torch.testing.assert_close(default, explicit)


def test_what_padding_holds_reaches_nothing() -> None:
    """NaN times a masked 0 would be NaN in the gradient."""
    x_proj = torch.randn(4, 2, 6, dtype=torch.float64)
    x_proj[2:, 1] = float("nan")
    x_proj.requires_grad_()
    w_hh = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    run = reference.swap_rnn(
        "gru", x_proj, w_hh, None, torch.zeros(2, 2, dtype=torch.float64),
        swaps=torch.tensor([[[0, 3]], [[0, 1]]]), lengths=torch.tensor([4, 2]),
    )  # fmt: skip
    (run.output.sum() + run.penalty.sum()).backward()
    assert x_proj.grad.isfinite().all()
    assert w_hh.grad.isfinite().all()
    assert (x_proj.grad[2:, 1] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_stands_behind_a_sequence_stays_out_of_the_gradients(backend: str, cell: str, value: float) -> None:
    """That of W_ih, too, which multiplies what is there."""
    assert_padding_does_not_matter(cell, value, torch.float64, backend)
