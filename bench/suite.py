"""The figures that this project has to reach, and how time grows with K, H and T: `make bench`.

Arithmetic rate: the floating-point operations that the whole layer's forward and backward need, over the time of our
step, as a part of the faster of two products of torch's in the same rounds, of square matrices and of the shape that
projects the input. On AMD's processors torch's own products (MKL) use AVX2 where there is AVX-512: rates above 1 occur.

Rivals: milliseconds of a step of all who can take it at a few shapes, those included that compile first, which is no
part of the time.

Writes <device>.json and <device>.png, prints a table. Compare only what stands in one file, and close everything
else before. With --quick all sizes are tiny: it shows that everything runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from sire_fast import swaps
from sire_fast.cells import CELLS
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import CONTESTANTS, Quartiles, Setting, Step, contestants, measure, quartiles, ratio
from sire_fast.lab.files import write
from sire_fast.swaps import Sampler

ROOT = Path(__file__).parents[1]
ROUNDS, QUICK_ROUNDS = 7, 2
SIDE, QUICK_SIDE = 2048, 128  # of the square matrices
# variables that hold torch, its libraries and JAX to an instruction set, a number of threads or a way to allocate
_HELD_BY = ("ATEN_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "ONEDNN_", "XLA_")
SHRINK = {"T": 10, "B": 16, "H": 16, "I": 16}  # --quick divides by these


@dataclass(frozen=True)
class Goal:
    """At most `limit` of the time of the fastest of `against`; with none, an arithmetic rate of at least `limit`."""

    what: str
    setting: Setting
    against: tuple[str, ...]
    limit: float
    of: str = "sire_fast"


@dataclass(frozen=True)
class Row:
    """A goal and what was measured."""

    what: str
    setting: Setting
    of: str  # whose step was measured
    bound: str  # "at most" or "at least"
    limit: float
    measured: Quartiles
    arithmetic_rate: Quartiles | None  # of that step
    gflops: Quartiles | None  # of torch's products, of which it is a part, 10^9 operations per second

    @property
    def reached(self) -> bool:
        median = self.measured.median
        return median <= self.limit if self.bound == "at most" else median >= self.limit

    def as_json(self) -> dict[str, Any]:
        quartiles = {name: value._asdict() for name, value in vars(self).items() if isinstance(value, Quartiles)}
        return {**asdict(self), **quartiles, "reached": self.reached}


def _goals() -> list[Goal]:
    wide = [Setting(cell, I=hidden, H=hidden) for hidden in (128, 256) for cell in benchmark.LAYERS]
    at_end = [Setting(cell, swaps="uniform:4", compare="end") for cell in ("RNN", "GRU")]
    sizes = [
        (k, Setting(cell, T, B, H, H, f"uniform:{k}", "end"))
        for k in (4, 8)
        for T, B, H in ((20, 16, 64), (50, 32, 128), (100, 64, 256))
        for cell in benchmark.LAYERS
    ]
    all_swaps = [replace(setting, swaps="adjacent:all") for setting in wide]
    one_swap = Setting(swaps="adjacent:1", I=256, H=256)
    rated = [
        (0.75 if hidden == 64 else 0.9, Setting(cell, I=hidden, H=hidden))
        for hidden in (64, 128, 256)
        for cell in benchmark.LAYERS
    ]
    all_rated = [(least, replace(setting, swaps="adjacent:all")) for least, setting in rated]
    end_rated = [(least, replace(setting, swaps="uniform:4", compare="end")) for least, setting in rated]
    return [
        *(Goal("swap, Adjacent(8), against plain", s, ("plain",), 0.9 if s.cell == "LSTM" else 0.5) for s in wide),
        *(Goal("swap, Adjacent(8), against our plain", s, ("sire_fast plain",), 1.08) for s in wide),
        *(
            Goal('swap, Adjacent("all"), against plain', s, ("plain",), 1.6 if s.cell == "LSTM" else 1)
            for s in all_swaps
        ),
        Goal("swap, K=1, against published", one_swap, ("published",), 1 / 5),
        *(Goal("end, Uniform(4), against plain", s, ("plain",), 1) for s in at_end),
        *(Goal(f"end, Uniform({k}), against stacked and shared", s, ("stacked", "shared"), 1 / 3) for k, s in sizes),
        *(Goal("arithmetic rate, no swaps", s, (), least, "sire_fast plain") for least, s in all_rated),
        *(Goal('arithmetic rate, swap, Adjacent("all")', s, (), least) for least, s in all_rated),
        *(Goal("arithmetic rate, end, Uniform(4)", s, (), least) for least, s in end_rated),
    ]


_SWEPT = Setting("GRU", T=100, B=32, I=128, H=128, swaps="adjacent:8", compare="swap")
_RIVALS = [
    Setting(),
    Setting(swaps="uniform:4", compare="end"),
    Setting("GRU", 20, 16, 64, 64, "uniform:8", "end"),
]
# axis -> what it is, and what changes along it
SWEEPS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "K": ("K, swaps of each sequence", [{"swaps": f"adjacent:{k}"} for k in (1, 2, 4, 8, 16)]),
    "H": ("H, units of the layer and features of its input", [{"H": h, "I": h} for h in (64, 128, 256, 512)]),
    "T": ("T, steps of a sequence", [{"T": t} for t in (20, 50, 100, 200)]),
}

# ours in colour; the others muted, told apart by marker and dashes
_STYLES: dict[str, dict[str, Any]] = {
    "stacked": {"color": "#a5a58d", "marker": "s", "linestyle": "-."},
    "published": {"color": "#b08968", "marker": "v", "linestyle": ":"},
    "shared": {"color": "#9a7fa0", "marker": "D", "linestyle": "--"},
    "plain": {"color": "#22223b", "marker": "o", "linestyle": "-", "linewidth": 2},
    "sire_fast": {"color": "#00798c", "marker": "o", "linestyle": "-", "linewidth": 3.2, "markersize": 7},
    "sire_fast plain": {"color": "#00798c", "marker": "o", "markerfacecolor": "white", "linestyle": "--"},
}


class Measured(NamedTuple):
    """What was measured at a setting.

    Attributes:
        seconds: of each contestant's step in each round.
        rates: the arithmetic rate of each of our steps in each round.
        flops: of torch's products, the faster of the two in each round.
    """

    seconds: dict[str, list[float]]
    rates: dict[str, list[float]]
    flops: list[float]


class _Noting:
    """A sampler that keeps the pairs that it drew last."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        if hasattr(sampler, "reach"):
            self.reach = sampler.reach

    def __call__(self, *arguments: Any) -> Tensor:
        self.pairs: Tensor = self._sampler(*arguments)
        return self.pairs


def measured(setting: Setting, names: Sequence[str], rounds: int, side: int, advance: Callable[[], object]) -> Measured:
    """Time contestants, and torch's products of square matrices and of the projection, in turns."""
    sampler = swaps.parse(setting.swaps)
    assert sampler is not None  # which a setting refuses
    noting, counts = _Noting(sampler), []
    steps = {name: Step(setting, name, noting if name == "sire_fast" else None) for name in names}
    square, x = torch.randn(side, side), torch.randn(setting.T * setting.B, setting.I)
    weight = torch.randn(setting.I, CELLS[setting.key].gates * setting.H)

    def after_round() -> None:
        counts.append(3 * setting.operations(noting.pairs))
        advance()

    products = {"square": lambda: square @ square, "projection": lambda: x @ weight}
    seconds = measure({**steps, **products}, rounds, after_round)
    flops = [
        max(2 * side**3 / of_square, 2 * x.numel() * weight.shape[1] / of_projection)
        for of_square, of_projection in zip(*(seconds.pop(name) for name in products), strict=True)
    ]
    needed = {"sire_fast": counts[-rounds:], "sire_fast plain": rounds * [3 * setting.operations()]}
    rates = {
        name: [n / took / best for n, took, best in zip(each, seconds[name], flops, strict=True)]
        for name, each in needed.items()
        if name in seconds
    }
    return Measured(seconds, rates, flops)


def run(quick: bool = False) -> dict[str, Any]:
    """Measure everything; returns what the result file holds."""
    machine = _machine()  # before the checkout can move on
    shrink = _shrunk if quick else lambda setting: setting
    rounds, side = (QUICK_ROUNDS, QUICK_SIDE) if quick else (ROUNDS, SIDE)
    goals = [replace(goal, setting=shrink(goal.setting)) for goal in _goals()]
    sweeps = {axis: [shrink(replace(_SWEPT, **change)) for change in changes] for axis, (_, changes) in SWEEPS.items()}
    needed: dict[Setting, list[str]] = {setting: contestants(setting) for sweep in sweeps.values() for setting in sweep}
    for goal in goals:
        names = needed.setdefault(goal.setting, [])
        names += [name for name in ("sire_fast", goal.of, *goal.against) if name not in names]
    # apart from the rest, whose time some of them disturb; compiling takes a minute even for tiny sizes
    rivals = {setting: contestants(setting, slow_starts=not quick) for setting in map(shrink, _RIVALS)}

    runs = [*needed.items(), *rivals.items()]
    total = (benchmark.WARM_UP + rounds) * sum(_work(*each) for each in runs)
    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn())
    results = []
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True) as progress:
        bar = progress.add_task("", total=total)
        for setting, names in runs:
            progress.update(bar, description=str(setting))
            advance = partial(progress.advance, bar, _work(setting, names))
            results.append(measured(setting, names, rounds, side, advance))

    found = dict(zip(needed, results, strict=False))
    rows = [_row(goal, found[goal.setting]) for goal in goals]
    rows += _memory(shrink(Setting("GRU", swaps="uniform:4", compare="end")), 1 if quick else 3)
    return {
        "machine": machine,
        "rounds": rounds,
        "quick": quick,
        "goals": [row.as_json() for row in rows],
        "rivals": [_point(*each) for each in zip(rivals, results[len(needed) :], strict=True)],
        "sweeps": {axis: [_point(setting, found[setting]) for setting in sweep] for axis, sweep in sweeps.items()},
    }


def _machine() -> dict[str, Any]:
    """What the result depends on, the rivals' part included."""
    machine = benchmark.machine()
    if find_spec("jax"):
        machine["versions"]["jax"] = version("jax")
    held = {name: value for name, value in os.environ.items() if name.startswith(_HELD_BY)}
    return machine | {"torch_instruction_set": torch.backends.cpu.get_cpu_capability(), "environment": held}


def _row(goal: Goal, found: Measured) -> Row:
    rate, gflops = quartiles(found.rates[goal.of]), quartiles([n / 1e9 for n in found.flops])
    if not goal.against:
        return Row(goal.what, goal.setting, goal.of, "at least", goal.limit, rate, rate, gflops)
    compared = ratio(found.seconds, goal.of, *goal.against)
    return Row(goal.what, goal.setting, goal.of, "at most", goal.limit, compared, rate, gflops)


def _point(setting: Setting, found: Measured) -> dict[str, Any]:
    return {
        "setting": asdict(setting),
        "seconds": {name: quartiles(times)._asdict() for name, times in found.seconds.items()},
        "arithmetic_rate": {name: quartiles(rates)._asdict() for name, rates in found.rates.items()},
        "gflops": quartiles([n / 1e9 for n in found.flops])._asdict(),
    }


def _shrunk(setting: Setting) -> Setting:
    return replace(setting, **{name: max(2, getattr(setting, name) // by) for name, by in SHRINK.items()})


def _work(setting: Setting, names: Sequence[str]) -> float:
    """About how long a round takes, in some unit: for the time left."""
    passes = len(names) + ("stacked" in names) * swaps.parse(setting.swaps)(setting.T, 1).shape[1]
    return passes * CELLS[setting.key].gates * setting.T * setting.B * (setting.H + 64) ** 2


def _memory(setting: Setting, rounds: int) -> list[Row]:
    """Peak memory of a step; no row where the system does not tell it."""
    ratios = []
    for _ in range(rounds):
        ours, stacked = (benchmark.peak_memory(setting, name) for name in ("sire_fast", "stacked"))
        if ours is None or stacked is None:
            return []
        ratios.append(ours / max(stacked, 1))
    measured = quartiles(ratios)
    return [Row("peak memory, against stacked", setting, "sire_fast", "at most", 0.6, measured, None, None)]


def draw(result: dict[str, Any]) -> Figure:
    """Time of a step against K, H and T, a panel each, all contestants as lines; ours from quartile to quartile."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    machine = result["machine"]
    figure.suptitle("One training step of a GRU, forward and backward, with SIRE on adjacent swaps", fontweight="bold")
    where = f"float32, {machine['device']} ({machine['instruction_set']}), threads: {machine['threads']}"
    panels = figure.subplots(1, len(SWEEPS), sharey=True)
    for axes, (axis, (title, _)) in zip(panels, SWEEPS.items(), strict=True):
        points = result["sweeps"][axis]
        values = [_value(axis, point["setting"]) for point in points]
        for name, style in _STYLES.items():
            low, middle, high = ([1e3 * p["seconds"][name][q] for p in points] for q in Quartiles._fields)
            axes.plot(values, middle, label=CONTESTANTS[name].label, **{"linewidth": 1.8, "markersize": 5.5, **style})
            axes.fill_between(values, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=title)
        axes.set_xticks(values, [str(value) for value in values])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(_fixed(axis, points[0]["setting"]), loc="left", fontsize="medium", color="0.35")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds for a step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, title=where)
    return figure


def _value(axis: str, setting: dict[str, Any]) -> int:
    return int(setting["swaps"].split(":")[1]) if axis == "K" else setting[axis]


def _fixed(axis: str, setting: dict[str, Any]) -> str:
    """What is the same all along an axis."""
    sizes = {name: setting[name] for name in ("T", "B", "I", "H")} | {"K": _value("K", setting)}
    changed = {axis, "I"} if axis == "H" else {axis}
    return " ".join(f"{name}={size}" for name, size in sizes.items() if name not in changed)


_NO_RESULT = " (tiny sizes: no result)"
_RATES = {"arithmetic_rate": ".2f", "gflops": ".0f"}


def _rivals(result: dict[str, Any]) -> Table:
    table = Table(title="Milliseconds of a step \\[quartiles]" + _NO_RESULT * result["quick"])
    table.add_column("contestant")
    points = result["rivals"]
    for point in points:
        table.add_column("{cell} T={T} B={B} H={H}\n{swaps}, {compare}".format(**point["setting"]), justify="right")
    for name in dict.fromkeys(name for point in points for name in point["seconds"]):
        cells = []
        for point in points:
            each = [f"{1e3 * value:.1f}" for value in point["seconds"].get(name, {}).values()]
            cells.append("{1} \\[{0}, {2}]".format(*each) if each else "-")
        table.add_row(f"{name}: {CONTESTANTS[name].label}", *cells)
    return table


def _table(result: dict[str, Any]) -> Table:
    title = "Time of a step, as a part of another's in the same round"
    caption = "rate: arithmetic rate of our step, as a part of the faster of torch's products, sgemm, in GFLOP/s"
    table = Table(title=title + _NO_RESULT * result["quick"], caption=caption)
    table.add_column("what")
    for heading in ("shape", "goal", "measured [quartiles]", "rate", "sgemm", "reached"):
        table.add_column(heading, no_wrap=True)
    for what, rows in itertools.groupby(result["goals"], lambda row: row["what"]):
        for n, row in enumerate(rows):
            shape = "{cell} T={T} B={B} I={I} H={H}".format(**row["setting"])
            lower, median, upper = row["measured"].values()
            reached = "[green]yes[/]" if row["reached"] else "[red]no[/]"
            measured = f"{median:.2f} \\[{lower:.2f}, {upper:.2f}]"
            goal = f"{row['bound']} {row['limit']:.2f}"
            rate, sgemm = (format(row[name]["median"], digits) if row[name] else "" for name, digits in _RATES.items())
            table.add_row(what if n == 0 else "", shape, goal, measured, rate, sgemm, reached)
        table.add_section()
    return table


def file_name(machine: dict[str, Any]) -> str:
    """Of the result of a machine, without its extension."""
    device = f"{machine['device']} {machine['instruction_set'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\bcpu\b|@.*ghz", "", device.lower())).strip("-")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result and its picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results; with --quick runs/bench")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / ("runs/bench" if options.quick else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    result = run(options.quick)

    # files before anything is shown: who reads the output may have gone
    name = file_name(result["machine"])
    write(out / f"{name}.json", json.dumps(result, indent=2) + "\n")
    figure = draw(result)
    write(out / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=150))

    console = Console(width=None if sys.stdout.isatty() else 130)  # a file has room for whole rows
    console.print(_table(result), _rivals(result))
    console.print(f"{out / name}.json and .png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
