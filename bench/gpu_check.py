"""Holds a GPU kernel against the reference in float64, for bench.gpu.

No error may be larger than twice that of the reference in the same arithmetic. Memory that nobody wrote holds NaN. Bits
repeat, on other streams and in CUDA graphs too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sire_fast import backends, functional, proof, reference
from sire_fast.proof import TRAINING, Case, first_line

# tf32: float32 tensors, whose products torch, cuDNN and the kernels may take in TF32
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()} | {"tf32": 2**-10}


@contextmanager
def arithmetic_of(name: str) -> Iterator[None]:
    """Products of float32 in TF32 for "tf32", and true for all others; torch's default lets cuDNN take TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# the most telling first: each costs compilations, and the time may not suffice for all
CASES = [
    Case(20, 64, 128, "uniform:8"),
    Case(20, 64, 128, "uniform:8", through=TRAINING),
    Case(20, 64, 128, "uniform:8", through=("h_n",)),
    Case(20, 64, 128, "uniform:8", through=None),
    Case(9, 64, 256, "adjacent:8", "swap", I=256, longest=2),
    Case(18, 5, 7, "uniform:20", I=5, ragged=True),
    Case(9, 3, 64, "uniform:2", "swap", I=16, ragged=True, bias=False),
    Case(300, 4, 32, "uniform:2", I=3),
    Case(4, 300, 512, "uniform:2"),
    Case(1, 1, 100, "uniform:1", bias=False),
    Case(6, 13, 192, "uniform:5", "swap", I=40, ragged=True, recompute=True),
    Case(5, 4, 512, I=64),
    Case(4, 3, 512, "adjacent:all", "swap", ragged=True, longest=2),
    Case(12, 33, 100, "uniform:9", I=70, ragged=True, recompute=True),
    Case(300, 2, 128, "adjacent:all", "swap", I=8, recompute=True, longest=2),
    Case(5, 3, 256, "uniform:2", ragged=True, recompute=True),
    Case(1, 130, 64, bias=False),
    Case(8, 17, 7, "adjacent:4", "swap", recompute=True),
    Case(11, 9, 192, "uniform:3"),
    Case(4, 1, 32, "uniform:5", "swap", I=33, longest=4),
    Case(3, 2, 512, "uniform:1", recompute=True),
]


@dataclass
class Checked:
    """What the check of one kernel says of a cell in an arithmetic."""

    backend: str
    cell: str
    arithmetic: str
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    not_available: list[str] = field(default_factory=list)  # reasons, each once
    skipped: int = 0  # cases for which there was no time, or no memory

    @property
    def correct(self) -> bool:
        """Nothing failed, and something was checked unless the kernel cannot serve at all."""
        return not self.failures and (self.passed > 0 or (bool(self.not_available) and not self.skipped))

    def add(self, other: Checked) -> None:
        """What another process has found."""
        self.passed += other.passed
        self.failures += other.failures
        self.not_available += [reason for reason in other.not_available if reason not in self.not_available]
        self.skipped += other.skipped

    def why_not_timed(self) -> str | None:
        if self.failures:
            return "not timed: wrong"
        reasons = f"not available: {'; '.join(self.not_available)}" if self.not_available else "not timed: unchecked"
        return None if self.passed else reasons


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuBLAS, which nobody asked to repeat itself
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_case(
    backend: str, cell: str, arithmetic: str, case: Case, draw: int, device: str
) -> tuple[list[str], list[str]]:
    """The errors of a kernel that are too large in one case, and what else is wrong there."""
    with arithmetic_of(arithmetic):
        arguments = proof.make(cell, case, draw, DTYPES[arithmetic], device)
        kernel = partial(functional.swap_rnn, cell, backend=backend, recompute=case.recompute, longest=case.longest)
        ours = partial(proof.run, kernel, through=case.through)
        with _poisoned():
            values = ours(arguments)
        plain = partial(proof.run, partial(reference.swap_rnn, cell), through=case.through)
        truth, theirs = plain(proof.leaves(arguments, Tensor.double)), plain(arguments)
        inexact = proof.too_large(proof.errors(values, theirs, truth, EPS[arithmetic], proof.BUILT_TO))
        wrong = _differ("in a second run", values, ours(arguments))
        if torch.device(device).type == "cuda":
            wrong += _streams(ours, arguments, values)
    return inexact, wrong


def _differ(where: str, ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    return [f"{name}: other bits {where}" for name, value in ours.items() if not torch.equal(value, others[name])]


def _streams(
    ours: Callable[[Mapping[str, Any]], dict[str, Tensor]], arguments: dict[str, Any], values: dict[str, Tensor]
) -> list[str]:
    """What is wrong on another stream than the default, where the host must not wait, and in a captured graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # the arguments come late: a kernel on the default stream would not see them
            on_side = ours(proof.leaves(arguments, Tensor.clone))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(arguments)
    with torch.no_grad():
        arguments["x_proj"].neg_()  # a graph computes with what the memory holds now
    graph.replay()
    torch.cuda.synchronize()
    return _differ("on another stream", values, on_side) + _differ("in a CUDA graph", ours(arguments), captured)


def _wrong(checked: Checked, case: Case, device: str) -> list[str]:
    """What is wrong in a case: luck decides about errors alone, and has as many chances as before a kernel is used."""
    found: list[str] = []
    for draw in range(proof.chances(checked.cell, case.H)):
        try:
            inexact, wrong = check_case(checked.backend, checked.cell, checked.arithmetic, case, draw, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a kernel raises here is what the check looks for
            return [first_line(error)]
        found = inexact + wrong
        if wrong or not inexact:
            break
    return found


def check_cases(checked: Checked, cases: Sequence[Case], device: str) -> Checked:
    """Check cases in their order, and add what is found."""
    backend, cell, arithmetic = checked.backend, checked.cell, checked.arithmetic
    for case in cases:
        reasons = backends.why_not(backend, cell=cell, dtype=DTYPES[arithmetic], device=device, hidden_size=case.H)
        if reasons:
            checked.not_available += [reason for reason in reasons if reason not in checked.not_available]
            continue
        try:
            found = _wrong(checked, case, device)
        except torch.OutOfMemoryError:  # of a GPU that processes share: that says nothing of the kernel
            checked.skipped += 1
            continue
        failures = [f"{backend} {cell} {arithmetic} {case}: {what}" for what in found]
        checked.failures += failures
        checked.passed += not failures
    return checked
