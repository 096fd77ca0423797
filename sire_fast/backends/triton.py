"""The backend "triton": the kernels of kernels/ on a GPU, imported, and triton with them, when a call needs them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sire_fast.backends import gpu

_INSTALLED = find_spec("triton") is not None
_KERNELS = find_spec("sire_fast.kernels") is not None
_LARGEST_HIDDEN = 1024


@gpu.constant
def why_not(*, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str]:
    """Reasons why these kernels cannot serve a call."""
    if reasons := gpu.why_not_here("triton", device):
        return reasons
    reasons = []
    if not _INSTALLED:
        reasons.append("triton: the package triton is not installed")
    if not _KERNELS:
        reasons.append("triton: sire_fast is not installed, and a checkout on the path has no module sire_fast.kernels")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda":
        reasons += gpu.why_not_capability("triton", device, torch.cuda.get_device_capability(device))
    elif not interpreted:
        reasons += gpu.why_not_on("triton", device)
    if not interpreted:  # float64 is for tests
        reasons += gpu.why_not_dtype("triton", dtype)
    if hidden_size > _LARGEST_HIDDEN:
        reasons.append(f"triton: takes H up to {_LARGEST_HIDDEN}, got {hidden_size}")
    return reasons


def files() -> list[Path]:
    from sire_fast import kernels

    return sorted(Path(next(iter(kernels.__path__))).glob("*.py"))


computed_in, empty, span_rows = gpu.computed_in, gpu.empty, gpu.span_rows


def kept(
    cell: str, steps: int, batch: int, hidden: int, span_rows: int, train: bool, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from sire_fast.kernels.cells import CELLS

    return gpu.kept(cell, CELLS[cell].kept, steps, batch, hidden, span_rows, train, recompute)


def forward(
    cell: str, arithmetic: str, train: bool, recompute: bool, inputs: Sequence[Tensor | None], outputs: Sequence[Any]
) -> None:
    from sire_fast.kernels import launch

    gpu.check(train, inputs, outputs[-1])
    launch.forward(cell, train, inputs, outputs)


def backward(
    cell: str,
    arithmetic: str,
    recompute: bool,
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> None:
    from sire_fast.kernels import launch

    launch.backward(cell, recompute, inputs, gradients)
