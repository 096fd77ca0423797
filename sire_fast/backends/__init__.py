"""Which implementation computes a call: a list in order of preference, each of which says why it cannot serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sire_fast.backends import cpu, cuda, gpu, triton


class Backend(Protocol):
    """What the operators of sire_fast.ops ask of an implementation, which is a module or an object."""

    def why_not(self, *, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str]:
        """Reasons why it cannot serve a call, none if it can."""

    def files(self) -> list[Path]:
        """What its kernels were loaded from: another build has other ones, or of another time."""

    def computed_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the tensors that it reads and writes for a call of this dtype; the penalty is at least
        float32."""

    def span_rows(self, steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor, longest: int | None) -> int:
        """Rows that it keeps for the steps of all spans together, of which none has more than `longest` steps.

        Raises:
            ValueError: a length, a swap or an end that it can read lies outside its sequence.
        """

    def kept(
        self, cell: str, steps: int, batch: int, hidden: int, span_rows: int, train: bool, recompute: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the operator's outputs `gates` and `spans`, which its own backward reads."""

    def empty(self, like: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """A tensor on the device of another, not filled, for what a step keeps or passes on."""

    def forward(
        self,
        cell: str,
        arithmetic: str,
        train: bool,
        recompute: bool,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor | None],
    ) -> None:
        """Fill the outputs of the operator swap_rnn, None for those of c where the cell has none; all tensors in the
        order of its schema, x to lengths. With `train` false nothing is kept for a backward; `arithmetic` is the dtype
        of the call."""

    def backward(
        self,
        cell: str,
        arithmetic: str,
        recompute: bool,
        inputs: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Fill the outputs of the operator swap_rnn_backward, None where one is not wanted; the inputs are the
        incoming gradients, None where there is none, and what follows them in its schema, x to spans."""


# those behind the operators, in the order in which "auto" asks
KERNELS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "cuda": cuda}

# every name that a caller may give; "reference" is plain PyTorch with autograd's own gradient, and serves every call
BACKENDS = (*KERNELS, "reference")

# those that "auto" takes only where they have computed a small case right, on the very card (sire_fast.proof)
PROVEN_BY_USE = frozenset({"triton", "cuda"})

_used: tuple[tuple[str], ...] = ()  # the blocks of `use`, in the order in which they were entered


def why_not(backend: str, *, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_size: int) -> list[str]:
    """The reasons why a backend cannot serve such a call, none if it can.

    Args:
        backend: one of BACKENDS.
        cell: a key of sire_fast.cells.CELLS.
        dtype: of all floating-point tensors of the call.
        device: of all tensors of the call.
        hidden_size: H.

    Raises:
        ValueError: no backend has this name.

    >>> why_not("cpu", cell="gru", dtype=torch.float16, device="cpu", hidden_size=64)
    ['cpu: computes in float32, float64 and bfloat16, got torch.float16']
    """
    _check_name(backend)
    if backend == "reference":
        return []
    return KERNELS[backend].why_not(cell=cell, dtype=dtype, device=torch.device(device), hidden_size=hidden_size)


def choose(backend: str, **call: Any) -> str:
    """The backend that serves a call: the named one, or for "auto" the forced one, or else the one that was measured to
    be the fastest, or else the first that can; of those of GPUs, one that has computed a small case right before.

    Args:
        backend: "auto" or one of BACKENDS.
        call: cell, dtype, device and hidden_size, see `why_not`.

    Raises:
        ValueError: no backend has this name.
        NotImplementedError: the named or forced backend cannot serve the call; the message lists its reasons.
    """
    named = forced() or backend if backend == "auto" else backend
    if named == "auto":
        return _first(**call)[0]
    reasons = why_not(named, **call)
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    return named


def why_no_kernel(**call: Any) -> list[str]:
    """The reasons why "auto" finds no kernel for such a call (see `why_not`), none if it does or if a backend is
    forced."""
    if forced():
        return []
    name, reasons = _first(**call)
    return reasons if name == "reference" else []


def unproven(**call: Any) -> str:
    """What "auto" would take of those that say that they can, none of which is asked to compute anything."""
    return _first(proven=False, **call)[0]


def _first(*, device: torch.device | str, proven: bool = True, **numbers: Any) -> tuple[str, list[str]]:
    """What "auto" takes: the fastest that serves a call, and the reasons why others, which come before it, do not."""
    call: dict[str, Any] = {"device": torch.device(device), **numbers}
    reasons: list[str] = []
    for name in _by_speed(**call):
        found = why_not(name, **call)
        if proven and not found and name in PROVEN_BY_USE:
            from sire_fast import proof  # which knows all the rest

            found = proof.failures(name, **call)
        if not found:
            return name, reasons
        reasons += found
    return "reference", reasons


def _by_speed(*, device: torch.device, **numbers: Any) -> list[str]:
    """Kernels in the order in which they are asked: on a GPU as measured, or else as predicted."""
    return [*KERNELS] if device.type != "cuda" else _by_speed_on_a_gpu(device=device, **numbers)


@gpu.constant
def _by_speed_on_a_gpu(*, device: torch.device, **numbers: Any) -> list[str]:
    first = [gpu.fastest(device=device, **numbers), *gpu.predicted(**numbers), *KERNELS]
    return [name for name in dict.fromkeys(first) if name in KERNELS]


def forced() -> str | None:
    """The backend that `use` has named, if any."""
    return _used[-1][0] if _used and _used[-1][0] != "auto" else None


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Make every call with backend="auto" use the named backend, layers included, until the block ends; "auto" lets
    them choose again inside another such block.

    What the backend cannot serve, a layer that is not fused among them, is refused with a NotImplementedError. It
    counts in all threads, since a GPU's backward runs in one of its own; of blocks that overlap the one entered last.

    Raises:
        ValueError: no backend has this name.
    """
    if backend != "auto":
        _check_name(backend)
    global _used
    block = (backend,)  # an object of its own
    _used = (*_used, block)
    try:
        yield
    finally:
        _used = tuple(each for each in _used if each is not block)


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
