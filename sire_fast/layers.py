"""torch.nn.RNN, GRU and LSTM that also know how far a swap of two inputs moves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from sire_fast import backends, passes
from sire_fast.cells import CELLS, States
from sire_fast.passes import Compared, Network, Pairs
from sire_fast.reference import check_lengths
from sire_fast.swaps import Adjacent, Sampler

_MODE_CELLS = {cell.mode: name for name, cell in CELLS.items()}
COMPARES = ("end", "swap")


class _SwapLayer(nn.RNNBase):
    """What the three layers share: a torch.nn layer with `swaps`, `compare` and the pass over the variants."""

    _torch_layer: type[nn.RNNBase]
    mode: str
    swaps: Sampler | None
    compare: str
    recompute: bool
    _last: Compared | None

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
        return passes.why_not_fused(self._network, swapping=batch is None and self.swaps is not None, batch=batch)

    @property
    def backend(self) -> str:
        """What runs this layer in training with swaps: one of sire_fast.backends.BACKENDS, or "torch" for torch's own
        layer."""
        return "torch" if self.why_not_fused() else backends.choose("auto", **self._network.call)

    @property
    def _network(self) -> Network:
        """The layer as a pass sees it."""
        directions = 2 if self.bidirectional else 1
        weights = [tuple(getattr(self, name) for name in names) for names in self._all_weights]
        return Network(
            _MODE_CELLS[self.mode],
            tuple(tuple(weights[n : n + directions]) for n in range(0, len(weights), directions)),
            self.bias,
            self.proj_size > 0,
            self.dropout,
            self.training,
            self.recompute,
        )

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
        swapping, network = self.swaps is not None and self.training, self._network
        # a trace would have to be made again for other batch sizes
        fixed = not swapping and lengths is None and isinstance(input, Tensor) and not torch.compiler.is_compiling()
        reasons = passes.why_not_fused(network, swapping=swapping, batch=self._batch(input) if fixed else None)
        if reasons and backends.forced():
            raise NotImplementedError(f"{backends.forced()}: cannot run this layer: {'; '.join(reasons)}")
        if reasons and not swapping and lengths is None:
            return self._torch_layer.forward(self, input, hx)
        x, lengths, states, restore = self._unify(input, hx, lengths)
        if swapping:
            pairs = Pairs(self._draw(x, lengths), self.compare, self._longest)
            output, last, self._last = passes.with_swaps(network, x, lengths, states, pairs)
        else:
            output, last = passes.plain(network, x, lengths, states, on_kernels=not reasons)
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
        layers = self.num_layers * (2 if self.bidirectional else 1)
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

    @property
    def _longest(self) -> int | None:
        """Steps of the longest span that the sampler can give."""
        reach = getattr(self.swaps, "reach", None) if self.compare == "swap" else None
        return None if reach is None else reach + 1


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
