"""Which forwards the penalty of a layer counts, and where a weight joins by itself."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from stand_ins import OPTIONS, PAIRS, X, Y, gradients, last_h, pair_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import sire_fast
from sire_fast import backends, ledger
from sire_fast.swaps import Adjacent, Uniform

# ---------------------------------------------------------------- which forwards the penalty counts


def _penalty_of(layer: nn.Module, x: Tensor, **call: Any) -> Tensor:
    """The penalty of one forward alone."""
    twin = copy.deepcopy(layer)
    twin(x, **call)
    return sire_fast.penalty(twin)


@pytest.mark.parametrize("hold", [False, True])
def test_all_calls_before_a_backward_count(layer: sire_fast.GRU, hold: bool) -> None:
    """Siamese networks, graph layers; whether anybody holds what they returned or not."""
    held = [layer(X), layer(Y)]
    if not hold:
        del held
    alone = [_penalty_of(layer, x) for x in (X, Y)]
    counts = [2 * 4, 3 * 6]
    expected = sum(p * n for p, n in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(sire_fast.penalty(layer), expected)
    torch.testing.assert_close(sire_fast.penalty(layer), expected)  # reading changes nothing


@pytest.mark.parametrize("guard", ["task", "exception"])
def test_a_batch_that_is_left_out_has_no_part_in_the_next_penalty(layer: sire_fast.GRU, guard: str) -> None:
    """A NaN in it would reach all weights."""

    def learn(x: Tensor) -> None:
        output, _ = layer(x)
        if guard == "exception" and x.isnan().any():
            raise ValueError
        task = output.square().mean()
        if task.isfinite():
            layer.zero_grad()
            (task + 0.1 * sire_fast.penalty(layer)).backward()

    learn(X)
    expected = gradients(layer)
    with suppress(ValueError):
        learn(torch.full_like(Y, torch.nan))
    with pytest.warns(UserWarning, match="a forward in training mode was dropped"):
        learn(X)
    torch.testing.assert_close(gradients(layer), expected)


def test_a_long_chain_of_calls_counts_whole(layer: sire_fast.GRU) -> None:
    """Truncated back-propagation over a hundred pieces."""
    state, outputs = None, []
    for _ in range(100):
        output, state = layer(X, state)
        outputs.append(output)
    assert len(layer._ledger.counting()) == 100
    (torch.cat(outputs).sum() + sire_fast.penalty(layer)).backward()


def test_what_was_differentiated_counts_no_more(layer: sire_fast.GRU) -> None:
    layer(X)[0].sum().backward()
    with pytest.raises(RuntimeError, match="has been differentiated already"):
        sire_fast.penalty(layer)
    layer(X)
    sire_fast.penalty(layer).backward()
    with pytest.raises(RuntimeError, match="has been differentiated already"):
        sire_fast.penalty(layer)
    layer(X)[0].sum().backward(retain_graph=True)
    layer(Y)
    torch.testing.assert_close(sire_fast.penalty(layer), _penalty_of(layer, Y))
    layer.zero_grad()
    layer(X)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)  # an optimiser's step: the graph of X can no longer be used
    layer(Y)
    torch.testing.assert_close(sire_fast.penalty(layer), _penalty_of(layer, Y))


def test_two_tasks_in_turns_through_different_layers() -> None:
    model = nn.ModuleDict({"a": nn.GRU(3, 4), "b": nn.LSTM(3, 4)}).double()
    sire_fast.convert(model, swaps=Adjacent("all"))
    for name in ("a", "b", "a", "b"):
        output, _ = model[name](X)
        penalty = sire_fast.penalty(model)
        torch.testing.assert_close(penalty, _penalty_of(model[name], X))
        (output.sum() + penalty).backward()


@pytest.mark.parametrize("weight", [None, 0.1])
def test_forwards_that_nobody_uses_hold_no_memory(layer: sire_fast.GRU, weight: float | None) -> None:
    """A loop in training mode without a backward."""
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=weight)

    def passes() -> int:
        gc.collect()
        return sum(type(o) is sire_fast.passes.Compared for o in gc.get_objects())

    before = passes()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(20):
            layer(X)
        assert passes() - before <= 4
        layer(X)[0].sum().backward()
    assert bool(told) == (weight is None)
    assert all("dropped" in str(w.message) for w in told)


@pytest.mark.parametrize("weight", [None, 0.1, 0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:sire_fast. a forward in training mode was dropped")
@pytest.mark.filterwarnings("ignore:sire_fast. this penalty counts forwards whose penalty was read before")
def test_nothing_of_a_step_stays_behind(options: dict[str, Any], weight: float | None) -> None:
    layer, x = sire_fast.LSTM(3, 4, **options, swaps=Uniform(2), weight=weight), torch.randn(5, 2, 3)

    def alive() -> int:
        gc.collect()
        return sum(type(o) in (sire_fast.passes.Compared, sire_fast.ledger.Note) for o in gc.get_objects())

    before = alive()
    for n in range(20):
        loss = layer(x)[0].sum() + (sire_fast.penalty(layer) if weight is None else 0)
        if n % 3:
            loss.backward()
    assert alive() - before <= 5


def test_one_step_at_a_time_is_told_once(layer: sire_fast.GRU) -> None:
    state = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in X:
            output, state = layer(x[None], state)
    assert len(told) == 1
    assert "nothing to swap in sequences of 1 step, whose penalty is 0; give it whole sequences" in str(told[0].message)
    assert told[0].filename == __file__
    assert sire_fast.penalty(layer) == 0
    (output.sum() + sire_fast.penalty(layer)).backward()


def test_a_sampler_that_finds_nothing_is_told() -> None:
    layer = sire_fast.GRU(3, 4, swaps=sire_fast.swaps.Blocks(2, [1, 2, 3, 4]))
    with pytest.warns(UserWarning, match="nothing to swap in sequences of 5 steps"):
        layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_drawn(layer: sire_fast.GRU, mode: Any) -> None:
    layer.swaps = Uniform(3)
    before = torch.get_rng_state()
    with mode():
        output, _ = layer(X)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(output, layer.eval()(X)[0])
    layer.train()
    with pytest.raises(RuntimeError, match=r"the last forward ran under torch\.no_grad\(\)"):
        sire_fast.penalty(layer)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(layer: sire_fast.GRU, reentrant: bool, inside: bool) -> None:
    layer.swaps = Uniform(2)
    x = X.clone().requires_grad_()

    def part(x: Tensor) -> Tensor:
        loss = nn.functional.dropout(layer(x)[0], 0.5).sum()
        return loss + sire_fast.penalty(layer) if inside else loss

    results = []
    for use in (False, True):
        torch.manual_seed(0)
        loss = checkpoint(part, x, use_reentrant=reentrant) if use else part(x)
        if not inside:
            if use and reentrant:
                with pytest.raises(RuntimeError, match=r"use_reentrant=True.* weight="):
                    sire_fast.penalty(layer)
                return
            loss = loss + sire_fast.penalty(layer)
        layer.zero_grad()
        x.grad = None
        loss.backward()
        results.append((loss.detach(), x.grad, gradients(layer)))
        with pytest.raises(RuntimeError):
            sire_fast.penalty(layer)
    torch.testing.assert_close(*results)


def test_checkpoints_that_no_backward_runs_again_do_not_count(layer: sire_fast.GRU) -> None:
    """A validation in training mode, under torch.no_grad()."""
    (_step(layer, X) + 0.3 * sire_fast.penalty(layer)).backward()
    expected = gradients(layer)
    layer.zero_grad()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0.3)
    for _ in range(9):
        with torch.no_grad():
            checkpoint(lambda x: layer(x)[0], X.clone().requires_grad_(), use_reentrant=True)
    checkpoint(lambda x: _step(layer, x), X.clone().requires_grad_(), use_reentrant=True).backward()
    torch.testing.assert_close(gradients(layer), expected)


def test_a_hidden_call_is_told_though_another_is_not(layer: sire_fast.GRU) -> None:
    loss = checkpoint(lambda x: layer(x)[0].sum(), X.clone().requires_grad_(), use_reentrant=True)
    layer(Y)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        sire_fast.penalty(layer)
    loss.backward()


def test_threads_have_their_own(layer: sire_fast.GRU) -> None:
    found, barrier = {}, threading.Barrier(2)

    def run(name: str, x: Tensor) -> None:
        layer(x)
        barrier.wait()
        found[name] = sire_fast.penalty(layer)

    threads = [threading.Thread(target=run, args=each) for each in (("X", X), ("Y", Y))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found["X"], _penalty_of(layer, X))
    torch.testing.assert_close(found["Y"], _penalty_of(layer, Y))
    with pytest.raises(RuntimeError, match="run a forward in training mode first"):
        sire_fast.penalty(layer)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_replicas_of_data_parallel_write_where_the_caller_reads(layer: sire_fast.GRU, weight: float | None) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=weight)
    expected = (_penalty_of(layer, X) * 8 + _penalty_of(layer, Y) * 18) / 26
    replicas = [layer._replicate_for_data_parallel() for _ in range(2)]
    for replica in replicas:
        replica._parameters = dict(layer._parameters)
        for name, parameter in layer._parameters.items():
            setattr(replica, name, parameter)
    outputs = []  # as DataParallel gathers them
    threads = [
        threading.Thread(target=lambda r=r, x=x: outputs.append(r(x))) for r, x in zip(replicas, (X, Y), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(sire_fast.penalty(layer), expected)


@pytest.mark.parametrize("weight", [None, 0.3, 0])
def test_no_sequences_are_no_penalty(kind: type[nn.RNNBase], weight: float | None) -> None:
    """A graph without edges, the last shard."""
    theirs, ours = pair_of(kind, 3, 4)
    sire_fast.convert(ours, swaps=PAIRS, compare="end", weight=weight)
    for shape in ((5, 0, 3), (0, 2, 3)):
        x = torch.randn(shape)
        try:
            expected = theirs(x)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:30]):
                ours(x)
            continue
        output, last = ours(x)
        torch.testing.assert_close((output, last), expected)
        assert sire_fast.penalty(ours) == 0
        (output.sum() + sire_fast.penalty(ours)).backward()
    ours(torch.randn(5, 2, 3))
    assert sire_fast.penalty(ours) > 0


# ---------------------------------------------------------------- the weight that joins by itself


def _step(layer: nn.Module, x: Tensor) -> Tensor:
    output, last = layer(x)
    return output.square().sum() + last_h(last).sum()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_a_weight_joins_as_if_it_were_added(kind: type[nn.RNNBase], options: dict[str, Any], compiled: bool) -> None:
    _, ours = pair_of(kind, 3, 4, **options)
    ours.double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def calls(layer: nn.Module) -> Tensor:
        return _step(layer, x) + _step(layer, 2 * x)

    results = []
    for weight in (None, 0.3):
        sire_fast.convert(ours, swaps=Adjacent("all"), compare="end", weight=weight)
        ours.zero_grad()
        torch._dynamo.reset()
        run = torch.compile(calls, fullgraph=True, backend="aot_eager") if compiled else calls
        for _ in range(2):  # gradients of two steps add up
            loss = run(ours)
            (loss + 0.3 * sire_fast.penalty(ours) if weight is None else loss).backward()
        results.append(gradients(ours))
    torch.testing.assert_close(*results)
    logged = sire_fast.penalty(ours)
    assert not logged.requires_grad
    twin = sire_fast.convert(copy.deepcopy(ours), swaps=Adjacent("all"), compare="end")
    calls(twin)
    torch.testing.assert_close(logged, sire_fast.penalty(twin).detach())


@pytest.mark.parametrize("used", ["output", "last"])
def test_a_weight_joins_whatever_is_used(kind: type[nn.RNNBase], used: str) -> None:
    _, layer = pair_of(kind, 3, 4)
    x = torch.randn(5, 2, 3)
    results = []
    for weight in (None, 0.3):
        sire_fast.convert(layer, swaps=Adjacent("all"), weight=weight)
        layer.zero_grad()
        output, last = layer(x)
        loss = output.sum() if used == "output" else last_h(last).sum()
        (loss + 0.3 * sire_fast.penalty(layer) if weight is None else loss).backward()
        results.append(gradients(layer))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3), lambda: 0.3, lambda: torch.tensor(0.3), 1])
def test_what_a_weight_may_be(layer: sire_fast.GRU, weight: Any) -> None:
    number = float(weight() if callable(weight) else weight)
    (_step(layer, X) + number * sire_fast.penalty(layer)).backward()
    expected = gradients(layer)
    layer.zero_grad()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=weight)
    _step(layer, X).backward()
    torch.testing.assert_close(gradients(layer), expected, rtol=1e-6, atol=1e-8)


def test_a_schedule_is_a_weight(layer: sire_fast.GRU) -> None:
    schedule = sire_fast.schedules.AdaptiveWeight(0.1, smoothing=0)

    def with_weight(weight: Any) -> list[Tensor]:
        layer.zero_grad()
        sire_fast.convert(layer, swaps=Adjacent("all"), weight=weight)
        _step(layer, X).backward()
        return gradients(layer)

    before, penalty = with_weight(schedule), sire_fast.penalty(layer).item()
    schedule.step(penalty / 5, penalty)
    assert schedule.weight == pytest.approx(0.5)
    torch.testing.assert_close((before, with_weight(schedule)), (with_weight(0.1), with_weight(0.5)))
    assert not torch.allclose(with_weight(0.1)[1], with_weight(0.5)[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_weight_joins_in_checkpoints(layer: sire_fast.GRU, reentrant: bool) -> None:
    """Two of them, with dropout behind: the second run draws what the first has drawn."""
    sire_fast.convert(layer, swaps=Uniform(2), weight=0.3)
    x = X.clone().requires_grad_()

    def part(x: Tensor) -> Tensor:
        return nn.functional.dropout(layer(x)[0], 0.5).sum()

    results = []
    for use in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        run: Callable[[Tensor], Tensor] = (lambda x: checkpoint(part, x, use_reentrant=reentrant)) if use else part
        (run(x) + run(2 * x)).backward()
        results.append((gradients(layer), sire_fast.penalty(layer)))
    torch.testing.assert_close(*results)


def test_a_weight_joins_in_checkpoints_that_another_thread_differentiates(layer: sire_fast.GRU) -> None:
    """As that of a GPU does, always."""
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)
    x, results = X.clone().requires_grad_(), []
    for in_thread in (False, True):
        layer.zero_grad()
        loss = sum(checkpoint(lambda x: layer(x)[0].sum(), n * x, use_reentrant=True) for n in (1, 2, 3))
        if in_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        results.append(gradients(layer))
    torch.testing.assert_close(*results)


def test_a_forward_that_takes_a_share_and_is_not_trained_is_told(layer: sire_fast.GRU) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)
    target = layer(Y)[0]
    (layer(X)[0].sum() - target.detach().sum()).backward()
    with pytest.warns(UserWarning, match="had its share of the weight, and no backward came through it"):
        layer(X)[0].sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # accumulated, one after the other, and kept
            kept = [layer(x)[0] for x in (X, Y)]
            for output in kept:
                output.sum().backward()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_second_backward_after_the_gradients_are_gone_is_told(layer: sire_fast.GRU, set_to_none: bool) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)
    loss = layer(X)[0].sum()
    loss.backward(retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.backward(retain_graph=True)  # they are added up
    layer.zero_grad(set_to_none)
    with pytest.warns(UserWarning, match="which were zeroed, and does not join again"):
        loss.backward()


def test_a_share_of_a_forward_whose_gradient_alone_is_in_the_loss_is_told(layer: sire_fast.GRU) -> None:
    """As WGAN-GP's third forward: no backward comes through it for the weights."""
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)

    def step() -> None:
        x = X.clone().requires_grad_()
        with backends.use("reference"):
            between, _ = layer(x)  # which is held
            (slope,) = torch.autograd.grad(between.sum(), x, create_graph=True)
            (layer(X)[0].sum() + slope.square().sum()).backward()

    step()
    with pytest.warns(UserWarning, match="had its share of the weight, and no backward came through it"):
        step()


@pytest.mark.parametrize("outer", ["transform", "backward"])
def test_a_weight_does_not_join_what_is_made_of_a_transforms_gradient(layer: sire_fast.GRU, outer: str) -> None:
    """MAML."""
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (X,))[0].square().sum()

    def adapted(parameters: dict[str, Tensor]) -> Tensor:
        gradients = torch.func.grad(loss)(parameters)
        return sum(g.square().sum() for g in gradients.values())

    with backends.use("reference"):
        for _ in range(2):  # a gradient that nobody differentiates
            torch.func.grad(loss)(parameters)
        differentiate = torch.func.grad(adapted) if outer == "transform" else lambda p: adapted(p).backward()
        with pytest.raises(RuntimeError, match="has joined a gradient"):
            differentiate(parameters)


def _in_halves(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([part(half) for half in x.chunk(2, 1)], 1)


@pytest.mark.parametrize("name", ["ctx", "self"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_weight_joins_once_in_what_two_backwards_run_again(layer: sire_fast.GRU, calls: int, name: str) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)

    def part(x: Tensor) -> Tensor:
        return sum(layer(n * x)[0] for n in range(1, calls + 1))

    code = f"""
class Again(torch.autograd.Function):
    @staticmethod
    def forward({name}, x, parameter):
        {name}.save_for_backward(x)
        with torch.no_grad():
            return part(x)

    @staticmethod
    def backward({name}, gradient):
        x = {name}.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = part(x)
        output.backward(gradient)
        return x.grad, None
"""
    held: dict[str, Any] = {"torch": torch, "part": part}
    # a backward that runs it again in halves, to save more memory
    halves = {"torch": torch, "part": lambda x: _in_halves(part, x) if torch.is_grad_enabled() else part(x)}
    exec(code, held)
    exec(code, halves)
    results = []
    for run in (
        part,
        lambda x: checkpoint(part, x, use_reentrant=True),
        lambda x: held["Again"].apply(x, None),
        lambda x: halves["Again"].apply(x, None),
    ):
        layer.zero_grad()
        output = run(X.clone().requires_grad_())
        output[-1].sum().backward(retain_graph=True)
        output.sum().backward()
        results.append(gradients(layer))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_forward_that_was_read_before_is_told_when_it_counts_again(layer: sire_fast.GRU) -> None:
    """A batch that a loop leaves out, whose loss is still a variable; what is read for a log is in no loss."""
    output, _ = layer(Y)
    with torch.no_grad():
        sire_fast.penalty(layer)
    loss = layer(X)[0].sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            penalty = sire_fast.penalty(layer)
    another, _ = layer(Y)
    with pytest.warns(UserWarning, match="counts forwards whose penalty was read before"):
        sire_fast.penalty(layer)
    (output.sum() + loss + penalty + another.sum()).backward()


@pytest.mark.parametrize("weight", [None, 0.3])
def test_the_time_of_many_calls_grows_with_their_number(
    layer: sire_fast.GRU, weight: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders that call a layer step by step, rollouts: a look at all of those before would be quadratic."""
    looks = [0]

    def counted(which: type, name: str) -> property:
        known = vars(which)[name].fget

        def look(self: Any) -> Any:
            looks[0] += 1
            return known(self)

        return property(look)

    monkeypatch.setattr(ledger.Forward, "over", counted(ledger.Forward, "over"))
    monkeypatch.setattr(ledger.Note, "counts", counted(ledger.Note, "counts"))
    sire_fast.convert(layer, swaps=PAIRS, weight=weight)
    total = sum(layer(X)[0].sum() for _ in range(600))
    (total + (0 if weight else sire_fast.penalty(layer))).backward()
    assert looks[0] < 600 * 10
    layer(X)  # and they are over
    assert len(layer._ledger._state.round.notes if weight else layer._ledger._state.forwards) == 1


def test_transforms_whose_penalty_nobody_reads_keep_nothing(layer: sire_fast.GRU) -> None:
    parameters = dict(layer.named_parameters())
    for _ in range(5):
        torch.func.grad(lambda p: torch.func.functional_call(layer, p, (X,))[0].sum())(parameters)
    assert len(layer._ledger._state.passing) == 1


def test_a_frozen_layer_made_in_inference_mode_runs_outside() -> None:
    with torch.inference_mode():
        layer = sire_fast.GRU(3, 4, swaps=PAIRS).double().requires_grad_(False)
    layer(X)
    assert sire_fast.penalty(layer) > 0


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"proj_size": 2}], ids=[*OPTIONS, "torch's"])
def test_a_gradient_for_the_input_ends_no_forward(options: dict[str, Any], weight: float | None) -> None:
    """Whatever computes the layer, torch's own kernels among it."""
    layer = sire_fast.LSTM(3, 4, **options, swaps=PAIRS, weight=weight).double()
    results = []
    for for_input in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        x = X.clone().requires_grad_()
        loss = layer(x)[0].sum()
        if for_input:
            torch.autograd.grad(loss, x, retain_graph=True)
        loss = loss + layer(Y)[0].sum()
        (loss + (0.3 * sire_fast.penalty(layer) if weight is None else 0)).backward()
        results.append(gradients(layer))
    torch.testing.assert_close(*results)


def test_a_transform_that_is_over_has_no_part_in_the_next(layer: sire_fast.GRU) -> None:
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, with_penalty: bool = True) -> Tensor:
        output = torch.func.functional_call(layer, parameters, (x,))[0].sum()
        return output + sire_fast.penalty(layer) if with_penalty else output

    expected = torch.func.grad(loss)(parameters, X)
    torch.func.grad(loss)(parameters, 10 * Y, False)
    torch.testing.assert_close(torch.func.grad(loss)(parameters, X), expected)


def test_a_weight_of_zero_takes_no_note_of_a_transform(layer: sire_fast.GRU) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0)
    layer(X)
    expected = sire_fast.penalty(layer)
    torch.func.vmap(lambda x: layer(x)[0].sum())(torch.stack((X, X)))
    torch.testing.assert_close(sire_fast.penalty(layer), expected)


def test_a_compiled_function_tells_of_forwards_that_it_cannot_count(layer: sire_fast.GRU) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, broken: bool = False, before: Tensor | None = None) -> Tensor:
        output = layer(x)[0].sum()
        if broken:
            torch._dynamo.graph_break()
            output = output + layer(2 * x)[0].sum()
        return output + sire_fast.penalty(layer) + (0 if before is None else before.sum())

    run = torch.compile(loss, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sire_fast")
        for _ in range(2):
            run(X).backward()
    for more in ({"broken": True}, {"before": layer(Y)[0]}):
        with pytest.warns(UserWarning, match="counts the forwards of its own graph alone, and others wait"):
            run(X, **more).backward()


def test_a_weight_is_not_set_on_a_layer(layer: sire_fast.GRU) -> None:
    with pytest.raises(AttributeError, match=r"weight: GRU.* takes one from sire_fast.convert"):
        layer.weight = 0.5


def test_a_weight_of_a_subclass_stays_its_own() -> None:
    class Weighted(nn.GRU):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.weight = 0.5

    layer = sire_fast.convert(Weighted(), swaps=Uniform(2), weight=0.1)
    layer.weight = 0.7
    assert (layer.weight, layer._ledger.weight) == (0.7, 0.1)


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_checkpoints_of_compiled_layers(layer: sire_fast.GRU, weight: float | None) -> None:
    """What a backward runs again counts neither in it nor in the next step."""
    torch._dynamo.reset()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=weight)
    compiled = torch.compile(layer, backend="aot_eager")
    results = []
    for run in (layer, lambda x: checkpoint(compiled, x, use_reentrant=False)):
        for _ in range(3):
            layer.zero_grad()
            loss = _step(run, X) + _step(run, 3 * X)
            (loss + 0.3 * sire_fast.penalty(layer) if weight is None else loss).backward()
        results.append(gradients(layer))
    torch.testing.assert_close(*results)
    if weight:
        with pytest.raises(RuntimeError, match="a compiled layer draws no swaps in the first run of a checkpoint with"):
            checkpoint(compiled, X.clone().requires_grad_(), use_reentrant=True)[0].sum().backward()


def test_a_weight_joins_in_a_checkpoint_in_a_checkpoint(layer: sire_fast.GRU) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0.3)
    x = X.clone().requires_grad_()

    def again(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(run, x, use_reentrant=True)

    results = []
    for wrap in (lambda run: run, again):
        run = wrap(lambda x, wrap=wrap: wrap(lambda x: layer(x)[0].sum())(x) + wrap(lambda x: layer(3 * x)[0].sum())(x))
        layer.zero_grad()
        run(x).backward()
        results.append((gradients(layer), sire_fast.penalty(layer)))
    torch.testing.assert_close(*results)


def test_a_weight_of_zero_only_watches() -> None:
    """Losses, gradients and random numbers are those without sire_fast."""
    theirs = nn.GRU(3, 4, num_layers=2, dropout=0.5)
    ours = sire_fast.convert(copy.deepcopy(theirs), swaps=Uniform(3), weight=0)
    x, results = torch.randn(5, 2, 3), []
    for layer in (theirs, ours):
        torch.manual_seed(0)
        loss = sum(nn.functional.dropout(layer(x)[0], 0.5).square().sum() for _ in range(3))
        loss.backward()
        results.append((loss, gradients(layer), torch.rand(3)))
    torch.testing.assert_close(*results)
    assert sire_fast.penalty(ours) > 0


def test_a_weight_of_zero_tells_the_mean_up_to_the_last_backward(layer: sire_fast.GRU) -> None:
    expected = (_penalty_of(layer, X) * 8 + _penalty_of(layer, Y) * 18) / 26
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0)
    for _ in range(2):
        for _ in range(3):
            layer(X)  # dropped: it counts no more
        loss = layer(X)[0].sum() + layer(Y)[0].sum()
        torch.testing.assert_close(sire_fast.penalty(layer), expected)
        loss.backward()
        torch.testing.assert_close(sire_fast.penalty(layer), expected)


READS: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda penalty: penalty,
    "item": lambda penalty: penalty.item(),
    "detached": lambda penalty: penalty.detach(),
}


@pytest.mark.parametrize("reads", [None, *READS])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_a_penalty_that_is_trained_nowhere_is_told_once(
    layer: sire_fast.GRU, recwarn, reads: str | None, compiled: bool
) -> None:
    """Forgotten, or logged alone, or a number in the loss."""
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    for _ in range(4):
        loss = run(X)[0].sum()
        if reads:
            loss = loss + READS[reads](sire_fast.penalty(layer))
        loss.backward()
    told = [w for w in recwarn if "sire_fast" in str(w.message)]
    assert ["backwards come through this layer, but not through its penalty" in str(w.message) for w in told] == (
        [] if reads == "whole" else [True]
    )
    assert compiled or all(w.filename == __file__ for w in told)


def test_a_penalty_that_a_compiled_function_reads_is_trained(layer: sire_fast.GRU) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: layer(x)[0].sum() + sire_fast.penalty(layer), backend="aot_eager")
    for _ in range(4):  # a warning would be an error
        run(X).backward()


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("used", ["output", "last", "packed"])
def test_training_in_evaluation_mode_is_told_once(layer: sire_fast.GRU, recwarn, used: str, weight: Any) -> None:
    """A validation in between that does not go back to train(): there is no penalty from then on."""
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=weight)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)

    def step() -> None:
        output, last = layer(pack_padded_sequence(X, [5, 4]) if used == "packed" else X)
        loss = output.data.sum() if used == "packed" else (last if used == "last" else output).sum()
        (loss + sire_fast.penalty(layer) if weight is None else loss).backward()

    step()
    layer.eval()
    for _ in range(3):  # saliency, Fisher information
        step()
    optimiser.step()
    for _ in range(3):  # between the steps of a training
        layer.train()
        step()
        layer.eval()
        step()
        optimiser.step()
    assert not len(recwarn)
    for _ in range(3):
        step()
        optimiser.step()
    (told,) = recwarn
    assert "this layer is trained in eval(), in which no swaps are drawn and its penalty is 0" in str(told.message)
    assert told.filename == __file__


@pytest.mark.parametrize("weight", [0, None])
def test_evaluation_that_trains_nothing_is_not_told(layer: sire_fast.GRU, weight: Any) -> None:
    sire_fast.convert(layer, swaps=Adjacent("all") if weight == 0 else None, weight=weight)
    layer.eval()
    for _ in range(3):  # a warning would be an error
        layer(X)[0].sum().backward()
        torch.optim.SGD(layer.parameters(), 0.1).step()


@pytest.mark.parametrize("weight", [None, 0.3, 0])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_a_frozen_layer_counts_its_last_forward(layer: sire_fast.GRU, weight: float | None, compiled: bool) -> None:
    """A head that is trained first: the log is that of the step, and nothing of it is left for the steps after."""
    head = nn.Linear(4, 1).double()
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer

    def loss(x: Tensor, weight: float | None) -> Tensor:
        loss = head(run(x)[0]).square().sum()
        return loss + 0.3 * sire_fast.penalty(layer) if weight is None else loss

    expected = _penalty_of(layer, X).detach()
    loss(X, weight if weight == 0 else None).backward()
    trained = gradients(layer)
    layer.zero_grad()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=weight)
    layer.requires_grad_(False)
    for n in range(9):  # a warning would be an error
        kept = loss(X * (9 - n), weight)
        told = sire_fast.penalty(layer)
        kept.backward()
    torch.testing.assert_close(told, expected)
    layer.requires_grad_(True)
    torch._dynamo.reset()  # torch 2.9 does not see that parameters are trained again, of its own layers neither
    loss(X, weight).backward()
    torch.testing.assert_close(gradients(layer), trained)


def test_all_calls_of_a_frozen_layer_count_through_a_head(layer: sire_fast.GRU) -> None:
    head = nn.Linear(4, 1).double()
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        for _ in range(2):
            layer(X), layer(2 * X)
            penalty = sire_fast.penalty(layer, through=head)
            torch.testing.assert_close(sire_fast.penalty(layer, through=head), penalty)
            head.zero_grad()
            penalty.backward()
        if not frozen:
            expected = head.weight.grad.clone()
    torch.testing.assert_close(head.weight.grad, expected)


def test_a_weight_joins_once(layer: sire_fast.GRU) -> None:
    """Two losses of one forward, each with its backward."""
    (_step(layer, X) + 0.3 * sire_fast.penalty(layer)).backward()
    expected = gradients(layer)
    layer.zero_grad()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0.3)
    output, last = layer(X)
    output.square().sum().backward(retain_graph=True)
    last.sum().backward()
    torch.testing.assert_close(gradients(layer), expected)


def _grads(asked: str, keep: str = "") -> Callable[[Tensor, Tensor, nn.Module], None]:
    """A backward of torch.autograd.grad for the input or for parameters, then .backward() unless they are kept."""

    def run(loss: Tensor, x: Tensor, layer: nn.Module) -> None:
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        wanted = {"x": [x], "all": [*trained.values()], "one": [trained.get(keep)]}[asked]
        found = torch.autograd.grad(loss, wanted, retain_graph=True)
        if keep:
            wanted[0].grad = found[0]
        else:
            loss.backward()

    return run


def _in_parts(loss: Tensor, x: Tensor, layer: nn.Module) -> None:
    """An optimiser each."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            loss.backward(inputs=[parameter], retain_graph=True)


_PARTS = {
    "grad of x, then all": _grads("x"),
    "grad of all, then all": _grads("all"),
    "grad of one": _grads("one", "bias_hh_l0"),
    "one by one": _in_parts,
}
_PREPARED = ["", "first frozen", "norm of the first", "norm of the second"]


@pytest.mark.parametrize(
    ("prepare", "part"), [*itertools.product(_PREPARED, _PARTS), ("all frozen", next(iter(_PARTS)))]
)
def test_partial_gradients_get_their_penalty_and_take_nothing_away(
    layer: sire_fast.GRU, prepare: str, part: str
) -> None:
    """Saliency, adversarial examples, norms of gradients, a backward for each optimiser; whatever is trained."""
    if prepare.startswith("norm"):
        parametrizations.weight_norm(layer, "weight_ih_l0" if "first" in prepare else "weight_hh_l0")
    elif prepare:
        (layer if "all" in prepare else layer.weight_ih_l0).requires_grad_(False)
    results = []
    for weight in (None, 0.3):
        sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=weight)
        layer.zero_grad()
        x = X.clone().requires_grad_()
        loss = _step(layer, x)
        if weight is None:
            loss = loss + 0.3 * sire_fast.penalty(layer)
        _PARTS[part](loss, x, layer)
        results.append([p.grad for p in (x, *layer.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("reads", [False, True])
def test_a_gradient_for_what_lies_before_leaves_the_penalty(
    layer: sire_fast.GRU, weight: float | None, reads: bool
) -> None:
    """Of a hidden state, between two layers, before the penalty is read."""
    model = nn.ModuleList([layer, nn.GRU(4, 4).double()])
    sire_fast.convert(model, swaps=Adjacent("all"), weight=weight)
    results = []
    for early in (False, True):
        hidden = model[0](X)[0]
        loss = model[1](hidden)[0].square().sum()
        if early:
            if reads:
                sire_fast.penalty(model)
            torch.autograd.grad(loss, hidden, retain_graph=True)
        model.zero_grad()
        penalty = sire_fast.penalty(model)
        (loss if weight else loss + penalty).backward()
        results.append((penalty, gradients(model)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_gradients_for_the_input_do_not_count_where_they_have_freed_their_graph(
    weight: float | None, options: dict[str, Any]
) -> None:
    """Training on adversarial examples, which are found in training mode; somebody holds the last one's loss."""
    layer = sire_fast.GRU(3, 4, **options).double()
    results = []
    for search in (False, True):
        sire_fast.convert(layer, swaps=Adjacent("all"), weight=weight)
        if search:
            for _ in range(6):
                x = Y.clone().requires_grad_()
                held = _step(layer, x)
                torch.autograd.grad(held, x)
        layer.zero_grad()
        loss = _step(layer, X)
        (loss if weight else loss + 0.3 * sire_fast.penalty(layer)).backward()
        results.append((sire_fast.penalty(layer) if weight else None, gradients(layer)))
    assert held is not None
    torch.testing.assert_close(*results)


def test_a_weight_does_not_join_what_is_made_of_a_gradient(layer: sire_fast.GRU) -> None:
    """Training through a step of training: nobody can tell whether the second backward is to hold it, too."""
    sire_fast.convert(layer, swaps=Adjacent("all"), weight=0.3)
    with backends.use("reference"):
        found = torch.autograd.grad(_step(layer, X), list(layer.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="weight: the penalty has joined a gradient with create_graph"):
            sum(g.square().sum() for g in found).backward()


class Cut(torch.autograd.Function):
    """What gives no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def test_a_weight_joins_where_no_gradient_arrives(layer: sire_fast.GRU) -> None:
    layer(X)
    (0.3 * sire_fast.penalty(layer)).backward()
    expected = gradients(layer)
    layer.zero_grad()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0.3)
    Cut.apply(layer(X)[0]).sum().backward()
    torch.testing.assert_close(gradients(layer), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_dropped_forwards_take_no_share(layer: sire_fast.GRU, compiled: bool) -> None:
    (_step(layer, X) + 0.3 * sire_fast.penalty(layer)).backward()
    expected = gradients(layer)
    layer.zero_grad()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0.3)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    for _ in range(2):  # a compiler holds what it has seen
        layer.zero_grad()
        for _ in range(9):
            run(Y)
        loss = _step(run, X)
        run(Y)
        loss.backward()
    torch.testing.assert_close(gradients(layer), expected)


def test_all_runs_of_compiled_functions_count(layer: sire_fast.GRU) -> None:
    """The penalty is read outside; also across graph breaks."""
    torch._dynamo.reset()
    run = torch.compile(lambda x: layer(x)[0].sum(), backend="aot_eager")
    for _ in range(2):
        loss = run(X) + run(Y)
        expected = (_penalty_of(layer, X) * 8 + _penalty_of(layer, Y) * 18) / 26
        penalty = sire_fast.penalty(layer)
        torch.testing.assert_close(penalty, expected)
        (loss + penalty).backward()
    with pytest.raises(RuntimeError, match="run a forward in training mode first"):
        sire_fast.penalty(layer)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
def test_each_thread_has_its_own_runs_of_a_compiled_function(layer: sire_fast.GRU) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: layer(x)[0].sum(), backend="aot_eager")
    kept, told = [run(X)], []

    def other() -> None:
        with pytest.raises(RuntimeError, match="run a forward in training mode first"):
            sire_fast.penalty(layer)
        kept.append(run(Y))
        told.append(sire_fast.penalty(layer))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    torch.testing.assert_close([sire_fast.penalty(layer), *told], [_penalty_of(layer, X), _penalty_of(layer, Y)])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_many_compiled_forwards_before_one_backward(layer: sire_fast.GRU, monkeypatch) -> None:
    torch._dynamo.reset()
    sire_fast.convert(layer, swaps=Adjacent("all"), compare="end", weight=0.3)
    sum(layer(X)[0].sum() for _ in range(300)).backward()
    expected = gradients(layer)
    layer.zero_grad()
    run = torch.compile(lambda x: layer(x)[0].sum(), backend="aot_eager")
    sum(run(X) for _ in range(300)).backward()
    torch.testing.assert_close(gradients(layer), expected)
    monkeypatch.setattr(ledger, "_NOTES", 3)
    ledger._notes.clear()
    with pytest.raises(RuntimeError, match="over 3 forwards of compiled layers came after this one"):
        sum(run(X) for _ in range(5)).backward()


def test_what_a_function_gives_must_be_a_weight(layer: sire_fast.GRU) -> None:
    sire_fast.convert(layer, weight=lambda: "much")
    with pytest.raises(ValueError, match="weight: expected a number or a 0-d tensor from"):
        layer(X)[0].sum().backward()


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), torch.tensor(-0.1)])
def test_a_schedule_that_has_run_past_its_end_is_told(layer: sire_fast.GRU, wrong: float | Tensor) -> None:
    """A weight below 0 would ask for sensitivity to order."""
    sire_fast.convert(layer, weight=lambda: wrong)
    with pytest.raises(ValueError, match=r"weight: expected a number of at least 0 from .*, got"):
        layer(X)[0].sum().backward()


def test_a_weight_is_not_learned_in_silence(layer: sire_fast.GRU) -> None:
    """One that is learned (by its uncertainty, say) would stay what it is."""
    weight = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="weight: expected a tensor that wants no gradient"):
        sire_fast.convert(layer, weight=weight)
    sire_fast.convert(layer, weight=lambda: weight.exp())
    with pytest.raises(ValueError, match="weight: expected a tensor that wants no gradient"):
        layer(X)[0].sum().backward()


def test_through_is_not_for_a_weight_that_joins(layer: sire_fast.GRU) -> None:
    sire_fast.convert(layer, weight=0.1)
    layer(X)
    with pytest.raises(ValueError, match="expected none for a layer whose weight joins by itself"):
        sire_fast.penalty(layer, through=lambda h: h)
