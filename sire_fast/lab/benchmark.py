"""One training step of a recurrent layer with SIRE, as several people would write it, timed side by side.

A contestant is a way to compute a layer's output and its swap penalty. All get the same weights, input and gradient of
the output, and all draw their swaps within the step. `measure` runs their steps in turns, so that what disturbs the
machine disturbs all of them, and `ratio` compares them round by round.

    >>> setting = Setting(cell="GRU", T=5, B=2, I=3, H=4, swaps="adjacent:2", compare="swap")
    >>> seconds = measure({name: Step(setting, name) for name in contestants(setting)}, rounds=2)
    >>> ratio(seconds, "sire_fast", "plain").median > 0
    True
"""

from __future__ import annotations

import functools
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import sire_fast
from sire_fast import swaps
from sire_fast.backends import cpu, gpu
from sire_fast.cells import CELLS, Cell, States
from sire_fast.lab.workers import pool
from sire_fast.layers import COMPARES
from sire_fast.reference import with_variants
from sire_fast.swaps import Sampler

LAYERS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
DTYPES = ("float32", "float64", "bfloat16", "float16")
WARM_UP = 1  # rounds that are not counted

_CellStep = Callable[[Tensor, Tensor, States], States]
_KEYS = {"RNN": "rnn_tanh", "GRU": "gru", "LSTM": "lstm"}  # of CELLS
_EQUATIONS = {LAYERS[name]: CELLS[key] for name, key in _KEYS.items()}
_CELL_STEPS = {nn.RNN: torch.rnn_tanh_cell, nn.GRU: torch.gru_cell}
_CELL_MODULES = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        cell: "RNN" (tanh), "GRU" or "LSTM", torch.nn's layer of this name.
        T: steps of a sequence, at least 2.
        B: sequences.
        I: features of the input.
        H: units.
        swaps: which positions are exchanged, as sire_fast.swaps.parse reads it.
        compare: "swap" or "end", see sire_fast.RNN.
        dtype: one of DTYPES.
        device: "cpu" or a CUDA device, as torch names it.

    Raises:
        ValueError: a setting has no such value, or the device cannot be used.
    """

    cell: str = "GRU"
    T: int = 100
    B: int = 64
    I: int = 128  # noqa: E741
    H: int = 128
    swaps: str = "adjacent:8"
    compare: str = "swap"
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in (("cell", LAYERS), ("compare", COMPARES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        for name, least in (("T", 2), ("B", 1), ("H", 1), ("I", 1)):
            check_size(name, getattr(self, name), least)
        if swaps.parse(self.swaps) is None:
            raise ValueError(f"swaps: expected a sampler, got {self.swaps!r}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        check_device(self.device)

    @property
    def key(self) -> str:
        """Of the cell in CELLS."""
        return _KEYS[self.cell]

    def spans(self, pairs: Tensor) -> Tensor:
        """Steps of each variant, (n,), of pairs (B, K, 2), from its first position to where it is compared. One that
        exchanges nothing is not run."""
        i, j = pairs.unbind(-1)
        return ((j if self.compare == "swap" else self.T - 1) - i + 1)[i < j]

    def operations(self, pairs: Tensor | None = None) -> int:
        """Floating-point operations of the layer's forward; as many again for each of two gradients, of an input that
        needs one and of the weights.

        A variant shares its original's prefix, and the product of its first step: it adds a row for each step behind
        that one.

        Args:
            pairs: (B, K, 2), None without swaps.
        """
        rows = products = self.T * self.B
        if pairs is not None:
            products += int((self.spans(pairs) - 1).sum())
        return 2 * CELLS[self.key].gates * self.H * (rows * self.I + products * self.H)

    def __str__(self) -> str:
        swaps = f"{self.swaps} compared at the {self.compare}"
        return f"{self.cell}, T={self.T} B={self.B} I={self.I} H={self.H}, {swaps}, {self.dtype}"


def check_size(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError unless a number can be a size."""
    if not least <= value < 1 << 31:
        raise ValueError(f"{name}: expected at least {least} and below 2**31, got {value}")


def check_device(device: str) -> None:
    """Raise a ValueError unless torch can compute there."""
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device: {device!r} cannot be used: {reason}") from None


def check_swaps(sampler: Any, steps: int) -> None:
    """Raise a ValueError where sequences of so many steps have nothing to swap; warn of more draws than pairs."""
    pairs = sampler.count(steps)
    if not pairs:
        raise ValueError(f"swaps: {sampler}: there is nothing to swap in sequences of {steps} steps")
    if sampler.k != "all" and sampler.k > pairs:
        warnings.warn(f"{sampler} repeats swaps: sequences of {steps} steps have {pairs} pairs", stacklevel=2)


class Contestant(NamedTuple):
    """A way to write the training step.

    Attributes:
        label: what it is, for people.
        forward: (module, x (T, B, I), sampler, compare) -> output (T, B, H) and the penalty, None without one.
        prepare: (torch's layer, sampler, compare) -> the module with the layer's weights that `forward` takes.
        compares, serves: which settings it can run.
        starts_slowly: it compiles, for up to a minute, in its first step.
    """

    label: str
    forward: Callable[[nn.Module, Tensor, Sampler, str], tuple[Tensor, Tensor | None]]
    prepare: Callable[[nn.RNNBase, Sampler, str], nn.Module] = lambda layer, sampler, compare: layer
    compares: tuple[str, ...] = COMPARES
    serves: Callable[[Setting], bool] = lambda setting: True
    starts_slowly: bool = False


class Step:
    """The training step of a contestant: call it to run it and to get the penalty, None for one without.

    Args:
        setting: what is measured; equal settings have equal weights and inputs.
        name: a key of CONTESTANTS.
        sampler: draws the swaps in place of the setting's own.
    """

    def __init__(self, setting: Setting, name: str, sampler: Sampler | None = None) -> None:
        contestant = CONTESTANTS[name]
        drawn = sampler or swaps.parse(setting.swaps)
        assert drawn is not None  # which the setting refuses
        self.sampler = drawn
        self.compare, self.forward = setting.compare, contestant.forward
        to = {"dtype": getattr(torch, setting.dtype), "device": setting.device}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = LAYERS[setting.cell](setting.I, setting.H).to(**to)
            self.x = torch.randn(setting.T, setting.B, setting.I).to(**to).requires_grad_()
            self.weight = torch.randn(setting.T, setting.B, setting.H).to(**to)  # the loss's gradient of the output
        self.module = contestant.prepare(layer, self.sampler, self.compare)

    def __call__(self) -> Tensor | None:
        self.module.zero_grad()
        self.x.grad = None
        output, penalty = self.forward(self.module, self.x, self.sampler, self.compare)
        if penalty is None:
            torch.autograd.backward(output, self.weight)
        else:
            torch.autograd.backward((output, penalty), (self.weight, None))
        return penalty

    def gradients(self) -> list[Tensor | None]:
        """Of x and of the weights, in torch's order."""
        return [self.x.grad, *(parameter.grad for parameter in self.module.parameters())]


def _plain(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, None]:
    return layer(x)[0], None


def _sire_fast(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    output, _ = layer(x)
    return output, sire_fast.penalty(layer)


def _stacked(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    """The original and its variants as one batch of whole sequences."""
    pairs = sampler(*x.shape[:2], None, x.device)
    return _compared(layer(with_variants(x, pairs).flatten(1, 2))[0], pairs, compare)


def _compared(y: Tensor, pairs: Tensor, compare: str) -> tuple[Tensor, Tensor]:
    """Of the outputs of originals and variants (T, B * (1 + K), H) the originals' and the penalty."""
    y = y.unflatten(1, (len(pairs), -1))  # (T, B, 1 + K, H)
    if compare == "end":
        original, variants = y[-1, :, :1], y[-1, :, 1:]
    else:
        row, column = torch.arange(len(pairs), device=y.device)[:, None], torch.arange(1, y.shape[2], device=y.device)
        ends = pairs[..., 1]
        original, variants = y[ends, row, 0], y[ends, row, column]
    return y[:, :, 0], (variants - original).square().sum(-1).mean()


class _Variants(NamedTuple):
    """Variants of all sequences, (N,) each: what is exchanged, the last step, and the sequence."""

    i: Tensor
    j: Tensor
    end: Tensor
    sequence: Tensor

    def reads(self, step: Tensor) -> Tensor:
        """The position of the sequence that a variant has at a step."""
        return torch.where(step == self.i, self.j, torch.where(step == self.j, self.i, step))


class _Compiled(nn.Module):
    """The stacked variants behind torch.compile: one graph whose steps are one region, compiled once.

    The fastest of what was tried. Milliseconds of a GRU on two cores of an AMD EPYC (family 26 model 2), torch 2.13, at
    T=100 B=64 H=128 with Adjacent(8) at the swap and with Uniform(4) at the end, and at T=20 B=16 H=64 with Uniform(8)
    at the end:

        this                  250  155   6.7    compiles for 50, 50 and 13 seconds
        ten steps at a time   272  166   8.1    for 22, 13 and 12
        a single step         278  172          for 5
        not compiled          343  211  10.3

    All steps without a region were no faster, nor was nn.GRU, which dynamo traces with allow_rnn: they compile for two
    minutes at T=100. `scan` of torch._higher_order_ops needs capture_scalar_outputs, and gave W_hh a wrong gradient.
    """

    def __init__(self, layer: nn.RNNBase, sampler: Sampler, compare: str) -> None:
        super().__init__()
        self.layer, self._cell = layer, _EQUATIONS[type(layer)]
        cell = self._cell.step

        def step(projected: Tensor, states: States, w_hh: Tensor, b_hh: Tensor) -> States:
            return cell(projected, linear(states[0], w_hh, b_hh), states)

        self._step = torch.compiler.nested_compile_region(step)
        self._compiled = torch.compile(self._run, dynamic=False, fullgraph=True)

    def forward(self, x: Tensor, pairs: Tensor, compare: str) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.compile's own: what must not be in silence raises, see fullgraph
            return self._compiled(x, pairs, compare, *self.layer.parameters())

    def _run(self, x: Tensor, pairs: Tensor, compare: str, *weights: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh = weights
        rows = with_variants(linear(x, w_ih, b_ih), pairs).flatten(1, 2)
        states = self._cell.states * (x.new_zeros(rows.shape[1], w_hh.shape[1]),)
        history = []
        for projected in rows.unbind():
            states = self._step(projected, states, w_hh, b_hh)
            history.append(states[0])
        return _compared(torch.stack(history), pairs, compare)


def _stacked_compiled(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    return layer(x, sampler(*x.shape[:2], None, x.device), compare)


def _shared(
    layer: nn.Module, x: Tensor, sampler: Sampler, compare: str, step: _CellStep | None = None
) -> tuple[Tensor, Tensor]:
    """Every variant starts from the original's state before its swap. Which of two forms is faster depends on how far
    the variants run: few steps are cheapest as one batch behind torch's layer, many in one loop with the original.
    torch's layer on the suffixes, as a PackedSequence, was as fast for few steps and took twice the time for many."""
    steps, batch, _ = x.shape
    pairs = sampler(steps, batch, None, x.device)
    i, j = pairs.flatten(0, 1).unbind(-1)
    end = j if compare == "swap" else torch.full_like(j, steps - 1)
    sequence = torch.arange(batch, device=x.device).repeat_interleave(pairs.shape[1])
    longest = int((end - i).max()) + 1
    run = _behind if 2 * longest <= steps else _in_step
    output, difference = run(layer, x, _Variants(i, j, end, sequence), step or _EQUATIONS[type(layer)].step)
    return output, difference.square().sum(-1).mean()


def _shared_compiled(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        return _shared(layer, x, sampler, compare, _compiled_step(_EQUATIONS[type(layer)]))


@functools.cache
def _compiled_step(cell: Cell) -> _CellStep:
    """Not more than the equations: gathering rows in it too gained nothing, and rows differ in number in every step."""
    return torch.compile(cell.step, dynamic=True, fullgraph=True)


def _behind(layer: nn.Module, x: Tensor, variants: _Variants, step: _CellStep) -> tuple[Tensor, Tensor]:
    """The original first, then all variants side by side, each from its own start: output (T, B, H) and differences
    (N, H)."""
    w_ih, w_hh, b_ih, b_hh = weights = [*layer.parameters()]
    longest_first = (variants.end - variants.i).argsort(descending=True)
    running = variants = _Variants(*(v[longest_first] for v in variants))
    span = variants.end - variants.i
    longest = int(span[0]) + 1
    projected: Any
    if isinstance(layer, nn.LSTM):  # torch's layer tells c of the last step only
        projected = linear(x, w_ih, b_ih)
        *tracks, recurrent = _lstm(projected, w_hh, b_hh)
        output = tracks[0]
    else:
        output, _ = layer(x)
        tracks = [output]
        # torch's cells are faster than the equations, but project the rows of a variant again
        often = longest * len(span) > x.shape[0] * x.shape[1]
        projected = linear(x, w_ih, b_ih) if often else None
    before = (variants.i - 1).clamp(min=0)
    started = (variants.i > 0)[:, None]
    states = tuple(torch.where(started, track[before, variants.sequence], 0) for track in tracks)
    finished = []
    for n in range(longest):
        rows = int((span >= n).sum())
        if rows < len(states[0]):
            finished.append(states[0][rows:])
            states = tuple(s[:rows] for s in states)
            running = _Variants(*(v[:rows] for v in running))
        at = running.i + n
        reads = running.reads(at), running.sequence
        if projected is None:
            states = (_CELL_STEPS[type(layer)](x[reads], states[0], *weights),)
        elif n == 0 and isinstance(layer, nn.LSTM):  # the original's product serves its variants
            states = step(projected[reads], recurrent[at, running.sequence], states)
        else:
            states = step(projected[reads], linear(states[0], w_hh, b_hh), states)
    ended = torch.cat((states[0], *reversed(finished)))
    return output, ended - output[variants.end, variants.sequence]


def _lstm(projected: Tensor, w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h and c of every step, (T, B, H), and the recurrent half of its gates, (T, B, 4 * H)."""
    h = c = projected.new_zeros(projected.shape[1], w_hh.shape[1])
    history = []
    for x in projected:
        u = linear(h, w_hh, b_hh)
        h, c = CELLS["lstm"].step(x, u, (h, c))
        history.append((h, c, u))
    h, c, u = (torch.stack(track) for track in zip(*history, strict=True))
    return h, c, u


def _in_step(layer: nn.Module, x: Tensor, variants: _Variants, step: _CellStep) -> tuple[Tensor, Tensor]:
    """One loop over time in which the variants run beside the originals, each from its start to its end, and whose
    input is projected once: output (T, B, H) and differences (N, H)."""
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    steps, batch, _ = x.shape
    now = torch.arange(steps, device=x.device)[:, None]
    inside, ends = (variants.i <= now) & (now <= variants.end), now == variants.end  # (T, N)
    row = batch + inside.cumsum(1) - 1  # of each variant among those of a step, behind the originals
    comes_from = torch.where(now == variants.i, variants.sequence, row.roll(1, 0))[inside]
    reads = (variants.reads(now) * batch + variants.sequence)[inside]
    counts, n_ended = inside.sum(1).tolist(), ends.sum(1).tolist()

    projected = linear(x, w_ih, b_ih).flatten(0, 1)
    originals = torch.arange(batch, device=x.device)
    states = _EQUATIONS[type(layer)].states * (x.new_zeros(batch, w_hh.shape[1]),)
    history, ended = [], []
    for t, (source, read, last) in enumerate(
        zip(comes_from.split(counts), reads.split(counts), row[ends].split(n_ended), strict=True)
    ):
        rows = torch.cat((originals, source))
        states = tuple(s[rows] for s in states)
        inputs = projected[torch.cat((originals + t * batch, read))]
        states = step(inputs, linear(states[0], w_hh, b_hh), states)
        history.append(states[0][:batch])
        ended.append(states[0][last])
    output = torch.stack(history)
    end, variant = ends.nonzero().unbind(1)
    return output, torch.cat(ended) - output[end, variants.sequence[variant]]


def _published(cell: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    """The authors' procedure: a loop for the task and, from a random prefix of the sequences, two more loops that read
    the next two elements in both orders. Their code is PermInvRNN.regularize in edocoh87/set_transformer."""
    start = int(torch.randint(max(1, len(x) - 2), ()))  # as they draw it, never the last pair
    output, state = [], None
    for element in x:
        state = cell(element, state)
        output.append(_hidden(state))
    ended = []
    for pair in ((start, start + 1), (start + 1, start)):
        state = None
        for t in (*range(start), *pair):
            state = cell(x[t], state)
        ended.append(_hidden(state))
    return torch.stack(output), (ended[1] - ended[0]).square().sum(-1).mean()


def _hidden(state: Any) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


def _as_cell(layer: nn.RNNBase, sampler: Sampler, compare: str) -> nn.Module:
    """torch.nn's cell with the weights of a layer."""
    cell = _CELL_MODULES[type(layer)](layer.input_size, layer.hidden_size)
    for name, parameter in layer.named_parameters():
        setattr(cell, name.removesuffix("_l0"), parameter)
    return cell


class _TorchRL(nn.Module):
    """TorchRL's fused kernels with the weights of a layer. They take float32, batch first, and a state for every step,
    to which a mask may set a sequence back: here never."""

    def __init__(self, layer: nn.RNNBase, sampler: Sampler, compare: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        from torchrl.modules.tensordict_module import _rnn_triton as theirs

        steps, batch, _ = x.shape
        restarts = torch.zeros(batch, steps, dtype=torch.bool, device=x.device)
        run, states = (theirs.lstm_triton, 2) if isinstance(self.layer, nn.LSTM) else (theirs.gru_triton, 1)
        start = torch.zeros(batch, steps, self.layer.hidden_size, device=x.device)
        weights = [parameter.float() for parameter in self.layer.parameters()]
        precision = "tf32" if gpu.allows_tf32() else "tf32x3"
        batch_first = x.transpose(0, 1).float()
        output, *_ = run(batch_first, *states * [start], *weights, restarts, x.dtype, input_precision=precision)
        return output.transpose(0, 1).to(x.dtype), None

    @staticmethod
    def serves(setting: Setting) -> bool:
        there = find_spec("torchrl") is not None and setting.device.startswith("cuda")
        return there and setting.cell != "RNN" and setting.dtype in ("float32", "bfloat16")


def _has_compiler(setting: Setting) -> bool:
    """Whether torch.compile finds what it needs on the CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return setting.device == "cpu" and shutil.which(compiler) is not None


def _stacked_in_jax(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    from sire_fast.lab import in_jax

    return in_jax.stacked(layer, x, sampler(*x.shape[:2], None, x.device), compare)


def _shared_in_jax(layer: nn.Module, x: Tensor, sampler: Sampler, compare: str) -> tuple[Tensor, Tensor]:
    from sire_fast.lab import in_jax

    return in_jax.shared(layer, x, sampler(*x.shape[:2], None, x.device), sampler.reach)  # type: ignore[attr-defined]


def _has_jax(setting: Setting) -> bool:
    return find_spec("jax") is not None and (setting.device, setting.dtype) == ("cpu", "float32")


CONTESTANTS = {
    "plain": Contestant("torch.nn without SIRE", _plain),
    "sire_fast plain": Contestant(
        "sire_fast without SIRE", _plain, lambda layer, sampler, compare: sire_fast.convert(layer, None)
    ),
    "sire_fast": Contestant("sire_fast with SIRE", _sire_fast, sire_fast.convert),
    "stacked": Contestant("torch.nn on the stacked variants", _stacked),
    "shared": Contestant("plain PyTorch, prefix shared", _shared),
    "stacked compiled": Contestant(
        "torch.compile on the stacked variants", _stacked_compiled, _Compiled, serves=_has_compiler, starts_slowly=True
    ),
    "shared compiled": Contestant(
        "torch.compile, prefix shared", _shared_compiled, serves=_has_compiler, starts_slowly=True
    ),
    "stacked in JAX": Contestant("JAX on the stacked variants", _stacked_in_jax, serves=_has_jax, starts_slowly=True),
    "shared in JAX": Contestant(
        "JAX, prefix shared",
        _shared_in_jax,
        compares=("swap",),
        serves=lambda setting: _has_jax(setting) and hasattr(swaps.parse(setting.swaps), "reach"),  # shapes are fixed
        starts_slowly=True,
    ),
    "published": Contestant("the authors' procedure, K=1", _published, _as_cell, ("swap",)),
    "torchrl": Contestant("TorchRL's kernels without SIRE", _plain, _TorchRL, serves=_TorchRL.serves),
    "torchrl stacked": Contestant("TorchRL's on the stacked variants", _stacked, _TorchRL, serves=_TorchRL.serves),
}


def contestants(setting: Setting, slow_starts: bool = False) -> list[str]:
    """The names of those who can run a setting, keys of CONTESTANTS; those that start slowly only if asked for."""
    return [
        name
        for name, each in CONTESTANTS.items()
        if setting.compare in each.compares and slow_starts >= each.starts_slowly and each.serves(setting)
    ]


def measure(
    steps: Mapping[str, Callable[[], object]], rounds: int, after_round: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Run several steps in turns, in another order in every round; each twice, and the second is timed: in a training
    a step finds its own last one in the caches, not another model's.

    Args:
        steps: what to run, by name.
        rounds: how often each is timed, after WARM_UP rounds that are not.
        after_round: called after every round, those included.

    Returns:
        The seconds of each step in each round.
    """
    orders = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(WARM_UP + rounds):
        for name in orders.sample([*steps], len(steps)):
            steps[name]()
            took = _seconds(steps[name])
            if n >= WARM_UP:
                seconds[name].append(took)
        after_round()
    return seconds


def _seconds(step: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


class Quartiles(NamedTuple):
    lower: float
    median: float
    upper: float


def quartiles(values: list[float]) -> Quartiles:
    """Of at least one value."""
    return Quartiles(*np.quantile(values, (0.25, 0.5, 0.75)).tolist())


def ratio(seconds: Mapping[str, list[float]], name: str, *against: str) -> Quartiles:
    """How long a step took, as a part of the time of the fastest of others in the same round."""
    rounds = zip(seconds[name], *(seconds[other] for other in against), strict=True)
    return quartiles([took / min(others) for took, *others in rounds])


def peak_memory(setting: Setting, name: str) -> int | None:
    """By how many bytes the memory of a fresh process grows, at its peak, in one step of a contestant: resident memory
    on the CPU, torch's on a GPU. None where the system does not tell (it is Linux that does)."""
    with pool(1) as process:
        return process.submit(_peak_growth, setting, name, torch.get_num_threads()).result()


def _peak_growth(setting: Setting, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the process that asks has been told
    Step(replace(setting, T=2, B=2), name)()  # loads what is loaded at the first use
    step = Step(setting, name)
    if step.x.is_cuda:
        torch.cuda.reset_peak_memory_stats(step.x.device)
        before = torch.cuda.memory_allocated(step.x.device)
        step()
        return torch.cuda.max_memory_allocated(step.x.device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    except OSError:
        return None
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS), or at its peak (VmHWM)."""
    found = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[0])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a result depends on besides its setting: device, instruction set, threads, versions and commit."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "instruction_set": None if cpu.MISSING else cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Of what computes a result."""
    return {"sire_fast": sire_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    """Its name and the numbers of its model, which tell apart what has one name, as far as the system knows them."""
    # py-cpuinfo gives the same name, after starting processes for a second
    try:
        told = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        told = ""
    fields = dict(re.findall(r"^(.+?)[ \t]*:[ \t]*(.+)$", told, re.MULTILINE))
    numbers = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
    model = " ".join(f"{short} {fields[name]}" for name, short in numbers.items() if name in fields)
    processor = fields.get("model name") or platform.processor() or platform.machine()
    return f"{processor} ({model})" if model else processor


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with "-dirty" if files have changed since; None if it lies
    in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(setting: Setting, seconds: Mapping[str, list[float]], peaks: Mapping[str, int | None]) -> dict[str, Any]:
    """What a result file holds of one setting; times in seconds, memory in bytes."""
    return {
        "setting": asdict(setting),
        "machine": machine(setting.device),
        "rounds": len(seconds["plain"]),
        "contestants": {
            name: {
                "seconds": quartiles(times)._asdict(),
                "ratio_to_plain": ratio(seconds, name, "plain")._asdict(),
                "peak_bytes": peaks[name],
            }
            for name, times in seconds.items()
        },
    }
