"""The Triton kernels without a GPU: plans that the operator's tests do not reach, and what compiles ahead of time."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import triton.language as tl
from oracle import Case
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from sire_fast import backends, functional, swaps
from sire_fast.backends import gpu
from sire_fast.backends.gpu import Plan, plan
from sire_fast.cells import CELLS
from sire_fast.kernels import launch, swap_rnn
from sire_fast.kernels.cells import tanh
from sire_fast.kernels.launch import Launch

ROOT = Path(__file__).parent.parent


def _tanh(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, tanh(tl.load(x + at)))


tanh_kernel = InterpretedFunction(_tanh)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def assert_right(case: Case) -> None:
    arguments = oracle.make(case)
    truth, ours = oracle.run(case.cell, arguments, "reference"), oracle.run(case.cell, arguments, "triton")
    for name, value in ours.items():
        assert oracle.error(value, truth[name]) < 1e-12, name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compare", ["end", "swap"])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_stream(cell: str, compare: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """H of three blocks, the last of them not full, and states that go through memory."""
    monkeypatch.setattr(launch, "launch", lambda *_: Launch(16, False, 16, 16, 4, 1))
    assert_right(Case(cell, 5, 3, 37, 2, ragged=True, compare=compare, recompute=recompute))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("chosen", [Plan(1, 0), Plan(3, 1), Plan(2, 4), Plan(1, 4)], ids=str)
def test_any_plan_gives_the_same(chosen: Plan, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants in lock step, behind it in one or more dense passes, or some here and some there."""
    monkeypatch.setattr(gpu, "plan", lambda *_: chosen)
    if streams:
        monkeypatch.setattr(launch, "launch", lambda *_: Launch(16, False, 16, 16, 4, 1))
    for cell in ("gru", "lstm"):
        assert_right(Case(cell, 6, 5, 18, 7 if chosen.sequences == 3 else 4, ragged=True))


@pytest.mark.parametrize("last", [False, True])
def test_what_is_moved_as_one_in_either_order(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is the faster depends on the version of Triton."""
    monkeypatch.setattr(swap_rnn, "_LAST", tl.constexpr(last))
    for cell in ("gru", "lstm", "rnn_relu"):
        assert_right(Case(cell, 4, 2, 17, 2, ragged=True))


def test_tensors_that_begin_anywhere() -> None:
    """A choice of two addresses is told to the compiler to be aligned."""
    whole = torch.zeros(9)
    assert launch._aligned((whole, None))[:2] == (whole, None)
    moved = launch._aligned((whole[1:],))[0]
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, whole[1:])


def test_more_rows_than_32_bits_count() -> None:
    """Of either backend: a grid of blocks, too, would have fewer of them in silence."""
    x, h = torch.empty(1 << 20, 64, 48, device="meta"), torch.empty(64, 16, device="meta")
    pairs = torch.empty(64, 16, 2, dtype=torch.int64, device="meta")
    spans = torch.empty(64 * 16 << 20, 16, device="meta")
    with pytest.raises(ValueError, match=r"swaps: expected T\*B \+ 2\*B\*K\*S"):
        gpu.Call.of("gru", x, h, pairs, spans)


@pytest.mark.parametrize("streams", [False, True])
def test_variants_keep_no_more_than_the_longest_span(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streams:
        monkeypatch.setattr(launch, "launch", lambda *_: Launch(16, False, 16, 16, 4, 1))
    arguments = oracle.make(Case("lstm", 9, 3, 5, 6, compare="swap"))
    arguments["swaps"] = swaps.Window(6, 2)(9, 3)
    arguments["ends"] = arguments["swaps"][..., 1]
    truth = oracle.run("lstm", arguments, "reference")
    arguments["longest"] = 3
    with torch.no_grad():
        inference = functional.swap_rnn("lstm", **arguments, backend="triton")
    torch.testing.assert_close(inference.penalty, truth["penalty"], rtol=1e-11, atol=1e-12)
    with torch.enable_grad():
        run = functional.swap_rnn("lstm", **arguments, backend="triton")
    kept = next(t for t in run.output.grad_fn.saved_tensors if t is not None and t.shape == (3 * 6 * 3, 2 * 5))
    assert kept.isfinite().any()
    arguments["longest"] = 2
    with pytest.raises(ValueError, match="longest: expected at least 3, the longest span, got 2"):
        functional.swap_rnn("lstm", **arguments, backend="triton")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # T, B, K, S, rows, programs
        ((100, 64, 0, 1, 16, 132), Plan(1, 0)),  # as many programs as there are sequences
        ((100, 64, 8, 100, 16, 132), Plan(1, 8)),  # compared at the end: all in lock step
        ((100, 64, 8, 2, 16, 132), Plan(1, 8)),
        ((100, 512, 8, 2, 16, 132), Plan(4, 0)),  # compared at the swap, more sequences than processors
        ((100, 64, 99, 2, 16, 132), Plan(1, 15)),
    ],
)
def test_the_plan_with_the_fewest_steps(sizes: tuple[int, ...], expected: Plan) -> None:
    assert plan(*sizes) == expected


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"cell": "gru", "device": "cpu", "hidden_size": 64}
    assert not backends.why_not("triton", dtype=torch.float16, **call)
    assert "H up to 1024" in backends.why_not("triton", dtype=torch.float16, **call | {"hidden_size": 1025})[0]
    with monkeypatch.context() as of_a_folder_on_the_path:
        of_a_folder_on_the_path.setattr(backends.triton, "_KERNELS", False)
        assert "sire_fast is not installed" in backends.why_not("triton", dtype=torch.float16, **call)[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backends.why_not("triton", dtype=torch.float32, **call) == ["triton: runs on a GPU, got a tensor on cpu"]
    assert len(backends.why_not("triton", dtype=torch.float64, **call)) == 2


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "fp32_precision", "fp32_precision, none"])
def test_true_float32_unless_torch_allows_tf32(way: str, allow_tf32: Any) -> None:
    assert launch.arithmetic(torch.float32) == "tf32x3"
    allow_tf32[way](True)
    assert launch.arithmetic(torch.float32) == "tf32"
    allow_tf32[way](False)
    assert launch.arithmetic(torch.float32) == "tf32x3"


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_float32_from_halves_on_matrix_units(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read the first 10 bits of a fraction: each of the three products of halves is needed, and halves must be."""
    multiply, seen = InterpreterBuilder.create_dot, []

    def of_tf32(self: InterpreterBuilder, a: Any, b: Any, d: Any, precision: Any, *others: Any) -> Any:
        if precision == ir.INPUT_PRECISION.TF32:
            seen.append(precision)
            a, b = (TensorHandle((x.data.view(np.int32) & -0x2000).view(np.float32), x.dtype) for x in (a, b))
        return multiply(self, a, b, d, precision, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_tf32)
    monkeypatch.setattr(launch, "launch", lambda *_: Launch(16, False, 16, 16, 4, 1))
    for recompute in (False, True):
        case = Case(cell, 3, 1, 20, 1, recompute=recompute)
        oracle.assert_as_good_as_reference(cell, oracle.make(case), torch.float32, "triton")
    assert seen


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_float32_where_matrix_units_cut_off_their_sums(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cut off addends, at the last bits of the largest, and sums, as Fasi et al., "Numerical behavior of NVIDIA
    tensor cores" (2021), have measured: a long sum kept in them drifts towards zero."""
    seen = []

    def cutting(self: InterpreterBuilder, a: Any, b: Any, d: Any, precision: Any, *_: Any) -> Any:
        seen.append(precision)
        total = d.data.astype(np.float64)
        for k in range(0, a.data.shape[1], 8):
            addends = a.data[:, k : k + 8, None].astype(np.float64) * b.data[k : k + 8]
            addends = np.concatenate((total[:, None], addends), 1)
            _, exponent = np.frexp(np.abs(addends).max(1, keepdims=True))
            unit = np.ldexp(1.0, exponent - 24)
            total = (np.trunc(addends / unit) * unit).sum(1)
            nearest = total.astype(np.float32)
            total = np.where(np.abs(nearest) > np.abs(total), np.nextafter(nearest, np.float32(0)), nearest)
        return TensorHandle(total.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", cutting)
    monkeypatch.setattr(launch, "launch", lambda *_: Launch(16, False, 64, 16, 8, 3))
    oracle.assert_as_good_as_reference(cell, oracle.make(Case(cell, 4, 2, 256, 1)), torch.float32, "triton")
    assert seen


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.proof
def test_no_address_lies_outside_whatever_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody checks them: too large, negative, in the wrong order, and spans longer than what is kept."""
    known: list[tuple[int, int]] = []

    def check(addresses: Any, mask: Any) -> None:
        for address in addresses.data[mask.data].ravel().tolist():
            if not any(first <= address < end for first, end in known):
                storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
                known[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
                assert any(first <= address < end for first, end in known), "outside of all tensors"

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    for streams in (False, True):
        if streams:
            monkeypatch.setattr(launch, "launch", lambda *_: Launch(16, False, 16, 16, 4, 1))
        for arguments in oracle.with_wrong_positions("gru", monkeypatch):
            oracle.run("gru", arguments, "triton")


def test_tanh_is_exact_with_the_exp_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ex2.approx is off by two units in the last place: where 1 - exp(-2 x) is small, that is much of it."""
    exact = InterpreterBuilder.create_exp

    def approximate(self: InterpreterBuilder, x: Any) -> Any:
        found = exact(self, x)
        found.data = np.nextafter(np.nextafter(found.data, np.float32(2)), np.float32(2))
        return found

    monkeypatch.setattr(InterpreterBuilder, "create_exp", approximate)
    x = torch.logspace(-6, 1, 4096)
    y = torch.empty_like(x)
    tanh_kernel[(1,)](x, y, SIZE=4096)
    truth = x.double().tanh()
    error = float(((y - truth) / truth).abs().max())
    assert error < 4 * torch.finfo(torch.float32).eps


def test_all_lanes_that_store_a_penalty_have_the_same_bits() -> None:
    """A square that is fused with what comes from another lane is rounded in one of the two only."""
    code = (
        "import re\n"
        "from bench import aot\n"
        "from sire_fast.kernels.launch import launch\n"
        "aot.usage = lambda name, binary: (name, binary.asm['ptx'])\n"
        "for hidden in (16, 33):\n"
        "    job = aot.Job(80, 'rnn_relu', 'bfloat16', hidden, launch('rnn_relu', hidden, 'bfloat16', 80))\n"
        "    ptx = dict(aot.compiled(job))['forward']\n"
        "    shuffled = {*re.findall(r'shfl\\.sync\\.bfly\\S+\\s+(%\\w+)', ptx)}\n"
        "    assert shuffled\n"
        "    for fused in re.findall(r'fma\\.rn\\.f32\\s(.*);', ptx):\n"
        "        assert not shuffled & {*re.findall(r'%\\w+', fused)}, fused\n"
    )
    done = command("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_stands_behind_a_sequence_stays_out_of_the_gradients(value: float) -> None:
    oracle.assert_padding_does_not_matter("gru", value, torch.float64, "triton")


@pytest.mark.proof
def test_kernels_compile_and_fit_without_a_gpu() -> None:
    """The largest of those that keep the weights on chip, and one whose weights stream; bench.aot compiles them all."""
    done = command("-m", "bench.aot", "--backend", "triton", "--cell", "gru", "--only", "bfloat16:128", "tf32x3:512")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "42 of 42 kernels fit" in done.stdout
    assert "m16n8k16" in done.stdout


@pytest.mark.proof
def test_kernels_compile_where_no_row_is_aligned() -> None:
    """H of 100 without spills, and odd, where Triton 3.6 has died of masks: bench.aot --triton tries those versions."""
    sizes = ("bfloat16:100", "tf32x3:201")
    done = command("-m", "bench.aot", "--backend", "triton", "--cell", "gru", "--capability", "90", "--only", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 of 14 kernels fit" in done.stdout
    aligned = done.stdout.split("H<=201")[0]
    assert aligned.count(" 0 bytes spilled") == 7


@pytest.mark.proof
@pytest.mark.parametrize("version", ["3.5.1", "3.6.0"])
def test_kernels_compile_with_the_triton_of_older_torch(version: str) -> None:
    """Of torch 2.9 and 2.11: one that streams, as long as it kept to no alignment 3.6 did not compile it, one whose
    weights stay on chip, and the largest cell, of whose states most losses give one a gradient alone. Each version
    comes from the package index once."""
    for cell, *sizes in (("gru", "tf32x3:100", "bfloat16:128"), ("lstm", "bfloat16:200")):
        options = ("--capability", "90", "--processes", "1", "--cell", cell, "--only", *sizes)
        done = command("-m", "bench.aot", "--triton", version, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        kernels = 7 * len(sizes)
        assert f"{kernels} of {kernels} kernels fit" in done.stdout


def test_no_tuning_without_a_gpu() -> None:
    done = command("-m", "bench.tune")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
