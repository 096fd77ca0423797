"""Every test starts from the same seed, in threads of torch's default number, with memory that nobody wrote filled
with NaN: an output that a kernel leaves out cannot pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sire_fast import cpu


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if cpu.MISSING:
        raise pytest.UsageError(f"the tests need the compiled extension: {cpu.MISSING}")
