"""torch.nn.RNN, GRU and LSTM that also know how far a swap of two inputs moves them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from sire_fast import backends, graph, ops, passes
from sire_fast import swaps as samplers
from sire_fast.cells import CELLS, States
from sire_fast.ledger import WITHOUT_GRADIENT, Ledger, Note, Weight
from sire_fast.passes import Compared, Network, Pairs
from sire_fast.swaps import Adjacent, Sampler
from sire_fast.validation import check_lengths, readable, warn

_MODE_CELLS = {cell.mode: name for name, cell in CELLS.items()}
COMPARES = ("end", "swap")

Model = TypeVar("Model", bound=nn.Module)


class _SwapLayer(nn.RNNBase):
    """What makes a torch.nn layer one with swaps: it stands before torch's class among the bases."""

    mode: str
    weight_hh_l0: Tensor
    swaps: Sampler | None
    compare: str
    recompute: bool
    _ledger: Ledger

    def __init__(
        self,
        *args: Any,
        swaps: Sampler | None = None,
        compare: str = "end",
        weight: Weight | None = None,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_swaps(swaps, compare, weight, recompute)

    def _set_swaps(self, swaps: Sampler | None, compare: str, weight: Weight | None, recompute: bool) -> None:
        _check_settings(swaps, compare, weight)
        self._ledger = Ledger(weight)
        self.swaps, self.compare, self.recompute = swaps, compare, recompute
        self._exchanged = self._warned = False

    def extra_repr(self) -> str:
        swaps = "" if self.swaps is None else f", swaps={self.swaps}, compare={self.compare}"
        weight = "" if self._ledger.weight is None else f", weight={self._ledger.weight}"
        return super().extra_repr() + swaps + weight + ", recompute=True" * self.recompute

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if type(self) in _made.values():  # no name leads to it
            return _rebuilt, (_torch_class(type(self)), self.__getstate__())
        return super().__reduce_ex__(protocol)

    def __setattr__(self, name: str, value: Any) -> None:
        # a subclass may have one of its own
        if name == "weight" and not hasattr(self, name) and not isinstance(value, (nn.Module, nn.Parameter)):
            raise AttributeError(f"weight: {self} takes one from sire_fast.convert(model, weight=...)")
        super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._ledger = self._ledger.of_this_thread()
        return replica

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(f"torch.jit.script cannot compile {self}: {_REVERT}")

    @property
    def qconfig(self) -> Any:
        """What torch.ao.quantization leaves at modules."""
        if "_qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self._qconfig

    @qconfig.setter
    def qconfig(self, config: Any) -> None:
        warn(f"torch.ao.quantization knows layers by their class and leaves {self} as it is: {_REVERT}")
        self._qconfig = config

    @qconfig.deleter
    def qconfig(self) -> None:
        del self._qconfig

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
        """What computes this layer in training, fused or all steps of the stacked variants: one of
        sire_fast.backends.BACKENDS, or "torch" for torch's own layer."""
        return passes.backend(self._network)

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
        proxies: list[Any] = [
            a for a in (input, lengths, *(hx if isinstance(hx, tuple) else (hx,))) if isinstance(a, fx.Proxy)
        ]
        if proxies:  # a leaf, as torch's layers are
            tracer, given = proxies[0].tracer, {"hx": hx} if lengths is None else {"hx": hx, "lengths": lengths}
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), given)
        if not self._swapping():
            output, last = self._plain(input, hx, lengths)
            if self.swaps is not None and not self.training and torch.is_grad_enabled():
                self._look_for_training(output, last)
            return output, last
        if self._ledger.watcher is None or torch.compiler.is_compiling():
            return self._with_variants(input, hx, lengths)
        unseen = graph.in_backward() or graph.in_transform()
        note = None if unseen else self._watch(input, hx, lengths)
        output, last = self._plain(input, hx, lengths)
        if note:
            note.ends_with(output.data if isinstance(output, PackedSequence) else output)
        return output, last

    def _plain(self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None) -> tuple[Any, Any]:
        """Torch's layer, on our kernels where they serve."""
        network = self._network
        # a trace would have to be made again for other batch sizes
        fixed = lengths is None and isinstance(input, Tensor) and not torch.compiler.is_compiling()
        reasons = passes.why_not_fused(network, swapping=False, batch=self._batch(input) if fixed else None)
        _refuse_if_forced(reasons)
        # a file is to be read where sire_fast is not installed; torch draws the dropout of packed rows, not of padded
        exporting = _exporting()
        packed = isinstance(input, PackedSequence) and self.training and self.num_layers > 1 and self.dropout > 0
        if self._is_torchs(input, hx) or (lengths is None and (reasons or exporting or packed)):
            return super().forward(input, hx)
        x, lengths, states, restore = self._unify(input, hx, lengths)
        output, last = passes.plain(network, x, lengths, states, on_kernels=not reasons)
        return _returned(output, output, last, restore)

    def _with_variants(self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None) -> tuple[Any, Any]:
        """The layer and its swapped variants, which the ledger is told of."""
        if _exporting() or torch.compiler._is_exporting_flag:  # is_exporting() is true of whatever torch 2.9 compiles
            raise RuntimeError(f"{self} cannot be exported in training mode: use model.eval(), or {_REVERT}")
        network = self._network
        if backends.forced():
            _refuse_if_forced(passes.why_not_fused(network, swapping=True))
        if self._is_torchs(input, hx):
            output, last = super().forward(input, hx)
            none = output.new_zeros(0, 1, output.shape[-1])
            compared = Compared(none.sum(-1), output, none[..., 0].long(), none, None, None)
            output, last = self._ledger.enter([], [], compared, output, last if self._two_states else (last,))
            return output, self._tuple(last)
        x, lengths, states, restore = self._unify(input, hx, lengths)
        pairs = self._draw(x, lengths)
        self._tell_if_nothing(len(x), pairs.swaps)
        output, last, compared = passes.with_swaps(network, x, lengths, states, pairs)
        weights = [w for layer in network.weights for direction in layer for w in direction]
        return _returned(output, *self._ledger.enter(weights, [x, *states], compared, output, last), restore)

    @torch.no_grad()
    def _watch(self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None) -> Note:
        """Tell the ledger the penalty, and leave no trace: the random numbers of dropout are drawn again afterwards."""
        if self._is_torchs(input, hx):
            return self._ledger.note(self.weight_hh_l0.new_zeros(0))
        x, lengths, states, _ = self._unify(input, hx, lengths)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            pairs = self._draw(x, lengths, self._ledger.watcher)
            self._tell_if_nothing(len(x), pairs.swaps)
            return self._ledger.note(passes.with_swaps(self._network, x, lengths, states, pairs)[-1].penalty)

    def _look_for_training(self, output: Any, last: Any) -> None:
        """Tell if somebody trains this layer in evaluation mode, in which its penalty is 0."""
        if not torch.compiler.is_compiling() and not _exporting():
            output = output.data if isinstance(output, PackedSequence) else output
            results = [output, *(last if self._two_states else (last,))]
            self._ledger.look_for_training(self.parameters(), results)

    def _is_torchs(self, input: Tensor | PackedSequence, hx: Any) -> bool:
        """Whether torch's own forward is to answer: with an error, where the input's form or device, or the states'
        form, device or dtype, does not fit, or with empty tensors."""
        weight = self.weight_hh_l0
        if isinstance(input, Tensor) and (
            0 in input.shape[:-1] or input.dim() not in (2, 3) or input.device != weight.device
        ):
            return True
        if hx is None:
            return False
        states = hx if self._two_states else (hx,)
        if len(states) != (2 if self._two_states else 1) or not all(isinstance(s, Tensor) for s in states):
            return True
        if isinstance(input, Tensor) and any(s.dim() != input.dim() or s.device != input.device for s in states):
            return True
        fits = all(s.dtype == weight.dtype for s in states)
        return not fits and not torch.is_autocast_enabled(weight.device.type)

    def _swapping(self) -> bool:
        """Whether a forward runs variants, now."""
        if self.swaps is None or not self.training:
            return False
        if torch.is_grad_enabled():
            return True
        if not torch.compiler.is_compiling() and graph.runs_again() is not None:
            return True
        self._ledger.skip(WITHOUT_GRADIENT)
        return False

    def _batch(self, input: Any) -> int:
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
            self.check_forward_args(input.data, self._tuple(states), input.batch_sizes)
            return x, lengths.to(x.device), states, lambda y, last: (_pack_as(input, y), self._tuple(last))

        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if hx is not None and not batched:
            hx = tuple(s.unsqueeze(1) for s in hx) if self._two_states else hx.unsqueeze(1)
        states = self._initial(x.transpose(0, 1) if self.batch_first else x, hx)
        self.check_forward_args(x, self._tuple(states), None)

        def restore(output: Tensor, last: States) -> tuple[Any, Any]:
            # in place: what is returned must not be a view, which could not be detached in place
            output = output.transpose_(0, 1) if self.batch_first else output
            if not batched:
                output, last = output.squeeze_(batch_dim), tuple(s.squeeze_(1) for s in last)
            return output, self._tuple(last)

        if self.batch_first:  # a copy, as torch has it: the caller may change the input
            x = x.transpose(0, 1).contiguous()
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
            check_lengths(x.shape[0], x.shape[1], lengths)
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

    def _draw(self, x: Tensor, lengths: Tensor | None, generator: torch.Generator | None = None) -> Pairs:
        """From the sampler."""
        _check_compare(self.compare)  # which may have been set since
        steps, batch, _ = x.shape
        if lengths is not None and isinstance(self.swaps, Adjacent) and self.swaps.k == "all":
            # as many as T has, whatever the lengths: a device need not be asked for their maximum
            pairs = samplers.draw(self.swaps, steps, batch, generator, x.device)
            pairs = torch.where((pairs[..., 1] < lengths[:, None])[..., None], pairs, 0)
        else:
            pairs = samplers.draw(self.swaps, steps if lengths is None else lengths, batch, generator, x.device)
        return Pairs(pairs, self.compare, passes.longest_span(self.swaps, self.compare))

    def _tell_if_nothing(self, steps: int, pairs: Tensor) -> None:
        """Warn once of sequences of one step, or of swaps that exchange nothing while none has exchanged anything."""
        if self._warned or torch.compiler.is_compiling() or (steps > 1 and self._exchanged):
            return
        seen = graph.in_mode()  # by a trace, perhaps, which cannot give a value
        if steps > 1 and (seen or not readable(pairs)):
            return
        self._exchanged = steps > 1 and not torch.equal(pairs[..., 0], pairs[..., 1])
        if not self._exchanged:
            self._warned = True
            length = f"{steps} step{'s' * (steps > 1)}"
            warn(
                f"{self}: nothing to swap in sequences of {length}, whose penalty is 0; give it whole sequences in one "
                "call, or convert it with swaps=None"
            )


def _exporting() -> bool:
    """Whether torch.jit.trace or torch.onnx looks on, which uses it or torch.export; torch.export alone keeps our
    operator, for any number of steps."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def _refuse_if_forced(reasons: list[str]) -> None:
    if reasons and backends.forced():
        raise NotImplementedError(f"{backends.forced()}: cannot run this layer: {'; '.join(reasons)}")


def _returned(run: Tensor, output: Tensor, last: States, restore: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    """Results in the form of the input. They share the memory of those of the pass, `run`, which has to know when a
    program changes them in place."""
    if torch.compiler.is_compiling():
        return restore(output, last)
    node = run.grad_fn  # before it is transposed in place
    result = restore(output, last)
    ops.watch(node, result[0])
    return result


def _pack_as(like: PackedSequence, padded: Tensor) -> PackedSequence:
    """A padded (T, B, D) in the form of a packed input."""
    if like.sorted_indices is not None:
        padded = padded[:, like.sorted_indices]
    step = torch.repeat_interleave(torch.arange(len(like.batch_sizes), device="cpu"), like.batch_sizes)
    row = torch.cat([torch.arange(n, device="cpu") for n in like.batch_sizes.tolist()])
    data = padded[step.to(padded.device), row.to(padded.device)]
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


class RNN(_SwapLayer, nn.RNN):
    """torch.nn.RNN with a penalty on swaps of its inputs; arguments, state_dict, outputs and errors are torch's.

    Args:
        swaps: sampler of the pairs that are exchanged in training mode (sire_fast.swaps), or None for a plain layer.
        compare: "end" compares the states after the whole sequence, "swap" those after the later position of a pair.
            With several layers the output of the last is compared; with two directions the forward state after the
            pair, or at the end, and the backward state after the pair, or at the start.
        weight: None where sire_fast.penalty(model) is added to the loss. Else the gradient of weight * penalty joins
            in the backward of the layer's outputs: a number, a 0-d tensor, or a function that gives one of them and is
            asked in every backward (a scheduler; under a loss scale, lambda: 0.1 * scaler.get_scale()). It gets no
            gradient: one that is learned is refused.
        recompute: keep no gates for the backward but compute them again: less memory, more time (a fused layer's).

    The remaining arguments are those of torch.nn.RNN. Swaps are drawn from torch's own random numbers, in training mode
    with gradients only. A sequence and its variants share the dropout masks between layers.

    Raises:
        ValueError: an argument is none of the expected.

    Example:
        >>> import torch, sire_fast
        >>> layer = sire_fast.RNN(3, 5, swaps=sire_fast.swaps.Uniform(2), compare="end")
        >>> output, h_n = layer(torch.randn(7, 4, 3))
        >>> sire_fast.penalty(layer).shape
        torch.Size([])
    """


class GRU(_SwapLayer, nn.GRU):
    """torch.nn.GRU with a penalty on swaps of its inputs; arguments, state_dict, outputs and errors are torch's.

    `swaps`, `compare`, `weight` and `recompute` are those of sire_fast.RNN.
    """


class LSTM(_SwapLayer, nn.LSTM):
    """torch.nn.LSTM with a penalty on swaps of its inputs; arguments, state_dict, outputs and errors are torch's.

    `swaps`, `compare`, `weight` and `recompute` are those of sire_fast.RNN. The penalty compares h, the output; see
    sire_fast.penalty for c.
    """


# ---------------------------------------------------------------- from torch's layers, and back

_REVERT = "sire_fast.revert(model) makes its layers torch.nn's own again, first"

# what ours holds, and all names of its own
_SETTINGS = ("swaps", "compare", "recompute", "_exchanged", "_warned", "_ledger")
_OWN = (*_SETTINGS, *(n for n in vars(_SwapLayer) if not hasattr(nn.RNNBase, n) and n not in ("forward", "qconfig")))

# torch's class -> that with swaps
_classes: dict[type, type[_SwapLayer]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}
# so for subclasses of torch's
_made: dict[type, type[_SwapLayer]] = {}


def _swap_class(kind: type[nn.RNNBase]) -> type[_SwapLayer]:
    """The class with swaps of torch's class or of a subclass of it, in whose order ours comes right before torch's."""
    if kind in _classes:
        return _classes[kind]
    if kind not in _made:
        ours = next(_classes[base] for base in kind.__mro__ if base in _classes)
        names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        try:
            _made[kind] = types.new_class(kind.__name__, (kind, ours), exec_body=lambda body: body.update(names))
        except TypeError as error:  # of a metaclass, or of __init_subclass__
            raise ValueError(f"model: {kind.__name__} cannot be derived from: {error}") from error
    return _made[kind]


def _torch_class(kind: type[_SwapLayer]) -> type[nn.RNNBase]:
    """The class of torch's, or the subclass of it, that a class with swaps was made from."""
    for torchs, ours in (*_classes.items(), *_made.items()):
        if kind is ours:
            return torchs
    raise ValueError(f"model: {kind.__name__} is a subclass of a sire_fast layer, of which torch has none")


def _class_of(module: nn.RNNBase, other: Callable[[type], type]) -> type:
    """The other class that a module is to get."""
    kind = type(module)
    if not parametrize.is_parametrized(module):
        return other(kind)
    # torch made a class for this one module, whose base is the layer's and whose properties are the weights
    members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (other(kind.__bases__[0]),), members)


def _rebuilt(kind: type[nn.RNNBase], state: dict[str, Any]) -> _SwapLayer:
    """A layer of a class that `convert` has made, from a file."""
    made = _swap_class(kind)
    layer = made.__new__(made)
    layer.__setstate__(state)
    return layer


# what a file of a whole model names; reading it runs nothing but what is written above
torch.serialization.add_safe_globals([RNN, GRU, LSTM, Ledger, _rebuilt, *samplers._Drawn.__subclasses__()])


def _check_settings(swaps: Any, compare: str, weight: Any) -> None:
    if swaps is not None and not samplers.is_sampler(swaps):
        raise ValueError(f"swaps: expected a sampler (see sire_fast.swaps) or None, got {swaps!r}")
    _check_compare(compare)
    if swaps is None and weight is not None:
        raise ValueError(f"weight: expected None without swaps, which alone have a penalty, got {weight!r}")


def _check_compare(compare: str) -> None:
    if compare not in COMPARES:
        raise ValueError(f"compare: expected one of {', '.join(COMPARES)}, got {compare!r}")


def has_own_forward(layer: nn.RNNBase) -> bool:
    """Whether a layer runs another forward than torch's or ours, of a subclass or of its own."""
    known = (_SwapLayer.forward, nn.RNN.forward, nn.GRU.forward, nn.LSTM.forward)
    return "forward" in vars(layer) or type(layer).forward not in known


def _check_forward(name: str, module: nn.RNNBase) -> None:
    """A ValueError if a layer does not run torch's own forward, which alone is known to be that of a recurrent layer.
    That of a mixin, which knows no layer and so calls whichever comes behind it, finds ours there."""
    kind, name = type(module), name or "the layer"
    if "forward" in module.__dict__:
        raise ValueError(f"model: the forward of {name} ({kind.__name__}) was replaced; convert the model before that")
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    if owner not in _classes and issubclass(owner, tuple(_classes)):
        raise ValueError(
            f"model: {name} is a {kind.__name__}, which has a forward of its own: derive {owner.__name__} from "
            "sire_fast's layer, or use sire_fast.swap_penalty(model, x, swaps)"
        )


def _check_names(name: str, module: nn.RNNBase) -> None:
    """A ValueError if a layer has something under a name that ours uses."""
    taken = next((own for own in _OWN if hasattr(module, own)), None)
    if taken:
        raise ValueError(
            f"model: {name or 'the layer'} ({type(module).__name__}) has a {taken!r} of its own, a name of sire_fast's "
            "layer: rename it"
        )


def convert(
    model: Model,
    swaps: Sampler | None = Adjacent(8),  # noqa: B008
    compare: str = "swap",
    weight: Weight | None = None,
    recompute: bool = False,
) -> Model:
    """Make every torch.nn.RNN, GRU and LSTM of a model a sire_fast layer, in place.

    The layers stay the objects they are, and torch's layers to isinstance: parameters, hooks, names in the state_dict
    and an optimiser's references to the parameters remain valid. Subclasses of torch's layers that leave `forward`
    alone become such layers, too. Layers that are sire_fast's already get the new settings.

    Args:
        model: a module that holds recurrent layers, or is one.
        swaps: sampler of the pairs, see sire_fast.swaps.
        compare: "swap" or "end", see sire_fast.RNN.
        weight: of the penalty, which then joins by itself, see sire_fast.RNN; None to add sire_fast.penalty(model) to
            the loss.
        recompute: see sire_fast.RNN.

    Returns:
        The same model.

    Raises:
        ValueError: there is no recurrent layer in the model, one has a forward of its own, or an argument is none of
            the expected; the model is as it was.

    Example:
        >>> import sire_fast
        >>> model = nn.Sequential(nn.GRU(3, 5))
        >>> sire_fast.convert(model, swaps=sire_fast.swaps.Uniform(4), compare="end")
        Sequential(
          (0): GRU(3, 5, swaps=Uniform(k=4), compare=end)
        )
    """
    _check_settings(swaps, compare, weight)
    Ledger(weight)  # checks it
    found: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if isinstance(m, (nn.RNN, nn.GRU, nn.LSTM))
    ]
    if not found:
        raise ValueError("model: expected a torch.nn.RNN, GRU or LSTM in it, found none (cells have no sequence)")
    torchs = [(name, m) for name, m in found if not isinstance(m, _SwapLayer)]
    for name, module in torchs:
        _check_forward(name, module)
        _check_names(name, module)
    kinds = [_class_of(module, _swap_class) for _, module in torchs]
    for (_, module), kind in zip(torchs, kinds, strict=True):
        module.__class__ = kind
    for _, module in found:
        module._set_swaps(swaps, compare, weight, recompute)
    return model


def revert(model: Model) -> Model:
    """Make every sire_fast layer of a model torch.nn's own layer again, in place: for export, quantisation and
    deployment, and for files that are read where sire_fast is not installed.

    The layers stay the objects they are, with the same parameters; their swaps and weights are forgotten. For a copy:
    revert(copy.deepcopy(model)).

    Args:
        model: a module that holds sire_fast layers, or is one. Without any nothing happens.

    Returns:
        The same model.

    Raises:
        ValueError: a layer is of a subclass of sire_fast's, or its forward was replaced; the model is as it was.

    Example:
        >>> import sire_fast
        >>> type(revert(sire_fast.GRU(3, 5, swaps=sire_fast.swaps.Uniform(4)))) is nn.GRU
        True
    """
    found = [m for m in model.modules() if isinstance(m, _SwapLayer)]
    for module in found:
        if "forward" in module.__dict__:
            raise ValueError(f"model: the forward of {module} was replaced on the object; undo that before revert")
    kinds = [_class_of(module, _torch_class) for module in found]
    for module, kind in zip(found, kinds, strict=True):
        for name in (*_SETTINGS, "_qconfig"):
            module.__dict__.pop(name, None)
        module.__class__ = kind
    return model
