"""An experiment from its name to its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sire_fast.lab.paper import data, experiments, report
from sire_fast.lab.paper.experiments import EXPERIMENTS, Case
from sire_fast.lab.paper.trials import Trial, run_all
from sire_fast.lab.train import write

NAMES = (*EXPERIMENTS, "cost")
PRESETS = ("quick", "full")
_SEEDS = {"quick": 1, "full": 5}

Tables = list[tuple[str, list[list[str]]]]


def plan(name: str, preset: str, seeds: int | None, path: Path | None, out: Path) -> list[tuple[Case, Path, Trial]]:
    """The trials of an experiment: row, file and settings; none for "cost".

    Raises:
        ValueError: an argument has no such value, or the data cannot be read.
    """
    for argument, value, known in (("name", name, NAMES), ("preset", preset, PRESETS)):
        if value not in known:
            raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {value!r}")
    seeds = _SEEDS[preset] if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    cases = [] if name == "cost" else list(EXPERIMENTS[name].cases())
    uses = {"lp-mnist": data.images, "points": data.points}
    reads = {case.trial.problem for case in cases} & set(uses)
    if path is not None and not reads:
        raise ValueError(f"data: expected none for {name}, whose data are generated, got {path}")
    for problem in reads:
        uses[problem](path)  # errors before the first trial
    chosen = experiments.quick(cases) if preset == "quick" else cases
    planned = []
    for case in chosen:
        for seed in range(seeds):
            trial = replace(case.trial, seed=seed, data=None if path is None else str(path))
            words = re.sub(r"[^a-z0-9.]+", "-", f"{case.setting} {case.method}".lower()).strip("-")
            planned.append((case, out / name / f"{words}-{seed}.json", trial))
    return planned


def reproduce(
    name: str,
    preset: str,
    planned: list[tuple[Case, Path, Trial]],
    out: Path,
    workers: int,
    finished: Callable[[], None],
) -> tuple[dict[str, Any], Tables]:
    """Run what has not been run, and write NAME.json, NAME.md and NAME.png into a directory.

    Returns:
        What the JSON holds, and the tables.
    """
    if name == "cost":
        found = experiments.cost(preset, finished)
        notes, made, figure = [], report.cost_tables(found), report.cost_picture(found)
        machine = found["settings"][0]["machine"]
        commits = [machine["commit"]]
    else:
        run_all([(path, trial) for _, path, trial in planned], workers, finished)
        rows: dict[Case, list[dict]] = {}
        for case, path, _ in planned:
            rows.setdefault(case, []).append(json.loads(path.read_text()))
        experiment = EXPERIMENTS[name]
        found = report.summary(name, experiment, list(rows), list(rows.values()))
        made, figure = report.tables(found), report.picture(found, experiment.picture)
        machine, commits = found["machine"], found["commits"]
        notes = [f"Data: {report.origin(found)}."]
    if preset == "quick":
        notes.insert(0, "Quick preset: it shows that everything runs; its numbers mean nothing.")
    notes.append(f"{machine['device']}, commit {', '.join(map(str, commits))}, torch {machine['versions']['torch']}.")
    _write(out, name, {"preset": preset, **found}, report.markdown(name, notes, made), figure)
    return found, made


def _write(out: Path, name: str, found: dict[str, Any], page: str, figure: Figure) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found) + "\n"
    write(out / f"{name}.json", lambda temporary: temporary.write_text(text))
    write(out / f"{name}.md", lambda temporary: temporary.write_text(page))
    write(out / f"{name}.png", lambda temporary: figure.savefig(temporary, format="png", dpi=130))
