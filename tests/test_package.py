"""What a user meets first: the import, with and without the extension, and the examples in the documentation."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sire_fast
from bench import paper
from docs import pages
from sire_fast.lab.paper.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
MODULES = [
    # some need what others make
    pytest.param(
        name, marks=pytest.mark.proof if name.startswith(("sire_fast.integrations.", "sire_fast.lab.in_jax")) else ()
    )
    for _, name, _ in pkgutil.walk_packages(sire_fast.__path__, "sire_fast.")
    if name != "sire_fast.__main__"
]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_files_may_name_our_own_classes_and_no_others() -> None:
    done = _python(
        "from torch.serialization import get_safe_globals\n"
        "before = get_safe_globals()\n"
        "import sire_fast\n"
        "print(*{each.__module__.split('.')[0] for each in get_safe_globals() if each not in before})\n"
    )
    assert done.stdout.split() == ["sire_fast"], done.stderr


def test_without_the_extension_one_warning_says_why_and_the_reference_serves() -> None:
    done = _python(
        "import sys, torch\n"
        "sys.modules['sire_fast._C'] = None\n"
        "import sire_fast\n"
        "print(sire_fast.backends.choose('auto', cell='gru', dtype=torch.float32, device='cpu', hidden_size=5))\n"
        "layer = sire_fast.GRU(4, 5, swaps=sire_fast.swaps.Uniform(2))\n"
        "layer(torch.randn(6, 3, 4))\n"
        "sire_fast.penalty(layer).backward()\n"
        "print(*layer.why_not_fused())\n"
    )
    assert done.returncode == 0, done.stderr
    served, reason = done.stdout.splitlines()
    assert served == "reference"
    assert reason.startswith("cpu: the extension sire_fast._C was not built")
    assert done.stderr.count("RuntimeWarning") == 1
    assert "without its compiled kernels, slowly: the extension sire_fast._C was not built" in done.stderr


@pytest.mark.parametrize(("limit", "sets"), [("avx2", ("Avx2", "Baseline")), ("default", ("Baseline",))])
def test_the_kernels_keep_to_the_instruction_set_that_torch_is_limited_to(limit: str, sets: tuple, monkeypatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
    done = _python("from sire_fast import _C; print(_C.instruction_set(), *_C.instruction_sets())")
    serves, *has = done.stdout.split()
    assert serves == next(name for name in sets if name in has), done.stderr


@pytest.mark.proof
def test_a_build_without_a_compiler_installs_and_works(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("csrc", "kernels", "sire_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", site, source], env={**os.environ, "CC": "false", "CXX": "false"}, check=True)
    assert not [*site.rglob("*.so")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"  # which finds ours
            "import sire_fast\n"
            "layer = sire_fast.convert(torch.nn.GRU(4, 5), weight=0.1)\n"
            "layer(torch.randn(6, 3, 4))[0].sum().backward()\n"
            "print(sire_fast.__file__, sire_fast.penalty(layer).item(), sep='\\n')\n",
        ],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    path, penalty = done.stdout.splitlines()
    assert path.startswith(str(site))
    assert float(penalty) > 0
    assert done.stderr.count("RuntimeWarning: sire_fast runs without its compiled kernels, slowly") == 1


def test_the_oldest_torch_is_the_one_that_is_tested() -> None:
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"TORCH ?= {floor}.0\n" in (ROOT / "Makefile").read_text()
    workflow = ROOT / ".github/workflows/test.yml"
    assert not workflow.exists() or f'"{floor}.0"' in workflow.read_text()  # which a source distribution lacks


def test_import_is_quiet_and_brings_nothing_for_training_or_tests() -> None:
    done = _python(
        "import sys, sire_fast; print(*{'matplotlib', 'rich', 'typer', 'pytest', 'triton'} & set(sys.modules))"
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_the_version_has_its_changes() -> None:
    assert f"## {sire_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("sire_fast") == sire_fast.__version__


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    torch.use_deterministic_algorithms(False)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(("name", "title"), [("plain", "without SIRE"), ("sire", "with SIRE")])
def test_the_readme_tells_the_numbers_of_its_result_files(name: str, title: str) -> None:
    result = json.loads((ROOT / "bench/results/demo" / f"{name}.json").read_text())
    scores = [row["accuracy"] for row in result["metrics"].values()]
    numbers = f"{sum(scores) / len(scores):.3f} | {scores[-1]:.3f} | {result['order_sensitivity']['mean']:.2g}"
    assert f"| {title} | {numbers} | {result['seconds']:.1f} |" in (ROOT / "README.md").read_text()


def _benchmark(instruction_set: str) -> dict[str, Any]:
    """The result that the README links."""
    path = re.search(rf"\[{instruction_set}\]\((bench/results/[^/]+\.json)\)", (ROOT / "README.md").read_text())[1]
    return json.loads((ROOT / path).read_text())


@pytest.mark.parametrize("instruction_set", ["AVX-512", "AVX2"])
@pytest.mark.parametrize("what", ["Adjacent(8)", 'Adjacent("all")'])
def test_the_readme_tells_the_ratios_of_the_benchmark(what: str, instruction_set: str) -> None:
    result = _benchmark(instruction_set)
    rows = [row for row in result["goals"] if row["what"] == f"swap, {what}, against plain"]
    assert len(rows) == 6
    cells = " | ".join(f"{row['measured']['median']:.2f}" for row in rows)
    assert f"| `{what}`, {instruction_set} | {cells} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "title", "instruction_set"),
    [
        ("plain", "torch.nn without SIRE", "AVX-512"),
        ("sire_fast", "sire_fast with SIRE", "AVX-512"),
        ("sire_fast", "sire_fast with SIRE", "AVX2"),
        ("shared", "plain PyTorch, prefix shared", "AVX-512"),
        ("stacked", "torch.nn on the stacked variants", "AVX-512"),
        ("published", "the authors' procedure, K=1", "AVX-512"),
    ],
)
def test_the_readme_tells_the_times_of_the_benchmark(name: str, title: str, instruction_set: str) -> None:
    result = _benchmark(instruction_set)
    each = [{n: s["median"] for n, s in row["seconds"].items()} for row in result["sweeps"]["H"]]
    cells = " | ".join(f"{1e3 * row[name]:.1f} ({row[name] / row['plain']:.2f})" for row in each)
    assert f"| {title}, {instruction_set} | {cells} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("instruction_set", ["AVX-512", "AVX2"])
def test_the_documentation_tells_the_rates_of_the_benchmark(instruction_set: str) -> None:
    result = _benchmark(instruction_set)
    for what in ("no swaps", 'swap, Adjacent("all")', "end, Uniform(4)"):
        rows = [row["measured"]["median"] for row in result["goals"] if row["what"] == f"arithmetic rate, {what}"]
        cells = " | ".join(" ".join(f"{rate:.2f}" for rate in rows[n::3]) for n in range(3))
        assert f"| {what}, {instruction_set} | {cells} |" in (ROOT / "docs" / "how-it-works.md").read_text()


def test_the_documentation_tells_the_results_of_the_papers_experiments() -> None:
    page = paper.PAGE.read_text()
    assert paper.with_section(page) == page
    for result in paper.RESULTS.glob("*.json"):
        assert f"### {result.stem}:" in page
        for kind in ("md", "png"):
            assert result.with_suffix(f".{kind}").exists()


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "Use it when"), ("docs/experiments.md", "Published, and here")]
)
def test_what_is_compared_are_numbers_of_the_papers_experiments(page: str, heading: str) -> None:
    told = (ROOT / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    table = "\n".join(line for line in told.splitlines() if line.startswith("|"))
    published = {f"{value:.3f}" for experiment in EXPERIMENTS.values() for value in experiment.published.values()}
    numbers = {*re.findall(r"\d+\.\d{3}|\d{4}(?= \|)", table)} - published
    assert len(numbers) > 15
    assert numbers <= {*re.findall(r"[\d.]+", paper.section())}


def test_the_text_tells_numbers_of_the_papers_experiments() -> None:
    told = paper.PAGE.read_text().split("## What they show\n")[1].split("\n## ")[0]
    published = {f"{value:.3f}" for experiment in EXPERIMENTS.values() for value in experiment.published.values()}
    numbers = {*re.findall(r"\d+\.\d{3}", told)} - published
    assert len(numbers) > 30
    pages = "".join(path.read_text() for path in paper.RESULTS.glob("*.md"))
    assert numbers <= {*re.findall(r"[\d.]+", pages)}


def test_what_the_documentation_calls_is_there_after_the_import() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    called = {name for page in pages for name in re.findall(r"sire_fast(?:\.\w+)+(?=\()", page.read_text())}
    assert len(called) > 10
    done = _python("import sire_fast\n" + "\n".join(sorted(called)))
    assert done.returncode == 0, done.stderr


BLOCKS = [
    pytest.param(block, id=f"{path.name}-{n}")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_in_the_documentation(block: str) -> None:
    exec(compile(block, "example", "exec"), {})


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_pages_of_the_documentation_run_from_top_to_bottom(page: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    pages.run(page)
