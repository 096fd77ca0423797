"""Finds what is fastest on this GPU, `python -m bench.tune`: the launch of the Triton kernels, for TUNED in
kernels/launch.py, and then, with that launch, the backend, or cuDNN, for FASTEST in sire_fast/backends/gpu.py.

In half of the time all candidates are compiled, side by side in processes, the most important H and cells first; those
that do not compile, or fit, are out. Then a training step of those of each cell, H and arithmetic is timed in turns.
What wins is only printed; check it with bench.gpu after it stands in the tables.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu_plan import Item, kernels
from bench.gpu_time import measure, seconds_of
from bench.processes import answers, broken, workers
from sire_fast import functional, swaps
from sire_fast.backends import gpu
from sire_fast.cells import CELLS
from sire_fast.kernels import launch as launches
from sire_fast.kernels.launch import Launch
from sire_fast.lab.benchmark import Setting, quartiles
from sire_fast.proof import first_line

HIDDEN = (128, 256, 64, 512, 32, 1024)  # the most important first
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS, SEQUENCES, SWAPS = 256, 64, 8  # a step of it all is latency, as in most training
FEW = 4  # of these steps, to compile a candidate and see it run
ROUNDS, REPEAT = 7, 5
COMPILED = 100.0  # seconds, in which a candidate has to be


class Tuned(NamedTuple):
    """What a launch is found for."""

    cell: str
    hidden: int
    dtype: torch.dtype
    capability: int
    device: str = "cuda"

    @property
    def key(self) -> tuple[str, int, str, int]:
        """Of TUNED."""
        arithmetic = launches.arithmetic(self.dtype)
        return self.cell, gpu.padded(self.hidden), arithmetic, self.capability

    @property
    def in_use(self) -> Launch:
        return launches.launch(self.cell, self.hidden, launches.arithmetic(self.dtype), self.capability)

    def candidates(self) -> list[Launch]:
        """The launch in use, and those that are worth a compilation."""
        padded = self.key[1]
        resident = [Launch(rows, True, padded, 32, warps, 1) for rows in (16, 32) for warps in (4, 8, 16)]
        streamed = [
            Launch(16, False, block, inner, warps, stages)
            for block in (32, 64, 128)
            for inner in (32, 64)
            for warps in (4, 8)
            for stages in (2, 3)
            if block <= padded
        ]
        found = (resident if padded <= 256 else []) + (streamed if padded >= 64 else [])
        return [*dict.fromkeys([self.in_use, *found])]

    def step(self, how: Launch, steps: int) -> None:
        """A forward and backward, as a layer asks for it."""
        before = launches.TUNED.get(self.key)
        launches.TUNED[self.key] = how
        try:
            self._step(steps)
        finally:
            del launches.TUNED[self.key]
            if before:
                launches.TUNED[self.key] = before

    def _step(self, steps: int) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        width = CELLS[self.cell].gates * self.hidden

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype)

        x, h = normal(steps, SEQUENCES, width).requires_grad_(), normal(SEQUENCES, self.hidden)
        w = (normal(width, self.hidden) / self.hidden**0.5).requires_grad_()
        pairs = swaps.Uniform(SWAPS)(steps, SEQUENCES, device=self.device)
        run = functional.swap_rnn(
            self.cell, x, w, None, h, h if self.cell == "lstm" else None,
            swaps=pairs, backend="triton", longest=steps,
        )  # fmt: skip
        (run.output.sum() + run.penalty.mean()).backward()

    def why_not(self, how: Launch) -> str:
        """Why this chip does not run a launch; "" if it does. Few steps: others run beside it, in the same memory."""
        try:
            self.step(how, FEW)
        except Exception as error:  # whatever a compiler dies of
            return first_line(error)
        return "breaks the CUDA context of its process" if broken() else ""


def fastest(what: Tuned, candidates: Sequence[Launch]) -> dict[Launch, float]:
    """Candidates and the medians of their seconds, the best first."""
    times: dict[Launch, list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate, found in times.items():
            found.append(seconds_of(partial(what.step, candidate, STEPS), REPEAT, what.device))
    medians = {candidate: quartiles(found).median for candidate, found in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def winner(cell: str, hidden: int, dtype: torch.dtype, device: str, kernels: Sequence[str]) -> tuple[str, str]:
    """Who is the fastest in a training step of a layer, a backend or "torch"; and the microseconds per step of all."""
    setting = Setting(
        {"gru": "GRU", "lstm": "LSTM"}.get(cell, "RNN"),  # tanh stands for relu, whose step is no longer
        STEPS, SEQUENCES, hidden, hidden,
        f"uniform:{SWAPS}", "end", gpu.name_of(dtype), device,
    )  # fmt: skip
    measured = measure(Item(setting, setting.dtype, ()), [*kernels, "stacked"], rounds=ROUNDS)
    medians = {
        "torch" if who == "stacked" else who: quartiles(found["step"]).median
        for who, found in measured.items()
        if not isinstance(found, str)
    }
    told = ", ".join(f"{who} {1e6 * took / STEPS:.2f}" for who, took in medians.items())
    return min(medians, key=medians.__getitem__), told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*reversed(CELLS)])  # tanh and relu last
    parser.add_argument("--hidden", nargs="+", type=int, default=HIDDEN)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--minutes", type=float, default=9, help="stop after so many")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune: torch sees no GPU, and this measures one", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    begun, limit = time.monotonic(), 60 * options.minutes
    work = itertools.product(options.hidden, [DTYPES[name] for name in options.dtypes], options.cells)
    todo = [Tuned(cell, hidden, dtype, 10 * major + minor) for hidden, dtype, cell in work]
    tasks = [(what, candidate) for what in todo for candidate in what.candidates()]
    compiled: dict[Tuned, list[Launch]] = {}
    calls = [partial(what.why_not, candidate) for what, candidate in tasks]
    for n, why in answers(calls, workers(), limit / 2, COMPILED):
        what, candidate = tasks[n]
        if why:
            print(f"{what.key}: {candidate}: {why}", file=sys.stderr, flush=True)
        else:
            compiled.setdefault(what, []).append(candidate)
    for n, what in enumerate(each for each in todo if each in compiled):
        left = limit - (time.monotonic() - begun)
        print(f"{n + 1}/{len(compiled)}, {left:.0f} s left", file=sys.stderr, flush=True)
        if left < 0:
            break
        try:
            medians, in_use = fastest(what, compiled[what]), what.in_use
        except torch.OutOfMemoryError as error:
            print(f"{what.key}: {first_line(error)}", file=sys.stderr, flush=True)
            continue
        (best, took), *_ = medians.items()
        before = f"{1e6 * medians[in_use] / STEPS:.2f}" if in_use in medians else "not compiled in time"
        print(f"    {what.key}: {best},  # {1e6 * took / STEPS:.2f} us a step, before {before}")
        launches.TUNED[what.key] = best
        first, told = winner(what.cell, what.hidden, what.dtype, what.device, kernels())
        key = what.cell, what.key[1], gpu.name_of(what.dtype), what.capability
        print(f"    {key}: {first!r},  # us a step: {told}", flush=True)
    if len(compiled) < len(todo):
        print(f"bench.tune: no time for {len(todo) - len(compiled)} of {len(todo)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
