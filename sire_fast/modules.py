"""torch.nn.RNN, GRU and LSTM that also know how far a swap of two inputs moves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from sire_fast import backends, cpu, functional, triton
from sire_fast.cells import CELLS, States
from sire_fast.reference import check_swaps, fill_defaults, with_variants
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
        """The reasons why this layer runs torch's own layer, on the stacked variants in training, and not a fused
        kernel; none if it runs the kernel.

        Args:
            batch: asks about a pass without swaps (in evaluation, or of a plain layer) over so many sequences, which
                torch's own layer may do faster on a CPU.
        """
        reasons = []
        if self.num_layers > 1:
            reasons.append(f"num_layers={self.num_layers}: fused for one layer")
        if self.bidirectional:
            reasons.append("bidirectional=True: fused for one direction")
        if self.proj_size:
            reasons.append(f"proj_size={self.proj_size}: fused without a projection")
        reasons += backends.why_no_kernel(**self._call)
        if not reasons and not backends.forced():
            call = self._call
            if call.pop("device").type == "cuda":
                reasons = triton.slower_than_torch(**call)
            elif batch is not None:
                reasons = cpu.slower_than_torch(**call, batch=batch)
        return reasons

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

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As torch.nn's layer: same arguments, result and errors. In training mode and with swaps it also runs the
        swapped variants; sire_fast.penalty(model) then gives their penalty."""
        self._last = None
        swapping = self.swaps is not None and self.training
        # a trace would have to be made again for other batch sizes
        fixed = not swapping and isinstance(input, Tensor) and not torch.compiler.is_compiling()
        reasons = self.why_not_fused(self._batch(input) if fixed else None)
        fused = not reasons
        if reasons and backends.forced():
            raise NotImplementedError(f"{backends.forced()}: cannot run this layer: {'; '.join(reasons)}")
        if not swapping and not fused:
            return self._torch_layer.forward(self, input, hx)
        x, lengths, states, restore = self._unify(input, hx)
        pairs = self._draw(x, lengths) if swapping else None
        output, last = (self._fused if fused else self._stacked)(x, lengths, states, pairs)
        return restore(output, last)

    def _batch(self, input: Tensor) -> int:
        return 1 if input.dim() < 3 else input.shape[0 if self.batch_first else 1]

    def _unify(
        self, input: Tensor | PackedSequence, hx: Any
    ) -> tuple[Tensor, Tensor | None, States, Callable[[Tensor, States], tuple[Any, Any]]]:
        """The input as (T, B, I) with its lengths, the initial states as (layers, B, H), and what makes outputs of
        that form into outputs of the input's form."""
        if isinstance(input, PackedSequence):
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

        return x.transpose(0, 1) if self.batch_first else x, None, states, restore

    @property
    def _two_states(self) -> bool:
        return self.mode == "LSTM"

    def _tuple(self, states: States) -> Any:
        return states if self._two_states else states[0]

    def _initial(self, x: Tensor, hx: Any) -> States:
        if hx is not None:
            return tuple(hx) if self._two_states else (hx,)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = x.new_zeros(layers, x.shape[1], self.proj_size or self.hidden_size)
        return (h, x.new_zeros(layers, x.shape[1], self.hidden_size)) if self._two_states else (h,)

    def _draw(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Pairs (B, K, 2) from the sampler."""
        steps, batch, _ = x.shape
        return self.swaps(steps if lengths is None else lengths, batch, None, x.device)  # type: ignore[misc]

    def _ends(self, x: Tensor, lengths: Tensor | None, pairs: Tensor) -> Tensor:
        """The step at which each variant is compared, (B, K)."""
        return pairs[..., 1] if self.compare == "swap" else fill_defaults(x, pairs, None, lengths)[0]

    @property
    def _longest(self) -> int | None:
        """Steps of the longest span that the sampler can give."""
        reach = getattr(self.swaps, "reach", None) if self.compare == "swap" else None
        return None if reach is None else reach + 1

    def _weights(self, layer: int) -> list[Tensor]:
        directions = 2 if self.bidirectional else 1
        names = self._all_weights[layer * directions : (layer + 1) * directions]
        return [getattr(self, name) for group in names for name in group]

    def _fused(self, x: Tensor, lengths: Tensor | None, hx: States, pairs: Tensor | None) -> tuple[Tensor, States]:
        """One layer in one direction, on the operator."""
        w_ih, w_hh, *biases = self._weights(0)
        b_ih, b_hh = biases or (None, None)
        swaps = torch.empty(x.shape[1], 0, 2, dtype=torch.int64, device=x.device) if pairs is None else pairs
        ends = None if pairs is None else self._ends(x, lengths, pairs)
        run = functional.swap_rnn(
            self._cell,
            x.to(w_hh.dtype),  # under autocast the layers before may have lowered it
            w_hh,
            b_hh,
            *(s[0].to(w_hh.dtype) for s in hx),
            swaps=swaps,
            ends=ends,
            lengths=lengths,
            w_ih=w_ih,
            b_ih=b_ih,
            recompute=self.recompute,
            longest=self._longest,
        )
        if ends is not None:
            self._last = Pass(run.penalty, run.output, ends, run.variants, run.cells, run.variant_cells)
        last = (run.h_n,) if run.c_n is None else (run.h_n, run.c_n)
        return run.output, tuple(s[None] for s in last)

    def _stacked(self, x: Tensor, lengths: Tensor | None, hx: States, pairs: Tensor) -> tuple[Tensor, States]:
        """Any layer: torch's, one after the other, on the original and its variants as one batch."""
        steps, batch, _ = x.shape
        check_swaps(x, pairs, lengths)
        rows = 1 + pairs.shape[1]
        y = with_variants(x, pairs).flatten(1, 2)  # (T, B * (1 + K), I)
        states = tuple(s.repeat_interleave(rows, 1) for s in hx)
        stacked_lengths = None if lengths is None else lengths.repeat_interleave(rows).cpu()
        directions = 2 if self.bidirectional else 1
        last = []
        for layer in range(self.num_layers):
            start = tuple(s[layer * directions : (layer + 1) * directions] for s in states)
            y, *ended = self._torch_pass(layer, y, stacked_lengths, start)
            last.append(ended)
            if layer < self.num_layers - 1 and self.dropout:
                # one mask for a sequence and its variants: their difference must not hold dropout noise
                mask = nn.functional.dropout(y.new_ones(steps, batch, 1, y.shape[-1]), self.dropout)
                y = (y.unflatten(1, (batch, rows)) * mask).flatten(1, 2)
        y = y.unflatten(1, (batch, rows))  # (T, B, 1 + K, D)
        final = tuple(torch.cat(s).unflatten(1, (batch, rows)) for s in zip(*last, strict=True))

        base, variants = self._compared(y, pairs, self._ends(x, lengths, pairs))
        cells = variant_cells = None
        if self._two_states and self.compare == "end":  # torch gives c after the last step only
            ended_cells = torch.cat(final[1][-directions:].unbind(0), -1)  # (B, 1 + K, directions * H)
            cells, variant_cells = ended_cells[None, :, 0].expand(rows - 1, -1, -1), ended_cells[:, 1:]
        at = torch.arange(rows - 1, device=x.device).expand(batch, -1)
        each = (variants - base).square().sum(-1)
        self._last = Pass(each, base.transpose(0, 1), at, variants, cells, variant_cells)
        return y[:, :, 0], tuple(s[:, :, 0] for s in final)

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
        run = getattr(torch._VF, self._cell)
        start = list(hx) if self._two_states else hx[0]
        settings = (self._weights(layer), self.bias, 1, 0.0, self.training, self.bidirectional)
        if lengths is None:
            return run(x, start, *settings, False)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        start = [s[:, order] for s in hx] if self._two_states else hx[0][:, order]
        data, *last = run(packed.data, packed.batch_sizes, start, *settings)
        output, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
        return output, *(s[:, back] for s in last)


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

    The remaining arguments are those of torch.nn.RNN. Swaps are drawn from torch's own random numbers.

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
