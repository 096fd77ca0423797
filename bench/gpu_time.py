"""Times contestants on a GPU, and what the GPU itself reaches, for bench.gpu and bench.tune."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu_check import DTYPES, arithmetic_of
from bench.gpu_plan import Item
from sire_fast import backends, swaps
from sire_fast.backends import cuda
from sire_fast.cells import CELLS
from sire_fast.lab.benchmark import Setting, Step, quartiles
from sire_fast.proof import first_line

ITEM = 8.0  # seconds of one setting, after its warm-up
ROUNDS, FEWEST = 11, 3  # of a contestant; FEWEST however slow it is
INPUTS = 3  # sets that take turns, so that the cache does not hold the input of the next step
BARRIERS = 10_000  # behind each other, to time one
AT_LEAST = 0.01  # seconds between two events: the clock of a GPU is coarse


class Work(NamedTuple):
    """The fewest operations and bytes of a forward, and of forward and backward."""

    forward_flops: int
    forward_bytes: int
    step_flops: int
    step_bytes: int

    def floor(self, flops: float, bandwidth: float, latency: float) -> dict[str, float]:
        """Seconds below which no device of such rates gets, where the threads of a sequence meet once in a step."""
        return {
            "forward": max(self.forward_flops / flops, self.forward_bytes / bandwidth, latency),
            "step": max(self.step_flops / flops, self.step_bytes / bandwidth, 2 * latency),
        }


def work(setting: Setting, swapped: bool) -> Work:
    """Of the layer with its variants, or without. A variant runs over its span only and its first step needs no
    product; the backward reads the states of every step and could compute the gates again."""
    T, B, I, H = setting.T, setting.B, setting.I, setting.H  # noqa: E741
    cell, size = CELLS[setting.key], getattr(torch, setting.dtype).itemsize
    rows, pairs = T * B, None
    if swapped:
        pairs = swaps.parse(setting.swaps)(T, B, torch.Generator().manual_seed(0))
        rows += int(setting.spans(pairs).sum())
    x, output, states = T * B * I, T * B * H, rows * H * cell.states
    weights = cell.gates * H * (I + H + 2)
    flops = setting.operations(pairs)
    forward = x + weights + states  # what is read, and what is written
    backward = x + weights + states + output + x + weights  # the last two are dx and those of the weights
    return Work(flops, size * forward, 3 * flops, size * (forward + backward))


def seconds_of(run: Callable[[], object], repeat: int, device: str) -> float:
    """Of one run out of several in a row."""
    if torch.device(device).type == "cpu":
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - began) / repeat
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeat


def rates(device: str, side: int = 8192) -> dict[str, float]:
    """What the device reaches: bytes per second of a copy, read and written, and operations per second of a product of
    square matrices in every arithmetic."""
    a = torch.randn(2 * side, 2 * side, device=device)
    b = torch.empty_like(a)
    found = {"bandwidth": 2 * a.nbytes / _median(lambda: b.copy_(a), device)}
    for name, dtype in DTYPES.items():
        square = torch.randn(side, side, device=device).to(dtype)
        with arithmetic_of(name):
            found[name] = 2 * side**3 / _median(lambda square=square: square @ square, device)
    return found


def barriers(device: str) -> dict[str, float]:
    """If the extension is there, seconds of a barrier of a block, "barrier", of clusters of blocks, "barrier of 2" and
    so on, and of groups that meet in memory, "barrier of 2 in memory"."""
    found, x = {}, torch.empty(0, device=device)
    for group in cuda.groups(torch.device(device)):
        took = _median(partial(cuda.barriers, BARRIERS, group, x), device)
        where = f" of {group.blocks}" * (group.blocks > 1) + " in memory" * group.mailbox
        found["barrier" + where] = took / BARRIERS
    return found


def _median(run: Callable[[], object], device: str) -> float:
    seconds_of(run, 3, device)
    return quartiles([seconds_of(run, 1, device) for _ in range(7)]).median


class Runner:
    """A contestant's training step on inputs that take turns.

    Args:
        setting: what is measured.
        name: a key of benchmark.CONTESTANTS; a backend, perhaps with " plain" behind it, for our layer with it;
            "compiled" for our layer with the reference behind torch.compile.
    """

    def __init__(self, setting: Setting, name: str) -> None:
        backend = "reference" if name == "compiled" else name.removesuffix(" plain")
        ours = backend in backends.BACKENDS
        self._make = partial(Step, setting, f"sire_fast{' plain' * name.endswith(' plain')}" if ours else name)
        self.step, self._compiled = self._make(), name == "compiled"
        if self._compiled:
            self.step.module = torch.compile(self.step.module)
        self._inputs = [torch.randn_like(self.step.x).requires_grad_() for _ in range(INPUTS)]
        self._forced = partial(backends.use, backend) if ours else nullcontext

    def run(self, what: str) -> None:
        """The "forward" alone, or the whole "step"."""
        step = self.step
        self._inputs.append(self._inputs.pop(0))
        step.x = self._inputs[0]
        with self._forced():
            if what == "step":
                step()
            else:
                step.forward(step.module, step.x, step.sampler, step.compare)

    def peak_bytes(self) -> list[int]:
        """By how much the device's memory grows in a step, at its peak; empty on a CPU and of a compiled step."""
        if not self.step.x.is_cuda or self._compiled:
            return []
        fresh = self._make()  # a layer keeps the outputs of its last pass
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with self._forced():
            fresh()
        return [torch.cuda.max_memory_allocated() - before]


# name of a contestant -> what is measured of it in each round: seconds of "forward" and "step", bytes of "peak";
# or why nothing is
Measured = dict[str, dict[str, list[float]] | str]


def measure(item: Item, names: Sequence[str], seconds: float = ITEM, rounds: int = ROUNDS) -> Measured:
    """Time contestants in turns; a slow one takes part in the first rounds only, so that it does not take the others'
    time."""
    device, orders = item.setting.device, random.Random(0)
    runners: dict[str, tuple[Runner, dict[str, float], dict[str, int]]] = {}
    measured: Measured = {}
    with arithmetic_of(item.arithmetic), warnings.catch_warnings():
        # nobody differentiates forwards that are timed alone
        warnings.filterwarnings("ignore", "sire_fast: a forward in training mode was dropped")
        for name in names:
            try:
                runner = Runner(item.setting, name)
                runner.run("step")
                peak = runner.peak_bytes()
                once = {what: seconds_of(partial(runner.run, what), 1, device) for what in ("forward", "step")}
            except Exception as error:  # one that fails must not take the others' results with it
                measured[name] = f"failed: {first_line(error)}"
                continue
            repeats = {what: max(1, min(100, round(AT_LEAST / took))) for what, took in once.items()}
            runners[name] = runner, once, repeats
            measured[name] = {"forward": [], "step": [], "peak": peak}
        for n in range(rounds):
            for name in orders.sample([*runners], len(runners)):
                runner, once, repeats = runners[name]
                if n >= FEWEST and (n + 1) * sum(once[w] * repeats[w] for w in once) > seconds / len(runners):
                    continue
                try:
                    for what, repeat in repeats.items():
                        measured[name][what].append(seconds_of(partial(runner.run, what), repeat, device))
                except Exception as error:  # memory, say, which all share
                    measured[name] = f"failed: {first_line(error)}"
                    del runners[name]
    return measured
