"""Check every GPU kernel against float64, then time what is right against cuDNN and plain PyTorch: python -m bench.gpu.

A kernel is any backend besides "cpu" and "reference". It is checked as the tests check the CPU's: no error larger than
twice that of the reference in the same arithmetic, on memory filled with NaN, and bits that repeat, on other streams
and in CUDA graphs too. That is done side by side in processes, which also compile what is to be timed, the most
important first. Then what is right is timed, alone: the figures that the project has to reach, peers' shapes, and how
time grows with rows, H and T. Writes <device>.json, every few seconds, and <device>.png to $OUT, else to
bench/results. All of it takes eight minutes at most: what does not fit is "skipped: time". Exit code 0; 1 if a kernel
is wrong, or hangs; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu_check import CASES, DTYPES, Case, Checked, arithmetic_of, check_cases, first_line
from bench.processes import Lost, answers, broken, workers
from sire_fast import backends, passes, proof, swaps
from sire_fast.backends import cuda, gpu
from sire_fast.cells import CELLS
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import Setting, Step, quartiles, ratio
from sire_fast.lab.files import write
from sire_fast.proof import TRAINING

ROOT = Path(__file__).parents[1]
TOTAL, PREPARED = 450.0, 220.0  # seconds, of all, and until what is to be timed is compiled and checked
TASK = 150.0  # seconds for a case, or to prepare an item
FIRST, TELLING = 8, 8  # items that are prepared before any case is checked, and cases before the other items
ITEM = 8.0  # seconds of one setting, after its warm-up
QUICK_CASES = 6
SAVED_EVERY, OVERDUE = 20.0, 30.0  # seconds between writes of what is checked, and behind TOTAL until a hang is over
ROUNDS, QUICK_ROUNDS, FEWEST = 11, 2, 3  # of a contestant; FEWEST however slow it is
INPUTS = 3  # sets that take turns, so that the cache does not hold the input of the next step
BARRIERS = 10_000  # behind each other, to time one
ALONE = 30.0  # seconds for all kinds of them, in a process of their own
AT_LEAST = 0.01  # seconds between two events: the clock of a GPU is coarse


def kernels() -> list[str]:
    """The backends that run on a GPU alone."""
    return [name for name in backends.KERNELS if name != "cpu"]


class Goal(NamedTuple):
    """At most `limit`: of the time, or the peak memory, of `against`; or microseconds of a forward step."""

    limit: float
    against: str | None = None
    of: str = "step"
    ours: str = "kernel"

    def __str__(self) -> str:
        return f"{self.ours}, {self.of}, against {self.against}" if self.against else f"{self.ours}, us of a step"


class Item(NamedTuple):
    """A setting and who runs it: "kernel" and "kernel plain" stand for all kernels, with and without SIRE."""

    setting: Setting
    arithmetic: str
    names: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    sweep: str | None = None  # the axis on whose panel it is drawn

    def __str__(self) -> str:
        s = self.setting
        return f"{s.cell} T={s.T} B={s.B} I={s.I} H={s.H} {s.swaps} {s.compare} {self.arithmetic}"

    def contestants(self, found: Sequence[str]) -> list[str]:
        """Their names, with those of the kernels in place of "kernel"."""
        return [n.replace("kernel", k) for n in self.names for k in (found if n.startswith("kernel") else ("",))]


SIRE = ("kernel", "kernel plain", "plain", "stacked", "shared")
PLAIN = ("kernel plain", "plain")
TORCHRL = ("torchrl", "torchrl stacked")  # where it is installed; compiles a dozen candidates for each T and H first


def plan(device: str) -> list[Item]:
    """What is timed, the most important first."""
    items = []

    def add(sizes: tuple[Any, ...], arithmetics: str, names: tuple[str, ...] = SIRE, *goals: Goal, **more: Any) -> None:
        pairs, compare = more.get("variants", ("uniform:8", "end"))
        for arithmetic in arithmetics.split():
            dtype = gpu.name_of(DTYPES[arithmetic])
            if dtype in benchmark.DTYPES:  # no others are settings
                setting = Setting(*sizes, pairs, compare, dtype, device)
                there = tuple(n for n in names if n not in TORCHRL or n in benchmark.contestants(setting))
                items.append(Item(setting, arithmetic, there, goals, more.get("sweep")))

    microsecond = Goal(1.0, of="forward")
    goals = (Goal(1.0, "plain"), Goal(1 / 4, "stacked"), Goal(1 / 100, "reference"), microsecond)
    add(("GRU", 1000, 64, 128, 128), "bfloat16 float32 tf32", (*SIRE, "reference", *TORCHRL), *goals)
    memory = (Goal(0.6, "stacked", "peak"),)
    add(("GRU", 100, 64, 128, 128), "float32 bfloat16", SIRE, *memory, variants=("uniform:4", "end"))
    add(("GRU", 200, 234, 128, 128), "bfloat16 float32", ("kernel", "plain", "stacked"), microsecond)

    # a layer and its penalty at the authors' size
    over_plain = (Goal(0.5, "plain", ours="kernel plain"),)
    for cell in ("GRU", "LSTM"):
        sizes = (cell, 100, 64, 256, 256)
        small = (*over_plain, Goal(1.05, "kernel plain"), Goal(1.0, "plain"))
        add(sizes, "float32 bfloat16", SIRE, *small, variants=("adjacent:8", "swap"))
        add(sizes, "float32", (*SIRE, "published"), *over_plain, variants=("adjacent:1", "swap"))
        add(sizes, "float32", SIRE, *over_plain, variants=("adjacent:all", "swap"))
    for cell in ("LSTM", "RNN"):
        add((cell, 1000, 64, 128, 128), "bfloat16", (*SIRE, *TORCHRL), *goals[:2], microsecond)

    # large states, small states, and sizes at which cuDNN's choice of an algorithm is poor; no penalty
    as_fast = Goal(1.0, "plain", ours="kernel plain")
    add(("LSTM", 1024, 16, 768, 768), "bfloat16 float32", PLAIN, as_fast)
    add(("LSTM", 1024, 16, 768, 768), "float16", PLAIN, as_fast._replace(limit=1.3))
    for hidden in (256, 512, 768):
        add(("GRU", 1024, 16, hidden, hidden), "bfloat16 float32", PLAIN, as_fast)
    for hidden in (32, 64, 128):
        for batch in (16, 16 * 768 // hidden):
            add(("LSTM", 1024, batch, hidden, hidden), "bfloat16", PLAIN, microsecond._replace(ours="kernel plain"))
    for cell in ("LSTM", "GRU"):
        for sizes, limit in (
            ((2721, 6, 128, 72), 1.0),
            ((3854, 16, 112, 128), 1.0),
            ((2058, 62, 16, 168), 1 / 5),
            ((1125, 44, 40, 160), 1 / 5),
        ):
            add((cell, *sizes), "float32", PLAIN, as_fast._replace(limit=limit))

    swept = ("kernel", "kernel plain", "plain", "stacked")
    for batch in (4, 16, 64, 256):
        add(("GRU", 256, batch, 128, 128), "bfloat16", swept, sweep="B")
    for hidden in (32, 64, 128, 256, 512):
        add(("GRU", 256, 64, hidden, hidden), "bfloat16", swept, sweep="H")
    for steps in (64, 256, 1024):
        add(("GRU", steps, 64, 128, 128), "bfloat16", swept, sweep="T")
    # last: nobody knows how long a loop of 20 steps takes to compile
    add(("GRU", 20, 64, 64, 64), "float32", (*SIRE, "reference", "compiled"), variants=("uniform:4", "end"))
    return items


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
        i, j = pairs.unbind(-1)
        rows += int(((j if setting.compare == "swap" else T - 1) - i + 1)[i < j].sum())
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


def reached(item: Item, found: Sequence[str], measured: Measured) -> list[dict[str, Any]]:
    """Every goal of an item, for every kernel."""
    rows = []
    for goal, backend in itertools.product(item.goals, found):
        row = {"backend": backend, "what": str(goal), "shape": str(item), "limit": goal.limit}
        names = [name.replace("kernel", backend) for name in (goal.ours, goal.against) if name]
        missing = [measured[name] for name in names if isinstance(measured[name], str)]
        if missing:
            rows.append(row | {"measured": None, "reached": False, "why": missing[0]})
            continue
        values = [measured[name][goal.of] for name in names]
        rounds = min(map(len, values))  # a slow one took part in the first only
        if not rounds:
            continue  # memory, on a CPU
        if goal.against:
            value = ratio({name: each[:rounds] for name, each in zip(names, values, strict=True)}, *names)
        else:
            value = quartiles([1e6 * took / item.setting.T for took in values[0]])
        rows.append(row | {"measured": value._asdict(), "reached": value.median <= goal.limit})
    return rows


def as_json(item: Item, measured: Measured, speed: Mapping[str, float]) -> dict[str, Any]:
    """What the result file holds of an item: seconds, microseconds per step, and how far they are from the floor."""

    def contestant(name: str, found: dict[str, list[float]]) -> dict[str, Any]:
        latency = item.setting.T * speed.get("barrier", 0)
        swapped = not name.endswith(("plain", "torchrl"))
        least = work(item.setting, swapped).floor(speed[item.arithmetic], speed["bandwidth"], latency)
        told: dict[str, Any] = {"peak_bytes": found["peak"]}
        for what, floor in least.items():
            seconds = quartiles(found[what])
            us, floor_us = (1e6 * each / item.setting.T for each in (seconds.median, floor))
            told[what] = {"seconds": seconds._asdict(), "us_per_step": us, "floor_us_per_step": floor_us}
        return told

    contestants = {name: each if isinstance(each, str) else contestant(name, each) for name, each in measured.items()}
    setting = {"setting": asdict(item.setting), "arithmetic": item.arithmetic, "sweep": item.sweep}
    return setting | {"contestants": contestants}


class Clock:
    """How much of the time is left, and progress on stderr."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._until - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{self.left:4.0f} s left] {text}", file=sys.stderr, flush=True)


Groups = dict[tuple[str, str, str], Checked]  # by backend, cell and arithmetic


def prepare(item: Item, name: str, checks: bool) -> Checked:
    """Run a kernel, or what is "compiled", at the size of an item, so that nothing is left to compile; before that,
    check there what is timed."""
    setting, found = item.setting, Checked(name, item.setting.key, item.arithmetic)
    timed = [each for each in item.contestants([name]) if each.removesuffix(" plain") == name]
    if checks and name in backends.KERNELS:
        longest = passes.longest_span(swaps.parse(setting.swaps), setting.compare)
        plain = Case(min(setting.T, 20), setting.B, setting.H, I=setting.I, through=("output",))
        swapped = plain._replace(swaps=setting.swaps, compare=setting.compare, longest=longest, through=TRAINING)
        check_cases(found, [plain if each.endswith(" plain") else swapped for each in timed], setting.device)
    if not found.failures and not found.not_available:
        try:
            with arithmetic_of(item.arithmetic):
                for each in timed:
                    Runner(setting, each).run("step")
        except torch.OutOfMemoryError:  # which is told when it is timed
            pass
        except Exception as error:  # of what is compiled, too
            if name in backends.KERNELS:
                found.failures.append(f"{name} {item}: {first_line(error)}")
        if broken():
            found.failures.append(f"{name} {item}: breaks the CUDA context of its process")
    return found


def prepare_all(
    items: Sequence[Item],
    cases: Sequence[Case],
    groups: Groups,
    device: str,
    checks: bool,
    clock: Clock,
    save: Callable[[], None],
) -> set[tuple[Item, str]]:
    """Check cases and prepare items, in processes.

    Args:
        items: to be prepared, with every kernel that serves them.
        cases: to be checked in every group.
        groups: get what is found.
        checks: whether to check anything.
        save: called every few seconds, with `groups` as far as they are.

    Returns:
        What can be timed: items and kernels, or "compiled".
    """
    tasks: list[tuple[Callable[[], Checked], Item | None, Checked]] = []

    def add(some: Sequence[Item]) -> None:
        for item in some:
            for (backend, cell, arithmetic), group in groups.items():
                if (cell, arithmetic) == (item.setting.key, item.arithmetic):
                    tasks.append((partial(prepare, item, backend, checks), item, group))
            if "compiled" in item.names:
                tasks.append((partial(prepare, item, "compiled", False), item, Checked("compiled", "", "")))

    def check(some: Sequence[Case]) -> None:
        for case, (key, group) in itertools.product(some if checks else (), groups.items()):
            tasks.append((partial(check_cases, Checked(*key), [case], device), None, group))
            group.skipped += 1

    # each compiles: where the time does not suffice, a part of the cases is what is left out
    add(items[:FIRST])
    check(cases[:TELLING])
    add(items[FIRST:])
    check(cases[TELLING:])
    ready, saved = set(), clock.left
    for n, answer in answers([task for task, *_ in tasks], workers(), clock.left - TOTAL + PREPARED, TASK):
        if saved - clock.left > SAVED_EVERY:
            save()
            saved = clock.left
        task, item, group = tasks[n]
        name = f"{group.backend} {group.cell} {group.arithmetic}"
        if isinstance(answer, Lost):
            what = f"{name} {item or task.args[1][0]}: {answer.why}"
            clock.say(what)
            if answer.died or item is None:  # a hang is a fault, too: no case takes so long
                group.failures.append(what)
            continue
        group.add(answer)
        for failure in answer.failures:
            clock.say(f"WRONG {failure}")
        if item is None:
            group.skipped -= 1
        elif not answer.failures:
            ready.add((item, group.backend))
    clock.say(f"prepared {len(ready)} of {sum(item is not None for _, item, _ in tasks)}")
    return ready


def time_item(
    item: Item, found: Sequence[str], groups: Groups | None, ready: Container[tuple[Item, str]], rounds: int
) -> Measured:
    """Measure the contestants of an item, of the kernels `found` those that are right, and of what is compiled what is
    `ready`.

    Args:
        groups: what was checked; None times unchecked kernels.
        rounds: at most.
    """
    setting, cell = item.setting, item.setting.key
    refused: dict[str, str] = {}
    for name in item.contestants(found):
        backend, why = name.removesuffix(" plain"), None
        if backend in found:
            call = {"cell": cell, "dtype": DTYPES[item.arithmetic], "hidden_size": setting.H}
            reasons = backends.why_not(backend, device=setting.device, **call)
            why = f"not available: {'; '.join(reasons)}" if reasons else None
            if why is None and groups is not None:
                why = groups[backend, cell, item.arithmetic].why_not_timed()
        if why is None and backend in (*found, "compiled") and (item, backend) not in ready:
            why = "skipped: time"
        if why is not None:
            refused[name] = why
    return refused | measure(item, [name for name in item.contestants(found) if name not in refused], rounds=rounds)


def draw(result: Mapping[str, Any]) -> Any:
    """Time of a step of the sequence against rows, H and T: a matplotlib figure."""
    from matplotlib.figure import Figure  # not everywhere

    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(f"GRU, forward and backward, eight swaps a sequence, bfloat16, {result['machine']['device']}")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"B": "B, sequences (9 B rows)", "H": "H, units", "T": "T, steps"}
    for axes, (axis, title) in zip(panels, titles.items(), strict=True):
        points = [p for p in result["times"] if p["sweep"] == axis]
        names = dict.fromkeys(name for p in points for name, found in p["contestants"].items() if "step" in found)
        for name in names:
            measured = [p for p in points if "step" in p["contestants"].get(name, {})]
            style = {"marker": "o", "linestyle": "--" if name.endswith(" plain") else "-"}
            where = [p["setting"][axis] for p in measured]
            axes.plot(where, [p["contestants"][name]["step"]["us_per_step"] for p in measured], label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel=title)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("microseconds per step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def lines_of(point: Mapping[str, Any]) -> list[str]:
    """What was measured of an item."""

    def cell(name: str, found: dict[str, Any] | str) -> str:
        if isinstance(found, str):
            return f"{name} {found[:60]}"
        forward, step = found["forward"]["us_per_step"], found["step"]["us_per_step"]
        return f"{name} {forward:.2f}/{step:.2f} (x{step / found['step']['floor_us_per_step']:.0f})"

    shape = "{cell} T={T} B={B} I={I} H={H} {swaps} {compare} ".format(**point["setting"]) + point["arithmetic"]
    return [shape, "    " + " | ".join(cell(name, found) for name, found in point["contestants"].items())]


def report(result: Mapping[str, Any]) -> str:
    """The result as plain text, what matters most last."""
    lines = ["microseconds per step, forward / forward and backward (times the floor of the latter)"]
    lines += itertools.chain.from_iterable(map(lines_of, result["times"]))
    lines.append(f"{'kernel':8}{'goal':38}{'shape':60}{'at most':>7}  measured [quartiles]")
    for row in result["goals"]:
        found = row["measured"]
        measured = "{median:.3f} [{lower:.3f}, {upper:.3f}]".format(**found) if found else row["why"][:60]
        reached = "yes" if row["reached"] else "NO"
        lines.append(f"{row['backend']:8}{row['what']:38}{row['shape']:60}{row['limit']:7.2f}  {measured}  {reached}")
    failures = [*result["faults"], *(failure for checked in result["checks"] for failure in checked["failures"])]
    lines += [f"WRONG {failure}" for failure in failures[:40]]
    for checked in result["checks"]:
        counts = f"{checked['passed']} cases passed, {checked['skipped']} skipped: time or memory"
        refused = "; ".join(("", *checked["not_available"]))[:120]
        lines.append("check: {backend} {cell} {arithmetic}: ".format(**checked) + counts + refused)
    lines.append(f"correct: {str(result['correct']).lower()}, failures: {len(failures)}")
    return "\n".join(lines)


@contextmanager
def _ended_after(seconds: float, last: Callable[[], object]) -> Iterator[None]:
    """End the process after so many seconds and a last action, with exit code 1: it waits for ever for a kernel that
    hangs."""

    def end() -> None:
        try:
            last()
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(device: str, found: Sequence[str], options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Check the kernels `found`, measure, and write the result, which is also returned, and its picture."""
    clock, machine = Clock(TOTAL), benchmark.machine(device) | {"environment": proof.environment(device)}
    result: dict[str, Any] = {"machine": machine, "quick": options.quick, "rates": None, "times": [], "goals": []}
    result["faults"] = []  # what ended it before its time
    timed: Item | None = None
    path = out / f"{re.sub(r'[^a-z0-9]+', '-', machine['device'].lower())}.json"
    groups = {key: Checked(*key) for key in itertools.product(found, options.cells, options.dtypes)}
    items = [] if options.only == "check" else plan(device)
    items = [i for i in items if i.setting.key in options.cells and i.arithmetic in options.dtypes]
    if options.quick:
        items = [item._replace(setting=replace(item.setting, T=6, B=3, I=16, H=16)) for item in items]
    checks = options.only != "time"

    def save() -> None:  # after every item: what comes later may take the process with it
        done = [*groups.values()] if checks else []
        result["checks"] = [asdict(group) for group in done]
        right = all(group.correct for group in done) and any(group.passed for group in done)
        result["correct"] = right and not result["faults"]
        write(path, json.dumps(result, indent=2) + "\n")

    def end() -> None:
        result["faults"].append(f"{timed or 'a check'}: hangs")
        save()
        print(report(result), flush=True)

    with _ended_after(TOTAL + OVERDUE, end):
        save()
        clock.say(f"compiling and checking {', '.join(found) or 'nothing: no kernel is there'}")
        ready = prepare_all(items, CASES[:QUICK_CASES] if options.quick else CASES, groups, device, checks, clock, save)
        save()
        if items:
            result["rates"] = rates(device, 128 if options.quick else 8192)
            for _, found_there in answers([partial(barriers, device)], 1, ALONE, ALONE):  # which might wait for ever
                if isinstance(found_there, Lost):
                    clock.say(f"barriers: {found_there.why}")
                else:
                    result["rates"] |= found_there
        for item in items:
            measured: Measured = dict.fromkeys(item.contestants(found), "skipped: time")
            timed = item
            if clock.left > ITEM:
                measured = time_item(
                    item, found, groups if checks else None, ready, QUICK_ROUNDS if options.quick else ROUNDS
                )
            result["times"].append(as_json(item, measured, result["rates"]))
            result["goals"] += reached(item, found, measured)
            clock.say("\n".join(lines_of(result["times"][-1])))
            if broken():
                result["faults"].append(f"{item}: breaks the CUDA context, in which nothing more can be timed")
            save()
            if result["faults"]:
                break
            torch.cuda.empty_cache()
    try:
        figure = draw(result)  # axes stay empty where options leave their settings out
        write(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=150))
    except ImportError as error:
        clock.say(f"no picture: {error}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--only", choices=("check", "time"), help="with time, kernels are timed unchecked")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no GPU, and this measures one", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / ("runs/bench" if options.quick else "bench/results"))
    out.mkdir(parents=True, exist_ok=True)
    result = run("cuda", kernels(), options, out)
    print(report(result))
    checks = result["checks"]
    if checks and not any(each["passed"] or each["failures"] for each in checks):
        why = dict.fromkeys(reason for each in checks for reason in each["not_available"])
        print(f"bench.gpu: no kernel was checked: {'; '.join(why) or 'no time'}", file=sys.stderr)
        return 2
    return 0 if result["correct"] or (options.only == "time" and not result["faults"]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
