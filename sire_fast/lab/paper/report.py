"""Tables, a picture and JSON from the results of an experiment's trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from sire_fast.lab.benchmark import CONTESTANTS
from sire_fast.lab.paper.experiments import Case, Experiment

_BANDS = 9  # most curves whose standard deviations are drawn: more bands hide each other
BUDGETS = {"steps": "equal steps", "seconds": "equal time"}
_OURS = ("#00798c", "#3d5a80", "#52b69a", "#023047", "#90be6d", "#74c0fc", "#168aad")
_RIVALS = ("#d1495b", "#edae49", "#9a7fa0", "#b08968", "#a5a58d", "#5f0f40", "#495057")


def summary(name: str, experiment: Experiment, cases: Sequence[Case], results: Sequence[Sequence[dict]]) -> dict:
    """What the result file of an experiment holds.

    Args:
        name, experiment: which.
        cases: its rows.
        results: of each row, what trials.run returned for each seed.
    """
    rows = []
    for case, runs in zip(cases, results, strict=True):
        for budget in BUDGETS:
            if budget == "seconds" and not case.trial.seconds:
                continue
            found = [run[budget] for run in runs]
            columns = list(found[0]["metrics"])
            own, *others = found[0]["metrics"][columns[0]]
            # rounded answers are right or wrong; how wrong says more where few are right
            shown = [own, "mae"] if own == "accuracy" and "mae" in others else [own]
            row = {
                "setting": case.setting,
                "method": case.method,
                "config": {k: v for k, v in runs[0]["trial"].items() if k not in ("seed", "data")},
                "budget": budget,
                "metrics": {m: {c: _spread([f["metrics"][c][m] for f in found]) for c in columns} for m in shown},
                "order_sensitivity": _spread([f["order_sensitivity"]["mean"] for f in found]),
                "largest_change": max(f["order_sensitivity"]["max"] for f in found),
                "parameters": runs[0]["parameters"],
                "step": _spread([f["step"] for f in found]),
                "seconds": _spread([f["seconds"] for f in found]),
            }
            if case.choices:
                first, *others = map(asdict, case.choices)
                row["chosen"] = {k: runs[0]["trial"][k] for k in first if any(o[k] != first[k] for o in others)}
            if runs[0]["adaptive_swaps"]:
                # of the whole training, also where a budget ends before it
                seen = [case.trial.batch * max(1, *(run[each]["step"] for each in BUDGETS)) for run in runs]
                row["swaps_a_step"] = _spread([run["adaptive_swaps"] / n for run, n in zip(runs, seen, strict=True)])
            if any(run["diverged"] is not None for run in runs):
                row["diverged"] = [run["diverged"] for run in runs]
            if shown == ["accuracy"] and (last := experiment.at[-1:]) and last[0] in columns:
                row["reached"] = [f["metrics"][last[0]]["accuracy"] >= 0.99 for f in found]
            if experiment.targets:
                row["targets"] = {
                    str(target): [_reaching(run, target) for run in runs] for target in experiment.targets
                }
            published = experiment.published.get((case.setting, case.method))
            if published is not None:
                row["published"] = published
                if runs[0]["source"].lower().startswith(experiment.published_on.lower()):
                    row["gap"] = row["metrics"][own]["test"]["mean"] - published
            if budget == "steps" and experiment.picture in ("epochs", "seconds"):
                row["epoch"], row["history"] = runs[0]["epoch"], _mean_history([run["history"] for run in runs])
            rows.append(row)
    runs = [run for runs in results for run in runs]
    return {
        "experiment": name,
        "about": experiment.about,
        "at": experiment.at,
        "published_on": experiment.published_on,
        "seeds": [run["trial"]["seed"] for run in results[0]],
        "source": runs[0]["source"],
        "machine": runs[0]["machine"],
        "commits": sorted({run["machine"]["commit"] or "unknown" for run in runs}),
        "rows": rows,
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation, which one value does not have."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _mean_history(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Of runs that were validated at the same steps; as far as all of them go."""
    return [
        {key: statistics.fmean(line[key] for line in lines) for key in ("step", "seconds", "validation")}
        for lines in zip(*runs, strict=False)
    ]


def _reaching(run: dict[str, Any], target: float) -> dict[str, float] | None:
    """Epochs and seconds until validation reaches a target; None if it never does."""
    for line in run["history"]:
        if line["validation"] >= target:
            return {"epochs": line["step"] * run["trial"]["batch"] / run["epoch"], "seconds": line["seconds"]}
    return None


def origin(found: dict[str, Any]) -> str:
    """Where the numbers of an experiment come from, for people."""
    seeds = len(found["seeds"])
    return f"{found['source']}; {f'{seeds} seeds, mean ± standard deviation' if seeds > 1 else 'one seed'}"


def when(row: dict[str, Any]) -> str:
    """When the models of a row were measured."""
    budget, until = BUDGETS[row["budget"]], row["config"]["until"]
    if until is not None:
        return f"when validation reached {until:g}, or after {budget}"
    patience = row["config"].get("patience")  # files from before there was any lack it
    return f"at the best validation within {budget}" if patience else f"after {budget}"


def tables(found: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, headings first, of an experiment's tables: one for each setting and budget."""
    made: dict[str, list[list[str]]] = {}
    for row in found["rows"]:
        title = f"{row['setting']}, {when(row)}"
        cells = {"": row["method"]}
        for metric, values in row["metrics"].items():
            cells |= {metric if c == "test" else f"{metric}, {c}": _number(v) for c, v in values.items()}
        if any("published" in r for r in found["rows"] if r["setting"] == row["setting"]):
            heading = f"published ({found['published_on']})"
            cells[heading] = f"{row['published']:.3f}" if "published" in row else "-"
            cells["gap"] = f"{row['gap']:+.3f}" if "gap" in row else "-"
        if "reached" in row:
            cells[f"seeds >= 0.99 at {found['at'][-1]}"] = f"{sum(row['reached'])} of {len(row['reached'])}"
        for target, times in row.get("targets", {}).items():
            cells[f"to {target}: epochs, s"] = _times(times)
        if any("swaps_a_step" in r for r in found["rows"]):
            cells["swaps a step"] = f"{row['swaps_a_step']['mean']:.1f}" if "swaps_a_step" in row else "fixed"
        if any("chosen" in r for r in found["rows"]):
            cells["chosen"] = ", ".join(f"{k} {v:g}" for k, v in row.get("chosen", {}).items()) or "-"
        cells |= {
            "order sensitivity": f"{row['order_sensitivity']['mean']:.2g}",
            "largest": f"{row['largest_change']:.2g}",
            "parameters": str(row["parameters"]),
            "steps": f"{row['step']['mean']:.0f}" + ", diverged" * ("diverged" in row),
            "seconds": _number(row["seconds"], 1),  # whose spread tells how busy the machine was
        }
        made.setdefault(title, [list(cells)]).append(list(cells.values()))
    return list(made.items())


def _number(value: dict[str, Any], digits: int | None = None) -> str:
    mean, sd = value["mean"], value["sd"]
    if digits is None:
        digits = 3 if mean < 10 else 1 if mean < 100 else 0
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _times(times: list[dict[str, float] | None]) -> str:
    reached = [t for t in times if t]
    if not reached:
        return f"never (0 of {len(times)})"
    epochs, seconds = (statistics.fmean(t[key] for t in reached) for key in ("epochs", "seconds"))
    return f"{epochs:.2f}, {seconds:.1f} ({len(reached)} of {len(times)})"


def cost_tables(found: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """As `tables`, of what experiments.cost returns."""
    made = []
    for entry in found["settings"]:
        s = entry["setting"]
        rows = [["", "ms", "times torch.nn without SIRE"]]
        for name, row in entry["contestants"].items():
            rows.append(
                [
                    CONTESTANTS[name].label,
                    f"{1e3 * row['seconds']['median']:.2f}",
                    f"{row['ratio_to_plain']['median']:.2f}",
                ]
            )
        made.append((f"{s['cell']} T={s['T']} B={s['B']} H={s['H']}, {s['swaps']}", rows))
    return made


def overview(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Title and rows, headings first, of one table of methods and settings, after equal steps."""
    rows = [row for row in found["rows"] if row["budget"] == "steps"]
    headings: dict[tuple[str, str], str] = {}
    table: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        if "targets" in row:
            target = _farthest([r["targets"] for r in rows if r["setting"] == row["setting"]])
            headings[row["setting"], target] = f"{row['setting']}: epochs, s to {target}"
            table.setdefault(row["method"], {})[row["setting"], target] = _times(row["targets"][target])
            continue
        metric, values = _drawn(row)
        for column in [c for c in found["at"] if c in values] or [next(iter(values))]:
            at = f" at {column}" if len(values) > 1 else ""
            headings[row["setting"], column] = f"{row['setting']}: {metric}{at}"
            table.setdefault(row["method"], {})[row["setting"], column] = _number(values[column])
    cells = [[method, *(line.get(key, "-") for key in headings)] for method, line in table.items()]
    return found["about"], [["", *headings.values()], *cells]


def _farthest(of_methods: list[dict[str, list[dict[str, float] | None]]]) -> str:
    """The last target that every run of all methods reaches, or else the first."""
    first, *targets = of_methods[0]
    reached = [t for t in targets if all(all(times[t]) for times in of_methods)]
    return reached[-1] if reached else first


def cost_overview(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """As `overview`, of what experiments.cost returns."""
    settings = found["settings"]
    cells = [
        [
            CONTESTANTS[name].label,
            *(f"{entry['contestants'][name]['ratio_to_plain']['median']:.2f}" for entry in settings),
        ]
        for name in settings[0]["contestants"]
    ]
    size = settings[0]["setting"]
    about = f"a training step, times torch.nn's without SIRE; {size['cell']} T={size['T']} B={size['B']} H={size['H']}"
    return about, [["", *(entry["setting"]["swaps"] for entry in settings)], *cells]


def markdown_table(headings: list[str], *rows: list[str]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def markdown(title: str, notes: Sequence[str], made: list[tuple[str, list[list[str]]]]) -> str:
    """A page of tables."""
    parts = [f"# {title}", *notes]
    for caption, rows in made:
        parts += [f"**{caption}**", markdown_table(*rows)]
    return "\n\n".join(parts) + "\n"


def rich_table(caption: str, rows: list[list[str]]) -> Table:
    table = Table(title=caption)
    for n, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if n else "left", overflow="fold")  # no name is cut
    for row in rows[1:]:
        table.add_row(*row)
    return table


def picture(found: dict[str, Any], kind: str) -> Figure:
    """A figure for a talk; kind as in Experiment.picture."""
    rows = [row for row in found["rows"] if row["budget"] == "steps"]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = methods if kind == "heat map" else settings
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    beside = columns == 1  # stands the legend, else below
    figure = Figure(figsize=(4.6 * columns + 2.6 * beside, 3.5 * lines + 0.8), layout="constrained")
    figure.suptitle(found["about"], fontweight="bold")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    styles = _styles(methods)
    errors = [v["mean"] for row in rows for v in _drawn(row)[1].values()]
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(panel, loc="left", fontsize=10)
        if kind == "heat map":
            axes.set_title(f"{panel}: {_drawn(rows[0])[0]}", loc="left", fontsize=10)
            _heat_map(axes, [row for row in rows if row["method"] == panel], LogNorm(min(errors), max(errors)))
            continue
        if kind in ("epochs", "seconds"):
            _history(axes, [row for row in rows if row["setting"] == panel], styles, kind)
        else:
            here = [row for row in rows if row["setting"] == panel]
            if kind == "dots" or len(_drawn(here[0])[1]) <= 2:  # no curve
                _dots(axes, here, styles, found)
            else:
                _curves(axes, here, styles)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid[: len(panels)]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(
            handles.values(),
            handles,
            loc="outside right center" if beside else "outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
    return figure


def _styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """SIRE in cold colours and full lines, its rivals in warm ones and dashed; dotted where a colour comes again."""
    counts = {True: 0, False: 0}
    styles = {}
    for method in methods:
        ours = any(word in method for word in ("SIRE", "uniform", "adjacent"))
        colours, n = _OURS if ours else _RIVALS, counts[ours]
        counts[ours] += 1
        styles[method] = {
            "color": colours[n % len(colours)],
            "linestyle": ("-" if ours else "--") if n < len(colours) else ":",
            "linewidth": 2.4 if ours else 1.6,
            "marker": "osD^vP"[n // len(colours) % 6],
            "markersize": 4,
        }
    return styles


def _drawn(row: dict[str, Any]) -> tuple[str, dict[str, dict[str, float]]]:
    """The metric in a picture and its values: where few answers are right, how wrong they are says more."""
    metrics = list(row["metrics"].items())
    return metrics[-1] if len(metrics[0][1]) > 1 else metrics[0]


def _curves(axes: Axes, rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for row in rows:
        metric, values = _drawn(row)
        lengths = [int(c) for c in values]
        mean, sd = ([v[key] for v in values.values()] for key in ("mean", "sd"))
        axes.plot(lengths, mean, label=row["method"], **styles[row["method"]])
        most = 1.0 if metric == "accuracy" else math.inf
        if len(rows) > _BANDS or None in sd:
            continue
        lower, upper = ([min(m + sign * s, most) for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
        axes.fill_between(lengths, lower, upper, color=styles[row["method"]]["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("length of the test sequences")
    _values(axes, "y", metric)


def _dots(axes: Axes, rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]], found: dict[str, Any]) -> None:
    """A dot with its standard deviation, and its number, for each method, at the first length that is told; bars from 0
    hide much."""
    for n, row in enumerate(rows):
        metric, values = _drawn(row)
        column = next(c for c in (*found["at"], *values) if c in values)
        value = values[column]
        colour = styles[row["method"]]["color"]
        mean, sd = value["mean"], value["sd"] or 0.0
        above = min(sd, 1 - mean) if metric == "accuracy" else sd
        axes.errorbar(mean, -n, xerr=[[sd], [above]], fmt="o", color=colour, markersize=8, capsize=4)
        told = _number({"mean": mean, "sd": None})
        axes.text(1.02, -n, told, fontsize=8, va="center", transform=axes.get_yaxis_transform())
        if "published" in row:
            label = f"published ({found['published_on']})"
            axes.plot(row["published"], -n, "k|", markersize=18, markeredgewidth=2, label=label)
    axes.set_yticks([-n for n in range(len(rows))], [row["method"] for row in rows], fontsize=8)
    _values(axes, "x", metric if len(values) == 1 else f"{metric} at {column}")


def _values(axes: Axes, name: Literal["x", "y"], label: str) -> None:
    """The axis of a metric: up to 1 for accuracies; logarithmic for errors over a decade, with numbers as a person
    writes them."""
    axes.set(**{f"{name}label": label})
    axis = axes.xaxis if name == "x" else axes.yaxis
    if "accuracy" in label:
        least, most = axis.get_view_interval()
        axes.set(**{f"{name}lim": (least, min(most, 1 + 0.05 * (1 - least)))})
        return
    least, most = axis.get_data_interval()
    if least > 0 and most < 10 * least:
        return
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1e4 * axis.get_minpos() else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _history(axes: Axes, rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]], kind: str) -> None:
    for row in rows:
        key, factor = ("step", row["config"]["batch"] / row["epoch"]) if kind == "epochs" else ("seconds", 1)
        lines = row["history"]
        style = styles[row["method"]] | {"label": row["method"], "markevery": max(1, len(lines) // 8), "alpha": 0.8}
        axes.plot([factor * line[key] for line in lines], [line["validation"] for line in lines], **style)
    metric = next(iter(rows[0]["metrics"]))
    axes.set_xlabel("epochs" if kind == "epochs" else "seconds of training on a core")
    _values(axes, "y", f"validation {metric}")


def _heat_map(axes: Axes, rows: list[dict[str, Any]], scale: LogNorm) -> None:
    values = [[v["mean"] for v in _drawn(row)[1].values()] for row in rows]
    axes.imshow(values, norm=scale, cmap="viridis_r", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "k" if scale(value) < 0.5 else "w"
            axes.text(x, y, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(values[0])), list(_drawn(rows[0])[1]))
    axes.set_yticks(range(len(rows)), [row["setting"].removeprefix("trained on ") for row in rows])
    axes.set(xlabel="test length", ylabel="training lengths")


def cost_picture(found: dict[str, Any]) -> Figure:
    """Time of a training step of each contestant, a panel for each setting."""
    figure = Figure(figsize=(13, 3), layout="constrained")
    figure.suptitle(cost_overview(found)[0], fontweight="bold")
    panels = figure.subplots(1, len(found["settings"]), sharex=True, sharey=True)
    for axes, entry in zip(panels, found["settings"], strict=True):
        names = list(entry["contestants"])[::-1]
        bars = axes.barh(
            [CONTESTANTS[name].label for name in names],
            [entry["contestants"][name]["ratio_to_plain"]["median"] for name in names],
            color=[_OURS[0] if name.startswith("sire_fast") else _RIVALS[-1] for name in names],
        )
        axes.bar_label(bars, fmt=" %.2f", fontsize=8)
        axes.axvline(1, color="k", linewidth=1)
        axes.set_title(entry["setting"]["swaps"], loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    ratios = [row["ratio_to_plain"]["median"] for entry in found["settings"] for row in entry["contestants"].values()]
    axes.set_xlim(min(ratios) / 2, max(ratios) * 4)  # of all panels, with room for the numbers
    return figure
