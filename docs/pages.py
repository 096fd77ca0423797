"""What the pages are made with.

Run the python blocks of a page from top to bottom, as the tests do, and keep the pictures that they save:

    python docs/pages.py tutorial

For mkdocs it is a hook: the pages show files of bench/results, which lie outside of this folder.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "bench/results"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(path: Path) -> None:
    """Run all python blocks of a page in one namespace; errors tell the page's own lines."""
    text, names = path.read_text(), {"__name__": "__main__"}
    for block in PYTHON.finditer(text):
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, str(path), "exec"), names)


def on_files(files: Any, config: Any) -> Any:
    """Add what `sire-fast reproduce` and the demo wrote, as results/..., to the site."""
    from mkdocs.structure.files import File

    for path in sorted([*RESULTS.rglob("*.png"), *RESULTS.rglob("*.md")]):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../bench/results/", "](results/")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        run(HERE / f"{sys.argv[1]}.md")
        (HERE / "images").mkdir(exist_ok=True)
        for picture in Path(directory).glob("*.png"):
            shutil.copy(picture, HERE / "images")
