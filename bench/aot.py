"""Compiles every kernel that may be launched for GPUs that need not be there: `python -m bench.aot`.

Prints registers, spills, shared memory and matrix instructions of each, and ends with exit code 1 if one does not fit
its chip or spills more than SPILL_LIMIT bytes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sire_fast.cells import CELLS as EQUATIONS
from sire_fast.kernels import launch as launches
from sire_fast.kernels import swap_rnn
from sire_fast.kernels.cells import CELLS
from sire_fast.kernels.launch import SHARED_MEMORY, Launch

CAPABILITIES = (80, 90, 100)
ARITHMETIC = {"tf32x3": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # and Triton's name of the dtype
HIDDEN = (16, 32, 64, 128, 256, 512, 1024)
KERNELS = ("forward", "backward", "recompute", "weights", "gather")
SPILL_LIMIT = 128

_OF_STATES = {
    "start",
    "tracks",
    "last",
    "ended",
    "d_tracks",
    "d_last",
    "d_ended",
    "d_start",
}  # tuples: of h, or h and c
_WIDE = {"spans", "penalty", "d_penalty", "d_first", "carry", "dw", "db"}  # in the dtype of the states
_POSITIONS = {"swaps", "ends", "lengths", "end_times", "end_order", "start_times", "start_order"}


class Job(NamedTuple):
    """A kernel, and what it is compiled for. H stands for all that are launched alike."""

    capability: int
    kernel: str
    cell: str
    arithmetic: str
    hidden: int
    how: Launch

    def __str__(self) -> str:
        plan = "resident" if self.how.resident else f"streams {self.how.block}x{self.how.inner}"
        return (
            f"sm_{self.capability} {self.kernel:9} {self.cell:8} {self.arithmetic:8} H<={self.hidden:<4} {plan:13} "
            f"rows {self.how.rows} warps {self.how.warps} stages {self.how.stages}"
        )


class Usage(NamedTuple):
    registers: int
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    instructions: str  # on matrices

    def complaints(self, capability: int) -> list[str]:
        found = []
        if self.spilled > SPILL_LIMIT:
            found.append(f"spills {self.spilled} bytes, more than {SPILL_LIMIT}")
        if self.shared > 1024 * SHARED_MEMORY[capability]:
            found.append(f"needs {self.shared >> 10} KiB of shared memory, has {SHARED_MEMORY[capability]}")
        return found


def jobs(capabilities: Sequence[int], cells: Sequence[str], sizes: Sequence[tuple[str, int]]) -> list[Job]:
    """Everything that the launcher may choose, each once: the largest H of those that are launched alike."""
    alike: dict[tuple[object, ...], Job] = {}
    for capability, cell, (arithmetic, hidden), kernel in itertools.product(capabilities, cells, sizes, KERNELS):
        how = launches.launch(cell, hidden, arithmetic, capability)
        same: object = how
        if kernel == "gather":
            same = launches.gather_constants(cell, hidden, arithmetic)["BLOCK"]
        elif kernel == "weights":
            same = launches.weight_constants(cell, hidden, arithmetic)["BM"]
        alike[capability, kernel, cell, arithmetic, same] = Job(capability, kernel, cell, arithmetic, hidden, how)
    return [*alike.values()]


def compiled(job: Job) -> Usage:
    """What the compiled kernel uses."""
    cell, recompute = CELLS[job.cell], job.kernel == "recompute"
    if job.kernel == "weights":
        kernel = swap_rnn.weight_kernel
        constants = launches.weight_constants(job.cell, job.hidden, job.arithmetic)
    elif job.kernel == "gather":
        kernel = swap_rnn.gather_kernel
        constants = launches.gather_constants(job.cell, job.hidden, job.arithmetic)
    else:
        kernel = swap_rnn.forward_kernel if job.kernel == "forward" else swap_rnn.backward_kernel
        constants = launches.constants(job.cell, job.how, job.arithmetic) | {
            "KEPT": 0 if recompute else cell.kept,
            "SPANS": True,
            "GRADIENT": cell.backward,
            "D": cell.gradients,
            "RECOMPUTE": recompute,
        }
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    dtype, states = ARITHMETIC[job.arithmetic], EQUATIONS[job.cell].states
    signature: dict[str, object] = {}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for n, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _OF_STATES:
            signature[name] = ("*fp32",) * states
            attributes |= {(n, state): aligned for state in range(states)}
        elif len(name) == 1:  # a size
            signature[name] = "i32"
            if name == "H":
                attributes[n,] = aligned
        else:
            signature[name] = "*i64" if name in _POSITIONS else "*fp32" if name in _WIDE else f"*{dtype}"
            attributes[n,] = aligned
    source = ASTSource(kernel, signature, {n: c for n, c in constants.items() if n in signature}, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    instructions = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*\.(m\d+n\d+k\d+\S*)", binary.asm["ptx"])
    return Usage(
        used["REG"], used["STACK"] + used["LOCAL"], binary.metadata.shared, " ".join(sorted({*instructions})) or "none"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--cell", nargs="+", choices=[*CELLS], default=[*CELLS])
    sizes = [f"{arithmetic}:{hidden}" for arithmetic in ARITHMETIC for hidden in HIDDEN]
    parser.add_argument("--only", nargs="+", choices=sizes, default=sizes, metavar="ARITHMETIC:H")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.aot: TRITON_INTERPRET is set, under which nothing is compiled", file=sys.stderr)
        return 2
    failed = 0
    chosen = [(arithmetic, int(hidden)) for arithmetic, hidden in (size.split(":") for size in options.only)]
    todo = jobs(options.capability, options.cell, chosen)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for n, (job, usage) in enumerate(zip(todo, pool.map(compiled, todo), strict=True), 1):
            complaints = "; ".join(usage.complaints(job.capability))
            failed += bool(complaints)
            told = f"{usage.registers:3} registers, {usage.spilled:3} bytes spilled, {usage.shared >> 10:3} KiB"
            verdict = f" FAILS: {complaints}" if complaints else ""
            print(f"{n:3}/{len(todo)} {job}: {told}, {usage.instructions}{verdict}", flush=True)
    print(f"{len(todo) - failed} of {len(todo)} fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
