"""The swap penalty: of a model's layers, and of any function of a sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sire_fast import ops
from sire_fast.layers import _SwapLayer
from sire_fast.passes import Compared
from sire_fast.reference import squared_distance, with_variants
from sire_fast.swaps import Sampler, draw
from sire_fast.validation import check_lengths, check_swaps, readable, warn


def penalty(model: nn.Module, through: Callable[[Tensor], Tensor] | None = None, state: str = "output") -> Tensor:
    """The swap penalty of a model's forwards, to be added to the loss between forward and backward.

    It is the mean over sequences and variants of the squared distance between what a layer computes for a sequence
    and for its variant, summed over the layer's units, and over the layers of the model. Of a layer that was called
    several times all forwards count that no backward has come through yet (a checkpoint's second run is none), but for
    those whose results are gone while others' are there; each thread has its own. Reading it changes nothing.

    Of layers whose penalty joins the loss by itself (`weight`) it is detached, for logging: that of the forwards up to
    the last backward, also after it.

    Args:
        model: a module that holds sire_fast layers, or is one.
        through: compare through(h) in place of h, for a model with one such layer. It receives (n, D) and returns
            (n, ...). Where it draws random numbers (dropout), a sequence and all its variants get the same ones.
        state: "output" compares h; "all" adds the squared distance of c, which LSTMs have.

    Returns:
        A scalar, differentiable. 0 if the model is in evaluation mode, in which no variants are run.

    Raises:
        ValueError: the model has no sire_fast layer, has several and `through` is given, `state` is unknown, or
            something else than h is asked of a layer whose weight joins by itself.
        RuntimeError: no forward counts; the message says why.
        NotImplementedError: c is to be compared where torch does not tell it: after a swap inside an LSTM that is
            not fused.

    Example:
        >>> import sire_fast
        >>> layer, head = sire_fast.GRU(3, 5, swaps=sire_fast.swaps.Uniform(2), compare="end"), nn.Linear(5, 1)
        >>> output, _ = layer(torch.randn(7, 4, 3))
        >>> loss = head(output[-1]).square().mean() + 0.1 * penalty(layer, through=head)
    """
    layers = [module for module in model.modules() if isinstance(module, _SwapLayer)]
    if not layers:
        raise ValueError("model: expected a sire_fast layer in it, found none (see sire_fast.convert)")
    if state not in ("output", "all"):
        raise ValueError(f"state: expected output or all, got {state!r}")
    if through is not None and len(layers) > 1:
        raise ValueError(f"through: expected a model with one sire_fast layer, got one with {len(layers)}")
    training = [layer for layer in layers if layer.training]
    if not training:
        return layers[0].weight_hh_l0.new_zeros(())
    swapping = [layer for layer in training if layer.swaps is not None]
    if not swapping:
        raise RuntimeError("penalty: no layer has swaps; see sire_fast.convert(model, swaps=...)")
    each = [_layer_penalty(layer, through, state) for layer in swapping]
    found = [p for p in each if p is not None]
    if not found:
        raise RuntimeError(f"penalty: {swapping[0]._ledger.told}")
    return sum((p.to(found[0].device) for p in found[1:]), found[0])


def _layer_penalty(layer: _SwapLayer, through: Callable[[Tensor], Tensor] | None, state: str) -> Tensor | None:
    """The mean over all variants of the forwards that count; None if none does."""
    if layer._ledger.joins:
        if through is not None or state != "output":
            raise ValueError("through, state: expected none for a layer whose weight joins by itself: it compares h")
        return layer._ledger.joined()
    each = []
    for compared, mark in layer._ledger.counting():
        each.append(_pass_penalty(layer, compared, through, state))
        if mark and each[-1].requires_grad:
            each[-1].register_hook(mark)
    if len(each) < 2:  # the usual case, in the fewest operations
        return _mean(each[0]) if each else None
    total = sum((p.sum().to(each[0].device) for p in each[1:]), each[0].sum())
    return total / max(sum(p.numel() for p in each), 1)


def _pass_penalty(layer: _SwapLayer, run: Compared, through: Callable[[Tensor], Tensor] | None, state: str) -> Tensor:
    """(B, K)"""
    each = run.penalty
    if through is not None and each.numel():
        if ops.changed(run.output.grad_fn, run.output):
            raise RuntimeError("through: the layer's output was changed in place, and cannot be compared any more")
        base, variants = run.original(run.output).unbind(1), run.variants.unbind(1)
        compared = _alike("through", through, [*base, *variants])
        each = _distances(compared[: len(base)], compared[len(base) :])
    if state == "all" and layer.mode == "LSTM" and each.numel():
        if run.cells is None or run.variant_cells is None:
            raise NotImplementedError(
                'state: "all" with compare="swap" needs c at every step, which this layer does not have: '
                + "; ".join(layer.why_not_fused())
            )
        each = each + squared_distance(run.variant_cells, run.original(run.cells))
    return each


def swap_penalty(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    swaps: Sampler | Tensor,
    *,
    lengths: Tensor | None = None,
    batch_first: bool = False,
) -> Tensor:
    """The swap penalty of any module or function of a sequence, without a kernel: fn runs on every variant whole.

    Args:
        fn: from sequences, in the layout of x, to what is compared, (B, ...). It must treat sequences independently
            of each other: the variants come as further sequences of a larger batch. Where it draws random numbers
            (dropout), a sequence and all its variants get the same ones.
        x: sequences, (T, B, ...), or (B, T, ...) with batch_first.
        swaps: a sampler (sire_fast.swaps), or the pairs themselves, (B, K, 2) int64.
        lengths: length of every sequence, (B) int64; swaps then stay inside. fn has to know them itself.
        batch_first: x has the batch in front.

    Returns:
        Mean over sequences and variants of the squared distance between fn of a sequence and of its variant, summed
        over all that fn returns for it; a scalar, in at least float32. 0 without sequences.

    Raises:
        ValueError: an argument is none of the expected, swaps lie outside a sequence, or fn returns something else
            than (B, ...).

    Example:
        >>> from sire_fast import swaps
        >>> swap_penalty(lambda x: x.sum(0), torch.ones(7, 4, 3), swaps.Uniform(2)).item()
        0.0
    """
    if x.dim() < 2 or x.shape[1 if batch_first else 0] == 0:
        layout = "(B, T, ...)" if batch_first else "(T, B, ...)"
        raise ValueError(f"x: expected {layout} with at least one step, got {tuple(x.shape)}")
    sequences = x.transpose(0, 1) if batch_first else x
    steps, batch = sequences.shape[:2]
    if lengths is not None:
        check_lengths(steps, batch, lengths)
    if not isinstance(swaps, Tensor):
        swaps = draw(swaps, steps if lengths is None else lengths, batch, None, x.device)
    check_swaps(sequences, swaps, lengths)
    if batch and readable(swaps) and not (swaps[..., 0] < swaps[..., 1]).any():
        warn(f"nothing to swap in these sequences of up to {steps} steps: the penalty is 0")
    rows = [*with_variants(sequences, swaps).unbind(2)]  # 1 + K of (T, B, ...)
    if batch_first:
        rows = [row.transpose(0, 1) for row in rows]
    base, *variants = _alike("fn", fn, rows, dim=0 if batch_first else 1)
    if not variants:
        return base.new_zeros(())
    return _mean(_distances([base] * len(variants), variants))


def _mean(each: Tensor) -> Tensor:
    """Of no numbers it is 0."""
    return each.mean() if each.numel() else each.sum()


def _distances(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Squared distances of K pairs of (B, ...), as (B, K)."""
    return squared_distance(*(torch.stack(each, 1).unsqueeze(-1).flatten(2) for each in (a, b)))


def _alike(name: str, fn: Callable[[Tensor], Tensor], inputs: list[Tensor], dim: int = 0) -> list[Tensor]:
    """The argument `name`, fn, of each of several inputs of one shape, all with the same random numbers; in one call
    for all but the first, joined along their batch dimension `dim`, if fn draws none."""
    cuda = [inputs[0].device] if inputs[0].is_cuda else []
    before = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in cuda]
    first, rest = fn(inputs[0]), inputs[1:]
    after = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in cuda]
    batch = inputs[0].shape[dim]
    _check_result(name, first, batch)
    if not rest:
        return [first]
    if all(torch.equal(a, b) for a, b in zip([before[0], *before[1]], [after[0], *after[1]], strict=True)):
        others = fn(torch.cat(rest, dim))
        _check_result(name, others, batch * len(rest))
        return [first, *others.chunk(len(rest))]
    results = [first]
    for x in rest:
        torch.set_rng_state(before[0])
        for device, state in zip(cuda, before[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        results.append(fn(x))
        _check_result(name, results[-1], batch)
    return results


def _check_result(name: str, result: object, batch: int) -> None:
    if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != batch:
        got = tuple(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ValueError(f"{name}: expected a result of shape ({batch}, ...), got {got}")
