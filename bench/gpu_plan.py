"""What bench.gpu times, and what it is to reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.gpu_check import DTYPES
from sire_fast import backends
from sire_fast.backends import gpu
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import Setting


def kernels() -> list[str]:
    """The backends that run on a GPU alone."""
    return [name for name in backends.KERNELS if name != "cpu"]


class Goal(NamedTuple):
    """At most `limit`: of the time, or the peak memory, of `against`; or microseconds of a forward step."""

    limit: float
    against: str | None = None
    of: str = "step"
    ours: str = "kernel"

    def __str__(self) -> str:
        return f"{self.ours}, {self.of}, against {self.against}" if self.against else f"{self.ours}, us of a step"


class Item(NamedTuple):
    """A setting and who runs it: "kernel" and "kernel plain" stand for all kernels, with and without SIRE."""

    setting: Setting
    arithmetic: str
    names: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    sweep: str | None = None  # the axis on whose panel it is drawn

    def __str__(self) -> str:
        s = self.setting
        return f"{s.cell} T={s.T} B={s.B} I={s.I} H={s.H} {s.swaps} {s.compare} {self.arithmetic}"

    def contestants(self, found: Sequence[str]) -> list[str]:
        """Their names, with those of the kernels in place of "kernel"."""
        return [n.replace("kernel", k) for n in self.names for k in (found if n.startswith("kernel") else ("",))]


SIRE = ("kernel", "kernel plain", "plain", "stacked", "shared")
PLAIN = ("kernel plain", "plain")
TORCHRL = ("torchrl", "torchrl stacked")  # where it is installed; compiles a dozen candidates for each T and H first


def plan(device: str) -> list[Item]:
    """What is timed, the most important first."""
    items = []

    def add(sizes: tuple[Any, ...], arithmetics: str, names: tuple[str, ...] = SIRE, *goals: Goal, **more: Any) -> None:
        pairs, compare = more.get("variants", ("uniform:8", "end"))
        for arithmetic in arithmetics.split():
            dtype = gpu.name_of(DTYPES[arithmetic])
            if dtype in benchmark.DTYPES:  # no others are settings
                setting = Setting(*sizes, pairs, compare, dtype, device)
                there = tuple(n for n in names if n not in TORCHRL or n in benchmark.contestants(setting))
                items.append(Item(setting, arithmetic, there, goals, more.get("sweep")))

    microsecond = Goal(1.0, of="forward")
    goals = (Goal(1.0, "plain"), Goal(1 / 4, "stacked"), Goal(1 / 100, "reference"), microsecond)
    add(("GRU", 1000, 64, 128, 128), "bfloat16 float32 tf32", (*SIRE, "reference", *TORCHRL), *goals)
    memory = (Goal(0.6, "stacked", "peak"),)
    add(("GRU", 100, 64, 128, 128), "float32 bfloat16", SIRE, *memory, variants=("uniform:4", "end"))
    add(("GRU", 200, 234, 128, 128), "bfloat16 float32", ("kernel", "plain", "stacked"), microsecond)

    # a layer and its penalty at the authors' size
    over_plain = (Goal(0.5, "plain", ours="kernel plain"),)
    for cell in ("GRU", "LSTM"):
        sizes = (cell, 100, 64, 256, 256)
        small = (*over_plain, Goal(1.05, "kernel plain"), Goal(1.0, "plain"))
        add(sizes, "float32 bfloat16", SIRE, *small, variants=("adjacent:8", "swap"))
        add(sizes, "float32", (*SIRE, "published"), *over_plain, variants=("adjacent:1", "swap"))
        add(sizes, "float32", SIRE, *over_plain, variants=("adjacent:all", "swap"))
    for cell in ("LSTM", "RNN"):
        add((cell, 1000, 64, 128, 128), "bfloat16", (*SIRE, *TORCHRL), *goals[:2], microsecond)

    # large states, small states, and sizes at which cuDNN's choice of an algorithm is poor; no penalty
    as_fast = Goal(1.0, "plain", ours="kernel plain")
    add(("LSTM", 1024, 16, 768, 768), "bfloat16 float32", PLAIN, as_fast)
    add(("LSTM", 1024, 16, 768, 768), "float16", PLAIN, as_fast._replace(limit=1.3))
    for hidden in (256, 512, 768):
        add(("GRU", 1024, 16, hidden, hidden), "bfloat16 float32", PLAIN, as_fast)
    for hidden in (32, 64, 128):
        for batch in (16, 16 * 768 // hidden):
            add(("LSTM", 1024, batch, hidden, hidden), "bfloat16", PLAIN, microsecond._replace(ours="kernel plain"))
    for cell in ("LSTM", "GRU"):
        for sizes, limit in (
            ((2721, 6, 128, 72), 1.0),
            ((3854, 16, 112, 128), 1.0),
            ((2058, 62, 16, 168), 1 / 5),
            ((1125, 44, 40, 160), 1 / 5),
        ):
            add((cell, *sizes), "float32", PLAIN, as_fast._replace(limit=limit))

    swept = ("kernel", "kernel plain", "plain", "stacked")
    for batch in (4, 16, 64, 256):
        add(("GRU", 256, batch, 128, 128), "bfloat16", swept, sweep="B")
    for hidden in (32, 64, 128, 256, 512):
        add(("GRU", 256, 64, hidden, hidden), "bfloat16", swept, sweep="H")
    for steps in (64, 256, 1024):
        add(("GRU", steps, 64, 128, 128), "bfloat16", swept, sweep="T")
    # last: nobody knows how long a loop of 20 steps takes to compile
    add(("GRU", 20, 64, 64, 64), "float32", (*SIRE, "reference", "compiled"), variants=("uniform:4", "end"))
    return items
