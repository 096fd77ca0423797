"""What is launched for a call: the kernels, in tiles that fit the chip, and around them what torch does as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sire_fast.backends import gpu
from sire_fast.backends.gpu import Call
from sire_fast.cells import CELLS as EQUATIONS
from sire_fast.kernels.cells import CELLS
from sire_fast.kernels.swap_rnn import backward_kernel, forward_kernel, gather_kernel, weight_kernel


class Launch(NamedTuple):
    """Attributes:
    rows: of a tile, originals and variants.
    resident: whether W_hh stays on chip for all steps.
    block: units of a step that are computed at a time; all of them, if resident.
    inner: columns of W_hh that come at a time, if it streams.
    warps, stages: as Triton has them.
    """

    rows: int
    resident: bool
    block: int
    inner: int
    warps: int
    stages: int


# capability -> KiB of shared memory that a block may have; others are taken to have the least
SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
_LEAST_SHARED_MEMORY = 99

# (cell, padded H, arithmetic, capability) -> the fastest launch measured there, as bench.tune prints it
TUNED: dict[tuple[str, int, str, int], Launch] = {}


def arithmetic(dtype: torch.dtype) -> str:
    """How products of a dtype are taken, as tl.dot names it for float32. "tf32x3" is float32 on matrix units: a factor
    is a sum of two TF32 numbers."""
    if dtype == torch.float32:
        return "tf32" if gpu.allows_tf32() else "tf32x3"
    return gpu.name_of(dtype)


def launch(cell: str, hidden: int, arithmetic: str, capability: int) -> Launch:
    """How to launch the recurrent kernels: as measured, or else W_hh resident if it fits, by what compiles without
    spills (bench.aot shows it).

    Args:
        cell: a key of CELLS.
        hidden: H.
        arithmetic: see `arithmetic`.
        capability: 10 * major + minor.
    """
    padded = gpu.padded(hidden)
    if (cell, padded, arithmetic, capability) in TUNED:
        return TUNED[cell, padded, arithmetic, capability]
    size = {"float64": 8, "tf32x3": 8, "tf32": 4}.get(arithmetic, 2)
    weights, states = EQUATIONS[cell].gates * padded * padded * size, 16 * padded * 8
    if weights + states <= 1024 * SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY):
        return Launch(16, True, padded, 16, 4 if padded <= 32 else 8, 1)
    # what is moved one by one has addresses of its own, which take registers
    block = 64 if _aligned_bytes(hidden, arithmetic) >= 16 else 32
    if size == 2:
        return Launch(16, False, block, min(64, 16 * _align(hidden)), 8, 3)
    # a third stage of the halves of four gates takes registers that computing the gates again does not have
    stages = 2 if arithmetic == "tf32x3" and EQUATIONS[cell].gates == 4 else 3
    return Launch(16, False, block, 16, 8, stages)


_PARTS = 16  # of dW_hh, which are summed side by side


def chip(device: torch.device) -> tuple[int, int]:
    """Capability of a GPU, and how many programs it runs at once."""
    if device.type != "cuda":  # interpreted, one program after the other
        return 90, 1
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def constants(cell: str, hidden: int, how: Launch, arithmetic: str) -> dict[str, Any]:
    """What the two recurrent kernels are compiled for."""
    return {
        "STEP": CELLS[cell].step,
        "G": EQUATIONS[cell].gates,
        "RESIDENT": how.resident,
        "PRECISION": _precision(arithmetic),
        "R": how.rows,
        "BH": how.block,
        "BK": how.inner,
        "ALIGN": _align(hidden),
        "enable_fp_fusion": True,
        "num_warps": how.warps,
        "num_stages": how.stages,
    }


def weight_constants(cell: str, hidden: int, arithmetic: str) -> dict[str, Any]:
    """What weight_kernel is compiled for."""
    largest = 64 if _aligned_bytes(hidden, arithmetic) >= 8 else 32
    block = min(largest, gpu.padded(hidden))
    sizes = {"BM": block, "BN": block, "BR": 32 if arithmetic.startswith("tf32") else 64}
    return {**_gradients(cell), "PRECISION": _precision(arithmetic), "ALIGN": _align(hidden), **sizes}


def gather_constants(cell: str, hidden: int, arithmetic: str) -> dict[str, Any]:
    """What gather_kernel is compiled for."""
    wide = tl.float64 if arithmetic == "float64" else tl.float32
    return {**_gradients(cell), "WIDE": wide, "BLOCK": min(1024, triton.next_power_of_2(hidden))}


def _gradients(cell: str) -> dict[str, Any]:
    return {"G": EQUATIONS[cell].gates, "D": CELLS[cell].gradients, "enable_fp_fusion": True}


def _precision(arithmetic: str) -> str:
    return arithmetic if arithmetic.startswith("tf32") else "ieee"


def _align(hidden: int) -> int:
    return math.gcd(hidden, 16)


def _aligned_bytes(hidden: int, arithmetic: str) -> int:
    """At multiples of so many bytes every row of H begins."""
    return _align(hidden) * {"float64": 8, "tf32x3": 4, "tf32": 4}.get(arithmetic, 2)


def forward(cell: str, train: bool, inputs: Sequence[Tensor | None], outputs: Sequence[Any]) -> None:
    """Fill the outputs of the operator swap_rnn; all tensors in the order of its schema, x to lengths."""
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths = inputs
    output, h_n, c_n, variants, penalty, cells, variant_cells, gates, spans = outputs
    call = Call.of(cell, x, h0, swaps, spans if train else None)
    how, tiles = _how(call, x)
    x_proj = gpu.projected(x, w_ih, b_ih)
    keeps_spans = train or not how.resident
    if not train:
        rows = call.B * call.K * call.S if keeps_spans else 0
        spans = x.new_empty(rows, EQUATIONS[cell].states * call.H, dtype=call.wide)
    T, B, K, H, S, N, V = _sizes(call, call.S if train else call.T, how, tiles)
    start = _aligned(call.start(h0, c0))
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(B, N),)](
            x_proj, _halves(w_hh, how), b_hh, start, swaps, ends, lengths,
            call.states(output, cells), call.states(h_n, c_n), call.states(variants, variant_cells), penalty,
            gates, spans,
            T, B, K, H, S, N, V,
            KEPT=CELLS[cell].kept if gates.numel() else 0, SPANS=keeps_spans, RING=not train,
            **constants(cell, H, how, arithmetic(x.dtype)),
        )  # fmt: skip


def backward(cell: str, recompute: bool, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Fill the outputs of the operator swap_rnn_backward, None where one is not wanted; the inputs are the incoming
    gradients and what follows them in its schema, x to spans."""
    d_output, d_h_n, d_c_n, d_variants, d_penalty, d_cells, d_variant_cells, *inputs = inputs
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths, output, cells, gates, spans = inputs
    dx, dw_ih, db_ih, dw_hh, db_hh, dh0, dc0 = gradients
    call = Call.of(cell, x, h0, swaps, spans)
    how, tiles = _how(call, x)
    T, B, K, H, S, N, V = _sizes(call, call.S, how, tiles)
    G, D = EQUATIONS[cell].gates, CELLS[cell].gradients
    programs = triton.cdiv(B, N)
    x_proj = gpu.projected(x, w_ih, b_ih) if recompute else x
    start, tracks = _aligned(call.start(h0, c0)), _aligned(call.states(output, cells))

    def empty(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty(rows, width, dtype=dtype)

    projected = w_ih is not None
    dx_proj = empty(T * B, G * H, x.dtype) if projected or dx is None else dx.view(T * B, G * H)
    du = empty(T * B, G * H, x.dtype)
    d_spans = empty(B * K * S, D * H, x.dtype)
    d_first = empty(B * K, H, call.wide)
    carry = empty(0 if how.resident else programs * how.rows, len(start) * H, call.wide)
    d_start = tuple(torch.empty_like(s) for s in start)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            _aligned(call.states(d_output, d_cells)), call.states(d_h_n, d_c_n),
            call.states(d_variants, d_variant_cells), d_penalty, x_proj, _halves(w_hh, how), b_hh, start, swaps, ends,
            lengths, tracks, gates, spans,
            *gpu.events(swaps, ends), dx_proj, du, d_spans, d_first, carry, d_start,
            T, B, K, H, S, N, V,
            GRADIENT=CELLS[cell].backward, KEPT=0 if recompute else CELLS[cell].kept, D=D, RECOMPUTE=recompute,
            **constants(cell, H, how, arithmetic(x.dtype)),
        )  # fmt: skip
        if dw_hh is not None or db_hh is not None:
            compiled_for = weight_constants(cell, H, arithmetic(x.dtype))
            blocks = triton.cdiv(H, compiled_for["BM"])
            sums = empty(_PARTS, G * H * (H + 1), call.wide)
            weight_kernel[(G * blocks, blocks, _PARTS)](
                start, tracks, spans, du, d_spans, swaps, ends, sums, T, B, K, H, S, **compiled_for
            )
            found = sums.sum(0)
            gpu.fill(dw_hh, found[: G * H * H].view(G * H, H))
            gpu.fill(db_hh, found[G * H * H :])
        if K and not (dx is dw_ih is db_ih is None):
            compiled_for = gather_constants(cell, H, arithmetic(x.dtype))
            grid = T * B, triton.cdiv(H, compiled_for["BLOCK"])
            gather_kernel[grid](d_spans, swaps, ends, dx_proj, B, K, H, S, **compiled_for)
    for gradient, found in zip((dh0, dc0), d_start, strict=False):
        gpu.fill(gradient, found)
    if projected:
        gpu.fill_projected(dx_proj, x, lengths, w_ih, dx, dw_ih, db_ih)


def _halves(w_hh: Tensor, how: Launch) -> tuple[Tensor, ...]:
    """W_hh as the recurrent kernels read it: where float32 streams two TF32 numbers that are all of it, but for a bit
    that the product drops."""
    if how.resident or arithmetic(w_hh.dtype) != "tf32x3":
        return (w_hh,)
    high = w_hh.view(torch.int32).add(0x1000).bitwise_and_(-0x2000).view(w_hh.dtype)
    return high, w_hh - high


def _aligned(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Tensors that begin where the kernels take those to begin whose rows they choose from."""
    return tuple(t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in tensors)


def _how(call: Call, x: Tensor) -> tuple[Launch, int]:
    """How a call is launched, and how many programs run at once."""
    capability, programs = chip(x.device)
    return launch(call.cell, call.H, arithmetic(x.dtype), capability), programs


def _sizes(call: Call, longest: int, how: Launch, programs: int) -> tuple[int, ...]:
    """T to V, with programs for spans of up to so many steps."""
    return call.T, call.B, call.K, call.H, call.S, *gpu.plan(call.T, call.B, call.K, longest, how.rows, programs)
