"""What every backend is held against: the reference in float64, and its own error in the backend's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sire_fast import functional, reference, swaps, validation
from sire_fast.backends import gpu
from sire_fast.cells import CELLS

TENSORS = ("x_proj", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0")


class Case(NamedTuple):
    """A call: sizes, and which of the optional arguments it has."""

    cell: str
    steps: int
    batch: int
    hidden: int
    n_swaps: int
    bias: bool = True
    ragged: bool = False
    compare: str = "end"
    inputs: int = 0  # I; 0 for inputs that are projected already
    recompute: bool = False

    def __str__(self) -> str:
        options = [self.compare] + ["ragged"] * self.ragged + ["no-bias"] * (not self.bias)
        options += [f"I{self.inputs}"] * bool(self.inputs) + ["recompute"] * self.recompute
        return f"{self.cell}-T{self.steps}-B{self.batch}-H{self.hidden}-K{self.n_swaps}-{'-'.join(options)}"


# sizes on either side of a vector (4, 8, 16 floats), of a tile's 6 rows and 4 vectors, and of one thread's share
SIZES = [
    (7, 5, 3, 4),
    (1, 1, 1, 1),
    (9, 3, 17, 2),
    (5, 4, 33, 0),
    (12, 7, 64, 3),
    (6, 13, 65, 5),
    (3, 1, 16, 9),
]

# compare, and widths I on either side of a vector and of a tile
OPTIONS = [("end", 1), ("swap", 5), ("end", 70), ("swap", 16)]

CASES = [
    Case(cell, *size, n % 3 > 0, n % 2 > 0, compare, inputs, recompute)
    for cell in CELLS
    for n, size in enumerate(SIZES)
    for compare, inputs, recompute in (("end", 0, n % 2 > 0), ("swap", 0, False), (*OPTIONS[n % 4], n % 3 == 1))
]


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of swap_rnn for a case, float64 leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    width = CELLS[case.cell].gates * case.hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, case.steps + 1, (case.batch,), generator=generator) if case.ragged else None
    pairs = torch.zeros(case.batch, 0, 2, dtype=torch.int64)
    if case.n_swaps:
        pairs = swaps.Uniform(case.n_swaps)(case.steps if lengths is None else lengths, case.batch, generator)
        pairs[0, 0, 1] = pairs[0, 0, 0]  # one that exchanges nothing
    return {
        "x_proj": normal(case.steps, case.batch, case.inputs or width).requires_grad_(),
        "w_ih": (normal(width, case.inputs) / case.inputs**0.5).requires_grad_() if case.inputs else None,
        "b_ih": normal(width).requires_grad_() if case.inputs and case.bias else None,
        "w_hh": (normal(width, case.hidden) / case.hidden**0.5).requires_grad_(),
        "b_hh": normal(width).requires_grad_() if case.bias else None,
        "h0": normal(case.batch, case.hidden).requires_grad_(),
        "c0": normal(case.batch, case.hidden).requires_grad_() if case.cell == "lstm" else None,
        "swaps": pairs,
        "ends": pairs[..., 1].contiguous() if case.compare == "swap" else None,
        "lengths": lengths,
        "recompute": case.recompute,
    }


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments in another dtype, as new leaves."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if name in TENSORS and value is not None
        else value
        for name, value in arguments.items()
    }


def outputs(cell: str, arguments: dict[str, Any], backend: str) -> reference.SwapRNN:
    if backend != "reference":
        return functional.swap_rnn(cell, **arguments, backend=backend)
    return reference.swap_rnn(cell, **{name: value for name, value in arguments.items() if name != "recompute"})


def run(cell: str, arguments: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """All outputs, and the gradient of every tensor argument through all of them."""
    named = {k: v for k, v in outputs(cell, arguments, backend)._asdict().items() if v is not None}
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for value in named.values():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        loss = loss + (value * weight).sum()
    wanted = [name for name in TENSORS if arguments[name] is not None and arguments[name].requires_grad]
    if wanted:
        gradients = torch.autograd.grad(loss, [arguments[name] for name in wanted])
        named |= {f"d_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {k: v.detach() for k, v in named.items()}


def with_wrong_positions(cell: str, monkeypatch: Any) -> Iterator[dict[str, Any]]:
    """Arguments with positions and lengths that lie outside the sequences, as a GPU gets them: unchecked."""
    monkeypatch.setattr(validation, "check_positions", lambda *_: None)
    monkeypatch.setattr(gpu, "check", lambda *_: None)
    last, huge = 5, 1 << 40
    for swap, end, length in (
        ((2, 60), 70, 6), ((-3, 2), 4, 0), ((-huge, huge), huge, huge), ((4, 1), 0, -huge), ((60, 61), 2, 60),
        ((0, last), -1, 3), ((1, 2), last, 2),
    ):  # fmt: skip
        for longest in (None, 2):
            arguments = make(Case(cell, last + 1, 3, 5, 2))
            arguments["swaps"][1:] = torch.tensor(swap)
            arguments["ends"] = torch.full((3, 2), last)
            arguments["ends"][1:] = end
            arguments["lengths"] = torch.tensor([last + 1, length, length])
            yield arguments | {"longest": longest}


def assert_padding_does_not_matter(cell: str, value: float, dtype: torch.dtype, backend: str) -> None:
    """No gradient takes a value in that stands behind the end of a sequence."""
    arguments = cast(make(Case(cell, 6, 3, 5, 2, inputs=4, ragged=True)), dtype)
    assert int(arguments["lengths"].min()) < 6
    clean = run(cell, arguments, backend)
    behind = torch.arange(6)[:, None] >= arguments["lengths"]
    padded = arguments["x_proj"].detach().masked_fill(behind[..., None], value).requires_grad_()
    for name, found in run(cell, arguments | {"x_proj": padded}, backend).items():
        assert torch.equal(found, clean[name]), name


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, as a share of the largest true value."""
    assert value.shape == truth.shape
    if not truth.numel():
        return 0.0
    difference = (value.double() - truth.double()).abs().max()
    assert difference.isfinite(), "not a number where the truth is one"
    return float(difference / truth.double().abs().max().clamp(min=1e-3))


def assert_as_good_as_reference(cell: str, arguments: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """The backend's error against the float64 truth is at most twice the reference's in the same dtype, and eps."""
    truth = run(cell, arguments, "reference")
    ours = run(cell, cast(arguments, dtype), backend)
    theirs = run(cell, cast(arguments, dtype), "reference")
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.dtype == (torch.promote_types(dtype, torch.float32) if name == "penalty" else dtype)
        allowed = 2 * error(theirs[name], truth[name]) + 4 * torch.finfo(dtype).eps
        assert error(value, truth[name]) <= allowed, f"{name}: {error(value, truth[name]):.2e} > {allowed:.2e}"
