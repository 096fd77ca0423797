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
import re
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import CASES, DTYPES, Case, Checked, arithmetic_of, check_cases
from bench.gpu_plan import Item, kernels, plan
from bench.gpu_time import ITEM, ROUNDS, Measured, Runner, barriers, measure, rates, work
from bench.processes import Lost, answers, broken, workers
from sire_fast import backends, passes, proof, swaps
from sire_fast.cells import CELLS
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import quartiles, ratio
from sire_fast.lab.files import write
from sire_fast.proof import TRAINING, first_line

ROOT = Path(__file__).parents[1]
TOTAL, PREPARED = 450.0, 220.0  # seconds, of all, and until what is to be timed is compiled and checked
TASK = 150.0  # seconds for a case, or to prepare an item
FIRST, TELLING = 8, 8  # items that are prepared before any case is checked, and cases before the other items
QUICK_CASES = 6
SAVED_EVERY, OVERDUE = 20.0, 30.0  # seconds between writes of what is checked, and behind TOTAL until a hang is over
QUICK_ROUNDS = 2
ALONE = 30.0  # seconds for all kinds of barriers, in a process of their own


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
