"""Predicts from machine code how long a time step takes on GPUs that need not be there: `python -m bench.model`.

Of every launch, Triton's as bench.aot compiles it and CUDA's as nvcc compiles it for that size alone, the instructions
of a time step are read from the machine code and issued one by one as a scheduler would for its share of a block's
warps: in order, each once its operands have come, its unit is free and, at a barrier, all warps are there. Printed are
microseconds of a step, what keeps the chip busy for how many of them, and the floor of bench.gpu.

Which instructions a step executes: the loop over time is the innermost that holds matrix instructions, in a streamed
launch the third from inside; the loops in it run as often as the launch says, or as the constants that they count to.
Where the code branches it goes the longer way, but never, if it can, past a load from global memory that it waits for,
since what every step reads was fetched before it, and the rest is for steps at which a variant begins or ends; nor past
what the step's number alone sends it to.

Not in it: conflicts of banks, misses of the second-level cache, the work of one warp alone (all do what the busiest
does). SCALE stands for them. It is the only constant that was fitted: to what FlashRNN tells of its Triton kernels for
an LSTM on an H100, whose machine code (Triton 3.1, bfloat16, 16 rows) this model gave 0.72 to 0.93 of the times that
they publish for heads of 16 to 128 (forward 1.9, 1.4, 1.9 and 3.2 us a step, backward 1.5 and 2.6 of the first two).
Numbers are good to 40 %; the order of two kernels that differ by less is not known.

After a change of the kernels `python -m bench.model --table` prints PREDICTED for sire_fast/backends/gpu.py (minutes).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bench import aot
from bench.gpu_time import work
from bench.machine_code import Code, Instruction, Trips, disassembled
from sire_fast.backends import cuda, gpu
from sire_fast.cells import CELLS
from sire_fast.kernels.launch import SHARED_MEMORY
from sire_fast.lab.benchmark import Setting


class Chip(NamedTuple):
    """Attributes:
    ghz: its clock.
    processors: multiprocessors.
    matrix: cycles for which mma.sync of 16x8x16 half types, or of 16x8x8 TF32, keeps a matrix unit busy.
    float32: cycles for which a warp's FP32 instruction keeps its unit busy.
    shared, l2, peer: cycles until a load from shared memory, a load from the second-level cache, or a store to another
        multiprocessor's shared memory has come.
    l2_bytes: of the second-level cache that a multiprocessor gets in a cycle.
    flops, bandwidth: dense half types, and bytes of memory, in a second.
    """

    ghz: float
    processors: int
    matrix: float
    float32: int
    shared: int
    l2: int
    peer: int
    l2_bytes: float
    flops: float
    bandwidth: float


# Where the constants come from:
# ghz, processors, flops, bandwidth: NVIDIA, "A100 Tensor Core GPU Architecture", "H100 Tensor Core GPU Architecture",
#   and the data sheet of the B200
# matrix: 1024 multiply-adds in a cycle of an A100's multiprocessor (Sun et al., arXiv 2206.02874); an H100 has twice as
#   many, of which mma.sync reaches 62 % (Luo et al., arXiv 2402.13499)
# float32: 64 or 128 results in a cycle (NVIDIA, "CUDA C++ Programming Guide", Arithmetic Instructions)
# shared, l2, peer: Luo et al., arXiv 2402.13499 and 2501.12084; l2_bytes: Jia et al., arXiv 1804.06826 (V100)
# For a B200 all but ghz, processors, flops and bandwidth is taken from the H100: nothing else was found.
CHIPS = {
    80: Chip(1.41, 108, 8, 2, 29, 262, 0, 64, 312e12, 1.6e12),
    90: Chip(1.755, 132, 6.5, 1, 29, 263, 180, 64, 989e12, 3.35e12),
    100: Chip(1.965, 148, 6.5, 1, 29, 263, 180, 64, 2250e12, 8e12),
}
MATRIX = 33  # cycles until a product has come; Sun et al. (A100), Luo et al. (H100)
BARRIER = 30  # cycles behind the last of eight warps; Zhang et al., arXiv 2004.05371: 22 of one warp on V100
FENCE = 2  # ways to the second-level cache and back, for which a fence waits behind stores to memory; a guess
SCALE = 1.24  # see above

# what others publish: microseconds of a step on an H100
PEERS = (
    "FlashRNN, LSTM, bfloat16, B=16, fused in Triton: 1.4 us for heads of 32, 3.2 for 128 (plots in NX-AI/flashrnn)",
    "cuDNN, LSTM, float16, B=16, H=768: 1.96 us, and 5.1 with its backward (the same plots)",
)
# what is called, with other cells and sizes
SETTING, VARIANTS = Setting("GRU", 1000, 64, 128, 128, "uniform:8", "end", "bfloat16"), 8
BACKENDS, DIRECTIONS = ("triton", "cuda"), ("forward", "backward")
NVCC = shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")) or "nvcc"


class Kind(NamedTuple):
    """Of instructions: the unit that it needs and for how long, in cycles, what it takes of the second-level cache, and
    when its result has come."""

    unit: str
    busy: float
    latency: float
    l2: float = 0


def kind(op: str, chip: Chip) -> Kind:
    """Units and cycles are those of a quarter of a multiprocessor, of which all four do the same; to share a unit with
    the others makes it four times as long busy. Lanes of a unit: NVIDIA, "CUDA C++ Programming Guide", as above.
    Latencies that are not in CHIPS: Abdelkhalik et al., arXiv 2208.11174."""
    width = 4 if "128" in op or "M88.4" in op else 2 if ".64" in op or "M88.2" in op else 1  # words of a lane
    if "MMA" in op:
        return Kind("matrix", chip.matrix / (2 if re.search(r"1688\.F|1684", op) and "TF32" not in op else 1), MATRIX)
    if re.match(r"MUFU|I2F|F2I", op):
        return Kind("special functions", 8, 22)
    if re.match(r"LDS|STS|SHFL|ATOMS", op):
        return Kind("shared memory", 4 * width, chip.shared)
    if re.match(r"(LDGSTS|LDG|LD|STG|ST|LDL|STL|ATOMG|RED|MEMBAR)\b", op):
        l2 = 0 if re.match(r"LDL|STL|MEMBAR", op) else 4 * 32 * 4 * width / chip.l2_bytes
        return Kind("shared memory", 4 * width, chip.l2 * (FENCE if op.startswith("MEMBAR") else 1), l2)
    if re.match(r"UCGABAR_WAIT|SYNCS", op):
        return Kind("", 0, chip.peer + chip.shared)
    if re.match(r"BRA|BSSY|BSYNC|BREAK|WARPSYNC|NOP|BAR|EXIT|DEPBAR|LDGDEPBAR|UCGABAR|ERRBAR|CCTL", op):
        return Kind("", 0, 1)
    if re.match(r"FADD|FMUL|FFMA|HFMA2|HADD2|HMUL2|IMAD", op):
        return Kind("float32", 2 if op.startswith("IMAD") else chip.float32, 4)
    return Kind("integers", 2, 5) if not re.match(r"U|S2|LDC|R2UR", op) else Kind("", 0, 10)


@dataclass
class _Warp:
    at: int = 0  # instructions that it has issued
    time: float = 0  # from when on it may issue the next
    known: dict[str, float] = field(default_factory=dict)  # register -> when its value has come
    copies: list[float] = field(default_factory=lambda: [0.0])  # when groups of asynchronous copies have come
    waits: bool = False  # at a barrier


class Step(NamedTuple):
    """Cycles of a step, and for how many of them the units and the scheduler, "issue", are busy."""

    cycles: float
    busy: dict[str, float]


def simulated(trace: Sequence[Instruction], chip: Chip, warps: int) -> Step:
    """One step out of many of a scheduler's warps, which all do the same."""
    kinds = {op: kind(op, chip) for op in {i.op for i in trace}}
    state, free, began = [_Warp() for _ in range(warps)], {}, []
    clock, end = 0.0, 3 * len(trace)  # the first step begins with all units idle
    while True:
        ready = []
        for n, warp in enumerate(state):
            if warp.at < end and not warp.waits:
                i = trace[warp.at % len(trace)]
                when = max(warp.time, clock, free.get(kinds[i.op].unit, 0))
                ready.append((max([when, *(warp.known.get(r, 0) for r in (*i.reads, *i.writes))]), warp.at, n))
        if not ready:
            break
        when, _, n = min(ready)  # who is behind comes first
        warp, i = state[n], trace[state[n].at % len(trace)]
        unit, busy, latency, l2 = kinds[i.op]
        if n == 0 and warp.at % len(trace) == 0:
            began.append(when)
        clock = warp.time = when + 1
        warp.at += 1
        free |= {unit: when + busy} if unit else {}
        free["l2"] = max(when, free.get("l2", 0)) + l2
        done = max(when + latency, free["l2"] if l2 else 0)
        warp.known |= dict.fromkeys(i.writes, done)
        if i.op.startswith("LDGSTS"):
            warp.copies[-1] = max(warp.copies[-1], done)
        elif i.op.startswith("LDGDEPBAR"):
            warp.copies.append(0)
        elif i.op.startswith("DEPBAR"):
            warp.time = max([when, *warp.copies[: len(warp.copies) - 1 - (i.constant or 0)]])
        elif re.match(r"MEMBAR|UCGABAR_WAIT|SYNCS.*TRYWAIT", i.op):
            warp.time = done
        elif i.op.startswith("BAR.SYNC"):
            warp.waits = True
            if all(other.waits for other in state):
                for other in state:
                    other.waits, other.time = False, when + BARRIER
    used: dict[str, float] = {"issue": warps * len(trace)}
    for i in trace:
        unit, busy, _, l2 = kinds[i.op]
        used[unit] = used.get(unit, 0) + warps * busy
        used["l2"] = used.get("l2", 0) + warps * l2
    used.pop("", None)
    return Step(began[-1] - began[-2], used)


class Predicted(NamedTuple):
    """Of one launch.

    Attributes:
        how: it is launched.
        steps: of SETTING's sequences and their variants, behind each other, for each of its time steps.
        us: of one of them, by direction.
        busy: for how many of these microseconds what is busy.
    """

    how: str
    steps: float
    us: dict[str, float]
    busy: dict[str, dict[str, float]]

    def total(self) -> float:
        """Microseconds of forward and backward for a time step of SETTING."""
        return self.steps * sum(self.us.values())


def predicted(
    how: str, steps: float, chip: Chip, code: dict[str, tuple[Code, int]], streamed: bool, trips: Trips
) -> Predicted:
    """From the machine code of each direction, and the warps of its block."""
    us, busy = {}, {}
    for name, (found, warps) in code.items():
        step = simulated(found.step(streamed, trips), chip, math.ceil(warps / 4))
        us[name] = SCALE * step.cycles / chip.ghz / 1e3
        busy[name] = {unit: cycles / chip.ghz / 1e3 for unit, cycles in step.busy.items()}
    return Predicted(how, steps, us, busy)


def steps(rows: int, tiles: int) -> float:
    """Behind each other, for each time step of SETTING, where so many tiles run at once."""
    T, B, K = SETTING.T, SETTING.B, VARIANTS
    return gpu.steps(T, B, K, T, rows, tiles, gpu.plan(T, B, K, T, rows, tiles)) / T


class Size(NamedTuple):
    capability: int
    cell: str
    dtype: str
    backend: str
    hidden: int


def of_triton(size: Size) -> Predicted:
    arithmetic = "tf32x3" if size.dtype == "float32" else size.dtype
    (job,) = aot.jobs([size.capability], [size.cell], [(arithmetic, size.hidden)])
    found = aot.binaries(job, DIRECTIONS)
    how, chip = job.how, CHIPS[size.capability]

    def trips(depth: int, has_matrix: bool) -> int:
        """Besides the loops over W_hh there are those over what ends or starts at a step: seldom anything."""
        if how.resident or depth > 2:
            return 0
        return math.ceil(size.hidden / (how.block if depth == 1 else how.inner)) if depth == 1 or has_matrix else 0

    code = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in DIRECTIONS:
            cubin = Path(folder, name)
            cubin.write_bytes(found[name].asm["cubin"])
            (instructions,) = disassembled(cubin).values()
            code[name] = Code(instructions), how.warps
    told = "W_hh on chip" if how.resident else "W_hh streams"
    return predicted(told, steps(how.rows, chip.processors), chip, code, not how.resident, trips)


# a kernel that knows the size for which it is called has no code for others
SOURCE = """
#include "../cells.h"
#include "api.h"
#include "backward.h"
#include "forward.h"
using namespace sire_fast;
using namespace sire_fast::cuda;

template <class Call>
SIRE_DEVICE Call known(Call call) {{
  call.H = {hidden};
  call.blocks = {blocks};
  if (!{mailbox}) call.mailbox = nullptr;
  call.tf32 = false;
  return call;
}}
SIRE_KERNEL(32 * kWarps) forward(const Forward call) {{
  const Forward f = known(call);
  ForwardTile<{cell}, {dtype}>(f).run();
}}
SIRE_KERNEL(32 * kWarps) backward(const Backward call) {{
  const Backward g = known(call);
  BackwardTile<{cell}, {dtype}>(g).run();
}}
"""


def of_cuda(size: Size) -> Predicted | None:
    """None where no group of blocks holds W_hh."""
    capability, cell, dtype, _, hidden = size
    chip = CHIPS[capability]
    there = cuda.Chip(divmod(capability, 10), chip.processors, 1024 * SHARED_MEMORY[capability])
    group = cuda.group(cell, dtype, hidden, there) if cuda._cuda.blocks(hidden, dtype) else None
    if not group:
        return None
    names = {"cell": cell.title().replace("_", ""), "dtype": {"float32": "float"}.get(dtype, dtype.capitalize())}
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "known.cu"), Path(folder, "known.cubin")
        source.write_text(SOURCE.format(hidden=hidden, blocks=group.blocks, mailbox=int(group.mailbox), **names))
        headers = Path(__file__).parents[1] / "csrc" / "cuda"
        flags = ["-O3", "-std=c++17", f"-arch=sm_{capability}", "-I", headers, "-cubin", "-o", cubin]
        subprocess.run([NVCC, *flags, source], check=True)
        found = disassembled(cubin)
    # as csrc/cuda/layout.h splits units, and the sum, between warps
    words = hidden if dtype == "float32" else math.ceil(hidden / 2)
    warps = math.ceil(math.ceil(hidden / 16) / group.blocks) * math.ceil(math.ceil(words / 8) / 8)
    code = {n: (Code(next(c for name, c in found.items() if f"{len(n)}{n}" in name)), warps) for n in DIRECTIONS}
    told = f"{group.blocks} blocks" if group.blocks > 1 else "one block"
    at_once = cuda.at_once(cell, dtype, hidden, group, there)
    return predicted(told, steps(cuda._cuda.rows, at_once), chip, code, False, lambda depth, has_matrix: None)


def of(size: Size) -> Predicted | None:
    return of_triton(size) if size.backend == "triton" else of_cuda(size)


def floor(size: Size) -> dict[str, float]:
    """Microseconds of a step below which no kernel gets on such a chip."""
    cell, chip = size.cell.split("_")[0].upper(), CHIPS[size.capability]
    flops = chip.flops / 6 if size.dtype == "float32" else chip.flops  # three products of TF32, at half the rate
    least = work(replace(SETTING, cell=cell, I=size.hidden, H=size.hidden, dtype=size.dtype), True)
    seconds = least.floor(flops, chip.bandwidth, SETTING.T * BARRIER / chip.ghz / 1e9)
    both = {"forward": seconds["forward"], "backward": seconds["step"] - seconds["forward"]}
    return {name: 1e6 * took / SETTING.T for name, took in both.items()}


def report(size: Size, found: Predicted) -> Iterator[str]:
    lowest = floor(size)
    behind = f", {found.steps:.1f} steps behind each other" if found.steps > 1 else ""
    yield f"sm_{size.capability} {size.backend} {size.cell} {size.dtype} H={size.hidden}, {found.how}{behind}"
    for name in DIRECTIONS:
        busiest = sorted(found.busy[name].items(), key=lambda unit: -unit[1])[:4]
        told = ", ".join(f"{unit} {found.steps * us:.2f}" for unit, us in busiest)
        yield f"    {name:8} {found.steps * found.us[name]:6.2f} us, floor {lowest[name]:.2f}; busy: {told}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: those that are there")
    parser.add_argument("--capability", type=int, nargs="+", choices=[*CHIPS], default=[*CHIPS])
    parser.add_argument("--cell", nargs="+", choices=[*CELLS], default=["gru", "lstm"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256, 512], metavar="H")
    parser.add_argument("--processes", type=int, help="that compile at once; default: one for each core")
    parser.add_argument("--table", action="store_true", help="print PREDICTED: all cells on an H100")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.model: TRITON_INTERPRET is set, under which nothing is compiled", file=sys.stderr)
        return 2
    compiles = cuda._cuda and shutil.which(NVCC)
    backends = options.backend or BACKENDS[: 2 if compiles else 1]
    if "cuda" in backends and not compiles:
        print(f"bench.model: CUDA needs nvcc and sire_fast._cuda: {cuda.MISSING}", file=sys.stderr)
        return 2
    if options.table:
        options.capability, options.cell, options.hidden = [90], [*CELLS], gpu.PREDICTED_HIDDEN
    axes = options.capability, options.cell, options.dtype, backends, options.hidden
    sizes = [Size(*size) for size in itertools.product(*axes)]
    failed, row = 0, []
    for size, found in zip(sizes, aot.done_all(of, sizes, options.processes), strict=True):
        if isinstance(found, str):
            failed += 1
            print(f"FAILS: {size}: {found}", file=sys.stderr)
        elif found and not options.table:
            print(*report(size, found), sep="\n", flush=True)
        row.append(round(found.total(), 1) if isinstance(found, Predicted) else math.inf)
        if options.table and size.hidden == options.hidden[-1]:
            us = ", ".join(map(str, row)).replace("inf", "math.inf")
            print(f'    ("{size.cell}", "{size.dtype}", "{size.backend}"): ({us}),', flush=True)
            row = []
    if not options.table:
        print(*(f"to compare with: {peer}" for peer in PEERS), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
