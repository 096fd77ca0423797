"""A layer of ours where torch's was: who it says it is, what it returns, and what else programs do with recurrent
layers."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from stand_ins import KINDS, OPTIONS, PAIRS, X, gradients, last_h, pair_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import sire_fast
from sire_fast import backends
from sire_fast.schedules import AdaptiveSwaps, AdaptiveWeight
from sire_fast.swaps import Adjacent, Uniform

# ---------------------------------------------------------------- a layer is torch's layer


def test_is_an_instance_of_torchs_class(kind: type[nn.RNNBase]) -> None:
    theirs, ours = pair_of(kind, 3, 4)
    assert isinstance(ours, kind)
    assert isinstance(getattr(sire_fast, kind.__name__)(3, 4), kind)
    others = [k for k in KINDS.values() if k is not kind]
    assert not any(isinstance(ours, k) for k in others)

    def told(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)[0] + 1 if isinstance(layer, kind) else layer(x)[0]

    torch._dynamo.reset()
    x = torch.randn(5, 2, 3)
    compiled = torch.compile(told, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ours, x), told(theirs, x))


class Flexible(nn.LSTM):
    """A layer with one method more."""

    def zeros(self, batch: int) -> Tensor:
        return torch.zeros(self.num_layers, batch, self.hidden_size)


class Mixin(ABC, nn.RNNBase):
    """Of libraries that write their own class over several of torch's, with a forward around whichever it is."""

    @abstractmethod
    def name(self) -> str: ...

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        output, last = super().forward(x, hx=hx)
        return 2 * output, last


class Mixed(Mixin, nn.GRU):
    def name(self) -> str:
        return "mixed"


class Residual(nn.GRU):
    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        output, last = super().forward(x, hx)
        return output + x, last


class Deeper(Residual):
    pass


@pytest.mark.parametrize("made", [Flexible, Mixed])
def test_subclasses_that_leave_forward_alone_are_converted(made: type[nn.RNNBase]) -> None:
    layer, x = made(4, 4), torch.randn(5, 2, 4)
    expected = layer(x)
    weights = dict(layer.named_parameters())
    assert sire_fast.convert(layer, swaps=PAIRS, compare="end") is layer
    assert isinstance(layer, made)
    assert isinstance(layer, sire_fast.layers._SwapLayer)
    assert layer.zeros(2).shape == (1, 2, 4) if made is Flexible else layer.name() == "mixed"
    torch.testing.assert_close(layer(x), expected)
    assert sire_fast.penalty(layer) > 0
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.swaps == PAIRS
        torch.testing.assert_close(twin(x), expected)
    assert type(sire_fast.revert(layer)) is made
    assert all(weights[name] is p for name, p in layer.named_parameters())
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("made", [Residual, Deeper])
def test_subclasses_with_a_forward_of_their_own_are_refused(made: type[nn.RNNBase]) -> None:
    model = nn.ModuleDict({"first": nn.GRU(4, 4), "second": made(4, 4)})
    with pytest.raises(ValueError, match=rf"model: second is a {made.__name__}, .*derive Residual from sire_fast's"):
        sire_fast.convert(model)
    assert type(model["first"]) is nn.GRU  # all or nothing


def test_a_forward_replaced_on_the_object_is_refused() -> None:
    layer = nn.GRU(4, 4)
    layer.forward = lambda x: nn.GRU.forward(layer, x)
    with pytest.raises(ValueError, match=r"the forward of the layer \(GRU\) was replaced; convert the model before"):
        sire_fast.convert(layer)


class Setting(nn.GRU):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.compare = "mine"


class Weight(nn.GRU):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.swaps = nn.Parameter(torch.ones(2))


class Method(nn.GRU):
    def _draw(self) -> str:
        return "a picture"


@pytest.mark.parametrize(("made", "taken"), [(Setting, "compare"), (Weight, "swaps"), (Method, "_draw")])
def test_names_that_a_subclass_has_for_itself_are_refused(made: type[nn.RNNBase], taken: str) -> None:
    model = nn.ModuleDict({"first": nn.GRU(4, 4), "second": made(4, 4)})
    with pytest.raises(ValueError, match=rf"model: second \({made.__name__}\) has a '{taken}' of its own.* rename it"):
        sire_fast.convert(model)
    assert type(model["first"]) is nn.GRU


def test_errors_leave_the_model_as_it_was() -> None:
    for options in ({"compare": "middle"}, {"swaps": 4}, {"weight": -1}, {"weight": "much"}, {"weight": torch.ones(2)}):
        layer = nn.GRU(3, 4)
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            sire_fast.convert(layer, **options)
        assert type(layer) is nn.GRU


def test_parametrizations_come_and_go() -> None:
    for first in (sire_fast.convert, lambda layer: layer):
        layer = parametrizations.weight_norm(first(nn.GRU(3, 4)), "weight_hh_l0")
        sire_fast.convert(layer, swaps=PAIRS)
        x = torch.randn(5, 2, 3)
        expected = layer(x)
        assert isinstance(layer, sire_fast.GRU)
        parametrize.remove_parametrizations(layer, "weight_hh_l0")
        assert type(layer) is sire_fast.GRU
        torch.testing.assert_close(layer(x), expected)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    sire_fast.revert(layer)
    assert not isinstance(layer, sire_fast.GRU)
    torch.testing.assert_close(layer(x), expected)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.GRU


@pytest.mark.parametrize(
    ("swaps", "weight"),
    [(Uniform(2), 0.1), (AdaptiveSwaps(Uniform(2)), AdaptiveWeight(0.1))],
    ids=["fixed", "adaptive"],
)
def test_a_model_is_read_with_torchs_classes_alone_allowed(swaps: Any, weight: Any) -> None:
    model = nn.Sequential(Flexible(3, 4), nn.LSTM(4, 5))
    sire_fast.convert(model, swaps=swaps, weight=weight)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    allowed = [nn.Sequential, nn.LSTM, Flexible, set, dict]
    with torch.serialization.safe_globals(allowed):
        twin = torch.load(file, weights_only=True)
    assert [type(m) for m in twin] == [type(m) for m in model]
    assert repr(twin) == repr(model)
    torch.testing.assert_close(twin[1](torch.ones(3, 2, 4))[0], model[1](torch.ones(3, 2, 4))[0])


def test_revert_gives_torchs_layer_back(kind: type[nn.RNNBase]) -> None:
    theirs, ours = pair_of(kind, 3, 4, num_layers=2)
    before, parameters = set(vars(theirs)), list(ours.parameters())
    assert sire_fast.revert(ours) is ours
    assert type(ours) is kind
    assert set(vars(ours)) == before
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert sire_fast.revert(nn.Linear(2, 2)).weight.shape == (2, 2)

    class Own(sire_fast.GRU):
        pass

    with pytest.raises(ValueError, match="Own is a subclass of a sire_fast layer"):
        sire_fast.revert(Own(3, 4))
    layer = sire_fast.GRU(3, 4)
    layer.forward = lambda x: sire_fast.GRU.forward(layer, x)
    with pytest.raises(ValueError, match=r"the forward of GRU\(3, 4\) was replaced"):
        sire_fast.revert(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refusals_name_the_way_back() -> None:
    layer = sire_fast.GRU(3, 4, swaps=PAIRS)
    x = torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"sire_fast\.revert\(model\)"):
        torch.jit.script(layer)
    with pytest.raises(RuntimeError, match=r"sire_fast\.revert\(model\)"):
        torch.jit.trace(layer, x)
    with pytest.raises(Exception, match=r"sire_fast\.revert\(model\)"):  # of torch's own kind
        torch.export.export(layer, (x,))
    torch.jit.script(sire_fast.revert(copy.deepcopy(layer)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
def test_quantisation_does_not_skip_a_layer_in_silence() -> None:
    model = sire_fast.convert(nn.Sequential(nn.LSTM(3, 4)))
    with pytest.warns(UserWarning, match=r"sire_fast.*torch\.ao\.quantization .*sire_fast\.revert\(model\)"):
        torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    quantized = torch.ao.quantization.quantize_dynamic(sire_fast.revert(model), {nn.LSTM})
    assert "Dynamic" in repr(quantized)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_traces_hold_torchs_own_layer(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """A file that is read where sire_fast is not installed."""
    _, ours = pair_of(kind, 3, 4, **options)
    x = torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(ours.eval(), x)
    assert "sire_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), ours(x))


def test_fx_has_it_as_a_leaf(kind: type[nn.RNNBase]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0].relu()

    model = Net()
    theirs = torch.fx.symbolic_trace(model).graph
    sire_fast.convert(model, swaps=PAIRS, compare="end")
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [(n.op, str(n.target)) for n in theirs.nodes]
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(traced(x), model(x))
    assert sire_fast.penalty(traced) > 0


# ---------------------------------------------------------------- what comes out of a layer


def _uses() -> Iterator[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    yield "detach_", lambda output, last: output.sum() + last_h(last).detach_().sum()
    yield "detach output", lambda output, last: output.detach_().sum() + last_h(last).sum()
    yield "mul_", lambda output, last: output.mul_(torch.arange(output.numel()).view_as(output)).sum()
    yield "relu_", lambda output, last: nn.functional.relu(output, inplace=True).square().sum() + last_h(last).sum()
    yield "zeros", lambda output, last: output[:, 1:].zero_().sum() + output.square().sum()
    yield "assign", lambda output, last: (output.__setitem__((slice(None), slice(1, None)), 0.5), output.sin().sum())[1]
    yield "state", lambda output, last: last_h(last).add_(1).square().sum() + output.square().sum()


@pytest.mark.parametrize("use", [use for _, use in _uses()], ids=[name for name, _ in _uses()])
@pytest.mark.parametrize("form", ["plain", "swaps", "weight", "eval"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["RNN", "GRU"], indirect=True)  # torch's own LSTM refuses most of it
def test_outputs_may_be_changed_in_place(
    kind: type[nn.RNNBase], options: dict[str, Any], form: str, use: Callable[[Tensor, Any], Tensor]
) -> None:
    theirs, ours = pair_of(kind, 3, 4, **options)
    sire_fast.convert(ours, swaps=None if form == "plain" else PAIRS, weight=0.0 if form == "weight" else None)
    x, results = torch.randn(5, 2, 3), []
    for layer in (theirs, ours):
        layer.double().train(form != "eval")
        given = x.double().requires_grad_()
        loss = use(*layer(given))
        loss.backward()
        results.append((loss, given.grad, gradients(layer)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", ["plain", "swaps", "eval"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *itertools.product(KINDS, [*OPTIONS.values(), {"batch_first": True, "num_layers": 2, "bidirectional": True}]),
        ("LSTM", {"proj_size": 3}),
    ],
    indirect=["kind"],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_outputs_lie_in_memory_as_torchs(kind: type[nn.RNNBase], options: dict[str, Any], form: str) -> None:
    theirs, ours = pair_of(kind, 3, 4, **options)
    sire_fast.convert(ours, swaps=None if form == "plain" else PAIRS)
    for x in (torch.randn(5, 2, 3), torch.randn(5, 3)):
        results, detaches = [], False
        for layer in (theirs, ours):
            output, last = layer.train(form != "eval")(x)
            tensors = [output, *(last if isinstance(last, tuple) else (last,))]
            results.append([(t.shape, t.is_contiguous(), t.dtype) for t in tensors])
            if not any(t._is_view() for t in tensors):  # torch's are, unbatched
                detaches = True
            if detaches:
                for t in tensors:
                    t.detach_()
        assert results[0] == results[1]


def test_inputs_may_be_changed_where_torch_allows_it(kind: type[nn.RNNBase]) -> None:
    """A residual in place."""
    theirs, ours = pair_of(kind, 4, 4, batch_first=True)
    results = []
    for layer in (theirs, ours):
        leaf = torch.ones(2, 5, 4, requires_grad=True)
        x = leaf * torch.arange(4.0)
        x += layer(x)[0]
        x.square().sum().backward()
        results.append((leaf.grad, gradients(layer)))
    torch.testing.assert_close(*results)


def test_three_states_are_torchs_error() -> None:
    theirs, ours = pair_of(nn.LSTM, 3, 4)
    h = torch.zeros(1, 2, 4)
    for layer in (theirs, ours, sire_fast.convert(ours, swaps=None)):
        with pytest.raises(RuntimeError):
            layer(torch.randn(5, 2, 3), (h, h, h))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "swaps", "eval", "reference"])
def test_dtypes_under_autocast_are_torchs(
    kind: type[nn.RNNBase], dtype: torch.dtype, given: torch.dtype | None, form: str
) -> None:
    theirs, ours = pair_of(kind, 3, 4)
    sire_fast.convert(ours, swaps=None if form == "plain" else PAIRS)
    x = torch.randn(5, 2, 3, dtype=dtype)
    h = None if given is None else torch.randn(1, 2, 4, dtype=given)
    results = []
    for layer in (theirs, ours):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            backends.use("reference") if form == "reference" else nullcontext(),
        ):
            try:
                output, last = layer.train(form != "eval")(x, (h, h) if h is not None and kind is nn.LSTM else h)
                results.append([output.dtype, *(s.dtype for s in (last if isinstance(last, tuple) else (last,)))])
            except (RuntimeError, ValueError) as error:
                results.append(type(error))
    assert results[0] == results[1]


@pytest.mark.parametrize(("dtype", "served"), [(torch.bfloat16, "cpu"), (torch.float16, "torch")])
def test_who_serves_is_chosen_for_the_dtype_of_autocast(dtype: torch.dtype, served: str) -> None:
    layer = sire_fast.GRU(3, 4, swaps=PAIRS)
    assert layer.backend == "cpu"
    with torch.autocast("cpu", dtype=dtype):
        assert layer.backend == served
        assert bool(layer.why_not_fused()) == (served == "torch")


@pytest.mark.parametrize("form", ["plain", "swaps", "eval"])
def test_states_of_another_dtype_are_torchs_error(kind: type[nn.RNNBase], form: str) -> None:
    theirs, ours = pair_of(kind, 3, 4)
    sire_fast.convert(ours, swaps=None if form == "plain" else PAIRS)
    h = torch.randn(1, 2, 4, dtype=torch.float64)
    for layer in (theirs, ours):
        with pytest.raises((RuntimeError, ValueError)):
            layer.train(form != "eval")(torch.randn(5, 2, 3), (h, h) if kind is nn.LSTM else h)


def test_lengths_may_be_a_list(layer: sire_fast.GRU) -> None:
    torch.testing.assert_close(layer.eval()(X, lengths=[3, 5]), layer(X, lengths=torch.tensor([3, 5])))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_layers_are_torchs(kind: type[nn.RNNBase]) -> None:
    theirs, ours = pair_of(kind, 3, 4)
    results = []
    for layer in (theirs, sire_fast.convert(ours, swaps=None)):
        layer.to(torch.complex64)
        try:
            results.append(layer(torch.ones(5, 2, 3, dtype=torch.complex64))[0])
        except (RuntimeError, ValueError, NotImplementedError) as error:
            results.append(type(error))
    if isinstance(results[0], Tensor):
        torch.testing.assert_close(*results)
    else:
        assert results[0] is results[1]


def test_a_function_that_returns_two_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fn: expected a result of shape \(2, \.\.\.\), got a tuple"):
        sire_fast.swap_penalty(nn.GRU(3, 4), torch.randn(5, 2, 3), Uniform(2))


# ---------------------------------------------------------------- packed, fake, functional


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's look
@pytest.mark.parametrize("swaps", [None, PAIRS], ids=["plain", "swaps"])
def test_compiles_with_packed_sequences(kind: type[nn.RNNBase], swaps: Any) -> None:
    theirs, ours = pair_of(kind, 3, 4)
    sire_fast.convert(ours, swaps=swaps)
    x = torch.randn(5, 3, 3)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([5, 2, 4]), enforce_sorted=False)
        output, last = layer(packed)
        return output.data.sum() + last_h(last).sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager")
    if torch.__version__ < (2, 13):  # which cannot pad them
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="_pad_packed_sequence"):
            compiled(ours, x)
    else:
        torch.testing.assert_close(compiled(ours, x), run(theirs, x))


def test_packed_sequences_need_no_default_device(kind: type[nn.RNNBase]) -> None:
    theirs, ours = pair_of(kind, 3, 4)
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([5, 4, 2]))
    with torch.device("meta"):
        torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fake_tensors_have_no_values_to_read(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """Estimators of memory."""
    with FakeTensorMode():
        theirs, ours = kind(3, 4, **options), getattr(sire_fast, kind.__name__)(3, 4, **options, swaps=Uniform(2))
        x = torch.randn(5, 2, 3)
        (expected, _), (output, _) = theirs(x), ours(x)
        assert output.shape == expected.shape
        (output.sum() + sire_fast.penalty(ours)).backward()
        assert ours.weight_hh_l0.grad.shape == ours.weight_hh_l0.shape


@pytest.mark.parametrize("swaps", [None, Adjacent("all"), Uniform(2)], ids=str)
def test_make_fx_traces_the_operator(swaps: Any) -> None:
    layer = sire_fast.GRU(3, 4, swaps=swaps)
    traced = make_fx(lambda x: layer(x)[0].sum() + (sire_fast.penalty(layer) if swaps else 0))(torch.randn(5, 2, 3))
    assert any("sire_fast.swap_rnn" in str(node.target) for node in traced.graph.nodes)


def test_the_operators_check_their_sizes() -> None:
    """A graph that was loaded from a file calls them itself."""
    from sire_fast import _C

    t = torch.randn
    inputs = [t(5, 2, 3), t(4, 3), None, t(4, 4), None, t(2, 4), None]
    positions = [torch.zeros(2, 1, 2, dtype=torch.int64), torch.full((2, 1), 4), torch.full((2,), 5)]

    def call(*changed: Any, arithmetic: str = "float32", rows: int = 0, train: bool = False) -> Any:
        given = [*inputs, *positions]
        for n, value in changed:
            given[n] = value
        settings = ("rnn_tanh", "cpu", arithmetic, False)
        return torch.ops.sire_fast.swap_rnn(*settings, *given, rows, train), settings, given

    call()
    wrong = [
        (0, t(5, 3, 3)),
        (1, t(4, 2)),
        (3, t(3, 1)),
        (5, t(2, 3)),
        (7, positions[0].int()),
        (8, positions[2]),
        (6, t(2, 4)),
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="expected"):
            call(change)
    for positions_of, value in (
        (7, torch.tensor([[[3, 9]], [[0, 1]]])),
        (8, torch.full((2, 1), 9)),
        (9, torch.full((2,), 6)),
    ):
        with pytest.raises(ValueError, match="expected"):
            call((positions_of, value))
    with pytest.raises(ValueError, match=r"x: expected torch\.float64"):
        call(arithmetic="float64")
    with pytest.raises(ValueError, match="span_rows: expected at least 4"):
        call((7, torch.tensor([[[0, 1]], [[0, 1]]])), (8, torch.tensor([[0], [0]]) + 1), train=True)
    outputs, settings, given = call(train=True)
    h, cells, gates, spans = outputs[0], outputs[5], outputs[7], outputs[8]
    grads = [t(5, 2, 4), *[None] * 6]
    needs = [True] * 2 + [False] + [True] + [False] + [True, False]
    torch.ops.sire_fast.swap_rnn_backward(*settings, grads, *given, h, cells, gates, spans, needs)
    for gradient, state in ((t(4, 2, 4), h), (grads[0], h[:3])):
        bad = [gradient, *grads[1:]]
        with pytest.raises(ValueError, match="expected a gradient or kept tensor"):
            torch.ops.sire_fast.swap_rnn_backward(*settings, bad, *given, state, cells, gates, spans, needs)
    with pytest.raises(ValueError, match="null pointer"):
        _C.span_rows(5, 2, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="null pointer"):
        _C.forward("gru", "float32", 1, False, False, (5, 2, 0, 4, 0), 0, [0] * 10, [0] * 9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_transforms_of_functions(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    theirs, ours = pair_of(kind, 3, 4, **options)
    theirs.double(), sire_fast.convert(ours, swaps=None).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    tangent = torch.randn_like(x)

    def loss(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].sin().sum()

    results = []
    for layer in (theirs, ours):
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def of_x(x: Tensor, layer: nn.Module = layer, parameters: Any = parameters) -> Tensor:
            return torch.func.functional_call(layer, parameters, (x,))[0][0, 0]

        results.append((
            torch.func.grad(loss, 1)(layer, parameters, x),
            torch.func.vjp(of_x, x)[1](torch.ones(of_x(x).shape, dtype=x.dtype)),
            torch.func.jacrev(of_x)(x),
        ))  # fmt: skip
    torch.testing.assert_close(*results)
    both = torch.stack((x, 2 * x))  # torch's own layers have no rule for it
    torch.testing.assert_close(torch.func.vmap(of_x)(both), torch.stack([of_x(x) for x in both]))
    grads = [torch.func.grad(loss, 1)(ours, parameters, x) for x in both]
    of_each = torch.func.vmap(lambda x: torch.func.grad(lambda p: loss(ours, p, x))(parameters))(both)
    torch.testing.assert_close(of_each, {name: torch.stack([g[name] for g in grads]) for name in parameters})
    with pytest.raises(NotImplementedError, match=r'sire_fast\.backends\.use\("reference"\)'):
        torch.func.jvp(of_x, (x,), (tangent,))
    with backends.use("reference"):
        if not ours.why_not_fused():
            jacobian = results[1][2]
            expected = torch.tensordot(jacobian, tangent, tangent.dim())
            torch.testing.assert_close(torch.func.jvp(of_x, (x,), (tangent,))[1], expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
def test_what_the_kernels_cannot_differentiate_names_what_can(layer: sire_fast.GRU) -> None:
    x = X.clone().requires_grad_()
    output = layer(x)[0].flatten()[:2]
    with pytest.raises(NotImplementedError, match=r'sire_fast\.backends\.use\("reference"\)'):
        torch.autograd.grad(output, x, torch.eye(2, dtype=x.dtype), is_grads_batched=True)
    for form in (None, layer.swaps):
        layer.swaps = form
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=r'sire_fast\.backends\.use\("reference"\)'):
                layer(forward_ad.make_dual(X, X))
            with backends.use("reference"):
                assert forward_ad.unpack_dual(layer(forward_ad.make_dual(X, X))[0]).tangent is not None


def test_transforms_with_swaps(layer: sire_fast.GRU) -> None:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(layer, parameters, (x,))
        return output.square().sum() + sire_fast.penalty(layer)

    found = torch.func.grad(loss)(parameters, X)
    (layer(X)[0].square().sum() + sire_fast.penalty(layer)).backward()
    torch.testing.assert_close([*found.values()], gradients(layer))
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=1.0)
    joined = torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,))[0].square().sum())(parameters, X)
    torch.testing.assert_close(joined, found)


def test_gradients_of_each_sequence_have_swaps_of_their_own() -> None:
    """vmap's randomness="different" has no rule for numbers that are drawn in place."""
    drawn = []

    def sampler(*arguments: Any) -> Tensor:
        drawn.append(Uniform(2)(*arguments))
        return drawn[-1]

    layer = sire_fast.GRU(3, 4, swaps=sampler).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(30, 4, 3, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        torch.func.functional_call(layer, parameters, (x[:, None],))
        return sire_fast.penalty(layer), drawn[-1]

    each = torch.func.vmap(torch.func.grad(loss, has_aux=True), (None, 1), randomness="different")
    found, pairs = each(parameters, x)
    assert len(pairs.flatten(1).unique(dim=0)) == 4
    sire_fast.convert(layer, swaps=lambda *_: pairs[:, 0], compare="end")
    layer(x)
    sire_fast.penalty(layer).backward()
    torch.testing.assert_close([found[name].mean(0) for name in parameters], gradients(layer))


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("swaps", [None, Adjacent("all")])
def test_ensembles(kind: type[nn.RNNBase], swaps: Any, weight: float | None) -> None:
    """torch's recipe for many models at once: vmap over the weights, which a backward around it differentiates."""
    if swaps is None and weight:
        weight = None
    models = [sire_fast.convert(kind(3, 4).double(), swaps, weight=weight) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(model: nn.Module, output: Tensor) -> Tensor:
        return output.square().sum() + (sire_fast.penalty(model) if swaps and not weight else 0)

    def run(p: Any, b: Any) -> tuple[Tensor, Tensor]:
        output = torch.func.functional_call(base, (p, b), (X,))[0]
        return loss(base, output), output

    losses, outputs = torch.func.vmap(run)(parameters, buffers)
    losses.sum().backward()
    for n, model in enumerate(models):
        output = model(X)[0]
        torch.testing.assert_close(outputs[n], output)
        loss(model, output).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(parameters[name].grad[n], p.grad)
