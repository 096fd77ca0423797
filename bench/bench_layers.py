"""One training step of a recurrent layer, forward and backward, by each contestant of sire_fast.lab.benchmark.

pytest bench --benchmark-group-by=param:cell,param:size,param:swaps
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sire_fast.lab.benchmark import CONTESTANTS, LAYERS, WARM_UP, Setting, Step, contestants

SIZES = {"T20-B16-H64": (20, 16, 64, 64), "T100-B64-H128": (100, 64, 128, 128)}
SWAPS = {"swap-adjacent8": ("adjacent:8", "swap"), "end-uniform4": ("uniform:4", "end")}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("swaps", SWAPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", LAYERS)
def bench_step(benchmark: BenchmarkFixture, cell: str, size: str, swaps: str, contestant: str) -> None:
    setting = Setting(cell, *SIZES[size], *SWAPS[swaps])
    if contestant not in contestants(setting):
        pytest.skip(f"{contestant} does not run this")
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(Step(setting, contestant), warmup_rounds=WARM_UP, rounds=10)
