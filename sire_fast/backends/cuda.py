"""The backend "cuda": hands tensors to the kernels of csrc/cuda/ as raw pointers, on the current stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sire_fast.backends import gpu
from sire_fast.backends.gpu import Call, name_of
from sire_fast.cells import CELLS

_cuda: Any = None
MISSING = ""
try:
    _cuda = import_module("sire_fast._cuda")
except ImportError as error:
    MISSING = str(error)

_CLUSTERS = (9, 0)  # the capability from which on there are clusters, of 8 blocks at most
_LARGE_CLUSTERS = (9, 10)  # the major capabilities that have some of 16


class Chip(NamedTuple):
    """Attributes:
    capability: major and minor.
    processors: of which each runs one block.
    shared: bytes of shared memory that a block may have.
    device: None for a chip that is not there, and cannot be asked.
    """

    capability: tuple[int, int]
    processors: int
    shared: int
    device: torch.device | None = None

    @property
    def largest_cluster(self) -> int:
        if self.capability < _CLUSTERS:
            return 1
        return 16 if self.capability[0] in _LARGE_CLUSTERS else 8


class Group(NamedTuple):
    """Blocks that share the units of a tile.

    Attributes:
        blocks: how many.
        mailbox: whether they meet in global memory; else they are a cluster, or one alone.
    """

    blocks: int
    mailbox: bool


@gpu.constant
def why_not(*, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str]:
    """Reasons why these kernels cannot serve a call."""
    if reasons := gpu.why_not_here("cuda", device):
        return reasons
    if _cuda is None:
        built = "built where a GPU is visible, or with FORCE_CUDA=1"
        return [f"cuda: the extension sire_fast._cuda, which is {built}, cannot be loaded: {MISSING}"]
    reasons = gpu.why_not_on("cuda", device, _cuda.device)
    if other := gpu.why_not_dtype("cuda", dtype):
        return reasons + other
    if not _cuda.blocks(hidden_size, name_of(dtype)):
        size = f"H={hidden_size} in {name_of(dtype)}"
        return [*reasons, f"cuda: W_hh of {size} does not fit the registers of any number of blocks"]
    if device.type == _cuda.device:
        chip = _chip(device)
        if too_weak := gpu.why_not_capability("cuda", device, chip.capability):
            reasons += too_weak
        elif reason := _why_no_code(chip):
            reasons.append(reason)
        else:
            reasons += _why_no_group(cell, name_of(dtype), hidden_size, chip, device)
    return reasons


def _why_no_group(cell: str, dtype: str, hidden: int, chip: Chip, device: torch.device) -> list[str]:
    """The reason why a GPU cannot run the kernels, in CUDA's own words where it fails to say how many clusters it runs:
    of an extension that was built for another GPU, say."""
    try:
        if group(cell, dtype, hidden, chip):
            return []
    except RuntimeError as error:
        return [str(error)]
    has = f"{chip.processors} multiprocessors with {chip.shared >> 10} KiB"
    return [f"cuda: {cell} of H={hidden} in {dtype} fits no group of blocks of {device}, which has {has}"]


def _why_no_code(chip: Chip) -> str:
    """The reason why nothing that the extension holds runs on a chip with this driver; "" if something does. Machine
    code is for chips of its major capability and wants a driver of the same major version of CUDA; PTX is for all later
    chips and wants a driver as new."""
    machine_code = ptx = False
    for name in _cuda.architectures.split():
        number = name.removesuffix("+PTX")
        built_for = tuple(map(int, number.rstrip("af").split(".")))
        one_alone, one_family = number.endswith("a"), number.endswith("f")
        alike = built_for[0] == chip.capability[0] and built_for <= chip.capability
        machine_code |= built_for == chip.capability if one_alone else alike
        ptx |= name != number and built_for <= chip.capability and not (one_alone or one_family)
    if not (machine_code or ptx):
        has = ".".join(map(str, chip.capability))
        return f"cuda: sire_fast._cuda was built for capability {_cuda.architectures}, and this GPU has {has}"
    driver, runtime = _cuda.versions()
    least = runtime // 1000 * 1000 if machine_code else runtime
    if driver >= least:
        return ""
    told, needed = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, least))
    return f"cuda: sire_fast._cuda was built for CUDA {needed}, which needs a newer driver: this one knows {told}"


def _chip(device: torch.device) -> Chip:
    found: Any = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin
    return Chip((found.major, found.minor), found.multi_processor_count, shared, torch.device("cuda", _index(device)))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache(1024)
def group(cell: str, dtype: str, hidden: int, chip: Chip) -> Group | None:
    """The smallest cluster whose blocks hold W_hh in their registers and all else in their shared memory; or, where no
    cluster does, or none of that size has room, the smallest group with a mailbox; None if that does not fit either."""
    fewest = _cuda.blocks(hidden, dtype)
    clusters = [Group(blocks, False) for blocks in (1, 2, 4, 8, 16) if fewest <= blocks <= chip.largest_cluster]
    others = [Group(blocks, True) for blocks in (fewest, 2 * fewest) if blocks > 1]
    for found in clusters + others:
        fits = _cuda.shared_bytes(cell, dtype, hidden, *found) <= chip.shared
        if fits and at_once(cell, dtype, hidden, found, chip):
            return found
    return None


@functools.lru_cache(1024)
def at_once(cell: str, dtype: str, hidden: int, of: Group, chip: Chip) -> int:
    """How many groups run at once. A cluster wants neighbours, which some processors lack: a device tells itself."""
    most = chip.processors // of.blocks
    if not most or of.mailbox or of.blocks == 1 or chip.device is None:
        return most
    with torch.cuda.device(_index(chip.device) if chip.device.type == "cuda" else -1):
        return min(most, _cuda.clusters(cell, dtype, hidden, of.blocks))


def files() -> list[Path]:
    return [Path(_cuda.__file__)]


computed_in, empty, span_rows = gpu.computed_in, gpu.empty, gpu.span_rows


def kept(
    cell: str, steps: int, batch: int, hidden: int, span_rows: int, train: bool, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return gpu.kept(cell, _cuda.saved_gates(cell), steps, batch, hidden, span_rows, train, recompute)


def forward(
    cell: str, arithmetic: str, train: bool, recompute: bool, inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    gpu.check(train, inputs, outputs[-1])
    x, w_ih, b_ih, *others = inputs
    output, h_n, c_n, variants, penalty, cells, variant_cells, gates, spans = outputs
    _forward(
        cell, gpu.projected(x, w_ih, b_ih), others, (output, cells), (h_n, c_n), (variants, variant_cells), penalty,
        gates if gates.numel() else None, spans if train else None,
    )  # fmt: skip


def _forward(
    cell: str,
    x_proj: Tensor,
    others: Sequence[Any],
    tracks: tuple[Tensor, Tensor | None],
    last: tuple[Tensor, Tensor | None],
    ended: tuple[Tensor, Tensor | None],
    penalty: Tensor,
    gates: Tensor | None,
    spans: Tensor | None,
) -> None:
    w_hh, b_hh, h0, c0, swaps, ends, lengths = others
    call = Call.of(cell, x_proj, h0, swaps, spans)
    start = _pair(call.start(h0, c0))
    inputs = (x_proj, w_hh, b_hh, *start, swaps, ends, lengths)
    results = (*tracks, *last, *ended, penalty, gates, spans)
    _launch("forward", call, call.S if spans is not None else call.T, x_proj, (*inputs, *results))


def backward(
    cell: str,
    arithmetic: str,
    recompute: bool,
    inputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
) -> None:
    d_output, d_h_n, d_c_n, d_variants, d_penalty, d_cells, d_variant_cells, *inputs = inputs
    x, w_ih, b_ih, *others, output, cells, gates, spans = inputs
    w_hh, b_hh, h0, c0, swaps, ends, lengths = others
    dx, dw_ih, db_ih, dw_hh, db_hh, dh0, dc0 = gradients
    call = Call.of(cell, x, h0, swaps, spans)
    T, B, K, H, S = call.T, call.B, call.K, call.H, call.S
    G, states, saved = CELLS[cell].gates, CELLS[cell].states, _cuda.saved_gates(cell)
    if recompute and saved:
        x_proj = gpu.projected(x, w_ih, b_ih)
        gates = x.new_empty(kept(cell, T, B, H, B * K * S, True, False)[0])
        last, ended = (torch.empty_like(t) for t in (output[0], spans[: B * K, :H]))
        # all but the gates become what they were
        _forward(
            cell, x_proj, others, (output, cells), (last, torch.empty_like(last)), (ended, torch.empty_like(ended)),
            spans.new_empty(B, K), gates, spans,
        )  # fmt: skip
    start = call.start(h0, c0)
    D = _cuda.gradients(cell)
    projected = w_ih is not None
    dx_proj = x.new_empty(T * B, G * H) if projected or dx is None else dx.view(T * B, G * H)
    du, d_spans = x.new_empty(T * B, G * H), x.new_empty(B * K * S, D * H)
    d_first = spans.new_empty(B * K, (D + states) * H)
    d_start = tuple(torch.empty_like(s) for s in start)
    incoming = (d_output, d_cells, d_h_n, d_c_n, d_variants, d_variant_cells, d_penalty)
    results = (dx_proj, du, d_spans, d_first, *_pair(d_start))
    _launch(
        "backward", call, S, x,
        (None, w_hh, b_hh, *_pair(start), swaps, ends, lengths, *incoming, output, cells, gates, spans,
         *gpu.events(swaps, ends), *results),
    )  # fmt: skip
    if K:
        _run("gather", cell, x, (T, B, K, H, S), (swaps, ends, spans, d_spans, d_first, dx_proj))
    if dw_hh is not None:
        torch.mm(du[:B].t(), start[0].to(x.dtype), out=dw_hh)
        dw_hh.addmm_(du[B:].t(), output[:-1].flatten(0, 1).to(x.dtype))
        if K:
            dw_hh.addmm_(d_spans[1:, : G * H].t(), spans[:-1, :H].to(x.dtype))
    if db_hh is not None:
        same = (G - (D > G)) * H  # what the projected input has for gradients too, those of variants included
        torch.sum(dx_proj[:, :same], 0, out=db_hh[:same])
        if D > G:
            torch.add(du[:, same:].sum(0), d_spans[:, same : G * H].sum(0), out=db_hh[same:])
    for gradient, found in zip((dh0, dc0), d_start, strict=False):
        gpu.fill(gradient, found)
    if projected:
        gpu.fill_projected(dx_proj, x, lengths, w_ih, dx, dw_ih, db_ih)


def groups(device: torch.device) -> list[Group]:
    """Some that a device can run, small and large; none where it or the extension is not there."""
    if why_not(cell="gru", dtype=torch.float32, device=device, hidden_size=16):
        return []
    chip = _chip(device)
    clusters = [Group(blocks, False) for blocks in (1, 2, 4, 8, 16) if blocks <= chip.largest_cluster]
    clusters = [found for found in clusters if at_once("gru", "float32", 16 * found.blocks, found, chip)]
    return clusters + [Group(blocks, True) for blocks in (2, 16, chip.processors) if blocks <= chip.processors]


def barriers(count: int, of: Group, x: Tensor) -> None:
    """Start so many barriers of a group, one behind the other, on the device of x: what a step takes at least."""
    arrived = _arrived(of.blocks, x) if of.mailbox else None
    with torch.cuda.device_of(x):
        _cuda.barriers(count, of.blocks, _address(arrived), _stream(x.device))


def _arrived(blocks: int, x: Tensor) -> Tensor:
    return torch.zeros(blocks, dtype=torch.int32, device=x.device)


def _pair(states: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return (*states, None)[:2]


def _launch(kernel: str, call: Call, longest: int, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Run the tiles of a pass, whose spans have up to so many steps."""
    chip = _chip(x.device)
    size = call.cell, name_of(x.dtype), call.H
    found = group(*size, chip)
    assert found is not None  # or why_not would have refused the call
    blocks, with_mailbox = found
    most = at_once(*size, found, chip)
    plan = gpu.plan(call.T, call.B, call.K, longest, _cuda.rows, most)
    count = min(most, -(-call.B // plan.sequences))
    mailbox = arrived = None
    if with_mailbox:
        mailbox = torch.empty(count * _cuda.mailbox_bytes(*size, blocks), dtype=torch.uint8, device=x.device)
        arrived = _arrived(count * blocks, x)
    numbers = call.T, call.B, call.K, call.H, longest, *plan, count, blocks, int(gpu.allows_tf32())
    _run(kernel, call.cell, x, numbers, (mailbox, arrived, *tensors))


def _run(kernel: str, cell: str, x: Tensor, numbers: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
    """Start a kernel on the current stream of a device."""
    addresses = [*map(_address, tensors)]
    with torch.cuda.device_of(x):
        getattr(_cuda, kernel)(cell, name_of(x.dtype), numbers, addresses, _stream(x.device))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
