"""The operators behind sire_fast.functional: schema, fake and gradient of each in one place.

`swap_rnn` runs the pass and keeps what its gradient needs; `swap_rnn_backward` is that gradient. Both look up the
backend that was chosen before; which one is chosen, and the checks of shapes, are sire_fast.functional's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sire_fast import graph, validation
from sire_fast.backends import KERNELS
from sire_fast.backends.gpu import name_of
from sire_fast.cells import CELLS
from sire_fast.reference import SwapRNN

LIBRARY = torch.library.Library("sire_fast", "DEF")
LIBRARY.define(
    "swap_rnn(str cell, str backend, str arithmetic, bool recompute, Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor w_hh,"
    " Tensor? b_hh, Tensor h0, Tensor? c0, Tensor swaps, Tensor ends, Tensor lengths, SymInt span_rows, bool train)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor variants, Tensor penalty, Tensor cells, Tensor variant_cells,"
    " Tensor gates, Tensor spans)"
)
LIBRARY.define(
    "swap_rnn_backward(str cell, str backend, str arithmetic, bool recompute, Tensor?[] grads, Tensor x, Tensor? w_ih,"
    " Tensor? b_ih, Tensor w_hh, Tensor? b_hh, Tensor h0, Tensor? c0, Tensor swaps, Tensor ends, Tensor lengths,"
    " Tensor output, Tensor? cells, Tensor gates, Tensor spans, bool[] needs)"
    " -> (Tensor dx, Tensor dw_ih, Tensor db_ih, Tensor dw_hh, Tensor db_hh, Tensor dh0, Tensor dc0)"
)


def swap_rnn(
    cell: str,
    backend: str,
    recompute: bool,
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    swaps: Tensor,
    ends: Tensor,
    lengths: Tensor,
    longest: int | None,
    result: torch.dtype,
) -> SwapRNN:
    """The pass on a chosen backend, for arguments whose shapes fit; see sire_fast.functional.swap_rnn. All but the
    penalty comes in the dtype `result`."""
    dtype, computed = x.dtype, KERNELS[backend].computed_in(x.dtype)
    tensors: tuple[Tensor | None, ...] = (x, w_ih, b_ih, w_hh, b_hh, h0, c0)
    transformed = graph.in_transform()  # then a tensor does not tell what the one below it wants
    train = torch.is_grad_enabled() and (transformed or any(t is not None and t.requires_grad for t in tensors))
    if computed != dtype:
        tensors = tuple(t if t is None else t.to(computed) for t in tensors)
    rows = span_rows(backend, x.shape[0], swaps, ends, lengths, longest) if train else 0
    arithmetic = name_of(dtype)
    if transformed:  # which looks into functions of autograd, not into operators
        call = _SwapRNNTransformed.apply
    elif _unseen(*tensors, swaps):
        call = _SwapRNN.apply if train else _run
    else:
        call = torch.ops.sire_fast.swap_rnn.default
    *outputs, _, _ = call(cell, backend, arithmetic, recompute, *tensors, swaps, ends, lengths, rows, train)
    if outputs[0].dtype != result:  # but for the penalty: a mean of squares wants the digits
        outputs = [t if t is None or n == _PENALTY else t.to(result) for n, t in enumerate(outputs)]
    output, h_n, c_n, variants, penalty, cells, variant_cells = outputs
    if CELLS[cell].states == 1:
        return SwapRNN(output, h_n, None, variants, penalty, None, None)
    return SwapRNN(output, h_n, c_n, variants, penalty, cells, variant_cells)


_PENALTY = SwapRNN._fields.index("penalty")


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _unseen(*tensors: Tensor | None) -> bool:
    """Whether no trace, mode or wrapper of tensors wants to see the operators: without them a call is 60 us shorter."""
    if torch.compiler.is_compiling() or graph.in_mode():
        return False
    return _PLAIN.issuperset(map(type, tensors))


def span_rows(backend: str, steps: int, swaps: Tensor, ends: Tensor, lengths: Tensor, longest: int | None) -> int:
    """Rows for the steps of all variants' spans, which the forward keeps: the largest number that there can be where
    the positions cannot be read, in a trace."""
    if not validation.has_values(swaps, ends, lengths):
        return swaps.shape[0] * swaps.shape[1] * (steps if longest is None else longest)
    return KERNELS[backend].span_rows(steps, swaps, ends, lengths, longest)


def _outputs(
    empty: Callable[..., Tensor], cell: str, backend: str, recompute: bool, *arguments: Any
) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
    """The outputs of swap_rnn, not filled, None for those that a call does not have; and the inputs, x to lengths.
    Where a backward follows they lie in memory from `empty`, see Backend."""
    *inputs, span_rows, train = arguments
    x, h0, swaps = inputs[0], inputs[5], inputs[7]
    wide = torch.promote_types(x.dtype, torch.float32)
    *shapes, gates, spans = _shapes(cell, backend, recompute, x, h0, swaps, span_rows, train)
    state = empty if train else Tensor.new_empty
    states = [None if shape is None else state(x, shape, dtype=wide) for shape in shapes]
    return (*states, empty(x, gates, dtype=x.dtype), empty(x, spans, dtype=wide)), inputs


def _full(tensors: Sequence[Tensor | None], like: Any) -> tuple[Tensor, ...]:
    """As the operators return them, who know no None."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _run(cell: str, backend: str, arithmetic: str, recompute: bool, *arguments: Any) -> tuple[Tensor | None, ...]:
    """swap_rnn for inputs that have been checked, None for outputs that a call does not have."""
    kernels = KERNELS[backend]
    outputs, inputs = _outputs(kernels.empty, cell, backend, recompute, *arguments)
    kernels.forward(cell, arithmetic, arguments[-1], recompute, _contiguous(inputs), outputs)
    return outputs


@torch.library.register_fake("sire_fast::swap_rnn")
def _fake(cell: str, backend: str, arithmetic: str, recompute: bool, *arguments: Any) -> tuple[Tensor, ...]:
    _check(cell, backend, arithmetic, *arguments[:-2])
    outputs, _ = _outputs(Tensor.new_empty, cell, backend, recompute, *arguments)
    return _full(outputs, outputs[0])


@torch.library.impl("sire_fast::swap_rnn", "CompositeExplicitAutograd")
def _forward(cell: str, backend: str, arithmetic: str, recompute: bool, *arguments: Any) -> tuple[Tensor, ...]:
    _check(cell, backend, arithmetic, *arguments[:-2])
    outputs = _run(cell, backend, arithmetic, recompute, *arguments)
    return _full(outputs, outputs[0])


def _check(cell: str, backend: str, arithmetic: str, x: Tensor, *others: Any) -> None:
    """A ValueError unless the kernels can read the inputs, of the operator's schema, as what they have to be: a graph
    that was loaded from a file calls the operator itself."""
    w_ih, b_ih, w_hh, b_hh, h0, c0, swaps, ends, lengths = others
    validation.check_arguments(cell, x, w_hh, b_hh, h0, c0, swaps, ends, lengths, w_ih, b_ih)
    if backend not in KERNELS:
        raise ValueError(f"backend: expected one of {', '.join(KERNELS)}, got {backend!r}")
    dtype: Any = getattr(torch, arithmetic, None)
    hidden = h0.shape[1]
    if isinstance(hidden, int):  # no symbol of a trace
        call: dict[str, Any] = {"cell": cell, "dtype": dtype, "device": x.device, "hidden_size": hidden}
        if reasons := KERNELS[backend].why_not(**call):
            raise NotImplementedError("; ".join(reasons))
    if x.dtype != KERNELS[backend].computed_in(dtype):
        raise ValueError(f"x: expected {KERNELS[backend].computed_in(dtype)} for {arithmetic}, got {x.dtype}")


def _shapes(
    cell: str, backend: str, recompute: bool, x: Tensor, h0: Tensor, swaps: Tensor, span_rows: int, train: bool
) -> list[tuple[int, ...] | None]:
    """Of the outputs of swap_rnn, None for those that a call does not have."""
    steps, batch, _ = x.shape
    hidden, n_variants = h0.shape[1], swaps.shape[1]
    has_cell = CELLS[cell].states == 2
    return [
        (steps, batch, hidden),
        (batch, hidden),
        (batch, hidden) if has_cell else None,
        (batch, n_variants, hidden),
        (batch, n_variants),
        (steps, batch, hidden) if has_cell else None,
        (batch, n_variants, hidden) if has_cell else None,
        *KERNELS[backend].kept(cell, steps, batch, hidden, span_rows, train, recompute),
    ]


_INPUTS = slice(4, 14)  # of the operator: x to lengths
_DIFFERENTIABLE = 7  # its first inputs, and its first outputs; gates and spans are kept for the backward alone


class Watch:
    """Tells whether a tensor has been changed in place since, without holding its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._empty = tensor.detach()  # has the tensor's version,
        self._empty.data = tensor.new_empty(0)  # and none of its memory
        self._version = self._empty._version

    @property
    def changed(self) -> bool:
        return self._empty._version != self._version


class _SwapRNN(torch.autograd.Function):
    """The gradient of swap_rnn. Registered by hand: through torch.library.register_autograd a call takes 50 us more,
    as long as a small pass itself.

    The backward reads the output, which belongs to the caller: one that has been changed in place is computed again.
    Torch tells of that, but not of changes through .data or NumPy: a few of its values are kept to compare.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        outputs = _below_autograd(*arguments)
        _keep(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first = _INPUTS.start
        needs = ctx.needs_input_grad[first : first + _DIFFERENTIABLE]
        *inputs, h, cells, gates, spans = ctx.saved_tensors
        if changed(ctx, h):
            h = _below_autograd(*ctx.settings, *inputs, 0, False)[0]
        grads = grads[:_DIFFERENTIABLE]
        arguments = (*ctx.settings, needs, *grads, *inputs, h, cells, gates, spans)
        if graph.in_transform():
            computed = _Backward.apply(*arguments)
        elif torch._C._dispatch_tls_is_dispatch_key_included("VmapMode"):
            raise NotImplementedError(
                f"sire_fast: no gradients in batches (is_grads_batched, vectorize); use {_REFERENCE}"
            )
        elif _unseen(*inputs, *grads) and not torch.is_grad_enabled():
            computed = _run_backward(*arguments)
        else:
            computed = _call_backward(*arguments)
        wanted = [gradient if need else None for gradient, need in zip(computed, needs, strict=True)]
        return *(None,) * first, *wanted, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_ONCE)


def _below_autograd(*arguments: Any) -> tuple[Any, ...]:
    if _unseen(*arguments[_INPUTS]):
        return _run(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sire_fast.swap_rnn.default(*arguments)


def _keep(ctx: Any, arguments: tuple, outputs: tuple[Any, ...]) -> None:
    """What the backward needs."""
    h, _, _, _, _, cells, _, gates, spans = outputs
    ctx.settings, ctx.watch = arguments[: _INPUTS.start], None
    if validation.has_values(h):
        ctx.watch, ctx.sample = Watch(h), None if h.is_cuda else _sample(h).clone()
        h = h.data
    else:  # where a trace or a transform follows every change
        h = h.clone()
    ctx.save_for_backward(*arguments[_INPUTS], h, cells, gates, spans)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, spans)


def _call_backward(cell: str, backend: str, arithmetic: str, recompute: bool, needs: Any, *tensors: Any) -> Any:
    grads, kept = tensors[:_DIFFERENTIABLE], tensors[_DIFFERENTIABLE:]
    return torch.ops.sire_fast.swap_rnn_backward.default(cell, backend, arithmetic, recompute, grads, *kept, needs)


# Transforms of torch.func want functions of autograd in another form, which costs others 40 us a call.


class _SwapRNNTransformed(_SwapRNN):
    # torch tells this form from the other by its setup_context
    setup_context = staticmethod(_keep)  # type: ignore[assignment]

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        outputs = _below_autograd(*arguments)
        return _full(outputs, outputs[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        return _each(_SwapRNNTransformed.apply, info, in_dims, arguments)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _call_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, arguments: tuple, outputs: tuple[Tensor, ...]) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        return _each(_Backward.apply, info, in_dims, arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_ONCE)


def watch(node: Any, output: Tensor) -> None:
    """Make the node of a pass, if it is one of swap_rnn, look at what its output has become: another tensor with the
    same memory, or one of another form."""
    if _watching(node) and isinstance(output, Tensor):
        node.watch = Watch(output)


def _sample(output: Tensor) -> Tensor:
    """Up to 512 values of a pass's output, from all over it."""
    return output.view(-1)[:: max(1, output.numel() // 256)]


def changed(node: Any, output: Tensor) -> bool:
    """Whether the memory of the output of the pass that has this node was changed in place."""
    if not _watching(node):
        return False
    if node.watch.changed or output.untyped_storage().nbytes() < output.nbytes:
        return True
    if node.sample is None or torch.equal(_sample(output), node.sample):
        return False
    return not torch.allclose(_sample(output), node.sample, 0, 0, equal_nan=True)


def own_memory(output: Tensor) -> Tensor:
    """The output of a pass for a caller who may change it: itself where its node would know, or else a copy."""
    return output if _watching(output.grad_fn) else output.clone()


def _watching(node: Any) -> bool:
    return getattr(node, "watch", None) is not None


def _each(call: Callable[..., Any], info: Any, in_dims: tuple, arguments: tuple) -> tuple[tuple[Tensor, ...], int]:
    """A batching rule: one call behind the other."""

    def taken(argument: Any, dim: Any, n: int) -> Any:
        if dim is None:
            return argument
        if isinstance(dim, (list, tuple)):
            return [taken(*each, n) for each in zip(argument, dim, strict=True)]
        return argument.select(dim, n)

    results = [call(*taken(arguments, in_dims, n)) for n in range(info.batch_size)]
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), 0


@torch.library.impl("sire_fast::swap_rnn", "Autograd")
def _differentiable(cell: str, backend: str, arithmetic: str, recompute: bool, *arguments: Any) -> tuple[Tensor, ...]:
    _check(cell, backend, arithmetic, *arguments[:-2])
    outputs = _SwapRNN.apply(cell, backend, arithmetic, recompute, *arguments)
    return _full(outputs, outputs[0])


def _gradients(
    empty: Callable[..., Tensor],
    needs: Sequence[bool],
    x: Tensor,
    w_ih: Any,
    b_ih: Any,
    w_hh: Tensor,
    b_hh: Any,
    h0: Tensor,
) -> list[Tensor | None]:
    """The gradients, not filled, that of x in memory from `empty`; None for those that are not needed."""
    width = w_hh.shape[0]
    shapes = (w_ih is not None and w_ih.shape, (width,), w_hh.shape, (width,), h0.shape, h0.shape)
    others = [h0.new_empty(shape) if need else None for shape, need in zip(shapes, needs[1:], strict=True)]
    return [empty(h0, x.shape, dtype=h0.dtype) if needs[0] else None, *others]


def _run_backward(
    cell: str, backend: str, arithmetic: str, recompute: bool, needs: Sequence[bool], *tensors: Any
) -> list[Tensor | None]:
    """swap_rnn_backward for gradients, and what follows them, that have been checked."""
    kernels = KERNELS[backend]
    computed = _gradients(kernels.empty, needs, *tensors[_DIFFERENTIABLE:][:6])
    kernels.backward(cell, arithmetic, recompute, _contiguous(tensors), computed)
    return computed


def _check_backward(cell: str, backend: str, arithmetic: str, recompute: bool, grads: Any, *kept: Any) -> None:
    *inputs, h, cells, gates, spans = kept
    _check(cell, backend, arithmetic, *inputs)
    x, h0, swaps = inputs[0], inputs[5], inputs[7]
    *outputs, of_gates, of_spans = _shapes(cell, backend, recompute, x, h0, swaps, spans.shape[0], True)
    shapes, tensors = [*outputs, outputs[0], outputs[5], of_gates, of_spans], [*grads, h, cells, gates, spans]
    wide = torch.promote_types(x.dtype, torch.float32)
    for n, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor is None and (shape is None or n < _DIFFERENTIABLE):
            continue
        expected = shape or (0,), x.dtype if tensor is gates else wide, x.device
        got = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)
        if got != expected:
            raise ValueError(f"swap_rnn_backward: expected a gradient or kept tensor of {expected}, got {got}")


@torch.library.register_fake("sire_fast::swap_rnn_backward")
def _fake_backward(
    cell: str, backend: str, arithmetic: str, recompute: bool, grads: Any, *arguments: Any
) -> tuple[Tensor, ...]:
    *kept, needs = arguments
    _check_backward(cell, backend, arithmetic, recompute, grads, *kept)
    return _full(_gradients(Tensor.new_empty, needs, *kept[:6]), kept[5])


@torch.library.impl("sire_fast::swap_rnn_backward", "CompositeExplicitAutograd")
def _backward(
    cell: str, backend: str, arithmetic: str, recompute: bool, grads: Any, *arguments: Any
) -> tuple[Tensor, ...]:
    *kept, needs = arguments
    _check_backward(cell, backend, arithmetic, recompute, grads, *kept)
    return _full(_run_backward(cell, backend, arithmetic, recompute, needs, *grads, *kept), kept[5])


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As the kernels, which read raw memory, want them."""
    return [t if t is None else t.contiguous().resolve_neg() for t in tensors]


_REFERENCE = 'sire_fast.backends.use("reference") or backend="reference"'
_ONCE = f"sire_fast: the kernels differentiate once, backwards; for second derivatives or forward mode use {_REFERENCE}"


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(_ONCE)


torch.library.register_autograd("sire_fast::swap_rnn_backward", _no_second_gradient)
