"""The operator: every backend and cell against the reference, its gradients, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import CASES, Case, assert_as_good_as_reference, cast, error, make, run
from torch import Tensor

from sire_fast import _C, backends, functional, ops, reference, swaps, validation
from sire_fast.cells import CELLS

KERNELS = list(backends.KERNELS)
WIDEST = {"cuda": torch.float32}  # the dtype of those that do not compute in float64


def make_for(backend: str, case: Case) -> dict[str, Any]:
    """Arguments for a case in the widest dtype that a backend computes in."""
    return cast(make(case), WIDEST.get(backend, torch.float64))


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Any:
    """A backend; "cpu" with the named instruction set."""
    if request.param in ("triton", "cuda"):
        yield request.param
        return
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield "cpu"
    _C.use_instruction_set(before)


def every_kernel(of_gpus: dict[str, list[Case]]) -> pytest.MarkDecorator:
    """All cases for the CPU's kernels; for those of GPUs, which are slow here, the ones named."""
    on_cpu = [(name, case) for name in _C.instruction_sets() for case in CASES]
    pairs = [on_gpu(name, case) for name, cases in of_gpus.items() for case in cases] + on_cpu
    return pytest.mark.parametrize(("kernel", "case"), pairs, indirect=["kernel"], ids=str)


def on_gpu(backend: str, case: Case) -> Any:
    """A case for a kernel of GPUs; an interpreter takes a minute for many units."""
    long = backend == "triton" and case.hidden >= 64
    return pytest.param(backend, case, marks=pytest.mark.proof if long else ())


FEW = CASES[::4]  # of every cell, size and option some


@every_kernel({"triton": CASES})
def test_float64(case: Case, kernel: str) -> None:
    arguments = make(case)
    truth, ours = run(case.cell, arguments, "reference"), run(case.cell, arguments, kernel)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert error(value, truth[name]) < 1e-12, name


@every_kernel({"triton": FEW, "cuda": CASES})
def test_float32(case: Case, kernel: str) -> None:
    assert_as_good_as_reference(case.cell, make(case), torch.float32, kernel)


@every_kernel({"triton": FEW, "cuda": FEW})
def test_bfloat16(case: Case, kernel: str) -> None:
    """The states stay float32 inside, so that the error is that of rounding what comes in and goes out, and of
    products of rounded factors; the reference rounds every step."""
    assert_as_good_as_reference(case.cell, make(case), torch.bfloat16, kernel)


# relu's derivative jumps where rounding changes a sign
@pytest.mark.parametrize(
    ("backend", "case"), [on_gpu(b, c) for b in ("triton", "cuda") for c in FEW if c.cell != "rnn_relu"], ids=str
)
def test_float16(backend: str, case: Case) -> None:
    assert_as_good_as_reference(case.cell, make(case), torch.float16, backend)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_long_sequences_of_many_rows(cell: str, backend: str) -> None:
    """Several panels of rows, and dW_hh collected over more rows than are held at once."""
    size = (40, 33, 24, 6) if backend == "cpu" else (20, 9, 24, 5)
    case = Case(cell, *size, compare="end", ragged=True)
    assert_as_good_as_reference(cell, make(case), torch.float32, backend)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("width", "compare"), [(1, "swap"), (3, "end"), (None, "end")])
def test_projections_of_as_many_steps_as_swaps_reach(
    width: int | None, compare: str, recompute: bool, cell: str
) -> None:
    """The projected inputs of a few steps, and their gradients, take the place of those that no step reads any more."""
    case = Case(cell, 60, 33, 5, 2 if width else 0, True, True, compare, inputs=3, recompute=recompute)
    arguments = make(case)
    if width:
        arguments["swaps"] = swaps.Window(2, width)(arguments["lengths"], 33)
        arguments["ends"] = arguments["swaps"][..., 1].contiguous() if compare == "swap" else None
    truth, ours = run(cell, arguments, "reference"), run(cell, arguments, "cpu")
    for name, value in ours.items():
        assert error(value, truth[name]) < 1e-12, name


@pytest.mark.parametrize("backend", KERNELS)
def test_more_variants_than_a_warp_has_lanes(backend: str) -> None:
    """Those that have read an input are looked for 32 at a time."""
    arguments = make(Case("gru", 34, 1, 3, 0))
    arguments["swaps"] = swaps.Adjacent("all")(34, 1)
    arguments["ends"] = arguments["swaps"][..., 1].contiguous()
    assert arguments["swaps"].shape[1] > 32
    assert_as_good_as_reference("gru", arguments, torch.float32, backend)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's, of exp
def test_gates_from_linear_to_saturated(cell: str, scale: float, backend: str) -> None:
    """exp and tanh are our own: small arguments lose digits, and large ones overflow, if they are done carelessly."""
    arguments = make(Case(cell, 5, 4, 16, 2))
    arguments["x_proj"] = (arguments["x_proj"].detach() * scale).requires_grad_()
    if cell == "rnn_relu" and scale > 1:
        arguments["w_hh"] = (arguments["w_hh"].detach() / scale).requires_grad_()
    assert_as_good_as_reference(cell, arguments, torch.float32, backend)
    if backend in WIDEST:
        return
    truth, ours = run(cell, arguments, "reference"), run(cell, arguments, backend)
    for name, value in ours.items():
        assert error(value, truth[name]) < 1e-12, name


@pytest.mark.parametrize("gate", [-60.0, -88.0, -1e3, 1e3])
def test_closed_output_gates(gate: float) -> None:
    """The gradient takes tanh(c) from h / o, and o must not be 0."""
    arguments = make(Case("lstm", 5, 4, 16, 2))
    with torch.no_grad():
        arguments["x_proj"][..., 3 * 16 :] = gate
    truth, ours = run("lstm", arguments, "reference"), run("lstm", arguments, "cpu")
    for name, value in ours.items():
        assert error(value, truth[name]) < 1e-12, name
    assert_as_good_as_reference("lstm", arguments, torch.float32, "cpu")


@pytest.mark.parametrize("kernel", _C.instruction_sets(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("state", "infinite"), [("h0", False), ("c0", False), ("c0", True)])
def test_closed_gates_let_nothing_through(state: str, infinite: bool, dtype: torch.dtype, kernel: str) -> None:
    """The smallest normal number is not 0: times the largest it is 4, and times infinity it hides what diverges."""
    cell = "gru" if state == "h0" else "lstm"
    arguments = cast(make(Case(cell, 3, 2, 17, 1)), dtype)
    with torch.no_grad():
        arguments["w_hh"].zero_()
        arguments["x_proj"][..., 17:34] = -1e4  # z or f
        arguments[state][0] = torch.inf if infinite else torch.finfo(dtype).max
    truth, ours = (oracle.outputs(cell, arguments, backend) for backend in ("reference", kernel))
    assert truth.output[:, 0].isnan().all() == infinite
    torch.testing.assert_close(ours.output, truth.output, equal_nan=True)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_not_a_number_stays_one(cell: str, backend: str) -> None:
    arguments = make_for(backend, Case(cell, 3, 2, 5, 1))
    with torch.no_grad():
        arguments["x_proj"][1, 0] = float("nan")
        output = functional.swap_rnn(cell, **arguments, backend=backend).output
    assert output[1:, 0].isnan().all()
    assert output[:, 1].isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["cpu"])  # an interpreter takes too long for so many calls
@pytest.mark.parametrize("wanted", [*oracle.TENSORS, "all"])
def test_gradcheck(cell: str, backend: str, wanted: str) -> None:
    """Each tensor argument alone, so that no gradient is right only because another is computed too."""
    arguments = make(Case(cell, 4, 2, 3, 2, ragged=True, inputs=2))
    names = [n for n in oracle.TENSORS if arguments[n] is not None and wanted in (n, "all")]
    if not names:
        assert (wanted, CELLS[cell].states) == ("c0", 1)
        return
    for name in oracle.TENSORS:
        if arguments[name] is not None:
            arguments[name].requires_grad_(name in names)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = arguments | dict(zip(names, tensors, strict=True))
        return tuple(o for o in functional.swap_rnn(cell, **replaced, backend=backend) if o is not None)

    if cell == "rnn_relu":  # away from the kink, where no derivative is defined
        arguments["x_proj"].data.mul_(10)
    assert torch.autograd.gradcheck(call, [arguments[n] for n in names], fast_mode=False)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(cell: str, backend: str) -> None:
    a = make_for(backend, Case(cell, 4, 3, 3, 2, inputs=5))
    a["swaps"] = torch.tensor([[0, 2], [0, 3]]).expand(3, 2, 2)  # spans that fill what a GPU keeps for them
    ends, lengths = validation.fill_defaults(a["x_proj"], a["swaps"], None, a["lengths"])
    rows = ops.span_rows(backend, 4, a["swaps"], ends, lengths, None)
    arithmetic = str(a["x_proj"].dtype).removeprefix("torch.")
    settings, positions = (cell, backend, arithmetic, False), (a["swaps"], ends, lengths)
    tensors = [a[name] for name in oracle.TENSORS]
    torch.library.opcheck(torch.ops.sire_fast.swap_rnn.default, (*settings, *tensors, *positions, rows, True))
    frozen = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(torch.ops.sire_fast.swap_rnn.default, (*settings, *frozen, *positions, 0, False))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_inference_gives_the_same_bits(cell: str, backend: str) -> None:
    """Without gradients the variants' states are overwritten in place and no gate is kept."""
    arguments = make_for(backend, Case(cell, 9, 5, 17, 4, ragged=True))
    training = functional.swap_rnn(cell, **arguments, backend=backend)
    with torch.no_grad():
        inference = functional.swap_rnn(cell, **arguments, backend=backend)
    for a, b in zip(training, inference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_again_and_close_on_other_thread_counts(cell: str, backend: str) -> None:
    case = Case(cell, 20, 7, 24, 3) if backend == "cpu" else Case(cell, 8, 5, 24, 3)
    arguments = cast(make(case), torch.float32)
    one = run(cell, arguments, backend)
    for name, value in run(cell, arguments, backend).items():
        assert torch.equal(value, one[name]), name
    for threads in (1, 3, 16):
        torch.set_num_threads(threads)
        assert_as_good_as_reference(cell, make(case), torch.float32, backend)


def test_large_memory_serves_one_call_after_the_other() -> None:
    """What a forward keeps has to stay until its backward, whatever other calls get and give back meanwhile."""
    case = Case("lstm", 48, 32, 128, 4, inputs=3)
    first, second = (cast(make(case, seed), torch.float32) for seed in (0, 1))

    def start() -> Tensor:
        return functional.swap_rnn("lstm", **first, backend="cpu").variants

    def end(variants: Tensor) -> Tensor:
        return torch.autograd.grad(variants.square().sum(), first["w_hh"])[0]

    alone, held = end(start()), start()
    assert held.grad_fn.saved_tensors[-1].nbytes > _C.Memory.large  # type: ignore[union-attr]
    run("lstm", second, "cpu")
    assert torch.equal(end(held), alone)
    assert_as_good_as_reference("lstm", make(case), torch.float32, "cpu")


def _address(memory: Any) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def test_memory_of_any_size_is_kept() -> None:
    code = """
import torch, sire_fast
def first(size):
    return torch.frombuffer(sire_fast._C.Memory(size), dtype=torch.uint8)[0]
for size in reversed(range(1 << 20, 6 << 20, 100_007)):  # larger memory would not do for a smaller size
    first(size).fill_(1)
    assert first(size) == 1, size
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outputs_in_kept_memory_may_be_changed_in_place() -> None:
    case = cast(make(Case("gru", 64, 32, 128, 4, inputs=3)), torch.float32)
    results = []
    for backend in ("reference", "cpu"):
        output = functional.swap_rnn("gru", **case, backend=backend).output
        assert output.nbytes >= _C.Memory.large
        output = (output.clone() if backend == "reference" else output).mul_(2)
        results.append(torch.autograd.grad(output.square().sum(), case["w_hh"])[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_caller_holds_hardly_more_memory_than_it_asked_for() -> None:
    held = []
    for size in range(1 << 20, 40 << 20, 1_234_567):
        (_C.Memory(7 * size // 4), _C.Memory(size))  # given back: neither is to serve what needs far less
        held.append(_C.Memory(size))
        assert memoryview(held[-1]).nbytes <= 1.41 * size


@pytest.mark.parametrize("size", [1 << 60, (1 << 64) - 1])
def test_no_memory_is_told_as_torch_does(size: int) -> None:
    with pytest.raises(
        RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes"
    ):
        _C.Memory(size)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems set no limit")
def test_memory_that_is_kept_counts_where_memory_is_limited() -> None:
    """As batch systems limit it: what nobody holds goes back before there is none."""
    code = """
import resource, sire_fast
sire_fast._C.Memory(512 << 20)
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (size + (256 << 20),))
sire_fast._C.Memory(640 << 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_large_memory_is_kept() -> None:
    """For the next call that needs about as much, not for one that needs far less."""
    size = (1 << 30) - 100  # as no other test leaves
    first, second = _C.Memory(size), _C.Memory(size)
    was = _address(first)
    assert _address(second) != was
    del first
    assert _address(_C.Memory(_C.Memory.large)) != was
    assert _address(_C.Memory(size + 1)) == was
    if sys.platform == "linux":
        assert _mapped(was)
        for _ in range(10_000):  # calls in which nobody wants it
            _C.Memory(_C.Memory.large)
        assert not _mapped(was)


def _mapped(address: int) -> bool:
    """Whether the process has memory there."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(begin <= address < end for begin, end in ranges)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("n_swaps", [0, 3])
@pytest.mark.parametrize("batch", [1, 5, 16, 70])
def test_many_threads(cell: str, n_swaps: int, batch: int) -> None:
    """Far more threads than cores, tiles of W_hh and rows of dW_hh, so that some have nothing to pack or to add;
    sequences so unequal that equal parts of the cost would leave some threads without one; and sums of gradients that
    must not depend on which thread is done first."""
    arguments = make(Case(cell, 24, batch, 10, n_swaps, ragged=True, inputs=3, recompute=batch == 16))
    truth = run(cell, arguments, "reference")
    for threads in (16, 64, 100):
        torch.set_num_threads(threads)
        ours, again = run(cell, arguments, "cpu"), run(cell, arguments, "cpu")
        for name, value in ours.items():
            assert error(value, truth[name]) < 1e-12, (threads, name)
            assert torch.equal(value, again[name]), (threads, name)


@pytest.mark.parametrize("backend", KERNELS)
def test_any_strides(backend: str) -> None:
    """Kernels read raw memory: what is transposed, sliced, expanded or offset must be seen as it is."""
    case = Case("lstm", 5, 3, 6, 2, compare="swap", inputs=4)
    plain = make_for(backend, case)
    truth = run("lstm", plain, backend)

    def restride(t: Tensor) -> Tensor:
        return torch.stack((torch.full_like(t, torch.nan), t), -1)[..., 1]  # every second element, offset by one

    strided = dict(plain)
    for name in oracle.TENSORS:
        strided[name] = restride(plain[name].detach()).requires_grad_()
    strided["swaps"] = plain["swaps"].flip(-1).contiguous().flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    strided["ends"] = plain["ends"].t().contiguous().t()
    assert not strided["x_proj"].is_contiguous()
    # as of the imaginary part of a conjugate: the sign is not in the memory
    negated = plain | {name: torch._neg_view(-plain[name].detach()).requires_grad_() for name in oracle.TENSORS}
    assert negated["x_proj"].is_neg()
    for arguments in (strided, negated):
        for name, value in run("lstm", arguments, backend).items():
            assert torch.equal(value, truth[name]), name

    # gradients that arrive expanded, as those of a sum do, or transposed
    outputs = functional.swap_rnn("lstm", **plain, backend=backend)
    expanded = torch.autograd.grad(outputs.output.sum() + outputs.penalty.sum(), plain["w_hh"], retain_graph=True)
    ones = torch.autograd.grad(
        [outputs.output, outputs.penalty],
        plain["w_hh"],
        [torch.ones(3, 5, 6).to(outputs.output).transpose(0, 1), torch.ones_like(outputs.penalty)],
    )
    assert torch.equal(expanded[0], ones[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_that_comes_on_behind_the_forward_changes_nothing(backend: str) -> None:
    """Around a backward alone, say: the kernels would read the halves of what is projected again as float32."""
    arguments = cast(make(Case("gru", 5, 3, 16, 2, inputs=8, recompute=True)), torch.float32)
    wanted = [arguments[name] for name in oracle.TENSORS if arguments[name] is not None]
    output = oracle.outputs("gru", arguments, backend).output.square().sum()
    expected = torch.autograd.grad(output, wanted, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output, wanted)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", KERNELS)
def test_each_output_alone(backend: str) -> None:
    """A gradient that arrives through one output only: the others' are absent, not zeros."""
    arguments = make_for(backend, Case("lstm", 5, 3, 4, 2))
    names = [n for n in oracle.TENSORS if arguments[n] is not None]
    tolerances = {"rtol": 1e-4, "atol": 1e-5} if backend in WIDEST else {"rtol": 1e-10, "atol": 1e-12}
    for field in reference.SwapRNN._fields:
        ours = getattr(oracle.outputs("lstm", arguments, backend), field).square().sum()
        truth = getattr(oracle.outputs("lstm", arguments, "reference"), field).square().sum()
        got = torch.autograd.grad(ours, [arguments[n] for n in names])
        expected = torch.autograd.grad(truth, [arguments[n] for n in names], materialize_grads=True)
        torch.testing.assert_close(got, expected, **tolerances, msg=field)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_exact_zeros(cell: str, backend: str) -> None:
    """Equal inputs, and pairs that exchange nothing, give a penalty of exactly 0 and no gradient."""
    arguments = make_for(backend, Case(cell, 6, 3, 18, 4))
    arguments["swaps"] = torch.tensor([[0, 3], [1, 4], [2, 2], [5, 5]]).expand(3, 4, 2)
    with torch.no_grad():
        arguments["x_proj"][3] = arguments["x_proj"][0]
        arguments["x_proj"][4] = arguments["x_proj"][1]
    penalty = functional.swap_rnn(cell, **arguments, backend=backend).penalty
    assert (penalty == 0).all()
    (gradient,) = torch.autograd.grad(penalty.sum(), arguments["w_hh"])
    assert (gradient == 0).all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_pair_that_exchanges_nothing_is_the_original(cell: str, backend: str) -> None:
    arguments = make_for(backend, Case(cell, 6, 5, 9, 3, ragged=True))
    arguments["swaps"] = arguments["swaps"][..., :1].expand(-1, -1, 2)
    run = functional.swap_rnn(cell, **arguments, backend=backend)
    assert torch.equal(run.variants, run.h_n[:, None].expand(-1, 3, -1))
    assert (run.penalty == 0).all()
    (gradient,) = torch.autograd.grad(run.penalty.sum(), arguments["x_proj"], retain_graph=True)
    assert (gradient == 0).all()
    ours = torch.autograd.grad(run.variants.sum(), arguments["w_hh"], retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(3 * run.h_n.sum(), arguments["w_hh"]))


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_cell_that_sums_has_no_order(backend: str) -> None:
    x = torch.randint(1, 100, (9, 4, 8)).float()
    pairs = swaps.Uniform(5)(9, 4)
    run = functional.swap_rnn("rnn_relu", x, torch.eye(8), None, torch.zeros(4, 8), swaps=pairs, backend=backend)
    assert torch.equal(run.h_n, x.sum(0))
    assert (run.penalty == 0).all()


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_one_swap_by_hand(backend: str) -> None:
    """relu(x + 2 h) from 0: 1, 2, 3 gives 11, and 3, 2, 1 gives 17."""
    x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    run = functional.swap_rnn(
        "rnn_relu", x, torch.full((1, 1), 2.0), None, torch.zeros(1, 1),
        swaps=torch.tensor([[[0, 2], [0, 1]]]), ends=torch.tensor([[2, 1]]), backend=backend,
    )  # fmt: skip
    assert run.output.flatten().tolist() == [1, 4, 11]
    assert run.variants.flatten().tolist() == [17, 5]
    assert run.penalty.tolist() == [[36, 1]]


@pytest.mark.parametrize("lacks", ["cells", "spans", "of another dtype"])
def test_the_gradients_operator_refuses_what_kernels_would_read_beyond(lacks: str) -> None:
    """Who calls it himself may hand over less memory than the sizes tell."""
    a = cast(make(Case("lstm", 4, 3, 5, 2)), torch.float32)
    ends, lengths = validation.fill_defaults(a["x_proj"], a["swaps"], None, None)
    tensors = [a[name] if a[name] is None else a[name].detach() for name in oracle.TENSORS]
    given = ("lstm", "cpu", "float32", False), (*tensors, a["swaps"], ends, lengths)
    rows = ops.span_rows("cpu", 4, a["swaps"], ends, lengths, None)
    h, *_, cells, _, gates, spans = torch.ops.sire_fast.swap_rnn(*given[0], *given[1], rows, True)
    grads = [torch.ones_like(h, dtype=torch.bfloat16 if lacks == "of another dtype" else None), *[None] * 6]
    kept = (h, None if lacks == "cells" else cells, gates, spans[1:] if lacks == "spans" else spans)
    with pytest.raises(ValueError, match=r"expected a gradient or kept tensor of .* got|span_rows: expected at least"):
        torch.ops.sire_fast.swap_rnn_backward(*given[0], grads, *given[1], *kept, [n != 1 and n != 2 for n in range(7)])


@pytest.mark.parametrize("backend", KERNELS)
def test_no_second_gradient_in_silence(backend: str) -> None:
    arguments = make_for(backend, Case("gru", 3, 2, 3, 1))
    output = functional.swap_rnn("gru", **arguments, backend=backend).output
    (first,) = torch.autograd.grad(output.square().sum(), arguments["x_proj"], create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(first.sum(), arguments["x_proj"])


def test_second_gradient_on_the_reference() -> None:
    arguments = make(Case("gru", 3, 2, 3, 1))
    names = [n for n in oracle.TENSORS if arguments[n] is not None]

    def call(*tensors: Tensor) -> Tensor:
        replaced = arguments | dict(zip(names, tensors, strict=True))
        return functional.swap_rnn("gru", **replaced, backend="reference").penalty

    assert torch.autograd.gradgradcheck(call, [arguments[n] for n in names])


@pytest.mark.parametrize("cell", CELLS)
def test_compiles_whole(cell: str) -> None:
    arguments = make(Case(cell, 4, 3, 5, 2))
    compiled = torch.compile(functional.swap_rnn, fullgraph=True, backend="aot_eager")
    eager, traced = functional.swap_rnn(cell, **arguments), compiled(cell, **arguments)
    torch.testing.assert_close(traced, eager)
    gradient = torch.autograd.grad(traced.penalty.sum(), arguments["w_hh"])
    torch.testing.assert_close(gradient, torch.autograd.grad(eager.penalty.sum(), arguments["w_hh"]))
    arguments["swaps"] = arguments["swaps"] + 100  # a compiled graph checks the positions too
    with pytest.raises(ValueError, match="swaps: expected positions inside"):
        compiled(cell, **arguments)


def _wrong(**changes: Any) -> dict[str, Any]:
    return make(Case("gru", 4, 2, 3, 1)) | changes


INT = torch.int64
WRONG = {
    "x_proj: expected (T, B, G*H)": _wrong(x_proj=torch.zeros(4, 9).double()),
    "x_proj: expected a floating-point": _wrong(x_proj=torch.zeros(4, 2, 9, dtype=INT)),
    "x_proj: expected at least one step": _wrong(x_proj=torch.zeros(0, 2, 9).double()),
    "x_proj: expected at least one step and one sequence": _wrong(x_proj=torch.zeros(4, 0, 9).double()),
    "x_proj: expected a last dimension of 3 * H": _wrong(x_proj=torch.zeros(4, 2, 10).double()),
    "w_hh: expected shape (9, 3), got (3, 9)": _wrong(w_hh=torch.zeros(3, 9).double()),
    "b_hh: expected shape (9,)": _wrong(b_hh=torch.zeros(3).double()),
    "h0: expected shape (2, 3), got (1, 3)": _wrong(h0=torch.zeros(1, 3).double()),
    "h0: expected torch.float64": _wrong(h0=torch.zeros(2, 3)),
    "c0: expected None for gru": _wrong(c0=torch.zeros(2, 3).double()),
    "w_hh: expected on cpu": _wrong(w_hh=torch.zeros(9, 3, device="meta").double()),
    "swaps: expected shape (2, K, 2)": _wrong(swaps=torch.zeros(2, 2, dtype=INT)),
    "swaps: expected torch.int64": _wrong(swaps=torch.zeros(2, 1, 2)),
    "swaps: expected positions inside": _wrong(swaps=torch.tensor([[[0, 4]], [[0, 1]]])),
    "swaps: expected positions inside the sequence, got swap (-1, 1)": _wrong(
        swaps=torch.tensor([[[0, 3]], [[-1, 1]]])
    ),
    "swaps: expected i <= j, got swap (3, 1)": _wrong(swaps=torch.tensor([[[3, 1]], [[0, 1]]])),
    "ends: expected an end at or after": _wrong(
        swaps=torch.tensor([[[1, 3]], [[0, 1]]]), ends=torch.tensor([[2], [3]])
    ),
    "ends: expected an end inside": _wrong(ends=torch.tensor([[4], [3]])),
    "ends: expected shape (2, 1)": _wrong(ends=torch.tensor([3, 3])),
    "lengths: expected 1 <= length <= 4, got 0": _wrong(lengths=torch.tensor([4, 0])),
    "lengths: expected 1 <= length <= 4, got 5": _wrong(lengths=torch.tensor([5, 4])),
    "lengths: expected torch.int64, got torch.float32": _wrong(lengths=torch.tensor([float("nan"), 4])),
    "lengths: expected a tensor, got a list": _wrong(lengths=[4, 4]),
    "swaps: expected a tensor, got a list": _wrong(swaps=[[[0, 1]], [[0, 1]]]),
    "h0: expected a tensor, got a NoneType": _wrong(h0=None),
    "w_ih: expected shape (3 * H, I)": _wrong(w_ih=torch.zeros(()).double()),
    "w_ih: expected shape (3 * H, I), I at least 1": _wrong(
        x_proj=torch.zeros(4, 2, 0).double(), w_ih=torch.zeros(9, 0).double()
    ),
}


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("message", WRONG)
def test_refuses(message: str, backend: str) -> None:
    arguments = WRONG[message]
    if backend in WIDEST and message.startswith(("swaps", "ends", "lengths")):  # what the backend itself looks at
        arguments = cast(arguments, WIDEST[backend])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        functional.swap_rnn("gru", **arguments, backend=backend)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_refuses_unknown_names() -> None:
    arguments = make(Case("gru", 4, 2, 3, 1))
    with pytest.raises(ValueError, match="cell: expected one of rnn_tanh"):
        functional.swap_rnn("elman", **arguments)
    with pytest.raises(ValueError, match="backend: expected auto or one of cpu"):
        functional.swap_rnn("gru", **arguments, backend="gpu")
    with pytest.raises(ValueError, match="c0: expected a tensor for lstm"):
        functional.swap_rnn("lstm", **make(Case("lstm", 4, 2, 3, 1)) | {"c0": None})


def test_a_named_backend_is_used_or_refused() -> None:
    arguments = cast(make(Case("gru", 4, 2, 3, 1)), torch.float16)
    with pytest.raises(NotImplementedError, match=r"computes in .*, got torch\.float16"):
        functional.swap_rnn("gru", **arguments, backend="cpu")
    with backends.use("cpu"):
        with pytest.raises(NotImplementedError):
            functional.swap_rnn("gru", **arguments)
        with backends.use("auto"):
            functional.swap_rnn("gru", **arguments)
        assert backends.forced() == "cpu"
    assert functional.swap_rnn("gru", **arguments).output.dtype == torch.float16


def test_overlapping_uses_leave_nothing_behind() -> None:
    """Of two threads, say, that enter before either leaves."""
    first, second = backends.use("reference"), backends.use("cpu")
    first.__enter__()
    second.__enter__()
    assert backends.forced() == "cpu"
    first.__exit__(None, None, None)
    assert backends.forced() == "cpu"
    second.__exit__(None, None, None)
    assert backends.forced() is None


@pytest.mark.parametrize("backend", KERNELS)
def test_the_callers_denormals_survive(backend: str) -> None:
    """Inside the kernels denormals are flushed; a processor left in that mode would change the caller's results."""
    torch.set_num_threads(1)
    run("gru", make_for(backend, Case("gru", 4, 2, 3, 1)), backend)
    assert (torch.full((64,), 1e-40) * 0.5 != 0).all()


def test_memory_that_was_never_written_is_never_read() -> None:
    """Scratch memory comes uninitialised from malloc; here malloc fills it with a large number first."""
    code = (
        "import oracle, torch\n"
        "for case in oracle.CASES:\n"
        "    oracle.assert_as_good_as_reference(case.cell, oracle.make(case), torch.float32, 'cpu')\n"
    )
    environment = {"MALLOC_PERTURB_": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
