"""Several processes: gradients under torch's wrappers, and the training loop with its files and its command line."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sire_fast.lab.train
from sire_fast.lab.tasks import TASKS
from sire_fast.lab.train import FILES, Config, Run, by_first, claim, of_all
from sire_fast.swaps import Uniform

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

PROCESSES = 2
SECONDS = 120  # far longer than anything here takes: what hangs is stopped
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(sire_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def in_processes(directory: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(directory, *arguments) in each process of a group."""
    directory.mkdir()
    call = (directory, work, arguments)
    processes = torch.multiprocessing.spawn(_process, call, nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
            process.join()


def _process(rank: int, directory: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(directory / "store"), PROCESSES)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=SECONDS)
    )
    work(directory, *arguments)
    distributed.destroy_process_group()


class Model(nn.Module):
    """A layer and a head, whose forward returns the penalty too if it is `inside`."""

    def __init__(self, inside: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = sire_fast.GRU(3, 5, compare="end", **options)
        self.head = nn.Linear(10 if self.rnn.bidirectional else 5, 1)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.head(self.rnn(x)[0][-1])
        return (y, sire_fast.penalty(self.rnn)) if self.inside else y


def shard(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))


def shard_each(model: Model) -> nn.Module:
    shard(model.rnn)
    return shard(model)


WRAPPERS: dict[str, Callable[[Model], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp-find-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp-static-graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "fsdp": shard,
    "fsdp-of-layers": shard_each,
}
LAYERS = {"fused": {}, "two-ways": {"num_layers": 2, "bidirectional": True}}
CASES = [*itertools.product(WRAPPERS, ("outside", "inside", "joined"), LAYERS)]


def gradients(wrap: Callable[[Model], nn.Module], place: str, layer: str, part: slice) -> list[Tensor]:
    """Each parameter's gradient in the third step, of a part of the batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*size, 4, n, dtype=torch.float64, generator=generator) for *size, n in ((6, 3), (1,)))
    pairs = Uniform(3)(6, 4, generator)[part]
    torch.manual_seed(0)
    weight = 1.0 if place == "joined" else None
    model = Model(place == "inside", swaps=lambda *_: pairs, weight=weight, **LAYERS[layer]).double()
    wrapped = wrap(model)
    optimiser = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(3):  # DDP treats the first step, in which it learns about the model, in another way
        result = wrapped(x[:, part])
        result, penalty = result if model.inside else (result, sire_fast.penalty(wrapped))
        optimiser.zero_grad()
        ((result - y[part]).square().mean() + penalty).backward()
        optimiser.step()
    found = [parameter.grad for parameter in wrapped.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def _gradients_of_all_cases(directory: Path) -> None:
    part = slice(distributed.get_rank(), None, PROCESSES)
    found = {case: gradients(WRAPPERS[case[0]], *case[1:], part) for case in CASES}
    torch.save(found, directory / f"{distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def gradients_of_all_cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, ...], list[Tensor]]]:
    """By rank, then by case."""
    directory = tmp_path_factory.mktemp("gradients") / "shared"
    in_processes(directory, _gradients_of_all_cases)
    return [torch.load(directory / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_are_those_of_one_process_on_the_whole_batch(gradients_of_all_cases, case) -> None:
    alone = gradients(lambda model: model, *case[1:], slice(None))
    for found in gradients_of_all_cases:
        torch.testing.assert_close(found[case], alone, rtol=1e-12, atol=1e-12)


CELLS = ("gru", "lstm")
SETTINGS = {"task": "sum", "hidden": 8, "batch": 6, "steps": 9}


def train(directory: Path, stop_after: int = 0, **settings: Any) -> dict[str, Any]:
    """The result of a new run, in which the last process gets a Ctrl-C after one of its steps."""

    def report(step: int, loss: float, penalty: float) -> None:
        if step == stop_after and distributed.get_rank() == PROCESSES - 1:
            os.kill(os.getpid(), signal.SIGINT)

    by_first(lambda: claim(directory))
    return Run(Config(**SETTINGS, **settings), directory).train(report)


def _runs(directory: Path) -> None:
    TASKS["sum"] = replace(TASKS["sum"], test_lengths=(4, 6))
    for cell in CELLS:
        expected = train(directory / cell / "whole", cell=cell)
        with pytest.raises(KeyboardInterrupt):
            train(directory / cell / "parts", cell=cell, stop_after=5)
        run = Run.load(directory / cell / "parts")
        assert run.step == 5
        assert of_all(run.train()["metrics"]) == [expected["metrics"]] * PROCESSES
    train(directory / "every-swap", swaps="adjacent:all")

    with pytest.raises(ValueError, match="holds a run already"):
        by_first(lambda: claim(directory / "every-swap"))
    with pytest.raises(ValueError, match="batch: expected a multiple of the 2 processes, got 3"):
        Run(Config("sum", batch=3), directory)
    run = Run(Config(**SETTINGS), directory)
    with torch.no_grad():
        run.model.head.bias.fill_(torch.nan if distributed.get_rank() else 0.0)  # of one process alone
    with pytest.raises(FloatingPointError, match="the loss is nan after step 0"):
        run.advance()

    # Ctrl-C while the first process evaluates and the other waits for it
    run = Run(Config(**{**SETTINGS, "steps": 1}), directory)
    sire_fast.lab.train.evaluate = _interrupted_evaluation
    if distributed.get_rank():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert of_all("here") == ["here"] * PROCESSES


def _interrupted_evaluation(*_: object) -> None:
    time.sleep(1)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "shared"
    in_processes(directory, _runs)
    return directory


@pytest.mark.parametrize("cell", CELLS)
def test_a_resumed_run_is_the_uninterrupted_one(runs: Path, cell: str) -> None:
    whole, parts = (runs / cell / name for name in ("whole", "parts"))
    assert {path.name for path in whole.iterdir()} == set(FILES)
    theirs, ours = (torch.load(directory / "model.pt") for directory in (whole, parts))
    for name in ("model", "optimiser", "data", "random", "step"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    for directory in (whole, parts):
        lines = (directory / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, SETTINGS["steps"] + 1)]


def test_each_process_draws_its_own_swaps(runs: Path) -> None:
    (first, _), (second, _) = torch.load(runs / "gru" / "whole" / "model.pt")["random"]
    assert not torch.equal(first, second)


def test_the_processes_share_each_batch(runs: Path, tmp_path: Path) -> None:
    """With nothing left to chance in the swaps, the model is that of one process, but for rounding."""
    alone = Run(Config(**SETTINGS, swaps="adjacent:all"), tmp_path)
    for _ in range(SETTINGS["steps"]):
        alone.advance()
    shared = torch.load(runs / "every-swap" / "model.pt")["model"]
    torch.testing.assert_close(shared, alone.model.state_dict(), rtol=1e-4, atol=1e-6)


@contextmanager
def command_line(*arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of the command line, started as torchrun does."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **ENVIRONMENT,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(PROCESSES),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "sire_fast", *map(str, arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def said(processes: list[subprocess.Popen[str]]) -> list[tuple[str, list[str]]]:
    """What each process prints, and its own lines among the errors, to which torch may add."""
    printed = [process.communicate(timeout=SECONDS) for process in processes]
    return [(out, [line for line in err.splitlines() if line.startswith("sire-fast: ")]) for out, err in printed]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train sum --speed 3", "--speed"),
        ("train sum --batch 3", "batch: expected a multiple of the 2 processes, got 3"),
        ("train sum --out alone", "--force replaces it"),
        ("train sum --resume alone", "torchrun: expected as many processes as the run was started with, 1, got 2"),
        ("eval alone", "torchrun: expected the command train, got eval"),
    ],
)
def test_bad_input_is_told_once(monkeypatch, tmp_path: Path, arguments: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alone").mkdir()
    Run(Config(**SETTINGS), Path("alone")).save()
    with command_line(*arguments.split()) as processes:
        (out, (line,)), *others = said(processes)
    assert told in line
    assert [process.returncode for process in processes] == [2] * PROCESSES
    assert (out, others) == ("", [("", [])] * (PROCESSES - 1))


def test_ctrl_c_stops_all_after_the_same_step(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with command_line("train", "sum", "--hidden", 4, "--steps", 5000, "--out", "run") as processes:
        deadline = time.monotonic() + SECONDS
        while not Path("run/model.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[-1].send_signal(signal.SIGINT)
        (_, (line,)), *others = said(processes)
    step = torch.load("run/model.pt")["step"]
    goes_on = f"torchrun --nproc-per-node {PROCESSES} -m sire_fast train sum --resume run"
    assert line == f"sire-fast: interrupted after step {step}; to go on: {goes_on}"
    assert others == [("", [])] * (PROCESSES - 1)
    assert [process.returncode for process in processes] == [130] * PROCESSES


def test_torchrun(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "sire_fast", "train", "sum", "--hidden=4", "--steps=3", "--out=run"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # torchrun leaves its workers behind if it is killed
        process.communicate()
    assert process.returncode == 0, err
    assert out.count("order sensitivity: mean") == 1
    assert {path.name for path in Path("run").iterdir()} == set(FILES)
    assert len(torch.load("run/model.pt")["random"]) == PROCESSES
