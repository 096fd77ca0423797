"""Whether the kernels are right where they run: values and gradients held against plain PyTorch in float64.

`failures` asks a backend once, in a small case, before "auto" takes it on a GPU; sire_fast.checking does it at length.
An error is compared with that of plain PyTorch in the same dtype.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sire_fast
from sire_fast import backends, functional, graph, reference, swaps
from sire_fast.backends import cpu, gpu
from sire_fast.backends.gpu import name_of
from sire_fast.cells import CELLS

Results = dict[str, Tensor]
# An error may be so many times that of plain PyTorch. Twice is what a kernel is built to (tests, bench.gpu). Of models
# as users have them one in ten goes beyond that by luck, as PyTorch's own error may be next to nothing.
BUILT_TO, TOLERATED = 2, 8
TENSORS = ("x_proj", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0")  # arguments of swap_rnn that have gradients


class Case(NamedTuple):
    """A call of swap_rnn: sizes, which of the optional arguments it has, and what a loss reads of its results."""

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
    # results through which a gradient comes: a kernel is compiled for each set of them; () for all, None for a pass
    # without gradients
    through: tuple[str, ...] | None = ()

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


def run(
    call: Callable[..., reference.SwapRNN], arguments: Mapping[str, Any], through: tuple[str, ...] | None = ()
) -> Results:
    """All outputs, and the gradient of every argument, see Case; it never waits for the device."""
    with torch.set_grad_enabled(through is not None):
        values = {name: value for name, value in call(**arguments)._asdict().items() if value is not None}
    if through is None:
        return values
    return with_gradients(values, {n: arguments[n] for n in TENSORS if arguments[n] is not None}, through)


def with_gradients(values: Results, of: Mapping[str, Tensor], through: Sequence[str] = ()) -> Results:
    """Values, and the gradients of all of them, or of some, weighted, in some tensors."""
    read = [values[name] for name in through or values]
    weights = (torch.arange(v.numel(), device=v.device).cos().view(v.shape).to(v.dtype) for v in read)
    loss = sum((value * weight).sum() for value, weight in zip(read, weights, strict=True))
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
        plain = functools.partial(reference.swap_rnn, cell)
        truth = run(plain, leaves(arguments, Tensor.double), case.through)
        ours, theirs = (run(call, arguments, case.through) for call in (kernel, plain))
        found = errors(ours, theirs, truth, eps_of(dtype, device))
        if not too_large(found):
            break
    return found


def chances(cell: str, hidden_size: int) -> int:
    """Draws, of which one must be right, where luck decides: the gradient of a relu jumps where rounding changes a
    sign, and sums of few units may cancel."""
    return 3 if cell == "rnn_relu" or hidden_size <= 8 else 1


def eps_of(dtype: torch.dtype, device: torch.device | str) -> float:
    if dtype == torch.float64:  # which is the truth itself
        return 1e-12 / 4
    in_tf32 = dtype == torch.float32 and torch.device(device).type == "cuda" and gpu.allows_tf32()
    return 2**-10 if in_tf32 else torch.finfo(dtype).eps


# ---------------------------------------------------------------- before a kernel is used

# of the H that is asked for: 16 rows in lock step, and variants that follow behind them
_SMALL = Case(18, 5, 0, "uniform:20", ragged=True)
TRAINING = ("output", "penalty")  # what nearly every loss reads
_TRIED = [_SMALL._replace(through=through) for through in ((), TRAINING, None)]

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
        if graph.in_backward():
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
                found = [kernel_errors(backend, cell, dtype, device, case._replace(H=hidden_size)) for case in _TRIED]
            wrong = [told for each in found for told in too_large(each)]
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


def first_line(error: BaseException) -> str:
    """An error in one line. That of Triton's compiler is behind others, and has the reason in its last line."""
    while error.__cause__:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    told = f"{lines[0]} {lines[-1]}" if re.fullmatch(r"at \d+:\d+:", lines[0]) else lines[0]
    return f"{type(error).__name__}: {told[:200]}"


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
