"""What is launched for a call: the kernels, in tiles that fit the chip, and around them what torch does as well."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return str(dtype).removeprefix("torch.")


def launch(cell: str, hidden: int, arithmetic: str, capability: int) -> Launch:
    """How to launch the recurrent kernels: as measured, or else W_hh resident if it fits, by what compiles without
    spills (bench.aot shows it).

    Args:
        cell: a key of CELLS.
        hidden: H.
        arithmetic: see `arithmetic`.
        capability: 10 * major + minor.
    """
    padded = max(16, triton.next_power_of_2(hidden))
    if (cell, padded, arithmetic, capability) in TUNED:
        return TUNED[cell, padded, arithmetic, capability]
    size = {"float64": 8, "tf32x3": 8, "tf32": 4}.get(arithmetic, 2)
    weights, states = EQUATIONS[cell].gates * padded * padded * size, 16 * padded * 8
    if weights + states <= 1024 * SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY):
        return Launch(16, True, padded, 16, 4 if padded <= 32 else 8, 1)
    return Launch(16, False, 64, 64, 8, 2) if size == 2 else Launch(16, False, 64, 16, 8, 3)


_PARTS = 16  # of dW_hh, which are summed side by side


class Plan(NamedTuple):
    """Attributes:
    sequences: N, of a program.
    in_step: V, variants of each that run in lock step with it.
    """

    sequences: int
    in_step: int


@functools.lru_cache(1024)
def plan(T: int, B: int, K: int, S: int, rows: int, programs: int) -> Plan:
    """The fewest steps behind each other where `programs` run at once; among equals the smallest programs."""

    def steps(candidate: Plan) -> int:
        N, V = candidate
        waves = triton.cdiv(B, N * programs)
        return waves * (T + triton.cdiv(N * (K - V), rows) * S)

    candidates = [Plan(N, V) for N in range(1, min(rows, B) + 1) for V in sorted({0, min(K, rows // N - 1)})]
    return min(candidates, key=steps)


class _Call(NamedTuple):
    """What the launches of a call have in common."""

    cell: str
    T: int
    B: int
    K: int
    H: int
    S: int  # rows of `spans` for each variant
    how: Launch
    programs: int  # that run at once
    arithmetic: str
    wide: torch.dtype  # of states and sums

    @classmethod
    def of(cls, cell: str, x: Tensor, h0: Tensor, swaps: Tensor, spans: Tensor | None) -> _Call:
        """Of a call that keeps `spans`, or keeps none."""
        (T, B, _), K, H = x.shape, swaps.shape[1], h0.shape[1]
        # kept or not, at least the state before a step and that after it
        S = 2 if spans is None or K == 0 else spans.shape[0] // (B * K)
        capability, programs = chip(x.device)
        how = launch(cell, H, arithmetic(x.dtype), capability)
        wide = torch.promote_types(x.dtype, torch.float32)
        return cls(cell, T, B, K, H, S, how, programs, arithmetic(x.dtype), wide)

    def states(self, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of h alone or of h and c."""
        return (first, second)[: EQUATIONS[self.cell].states]

    def start(self, h0: Tensor, c0: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(s.to(self.wide).contiguous() for s in self.states(h0, c0))

    def sizes(self, longest: int) -> tuple[int, ...]:
        """T to V, with programs for spans of up to so many steps."""
        N, V = plan(self.T, self.B, self.K, longest, self.how.rows, self.programs)
        return self.T, self.B, self.K, self.H, self.S, N, V

    def constants(self) -> dict[str, Any]:
        return constants(self.cell, self.how, self.arithmetic)


def chip(device: torch.device) -> tuple[int, int]:
    """Capability of a GPU, and how many programs it runs at once."""
    if device.type != "cuda":  # interpreted, one program after the other
        return 90, 1
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def constants(cell: str, how: Launch, arithmetic: str) -> dict[str, Any]:
    """What the two recurrent kernels are compiled for."""
    return {
        "STEP": CELLS[cell].step,
        "G": EQUATIONS[cell].gates,
        "RESIDENT": how.resident,
        "PRECISION": _precision(arithmetic),
        "R": how.rows,
        "BH": how.block,
        "BK": how.inner,
        "num_warps": how.warps,
        "num_stages": how.stages,
    }


def weight_constants(cell: str, hidden: int, arithmetic: str) -> dict[str, Any]:
    """What weight_kernel is compiled for."""
    block = min(64, max(16, triton.next_power_of_2(hidden)))
    sizes = {"BM": block, "BN": block, "BR": 32 if arithmetic.startswith("tf32") else 64}
    return {**_gradients(cell), "PRECISION": _precision(arithmetic), **sizes}


def gather_constants(cell: str, hidden: int, arithmetic: str) -> dict[str, Any]:
    """What gather_kernel is compiled for."""
    wide = tl.float64 if arithmetic == "float64" else tl.float32
    return {**_gradients(cell), "WIDE": wide, "BLOCK": min(1024, triton.next_power_of_2(hidden))}


def _gradients(cell: str) -> dict[str, int]:
    return {"G": EQUATIONS[cell].gates, "D": CELLS[cell].gradients}


def _precision(arithmetic: str) -> str:
    return arithmetic if arithmetic.startswith("tf32") else "ieee"


def kept(
    cell: str, T: int, B: int, H: int, span_rows: int, train: bool, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the outputs `gates`, the originals' before the spans', and `spans`."""
    rows = T * B + span_rows if train and not recompute else 0
    return (rows, CELLS[cell].kept * H), (span_rows, EQUATIONS[cell].states * H)


def forward(
    cell: str, train: bool, recompute: bool, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> None:
    """Fill the outputs of the operator swap_rnn; all tensors in the order of its schema, x to lengths."""
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths = _contiguous(inputs)
    output, h_n, c_n, variants, penalty, cells, variant_cells, gates, spans = outputs
    call = _Call.of(cell, x, h0, swaps, spans if train else None)
    x_proj = x if w_ih is None else torch.nn.functional.linear(x, w_ih, b_ih)
    keeps_spans = train or not call.how.resident
    if not train:
        rows = call.B * call.K * call.S if keeps_spans else 0
        spans = x.new_empty(rows, EQUATIONS[cell].states * call.H, dtype=call.wide)
    T, B, K, H, S, N, V = call.sizes(call.S if train else call.T)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(B, N),)](
            x_proj, w_hh, b_hh, call.start(h0, c0), swaps, ends, lengths,
            call.states(output, cells), call.states(h_n, c_n), call.states(variants, variant_cells), penalty,
            gates, spans,
            T, B, K, H, S, N, V,
            KEPT=CELLS[cell].kept if gates.numel() else 0, SPANS=keeps_spans, **call.constants(),
        )  # fmt: skip


def backward(cell: str, recompute: bool, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Fill the outputs of the operator swap_rnn_backward, None where one is not wanted; the inputs are the incoming
    gradients and what follows them in its schema, x to spans."""
    d_output, d_h_n, d_c_n, d_variants, d_penalty, d_cells, d_variant_cells, *inputs = _contiguous(inputs)
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths, output, cells, gates, spans = inputs
    dx, dw_ih, db_ih, dw_hh, db_hh, dh0, dc0 = gradients
    call = _Call.of(cell, x, h0, swaps, spans)
    T, B, K, H, S, N, V = call.sizes(call.S)
    G, D = EQUATIONS[cell].gates, CELLS[cell].gradients
    programs = triton.cdiv(B, N)
    x_proj = torch.nn.functional.linear(x, w_ih, b_ih) if recompute and w_ih is not None else x
    start, tracks = call.start(h0, c0), call.states(output, cells)
    # an original meets the ends and starts of its variants in this order
    i, j = swaps.unbind(-1)
    end_times, end_order = ends.sort(dim=1, descending=True, stable=True)
    start_times, start_order = torch.where(i < j, i, -1).sort(dim=1, descending=True, stable=True)

    def empty(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty(rows, width, dtype=dtype)

    dx_proj, du = empty(T * B, G * H, x.dtype), empty(T * B, G * H, x.dtype)
    d_spans = empty(B * K * S, D * H, x.dtype)
    d_first = empty(B * K, len(start) * H, call.wide)
    carry = empty(0 if call.how.resident else programs * call.how.rows, len(start) * H, call.wide)
    d_start = tuple(torch.empty_like(s) for s in start)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            call.states(d_output, d_cells), call.states(d_h_n, d_c_n), call.states(d_variants, d_variant_cells),
            d_penalty, x_proj, w_hh, b_hh, start, swaps, ends, lengths, tracks, gates, spans,
            end_times, end_order, start_times, start_order, dx_proj, du, d_spans, d_first, carry, d_start,
            T, B, K, H, S, N, V,
            GRADIENT=CELLS[cell].backward, KEPT=0 if recompute else CELLS[cell].kept, D=D, RECOMPUTE=recompute,
            **call.constants(),
        )  # fmt: skip
        if dw_hh is not None or db_hh is not None:
            compiled_for = weight_constants(cell, H, call.arithmetic)
            blocks = triton.cdiv(H, compiled_for["BM"])
            dw, db = empty(_PARTS * G * H, H, call.wide), empty(_PARTS, G * H, call.wide)
            weight_kernel[(G * blocks, blocks, _PARTS)](
                start, tracks, spans, du, d_spans, swaps, ends, dw, db, T, B, K, H, S, **compiled_for
            )
            _fill(dw_hh, lambda: dw.view(_PARTS, G * H, H).sum(0))
            _fill(db_hh, lambda: db.sum(0))
        if K and not (dx is dw_ih is db_ih is None):
            compiled_for = gather_constants(cell, H, call.arithmetic)
            grid = T * B, triton.cdiv(H, compiled_for["BLOCK"])
            gather_kernel[grid](d_spans, swaps, ends, dx_proj, B, K, H, S, **compiled_for)
    for gradient, found in zip((dh0, dc0), d_start, strict=False):
        _fill(gradient, lambda found=found: found)
    if w_ih is None:
        _fill(dx, lambda: dx_proj.view(T, B, G * H))
    else:
        _fill(dx, lambda: (dx_proj @ w_ih).view(T, B, -1))
        _fill(dw_ih, lambda: dx_proj.t() @ x.flatten(0, 1))
        _fill(db_ih, lambda: dx_proj.sum(0))


def _fill(gradient: Tensor | None, found: Callable[[], Tensor]) -> None:
    if gradient is not None:
        gradient.copy_(found())


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]
