"""No process that is started beside another one outlives it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from bench import aot, processes
from sire_fast.lab import benchmark
from sire_fast.lab.paper import trials


def work(*_: object) -> None:
    """That takes for ever, and says when it has begun."""
    print("works", flush=True)
    signal.pause()


def memory() -> None:
    benchmark._peak_growth = work
    benchmark.peak_memory(benchmark.Setting("GRU", 3, 2, 2, 2), "torch.nn")


def trainings() -> None:
    trials._run_into = work
    trials.run_all([(Path("a"), trials.Trial("")), (Path("b"), trials.Trial(""))], 2, lambda: None)


def compiling() -> None:
    [*aot.done_all(work, aot.jobs([80], ["gru"], [("float32", 16)]), 1)]


def checking() -> None:
    [*processes.answers([work], 1, 600, 600)]


@pytest.mark.skipif(sys.platform != "linux", reason="tells by what Linux says of a pipe")
@pytest.mark.parametrize("starts", [memory, trainings, compiling, checking], ids=lambda each: each.__name__)
def test_no_worker_outlives_its_parent(starts, tmp_path):
    root, here = Path(__file__).parents[1], Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", f"import test_workers; test_workers.{starts.__name__}()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(here)])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "works\n"
        process.kill()
        process.communicate(timeout=30)  # until all that could write have ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
