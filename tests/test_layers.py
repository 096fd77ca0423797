"""The layers: torch.nn's in all but the penalty, on the fused and on the stacked path."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cuda_on_host
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import sire_fast
from sire_fast import backends, passes, proof
from sire_fast.backends import cpu, gpu
from sire_fast.swaps import Adjacent, Pairs, Uniform

PAIRS = {"RNN": (sire_fast.RNN, nn.RNN), "GRU": (sire_fast.GRU, nn.GRU), "LSTM": (sire_fast.LSTM, nn.LSTM)}
OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no-bias": {"bias": False},
    "layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    "projection": {"proj_size": 3},
    "projection-all": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
}
LAYERS = [
    pytest.param(name, options, id=f"{name}-{kind}")
    for name in PAIRS
    for kind, options in OPTIONS.items()
    if name == "LSTM" or "proj_size" not in options
] + [pytest.param("RNN", {"nonlinearity": "relu"}, id="RNN-relu")]


def build(name: str, options: dict[str, Any], **swap_options: Any) -> tuple[Any, nn.RNNBase]:
    """Our layer and torch's, with the same weights, in float64."""
    ours, theirs = PAIRS[name]
    theirs = theirs(4, 6, **options).double()
    ours = ours(4, 6, **options, **swap_options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(layer: nn.RNNBase, batch: int | None) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (rows,) if batch is None else (rows, batch)
    h = torch.randn(*shape, layer.proj_size or 6, dtype=torch.float64)
    return (h, torch.randn(*shape, 6, dtype=torch.float64)) if layer.mode == "LSTM" else h


def data(result: Any) -> Any:
    output, last = result
    return (output.data if isinstance(output, PackedSequence) else output), last


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("given_states", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed"])
def test_computes_what_torch_does(name: str, options: dict[str, Any], given_states: bool, form: str) -> None:
    """With swaps and without, in training and evaluation, and for every form of input."""
    ours, theirs = build(name, options, swaps=Uniform(2))
    if form == "packed":
        x = pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in (3, 7, 1, 7)], enforce_sorted=False)
    else:
        x = torch.randn(*((7, 4) if form == "unbatched" else (7, 5, 4)), dtype=torch.float64)
    batch = {"batched": 7 if theirs.batch_first else 5, "unbatched": None, "packed": 4}[form]
    hx = (states(theirs, batch),) if given_states else ()
    expected = theirs(x, *hx)
    torch.testing.assert_close(data(ours(x, *hx)), data(expected))
    if form == "packed":
        got = ours(x, *hx)[0]
        assert all(torch.equal(a, b) for a, b in zip(got[1:], expected[0][1:], strict=True))
    ours.eval()
    torch.testing.assert_close(data(ours(x, *hx)), data(expected))
    ours.train().swaps = None
    torch.testing.assert_close(data(ours(x, *hx)), data(expected))


def by_hand(layer: nn.RNNBase, x: Tensor, pairs: Tensor, compare: str) -> Tensor:
    """The penalty, from torch's layer on every swapped sequence on its own."""
    distances = []
    for b, row in enumerate(pairs.tolist()):
        for i, j in row:
            sequence = x[:, b : b + 1]
            order = list(range(len(x)))
            order[i], order[j] = order[j], order[i]
            outputs = []
            for s in (sequence, sequence[order]):
                y, _ = layer(s)
                y = y[:, 0]
                if not layer.bidirectional:
                    outputs.append(y[j if compare == "swap" else -1])
                    continue
                ahead, back = y.chunk(2, -1)
                at = (j, i) if compare == "swap" else (-1, 0)
                outputs.append(torch.cat((ahead[at[0]], back[at[1]])))
            distances.append((outputs[1] - outputs[0]).square().sum())
    return torch.stack(distances).mean()


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("compare", ["end", "swap"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_penalty_is_its_definition(name: str, options: dict[str, Any], compare: str, backend: str) -> None:
    fixed = torch.tensor([[[0, 5], [1, 2]], [[2, 2], [3, 6]], [[0, 1], [5, 6]]])
    ours, theirs = build(name, options | {"batch_first": False}, swaps=lambda *_: fixed, compare=compare)
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    with backends.use(backend):
        if backend != "auto" and ours.why_not_fused():  # what is named is used or refused
            with pytest.raises(NotImplementedError, match=r"^reference: cannot run this layer: (proj_size|num_layers)"):
                ours(x)
            return
        ours(x)
    expected = by_hand(theirs, x, fixed, compare)
    got = sire_fast.penalty(ours)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got, list(ours.parameters()), allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(expected, list(theirs.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients, truth)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["fused", "stacked"])
def test_packed_sequences_swap_inside_their_lengths(name: str, options: dict[str, Any]) -> None:
    ours, theirs = build(name, options, swaps=Adjacent("all"), compare="end")
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 5, 1)]
    ours(pack_sequence(sequences, enforce_sorted=False))
    each = [
        by_hand(theirs, s[:, None], Adjacent("all")(len(s), 1), "end") * (len(s) - 1) for s in sequences if len(s) > 1
    ]
    torch.testing.assert_close(sire_fast.penalty(ours), sum(each) / (3 * 4))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["spans", "stacked"])
def test_dropout_masks_are_shared(bidirectional: bool) -> None:
    """Independent masks would make the penalty of a swap of equal inputs large; it must be 0."""
    layer = sire_fast.GRU(
        4, 6, num_layers=3, dropout=0.8, bidirectional=bidirectional, swaps=Uniform(4), compare="end"
    ).double()
    layer(torch.ones(5, 3, 4, dtype=torch.float64))
    assert sire_fast.penalty(layer).item() < 1e-25
    head = nn.Sequential(nn.Linear(6 + 6 * bidirectional, 3), nn.Dropout(0.5)).double()
    assert sire_fast.penalty(layer, through=head).item() < 1e-25


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_fused_layers_run_on_the_kernel_alone(name: str, options: dict[str, Any]) -> None:
    ours, _ = build(name, options, swaps=Uniform(2))
    with backends.use("cpu"):  # what it cannot serve is refused
        ours(torch.randn(5, 3, 4, dtype=torch.float64))
        ours.eval()(torch.randn(5, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("compare", ["end", "swap"])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_lengths_are_as_good_as_packing(name: str, options: dict[str, Any], compare: str) -> None:
    fixed = torch.tensor([[[0, 1], [1, 2]], [[2, 5], [3, 6]], [[0, 0], [0, 0]], [[0, 4], [1, 2]]])
    ours, theirs = build(name, options, swaps=lambda *_: fixed, compare=compare)
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 7, 1, 5)]
    lengths = torch.tensor([len(s) for s in sequences])
    packed = pack_sequence(sequences, enforce_sorted=False)
    padded = nn.utils.rnn.pad_sequence(sequences, theirs.batch_first, float("nan"))
    expected, last = theirs(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, theirs.batch_first)
    for swaps in (ours.swaps, None):
        ours.swaps = swaps
        torch.testing.assert_close(ours(padded, lengths=lengths), (expected, last))
    ours.swaps = lambda *_: fixed
    results = []
    for x, given in ((packed, None), (padded, lengths)):
        ours(x, lengths=given)
        penalty = sire_fast.penalty(ours)
        results.append((penalty, torch.autograd.grad(penalty, [*ours.parameters()], materialize_grads=True)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_penalty_through_a_head(dropout: float) -> None:
    ours, theirs = build("GRU", {}, swaps=lambda *_: torch.tensor([[[0, 2]], [[1, 3]]]), compare="end")
    head = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Dropout(dropout)).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    ours(x)
    torch.manual_seed(1)
    got = sire_fast.penalty(ours, through=head)
    swapped = x.clone()
    swapped[[0, 2], 0], swapped[[1, 3], 1] = x[[2, 0], 0], x[[3, 1], 1]
    torch.manual_seed(1)
    original = head(theirs(x)[0][-1])
    torch.manual_seed(1)
    torch.testing.assert_close(got, (head(theirs(swapped)[0][-1]) - original).square().sum(-1).mean())
    before = torch.get_rng_state()
    sire_fast.penalty(ours, through=head)
    assert torch.equal(before, torch.get_rng_state()) == (dropout == 0)  # as many draws as one call of the head


@pytest.mark.parametrize("way", ["head", "function", "all states", "autocast"])
def test_penalties_of_halves_are_summed_in_float32(way: str) -> None:
    """float16 ends at 65504."""
    dtype = torch.bfloat16 if way == "autocast" else torch.float16
    layer = sire_fast.LSTM(4, 64, swaps=Adjacent("all"), compare="end")
    layer.to(torch.float32 if way == "autocast" else dtype)
    with torch.no_grad():
        layer.weight_ih_l0 *= 9
    x, head = torch.randn(6, 2, 4, dtype=layer.weight_ih_l0.dtype), nn.Linear(64, 8).to(layer.weight_ih_l0.dtype)

    def large(h: Tensor) -> Tensor:
        return head(h) * 5000

    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        layer(x)
        run = layer._ledger.counting()[0][0]
        if way == "function":
            got, pair = sire_fast.swap_penalty(lambda x: x[0] * 5000, x, torch.tensor([[[0, 1]]] * 2)), x[:2] * 5000
        elif way == "all states":
            got, pair = sire_fast.penalty(layer, state="all"), (run.variant_cells, run.original(run.cells))
        else:
            got, pair = sire_fast.penalty(layer, through=large), (large(run.variants), large(run.original(run.output)))
    a, b = (each.double() for each in pair)
    expected = (a - b).square().sum(-1).mean()
    if way == "all states":
        expected = expected + sire_fast.penalty(layer)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_penalties_of_complex_numbers_are_real() -> None:
    """The square of 1j is -1, which is no distance."""
    layer = sire_fast.RNN(4, 6, swaps=lambda *_: torch.tensor([[[0, 1]]]), dtype=torch.complex128)
    x = torch.randn(2, 1, 4, dtype=torch.complex128)
    output, _ = layer(x)
    other, _ = layer.eval()(x[[1, 0]])
    expected = (output - other)[-1].abs().square().sum()
    torch.testing.assert_close(sire_fast.penalty(layer.train()), expected)
    function = sire_fast.swap_penalty(lambda x: layer.eval()(x)[0][-1], x, torch.tensor([[[0, 1]]]))
    torch.testing.assert_close(function, expected)


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}], ids=["layer", "layers"])
@pytest.mark.parametrize("compare", ["end", "swap"])
def test_penalty_of_all_states(compare: str, options: dict[str, Any]) -> None:
    ours, theirs = build("LSTM", options, swaps=lambda *_: torch.tensor([[[1, 3]]]), compare=compare)
    x = torch.randn(6, 1, 4, dtype=torch.float64)
    ours(x)
    until = 4 if compare == "swap" else 6
    (_, one), (_, other) = theirs(x[:until]), theirs(x[[0, 3, 2, 1, 4, 5]][:until])
    expected = sum((a[-1] - b[-1]).square().sum() for a, b in zip(one, other, strict=True))
    torch.testing.assert_close(sire_fast.penalty(ours, state="all"), expected)
    assert sire_fast.penalty(ours) < expected


def test_penalty_of_all_states_where_c_is_unknown() -> None:
    layer = sire_fast.LSTM(4, 6, num_layers=2, bidirectional=True, swaps=Uniform(1), compare="swap")
    layer(torch.randn(5, 2, 4))
    with pytest.raises(NotImplementedError, match="num_layers > 1 with bidirectional=True"):
        sire_fast.penalty(layer, state="all")


def test_penalties_of_several_layers_add_up() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(4, 6), nn.LSTM(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[0])[0][-1]

    model = sire_fast.convert(Two(), swaps=Uniform(3), compare="end")
    model(torch.randn(7, 2, 4)).sum()
    both = sire_fast.penalty(model.first) + sire_fast.penalty(model.second)
    torch.testing.assert_close(sire_fast.penalty(model), both)
    with pytest.raises(ValueError, match="through: expected a model with one sire_fast layer, got one with 2"):
        sire_fast.penalty(model, through=nn.Identity())


def test_no_pair_to_swap_is_no_penalty() -> None:
    layer = sire_fast.GRU(4, 6, swaps=Adjacent("all"))
    with pytest.warns(UserWarning, match="nothing to swap in sequences of 1 step"):
        layer(torch.randn(1, 2, 4))
    assert sire_fast.penalty(layer).item() == 0


@pytest.mark.parametrize(("name", "options"), LAYERS)
@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.filterwarnings("ignore:.*nothing to swap")
def test_what_has_no_pair_does_not_count(name: str, options: dict[str, Any], weight: float | None) -> None:
    """Sequences of one step have no variants, and must not thin the mean of those that have."""
    layer, _ = build(name, options | {"batch_first": False}, swaps=Adjacent("all"))
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=weight)

    def gradients(*lengths: int) -> list[Tensor | None]:
        torch.manual_seed(1)
        layer.zero_grad()
        ran = sum(layer(torch.randn(n, 20, 4, dtype=torch.float64))[0].sum() for n in lengths)
        (0 * ran if weight else sire_fast.penalty(layer)).backward()
        return [p.grad for p in layer.parameters()]

    torch.testing.assert_close(gradients(6, 1), gradients(6))


def test_penalty_when_there_is_none() -> None:
    with pytest.raises(ValueError, match="expected a sire_fast layer in it, found none"):
        sire_fast.penalty(nn.GRU(4, 6))
    layer = sire_fast.GRU(4, 6)
    with pytest.raises(RuntimeError, match="no layer has swaps"):
        sire_fast.penalty(layer)
    layer.swaps = Uniform(1)
    with pytest.raises(RuntimeError, match="run a forward in training mode first"):
        sire_fast.penalty(layer)
    layer(torch.randn(3, 2, 4))
    layer.eval()(torch.randn(3, 2, 4))
    assert sire_fast.penalty(layer).item() == 0  # not that of the training pass before
    with pytest.raises(ValueError, match="state: expected output or all, got 'c'"):
        sire_fast.penalty(layer, state="c")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_swap_penalty_of_any_function(batch_first: bool, dropout: float) -> None:
    layer = nn.GRU(4, 6, batch_first=batch_first).double()
    drop = nn.Dropout(dropout)
    pairs = torch.tensor([[[0, 2], [1, 1]], [[1, 3], [0, 4]], [[2, 3], [0, 1]]])
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    def last(x: Tensor) -> Tensor:
        y = layer(x)[0]
        return drop(y[:, -1] if batch_first else y[-1])

    got = sire_fast.swap_penalty(last, x.transpose(0, 1) if batch_first else x, pairs, batch_first=batch_first)
    if not dropout:
        ours = sire_fast.GRU(4, 6, swaps=lambda *_: pairs, compare="end").double()
        ours.load_state_dict(layer.state_dict())
        ours(x)
        torch.testing.assert_close(got, sire_fast.penalty(ours))
    same = sire_fast.swap_penalty(
        last, torch.ones_like(x.transpose(0, 1) if batch_first else x), Uniform(3), batch_first=batch_first
    )
    assert same.item() < 1e-25


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 2), (5, 0, 4), (5, 3, 0)], ids=str)
def test_swap_penalty_of_inputs_of_any_form_that_want_a_gradient(shape: tuple[int, ...]) -> None:
    """They come from an embedding, say, or another network."""
    pairs = torch.tensor([[0, 2], [1, 4]]).expand(shape[1], 2, 2)
    weight = torch.arange(1.0, 6).reshape(5, *[1] * (len(shape) - 1)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def total(x: Tensor) -> Tensor:
        return (weight * x).sum(0)

    penalty = sire_fast.swap_penalty(total, x, pairs)
    orders = [2, 1, 0, 3, 4], [0, 4, 2, 3, 1]
    expected = sum((total(x[order]) - total(x)).square().sum() for order in orders) / max(2 * shape[1], 1)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("steps", [7, 70])
def test_an_output_whose_memory_was_freed_or_is_not_a_number(steps: int) -> None:
    layer, x = sire_fast.GRU(3, 8, swaps=Adjacent(2), compare="end"), torch.randn(steps, 4, 3)
    gradients = []
    for freed in (False, True):
        layer.zero_grad()
        torch.manual_seed(0)
        output, _ = layer(x)
        loss = output.sum() + sire_fast.penalty(layer)
        if freed:
            output.untyped_storage().resize_(0)
        loss.backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*gradients)
    layer(torch.where(x == x[0, 0, 0], float("nan"), x))
    assert sire_fast.penalty(layer, through=lambda h: 2 * h).isnan()  # and nobody is told of changes


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_backend_is_named_inside_a_compiled_function(fullgraph: bool) -> None:
    torch._dynamo.reset()
    layer, x = sire_fast.GRU(3, 4), torch.randn(5, 2, 3)

    def run(x: Tensor) -> Tensor:
        with backends.use("reference"):
            return layer(x)[0]

    torch.testing.assert_close(torch.compile(run, fullgraph=fullgraph, backend="eager")(x), layer(x)[0])
    assert backends.forced() is None


def test_swap_penalty_refuses() -> None:
    x = torch.randn(5, 3, 4)
    with pytest.raises(ValueError, match="swaps: expected positions inside"):
        sire_fast.swap_penalty(lambda x: x[-1], x, torch.tensor([[[0, 5]]] * 3))
    with pytest.raises(ValueError, match=r"swaps: expected \(3, K, 2\)"):
        sire_fast.swap_penalty(lambda x: x[-1], x, torch.tensor([[[0, 1]]]))
    with pytest.raises(ValueError, match=r"fn: expected a result of shape \(3, ...\)"):
        sire_fast.swap_penalty(lambda x: x.sum(), x, Uniform(2))
    with pytest.raises(ValueError, match=r"fn: expected a result of shape \(6, ...\), got \(3, 4\)"):
        sire_fast.swap_penalty(lambda x: x[-1, :3], x, Uniform(2))
    for lengths in ([5], [5, 5], [5.0, 5, 5]):
        with pytest.raises(ValueError, match=r"lengths: expected \(3,\) int64"):
            sire_fast.swap_penalty(lambda x: x[-1], x, torch.tensor([[[0, 1]]] * 3), lengths=torch.tensor(lengths))
    for given, message in ((x[:, 0, 0], r"\(5,\)"), (x[:0], r"\(0, 3, 4\)")):
        with pytest.raises(ValueError, match=rf"x: expected \(T, B, ...\) with at least one step, got {message}"):
            sire_fast.swap_penalty(lambda x: x, given, Uniform(2))
    for sampler in (None, Uniform, [[[0, 1]]], lambda *_: [[[0, 1]]] * 3):
        with pytest.raises(ValueError, match="swaps: expected a "):
            sire_fast.swap_penalty(lambda x: x[-1], x, sampler)
    assert sire_fast.swap_penalty(lambda x: x[-1], x[:, :0], Uniform(2)).item() == 0  # NaN is the mean of nothing
    with pytest.warns(UserWarning, match="nothing to swap in these sequences"):
        assert sire_fast.swap_penalty(lambda x: x[-1], x, Uniform(2), lengths=torch.tensor([1, 1, 1])).item() == 0


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_and_defaults_are_torchs(name: str) -> None:
    ours, theirs = PAIRS[name]
    torch.manual_seed(3)
    a = ours(4, 6, 2, bidirectional=True)
    torch.manual_seed(3)
    b = theirs(4, 6, 2, bidirectional=True)
    assert list(a.state_dict()) == list(b.state_dict())
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key])
    b.load_state_dict(a.state_dict())
    assert a.swaps is None
    assert repr(theirs(3, 5)) == repr(ours(3, 5))


@pytest.mark.parametrize("name", PAIRS)
def test_errors_are_torchs(name: str) -> None:
    """The same exception, with the same message, for the same mistake, on both paths."""
    mistakes = [
        torch.randn(4),
        torch.randn(5, 3, 9),
        torch.randn(5, 3, 4, 1),
        torch.randn(5, 3, 4).double(),
        torch.randn(5, 3, 4).int(),
        torch.randn(5, 3, 4, device="meta"),
    ]
    for options in ({}, {"num_layers": 2}):
        ours, theirs = (kind(4, 6, **options) for kind in PAIRS[name])
        ours.swaps = Uniform(2)
        for x in mistakes:
            with pytest.raises((RuntimeError, ValueError)) as expected:
                theirs(x)
            with pytest.raises(expected.type, match=re.escape(str(expected.value))):
                ours(x)
        rows = options.get("num_layers", 1)
        elsewhere = torch.randn(rows, 3, 6, device="meta")
        wrong_states = [torch.randn(1, 6), torch.randn(7, 3, 6), torch.randn(1, 3, 2), elsewhere]
        for h in wrong_states:
            hx = (h, h) if name == "LSTM" else h
            with pytest.raises((RuntimeError, ValueError)) as expected:
                theirs(torch.randn(5, 3, 4), hx)
            with pytest.raises(expected.type, match=re.escape(str(expected.value))):
                ours(torch.randn(5, 3, 4), hx)
        for hx in ([torch.randn(1, 3, 6)], (torch.randn(1, 3, 6), None), "h"):
            with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError)) as expected:
                theirs(torch.randn(5, 3, 4), hx)
            with pytest.raises(expected.type, match=re.escape(str(expected.value))):
                ours(torch.randn(5, 3, 4), hx)
    for arguments in ((4, 0), (0, 4), (4, 6, 0), (4, 6.0)):
        raised = []
        for kind in PAIRS[name]:
            try:
                kind(*arguments)
                raised.append(None)
            except (ValueError, TypeError) as error:
                raised.append(type(error))
        assert raised[0] is raised[1]
        assert raised[0] or 0 in arguments  # which torch 2.9 takes in part


def test_refuses() -> None:
    with pytest.raises(ValueError, match="compare: expected one of end, swap, got 'middle'"):
        sire_fast.GRU(4, 6, compare="middle")
    layer = sire_fast.GRU(4, 6, swaps=Uniform(1))
    layer.compare = "End"
    with pytest.raises(ValueError, match="compare: expected one of end, swap, got 'End'"):
        layer(torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match="swaps: expected a sampler"):
        sire_fast.GRU(3, 4, swaps=Uniform)
    with pytest.raises(ValueError, match="swaps: expected a sampler"):
        sire_fast.GRU(4, 6, swaps=4)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        sire_fast.GRU(4, 6, proj_size=2)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'elu'"):
        sire_fast.RNN(4, 6, nonlinearity="elu")
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):  # torch's own
        sire_fast.GRU(4, 6)(torch.randn(0, 2, 4))
    for options in ({}, {"num_layers": 2}):  # a sampler of one's own that is wrong, on both paths
        layer = sire_fast.GRU(4, 6, **options)
        for pairs in ([[[0, 9]]], [[[-1, 2]]], [[[3, 1]]], [[0, 1]], [[[0.0, 1.0]]]):
            layer.swaps = lambda *_, pairs=pairs: torch.tensor(pairs)
            with pytest.raises(ValueError, match="swaps: expected"):
                layer(torch.randn(5, 1, 4))
    for options in ({}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}):
        layer = sire_fast.GRU(4, 6, **options)
        for made, message in (
            ([[[0, 1]]], "a tensor from .*, got a list"),
            (None, "a tensor from .*, got a NoneType"),
            (torch.zeros(1, 1, 2, dtype=torch.int64, device="meta"), "on cpu, .*, got meta"),
        ):
            layer.swaps = lambda *_, made=made: made
            with pytest.raises(ValueError, match=f"swaps: expected {message}"):
                layer(torch.randn(5, 1, 4))
    for make in (lambda: sire_fast.GRU(4, 6, weight=0.1), lambda: sire_fast.convert(nn.GRU(4, 6), None, weight=0)):
        with pytest.raises(ValueError, match="weight: expected None without swaps"):
            make()


def test_refuses_lengths_that_cannot_be() -> None:
    layer, x = sire_fast.GRU(4, 6), torch.randn(5, 2, 4)
    for lengths, message in (
        (torch.tensor([5]), r"lengths: expected \(2,\) int64, got \(1,\)"),
        (torch.tensor([5.0, 2.0]), "lengths: expected .* int64, got .* torch.float32"),
        (torch.tensor([5, 0]), "lengths: expected 1 <= length <= 5, got 0"),
        (torch.tensor([6, 1]), "lengths: expected 1 <= length <= 5, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, lengths=lengths)
    with pytest.raises(ValueError, match="lengths: expected None for a PackedSequence"):
        layer(pack_sequence([x[:, 0]]), lengths=torch.tensor([5]))


def test_says_why_it_is_not_fused() -> None:
    assert sire_fast.LSTM(4, 6).why_not_fused() == []
    for bias in (True, False):
        (projected,) = sire_fast.LSTM(4, 6, proj_size=3, bias=bias).why_not_fused()
        assert projected == "proj_size=3: fused without a projection"
    slow = sire_fast.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3).half().why_not_fused()
    assert [reason.split(":")[0] for reason in slow] == ["proj_size=3", "cpu", "triton", "cuda"]
    both = {"num_layers": 2, "bidirectional": True}
    assert sire_fast.GRU(4, 6, **both).why_not_fused() == []
    (reason,) = sire_fast.GRU(4, 6, **both, swaps=Uniform(2)).why_not_fused()
    assert reason.startswith("num_layers > 1 with bidirectional=True")
    for options in ({"num_layers": 3}, {"bidirectional": True}):
        assert sire_fast.LSTM(4, 6, **options, swaps=Uniform(2)).why_not_fused() == []
    with backends.use("reference"):
        assert sire_fast.GRU(4, 6).half().why_not_fused() == []


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}], ids=["fused", "stacked"])
def test_copies_and_pickles_while_it_holds_a_penalty(options: dict[str, Any]) -> None:
    layer = sire_fast.GRU(4, 6, swaps=Pairs(2, [(0, 1), (1, 3)]), **options)
    x = torch.randn(5, 2, 4)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert twin.swaps == layer.swaps
        torch.testing.assert_close(twin.eval()(x), layer(x))
    assert sire_fast.penalty(layer).requires_grad


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(10, 4),
            nn.LSTM(4, 6, batch_first=True),
            nn.Linear(6, 1),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


def test_convert_keeps_everything_but_the_penalty() -> None:
    model = Model()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    layer, weight = model.rnn, model.rnn.weight_hh_l0
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    tokens = torch.randint(10, (3, 7))
    before, keys = model(tokens), list(model.state_dict())
    assert sire_fast.convert(model) is model
    assert model.rnn is layer
    assert isinstance(layer, sire_fast.LSTM)
    assert layer.weight_hh_l0 is weight
    assert layer.swaps == Adjacent(8)
    assert layer.compare == "swap"
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before)
    assert len(seen) == 2
    (model(tokens).square().mean() + sire_fast.penalty(model)).backward()
    old = weight.detach().clone()
    optimiser.step()
    assert not torch.equal(old, weight)
    sire_fast.convert(model, swaps=None)
    assert layer.swaps is None


def test_convert_reaches_a_bare_layer_and_parametrized_ones() -> None:
    assert isinstance(sire_fast.convert(nn.GRU(4, 6)), sire_fast.GRU)
    layer = parametrizations.weight_norm(nn.GRU(4, 6), "weight_hh_l0")
    x = torch.randn(5, 2, 4)
    before = layer(x)
    sire_fast.convert(layer, swaps=Uniform(2), compare="end")
    assert isinstance(layer, sire_fast.GRU)
    torch.testing.assert_close(layer(x), before)
    sire_fast.penalty(layer).backward()
    assert layer.parametrizations.weight_hh_l0.original1.grad.abs().sum() > 0


def test_convert_refuses_what_has_no_layer() -> None:
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.RNN, GRU or LSTM in it, found none"):
        sire_fast.convert(nn.Linear(2, 2))


def test_swaps_follow_torchs_seed() -> None:
    layer, x = sire_fast.GRU(4, 6, swaps=Uniform(2), compare="end"), torch.randn(9, 3, 4)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layer(x)
        penalty = sire_fast.penalty(layer)
        penalty.backward()
        drawn.append(penalty.item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_ways_to_run_a_model() -> None:
    """functional_call's weights, frozen parameters, half precision around the layer."""
    model = sire_fast.convert(Model(), swaps=Uniform(2), compare="end")
    tokens = torch.randint(10, (3, 7))
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert (torch.func.functional_call(model, zeros, (tokens,)) == 0).all()

    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model(tokens).sum().backward()
    assert model.rnn.weight_hh_l0.grad is None
    model.requires_grad_(True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.rnn(torch.randn(3, 7, model.rnn.input_size))[0].dtype == torch.bfloat16
        model(tokens)
        penalty = sire_fast.penalty(model)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert model.rnn.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("swaps", [Uniform(2), Adjacent("all")], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "dropout": 0.3}, {"num_layers": 2, "bidirectional": True}],
    ids=["layer", "directions", "layers", "stacked"],
)
def test_compiles_whole_and_once_for_all_sizes(options: dict[str, Any], swaps: Any, with_lengths: bool) -> None:
    layer = sire_fast.LSTM(4, 6, **options, swaps=swaps, compare="swap" if swaps.k == "all" else "end")

    def loss(x: Tensor, lengths: Tensor | None) -> Tensor:
        return layer(x, lengths=lengths)[0].square().mean() + sire_fast.penalty(layer)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for steps, batch in ((7, 3), (9, 5), (5, 4), (11, 2)):
        x = torch.randn(steps, batch, 4)
        lengths = torch.randint(1, steps + 1, (batch,)) if with_lengths else None
        results = []
        for run in (loss, compiled):
            torch.manual_seed(0)
            layer.zero_grad()
            value = run(x, lengths)
            value.backward()
            results.append((value, [p.grad.clone() for p in layer.parameters()]))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2  # the first sizes, and any


CHOICES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "auto": lambda call: backends.choose("auto", **call),
    "triton": lambda call: backends.choose("triton", **call),
    "cuda": lambda call: backends.choose("cuda", **call),
    "of a layer": passes._why_no_kernel,
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_choice_on_a_gpu_is_one_graph(
    choice: Callable[[dict[str, Any]], Any], host_build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile looks into no extension, and not into all of Python's library."""
    cuda_on_host.use(host_build, 132, monkeypatch.setattr)
    monkeypatch.setattr(host_build, "device", "cuda")
    monkeypatch.setattr(gpu, "why_not_here", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(proof, "_tried", lambda *_: [])
    monkeypatch.setattr(proof, "environment", lambda _: {})
    calls = {"cell": "gru", "dtype": torch.bfloat16, "device": torch.device("cuda")}

    def told(x: Tensor) -> Tensor:
        return x * len(str(choice({**calls, "hidden_size": x.shape[0]})))

    torch._dynamo.reset()
    compiled = torch.compile(told, fullgraph=True, backend="eager")
    for hidden in (100, 120, 1024):  # a size that changes becomes a symbol
        assert torch.equal(compiled(torch.ones(hidden)), told(torch.ones(hidden)))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_exports_as_torchs_layer_does(options: dict[str, Any]) -> None:
    layer = sire_fast.GRU(4, 6, **options, batch_first=True, swaps=Uniform(2)).eval()
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("steps", min=2)},)
    exported = torch.export.export(layer, (torch.randn(3, 7, 4),), dynamic_shapes=sizes).module()
    for batch, steps in ((3, 7), (5, 2), (1, 9)):
        x = torch.randn(batch, steps, 4)
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched"])
@pytest.mark.parametrize("change", [None, "in place", "NumPy", "data"])
@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_an_output_is_computed_again_only_where_it_was_changed(
    cell: type[nn.RNNBase], change: str | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, calls, forward = sire_fast.convert(cell(3, 6, batch_first=form == "batch first")), [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    layer.swaps = None
    x = torch.randn(7, 3) if form == "unbatched" else torch.randn(7, 4, 3)
    gradients = []
    for changed in (None, change):
        layer.zero_grad()
        output, _ = layer(x)
        loss = (output * x.sum(-1, keepdim=True)).sum()
        if changed == "in place":
            output.mul_(3)
        elif changed == "NumPy":
            output.detach().numpy()[:] *= 3
        elif changed == "data":
            output.data.mul_(3)
        loss.backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*gradients)
    assert len(calls) == (2 if change is None else 3)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("compare", ["end", "swap"])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (2, False), (2, True)])
def test_the_same_seed_gives_the_same_bits(layers: int, both: bool, compare: str, through: bool) -> None:
    """Of the fused pass, over spans, and stacked. What several threads sum in any order seldom shows: it is not run."""
    layer = sire_fast.GRU(5, 6, layers, bidirectional=both, swaps=Uniform(8), compare=compare)
    head = nn.Linear(12 if both else 6, 3)
    x = torch.randn(9, 4, 5, requires_grad=True)

    class Ordered(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "index_put" not in str(func) or not any(args[3:]), f"{func} sums in any order"
            return func(*args, **(kwargs or {}))

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        with Ordered():
            loss = layer(x, lengths=torch.tensor([9, 4, 6, 9]))[0].square().mean()
            loss = loss + sire_fast.penalty(layer, through=head if through else None)
            return [loss, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    for ours, before in zip(gradients(), gradients(), strict=True):
        assert torch.equal(ours, before)


def test_torchs_own_layer_where_it_is_faster() -> None:
    """A plain LSTM of few sequences: chosen, told, and not where swaps or a named backend rule it out."""
    torch.set_num_threads(2)
    layer, x = sire_fast.LSTM(3, 256, swaps=Uniform(1)), torch.randn(4, 1, 3)
    assert layer.why_not_fused() == []
    assert layer.why_not_fused(batch=64) == []
    (reason,) = layer.why_not_fused(batch=1)
    assert reason.startswith("cpu: without swaps torch's own LSTM is faster")
    assert sire_fast.GRU(3, 256).why_not_fused(batch=1) == []

    def fused(layer: nn.Module, x: Tensor) -> bool:
        output = layer(x)[0]
        node = output.grad_fn
        return "_SwapRNN" in str((node, *node.next_functions))

    assert fused(layer, x)
    layer.eval()
    assert not fused(layer, x)
    assert fused(layer, torch.randn(4, 64, 3))
    with backends.use("cpu"):
        assert fused(layer, x)


def test_a_function_may_give_one_number_a_sequence() -> None:
    x, pairs = torch.randn(6, 3, 2, dtype=torch.float64), Pairs(2, [(0, 3)])
    flat, kept = (sire_fast.swap_penalty(fn, x, pairs) for fn in (lambda x: x[0, :, 0], lambda x: x[0, :, :1]))
    torch.testing.assert_close(flat, kept)


def test_freed_memory_is_an_error_and_no_crash() -> None:
    layer = sire_fast.GRU(2, 3)
    output, _ = layer(torch.randn(4, 2, 2))
    layer.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its storage was freed"):
        output.sum().backward()
