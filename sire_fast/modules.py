"""torch.nn.RNN, GRU and LSTM that also know how far a swap of two inputs moves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from sire_fast import backends, cpu, functional, gpu, triton
from sire_fast.cells import CELLS, States
from sire_fast.reference import SwapRNN, check_lengths, check_swaps, fill_defaults, with_variants
from sire_fast.swaps import Adjacent, Sampler

_MODE_CELLS = {cell.mode: name for name, cell in CELLS.items()}
COMPARES = ("end", "swap")


class Pass(NamedTuple):
    """What a layer computed in its last forward with swaps: the original and its variants, to be compared."""

    penalty: Tensor  # (B, K)
    output: Tensor  # (L, B, D), of the original
    at: Tensor  # (B, K), the row of `output` with which each variant is compared
    variants: Tensor  # (B, K, D)
    cells: Tensor | None  # (L, B, H), c of the original; None where it is not known
    variant_cells: Tensor | None  # (B, K, H)

    def compared(self, track: Tensor) -> Tensor:
        """What `output` or `cells` holds where the variants are compared, (B, K, ...)."""
        return track[self.at, torch.arange(len(self.at), device=self.at.device)[:, None]]


class _SwapLayer(nn.RNNBase):
    """What the three layers share: a torch.nn layer with `swaps`, `compare` and the pass over the variants."""

    _torch_layer: type[nn.RNNBase]
    mode: str
    swaps: Sampler | None
    compare: str
    recompute: bool
    _last: Pass | None

    def __init__(
        self,
        *args: Any,
        swaps: Sampler | None = None,
        compare: str = "end",
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs and self.mode != "LSTM":
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(self.mode, *args, **kwargs)
        self._set_swaps(swaps, compare, recompute)

    def _set_swaps(self, swaps: Sampler | None, compare: str, recompute: bool) -> None:
        if swaps is not None and not callable(swaps):
            raise ValueError(f"swaps: expected a sampler (see sire_fast.swaps) or None, got {swaps!r}")
        if compare not in COMPARES:
            raise ValueError(f"compare: expected one of {', '.join(COMPARES)}, got {compare!r}")
        self.swaps, self.compare, self.recompute, self._last = swaps, compare, recompute, None

    def extra_repr(self) -> str:
        swaps = "" if self.swaps is None else f", swaps={self.swaps}, compare={self.compare}"
        return super().extra_repr() + swaps + ", recompute=True" * self.recompute

    def __getstate__(self) -> dict[str, Any]:
        # the last pass holds a graph, which neither copies nor pickles
        return {**super().__getstate__(), "_last": None}

    def why_not_fused(self, batch: int | None = None) -> list[str]:
        """The reasons why this layer runs torch's own layer, or all steps of the stacked variants, in training, and not
        a fused kernel over what the variants change; none if it does.

        Args:
            batch: asks about a pass without swaps (in evaluation, or of a plain layer) over so many sequences, which
                torch's own layer may do faster on a CPU.
        """
        return self._why_not_fused(batch is None and self.swaps is not None, batch)

    def _why_not_fused(self, swapping: bool, batch: int | None) -> list[str]:
        reasons = []
        if self.proj_size:
            reasons.append(f"proj_size={self.proj_size}: fused without a projection")
        if swapping and self.num_layers > 1 and self.bidirectional:
            reasons.append("num_layers > 1 with bidirectional=True: a swap changes every input of the second layer")
        reasons += self._why_no_kernel()
        if not reasons and batch is not None and not backends.forced() and self.weight_hh_l0.device.type == "cpu":
            weight = self.weight_hh_l0
            call = {"cell": self._cell, "dtype": weight.dtype, "hidden_size": self.hidden_size}
            reasons = cpu.slower_than_torch(**call, batch=batch)
        return reasons

    def _why_no_kernel(self) -> list[str]:
        call = self._call
        reasons = backends.why_no_kernel(**call)
        if reasons or backends.forced() or call["device"].type != "cuda":
            return reasons
        measured = gpu.fastest(**call)
        if measured == "torch":
            return ["measured: torch's own layer, cuDNN, is the fastest here"]
        if measured:
            return []
        return triton.slower_than_torch(cell=self._cell, dtype=call["dtype"], hidden_size=self.hidden_size)

    @property
    def backend(self) -> str:
        """What runs this layer in training with swaps: a key of sire_fast.backends.BACKENDS, or "torch" for torch's
        own layer."""
        return "torch" if self.why_not_fused() else backends.choose("auto", **self._call)

    @property
    def _cell(self) -> str:
        return _MODE_CELLS[self.mode]

    @property
    def _call(self) -> dict[str, Any]:
        """The layer as sire_fast.backends asks for it."""
        weight = self.weight_hh_l0
        return {
            "cell": self._cell,
            "dtype": weight.dtype,
            "device": weight.device,
            "hidden_size": self.hidden_size,
        }

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None) -> tuple[Any, Any]:
        """As torch.nn's layer: same arguments, result and errors. In training mode and with swaps it also runs the
        swapped variants; sire_fast.penalty(model) then gives their penalty.

        Args:
            input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or packed.
            hx: initial states, as torch.nn's; zeros if None.
            lengths: of padded sequences, (B) int64 on any device, in any order; positions are drawn inside them, and
                outputs behind them are 0. As good as packing, without it.
        """
        self._last = None
        swapping = self.swaps is not None and self.training
        # a trace would have to be made again for other batch sizes
        fixed = not swapping and lengths is None and isinstance(input, Tensor) and not torch.compiler.is_compiling()
        reasons = self._why_not_fused(swapping, self._batch(input) if fixed else None)
        if reasons and backends.forced():
            raise NotImplementedError(f"{backends.forced()}: cannot run this layer: {'; '.join(reasons)}")
        if reasons and not swapping and lengths is None:
            return self._torch_layer.forward(self, input, hx)
        x, lengths, states, restore = self._unify(input, hx, lengths)
        if swapping:
            pairs = self._draw(x, lengths)
            ends = self._ends(x, lengths, pairs)
            run = self._stacked if reasons else self._spans if self.num_layers > 1 else self._fused
            output, last, self._last = run(x, lengths, states, pairs, ends)
        else:
            output, last = self._layers(x, lengths, states, 1, not reasons)
        return restore(output, last)

    def _batch(self, input: Tensor) -> int:
        return 1 if input.dim() < 3 else input.shape[0 if self.batch_first else 1]

    def _unify(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None, States, Callable[[Tensor, States], tuple[Any, Any]]]:
        """The input as (T, B, I) with its lengths, the initial states as (layers, B, H), and what makes outputs of
        that form into outputs of the input's form."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected None for a PackedSequence, which has its own, got a tensor")
            self.check_input(input.data, input.batch_sizes)
            x, lengths = pad_packed_sequence(input)
            states = self._initial(x, hx)
            self.check_forward_args(input.data, states if self._two_states else states[0], input.batch_sizes)
            return x, lengths.to(x.device), states, lambda y, last: (_pack_as(input, y), self._tuple(last))

        name = type(self).__name__
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None:
            for state in hx if self._two_states else (hx,):
                if state.dim() != input.dim():
                    kind = "batched 3-D" if batched else "unbatched 2-D"
                    raise RuntimeError(
                        f"For {kind} input, hx should also be {input.dim()}-D but got {state.dim()}-D tensor"
                    )
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if hx is not None and not batched:
            hx = tuple(s.unsqueeze(1) for s in hx) if self._two_states else hx.unsqueeze(1)
        states = self._initial(x.transpose(0, 1) if self.batch_first else x, hx)
        self.check_forward_args(x, states if self._two_states else states[0], None)
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one step and one sequence, got input {tuple(input.shape)}")

        def restore(output: Tensor, last: States) -> tuple[Any, Any]:
            output = output.transpose(0, 1) if self.batch_first else output
            if not batched:
                output, last = output.squeeze(batch_dim), tuple(s.squeeze(1) for s in last)
            return output, self._tuple(last)

        x = x.transpose(0, 1) if self.batch_first else x
        if lengths is not None:
            check_lengths(*x.shape[:2], lengths)
            lengths = lengths.to(x.device, non_blocking=True)
        return x, lengths, states, restore

    @property
    def _two_states(self) -> bool:
        return self.mode == "LSTM"

    def _tuple(self, states: States) -> Any:
        return states if self._two_states else states[0]

    def _initial(self, x: Tensor, hx: Any) -> States:
        if hx is not None:
            return tuple(hx) if self._two_states else (hx,)
        layers = self.num_layers * self._directions
        h = x.new_zeros(layers, x.shape[1], self.proj_size or self.hidden_size)
        return (h, x.new_zeros(layers, x.shape[1], self.hidden_size)) if self._two_states else (h,)

    def _draw(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Pairs (B, K, 2) from the sampler."""
        steps, batch, _ = x.shape
        if lengths is not None and isinstance(self.swaps, Adjacent) and self.swaps.k == "all":
            # as many as T has, whatever the lengths: a device need not be asked for their maximum
            pairs = self.swaps(steps, batch, None, x.device)
            return torch.where((pairs[..., 1] < lengths[:, None])[..., None], pairs, 0)
        return self.swaps(steps if lengths is None else lengths, batch, None, x.device)  # type: ignore[misc]

    def _ends(self, x: Tensor, lengths: Tensor | None, pairs: Tensor) -> Tensor:
        """The step at which each variant is compared, (B, K)."""
        return pairs[..., 1] if self.compare == "swap" else fill_defaults(x, pairs, None, lengths)[0]

    @property
    def _longest(self) -> int | None:
        """Steps of the longest span that the sampler can give."""
        reach = getattr(self.swaps, "reach", None) if self.compare == "swap" else None
        return None if reach is None else reach + 1

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _weights(self, layer: int) -> list[list[Tensor]]:
        """Of each direction, in torch's order."""
        names = self._all_weights[layer * self._directions : (layer + 1) * self._directions]
        return [[getattr(self, name) for name in group] for group in names]

    def _run(
        self,
        layer: int,
        direction: int,
        x: Tensor,
        lengths: Tensor | None,
        states: States,
        pairs: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> SwapRNN:
        """One layer in one direction, in the order in which it reads, on the operator."""
        w_ih, w_hh, *biases = self._weights(layer)[direction]
        b_ih, b_hh = biases or (None, None)
        if pairs is None:
            pairs = torch.empty(x.shape[1], 0, 2, dtype=torch.int64, device=x.device)
        return functional.swap_rnn(
            self._cell,
            x.to(w_hh.dtype),  # under autocast the layers before may have lowered it
            w_hh,
            b_hh,
            *(s.to(w_hh.dtype) for s in states),
            swaps=pairs,
            ends=ends,
            lengths=lengths,
            w_ih=w_ih,
            b_ih=b_ih,
            recompute=self.recompute,
            longest=self._longest,
        )

    def _layer(self, layer: int, x: Tensor, lengths: Tensor | None, hx: States) -> tuple[Tensor, ...]:
        """All directions of a layer: output and last states."""
        runs = [
            self._run(layer, d, _reversed(x, lengths) if d else x, lengths, tuple(s[d] for s in hx))
            for d in range(self._directions)
        ]
        return _outputs(runs, lengths), *_last_states(runs)

    def _layers(
        self, x: Tensor, lengths: Tensor | None, hx: States, rows: int, on_kernels: bool
    ) -> tuple[Tensor, States]:
        """The layers behind each other; `rows` sequences in a row share their dropout masks: what is compared must not
        differ by dropout noise."""
        run = self._layer if on_kernels else self._torch_pass
        last = []
        for layer in range(self.num_layers):
            here = slice(layer * self._directions, (layer + 1) * self._directions)
            x, *ended = run(layer, x, lengths, tuple(s[here] for s in hx))
            last.append(ended)
            if layer < self.num_layers - 1 and self.dropout and self.training:
                mask = nn.functional.dropout(x.new_ones(len(x), x.shape[1] // rows, 1, x.shape[-1]), self.dropout)
                x = (x.unflatten(1, (-1, rows)) * mask).flatten(1, 2)
        return x, tuple(s[0] if len(s) == 1 else torch.cat(s) for s in zip(*last, strict=True))

    def _fused(
        self, x: Tensor, lengths: Tensor | None, hx: States, pairs: Tensor, ends: Tensor
    ) -> tuple[Tensor, States, Pass]:
        """One layer: originals and variants in a single call for each direction."""
        runs = [self._run(0, 0, x, lengths, tuple(s[0] for s in hx), pairs, ends)]
        stops = [ends]
        if self.bidirectional:
            length = x.shape[0] if lengths is None else lengths[:, None, None]
            back = length - 1 - pairs.flip(-1)  # as this direction counts
            stops.append(self._ends(x, lengths, back))
            runs.append(self._run(0, 1, _reversed(x, lengths), lengths, tuple(s[1] for s in hx), back, stops[1]))
        return _outputs(runs, lengths), _last_states(runs), _comparison(runs, stops)

    def _spans(
        self, x: Tensor, lengths: Tensor | None, hx: States, pairs: Tensor, ends: Tensor
    ) -> tuple[Tensor, States, Pass]:
        """Several layers in one direction. A variant's span i..end is a sequence of its own, which starts from the
        original's states and whose outputs are the next layer's inputs."""
        steps, batch, _ = x.shape
        check_swaps(x, pairs, lengths)
        if not pairs.shape[1]:  # nothing to swap: one pair that exchanges nothing
            pairs = pairs.new_zeros(batch, 1, 2)
            ends = self._ends(x, lengths, pairs)
        i, j = pairs.unbind(-1)
        b = torch.arange(batch, device=x.device)[:, None]
        ahead = torch.arange(min(steps, self._longest or steps), device=x.device)[:, None, None]
        t = (i + ahead).minimum(ends)  # (S, B, K)
        source = torch.where(t == i, j, torch.where(t == j, i, t))
        variants, span = x[source, b].flatten(1, 2), (ends - i + 1).flatten()
        last = []
        for layer in range(self.num_layers):
            start = tuple(s[layer] for s in hx)
            run = self._run(layer, 0, x, lengths, start)
            before = [track[(i - 1).clamp(min=0), b] for track in _tracks(run)]
            begin = (torch.where((i > 0)[..., None], s, s0[:, None]) for s, s0 in zip(before, start, strict=True))
            own = self._run(layer, 0, variants, span, tuple(s.flatten(0, 1) for s in begin))
            last.append([run])
            x, variants = run.output, own.output
            if layer < self.num_layers - 1 and self.dropout:
                mask = nn.functional.dropout(torch.ones_like(x), self.dropout)
                x, variants = x * mask, variants * mask[t, b].flatten(1, 2)
        base = [track[ends, b] for track in _tracks(run)]
        ended = [s.unflatten(0, (batch, -1)) for s in (own.h_n, own.c_n) if s is not None]
        # a pair that exchanges nothing is the original
        ended = [torch.where((i < j)[..., None], s, s0) for s, s0 in zip(ended, base, strict=True)]
        compared = Pass(_distance(ended[0], base[0]), x, ends, ended[0], run.cells, (*ended, None)[1])
        return x, tuple(torch.cat(s) for s in zip(*map(_last_states, last), strict=True)), compared

    def _stacked(
        self, x: Tensor, lengths: Tensor | None, hx: States, pairs: Tensor, ends: Tensor
    ) -> tuple[Tensor, States, Pass]:
        """Any layer: the original and its variants as one batch, all steps of them."""
        batch = x.shape[1]
        check_swaps(x, pairs, lengths)
        rows = 1 + pairs.shape[1]
        stacked = with_variants(x, pairs).flatten(1, 2)  # (T, B * (1 + K), I)
        states = tuple(s.repeat_interleave(rows, 1) for s in hx)
        lengths = None if lengths is None else lengths.repeat_interleave(rows)
        on_kernels = not (self.proj_size or self._why_no_kernel())
        y, last = self._layers(stacked, lengths, states, rows, on_kernels)
        y = y.unflatten(1, (batch, rows))  # (T, B, 1 + K, D)
        final = tuple(s.unflatten(1, (batch, rows)) for s in last)

        base, variants = self._compared(y, pairs, ends)
        cells = variant_cells = None
        if self._two_states and self.compare == "end":  # torch gives c after the last step only
            ended_cells = torch.cat(final[1][-self._directions :].unbind(0), -1)  # (B, 1 + K, directions * H)
            cells, variant_cells = ended_cells[None, :, 0].expand(rows - 1, -1, -1), ended_cells[:, 1:]
        compared = Pass(
            _distance(variants, base), base.transpose(0, 1), _numbered(variants), variants, cells, variant_cells
        )
        return y[:, :, 0], tuple(s[:, :, 0] for s in final), compared

    def _compared(self, y: Tensor, pairs: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the original and of its variants where they are compared, (B, K, D) each."""
        row = torch.arange(y.shape[1], device=y.device)[:, None]
        variant = torch.arange(1, y.shape[2], device=y.device)
        if not self.bidirectional:
            return y[ends, row, 0], y[ends, row, variant]
        ahead, back = y.chunk(2, -1)
        # the direction that reads backwards arrives at the start, or has just read both positions at i
        starts = torch.zeros_like(pairs[..., 0]) if self.compare == "end" else pairs[..., 0]
        base = torch.cat((ahead[ends, row, 0], back[starts, row, 0]), -1)
        return base, torch.cat((ahead[ends, row, variant], back[starts, row, variant]), -1)

    def _torch_pass(self, layer: int, x: Tensor, lengths: Tensor | None, hx: States) -> tuple[Tensor, ...]:
        """One layer on torch's own kernels."""
        run = getattr(torch._VF, self._cell)
        start = list(hx) if self._two_states else hx[0]
        weights = [weight for direction in self._weights(layer) for weight in direction]
        settings = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        if lengths is None:
            return run(x, start, *settings, False)
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        start = [s[:, order] for s in hx] if self._two_states else hx[0][:, order]
        data, *last = run(packed.data, packed.batch_sizes, start, *settings)
        output, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
        return output, *(s[:, back] for s in last)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Sequences read from their ends."""
    if lengths is None:
        return x.flip(0)
    back = (lengths - 1 - torch.arange(len(x), device=x.device)[:, None]).clamp(min=0)
    return x[back, torch.arange(x.shape[1], device=x.device)]


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
    return tuple(s[0][None] if len(s) == 1 else torch.stack(s) for s in last if s[0] is not None)


def _tracks(run: SwapRNN) -> States:
    return (run.output,) if run.cells is None else (run.output, run.cells)


def _comparison(runs: list[SwapRNN], stops: list[Tensor]) -> Pass:
    """What the directions of a layer compare, each at its own steps."""
    if len(runs) == 1:
        (run,), (ends,) = runs, stops
        return Pass(run.penalty, run.output, ends, run.variants, run.cells, run.variant_cells)
    row = torch.arange(len(stops[0]), device=stops[0].device)[:, None]
    compared = zip(
        *([track[ends, row] for track in _tracks(run)] for run, ends in zip(runs, stops, strict=True)), strict=True
    )
    base, *cells = (torch.cat(each, -1).transpose(0, 1) for each in compared)
    variants = torch.cat([run.variants for run in runs], -1)
    variant_cells = torch.cat([run.variant_cells for run in runs], -1) if cells else None
    penalty = runs[0].penalty + runs[1].penalty
    return Pass(penalty, base, _numbered(variants), variants, cells[0] if cells else None, variant_cells)


def _numbered(variants: Tensor) -> Tensor:
    """(B, K), the number of each variant in its sequence."""
    return torch.arange(variants.shape[1], device=variants.device).expand(len(variants), -1)


def _distance(variants: Tensor, base: Tensor) -> Tensor:
    """||variants - base||^2, (B, K), in at least float32."""
    wide = torch.promote_types(variants.dtype, torch.float32)
    return (variants.to(wide) - base.to(wide)).square().sum(-1)


def _pack_as(like: PackedSequence, padded: Tensor) -> PackedSequence:
    """A padded (T, B, D) in the form of a packed input."""
    if like.sorted_indices is not None:
        padded = padded[:, like.sorted_indices]
    step = torch.repeat_interleave(torch.arange(len(like.batch_sizes)), like.batch_sizes)
    row = torch.cat([torch.arange(n) for n in like.batch_sizes.tolist()])
    return like._replace(data=padded[step.to(padded.device), row.to(padded.device)])


class RNN(_SwapLayer):
    """torch.nn.RNN with a penalty on swaps of its inputs; arguments, state_dict, outputs and errors are torch's.

    Args:
        swaps: sampler of the pairs that are exchanged in training mode (sire_fast.swaps), or None for a plain layer.
        compare: "end" compares the states after the whole sequence, "swap" those after the later position of a pair.
            With several layers the output of the last is compared; with two directions the forward state after the
            pair, or at the end, and the backward state after the pair, or at the start.
        recompute: keep no gates for the backward but compute them again: less memory, more time (a fused layer's).

    The remaining arguments are those of torch.nn.RNN. Swaps are drawn from torch's own random numbers. A sequence and
    its variants share the dropout masks between layers.

    Example:
        >>> import torch, sire_fast
        >>> layer = sire_fast.RNN(3, 5, swaps=sire_fast.swaps.Uniform(2), compare="end")
        >>> output, h_n = layer(torch.randn(7, 4, 3))
        >>> sire_fast.penalty(layer).shape
        torch.Size([])
    """

    _torch_layer = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity, self.mode = nonlinearity, f"RNN_{nonlinearity.upper()}"
        super().__init__(input_size, hidden_size, num_layers, *args, **kwargs)


class GRU(_SwapLayer):
    """torch.nn.GRU with a penalty on swaps of its inputs; arguments, state_dict, outputs and errors are torch's.

    `swaps`, `compare` and `recompute` are those of sire_fast.RNN.
    """

    _torch_layer = nn.GRU
    mode = "GRU"


class LSTM(_SwapLayer):
    """torch.nn.LSTM with a penalty on swaps of its inputs; arguments, state_dict, outputs and errors are torch's.

    `swaps`, `compare` and `recompute` are those of sire_fast.RNN. The penalty compares h, the output; see
    sire_fast.penalty for c.
    """

    _torch_layer = nn.LSTM
    mode = "LSTM"
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden


_CONVERTED: dict[type, type[_SwapLayer]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}


def convert(
    model: nn.Module,
    swaps: Sampler | None = Adjacent(8),  # noqa: B008
    compare: str = "swap",
    recompute: bool = False,
) -> nn.Module:
    """Make every torch.nn.RNN, GRU and LSTM of a model a sire_fast layer, in place.

    The layers stay the objects they are: parameters, hooks, names in the state_dict and an optimiser's references
    to the parameters remain valid. Layers that are sire_fast's already get the new settings.

    Args:
        model: a module that holds recurrent layers, or is one.
        swaps: sampler of the pairs, see sire_fast.swaps.
        compare: "swap" or "end", see sire_fast.RNN.
        recompute: see sire_fast.RNN.

    Returns:
        The same model.

    Raises:
        ValueError: there is no recurrent layer in the model, or an argument is none of the expected.

    Example:
        >>> import sire_fast
        >>> model = nn.Sequential(nn.GRU(3, 5))
        >>> sire_fast.convert(model, swaps=sire_fast.swaps.Uniform(4), compare="end")
        Sequential(
          (0): GRU(3, 5, swaps=Uniform(k=4), compare=end)
        )
    """
    found = [module for module in model.modules() if isinstance(module, (nn.RNN, nn.GRU, nn.LSTM, _SwapLayer))]
    if not found:
        raise ValueError("model: expected a torch.nn.RNN, GRU or LSTM in it, found none")
    for module in found:
        kind = type(module)
        if isinstance(module, _SwapLayer):
            module._set_swaps(swaps, compare, recompute)
            continue
        if parametrize.is_parametrized(module):
            # torch made a class for this one module, whose base is the layer's and whose properties are the weights
            base = _CONVERTED.get(kind.__bases__[0])
            members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            converted = base and type(kind.__name__, (base,), members)
        else:
            converted = _CONVERTED.get(kind)
        if converted is None:
            warnings.warn(f"{kind.__name__} is a subclass of torch's layer and stays as it is", stacklevel=2)
            continue
        module.__class__ = converted
        module._set_swaps(swaps, compare, recompute)
    return model
