"""The figures that this project has to reach, and how time grows with K, H and T: `make bench`.

Writes <device>.json and <device>.png, prints a table. Compare only what stands in one file, and close everything
else before. With --quick all sizes are tiny: it shows that everything runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sire_fast import functional, swaps
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import CONTESTANTS, Quartiles, Setting, Step, contestants, measure, quartiles, ratio
from sire_fast.lab.train import write

ROOT = Path(__file__).parents[1]
ROUNDS, QUICK_ROUNDS = 12, 2
SHRINK = {"T": 10, "B": 16, "H": 16, "I": 16}  # --quick divides by these


@dataclass(frozen=True)
class Goal:
    """At most `limit` of the time of the fastest of `against`."""

    what: str
    setting: Setting
    against: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Row:
    """A goal and what was measured."""

    what: str
    setting: Setting
    bound: str  # "at most" or "at least"
    limit: float
    measured: Quartiles

    @property
    def reached(self) -> bool:
        median = self.measured.median
        return median <= self.limit if self.bound == "at most" else median >= self.limit

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "measured": self.measured._asdict(), "reached": self.reached}


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
    ]


_SWEPT = Setting("GRU", T=100, B=32, I=128, H=128, swaps="adjacent:8", compare="swap")
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


def run(quick: bool = False) -> dict[str, Any]:
    """Measure everything; returns what the result file holds."""
    shrink = _shrunk if quick else lambda setting: setting
    rounds = QUICK_ROUNDS if quick else ROUNDS
    goals = [replace(goal, setting=shrink(goal.setting)) for goal in _goals()]
    sweeps = {axis: [shrink(replace(_SWEPT, **change)) for change in changes] for axis, (_, changes) in SWEEPS.items()}
    needed: dict[Setting, list[str]] = {setting: contestants(setting) for sweep in sweeps.values() for setting in sweep}
    for goal in goals:
        names = needed.setdefault(goal.setting, [])
        names += [name for name in ("sire_fast", *goal.against) if name not in names]

    work = {setting: _work(setting, names) for setting, names in needed.items()}
    total = (benchmark.WARM_UP + rounds) * sum(work.values())
    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn())
    seconds = {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True) as progress:
        bar = progress.add_task("", total=total)
        for setting, names in needed.items():
            progress.update(bar, description=str(setting))
            steps = {name: Step(setting, name) for name in names}
            seconds[setting] = measure(steps, rounds, lambda done=work[setting]: progress.advance(bar, done))

    rows = [
        Row(goal.what, goal.setting, "at most", goal.limit, ratio(seconds[goal.setting], "sire_fast", *goal.against))
        for goal in goals
    ]
    rows.append(_arithmetic_rate(shrink(Setting("GRU", I=256, H=256)), 128 if quick else 2048, rounds))
    rows += _memory(shrink(Setting("GRU", swaps="uniform:4", compare="end")))
    return {
        "machine": benchmark.machine(),
        "rounds": rounds,
        "quick": quick,
        "goals": [row.as_json() for row in rows],
        "sweeps": {
            axis: [
                {
                    "setting": asdict(setting),
                    "seconds": {name: quartiles(times)._asdict() for name, times in seconds[setting].items()},
                }
                for setting in sweep
            ]
            for axis, sweep in sweeps.items()
        },
    }


def _shrunk(setting: Setting) -> Setting:
    return replace(setting, **{name: max(2, getattr(setting, name) // by) for name, by in SHRINK.items()})


def _work(setting: Setting, names: Sequence[str]) -> float:
    """About how long a round takes, in some unit: for the time left."""
    passes = len(names) + ("stacked" in names) * swaps.parse(setting.swaps)(setting.T, 1).shape[1]
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[setting.cell]
    return passes * gates * setting.T * setting.B * (setting.H + 64) ** 2


def _arithmetic_rate(setting: Setting, side: int, rounds: int) -> Row:
    """Floating-point operations per second of the whole operator, forward and backward, against those of torch's own
    product of two square matrices."""
    torch.manual_seed(0)
    T, B, H = setting.T, setting.B, setting.H
    x_proj, h0 = torch.randn(T, B, 3 * H, requires_grad=True), torch.zeros(B, H)
    layer = torch.nn.GRU(H, H)
    pairs, weight = swaps.parse(setting.swaps)(T, B), torch.randn(T, B, H)

    def operator() -> None:
        layer.zero_grad()
        x_proj.grad = None
        result = functional.swap_rnn(
            "gru", x_proj, layer.weight_hh_l0, layer.bias_hh_l0, h0, swaps=pairs, ends=pairs[..., 1]
        )
        ((result.output * weight).sum() + result.penalty.mean()).backward()

    a, b = torch.randn(side, side), torch.randn(side, side)
    seconds = measure({"operator": operator, "product": lambda: a @ b}, rounds)
    # an adjacent swap costs one row more; a row costs a product forward and two backward
    operations = 3 * 2 * (T + pairs.shape[1]) * B * 3 * H * H
    factor = operations / (2 * side**3)
    measured = Quartiles(*(factor * value for value in ratio(seconds, "product", "operator")))
    return Row(f"arithmetic rate, against torch's sgemm {side}", setting, "at least", 0.8, measured)


def _memory(setting: Setting) -> list[Row]:
    """Peak memory of a step; no row where the system does not tell it."""
    ours, stacked = (benchmark.peak_memory(setting, name) for name in ("sire_fast", "stacked"))
    if ours is None or stacked is None:
        return []
    measured = Quartiles(*[ours / max(stacked, 1)] * 3)
    return [Row("peak memory, against stacked", setting, "at most", 0.6, measured)]


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


def _table(result: dict[str, Any]) -> Table:
    title = "Time of a step, as a part of another's in the same round"
    table = Table(title=title + " (tiny sizes: no result)" * result["quick"])
    table.add_column("what")
    for heading in ("shape", "goal", "measured [quartiles]", "reached"):
        table.add_column(heading, no_wrap=True)
    for what, rows in itertools.groupby(result["goals"], lambda row: row["what"]):
        for n, row in enumerate(rows):
            shape = "{cell} T={T} B={B} I={I} H={H}".format(**row["setting"])
            lower, median, upper = row["measured"].values()
            reached = "[green]yes[/]" if row["reached"] else "[red]no[/]"
            measured = f"{median:.2f} \\[{lower:.2f}, {upper:.2f}]"
            goal = f"{row['bound']} {row['limit']:.2f}"
            table.add_row(what if n == 0 else "", shape, goal, measured, reached)
        table.add_section()
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result and its picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results; with --quick runs/bench")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / ("runs/bench" if options.quick else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    result = run(options.quick)

    console = Console(width=None if sys.stdout.isatty() else 130)  # a file has room for whole rows
    console.print(_table(result))

    machine = result["machine"]
    device = f"{machine['device']} {machine['instruction_set'] or ''}"
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\bcpu\b|@.*ghz", "", device.lower())).strip("-")
    text, figure = json.dumps(result, indent=2) + "\n", draw(result)
    write(out / f"{name}.json", lambda temporary: temporary.write_text(text))
    write(out / f"{name}.png", lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    console.print(f"{out / name}.json and .png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
