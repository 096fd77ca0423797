"""The backend "cpu": hands tensors to the compiled kernels of csrc/ as raw pointers."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from sire_fast import _C

    MISSING = ""
except ImportError as error:
    _C = None
    MISSING = str(error)

# values of H each that a step keeps for its gradient besides the states: csrc/cells.h's `saved`
SAVED_GATES = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 4}

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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def forward(
    cell: str,
    x_proj: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
    train: bool,
    *outputs: Tensor,
) -> None:
    """Fill the outputs of the operator swap_rnn; see sire_fast.ops for their order and shapes."""
    inputs = (x_proj, w_hh, b_hh, h0, c0, swaps, ends, lengths)
    # kept in a name: a contiguous copy has to outlive the call that reads it
    inputs = tuple(t if t is None else t.contiguous() for t in inputs)
    _C.forward(
        cell,
        x_proj.dtype == torch.float64,
        torch.get_num_threads(),
        train,
        (x_proj.shape[0], x_proj.shape[1], swaps.shape[1], h0.shape[1]),
        [_address(t) for t in inputs],
        [_address(t) for t in outputs],
    )


def backward(
    cell: str,
    grads: list[Tensor | None],
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
    output: Tensor,
    cells: Tensor,
    gates: Tensor,
    spans: Tensor,
    needs: list[bool],
    *computed: Tensor,
) -> None:
    """Fill the outputs of the operator swap_rnn_backward; see sire_fast.ops for their order and shapes."""
    inputs = (*grads, w_hh, h0, c0, swaps, ends, lengths, output, cells, gates, spans)
    inputs = tuple(t if t is None else t.contiguous() for t in inputs)
    _C.backward(
        cell,
        h0.dtype == torch.float64,
        torch.get_num_threads(),
        (output.shape[0], output.shape[1], swaps.shape[1], h0.shape[1]),
        [_address(t) for t in inputs],
        [_address(t) if need else 0 for t, need in zip(computed, needs, strict=True)],
    )
