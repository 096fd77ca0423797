"""Which implementation computes a call: a list in order of preference, each of which says why it cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sire_fast import cpu, cuda, gpu, triton


def _reference_why_not(*, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str]:
    return []


# name -> reasons why it cannot serve a call; in the order in which "auto" asks
BACKENDS: dict[str, Callable[..., list[str]]] = {
    "cpu": cpu.why_not,
    "triton": triton.why_not,
    "cuda": cuda.why_not,
    "reference": _reference_why_not,
}

# not yet run on a GPU: used where they are named, never by "auto"
UNPROVEN = frozenset({"cuda"})

_forced: str | None = None


def why_not(backend: str, *, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_size: int) -> list[str]:
    """The reasons why a backend cannot serve such a call, none if it can.

    Args:
        backend: a key of BACKENDS.
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
    return BACKENDS[backend](cell=cell, dtype=dtype, device=torch.device(device), hidden_size=hidden_size)


def choose(backend: str, *, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_size: int) -> str:
    """The backend that serves a call: the named one, or for "auto" the forced one, or else the one that was measured to
    be the fastest, or else the first that can.

    Raises:
        ValueError: no backend has this name.
        NotImplementedError: the named or forced backend cannot serve the call; the message lists its reasons.
    """
    call = {"cell": cell, "dtype": dtype, "device": torch.device(device), "hidden_size": hidden_size}
    if backend == "auto" and not _forced:
        fastest = gpu.fastest(**call)
        if fastest in BACKENDS and not BACKENDS[fastest](**call):
            return fastest
        return next(name for name, reasons in BACKENDS.items() if name not in UNPROVEN and not reasons(**call))
    named = _forced if backend == "auto" else backend
    reasons = why_not(named, **call)
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    return named


def why_no_kernel(*, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_size: int) -> list[str]:
    """The reasons why no compiled backend serves such a call, none if one does or if a backend is forced."""
    call = {"cell": cell, "dtype": dtype, "device": torch.device(device), "hidden_size": hidden_size}
    if _forced:
        return []
    found: list[str] = []
    for name in BACKENDS:
        if name != "reference" and name not in UNPROVEN:
            reasons = why_not(name, **call)
            if not reasons:
                return []
            found += reasons
    return found


def forced() -> str | None:
    """The backend that `use` has named, if any."""
    return _forced


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Make every call with backend="auto" use the named backend, layers included, until the block ends.

    What the backend cannot serve, a layer that is not fused among them, is refused with a NotImplementedError.

    Raises:
        ValueError: no backend has this name.
    """
    global _forced
    _check_name(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
