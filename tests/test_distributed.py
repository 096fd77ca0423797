"""Several processes: gradients under torch's wrappers, and the training loop with its files and its command line."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sire_fast
from sire_fast.swaps import Uniform
from sire_fast.tasks import TASKS
from sire_fast.train import FILES, Config, Run, by_first, claim, of_all

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

PROCESSES = 2
SECONDS = 120  # longer than anything here takes: what hangs is stopped


def _process(rank: int, directory: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(directory / "store"), PROCESSES)
    timeout = timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    work(directory, *arguments)
    distributed.destroy_process_group()


def run_in_processes(directory: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(directory, *arguments) in a group of processes."""
    processes = torch.multiprocessing.spawn(_process, (directory, work, arguments), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()


class Model(nn.Module):
    """A layer and a head; the penalty comes out of the forward, or is asked for after it."""

    def __init__(self, inside: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.rnn = sire_fast.GRU(3, 5, **options)
        self.head, self.inside = nn.LazyLinear(1), inside
        self(torch.randn(2, 1, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.head(self.rnn(x)[0][-1])
        return output, sire_fast.penalty(self.rnn) if self.inside and self.rnn.swaps else None


def sharded(model: Model) -> nn.Module:
    fully_shard(model.rnn)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[Model], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp-find-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp-static-graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "fsdp": fully_shard,
    "fsdp-each": sharded,
}
PLACES = {"outside": False, "inside": True}
OPTIONS = {"fused": {}, "stacked": {"num_layers": 2, "bidirectional": True}}
CASES = [*itertools.product(WRAPPERS, PLACES, OPTIONS)]
