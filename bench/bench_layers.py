"""One training step of a recurrent layer, forward and backward: torch's without a penalty, and ours with and without.

pytest bench --benchmark-group-by=param:cell,param:size
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import sire_fast
from sire_fast.swaps import Adjacent, Uniform

CELLS = {"RNN": (nn.RNN, sire_fast.RNN), "GRU": (nn.GRU, sire_fast.GRU), "LSTM": (nn.LSTM, sire_fast.LSTM)}
SIZES = {"T20-B16-H64": (20, 16, 64), "T100-B64-H128": (100, 64, 128), "T100-B64-H256": (100, 64, 256)}
VARIANTS: dict[str, Callable[[str, int], nn.RNNBase]] = {
    "torch": lambda cell, n: CELLS[cell][0](n, n),
    "plain": lambda cell, n: CELLS[cell][1](n, n),
    "swap-adjacent8": lambda cell, n: CELLS[cell][1](n, n, swaps=Adjacent(8), compare="swap"),
    "swap-adjacent-all": lambda cell, n: CELLS[cell][1](n, n, swaps=Adjacent("all"), compare="swap"),
    "end-uniform4": lambda cell, n: CELLS[cell][1](n, n, swaps=Uniform(4), compare="end"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def bench_step(benchmark: BenchmarkFixture, cell: str, size: str, variant: str) -> None:
    steps, batch, hidden = SIZES[size]
    layer = VARIANTS[variant](cell, hidden)
    x, weight = torch.randn(steps, batch, hidden, requires_grad=True), torch.randn(steps, batch, hidden)
    swapping = getattr(layer, "swaps", None) is not None

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        loss = (layer(x)[0] * weight).sum()
        (loss + sire_fast.penalty(layer) if swapping else loss).backward()

    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(step, warmup_rounds=2, rounds=10)
