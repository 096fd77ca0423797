"""Proof by use: a kernel of a GPU is taken where it has been right before, on that card; and what `check` finds."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence

import sire_fast
from sire_fast import backends, checking, proof, swaps
from sire_fast.backends import cpu, gpu
from sire_fast.lab.cli import run

TRIAL = len(proof._TRIED)  # forwards of a kernel before it is taken
CALL: dict[str, Any] = {"cell": "gru", "dtype": torch.float32, "device": torch.device("cpu"), "hidden_size": 6}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "_known", {})
    return tmp_path / "cache" / "sire_fast"


class StandIn(SimpleNamespace):
    """A backend of a GPU that computes as the CPU's does, and counts its calls."""

    def __init__(self, file: Path) -> None:
        alike = ("why_not", "computed_in", "span_rows", "kept", "empty")
        super().__init__(**{name: getattr(cpu, name) for name in alike})
        file.write_text("")
        self.files, self.calls, self.accident = lambda: [file], 0, lambda outputs: None
        self.accident_behind: Callable[[Any], None] = lambda gradients: None

    def forward(self, *arguments: Any) -> None:
        self.calls += 1
        cpu.forward(*arguments)
        self.accident(arguments[-1])

    def backward(self, *arguments: Any) -> None:
        cpu.backward(*arguments)
        self.accident_behind(arguments[-1])


@pytest.fixture
def kernel(cache: Path, tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "kernel.so")
    before = dict(backends.KERNELS)
    backends.KERNELS.clear()
    backends.KERNELS["triton"] = stand_in
    yield stand_in
    backends.KERNELS.clear()
    backends.KERNELS.update(before)  # in their order


def layer() -> sire_fast.GRU:
    torch.manual_seed(0)
    return sire_fast.GRU(3, 6, swaps=swaps.Uniform(2))


def penalty_of(model: nn.Module) -> Tensor:
    model(torch.randn(5, 4, 3))
    return sire_fast.penalty(model)


def test_a_kernel_that_is_right_is_taken_and_remembered(kernel, cache, monkeypatch):
    assert backends.choose("auto", **CALL) == "triton"
    assert kernel.calls == TRIAL
    assert layer().backend == "triton"
    assert backends.why_no_kernel(**CALL) == []
    assert kernel.calls == TRIAL
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())[:3] == ["triton", "gru", "float32"]
    monkeypatch.setattr(proof, "_known", {})  # another process
    assert backends.choose("auto", **CALL) == "triton"
    assert kernel.calls == TRIAL


@pytest.mark.parametrize(
    "other", [{"cell": "lstm"}, {"dtype": torch.float64}, {"hidden_size": 7}, {"build": 1}, {"version": 1}], ids=str
)
def test_another_call_build_or_version_is_asked_again(kernel, other, monkeypatch):
    backends.choose("auto", **CALL)
    monkeypatch.setattr(proof, "_known", {})
    if "build" in other:
        kernel.files()[0].write_text("another")
    elif "version" in other:
        found = proof.environment("cpu")
        monkeypatch.setattr(proof, "environment", lambda _: found | {"torch": "another"})
    else:
        CALL_OF_OTHER = CALL | other
        assert backends.choose("auto", **CALL_OF_OTHER) == "triton"
        assert kernel.calls == 2 * TRIAL
        return
    backends.choose("auto", **CALL)
    assert kernel.calls == 2 * TRIAL


def test_versions_are_told_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkout on the path there is none, and some builds of torch bring the module triton as pytorch-triton."""
    versions = {"pytorch-triton": "3.5"}

    def distributions(name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(version=versions[name])] if name in versions else []

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    found = proof.environment("cuda")
    assert (found["sire_fast"], found["triton"]) == (sire_fast.__version__, "3.5")
    versions.clear()
    assert proof.environment("cuda")["triton"] == "of unknown version"


@pytest.mark.parametrize("there", [False, True])
def test_the_driver_tells_its_version(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no word for it, neither in builds with CUDA nor in others."""

    def library(name: str) -> SimpleNamespace:
        if not there:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cuDriverGetVersion=lambda to: setattr(to._obj, "value", 13000))

    monkeypatch.setattr(proof.ctypes, "CDLL", library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    assert proof.environment("cuda")["driver"] == ("13000" if there else "of unknown version")


def spoil(n: int, by: Callable[[Tensor], object]) -> Callable[[Any], None]:
    """Changes tensor n of those that a kernel fills, where it is wanted."""

    def accident(tensors: Any) -> None:
        if tensors[n] is not None:
            by(tensors[n])

    return accident


def fail(_: Any) -> None:
    raise RuntimeError("no kernel image\nis available")


OUTPUTS = {"output": 0, "h_n": 1, "variants": 3, "penalty": 4}
ACCIDENTS = {
    **{f"{name} is scaled": ("accident", spoil(n, lambda t: t.mul_(1.001))) for name, n in OUTPUTS.items()},
    **{f"gradient {n} is scaled": ("accident_behind", spoil(n, lambda t: t.mul_(1.001))) for n in (0, 3, 4, 5)},
    "a row is not written": ("accident", spoil(0, lambda t: t[2].fill_(float("nan")))),
    "a gradient is not written": ("accident_behind", spoil(3, lambda t: t[1].fill_(float("nan")))),
    "it raises": ("accident", fail),
    "its gradient raises": ("accident_behind", fail),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_one_that_is_wrong_is_told_once_and_replaced(kernel, cache, accident):
    name, spoiled = ACCIDENTS[accident]
    setattr(kernel, name, spoiled)
    model = layer()
    with pytest.warns(RuntimeWarning, match=r"triton: gru of H=6 in float32 on cpu is wrong here: .*sire-fast check"):
        found = penalty_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", **CALL) == "reference"
        torch.manual_seed(0)
        assert "is wrong here" in backends.why_no_kernel(**CALL)[0]
        assert model.backend == "torch"
    assert found.isfinite()
    assert not cache.exists()  # it is tried again after whatever has been mended
    assert backends.choose("triton", **CALL) == "triton"  # who names it gets it


@pytest.mark.parametrize("where", ["through the output and the penalty", "without gradients"])
def test_what_only_some_passes_meet_is_found(kernel, where):
    """For each set of the results that a loss reads Triton compiles a kernel of its own."""
    right_forward, right_backward = kernel.forward, kernel.backward

    def forward(cell, arithmetic, train, *arguments):
        right_forward(cell, arithmetic, train, *arguments)
        if not train and where == "without gradients":
            arguments[-1][0].mul_(1.001)

    def backward(cell, arithmetic, recompute, inputs, gradients):
        right_backward(cell, arithmetic, recompute, inputs, gradients)
        given = [gradient is not None for gradient in inputs[:5]]  # of output, h_n, c_n, variants, penalty
        if given == [True, False, False, False, True] and where == "through the output and the penalty":
            gradients[0].mul_(1.001)

    kernel.forward, kernel.backward = forward, backward
    with pytest.warns(RuntimeWarning, match="is wrong here"):
        assert backends.choose("auto", **CALL) == "reference"


def test_an_error_is_told_by_what_is_behind_it():
    """Triton's compiler tells a position for each function that is inlined, and the reason last."""
    behind = RuntimeError("at 4:32:\ndef inner(d):\n    len(d)\n    ^\nAttributeError('no type')")
    error = RuntimeError("at 49:21:\n  soon = inner(d)")
    error.__cause__ = behind
    assert proof.first_line(error) == "RuntimeError: at 4:32: AttributeError('no type')"
    assert proof.first_line(RuntimeError("CUDA error: no\nFor debugging, pass X")) == "RuntimeError: CUDA error: no"
    assert proof.first_line(AssertionError()) == "AssertionError: "


def test_a_full_memory_is_no_fault_of_the_kernel(kernel, cache):
    def full(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel.accident = full
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", **CALL) == "triton"
    assert not cache.exists()
    kernel.accident = fail
    with pytest.warns(RuntimeWarning, match="is wrong here"):
        assert backends.choose("auto", **CALL) == "reference"


def test_nothing_is_tried_in_a_backward(kernel):
    """On a GPU its thread would wait for a gradient that only it can compute."""
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: backends.choose("auto", **CALL) and None)
    x.backward()
    assert kernel.calls == 0
    assert backends.choose("auto", **CALL) == "triton"
    assert kernel.calls == TRIAL


@pytest.mark.parametrize("groups", [8, 16, 58, 108, 132])
def test_what_is_tried_fills_a_tile_and_more(groups):
    """As large settings do: more than 8 rows and 16 steps, and variants for which there is no room."""
    case = proof._SMALL
    plan = gpu.plan(case.T, case.B, swaps.parse(case.swaps).k, case.T, 16, groups)
    assert plan == gpu.Plan(1, 15)
    assert case.T > 16
    assert swaps.parse(case.swaps).k > 15


def test_the_next_one_is_taken_where_the_first_is_wrong(kernel, tmp_path):
    kernel.accident = fail
    backends.KERNELS["cuda"] = StandIn(tmp_path / "other.so")
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        assert backends.choose("auto", **CALL) == "cuda"


def test_where_nothing_can_be_remembered_it_is_tried_in_every_process(kernel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for calls in (1, 2):
        monkeypatch.setattr(proof, "_known", {})
        assert backends.choose("auto", **CALL) == "triton"
        assert kernel.calls == calls * TRIAL


@pytest.mark.parametrize("around", ["inference_mode", "no_grad", "autocast", "fake"])
def test_no_mode_of_the_caller_reaches_it(kernel, around):
    modes = {"autocast": lambda: torch.autocast("cpu"), "fake": FakeTensorMode}
    with (modes.get(around) or getattr(torch, around))():
        assert backends.choose("auto", **CALL) == "triton"
    assert kernel.calls == TRIAL


def test_who_forces_a_backend_does_not_wait_for_others(kernel):
    with backends.use("reference"):
        assert layer().backend == "reference"
    assert kernel.calls == 0


def test_random_numbers_stay_as_they_are(kernel):
    before = torch.get_rng_state()
    backends.choose("auto", **CALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_tried_while_a_function_is_traced(kernel):
    model = layer()
    x = torch.randn(5, 4, 3)
    torch.manual_seed(1)
    compiled = torch.compile(lambda x: model(x)[0], backend="eager", fullgraph=True)
    output = compiled(x)
    assert kernel.calls == TRIAL + 1  # in the trial, and for x
    with backends.use("reference"):
        torch.testing.assert_close(output, model(x)[0])


def test_a_kernel_of_the_cpu_needs_no_proof(cache):
    assert backends.choose("auto", **CALL) == "cpu"
    assert not cache.exists()


# ---------------------------------------------------------------- check


class Model(nn.Module):
    """Layers that are called in ways of their own, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(3, 5, batch_first=True)
        self.second = nn.LSTM(5, 4, num_layers=2, dropout=0.5)
        self.third = nn.RNN(4, 9, nonlinearity="relu", bidirectional=True)
        self.fourth = nn.LSTM(18, 6, proj_size=2)
        self.unused = nn.GRU(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.first(x)
        h, _ = self.second(h.transpose(0, 1), (torch.ones(2, 4, 4), torch.zeros(2, 4, 4)))
        h, _ = self.third(h, lengths=torch.tensor([7, 1, 3, 2]))
        packed, _ = self.fourth(pack_sequence([h[:, 0], h[:2, 1]]))
        return packed.data


class Scaled(sire_fast.GRU):
    def forward(self, x: Tensor, scale: float) -> Any:  # type: ignore[override]
        return super().forward(x * scale)


def test_a_layer_with_a_forward_of_its_own_is_refused():
    report = sire_fast.check(Scaled(3, 4), torch.randn(5, 2, 3), 2.0)
    assert "Scaled has a forward of its own" in str(report)
    layer = sire_fast.GRU(3, 4)
    plain = layer.forward
    layer.forward = lambda x, scale: plain(x * scale)
    assert "GRU has a forward of its own" in str(sire_fast.check(layer, torch.randn(5, 2, 3), 2.0))


@pytest.mark.parametrize(("checked", "trained"), [(7, 3), (1, 1)])
def test_what_a_check_has_seen_is_still_told_in_training(checked, trained):
    layer = sire_fast.GRU(3, 4, swaps=swaps.Pairs(1, [(5, 6)]))
    assert sire_fast.check(layer, torch.randn(checked, 2, 3)).right
    with pytest.warns(UserWarning, match="nothing to swap"):
        layer(torch.randn(trained, 2, 3))


def test_all_steps_of_stacked_variants_run_on_the_kernels_too():
    layer = sire_fast.GRU(3, 4, num_layers=2, bidirectional=True, swaps=swaps.Uniform(2))
    assert layer.backend == "cpu"
    assert [row.by for row in sire_fast.check(layer, torch.randn(5, 2, 3)).rows] == ["cpu"]


@pytest.mark.parametrize("compare", ["end", "swap"])
@pytest.mark.parametrize("sampler", [swaps.Uniform(3), swaps.Adjacent("all"), None], ids=str)
def test_the_layers_of_a_model(sampler, compare):
    torch.manual_seed(0)
    model = sire_fast.convert(Model(), swaps=sampler, compare=compare)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = sire_fast.check(model, torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0)))
    assert report.right, str(report)
    assert [row.by for row in report.rows] == ["cpu", "cpu", "cpu", "torch's layer", ""]
    assert {"output", "h_n", "d_x", "d_h_0", "d_weight_ih_l0"} <= report.rows[0].errors.keys()
    assert ("penalty" in report.rows[0].errors) == (sampler is not None)
    assert {"c_n", "d_weight_hh_l1"} <= report.rows[1].errors.keys()
    assert "not served: unused: the model does not call it" in str(report)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_autocast_and_other_dtypes():
    model, x = sire_fast.convert(nn.GRU(3, 20)), torch.randn(6, 4, 3)
    with torch.autocast("cpu"):
        report = sire_fast.check(model, x)
    assert report.right
    assert "gru bfloat16" in str(report)
    assert max(error.found for error in report.rows[0].errors.values()) > 1e-3
    report = sire_fast.check(model.double(), x.double())
    assert report.right
    assert max(error.found for error in report.rows[0].errors.values()) < 1e-13


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_what_is_wrong_is_found(n, monkeypatch):
    right = cpu.forward

    def forward(*arguments: Any) -> None:
        right(*arguments)
        arguments[-1][n].mul_(1.001)

    monkeypatch.setattr(cpu, "forward", forward)
    report = sire_fast.check(sire_fast.convert(nn.GRU(3, 20)), torch.randn(6, 4, 3))
    assert not report.right
    assert "WRONG: the layer: gru float32 6x4x3 H=20, cpu: " in str(report)
    row = checking.check_kernel("cpu", "gru", torch.float32, "cpu", [20])
    assert len(row.wrong) >= 3
    assert run(["check", "--H", "20", "--cell", "gru", "--dtype", "float32"]) == 1


def test_what_raises_is_wrong(monkeypatch):
    monkeypatch.setattr(cpu, "forward", lambda *_: 1 / 0)
    report = sire_fast.check(sire_fast.convert(nn.GRU(3, 20)), torch.randn(6, 4, 3))
    assert "WRONG: the layer: gru float32 6x4x3 H=20, cpu: ZeroDivisionError: division by zero" in str(report)
    row = checking.check_kernel("cpu", "gru", torch.float32, "cpu", [20])
    assert len(row.wrong) == 3


def test_a_model_without_our_layers_is_refused():
    with pytest.raises(ValueError, match=r"model: expected a sire_fast layer in it, found none; sire_fast\.convert"):
        sire_fast.check(nn.GRU(3, 4), torch.randn(5, 4, 3))


def test_the_command(capsys):
    assert run(["check", "--H", "7", "--cell", "gru", "--cell", "rnn_relu"]) == 0
    told = capsys.readouterr().out
    assert f"torch {torch.__version__}" in told
    assert "rnn_relu bfloat16" in told
    assert "not served: triton: runs on a GPU, got a tensor on cpu" in told
    for wrong, error in (
        (["--cell", "gruu"], "cell: expected one of rnn_tanh, rnn_relu, gru, lstm, got 'gruu'"),
        (["--H", "0"], "H: expected at least 1 and at most 4096, got 0"),
        (["--H", "99999999999999999999"], "H: expected at least 1 and at most 4096"),
        (["--dtype", "int"], "dtype: expected one of"),
        (["--device", "nowhere"], "device: 'nowhere' cannot be used"),
    ):
        assert run(["check", *wrong]) == 2
        assert error in capsys.readouterr().err
