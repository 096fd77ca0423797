"""An experiment from its name to its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from sire_fast.lab.files import alone, check_directory, write
from sire_fast.lab.paper import data, experiments, report
from sire_fast.lab.paper.experiments import EXPERIMENTS, Case
from sire_fast.lab.paper.problems import check_elements
from sire_fast.lab.paper.trials import Trial, best, run_all

NAMES = (*EXPERIMENTS, "cost")
PRESETS = ("quick", "full")

QUICK = "Quick preset: it shows that everything runs; its numbers mean nothing."


class Row(NamedTuple):
    """A case, with the files of its choices and of its results, one a seed."""

    case: Case
    choices: list[Path]
    results: list[Path]


def plan(name: str, preset: str, seeds: int | None, path: Path | None, out: Path) -> list[Row]:
    """The rows of an experiment; none for "cost".

    Raises:
        ValueError: an argument has no such value, or the data cannot be read.
    """
    for argument, value, known in (("name", name, NAMES), ("preset", preset, PRESETS)):
        if value not in known:
            raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {value!r}")
    check_directory(out)
    _check_preset(out / f"{name}.json", preset)
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if seeds is not None and name == "cost":
        raise ValueError(f"seeds: expected none for cost, which trains nothing, got {seeds}")
    cases = [] if name == "cost" else list(EXPERIMENTS[name].cases())
    uses = {"lp-mnist": data.images, "lp-mnist-pixels": data.images, "points": data.points}
    reads = {case.trial.problem for case in cases} & set(uses)
    if path is not None and not reads:
        raise ValueError(f"data: expected none for {name}, whose data are generated, got {path}")
    cases = experiments.quick(cases) if preset == "quick" else cases
    for problem in reads:
        split = uses[problem](path)  # errors before the first trial
        if problem == "points":
            for case in cases:
                check_elements(split, case.trial.train_lengths[0])
    rows = []
    count = seeds or (1 if preset == "quick" or not cases else EXPERIMENTS[name].seeds)
    for case in cases:
        trial, *choices = (replace(t, data=None if path is None else str(path)) for t in (case.trial, *case.choices))
        words = re.sub(r"[^a-z0-9.]+", "-", f"{case.setting} {case.method}".lower()).strip("-")
        files = [out / name / f"{words}-choice-{n}.json" for n in range(len(choices))]
        results = [out / name / f"{words}-{seed}.json" for seed in range(min(count, case.seeds or count))]
        rows.append(Row(case._replace(trial=trial, choices=tuple(choices)), files, results))
    return rows


def _check_preset(path: Path, preset: str) -> None:
    """Raise a ValueError where a file holds the results of another preset: hours, perhaps, for seconds."""
    try:
        found = json.loads(path.read_text())["preset"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that nobody can use
        return
    if found != preset:
        raise ValueError(f"{path}: holds results of the preset {found}; take another --out, or move it away")


def reproduce(
    name: str,
    preset: str,
    rows: list[Row],
    out: Path,
    workers: int,
    finished: Callable[[], None],
) -> dict[str, Any]:
    """Run what has not been run, and write NAME.json, NAME.md and NAME.png into a directory.

    Returns:
        What the JSON holds.

    Raises:
        OSError: a file cannot be written, or another process runs this experiment there.
        ValueError: a checkpoint cannot be read, or a file is of other settings.
    """
    if name == "cost":
        found = experiments.cost(preset, finished)
        notes, made, figure = [], report.cost_tables(found), report.cost_picture(found)
        machine = found["settings"][0]["machine"]
        commits = [machine["commit"]]
    else:
        choices = [each for row in rows for each in zip(row.choices, row.case.choosing(), strict=True)]
        (out / name).mkdir(parents=True, exist_ok=True)
        with alone(out / name):
            run_all(choices, workers, finished)
            chosen = [_chosen(row) for row in rows]
            trials = [
                (path, replace(trial, seed=seed))
                for row, trial in zip(rows, chosen, strict=True)
                for seed, path in enumerate(row.results)
            ]
            # all rows of a seed, then the next
            run_all(sorted(trials, key=lambda each: each[1].seed), workers, finished)
        experiment = EXPERIMENTS[name]
        results = [[json.loads(path.read_text()) for path in row.results] for row in rows]
        found = report.summary(name, experiment, [row.case for row in rows], results)
        made, figure = report.tables(found), report.picture(found, experiment.picture)
        machine, commits = found["machine"], found["commits"]
        notes = [f"Data: {report.origin(found)}."]
    if preset == "quick":
        notes.insert(0, QUICK)
    notes.append(f"{machine['device']}, commit {', '.join(map(str, commits))}, torch {machine['versions']['torch']}.")
    _write(out, name, {"preset": preset, **found}, report.markdown(name, notes, made), figure)
    return found


def _chosen(row: Row) -> Trial:
    """The settings of a row's results."""
    if not row.choices:
        return row.case.trial
    scores = [best(json.loads(path.read_text())) for path in row.choices]
    return row.case.choices[scores.index(max(scores))]


def _write(out: Path, name: str, found: dict[str, Any], page: str, figure: Figure) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"{name}.json", json.dumps(found) + "\n")
    write(out / f"{name}.md", page)
    write(out / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=130))
