"""Finds what is fastest on this GPU, `python -m bench.tune`: the launch of the Triton kernels, for TUNED in
kernels/launch.py, and then, with that launch, the backend, or cuDNN, for FASTEST in sire_fast/backends/gpu.py.

For each cell, H and arithmetic, a training step of all candidates that compile is timed in turns. What wins is only
printed; check it with bench.gpu after it stands in the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import triton

from bench.gpu import Item, kernels, measure
from sire_fast import functional, swaps
from sire_fast.cells import CELLS
from sire_fast.kernels import launch as launches
from sire_fast.kernels.launch import Launch
from sire_fast.lab.benchmark import Setting, quartiles

HIDDEN = (32, 64, 128, 256, 512, 1024)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS, SEQUENCES, SWAPS = 256, 64, 8  # a step of it all is latency, as in most training
ROUNDS, REPEAT = 7, 5


def candidates(padded: int) -> list[Launch]:
    """Those worth a compilation."""
    resident = [Launch(rows, True, padded, 32, warps, 1) for rows in (16, 32) for warps in (4, 8, 16)]
    streamed = [
        Launch(16, False, block, inner, warps, stages)
        for block in (32, 64, 128)
        for inner in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3)
        if block <= padded
    ]
    return (resident if padded <= 256 else []) + (streamed if padded >= 64 else [])


def step(cell: str, hidden: int, dtype: torch.dtype) -> None:
    """A forward and backward, as a layer asks for it."""
    generator = torch.Generator("cuda").manual_seed(0)
    width = CELLS[cell].gates * hidden

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, h = normal(STEPS, SEQUENCES, width).requires_grad_(), normal(SEQUENCES, hidden)
    w = (normal(width, hidden) / hidden**0.5).requires_grad_()
    pairs = swaps.Uniform(SWAPS)(STEPS, SEQUENCES, device="cuda")
    run = functional.swap_rnn(
        cell, x, w, None, h, h if cell == "lstm" else None, swaps=pairs, backend="triton", longest=STEPS
    )
    (run.output.sum() + run.penalty.mean()).backward()


def seconds(cell: str, hidden: int, dtype: torch.dtype) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPEAT):
        step(cell, hidden, dtype)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPEAT


def fastest(cell: str, hidden: int, dtype: torch.dtype, capability: int) -> tuple[Launch, float, float]:
    """The best launch, and the medians of its seconds and of those of the launch in use."""
    arithmetic = launches.arithmetic(dtype)
    key = cell, triton.next_power_of_2(hidden), arithmetic, capability
    in_use = launches.launch(cell, hidden, arithmetic, capability)
    before = launches.TUNED.get(key)
    times: dict[Launch, list[float]] = {}
    for candidate in dict.fromkeys([in_use, *candidates(key[1])]):
        launches.TUNED[key] = candidate
        try:
            step(cell, hidden, dtype)
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            continue  # this chip does not hold it
        times[candidate] = []
    for _ in range(ROUNDS):
        for candidate, found in times.items():
            launches.TUNED[key] = candidate
            found.append(seconds(cell, hidden, dtype))
    launches.TUNED.pop(key)
    if before:
        launches.TUNED[key] = before
    medians = {candidate: quartiles(found).median for candidate, found in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best, medians[best], medians[in_use]


def winner(cell: str, hidden: int, dtype: torch.dtype, device: str, kernels: Sequence[str]) -> tuple[str, str]:
    """Who is the fastest in a training step of a layer, a backend or "torch"; and the microseconds per step of all."""
    name = str(dtype).removeprefix("torch.")
    setting = Setting(
        {"gru": "GRU", "lstm": "LSTM"}.get(cell, "RNN"),  # tanh stands for relu, whose step is no longer
        STEPS, SEQUENCES, hidden, hidden,
        f"uniform:{SWAPS}", "end", name, device,
    )  # fmt: skip
    measured = measure(Item(setting, name, ()), [*kernels, "stacked"], rounds=ROUNDS)
    medians = {
        "torch" if who == "stacked" else who: quartiles(found["step"]).median
        for who, found in measured.items()
        if not isinstance(found, str)
    }
    told = ", ".join(f"{who} {1e6 * took / STEPS:.2f}" for who, took in medians.items())
    return min(medians, key=medians.__getitem__), told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--hidden", nargs="+", type=int, default=HIDDEN)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--minutes", type=float, default=9, help="stop after so many")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune: torch sees no GPU, and this measures one", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    until = time.monotonic() + 60 * options.minutes
    work = [(cell, hidden, dtype) for dtype in options.dtypes for hidden in options.hidden for cell in options.cells]
    for n, (cell, hidden, dtype) in enumerate(work):
        if time.monotonic() > until:
            print(f"stopped: {len(work) - n} of {len(work)} are left", file=sys.stderr)
            break
        print(f"{n + 1}/{len(work)}, {until - time.monotonic():.0f} s left", file=sys.stderr)
        best, took, before = fastest(cell, hidden, DTYPES[dtype], 10 * major + minor)
        key = cell, triton.next_power_of_2(hidden), launches.arithmetic(DTYPES[dtype]), 10 * major + minor
        print(f"    {key}: {best},  # {1e6 * took / STEPS:.2f} us a step, before {1e6 * before / STEPS:.2f}")
        launches.TUNED[key] = best
        first, told = winner(cell, hidden, DTYPES[dtype], "cuda", kernels())
        print(f"    {(*key[:2], dtype, key[3])}: {first!r},  # us a step: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
