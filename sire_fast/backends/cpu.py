"""The backend "cpu": hands tensors to the compiled kernels of csrc/ as raw pointers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sire_fast import validation
from sire_fast.cells import CELLS

_C: Any = None
MISSING = ""
try:
    _C = import_module("sire_fast._C")
except ModuleNotFoundError:
    MISSING = "the extension sire_fast._C was not built: that needs g++ 11 or Clang 14; pip install -v shows why"
    if sys.platform == "win32":
        MISSING = "the extension sire_fast._C is not built on Windows"
except ImportError as error:
    MISSING = f"the extension sire_fast._C cannot be loaded: {error}"

# cell -> how many values of H each a step keeps for its gradient besides the states
SAVED_GATES: dict[str, int] = _C.saved_gates() if _C else {}

# dtype of a call -> dtype of the tensors that the kernels read and write; bfloat16 is what products are taken in
_COMPUTED_IN = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}


def why_not(*, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str]:
    """Reasons why the compiled kernels cannot serve a call."""
    reasons = []
    if _C is None:
        reasons.append(f"cpu: {MISSING}")
    if device.type != "cpu":
        reasons.append(f"cpu: runs on the CPU, got a tensor on {device}")
    if dtype not in _COMPUTED_IN:
        reasons.append(f"cpu: computes in float32, float64 and bfloat16, got {dtype}")
    return reasons


# measured with two threads, H from 32 to 512 and 1 to 8 sequences: torch's LSTM, alone of its layers, is oneDNN's,
# which splits a sequence among threads; these kernels split between sequences
SLOWER_THAN_TORCH = (
    "without swaps torch's own LSTM is faster for fewer sequences than threads (H >= 128) or than twice the threads "
    "(H >= 192)"
)


def slower_than_torch(*, cell: str, dtype: torch.dtype, hidden_size: int, batch: int) -> list[str]:
    """Reasons why torch's own layer is the faster one for a pass over so many sequences, without swaps."""
    threads = torch.get_num_threads()
    few = (hidden_size >= 128 and batch < threads) or (hidden_size >= 192 and batch < 2 * threads)
    return [f"cpu: {SLOWER_THAN_TORCH}"] if cell == "lstm" and dtype == torch.float32 and few else []


def instruction_set() -> str:
    """What the kernels run with on this machine: "avx512bf16", "avx512", "avx2", "baseline"; "none" without kernels."""
    return "none" if MISSING else _C.instruction_set().lower()


def files() -> list[Path]:
    return [Path(_C.__file__)]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensors that the kernels read and write for a call of this dtype."""
    return _COMPUTED_IN[dtype]


def span_rows(steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor, longest: int | None) -> int:
    positions = [t.contiguous() for t in (swaps, ends, lengths)]
    rows = _C.span_rows(steps, *swaps.shape[:2], *_addresses(positions))
    if rows < 0:
        _refuse_positions(steps, swaps, ends, lengths)
    return rows


def _refuse_positions(steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor) -> None:
    validation.check_positions(steps, swaps, ends, lengths)
    raise ValueError("swaps, ends, lengths: expected 0 <= i <= j <= end < length <= T")  # of what a transform wraps


def kept(
    cell: str, steps: int, batch: int, hidden: int, span_rows: int, train: bool, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the outputs `gates` and `spans`, which holds states and gates."""
    saved = 0 if recompute else SAVED_GATES[cell]
    return (steps, batch, saved * hidden if train else 0), (span_rows, (CELLS[cell].states + saved) * hidden)


def empty(like: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    if count * dtype.itemsize < _C.Memory.large:
        return like.new_empty(shape, dtype=dtype)
    # .data: of a view, autograd would forbid changes in place
    return torch.frombuffer(_C.Memory(count * dtype.itemsize), dtype=dtype, count=count).view(shape).data


def forward(
    cell: str,
    arithmetic: str,
    train: bool,
    recompute: bool,
    inputs: Sequence[Any],
    outputs: Sequence[Tensor | None],
) -> None:
    x, w_ih, _, _, _, h0, _, swaps, ends, lengths = inputs
    spans: Any = outputs[-1]
    size, rows, threads = _size(x, w_ih, h0, swaps), spans.shape[0], torch.get_num_threads()
    # who calls the operator itself, as a compiled graph does, has asked nobody about positions and rows before
    if not _C.forward(cell, arithmetic, threads, train, recompute, size, rows, _addresses(inputs), _addresses(outputs)):
        _refuse_positions(len(x), swaps, ends, lengths)


def backward(
    cell: str,
    arithmetic: str,
    recompute: bool,
    inputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
) -> None:
    x, w_ih, _, _, _, h0, _, swaps, ends, lengths, *_, spans = inputs[7:]
    size, rows, threads = _size(x, w_ih, h0, swaps), spans.shape[0], torch.get_num_threads()
    if not _C.backward(cell, arithmetic, threads, recompute, size, rows, _addresses(inputs), _addresses(gradients)):
        _refuse_positions(len(x), swaps, ends, lengths)


def _size(x: Tensor, w_ih: Tensor | None, h0: Tensor, swaps: Tensor) -> tuple[int, ...]:
    """T, B, K, H and I, which is 0 for inputs that are projected already."""
    steps, batch, features = x.shape
    return steps, batch, swaps.shape[1], h0.shape[1], 0 if w_ih is None else features


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() or _nowhere(t) for t in tensors]


def _nowhere(t: Tensor) -> int:
    """The address of a tensor without memory: a RuntimeError unless it is empty."""
    if t.numel():  # as wrappers that shard parameters leave them
        raise RuntimeError(f"cpu: a tensor of shape {tuple(t.shape)} has no memory: its storage was freed")
    return 0
