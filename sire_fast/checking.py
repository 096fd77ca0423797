"""Whether the kernels are right, at length: those that a model uses, on inputs that it is given, and all that serve a
device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sire_fast import backends, passes
from sire_fast.backends.gpu import name_of
from sire_fast.cells import States
from sire_fast.inspection import evaluating
from sire_fast.layers import _SwapLayer, has_own_forward
from sire_fast.passes import Network, Pairs
from sire_fast.proof import (
    Case,
    Error,
    Results,
    chances,
    environment,
    eps_of,
    errors,
    first_line,
    kernel_errors,
    too_large,
    with_gradients,
)


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
            found = errors(ours, theirs, truth, eps_of(call["dtype"], x.device))
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
        return with_gradients(values, of)
