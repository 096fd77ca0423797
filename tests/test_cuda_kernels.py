"""The CUDA kernels on the CPU, where the operator's tests do not reach: clusters of blocks, plans of passes, memory;
and what the compiler for GPUs makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_on_host
import pytest
import torch
from oracle import Case, assert_as_good_as_reference, cast, make, run

from sire_fast import GRU, backends, cuda, gpu
from sire_fast.cells import CELLS
from sire_fast.gpu import Plan
from sire_fast.swaps import Adjacent

ROOT = Path(__file__).parent.parent
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, host_build: ModuleType) -> ModuleType:
    monkeypatch.setattr(cuda, "_cuda", host_build)
    return host_build


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("cell", CELLS)
def test_blocks_that_share_the_units(
    cell: str, blocks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H of three tiles of units: the last block has none, or has a part of one."""
    monkeypatch.setattr(cuda, "_blocks", lambda *_: blocks)
    for case in (Case(cell, 6, 5, 37, 3, ragged=True), Case(cell, 5, 3, 40, 4, compare="swap", recompute=True)):
        assert_as_good_as_reference(cell, make(case), dtype, "cuda")


@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "blocks"),
    [("gru", 130, FLOAT, 8), ("lstm", 128, FLOAT, 2), ("lstm", 256, HALF, 4), ("gru", 500, HALF, 16)],
)
def test_sizes_that_one_block_does_not_hold(
    cell: str, hidden: int, dtype: torch.dtype, blocks: int, host: ModuleType
) -> None:
    assert host.cluster(hidden, str(dtype).removeprefix("torch.")) == blocks
    assert_as_good_as_reference(cell, make(Case(cell, 2, 2, hidden, 1)), dtype, "cuda")


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("chosen", [Plan(1, 0), Plan(3, 1), Plan(2, 4), Plan(1, 4)], ids=str)
def test_any_plan_gives_the_same(chosen: Plan, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants in lock step, behind it in one or more passes, or some here and some there."""
    monkeypatch.setattr(gpu, "plan", lambda *_: chosen)
    monkeypatch.setattr(cuda, "_blocks", lambda *_: blocks)
    for cell in ("gru", "lstm"):
        case = Case(cell, 6, 5, 18, 7 if chosen.sequences == 3 else 4, ragged=True)
        assert_as_good_as_reference(cell, make(case), FLOAT, "cuda")


def test_recomputed_gates_give_the_same_bits() -> None:
    arguments = cast(make(Case("lstm", 7, 5, 20, 3, ragged=True)), FLOAT)
    kept = run("lstm", arguments, "cuda")
    for name, value in run("lstm", arguments | {"recompute": True}, "cuda").items():
        assert torch.equal(value, kept[name]), name


def test_products_of_float32_are_tf32_where_torch_allows_it() -> None:
    arguments = cast(make(Case("gru", 5, 3, 33, 2)), FLOAT)
    exact = run("gru", arguments, "cuda")["output"]
    torch.set_float32_matmul_precision("high")
    try:
        coarse = run("gru", arguments, "cuda")["output"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-5 < (coarse - exact).abs().max() < 1e-2


def test_who_is_served(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"cell": "gru", "device": "cpu", "hidden_size": 64}
    assert not backends.why_not("cuda", dtype=torch.float16, **call)
    assert backends.why_not("cuda", dtype=torch.float64, **call) == [
        "cuda: computes in float32, bfloat16 and float16, got torch.float64"
    ]
    (reason,) = backends.why_not("cuda", dtype=FLOAT, **call | {"hidden_size": 257})
    assert "W_hh of H=257 in float32 does not fit" in reason
    assert backends.choose("auto", dtype=torch.float16, **call) == "reference"  # the others do not serve float16 here
    monkeypatch.setattr(cuda, "_cuda", None)
    assert "built where nvcc is found" in backends.why_not("cuda", dtype=FLOAT, **call)[0]


@pytest.mark.parametrize(("fastest", "served"), [(None, "triton"), ("cuda", "cuda"), ("torch", "torch")])
def test_auto_takes_what_was_measured(
    fastest: str | None, served: str, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        shared_memory_per_block_optin = 227 << 10

    monkeypatch.setattr(host, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(gpu, "FASTEST", {("gru", 128, "float32", 90): fastest} if fastest else {})
    layer = GRU(3, 100, swaps=Adjacent(1), device="meta")
    monkeypatch.setattr(GRU, "_call", layer._call | {"device": torch.device("cuda")})
    assert layer.backend == served


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_what_a_gpu_lacks(capability: tuple[int, int], host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 1024 * {7: 64, 8: 163, 9: 227}[capability[0]]

    monkeypatch.setattr(host, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)

    def reasons(cell: str, hidden: int) -> list[str]:
        return backends.why_not("cuda", cell=cell, dtype=HALF, device="cuda:0", hidden_size=hidden)

    small, alone, together = reasons("gru", 64), reasons("lstm", 128), reasons("lstm", 256)
    if capability == (9, 0):
        assert small == alone == together == []
    elif capability == (8, 0):
        assert small == []
        assert alone == ["cuda: H=128 in bfloat16 needs 170 KiB of shared memory a block, cuda:0 has 163"]
        assert together == ["cuda: H=256 in bfloat16 needs compute capability 9.0 or above, cuda:0 has 8.0"]
    else:
        assert small == ["cuda: H=64 in bfloat16 needs compute capability 8.0 or above, cuda:0 has 7.5"]


def test_no_access_beyond_what_is_there(tmp_path: Path) -> None:
    """Every cell, alone and in a cluster, under AddressSanitizer: of all tensors and of shared memory."""
    cuda_on_host.build(tmp_path, ("-O1", "-fsanitize=address"))
    code = (
        "import os, pathlib, torch, cuda_on_host\n"
        "from oracle import Case, assert_as_good_as_reference, make\n"
        "from sire_fast import cuda\n"
        "cuda._cuda = cuda_on_host.load(next(pathlib.Path(os.environ['BUILT']).glob('_cuda*')))\n"
        "for cell in ('rnn_tanh', 'gru', 'lstm'):\n"
        "    for cuda._blocks in (lambda *_: 1, lambda *_: 2):\n"
        "        case = Case(cell, 4, 3, 33, 3, ragged=True, recompute=True)\n"
        "        assert_as_good_as_reference(cell, make(case), torch.float32, 'cuda')\n"
    )
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    environment = os.environ | {
        "LD_PRELOAD": library.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(ROOT / "tests"),
        "BUILT": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_barrier_that_some_threads_do_not_reach_is_found(tmp_path: Path) -> None:
    """Of the tool itself: a kernel whose first warp waits alone."""
    source = tmp_path / "stuck.cpp"
    source.write_text(
        '#include "gpu_on_host.h"\n'
        "using namespace sire_fast::gpu;\n"
        "void kernel(const int) { if (thread() < 32) barrier(); }\n"
        "int main() { try { launch(kernel, 1, 1, 64, 0, 0, 0); } catch (const std::runtime_error&) { return 7; } }\n"
    )
    program = tmp_path / "stuck"
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT / 'tests'}", source, "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == 7


@pytest.mark.skipif(not shutil.which("nvcc"), reason="the extension is built where nvcc is found")
def test_the_compiled_kernels_spill_little_and_fit() -> None:
    command = [sys.executable, "-m", "bench.aot", "--backend", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "72 of 72 kernels fit" in done.stdout  # 4 cells, 3 dtypes, 2 directions, 3 chips
