"""What the arguments of a pass have to be, and which of them can be looked at: asked by the operator, every kernel, the
layers and the samplers alike; and where a caller is warned."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from sire_fast import graph
from sire_fast.cells import CELLS


def fill_defaults(x: Tensor, swaps: Tensor, ends: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ends` and `lengths` as tensors: variants run to the last step of sequences x, (T, B, ...), of full length by
    default."""
    steps, batch = x.shape[:2]
    if ends is None and lengths is None:
        ends = x.new_full((batch, swaps.shape[1]), steps - 1, dtype=torch.int64)
    if lengths is None:
        lengths = x.new_full((batch,), steps, dtype=torch.int64)
    if ends is None:
        ends = (lengths - 1)[:, None].expand(-1, swaps.shape[1])
    return ends, lengths


def check_arguments(
    cell: str,
    x_proj: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor | None,
    lengths: Tensor | None,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
) -> None:
    """Raise a ValueError that names the first argument whose shape, dtype or device does not fit the others."""
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    gates = CELLS[cell].gates
    check_tensors(x_proj=x_proj, w_hh=w_hh, h0=h0, swaps=swaps)
    given = {"b_hh": b_hh, "c0": c0, "ends": ends, "lengths": lengths, "w_ih": w_ih, "b_ih": b_ih}
    check_tensors(**{name: tensor for name, tensor in given.items() if tensor is not None})
    if x_proj.dim() != 3:
        raise ValueError(f"x_proj: expected (T, B, {'G*H' if w_ih is None else 'I'}), got shape {tuple(x_proj.shape)}")
    if not x_proj.dtype.is_floating_point:
        raise ValueError(f"x_proj: expected a floating-point dtype, got {x_proj.dtype}")
    steps, batch, features = x_proj.shape
    if steps == 0 or batch == 0:
        raise ValueError(f"x_proj: expected at least one step and one sequence, got shape {tuple(x_proj.shape)}")
    if b_ih is not None and w_ih is None:
        raise ValueError("b_ih: expected None without w_ih, got a tensor")
    if w_ih is not None and (w_ih.dim() != 2 or features == 0):
        raise ValueError(
            f"w_ih: expected shape ({gates} * H, I), I at least 1, got {tuple(w_ih.shape)} for I={features}"
        )
    width = features if w_ih is None else w_ih.shape[0]
    if width == 0 or width % gates:
        name = "x_proj: expected a last" if w_ih is None else "w_ih: expected a first"
        raise ValueError(f"{name} dimension of {gates} * H for {cell}, got {width}")
    hidden = width // gates
    if (c0 is None) == (cell == "lstm"):
        raise ValueError(f"c0: expected {'a tensor' if c0 is None else 'None'} for {cell}, got the opposite")
    if swaps.dim() != 3 or swaps.shape[0] != batch or swaps.shape[2] != 2:
        raise ValueError(f"swaps: expected shape ({batch}, K, 2), got {tuple(swaps.shape)}")
    dtype, device = x_proj.dtype, x_proj.device
    for name, tensor, shape, wanted in (
        ("w_ih", w_ih, (width, features), dtype),
        ("b_ih", b_ih, (width,), dtype),
        ("w_hh", w_hh, (width, hidden), dtype),
        ("b_hh", b_hh, (width,), dtype),
        ("h0", h0, (batch, hidden), dtype),
        ("c0", c0, (batch, hidden), dtype),
        ("swaps", swaps, swaps.shape, torch.int64),
        ("ends", ends, swaps.shape[:2], torch.int64),
        ("lengths", lengths, (batch,), torch.int64),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != wanted:
            of_x = ", the dtype of x_proj" if wanted == dtype else ""
            raise ValueError(f"{name}: expected {wanted}{of_x}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, the device of x_proj, got {tensor.device}")


def check_tensors(**tensors: object) -> None:
    """Raise a ValueError that names the first that is none."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got a {type(tensor).__name__}")


def check_lengths(steps: int, batch: int, lengths: Tensor) -> None:
    """Raise a ValueError unless `lengths` can be those of so many sequences; values where they can be read."""
    if not isinstance(lengths, Tensor):
        raise ValueError(f"lengths: expected ({batch},) int64, got a {type(lengths).__name__}")
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths: expected ({batch},) int64, got {tuple(lengths.shape)} {lengths.dtype}")
    if readable(lengths) and (outside := (lengths < 1) | (lengths > steps)).any():
        raise ValueError(f"lengths: expected 1 <= length <= {steps}, got {lengths[outside][0]}")


def check_swaps(x: Tensor, swaps: Tensor, lengths: Tensor | None) -> None:
    """Raise a ValueError unless `swaps` are pairs of positions inside the sequences x, (T, B, ...): what a sampler has
    to return."""
    steps, batch = x.shape[:2]
    if swaps.dim() != 3 or swaps.shape[::2] != (batch, 2) or swaps.dtype != torch.int64:
        raise ValueError(f"swaps: expected ({batch}, K, 2) int64, got {tuple(swaps.shape)} {swaps.dtype}")
    if swaps.device != x.device:
        raise ValueError(f"swaps: expected on {x.device}, the device of x, got {swaps.device}")
    check_positions(steps, swaps, *fill_defaults(x, swaps, None, lengths))


def check_positions(steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor) -> None:
    """Raise a ValueError if a length, a swap or an end lies outside its sequence: 0 <= i <= j <= end < length <= T.

    Tensors of another device than the CPU are not looked at: that would make the host wait for it. Nor are those of a
    trace; the operator does it when it runs.
    """
    if not readable(swaps):
        return
    check_lengths(steps, len(swaps), lengths)
    i, j = swaps.unbind(-1)
    limit = lengths[:, None]
    # one test for the usual case, in which nothing is wrong
    if not ((i < 0) | (i > j) | (j > ends) | (ends >= limit)).any():
        return
    for name, wrong, expected in (
        ("swaps", (i < 0) | (j >= limit), "positions inside the sequence"),
        ("swaps", i > j, "i <= j"),
        ("ends", ends >= limit, "an end inside the sequence"),
        ("ends", ends < j, "an end at or after the swap"),
    ):
        if wrong.any():
            b, k = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: expected {expected}, got swap ({i[b, k]}, {j[b, k]}) with end {ends[b, k]} "
                f"in sequence {b} of length {lengths[b]}"
            )


def has_values(*tensors: Tensor) -> bool:
    """Whether tensors have values that can be read, and none is a stand-in of a trace (a fake tensor, say) or of a
    transform of torch.func."""
    if torch.compiler.is_compiling() or graph.in_transform():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta for t in tensors)


def readable(positions: Tensor) -> bool:
    """Whether positions can be looked at without making the host wait for a device."""
    return positions.device.type == "cpu" and has_values(positions)


def warn(message: str) -> None:
    """Warn at the line of the program that has called a layer."""
    frame, level = sys._getframe(1), 3
    while frame.f_back and frame.f_back.f_globals.get("__name__", "").partition(".")[0] in ("sire_fast", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"sire_fast: {message}", stacklevel=level)
