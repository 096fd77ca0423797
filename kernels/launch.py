"""How the kernels are launched: sizes of tiles by what a chip holds, and the work of each program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sire_fast.cells import CELLS as EQUATIONS
from sire_fast.kernels.cells import CELLS
from sire_fast.kernels.swap_rnn import backward_kernel, forward_kernel, gather_kernel, weight_kernel


class Launch(NamedTuple):
    """Attributes:
    rows: rows of a tile, originals and variants.
    resident: whether W_hh stays on chip.
    block: units of a step that are computed at a time; all of them if resident.
    inner: columns of W_hh that come at a time, where it streams.
    warps, stages: as Triton has them.
    """

    rows: int
    resident: bool
    block: int
    inner: int
    warps: int
    stages: int


def launch(cell: str, hidden: int, dtype: torch.dtype, capability: int) -> Launch:
    padded = max(16, triton.next_power_of_2(hidden))
    weight = EQUATIONS[cell].gates * padded * padded * dtype.itemsize
    if weight <= 100 * 1024:
        return Launch(16, True, padded, 16, 8, 1)
    return Launch(16, False, 64, 64, 8, 2)


class Plan(NamedTuple):
    """Attributes:
    sequences: N, of a program.
    in_step: V, variants of each that run in lock step with it.
    """

    sequences: int
    in_step: int


def plan(T: int, B: int, K: int, S: int, rows: int, programs: int) -> Plan:
    """The fewest steps behind each other, where `programs` run at once; among equals the smallest programs."""

    def steps(candidate: Plan) -> int:
        N, V = candidate
        waves = -(-B // (N * programs))
        return waves * (T + -(-N * (K - V) // rows) * S)

    candidates = [Plan(N, V) for N in range(1, min(rows, B) + 1) for V in sorted({0, min(K, rows // N - 1)})]
    return min(candidates, key=steps)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "ieee"


def _states(*tensors: Tensor | None, cell: str) -> tuple[Tensor | None, ...]:
    return tensors[: EQUATIONS[cell].states]


def forward(cell: str, train: bool, recompute: bool, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths = inputs
    output, h_n, c_n, variants, penalty, cells, variant_cells, gates, spans = outputs
    steps, batch, _ = x.shape
    hidden, K = h0.shape[1], swaps.shape[1]
    if w_ih is not None:
        x = torch.nn.functional.linear(x, w_ih, b_ih)
    wide = spans.dtype
    how = launch(cell, hidden, x.dtype, _capability(x.device))
    if train and K:
        S = max(1, spans.shape[0] // (batch * K))
    else:
        S = 1 if how.resident else 2  # the state before a step, and after it
        if not how.resident and K:
            spans = x.new_empty(2 * batch * K, EQUATIONS[cell].states * hidden, dtype=wide)
    N, V = plan(steps, batch, K, S if train else steps, how.rows, _programs(x.device))
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(batch, N),)](
            x.contiguous(), w_hh.contiguous(), b_hh if b_hh is None else b_hh.contiguous(),
            tuple(s.to(wide).contiguous() for s in _states(h0, c0, cell=cell)),
            swaps.contiguous(), ends.contiguous(), lengths.contiguous(),
            _states(output, cells, cell=cell), _states(h_n, c_n, cell=cell), _states(variants, variant_cells, cell=cell),
            penalty, gates, spans,
            steps, batch, K, hidden, S, N, V,
            STEP=CELLS[cell].step, G=EQUATIONS[cell].gates, KEPT=0 if recompute or not train else CELLS[cell].kept,
            SPANS=train or not how.resident, RESIDENT=how.resident, PRECISION=_precision(x.dtype),
            R=how.rows, BH=how.block, BK=how.inner, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip


def backward(
    cell: str, recompute: bool, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> None:
    d_output, d_h_n, d_c_n, d_variants, d_penalty, d_cells, d_variant_cells = inputs[:7]
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths, output, cells, gates, spans = inputs[7:]
    dx, dw_ih, db_ih, dw_hh, db_hh, dh0, dc0 = gradients
    steps, batch, _ = x.shape
    hidden, K = h0.shape[1], swaps.shape[1]
    G, D, states = EQUATIONS[cell].gates, CELLS[cell].gradients, EQUATIONS[cell].states
    wide = spans.dtype
    x_proj = torch.nn.functional.linear(x, w_ih, b_ih) if w_ih is not None and recompute else x
    how = launch(cell, hidden, x.dtype, _capability(x.device))
    S = max(1, spans.shape[0] // (batch * K)) if K else 1
    N, V = plan(steps, batch, K, S, how.rows, _programs(x.device))
    programs = triton.cdiv(batch, N)
    swaps, ends = swaps.contiguous(), ends.contiguous()
    start = tuple(s.to(wide).contiguous() for s in _states(h0, c0, cell=cell))
    tracks = _states(output, cells, cell=cell)
    end_times, end_order = ends.sort(dim=1, descending=True, stable=True)
    i, j = swaps.unbind(-1)
    start_times, start_order = torch.where(i < j, i, -1).sort(dim=1, descending=True, stable=True)
    dx_proj = x.new_empty(steps, batch, G * hidden)
    du = torch.empty_like(dx_proj)
    d_spans = x.new_empty(batch * K * S, D * hidden)
    d_first = x.new_empty(batch * K, states * hidden, dtype=wide)
    carry = x.new_empty(0 if how.resident else programs * how.rows, states * hidden, dtype=wide)
    d_start = tuple(torch.empty_like(s) for s in start)

    def plain(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(t if t is None else t.contiguous() for t in tensors)

    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            plain(*_states(d_output, d_cells, cell=cell)), plain(*_states(d_h_n, d_c_n, cell=cell)),
            plain(*_states(d_variants, d_variant_cells, cell=cell)), *plain(d_penalty),
            *plain(x_proj, w_hh, b_hh), start, swaps, ends, *plain(lengths), tracks, gates, spans,
            end_times, end_order, start_times, start_order,
            dx_proj, du, d_spans, d_first, carry, d_start,
            steps, batch, K, hidden, S, N, V,
            STEP=CELLS[cell].step, GRADIENT=CELLS[cell].backward, G=G, KEPT=CELLS[cell].kept, D=D,
            RECOMPUTE=recompute, RESIDENT=how.resident, PRECISION=_precision(x.dtype),
            R=how.rows, BH=how.block, BK=how.inner, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        if dw_hh is not None or db_hh is not None:
            parts = 4
            block = 32
            dw, db = x.new_empty(parts, *w_hh.shape, dtype=wide), x.new_empty(parts, len(w_hh), dtype=wide)
            weight_kernel[(G * triton.cdiv(hidden, block), triton.cdiv(hidden, block), parts)](
                start, tracks, spans, du, d_spans, swaps, ends, dw, db, steps, batch, K, hidden, S,
                G=G, D=D, PRECISION=_precision(x.dtype), BM=block, BN=block, BR=32, num_warps=4,
            )  # fmt: skip
            for gradient, part in ((dw_hh, dw), (db_hh, db)):
                if gradient is not None:
                    gradient.copy_(part.sum(0))
        for gradient, of in zip((dh0, dc0), d_start, strict=False):
            if gradient is not None:
                gradient.copy_(of)
        if dx is None and dw_ih is None and db_ih is None:
            return
        if K:
            block = min(1024, triton.next_power_of_2(hidden))
            gather_kernel[(steps * batch, triton.cdiv(hidden, block))](
                d_spans, swaps, ends, dx_proj, batch, K, hidden, S, WIDE=wide_of(wide), G=G, D=D, BLOCK=block, num_warps=4
            )
    if w_ih is None:
        dx.copy_(dx_proj)
        return
    if dx is not None:
        torch.matmul(dx_proj, w_ih, out=dx)
    flat = dx_proj.flatten(0, 1)
    if dw_ih is not None:
        torch.matmul(flat.t(), x.flatten(0, 1), out=dw_ih)
    if db_ih is not None:
        torch.sum(flat, 0, out=db_ih)


def wide_of(dtype):
    import triton.language as tl
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]
