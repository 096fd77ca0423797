"""One training step of a recurrent layer, forward and backward, by each contestant of sire_fast.lab.benchmark.

pytest bench --benchmark-group-by=param:cell,param:size,param:swaps
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sire_fast.lab.benchmark import LAYERS, WARM_UP, Setting, Step, contestants

SIZES = {"T20-B16-H64": (20, 16, 64, 64), "T100-B64-H128": (100, 64, 128, 128)}
SWAPS = {"swap-adjacent8": ("adjacent:8", "swap"), "end-uniform4": ("uniform:4", "end")}


def settings() -> Iterator[tuple[str, str, str, str]]:
    for cell, size, swaps in itertools.product(LAYERS, SIZES, SWAPS):
        for contestant in contestants(Setting(cell, *SIZES[size], *SWAPS[swaps])):
            yield cell, size, swaps, contestant


@pytest.mark.parametrize(("cell", "size", "swaps", "contestant"), [*settings()])
def bench_step(benchmark: BenchmarkFixture, cell: str, size: str, swaps: str, contestant: str) -> None:
    setting = Setting(cell, *SIZES[size], *SWAPS[swaps])
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(Step(setting, contestant), warmup_rounds=WARM_UP, rounds=10)
