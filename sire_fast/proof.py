"""Whether the kernels are right where they run: values and gradients held against plain PyTorch in float64.

`failures` asks a backend once, in a small case, before "auto" takes it on a GPU. `check` asks those that a model uses,
on inputs that it is given, `check_kernels` all that serve a device, at length. An error is compared with that of plain
PyTorch in the same dtype.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sire_fast
from sire_fast import backends, functional, passes, reference, swaps
from sire_fast.backends import cpu, gpu
from sire_fast.backends.gpu import name_of
from sire_fast.cells import CELLS, States
from sire_fast.inspection import evaluating
from sire_fast.layers import _SwapLayer, has_own_forward
from sire_fast.passes import Network, Pairs

Results = dict[str, Tensor]
# An error may be so many times that of plain PyTorch. Twice is what a kernel is built to (tests, bench.gpu). Of models
# as users have them one in ten goes beyond that by luck, as PyTorch's own error may be next to nothing.
BUILT_TO, TOLERATED = 2, 8
TENSORS = ("x_proj", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0")  # arguments of swap_rnn that have gradients


class Case(NamedTuple):
    """A call of swap_rnn: sizes, and which of the optional arguments it has."""

    T: int
    B: int
    H: int
    swaps: str = "none"
    compare: str = "end"
    I: int = 0  # noqa: E741  # 0 for inputs that are projected already
    ragged: bool = False
    bias: bool = True
    recompute: bool = False
    longest: int | None = None  # span of a variant, if the kernel is told

    def __str__(self) -> str:
        default = Case._field_defaults
        return " ".join(f"{k}={v}" for k, v in self._asdict().items() if k not in default or v != default[k])


class Error(NamedTuple):
    """Of a result, as a share of its largest true value, and how large it may be."""

    found: float
    allowed: float

    @property
    def share(self) -> float:
        """Of what is allowed; infinite where the result is no number."""
        return math.inf if math.isnan(self.found) else self.found / self.allowed

    def __str__(self) -> str:
        return f"error {self.found:.1e}, allowed {self.allowed:.1e}"


# ---------------------------------------------------------------- one call against another


def make(cell: str, case: Case, draw: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of swap_rnn, leaves that require gradients; the same for the same case and draw."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{cell} {case} {draw}".encode()))
    width = CELLS[cell].gates * case.H

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return (drawn * scale).to(device, dtype).requires_grad_()

    lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator, device="cpu") if case.ragged else None
    pairs, sampler = torch.zeros(case.B, 0, 2, dtype=torch.int64, device="cpu"), swaps.parse(case.swaps)
    if sampler is not None:
        pairs = sampler(case.T if lengths is None else lengths, case.B, generator, "cpu")
        pairs[0, :1, 1] = pairs[0, :1, 0]  # one that exchanges nothing
    return {
        "x_proj": normal(case.T, case.B, case.I or width),
        "w_ih": normal(width, case.I, scale=case.I**-0.5) if case.I else None,
        "b_ih": normal(width) if case.I and case.bias else None,
        "w_hh": normal(width, case.H, scale=case.H**-0.5),
        "b_hh": normal(width) if case.bias else None,
        "h0": normal(case.B, case.H),
        "c0": normal(case.B, case.H) if cell == "lstm" else None,
        "swaps": pairs.to(device),
        "ends": pairs[..., 1].contiguous().to(device) if case.compare == "swap" else None,
        "lengths": None if lengths is None else lengths.to(device),
    }


def leaves(arguments: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same arguments with every tensor of numbers changed, as new leaves."""
    return {
        name: change(value.detach()).requires_grad_() if name in TENSORS and value is not None else value
        for name, value in arguments.items()
    }


def run(call: Callable[..., reference.SwapRNN], arguments: Mapping[str, Any]) -> Results:
    """All outputs, and the gradient of every argument through all of them; it never waits for the device."""
    values = {name: value for name, value in call(**arguments)._asdict().items() if value is not None}
    return _with_gradients(values, {n: arguments[n] for n in TENSORS if arguments[n] is not None})


def _with_gradients(values: Results, of: Mapping[str, Tensor]) -> Results:
    """Values, and the gradients of all of them, weighted, in some tensors."""
    weights = (torch.arange(v.numel(), device=v.device).cos().view(v.shape).to(v.dtype) for v in values.values())
    loss = sum((value * weight).sum() for value, weight in zip(values.values(), weights, strict=True))
    gradients = torch.autograd.grad(loss, [*of.values()])  # type: ignore[arg-type]
    values = values | {f"d_{name}": gradient for name, gradient in zip(of, gradients, strict=True)}
    return {name: value.detach() for name, value in values.items()}


def errors(ours: Results, theirs: Results, truth: Results, eps: float, times: int = TOLERATED) -> dict[str, Error]:
    """Of every result, where `theirs` are those of plain PyTorch; allowed are so many times theirs and 4 eps.

    Raises:
        AssertionError: a result is missing, or has another shape or dtype than theirs.
    """
    found = {}
    assert ours.keys() == truth.keys(), f"results: expected {', '.join(truth)}, got {', '.join(ours)}"
    for name, exact in truth.items():
        value, other = ours[name], theirs[name]
        expected, got = (f"{t.dtype} {[*t.shape]}" for t in (other, value))
        assert got == expected, f"{name}: expected {expected}, got {got}"
        if exact.numel():
            largest = exact.abs().max().clamp(min=1e-3)
            error, allowed = (float((v.double() - exact).abs().max() / largest) for v in (value, other))
            found[name] = Error(error, times * allowed + 4 * eps)
    return found


def too_large(found: Mapping[str, Error]) -> list[str]:
    """The errors that are larger than allowed."""
    return [f"{name}: {error}" for name, error in found.items() if error.share > 1]


def kernel_errors(
    backend: str, cell: str, dtype: torch.dtype, device: torch.device | str, case: Case
) -> dict[str, Error]:
    """Of a backend in one case."""
    kernel = functools.partial(
        functional.swap_rnn, cell, backend=backend, recompute=case.recompute, longest=case.longest
    )
    for draw in range(chances(cell, case.H)):
        arguments = make(cell, case, draw, dtype, device)
        truth = run(functools.partial(reference.swap_rnn, cell), leaves(arguments, Tensor.double))
        theirs = run(functools.partial(reference.swap_rnn, cell), arguments)
        found = errors(run(kernel, arguments), theirs, truth, _eps(dtype, device))
        if not too_large(found):
            break
    return found


def chances(cell: str, hidden_size: int) -> int:
    """Draws, of which one must be right, where luck decides: the gradient of a relu jumps where rounding changes a
    sign, and sums of few units may cancel."""
    return 3 if cell == "rnn_relu" or hidden_size <= 8 else 1


def _eps(dtype: torch.dtype, device: torch.device | str) -> float:
    if dtype == torch.float64:  # which is the truth itself
        return 1e-12 / 4
    in_tf32 = dtype == torch.float32 and torch.device(device).type == "cuda" and gpu.allows_tf32()
    return 2**-10 if in_tf32 else torch.finfo(dtype).eps


# ---------------------------------------------------------------- before a kernel is used

# of the H that is asked for: 16 rows in lock step, and variants that follow behind them
_SMALL = Case(18, 5, 0, "uniform:20", ragged=True)

# what was asked in this process -> why not
_known: dict[tuple[Any, ...], list[str]] = {}


@gpu.constant
def failures(backend: str, *, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_size: int) -> list[str]:
    """The reason why a backend that says it serves such calls is not to be trusted with them, none if it computes a
    small one right. That is tried once, remembered in a file, for this card and these versions, and told in a warning
    if it goes wrong."""
    tf32 = dtype == torch.float32 and gpu.allows_tf32()
    key = backend, cell, name_of(dtype), str(device), hidden_size, tf32
    if key not in _known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return []  # nothing else may run now, and a graph's first run has been asked for before
        if torch._C._current_graph_task_id() != -1:
            return []  # in a backward, whose thread the one of the trial would wait for
        file = _remembered(*key)
        found = [] if file.exists() else _tried(backend, cell, dtype, torch.device(device), hidden_size)
        if found is None:
            return []
        where = f"{backend}: {cell} of H={hidden_size} in {name_of(dtype)} on {device}"
        _known[key] = [f"{where} is wrong here: {what}" for what in found[:1]]
        if found:
            told = f"sire_fast: {_known[key][0]}; another backend serves; `sire-fast check` shows what to report"
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        else:
            _remember(file, key)
    return _known[key]


def _tried(backend: str, cell: str, dtype: torch.dtype, device: torch.device, hidden_size: int) -> list[str] | None:
    """What is wrong in the small case, in a thread of its own: no mode or trace of the caller reaches it. None if the
    memory is full, which says nothing of the kernel."""
    wrong: list[str] | None = []

    def attempt() -> None:
        nonlocal wrong
        try:
            with _waiting_allowed(device):
                wrong = too_large(kernel_errors(backend, cell, dtype, device, _SMALL._replace(H=hidden_size)))
        except torch.OutOfMemoryError:
            wrong = None
        except Exception as error:  # whatever a compiler or a driver dies of
            wrong = [first_line(error)]

    thread = threading.Thread(target=attempt, name="sire_fast.proof")
    thread.start()
    thread.join()
    return wrong


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Whatever a program thinks of operations for which the host waits (torch.cuda.set_sync_debug_mode)."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _remembered(backend: str, *call: Any) -> Path:
    """The file that is there if a backend has been right in such a call, on this card and with these versions."""
    build = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in backends.KERNELS[backend].files()]
    told = json.dumps([backend, build, *call, environment(call[2])])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sire_fast" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def _remember(file: Path, key: Sequence[Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(key) + "\n")
        os.replace(temporary, file)
    except OSError:  # it is tried again then, in the next process
        pass


# ---------------------------------------------------------------- at length


class Row(NamedTuple):
    """What was checked, who has computed it, the error of every result, and what is wrong; or why it was not."""

    what: str
    by: str
    errors: Mapping[str, Error] = {}
    wrong: Sequence[str] = ()
    refused: Sequence[str] = ()

    @property
    def worst(self) -> str:
        """The result that comes closest to its bound, or is beyond it."""
        name = max(self.errors, key=lambda name: self.errors[name].share, default=None)
        return "" if name is None else f"{name}: {self.errors[name]}"

    @property
    def verdict(self) -> str:
        return "WRONG" if self.wrong else "right" if self.errors else ""


class Report(NamedTuple):
    """What a check has found; as text, a table for a bug report.

    Attributes:
        rows: what was checked.
        environment: device and versions.
    """

    rows: list[Row]
    environment: dict[str, str]

    @property
    def right(self) -> bool:
        """Whether something was checked and nothing is wrong."""
        return any(row.errors for row in self.rows) and not any(row.wrong for row in self.rows)

    def __str__(self) -> str:
        lines = [("checked", "computed by", "largest error", "")]
        lines += [(row.what, row.by, row.worst, row.verdict) for row in self.rows if row.verdict]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        told = [", ".join(f"{name} {value}" for name, value in self.environment.items())]
        told += ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        told += [f"WRONG: {row.what}, {row.by}: {wrong}" for row in self.rows for wrong in row.wrong]
        told += dict.fromkeys(f"not served: {reason}" for row in self.rows for reason in row.refused)
        return "\n".join(told)


def environment(device: torch.device | str) -> dict[str, str]:
    """What a result depends on: versions, device, instruction set."""
    found = {"sire_fast": sire_fast.__version__, "torch": torch.__version__}
    if torch.device(device).type != "cuda":
        return found | {"on": platform.machine(), "instruction set": cpu.instruction_set()}
    if find_spec("triton"):
        found["triton"] = triton_version() or "of unknown version"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} of capability {major}.{minor}"
    return found | {"CUDA": str(torch.version.cuda), "driver": _driver_version(), "on": name}


def _driver_version() -> str:
    """Of CUDA, as far as the driver knows it: 13000 is 13.0. torch does not tell it."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "of unknown version"
    return str(version.value)


def triton_version() -> str | None:
    """Of the installed distribution that has the module triton, which some builds of torch call pytorch-triton."""
    names = ("triton", "pytorch-triton")
    return next((each.version for name in names for each in importlib.metadata.distributions(name=name)), None)


def check_kernel(
    backend: str, cell: str, dtype: torch.dtype, device: torch.device | str, hidden_sizes: Sequence[int]
) -> Row:
    """A backend in a few cases of every size; not checked if it serves none."""
    worst: dict[str, Error] = {}
    wrong, refused = [], []
    for hidden in hidden_sizes:
        reasons = backends.why_not(backend, cell=cell, dtype=dtype, device=device, hidden_size=hidden)
        refused += [reason for reason in reasons if reason not in refused]
        if reasons:
            continue
        for case in (
            Case(20, 16, hidden, "uniform:8"),
            Case(7, 5, hidden, "uniform:20", I=5, ragged=True),
            Case(9, 3, hidden, "adjacent:4", "swap", I=16, ragged=True, bias=False, recompute=True, longest=2),
        ):
            try:
                found = kernel_errors(backend, cell, dtype, device, case)
            except Exception as error:  # whatever a compiler or a driver dies of
                wrong.append(f"{case}: {first_line(error)}")
                continue
            wrong += [f"{case}: {what}" for what in too_large(found)]
            worst |= {
                name: max(error, worst.get(name, error), key=lambda each: each.share) for name, error in found.items()
            }
    return Row(f"{cell} {name_of(dtype)}", backend, worst, wrong, refused)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Hold every sire_fast layer of a model against plain PyTorch in float64: outputs, last states, penalty, and the
    gradients in inputs, states and weights, with the swaps that the layer would draw in training.

    Args:
        model: a module that holds sire_fast layers, or is one. It runs once, in evaluation mode and without gradients;
            nothing of it is changed.
        *args: what it is called with. A few sequences are enough: all steps of all variants are computed in float64
            and kept.
        **kwargs: the same, by name.

    Returns:
        A Report; print it for a table, its `right` says whether all is right.

    Raises:
        ValueError: there is no sire_fast layer in the model.

    Example:
        >>> import sire_fast
        >>> model = sire_fast.convert(nn.GRU(3, 5))
        >>> sire_fast.check(model, torch.randn(7, 4, 3)).right
        True
    """
    layers = {name or "the layer": m for name, m in model.named_modules() if isinstance(m, _SwapLayer)}
    if not layers:
        raise ValueError("model: expected a sire_fast layer in it, found none; sire_fast.convert makes torch's such")
    given: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(layer: nn.Module, args: Any, kwargs: Any) -> None:
        given.setdefault(layer, (args, kwargs))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers.values()]
    failed = None
    try:
        with torch.no_grad(), evaluating(model):
            model(*args, **kwargs)
    except Exception as error:  # of a kernel, perhaps, which is found out below
        failed = error
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name, layer in layers.items():
        if has_own_forward(layer):
            rows.append(Row(name, "", refused=[f"{name}: {type(layer).__name__} has a forward of its own"]))
        elif layer in given:
            args, kwargs = given[layer]
            rows.append(_checked(name, layer, *args, **kwargs))
        else:
            rows.append(Row(name, "", refused=[f"{name}: the model does not call it"]))
    if failed and not any(row.wrong for row in rows):
        raise failed
    return Report(rows, environment(next(iter(layers.values())).weight_hh_l0.device))


def _checked(name: str, layer: _SwapLayer, input: Any, hx: Any = None, lengths: Tensor | None = None) -> Row:
    network = layer._network._replace(dropout=0.0, training=True)
    x, lengths, states, _ = layer._unify(input, hx, lengths)
    generator = torch.Generator(x.device).manual_seed(0)
    pairs = None if layer.swaps is None else layer._draw(x, lengths, generator)
    call = network.call()
    backend = passes.backend(network)
    by = "torch's layer" if backend == "torch" else backend
    what = f"{name}: {network.cell} {name_of(call['dtype'])} {'x'.join(map(str, x.shape))} H={call['hidden_size']}"
    compute = functools.partial(_results, lengths=lengths, pairs=pairs, names=layer._all_weights)
    for draw in range(chances(network.cell, call["hidden_size"])):
        if draw:
            x = x * torch.rand(x.shape, generator=generator, device=x.device).add(0.5).to(x.dtype)
        try:
            ours = compute(network, x, states)
            with backends.use("reference"):
                theirs = compute(network, x, states)
                truth = compute(network, x, states, torch.float64)
            found = errors(ours, theirs, truth, _eps(call["dtype"], x.device))
        except Exception as error:  # whatever a compiler or a driver dies of
            return Row(what, by, wrong=[first_line(error)])
        if not too_large(found):
            break
    return Row(what, by, found, too_large(found))


def _results(
    network: Network,
    x: Tensor,
    states: States,
    dtype: torch.dtype | None = None,
    *,
    lengths: Tensor | None,
    pairs: Pairs | None,
    names: Sequence[Sequence[str]],
) -> Results:
    """What a layer gives, and the gradients, in a dtype of choice."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()

    with torch.enable_grad():
        x, states = leaf(x), tuple(map(leaf, states))
        layers = tuple(tuple(tuple(map(leaf, each)) for each in directions) for directions in network.weights)
        flat = [weight for directions in layers for each in directions for weight in each]
        network = network._replace(weights=layers)
        if pairs is None:
            output, last = passes.plain(network, x, lengths, states, passes.runs_on_kernels(network))
            values = {"output": output}
        else:
            output, last, compared = passes.with_swaps(network, x, lengths, states, pairs)
            values = {"output": output, "penalty": compared.penalty, "variants": compared.variants}
        values |= dict(zip(("h_n", "c_n"), last, strict=False))
        of = {"x": x} | dict(zip(("h_0", "c_0"), states, strict=False))
        of |= dict(zip(itertools.chain.from_iterable(names), flat, strict=True))
        return _with_gradients(values, of)
