"""Torch's recurrent layers and ours in their place, for the tests of what a program sees of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import sire_fast
from sire_fast.swaps import Pairs

KINDS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
# one way through the code each
OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "first": {"batch_first": True},
    "ways": {"bidirectional": True},
    "layers": {"num_layers": 2},
    "stacked": {"num_layers": 2, "bidirectional": True},
}
PAIRS = Pairs(2, [(0, 1), (1, 3)])  # a sampler whose draws hardly differ
X, Y = (
    torch.randn(n, b, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n, b in ((5, 2), (7, 3))
)


def pair_of(kind: type[nn.RNNBase], *args: Any, **options: Any) -> tuple[nn.RNNBase, nn.RNNBase]:
    """Torch's layer, and one with the same weights that was converted."""
    theirs = kind(*args, **options)
    return theirs, sire_fast.convert(copy.deepcopy(theirs), swaps=PAIRS, compare="end")


def last_h(last: Any) -> Tensor:
    return last[0] if isinstance(last, tuple) else last


def gradients(layer: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in layer.parameters()]
