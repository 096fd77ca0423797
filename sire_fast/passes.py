"""The passes of a recurrent network over sequences and their swapped variants: in one call of the operator, over the
spans of the variants, or over all of them stacked; and the choice among them.

Sequences are (T, B, I), states (layers * directions, B, H) for h and, for an LSTM, c.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sire_fast import backends, functional
from sire_fast.backends import cpu, gpu
from sire_fast.cells import CELLS, States
from sire_fast.reference import SwapRNN, at_steps, squared_distance, with_variants
from sire_fast.swaps import Sampler
from sire_fast.validation import check_swaps, fill_defaults

Weights = tuple[Tensor, ...]


class Network(NamedTuple):
    """What a pass needs to know of torch.nn's RNN, GRU or LSTM.

    Attributes:
        cell: a key of sire_fast.cells.CELLS.
        weights: of each layer and direction, in torch's order: w_ih, w_hh, with bias b_ih and b_hh, with a projection
            w_hr.
        bias: whether there are biases.
        projected: whether h is projected (proj_size).
        dropout: of the outputs of all layers but the last, in training.
        training: whether it is in training mode.
        recompute: keep no gates for the backward but compute them again.
    """

    cell: str
    weights: tuple[tuple[Weights, ...], ...]
    bias: bool
    projected: bool
    dropout: float
    training: bool
    recompute: bool

    # methods, since torch.compile of torch 2.9 knows no properties of tuples

    def directions(self) -> int:
        return len(self.weights[0])

    def call(self) -> dict[str, Any]:
        """What sire_fast.backends asks of a call."""
        w_hh = self.weights[0][0][1]
        dtype = functional.cast_to(w_hh)
        return {"cell": self.cell, "dtype": dtype, "device": w_hh.device, "hidden_size": _hidden_size(self)}


class Pairs(NamedTuple):
    """The swaps of a pass.

    Attributes:
        swaps: positions (i, j), (B, K, 2) int64.
        compare: "end" or "swap", see sire_fast.RNN.
        longest: steps of the longest span that there can be; None if that is T.
    """

    swaps: Tensor
    compare: str
    longest: int | None

    def ends(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The step at which each variant is compared, (B, K)."""
        ends = self.swaps[..., 1] if self.compare == "swap" else fill_defaults(x, self.swaps, None, lengths)[0]
        return ends.contiguous()  # once, for a kernel and its backward


def longest_span(sampler: Sampler | None, compare: str) -> int | None:
    """Steps of the longest span that a sampler can give; None if that is T."""
    reach = getattr(sampler, "reach", None) if compare == "swap" else None
    return None if reach is None else reach + 1


class Compared(NamedTuple):
    """The original and its variants, to be compared."""

    penalty: Tensor  # (B, K)
    output: Tensor  # (L, B, D), of the original
    at: Tensor  # (B, K), the row of `output` with which each variant is compared
    variants: Tensor  # (B, K, D)
    cells: Tensor | None  # (L, B, H), c of the original; None where it is not known
    variant_cells: Tensor | None  # (B, K, H)

    def original(self, track: Tensor) -> Tensor:
        """What `output` or `cells` holds where the variants are compared, (B, K, ...)."""
        return at_steps(track, self.at, torch.arange(len(self.at), device=self.at.device)[:, None])


# output (T, B, D), last states, and what is compared
Result = tuple[Tensor, States, Compared]


# ---------------------------------------------------------------- the choice


def why_not_fused(network: Network, *, swapping: bool, batch: int | None = None) -> list[str]:
    """The reasons why a network runs torch's own layers, or all steps of the stacked variants, and not a fused kernel
    over what the variants change; none if it does.

    Args:
        swapping: whether there are variants.
        batch: of a pass without variants on a CPU: so many sequences, which torch's own layer may do faster.
    """
    reasons = []
    if network.projected:
        reasons.append(f"proj_size={network.weights[0][0][-1].shape[0]}: fused without a projection")
    if swapping and len(network.weights) > 1 and network.directions() > 1:
        reasons.append("num_layers > 1 with bidirectional=True: a swap changes every input of the second layer")
    call = network.call()
    reasons += _why_no_kernel(call)
    if not reasons and batch is not None and not backends.forced() and call["device"].type == "cpu":
        reasons = cpu.slower_than_torch(
            cell=network.cell, dtype=call["dtype"], hidden_size=call["hidden_size"], batch=batch
        )
    return reasons


def backend(network: Network) -> str:
    """What computes a network: one of sire_fast.backends.BACKENDS, or "torch" for torch's own layers."""
    return backends.choose("auto", **network.call()) if runs_on_kernels(network) else "torch"


def runs_on_kernels(network: Network) -> bool:
    """Whether our kernels compute a network's layers, fused or not, and not torch's own."""
    return not (network.projected or _why_no_kernel(network.call()))


def _why_no_kernel(call: dict[str, Any]) -> list[str]:
    if backends.forced() or call["device"].type != "cuda":
        return backends.why_no_kernel(**call)
    measured = gpu.fastest(**call)
    if measured == "torch":
        return ["measured: torch's own layer, cuDNN, is the fastest here"]
    # before any is proven, which takes compilations: a kernel that is right but slow is not wanted
    reasons = [] if measured else _slower_than_torch(backends.unproven(**call), call)
    reasons = reasons or backends.why_no_kernel(**call)
    return reasons if measured or reasons else _slower_than_torch(backends.choose("auto", **call), call)


def _slower_than_torch(serves: str, call: dict[str, Any]) -> list[str]:
    if serves == "reference":
        return []
    return gpu.slower_than_torch(serves, cell=call["cell"], dtype=call["dtype"], hidden_size=call["hidden_size"])


def with_swaps(network: Network, x: Tensor, lengths: Tensor | None, hx: States, pairs: Pairs) -> Result:
    """The pass that serves."""
    if why_not_fused(network, swapping=True):
        return stacked(network, x, lengths, hx, pairs)
    return (spans if len(network.weights) > 1 else fused)(network, x, lengths, hx, pairs)


# ---------------------------------------------------------------- the passes


def plain(
    network: Network, x: Tensor, lengths: Tensor | None, hx: States, on_kernels: bool, rows: int = 1
) -> tuple[Tensor, States]:
    """No variants: the layers behind each other, on the operator or on torch's own kernels. `rows` sequences in a row
    share their dropout masks: what is compared must not differ by dropout noise."""
    run = _layer if on_kernels else _torch_layer
    last = []
    for n in range(len(network.weights)):
        here = slice(n * network.directions(), (n + 1) * network.directions())
        x, *ended = run(network, n, x, lengths, tuple(s[here] for s in hx))
        last.append(ended)
        if n < len(network.weights) - 1 and network.dropout and network.training:
            mask = nn.functional.dropout(x.new_ones(len(x), x.shape[1] // rows, 1, x.shape[-1]), network.dropout)
            x = (x.unflatten(1, (-1, rows)) * mask).flatten(1, 2)
    return x, tuple(s[0] if len(s) == 1 else torch.cat(s) for s in zip(*last, strict=True))


def fused(network: Network, x: Tensor, lengths: Tensor | None, hx: States, pairs: Pairs) -> Result:
    """One layer: originals and variants in a single call for each direction."""
    ends = pairs.ends(x, lengths)
    runs, stops = [_run(network, 0, 0, x, lengths, tuple(s[0] for s in hx), pairs, ends)], [ends]
    if network.directions() > 1:
        length = x.shape[0] if lengths is None else lengths[:, None, None]
        back = pairs._replace(swaps=length - 1 - pairs.swaps.flip(-1))  # as this direction counts
        stops.append(back.ends(x, lengths))
        states = tuple(s[1] for s in hx)
        runs.append(_run(network, 0, 1, _reversed(x, lengths), lengths, states, back, stops[1]))
    return _outputs(runs, lengths), _last_states(runs), _comparison(runs, stops)


def spans(network: Network, x: Tensor, lengths: Tensor | None, hx: States, pairs: Pairs) -> Result:
    """Several layers in one direction. A variant's span i..end is a sequence of its own, which starts from the
    original's states and whose outputs are the next layer's inputs."""
    steps, batch, _ = x.shape
    check_swaps(x, pairs.swaps, lengths)
    count = pairs.swaps.shape[1]
    if not count:  # a kernel wants a sequence: one pair that exchanges nothing runs along, and is not counted
        pairs = pairs._replace(swaps=pairs.swaps.new_zeros(batch, 1, 2))
    ends = pairs.ends(x, lengths)
    i, j = pairs.swaps.unbind(-1)
    b = torch.arange(batch, device=x.device)[:, None]
    ahead = torch.arange(min(steps, pairs.longest or steps), device=x.device)[:, None, None]
    t = (i + ahead).minimum(ends)  # (S, B, K)
    source = torch.where(t == i, j, torch.where(t == j, i, t))
    variants, span = at_steps(x, source, b).flatten(1, 2), (ends - i + 1).flatten()
    last = []
    for n in range(len(network.weights)):
        start = tuple(s[n] for s in hx)
        run = _run(network, n, 0, x, lengths, start)
        before = [at_steps(track, (i - 1).clamp(min=0), b) for track in _tracks(run)]
        begin = (torch.where((i > 0)[..., None], s, s0[:, None]) for s, s0 in zip(before, start, strict=True))
        own = _run(network, n, 0, variants, span, tuple(s.flatten(0, 1) for s in begin))
        last.append([run])
        x, variants = run.output, own.output
        if n < len(network.weights) - 1 and network.dropout:
            mask = nn.functional.dropout(torch.ones_like(x), network.dropout)
            x, variants = x * mask, variants * mask[t, b].flatten(1, 2)
    i, j, ends = i[:, :count], j[:, :count], ends[:, :count]
    base = [at_steps(track, ends, b) for track in _tracks(run)]
    ended = [s.unflatten(0, (batch, -1))[:, :count] for s in (own.h_n, own.c_n) if s is not None]
    # a pair that exchanges nothing is the original
    ended = [torch.where((i < j)[..., None], s, s0) for s, s0 in zip(ended, base, strict=True)]
    compared = Compared(squared_distance(ended[0], base[0]), x, ends, ended[0], run.cells, (*ended, None)[1])
    return x, tuple(torch.cat(s) for s in zip(*map(_last_states, last), strict=True)), compared


def stacked(network: Network, x: Tensor, lengths: Tensor | None, hx: States, pairs: Pairs) -> Result:
    """Any network: the original and its variants as one batch, all steps of them."""
    batch = x.shape[1]
    check_swaps(x, pairs.swaps, lengths)
    rows, ends = 1 + pairs.swaps.shape[1], pairs.ends(x, lengths)
    both = with_variants(x, pairs.swaps).flatten(1, 2)  # (T, B * (1 + K), I)
    states = tuple(s.repeat_interleave(rows, 1) for s in hx)
    lengths = None if lengths is None else lengths.repeat_interleave(rows)
    y, last = plain(network, both, lengths, states, runs_on_kernels(network), rows)
    final = tuple(s.unflatten(1, (batch, rows)) for s in last)

    first = rows * torch.arange(batch, device=x.device)[:, None]  # the original, before its variants
    stops = [ends]
    if network.directions() > 1:
        # the direction that reads backwards arrives at the start, or has just read both positions at i
        stops.append(torch.zeros_like(ends) if pairs.compare == "end" else pairs.swaps[..., 0])
    base, variants = (
        torch.cat([at_steps(y, at, b).chunk(len(stops), -1)[n] for n, at in enumerate(stops)], -1)  # (B, K, D)
        for b in (first, first + torch.arange(1, rows, device=x.device))
    )
    cells = variant_cells = None
    if len(final) > 1 and pairs.compare == "end":  # torch gives c after the last step only
        ended_cells = torch.cat(final[1][-network.directions() :].unbind(0), -1)  # (B, 1 + K, directions * H)
        cells, variant_cells = ended_cells[None, :, 0].expand(rows - 1, -1, -1), ended_cells[:, 1:]
    compared = Compared(
        squared_distance(variants, base), base.transpose(0, 1), _numbered(variants), variants, cells, variant_cells
    )
    return y[:, ::rows].contiguous(), tuple(s[:, :, 0].contiguous() for s in final), compared


# ---------------------------------------------------------------- one layer


def _hidden_size(network: Network) -> int:
    return network.weights[0][0][1].shape[0] // CELLS[network.cell].gates


def _run(
    network: Network,
    layer: int,
    direction: int,
    x: Tensor,
    lengths: Tensor | None,
    states: States,
    pairs: Pairs | None = None,
    ends: Tensor | None = None,
) -> SwapRNN:
    """One layer in one direction, in the order in which it reads, on the operator."""
    w_ih, w_hh, *biases = network.weights[layer][direction]
    b_ih, b_hh = biases or (None, None)
    swaps = torch.empty(x.shape[1], 0, 2, dtype=torch.int64, device=x.device) if pairs is None else pairs.swaps
    return functional.swap_rnn(
        network.cell,
        x,
        w_hh,
        b_hh,
        *states,
        swaps=swaps,
        ends=ends,
        lengths=lengths,
        w_ih=w_ih,
        b_ih=b_ih,
        recompute=network.recompute,
        longest=pairs and pairs.longest,
    )


def _layer(network: Network, layer: int, x: Tensor, lengths: Tensor | None, hx: States) -> tuple[Tensor, ...]:
    """All directions of a layer on the operator: output and last states."""
    runs = [
        _run(network, layer, d, _reversed(x, lengths) if d else x, lengths, tuple(s[d] for s in hx))
        for d in range(network.directions())
    ]
    return _outputs(runs, lengths), *_last_states(runs)


def _torch_layer(network: Network, layer: int, x: Tensor, lengths: Tensor | None, hx: States) -> tuple[Tensor, ...]:
    """The same on torch's own kernels."""
    run = getattr(torch._VF, network.cell)
    start = list(hx) if len(hx) > 1 else hx[0]
    weights = [weight for direction in network.weights[layer] for weight in direction]
    settings = (weights, network.bias, 1, 0.0, network.training, network.directions() > 1)
    if lengths is None:
        return run(x, start, *settings, False)
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    start = [s[:, order] for s in hx] if len(hx) > 1 else hx[0][:, order]
    data, *last = run(packed.data, packed.batch_sizes, start, *settings)
    output, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
    return output, *(s[:, back] for s in last)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Sequences read from their ends."""
    if lengths is None:
        return x.flip(0)
    back = (lengths - 1 - torch.arange(len(x), device=x.device)[:, None]).clamp(min=0)
    return at_steps(x, back, torch.arange(x.shape[1], device=x.device))


def _outputs(runs: list[SwapRNN], lengths: Tensor | None) -> Tensor:
    """The output of a layer from the runs of its directions."""
    ahead, *back = (run.output for run in runs)
    if not back:
        return ahead
    both = torch.cat((ahead, _reversed(back[0], lengths)), -1)
    if lengths is None:
        return both
    inside = torch.arange(len(both), device=both.device)[:, None] < lengths
    return torch.where(inside[..., None], both, 0)


def _last_states(runs: list[SwapRNN]) -> States:
    """The last states of all directions, (directions, B, H) each."""
    last = zip(*((run.h_n, run.c_n) for run in runs), strict=True)
    # in place, as torch has it: a view could not be detached in place
    return tuple(s[0].unsqueeze_(0) if len(s) == 1 else torch.stack(s) for s in last if s[0] is not None)


def _tracks(run: SwapRNN) -> States:
    return (run.output,) if run.cells is None else (run.output, run.cells)


def _comparison(runs: list[SwapRNN], stops: list[Tensor]) -> Compared:
    """What the directions of a layer compare, each at its own steps."""
    if len(runs) == 1:
        (run,), (ends,) = runs, stops
        return Compared(run.penalty, run.output, ends, run.variants, run.cells, run.variant_cells)
    row = torch.arange(len(stops[0]), device=stops[0].device)[:, None]
    compared = zip(
        *([at_steps(track, ends, row) for track in _tracks(run)] for run, ends in zip(runs, stops, strict=True)),
        strict=True,
    )
    base, *cells = (torch.cat(each, -1).transpose(0, 1) for each in compared)
    variants = torch.cat([run.variants for run in runs], -1)
    ended = [run.variant_cells for run in runs if run.variant_cells is not None]
    variant_cells = torch.cat(ended, -1) if ended else None
    penalty = runs[0].penalty + runs[1].penalty
    return Compared(penalty, base, _numbered(variants), variants, cells[0] if cells else None, variant_cells)


def _numbered(variants: Tensor) -> Tensor:
    """(B, K), the number of each variant in its sequence."""
    return torch.arange(variants.shape[1], device=variants.device).expand(len(variants), -1)
