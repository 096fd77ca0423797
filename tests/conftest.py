"""Every test starts from the same seed, in threads of torch's default number, with memory that nobody wrote filled
with NaN: an output that a kernel leaves out cannot pass. The Triton kernels are run by Triton's interpreter, the CUDA
kernels by a build of theirs for the CPU, see gpu_on_host.h. No process that a test starts outlives the tests."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_on_host
import pytest
import torch
from filelock import FileLock
from stand_ins import KINDS
from torch import nn

import sire_fast
from sire_fast.backends import cpu
from sire_fast.swaps import Adjacent

# a shell that starts tests in the background lets them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

if sys.platform == "linux":  # where there is Triton
    # it reads this when kernels are imported; outside the tests of that backend it would make "auto" choose it
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    import sire_fast.kernels.launch

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


@pytest.fixture(scope="session", autouse=True)
def _no_process_survives() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: children of children that have ended become ours
    yield
    deadline = time.monotonic() + 10
    while left := _children():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _children() -> list[str]:
    """Command lines of this process's children, but those that end with it."""
    pids = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    commands = []
    for path in (Path("/proc", pid, "cmdline") for pid in pids):
        with suppress(OSError):
            commands.append(path.read_text().replace("\0", " "))
    helpers = ("multiprocessing.resource_tracker", "_inductor/compile_worker")
    return [command for command in commands if command and not any(helper in command for helper in helpers)]


@pytest.fixture(scope="session")
def host_build(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels for the CPU, built once for all processes that the tests are shared among."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "cuda.lock"):
        path = next(folder.glob("_cuda*"), None) or cuda_on_host.build(folder)
    return cuda_on_host.load(path)


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
def _on_the_cpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Backends of GPUs, where a test has one as a parameter; what they have proven is not for the user's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    parameters = getattr(request.node, "callspec", None) and request.node.callspec.params.values()
    if parameters and "triton" in parameters:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if parameters and "cuda" in parameters:
        cuda_on_host.use(request.getfixturevalue("host_build"), 4, monkeypatch.setattr)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if cpu.MISSING:
        why = "pip install --verbose --editable . tells why it was not built"
        raise pytest.UsageError(f"the tests need the compiled extension: {cpu.MISSING}; {why}")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[nn.RNNBase]:
    return KINDS[request.param]


@pytest.fixture
def layer() -> sire_fast.GRU:
    return sire_fast.GRU(3, 4, swaps=Adjacent("all"), compare="end").double()
