"""Write the tables of docs/experiments.md from bench/results/paper: python -m bench.paper.

The results come from `sire-fast reproduce NAME --preset full --out bench/results/paper`, which leaves beside them a
folder of single trainings; it is kept of those that take hours.
"""

from __future__ import annotations

import json
from pathlib import Path

from sire_fast.lab.files import write
from sire_fast.lab.paper import report
from sire_fast.lab.paper.reproduce import NAMES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/paper"
PAGE = ROOT / "docs/experiments.md"
BEGIN, END = "<!-- python -m bench.paper -->\n", "<!-- end -->"


def section() -> str:
    """One table for each experiment whose result is kept, with links to its page and picture."""
    parts = []
    for name in NAMES:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        link = Path("..") / path.relative_to(ROOT).with_suffix("")
        if name == "cost":
            (title, rows), note = report.cost_overview(found), "Medians, all contestants in turns"
        else:
            title, rows = report.overview(found)
            note = f"{report.origin(found)}, {report.when(found['rows'][0])}"
        parts += [
            f"### {name}: {title}",
            report.markdown_table(*rows),
            f"{note}: [tables]({link}.md), [picture]({link}.png).",
        ]
    return "\n\n".join(parts) + "\n"


def with_section(page: str) -> str:
    """The page with its section made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n" + section() + "\n" + END + after


if __name__ == "__main__":
    write(PAGE, with_section(PAGE.read_text()))
