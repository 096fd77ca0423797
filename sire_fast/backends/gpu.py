"""What the backends of GPUs have in common: the tiles that rows run in, what is kept, and what torch does around the
kernels."""

from __future__ import annotations

import bisect
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sire_fast import validation
from sire_fast.cells import CELLS

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """A function of a call that torch.compile runs and does not look into: what it returns stands in the graph. Where a
    trace has a symbol for H it gets a number. As torch.compiler.assume_constant_result, which loads the compiler."""

    @functools.wraps(function)
    def of_numbers(*args: Any, hidden_size: int, **others: Any) -> Any:
        return function(*args, hidden_size=operator.index(hidden_size), **others)

    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # of a function
    return of_numbers  # type: ignore[return-value]


# (cell, padded H, dtype, capability) -> who was the fastest there, as bench.tune prints it: a backend, or "torch" for
# cuDNN on the stacked variants
FASTEST: dict[tuple[str, int, str, int], str] = {}


def padded(hidden_size: int) -> int:
    """H as kernels and the tables of what was measured have it: a power of two, 16 at least."""
    return max(16, 1 << (hidden_size - 1).bit_length())


@constant
def fastest(*, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_size: int) -> str | None:
    """Who was measured to be the fastest on such a GPU; None if nobody has measured it."""
    if not FASTEST or torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return FASTEST.get((cell, padded(hidden_size), name_of(dtype), 10 * major + minor))


# (cell, dtype, backend) -> microseconds that bench.model predicts for each time step of a training step, forward and
# backward, of 64 sequences with 8 variants each on an H100, where H is that of PREDICTED_HIDDEN; inf where it cannot
# serve. `python -m bench.model --table` prints it. Not measured, and good to 40 %
PREDICTED_HIDDEN = (32, 64, 128, 256, 512, 1024)
PREDICTED: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("rnn_tanh", "float32", "triton"): (1.9, 3.2, 7.7, 61.2, 224.1, 857.1),
    ("rnn_tanh", "float32", "cuda"): (3.2, 3.1, 6.0, 20.6, 86.4, math.inf),
    ("rnn_tanh", "bfloat16", "triton"): (1.3, 1.8, 3.0, 6.7, 66.9, 225.6),
    ("rnn_tanh", "bfloat16", "cuda"): (2.8, 2.7, 3.3, 9.5, 28.7, 150.8),
    ("rnn_relu", "float32", "triton"): (1.7, 3.0, 7.5, 60.3, 222.4, 853.6),
    ("rnn_relu", "float32", "cuda"): (3.1, 2.9, 5.7, 19.7, 83.1, math.inf),
    ("rnn_relu", "bfloat16", "triton"): (1.2, 1.6, 2.7, 5.8, 65.3, 222.1),
    ("rnn_relu", "bfloat16", "cuda"): (2.7, 2.7, 3.3, 9.4, 28.3, 149.3),
    ("gru", "float32", "triton"): (3.9, 7.2, 30.0, 103.2, 381.2, 1464.1),
    ("gru", "float32", "cuda"): (5.7, 6.7, 12.3, 40.0, 153.5, math.inf),
    ("gru", "bfloat16", "triton"): (2.3, 3.2, 6.2, 35.0, 106.5, 361.0),
    ("gru", "bfloat16", "cuda"): (3.6, 3.6, 5.3, 15.2, 45.5, 232.3),
    ("lstm", "float32", "triton"): (5.3, 9.3, 38.8, 133.5, 493.6, 1895.7),
    ("lstm", "float32", "cuda"): (8.7, 9.2, 17.1, 52.8, 181.6, math.inf),
    ("lstm", "bfloat16", "triton"): (3.4, 4.6, 9.5, 43.0, 129.9, 438.8),
    ("lstm", "bfloat16", "cuda"): (4.5, 4.3, 6.7, 18.7, 45.5, 260.8),
}


# of them, what cuDNN is expected to take for the same on stacked variants: twice the 14 us that it takes forward where
# W_hh does not stay on chip. Not measured
CUDNN = 28.0


def predicted(*, cell: str, dtype: torch.dtype, hidden_size: int) -> dict[str, float]:
    """Microseconds of PREDICTED at the next larger H, by backend, the fastest first; empty where there are none."""
    at = bisect.bisect_left(PREDICTED_HIDDEN, hidden_size)
    name = "bfloat16" if dtype == torch.float16 else name_of(dtype)
    rows = {backend: row for (*call, backend), row in PREDICTED.items() if call == [cell, name]}
    us = {backend: row[at] for backend, row in rows.items() if at < len(row)}
    return dict(sorted(us.items(), key=lambda item: item[1]))


@constant
def slower_than_torch(backend: str, *, cell: str, dtype: torch.dtype, hidden_size: int) -> list[str]:
    """The reason why cuDNN, on the stacked variants, is expected to be faster than a kernel."""
    us = predicted(cell=cell, dtype=dtype, hidden_size=hidden_size).get(backend, math.inf)
    if us <= CUDNN:
        return []
    told = f"{us:.0f} us" if us < math.inf else "longer"
    return [f"{backend}: at H={hidden_size} a step is predicted to take {told}, cuDNN's about {CUDNN:.0f}"]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


def why_not_here(backend: str, device: torch.device) -> list[str]:
    """The reason why no kernel for NVIDIA's GPUs runs with this torch: one for AMD's calls those cuda too, and another
    may find none."""
    if hip := torch.version.hip:
        return [f"{backend}: runs on NVIDIA's GPUs, got torch built for AMD's, with HIP {hip}"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return [f"{backend}: torch finds no GPU here, got a tensor on {device}"]
    return []


def why_not_on(backend: str, device: torch.device, on: str = "cuda") -> list[str]:
    """The reason why no kernel runs on a device of another type."""
    return [] if device.type == on else [f"{backend}: runs on a GPU, got a tensor on {device}"]


def why_not_capability(backend: str, device: torch.device, capability: tuple[int, int]) -> list[str]:
    """The reason why a GPU is too old for the kernels."""
    if capability >= _LEAST_CAPABILITY:
        return []
    least, told = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, capability))
    return [f"{backend}: needs compute capability {least} or above, {device} has {told}"]


def why_not_dtype(backend: str, dtype: torch.dtype) -> list[str]:
    """The reason why no kernel computes in a dtype."""
    return [] if dtype in _DTYPES else [f"{backend}: computes in float32, bfloat16 and float16, got {dtype}"]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of inputs, weights and kept gates; states are at least float32."""
    return dtype


empty = Tensor.new_empty


def allows_tf32() -> bool:
    """Whether products of float32 may be TF32 on a GPU, told to torch in either way: torch.set_float32_matmul_precision
    sets this attribute too, while torch.get_float32_matmul_precision raises where the attribute was set."""
    return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


class Plan(NamedTuple):
    """Attributes:
    sequences: N, of a tile.
    in_step: V, variants of each that run in lock step with it.
    """

    sequences: int
    in_step: int


@functools.lru_cache(1024)
def plan(T: int, B: int, K: int, S: int, rows: int, tiles: int) -> Plan:
    """The fewest steps behind each other where `tiles` run at once; among equals the smallest tiles."""

    candidates = [Plan(N, V) for N in range(1, min(rows, B) + 1) for V in sorted({0, min(K, rows // N - 1)})]
    return min(candidates, key=functools.partial(steps, T, B, K, S, rows, tiles))


def steps(T: int, B: int, K: int, S: int, rows: int, tiles: int, plan: Plan) -> int:
    """Behind each other, of a plan."""
    waves = _ceil_div(B, plan.sequences * tiles)
    return waves * (T + _ceil_div(plan.sequences * (K - plan.in_step), rows) * S)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Call:
    """Sizes of a call.

    Attributes:
        cell: a key of CELLS.
        T, B, K, H: steps, sequences, variants of each, units.
        S: rows of `spans` for each variant.
        wide: dtype of states and sums.
    """

    cell: str
    T: int
    B: int
    K: int
    H: int
    S: int
    wide: torch.dtype

    @classmethod
    def of(cls, cell: str, x: Tensor, h0: Tensor, swaps: Tensor, spans: Tensor | None) -> Call:
        """Of a call that keeps `spans`, or keeps none.

        Raises:
            ValueError: the kernels, which count rows, or blocks of threads, in 32 bits, cannot count those of the call.
        """
        (T, B, _), K, H = x.shape, swaps.shape[1], h0.shape[1]
        # kept or not, at least the state before a step and that after it
        S = 2 if spans is None or K == 0 else spans.shape[0] // (B * K)
        if (rows := B * (T + 2 * K * S)) >= 1 << 31:
            raise ValueError(f"swaps: expected T*B + 2*B*K*S, S the longest span, below 2**31, got {rows}")
        return cls(cell, T, B, K, H, S, torch.promote_types(x.dtype, torch.float32))

    def states(self, first: Any, second: Any) -> tuple[Any, ...]:
        """Of h alone or of h and c."""
        return (first, second)[: CELLS[self.cell].states]

    def start(self, h0: Tensor, c0: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(s.to(self.wide).contiguous() for s in self.states(h0, c0))


def span_rows(steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor, longest: int | None) -> int:
    """As many rows for every variant as the longest span may have: no one waits for the device to tell them."""
    validation.check_positions(steps, swaps, ends, lengths)
    return swaps.shape[0] * swaps.shape[1] * min(steps, longest or steps)


def kept(
    cell: str, gates: int, steps: int, batch: int, hidden: int, span_rows: int, train: bool, recompute: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the outputs `gates`, of so many kept values of H, the originals' before the spans', and `spans`, which
    holds states alone."""
    rows = steps * batch + span_rows if train and not recompute else 0
    return (rows, gates * hidden), (span_rows, CELLS[cell].states * hidden)


def check(train: bool, inputs: Sequence[Any], spans: Tensor) -> None:
    """A ValueError if positions on the CPU, of inputs in the order of the operator's schema, lie outside their
    sequences, or their spans are too long for `spans`."""
    x, *_, swaps, ends, lengths = inputs
    validation.check_positions(x.shape[0], swaps, ends, lengths)
    if train and swaps.numel() and swaps.device.type == "cpu":
        needed, rows = int((ends - swaps[..., 0]).max()) + 1, spans.shape[0] // swaps[..., 0].numel()
        if rows < needed:
            raise ValueError(f"longest: expected at least {needed}, the longest span, got {rows}")


def events(swaps: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In which order an original meets its variants on its way back: when they end, the latest first, and whose ends
    these are; and so for those that start, -1 for the others. All (B, K)."""
    if not swaps.numel():
        return ends, ends, ends, ends
    i, j = swaps.unbind(-1)
    both = torch.stack((ends, torch.where(i < j, i, -1)))
    (end_times, start_times), (end_order, start_order) = both.sort(dim=-1, descending=True, stable=True)
    return end_times, end_order, start_times, start_order


def projected(x: Tensor, w_ih: Tensor | None, b_ih: Tensor | None) -> Tensor:
    """In the dtype of x, as the kernels read it: autocast, where it is on, was heeded before, or came on since then."""
    if w_ih is None:
        return x
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x, w_ih, b_ih)


def fill_projected(
    dx_proj: Tensor,
    x: Tensor,
    lengths: Tensor,
    w_ih: Tensor,
    dx: Tensor | None,
    dw_ih: Tensor | None,
    db_ih: Tensor | None,
) -> None:
    """Fill the gradients of what was projected, from that of the projection, (T*B, G*H)."""
    if dx is not None:
        torch.mm(dx_proj, w_ih, out=dx.flatten(0, 1))
    if dw_ih is not None:
        torch.mm(dx_proj.t(), _inside(x, lengths).flatten(0, 1), out=dw_ih)
    if db_ih is not None:
        torch.sum(dx_proj, 0, out=db_ih)


def _inside(x: Tensor, lengths: Tensor) -> Tensor:
    """x, and 0 beyond the length of a sequence: what stands there may be NaN, which a gradient of 0 does not cancel.
    Whether anything does, the host cannot know without waiting for the device."""
    steps = torch.arange(len(x), device=x.device)[:, None]
    return torch.where((steps < lengths)[..., None], x, 0)


def fill(gradient: Tensor | None, found: Tensor) -> None:
    """Fill a gradient if it is wanted."""
    if gradient is not None:
        gradient.copy_(found)
