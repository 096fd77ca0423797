"""Every test starts from the same seed, in threads of torch's default number, with memory that nobody wrote filled
with NaN: an output that a kernel leaves out cannot pass. The Triton kernels are run by Triton's interpreter, the CUDA
kernels by a build of theirs for the CPU, see gpu_on_host.h."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cuda_on_host
import pytest
import torch

from sire_fast.backends import cpu

# Triton reads it when kernels are imported; outside the tests of that backend it would make "auto" choose it
os.environ["TRITON_INTERPRET"] = "1"
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

import sire_fast.kernels.launch  # noqa: F401

del os.environ["TRITON_INTERPRET"]

_dot = InterpreterBuilder.create_dot


def _dot_of_wide(self: InterpreterBuilder, a: Any, b: Any, *arguments: Any) -> Any:
    """The interpreter multiplies bfloat16 as the integers that hold its bits."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
    return _dot(self, a, b, *arguments)


InterpreterBuilder.create_dot = _dot_of_wide


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def host_build(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels for the CPU."""
    return cuda_on_host.load(cuda_on_host.build(tmp_path_factory.mktemp("cuda")))


@pytest.fixture
def allow_tf32() -> Iterator[dict[str, Callable[[bool], None]]]:
    """The ways to tell torch whether products of float32 may be TF32 on a GPU; undone behind the test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield {
        "set_float32_matmul_precision": lambda may: torch.set_float32_matmul_precision("high" if may else "highest"),
        "fp32_precision": lambda may: setattr(matmul, "fp32_precision", "tf32" if may else "ieee"),
        "fp32_precision, none": lambda may: setattr(matmul, "fp32_precision", "tf32" if may else "none"),
    }
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends of GPUs, where a test has one as a parameter."""
    parameters = getattr(request.node, "callspec", None) and request.node.callspec.params.values()
    if parameters and "triton" in parameters:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if parameters and "cuda" in parameters:
        cuda_on_host.use(request.getfixturevalue("host_build"), 4, monkeypatch.setattr)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if cpu.MISSING:
        raise pytest.UsageError(f"the tests need the compiled extension: {cpu.MISSING}")
