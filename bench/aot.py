"""What every kernel uses of GPUs that need not be there: `python -m bench.aot`.

Triton's launcher is called as for a real pass, and what it would launch is compiled; of the CUDA kernels it reads what
the extension sire_fast._cuda holds. Prints registers, spills, shared memory and matrix instructions of each, and ends
with exit code 1 if one does not compile, does not fit its chip or spills more than SPILL_LIMIT bytes. `--triton 3.6.0
3.7.1` does it with other versions of Triton, each installed into a folder of its own under the temporary one.
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
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sire_fast.backends import cuda
from sire_fast.backends import triton as backend
from sire_fast.backends.cuda import Chip
from sire_fast.cells import CELLS
from sire_fast.kernels import launch as launches
from sire_fast.kernels.launch import SHARED_MEMORY, Launch
from sire_fast.lab.workers import pool
from sire_fast.proof import TRAINING, first_line
from sire_fast.reference import SwapRNN

CAPABILITIES = (80, 90, 100)
ARITHMETIC = {"tf32x3": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HIDDEN = (16, 32, 50, 64, 100, 101, 128, 200, 201, 256, 512, 1024)
SPILL_LIMIT = 128
UNALIGNED_SPILL_LIMIT = 1536  # where H is no multiple of 4, and every value that is moved has an address of its own
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100 and B200


class Job(NamedTuple):
    """A pass and its gradient on a chip. H stands for all that are launched alike, and aligned alike."""

    capability: int
    cell: str
    arithmetic: str
    hidden: int
    how: Launch

    def __str__(self) -> str:
        plan = "resident" if self.how.resident else f"streams {self.how.block}x{self.how.inner}"
        sizes = f"rows {self.how.rows} warps {self.how.warps} stages {self.how.stages}"
        return f"sm_{self.capability} {self.cell:8} {self.arithmetic:8} H<={self.hidden:<4} {plan:13} {sizes}"


class Usage(NamedTuple):
    kernel: str
    registers: int
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    instructions: str  # on matrices

    def complaints(self, capability: int, hidden: int = 0) -> list[str]:
        found = []
        limit = UNALIGNED_SPILL_LIMIT if hidden % 4 else SPILL_LIMIT
        if self.spilled > limit:
            found.append(f"spills more than {limit} bytes")
        if self.shared > 1024 * SHARED_MEMORY[capability]:
            found.append(f"does not fit {SHARED_MEMORY[capability]} KiB")
        return found


def jobs(capabilities: Sequence[int], cells: Sequence[str], sizes: Sequence[tuple[str, int]]) -> list[Job]:
    """Everything that the launcher may choose, each once: the largest H of those that are launched alike."""
    alike: dict[tuple[object, ...], Job] = {}
    for capability, cell, (arithmetic, hidden) in itertools.product(capabilities, cells, sizes):
        how = launches.launch(cell, hidden, arithmetic, capability)
        alike[capability, cell, arithmetic, how, math.gcd(hidden, 16)] = Job(capability, cell, arithmetic, hidden, how)
    return [*alike.values()]


def compiled(job: Job) -> list[Usage]:
    """What the kernels of a training pass use, with gates kept and with gates computed again, and those of the backward
    where a loss reads some of the results only."""
    return [usage(name, binary) for name, binary in binaries(job).items()]


def binaries(job: Job, only: Collection[str] = ()) -> dict[str, Any]:
    """Name of a kernel -> what Triton makes of it; `only` those of these names, if there are any."""
    target = GPUTarget("cuda", job.capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target)
    )
    found: dict[str, Any] = {}
    compile_only, through = JITFunction.run, ()

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        name = kernel.__name__.removesuffix("_kernel") + " again" * constants.get("RECOMPUTE", False)
        name += f" of {' and '.join(through)}" * (name == "backward" and bool(through))
        if name not in found and (not only or name in only):
            found[name] = compile_only(kernel, *arguments, grid=grid, warmup=True, **constants)

    JITFunction.run = run  # type: ignore[method-assign]
    launches.chip = lambda _: (job.capability, 1)
    torch.set_float32_matmul_precision("high" if job.arithmetic == "tf32" else "highest")
    try:
        for recompute, through in ((False, ()), (True, ()), (False, TRAINING), (False, ("h_n",))):
            train(job.cell, job.hidden, ARITHMETIC[job.arithmetic], recompute, through)
    finally:
        JITFunction.run = compile_only  # type: ignore[method-assign]
    return found


def train(cell: str, hidden: int, dtype: torch.dtype, recompute: bool, through: Sequence[str]) -> None:
    """Ask the launcher for a pass and its gradient through all results or some; nothing is computed."""
    T, B, K = 4, 2, 2
    wide = torch.float32
    gates, spans = backend.kept(cell, T, B, hidden, B * K * T, True, recompute)
    width = CELLS[cell].gates * hidden

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    h, c = empty(B, hidden), empty(B, hidden) if CELLS[cell].states == 2 else None
    swaps, lengths = torch.zeros(B, K, 2, dtype=torch.int64), torch.full((B,), T)
    inputs = [empty(T, B, width), None, None, empty(width, hidden), empty(width), h, c, swaps, swaps[..., 1], lengths]
    track, last, ended = (empty(*size, hidden, dtype=wide) for size in ((T, B), (B,), (B, K)))
    penalty = empty(B, K, dtype=wide)
    kept = empty(*gates), empty(*spans, dtype=wide)
    results = SwapRNN(track, last, last, ended, penalty, track, ended)
    launches.forward(cell, True, inputs, [*results, *kept])
    grads = [each if not through or name in through else None for name, each in results._asdict().items()]
    wanted = [torch.empty_like(t) if t is not None else None for t in inputs[:7]]
    launches.backward(cell, recompute, [*grads, *inputs, track, track, *kept], wanted)


def _dump(path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _used(told: str) -> dict[str, int]:
    return {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


def usage(name: str, binary: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        used = _used(_dump(file.name))
    instructions = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*\.(m\d+n\d+k\d+\S*)", binary.asm["ptx"])
    matrix = " ".join(sorted({*instructions})) or "no matrices"
    return Usage(name, used["REG"], used["STACK"] + used["LOCAL"], binary.metadata.shared, matrix)


# how the compiler writes types in the names of functions
_MANGLED = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
_KERNEL = re.compile(r"(forward|backward)_kernelINS_\d+(\w+?)E(f|13__nv_bfloat16|6__half)EE")


def extension() -> dict[int, list[Usage]]:
    """Capability -> what the CUDA kernels in the extension use there: of shared memory the most that an H of those that
    are served needs."""
    found: dict[int, list[Usage]] = {}
    for code in re.split(r"(?=\barch = )", _dump(cuda._cuda.__file__))[1:]:
        capability = int(re.match(r"arch = sm_(\d+)", code)[1])
        if capability not in PROCESSORS:  # of a build for the card that is there
            continue
        chip = Chip(divmod(capability, 10), PROCESSORS[capability], 1024 * SHARED_MEMORY[capability])
        for name, told in re.findall(r"Function (\S+):\s*(.*)", code):
            kernel = _KERNEL.search(name)
            if not kernel:
                continue
            kind, cell, dtype = kernel[1], re.sub(r"(?<=n)(?=[A-Z])", "_", kernel[2]).lower(), _MANGLED[kernel[3]]
            groups = {H: cuda.group(cell, dtype, H, chip) for H in HIDDEN if cuda._cuda.blocks(H, dtype)}
            shared = {H: cuda._cuda.shared_bytes(cell, dtype, H, *group) for H, group in groups.items() if group}
            used, title = _used(told), f"{kind} {cell} {dtype} H<={max(shared)}"
            spilled = used["STACK"] + used["LOCAL"]
            usage = Usage(title, used["REG"], spilled, max(shared.values()), "mma.sync")
            found.setdefault(capability, []).append(usage)
    return found


def _done_or_not(work: Callable[[Job], Any], job: Job) -> Any:
    try:
        return work(job)
    except Exception as error:  # whatever a compiler dies of
        return first_line(error)


def done_all(work: Callable[[Job], Any], todo: Sequence[Job], processes: int | None) -> Iterator[Any]:
    """What comes of each job, or, as text, of what it dies. In processes of their own for each capability: within one,
    Triton keeps to the first that it compiles for."""
    for _, alike in itertools.groupby(todo, lambda job: job.capability):
        with pool(processes) as workers:
            yield from workers.map(partial(_done_or_not, work), alike)


def _compiled(options: argparse.Namespace) -> Iterator[tuple[str, int, int, list[Usage] | str]]:
    """What is compiled, for which capability and H, and what it uses, or why it is not."""
    if "triton" in options.backend:
        chosen = [(arithmetic, int(hidden)) for arithmetic, hidden in (size.split(":") for size in options.only)]
        todo = jobs(options.capability, options.cell, chosen)
        for n, (job, used) in enumerate(zip(todo, done_all(compiled, todo, options.processes), strict=True), 1):
            yield f"{n}/{len(todo)} {job}", job.capability, job.hidden, used
    if "cuda" in options.backend:
        for capability, used in extension().items():
            if capability in options.capability:
                yield f"sm_{capability} {Path(cuda._cuda.__file__).name}", capability, 0, used


def _with_triton(version: str, arguments: Sequence[str]) -> int:
    """The exit code of this program under another version of Triton, which is installed if it is not there yet."""
    folder = Path(tempfile.gettempdir(), "sire_fast_triton", version)
    print(f"Triton {version} of {folder}", flush=True)
    if not folder.exists():
        with tempfile.TemporaryDirectory() as partial:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={partial}/it"]
            if subprocess.run([*command, f"triton=={version}"], check=False).returncode:
                return 2
            shutil.copytree(f"{partial}/it", folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "bench.aot", "--backend", "triton", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), help="default: those that are there")
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--cell", nargs="+", choices=[*CELLS], default=[*CELLS], help="of triton")
    sizes = [f"{arithmetic}:{hidden}" for arithmetic in ARITHMETIC for hidden in HIDDEN]
    parser.add_argument("--only", nargs="+", choices=sizes, default=sizes, metavar="ARITHMETIC:H", help="of triton")
    parser.add_argument("--processes", type=int, help="that compile at once; default: one for each core")
    parser.add_argument(
        "--triton", nargs="+", metavar="VERSION", help="other versions of Triton than the installed one"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.aot: TRITON_INTERPRET is set, under which nothing is compiled", file=sys.stderr)
        return 2
    options.backend = options.backend or (["triton", "cuda"] if cuda._cuda else ["triton"])
    if "cuda" in options.backend and not cuda._cuda:
        print(f"bench.aot: the extension sire_fast._cuda cannot be loaded: {cuda.MISSING}", file=sys.stderr)
        return 2
    if options.triton:
        sizes = ["--only", *options.only, "--cell", *options.cell, "--capability", *map(str, options.capability)]
        processes = ["--processes", str(options.processes)] if options.processes else []
        return max(_with_triton(version, [*sizes, *processes]) for version in options.triton)
    kernels = failed = 0
    for title, capability, hidden, used in _compiled(options):
        print(title, flush=True)
        if isinstance(used, str):
            kernels, failed = kernels + 1, failed + 1
            print(f"    FAILS: does not compile: {used}", flush=True)
            continue
        for each in used:
            complaints = ", ".join(each.complaints(capability, hidden))
            kernels, failed = kernels + 1, failed + bool(complaints)
            told = f"{each.registers:3} registers, {each.spilled:3} bytes spilled, {each.shared >> 10:3} KiB shared"
            verdict = f" FAILS: {complaints}" if complaints else ""
            print(f"    {each.kernel:14} {told}, {each.instructions}{verdict}", flush=True)
    print(f"{kernels - failed} of {kernels} kernels fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
