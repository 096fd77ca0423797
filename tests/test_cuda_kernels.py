"""The CUDA kernels on the CPU, where the operator's tests do not reach: groups of blocks, plans of passes, memory; and
what the compiler for GPUs makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_on_host
import pytest
import torch
from oracle import Case, assert_as_good_as_reference, assert_padding_does_not_matter, cast, make, run
from torch.utils._python_dispatch import TorchDispatchMode

from bench import aot, tune
from sire_fast import GRU, backends, proof
from sire_fast.backends import cuda, gpu
from sire_fast.backends.cuda import Chip, Group
from sire_fast.backends.gpu import Plan
from sire_fast.cells import CELLS
from sire_fast.passes import Network
from sire_fast.swaps import Adjacent

ROOT = Path(__file__).parent.parent
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, host_build: ModuleType) -> ModuleType:
    cuda_on_host.use(host_build, 64, monkeypatch.setattr)
    return host_build


def groups_are(monkeypatch: pytest.MonkeyPatch, blocks: int, mailbox: bool) -> None:
    monkeypatch.setattr(cuda, "group", lambda *_: Group(blocks, mailbox))
    monkeypatch.setattr(cuda, "_chip", lambda _: Chip((9, 0), blocks, 0))  # one group at once


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("mailbox", [False, True])
@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("cell", CELLS)
def test_blocks_that_share_the_units(
    cell: str, blocks: int, mailbox: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H of three tiles of units: the last block has none, or has a part of one."""
    groups_are(monkeypatch, blocks, mailbox)
    for case in (Case(cell, 6, 5, 37, 3, ragged=True), Case(cell, 5, 3, 40, 4, compare="swap", recompute=True)):
        assert_as_good_as_reference(cell, make(case), dtype, "cuda")


@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "capability", "group"),
    [
        ("gru", 130, FLOAT, 90, Group(8, False)),
        ("lstm", 128, FLOAT, 90, Group(2, False)),
        ("lstm", 256, HALF, 90, Group(4, False)),
        ("gru", 500, HALF, 90, Group(16, False)),
        ("gru", 500, HALF, 120, Group(16, True)),
        ("gru", 300, FLOAT, 90, Group(19, True)),
        ("lstm", 130, HALF, 80, Group(3, True)),
        ("gru", 1024, HALF, 90, Group(64, True)),
    ],
)
def test_sizes_that_one_block_does_not_hold(
    cell: str, hidden: int, dtype: torch.dtype, capability: int, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warps share the sum over h, and the rows of a full tile."""
    chip = Chip(divmod(capability, 10), 64, 227 << 10)
    monkeypatch.setattr(cuda, "_chip", lambda _: chip)
    monkeypatch.setattr(gpu, "plan", lambda *_: Plan(8, 1))
    assert cuda.group(cell, str(dtype).removeprefix("torch."), hidden, chip) == group
    assert_as_good_as_reference(cell, make(Case(cell, 3, 8, hidden, 1)), dtype, "cuda")


@pytest.mark.parametrize(("blocks", "mailbox"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("chosen", [Plan(1, 0), Plan(3, 1), Plan(2, 4), Plan(1, 4)], ids=str)
def test_any_plan_gives_the_same(chosen: Plan, blocks: int, mailbox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants in lock step, behind it in one or more passes, or some here and some there."""
    monkeypatch.setattr(gpu, "plan", lambda *_: chosen)
    groups_are(monkeypatch, blocks, mailbox)
    for cell in ("gru", "lstm"):
        case = Case(cell, 7, 5, 18, 7 if chosen.sequences == 3 else 4, ragged=True)
        assert_as_good_as_reference(cell, make(case), FLOAT, "cuda")


def test_recomputed_gates_give_the_same_bits() -> None:
    arguments = cast(make(Case("lstm", 7, 5, 20, 3, ragged=True)), FLOAT)
    kept = run("lstm", arguments, "cuda")
    for name, value in run("lstm", arguments | {"recompute": True}, "cuda").items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "fp32_precision", "fp32_precision, none"])
def test_products_of_float32_are_tf32_where_torch_allows_it(way: str, allow_tf32: Any) -> None:
    arguments = cast(make(Case("gru", 5, 3, 33, 2)), FLOAT)
    exact = run("gru", arguments, "cuda")["output"]
    allow_tf32[way](True)
    coarse = run("gru", arguments, "cuda")["output"]
    allow_tf32[way](False)
    assert 1e-5 < (coarse - exact).abs().max() < 1e-2
    assert torch.equal(run("gru", arguments, "cuda")["output"], exact)


def test_who_is_served(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"cell": "gru", "device": "cpu", "hidden_size": 64}
    assert not backends.why_not("cuda", dtype=torch.float16, **call)
    assert backends.why_not("cuda", dtype=torch.float64, **call) == [
        "cuda: computes in float32, bfloat16 and float16, got torch.float64"
    ]
    (reason,) = backends.why_not("cuda", dtype=FLOAT, **call | {"hidden_size": 513})
    assert "W_hh of H=513 in float32 does not fit" in reason
    assert backends.choose("auto", dtype=torch.float16, **call) == "cuda"  # the others do not serve float16 here
    monkeypatch.setattr(cuda, "_cuda", None)
    assert "with FORCE_CUDA=1" in backends.why_not("cuda", dtype=FLOAT, **call)[0]


def test_gpus_of_amd_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls them cuda, and their compute capability looks like one of NVIDIA's."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    call = {"cell": "gru", "dtype": FLOAT, "device": "cuda:0", "hidden_size": 64}
    for backend in ("triton", "cuda"):
        reason = f"{backend}: runs on NVIDIA's GPUs, got torch built for AMD's, with HIP 6.4"
        assert backends.why_not(backend, **call) == [reason]
    assert backends.choose("auto", **call) == "reference"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("fastest", [{}, {("gru", 64, "float32", 90): "triton"}], ids=["predicted", "measured"])
def test_a_gpu_that_is_not_there_is_a_reason(
    backend: str, fastest: dict[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself raises an AssertionError there when it is asked what a GPU can."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "FASTEST", fastest)
    call: dict[str, Any] = {"cell": "gru", "dtype": FLOAT, "device": "cuda", "hidden_size": 64}
    reason = f"{backend}: torch finds no GPU here, got a tensor on cuda"
    assert backends.why_not(backend, **call) == [reason]
    assert reason in backends.why_no_kernel(**call)
    assert backends.choose("auto", **call) == "reference"


@pytest.mark.parametrize(
    ("hidden", "fastest", "served"),
    [(100, None, "cuda"), (100, "triton", "triton"), (100, "torch", "torch"), (5, "torch", "torch")],
)
def test_auto_takes_what_was_measured_or_else_what_is_predicted(
    hidden: int, fastest: str | None, served: str, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(proof, "failures", lambda *_, **__: [])
    size = tune.Tuned("gru", hidden, torch.float32, 90).key[1]  # as bench.tune prints it
    monkeypatch.setattr(gpu, "FASTEST", {("gru", size, "float32", 90): fastest} if fastest else {})
    layer = GRU(3, hidden, swaps=Adjacent(1), device="meta")
    call = layer._network.call() | {"device": torch.device("cuda")}
    monkeypatch.setattr(Network, "call", lambda network: call)
    assert layer.backend == served


@pytest.mark.parametrize("wrong", [(), ("cuda",), ("cuda", "triton")])
@pytest.mark.parametrize(("hidden", "dtype"), [(64, HALF), (256, FLOAT), (256, HALF), (512, FLOAT)])
def test_what_is_too_slow_is_not_proven(
    hidden: int, dtype: torch.dtype, wrong: tuple, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To prove a kernel takes compilations, and a warning where it is wrong: for nothing if cuDNN is faster."""
    asked: list[str] = []
    monkeypatch.setattr(host, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cuda, "_chip", lambda _: Chip((9, 0), 132, 227 << 10))
    monkeypatch.setattr(
        proof, "failures", lambda name, **_: asked.append(name) or [f"{name} is wrong"] * (name in wrong)
    )
    layer = GRU(3, hidden, swaps=Adjacent(1), device="meta", dtype=dtype)
    call = layer._network.call() | {"device": torch.device("cuda")}
    monkeypatch.setattr(Network, "call", lambda network: call)
    us = gpu.predicted(cell="gru", dtype=dtype, hidden_size=hidden)
    fast = [name for name in us if us[name] <= gpu.CUDNN]
    assert layer.backend == next((name for name in fast if name not in wrong), "torch")
    if not fast:
        assert asked == []
        (reason,) = layer.why_not_fused()
        assert "is predicted to take" in reason


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_what_a_gpu_lacks(capability: tuple[int, int], host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On compute capability 8.0 the shared memory of one block is too small for an LSTM of H=128, and two share it."""
    chip = Chip(capability, 108, 1024 * {7: 64, 8: 163, 9: 227}[capability[0]])
    monkeypatch.setattr(host, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_chip", lambda _: chip)

    def reasons(cell: str, hidden: int) -> list[str]:
        return backends.why_not("cuda", cell=cell, dtype=HALF, device="cuda:0", hidden_size=hidden)

    small, alone, large = reasons("gru", 64), reasons("lstm", 128), reasons("lstm", 1024)
    if capability == (9, 0):
        assert small == alone == large == []
    elif capability == (8, 0):
        assert small == alone == []
        assert cuda.group("lstm", "bfloat16", 128, chip) == Group(2, True)
        has = "108 multiprocessors with 163 KiB"
        assert large == [f"cuda: lstm of H=1024 in bfloat16 fits no group of blocks of cuda:0, which has {has}"]
    else:
        assert small == ["cuda: needs compute capability 8.0 or above, cuda:0 has 7.5"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_stands_behind_a_sequence_stays_out_of_the_gradients(value: float) -> None:
    assert_padding_does_not_matter("gru", value, FLOAT, "cuda")


@pytest.fixture
def clusters_run(host: ModuleType) -> Iterator[Callable[[int], None]]:
    """Lets so many clusters run at once."""

    def run(clusters: int) -> None:
        host.run_at_once(clusters)
        cuda.group.cache_clear()
        cuda.at_once.cache_clear()

    yield run
    run(1 << 20)


@pytest.mark.parametrize(("clusters", "groups"), [(1, 1), (3, 3), (20, 9)])
def test_no_more_clusters_than_run_at_once(
    clusters: int, groups: int, clusters_run: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiprocessor without neighbours is in no cluster: 132 of them may make 15 of 8, not 16."""
    clusters_run(clusters)
    started = []
    run_kernel = cuda._run

    def recorded(kernel: str, cell: str, x: Any, numbers: Any, tensors: Any) -> None:
        started.extend([numbers[7:9]] if kernel != "gather" else [])
        run_kernel(kernel, cell, x, numbers, tensors)

    monkeypatch.setattr(cuda, "_run", recorded)
    assert_as_good_as_reference("lstm", make(Case("lstm", 3, 9, 128, 1)), FLOAT, "cuda")
    assert [*map(tuple, started)] == [(groups, 2)] * 2


def test_where_no_cluster_has_room(clusters_run: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks meet in global memory; where there are too few of them for that the call is refused with a reason."""
    chip = cuda._chip(torch.device("cpu"))
    assert cuda.group("gru", "bfloat16", 500, chip) == Group(16, False)
    clusters_run(0)
    assert cuda.group("gru", "bfloat16", 500, chip) == Group(16, True)
    assert_as_good_as_reference("gru", make(Case("gru", 2, 2, 500, 1)), HALF, "cuda")
    assert all(group.mailbox or group.blocks == 1 for group in cuda.groups(torch.device("cpu")))
    monkeypatch.setattr(cuda, "_chip", lambda _: chip._replace(processors=15))
    call = {"cell": "gru", "dtype": HALF, "device": "cpu", "hidden_size": 500}
    (reason,) = backends.why_not("cuda", **call)
    assert reason == (
        "cuda: gru of H=500 in bfloat16 fits no group of blocks of cpu, which has 15 multiprocessors with 227 KiB"
    )


def test_an_extension_that_was_built_for_another_gpu(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for clusters before it runs, and has no code to tell them by: a reason, and no error of a layer."""

    def no_image(*_: object) -> int:
        raise RuntimeError("cuda: no kernel image is available for execution on the device")

    monkeypatch.setattr(host, "clusters", no_image)
    cuda.group.cache_clear()
    cuda.at_once.cache_clear()
    call = {"cell": "lstm", "dtype": HALF, "device": "cpu", "hidden_size": 256}
    assert backends.why_not("cuda", **call) == ["cuda: no kernel image is available for execution on the device"]
    assert backends.choose("auto", **call) == "cpu"


@pytest.mark.parametrize(
    ("driver", "capability", "served"),
    [(0, 90, False), (12090, 90, False), (13000, 90, True), (13000, 120, False), (13010, 120, True)],
)
def test_a_driver_that_is_too_old(
    driver: int, capability: int, served: bool, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine code wants a driver of the same major version, PTX one as new as what has written it."""
    monkeypatch.setattr(host, "versions", lambda: (driver, 13010))
    monkeypatch.setattr(cuda, "_chip", lambda _: Chip(divmod(capability, 10), 108, 227 << 10))
    reasons = backends.why_not("cuda", cell="gru", dtype=HALF, device="cpu", hidden_size=64)
    told = f"which needs a newer driver: this one knows {driver // 1000}.{driver % 1000 // 10}"
    assert [told in reason for reason in reasons] == ([] if served else [True])


@pytest.mark.parametrize(
    ("built_for", "capability", "driver", "served"),
    [
        ("12.0", (12, 0), 13000, True),
        ("12.0", (12, 1), 13000, True),
        ("12.1", (12, 0), 13010, False),
        ("8.0 9.0", (12, 0), 13010, False),
        ("9.0a+PTX", (9, 0), 13000, True),
        ("9.0a+PTX", (10, 0), 13010, False),
        ("10.0f", (10, 3), 13000, True),
        ("8.9+PTX", (8, 6), 13010, False),
        ("8.6+PTX", (8, 9), 13000, True),
        ("8.6+PTX", (12, 0), 13010, True),
    ],
)
def test_what_the_extension_was_built_for(
    built_for: str, capability: tuple, driver: int, served: bool, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "architectures", built_for)
    monkeypatch.setattr(host, "versions", lambda: (driver, 13010))
    monkeypatch.setattr(cuda, "_chip", lambda _: Chip(capability, 108, 227 << 10))
    reasons = backends.why_not("cuda", cell="gru", dtype=HALF, device="cpu", hidden_size=64)
    told = f"was built for capability {built_for}, and this GPU has {capability[0]}.{capability[1]}"
    assert reasons == ([] if served else [f"cuda: sire_fast._cuda {told}"])


@pytest.mark.proof
def test_no_access_beyond_what_is_there(tmp_path: Path) -> None:
    """Every cell, alone and in a cluster, and positions outside their sequences, under AddressSanitizer: of all tensors
    and of shared memory."""
    cuda_on_host.build(tmp_path, ("-O1", "-fsanitize=address"))
    code = (
        "import os, pathlib, pytest, torch, cuda_on_host\n"
        "from oracle import Case, assert_as_good_as_reference, cast, make, run, with_wrong_positions\n"
        "from sire_fast.backends import cuda\n"
        "cuda_on_host.use(cuda_on_host.load(next(pathlib.Path(os.environ['BUILT']).glob('_cuda*'))), 2)\n"
        "for cell in ('rnn_tanh', 'gru', 'lstm'):\n"
        "    for group in (cuda.Group(1, False), cuda.Group(2, False), cuda.Group(2, True)):\n"
        "        cuda.group = lambda *_, group=group: group\n"
        "        case = Case(cell, 4, 3, 33, 3, ragged=True, recompute=True)\n"
        "        assert_as_good_as_reference(cell, make(case), torch.float32, 'cuda')\n"
        "for arguments in with_wrong_positions('gru', pytest.MonkeyPatch()):\n"
        "    for group in (cuda.Group(1, False), cuda.Group(2, True)):\n"
        "        cuda.group = lambda *_, group=group: group\n"
        "        run('gru', cast(arguments, torch.float32), 'cuda')\n"
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


def assert_found(folder: Path, kernel: str, include: str = "gpu_on_host.h", grid: str = "1, 64, 64, 1, false") -> None:
    """That the machine under the kernels throws for one that does something wrong."""
    source = folder / "wrong.cpp"
    source.write_text(
        f'#include "{include}"\n'
        "using namespace sire_fast::gpu;\n"
        f"void kernel(const int) {{ {kernel} }}\n"
        "int main() {\n"
        "  try {\n"
        f"    for (int n = 0; n < 16; ++n) launch(kernel, {{{grid}}}, 0, 0);\n"
        "  } catch (const std::runtime_error&) { return 7; }\n"
        "}\n"
    )
    program = folder / "wrong"
    includes = [f"-I{ROOT / name}" for name in ("tests", "csrc")]
    subprocess.run(["g++", "-std=c++17", *includes, source, "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == 7


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """sire_fast._cuda with the machine code of a release."""
    code = (
        "import sys, setuptools\n"
        "from distutils.core import run_setup\n"
        "project = run_setup('setup.py', ['build_ext', '--build-lib', sys.argv[1]], stop_after='commandline')\n"
        "project.ext_modules = [e for e in project.ext_modules if e.name == 'sire_fast._cuda']\n"
        "project.run_commands()\n"
    )
    folder = tmp_path_factory.mktemp("extension")
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, env=environment | {"FORCE_CUDA": "1"}, check=True)
    return cuda_on_host.load(next(folder.glob("sire_fast/_cuda*")))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.proof
def test_the_compiled_kernels_spill_little_and_fit(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "_cuda", extension)
    code = aot.main(["--backend", "cuda"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "72 of 72 kernels fit" in told  # 4 cells, 3 dtypes, 2 directions, 3 chips


def test_a_barrier_that_some_threads_do_not_reach_is_found(tmp_path: Path) -> None:
    assert_found(tmp_path, "if (thread() < 32) barrier();")


def test_two_neighbours_between_the_multiples_of_their_size_are_found(tmp_path: Path) -> None:
    code = "float two[2]; sire_fast::cuda::load(two, reinterpret_cast<const float*>(shared_memory()) + 1);"
    assert_found(tmp_path, code, "cuda/numbers.h")


def test_what_reads_a_copy_before_it_waits_is_found(tmp_path: Path) -> None:
    """It may have come, or not: of 64 threads each of the two happens to some."""
    code = (
        "static int from[64]; int* to = reinterpret_cast<int*>(shared_memory());"
        "static int came = 0; if (thread() < 16) { copy_async<4>(to + thread(), from + thread());"
        "came += to[thread()] == 0; wait_for_copies(); } barrier();"
        'if (!thread() && came > 0 && came < 16) throw std::runtime_error("both");'
    )
    assert_found(tmp_path, code)


PAIR = "2, 32, 1024, 2, false"  # blocks of a cluster
BEGIN = (
    "auto* to = reinterpret_cast<uint4*>(shared_memory()); auto* arrivals = reinterpret_cast<Arrivals*>(to + 32);"
    "if (!thread()) begin_arrivals(arrivals); cluster_barrier();"
)


def test_what_reads_before_all_has_arrived_is_found(tmp_path: Path) -> None:
    """What other blocks send may have come or not, until it is waited for."""
    code = BEGIN + (
        "static int came; came = 0; send(to + thread(), arrivals, 1 - block(), {1, 1, 1, 1});"
        "if (!thread()) expect_arrivals(arrivals, 512); cluster_barrier(); came += to[thread()].x == 1;"
        "wait_for_arrivals(arrivals, 0); if (to[thread()].x != 1) std::abort(); cluster_barrier();"
        'if (!thread() && came > 0 && came < 64) throw std::runtime_error("both");'
    )
    assert_found(tmp_path, code, grid=PAIR)


def test_a_phase_that_is_told_twice_is_found(tmp_path: Path) -> None:
    assert_found(tmp_path, BEGIN + "if (thread() < 2) expect_arrivals(arrivals, 16);", grid=PAIR)


def test_a_block_that_ends_before_all_has_arrived_is_found(tmp_path: Path) -> None:
    assert_found(tmp_path, BEGIN + "send(to + thread(), arrivals, 1 - block(), {});", grid=PAIR)


def test_the_first_lane_is_not_always_the_first_to_run(tmp_path: Path) -> None:
    code = 'static int ran; if (ran++ % 64 == 0 && thread() % 32) throw std::runtime_error("another");'
    assert_found(tmp_path, code)


class Operators(TorchDispatchMode):
    """The names of torch's operators that a watched function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.names.append(operator.overloadpacket.__name__)
        return operator(*arguments, **named or {})

    def watch(self, call: Callable[..., None]) -> Callable[..., None]:
        def watched(*arguments: Any) -> None:
            with self:
                call(*arguments)

        return watched


def test_no_tensor_is_filled_or_copied_around_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """At T=1000 every pass over all rows of spans costs as much as a hundred steps."""
    seen = Operators()
    for name in ("forward", "backward"):
        monkeypatch.setattr(cuda, name, seen.watch(getattr(cuda, name)))
    arguments = cast(make(Case("gru", 5, 3, 7, 2, inputs=4)), FLOAT)
    run("gru", arguments | {"h0": arguments["h0"].detach()}, "cuda")
    assert {"mm", "addmm_", "sum"} <= {*seen.names}
    assert not {"zero_", "fill_", "new_zeros", "cat", "copy_", "_to_copy", "clone"} & {*seen.names}


def test_weights_may_begin_anywhere() -> None:
    """Those that are part of one long tensor begin at multiples of their own size only."""
    arguments = cast(make(Case("gru", 3, 2, 18, 1)), HALF)
    expected = run("gru", arguments, "cuda")
    w = arguments["w_hh"].detach()
    moved = torch.empty(w.numel() + 1, dtype=HALF)[1:].view_as(w).copy_(w)
    for name, value in run("gru", arguments | {"w_hh": moved.requires_grad_()}, "cuda").items():
        assert torch.equal(value, expected[name]), name


def test_a_nan_stays_one_in_its_sequence() -> None:
    arguments = cast(make(Case("gru", 5, 3, 17, 2)), FLOAT)
    clean = run("gru", arguments, "cuda")
    arguments["x_proj"] = arguments["x_proj"].detach().clone()
    arguments["x_proj"][2, 1] = float("nan")
    found = run("gru", arguments, "cuda")["output"]
    assert found[2:, 1].isnan().all()
    assert torch.equal(found[:, ::2], clean["output"][:, ::2])
    assert torch.equal(found[:2], clean["output"][:2])
