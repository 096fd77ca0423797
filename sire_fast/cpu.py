"""The backend "cpu": hands tensors to the compiled kernels of csrc/ as raw pointers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from sire_fast import _C

    MISSING = ""
except ImportError as error:
    _C = None
    MISSING = str(error)

# cell -> how many values of H each a step keeps for its gradient besides the states
SAVED_GATES: dict[str, int] = _C.saved_gates() if _C else {}

_DTYPES = (torch.float32, torch.float64)


def why_not(*, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str]:
    """Reasons why the compiled kernels cannot serve a call."""
    reasons = []
    if _C is None:
        reasons.append(f"cpu: the extension sire_fast._C cannot be loaded: {MISSING}")
    if device.type != "cpu":
        reasons.append(f"cpu: runs on the CPU, got a tensor on {device}")
    if dtype not in _DTYPES:
        reasons.append(f"cpu: computes in float32 and float64, got {dtype}")
    return reasons


def instruction_set() -> str:
    """Instruction set that the kernels run with on this machine: "avx512", "avx2" or "baseline"."""
    return _C.instruction_set().lower()


def forward(cell: str, train: bool, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
    """Fill the outputs of the operator swap_rnn; all tensors in the order of its schema, x_proj to lengths."""
    x_proj, _, _, h0, _, swaps, *_ = inputs
    size = (x_proj.shape[0], x_proj.shape[1], swaps.shape[1], h0.shape[1])
    inputs = _contiguous(inputs)
    _C.forward(cell, _is_double(h0), torch.get_num_threads(), train, size, _addresses(inputs), _addresses(outputs))


def backward(cell: str, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Fill the outputs of the operator swap_rnn_backward, None where one is not wanted; the inputs are the incoming
    gradients and what follows them in its schema, w_hh to spans."""
    *_, h0, _, swaps, _, _, output, _, _, _ = inputs
    size = (output.shape[0], output.shape[1], swaps.shape[1], h0.shape[1])
    inputs = _contiguous(inputs)
    _C.backward(cell, _is_double(h0), torch.get_num_threads(), size, _addresses(inputs), _addresses(gradients))


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The callers keep these in a name: a copy has to outlive the call that reads it."""
    return [t if t is None else t.contiguous() for t in tensors]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64
