"""Schedules: the rule by hand, its ends, and a number of swaps that changes under layers, torch.compile and reloads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sire_fast
from sire_fast.schedules import AdaptiveSwaps, AdaptiveWeight
from sire_fast.swaps import Adjacent, Blocks, Pairs, Sampler, Uniform, Window

SAMPLERS = [Uniform(3), Window(3, 2), Adjacent(3), Blocks(3, [0.5]), Pairs(3, [(0, 1), (2, 4)])]


def test_the_rule_by_hand() -> None:
    swaps = AdaptiveSwaps(Uniform(4), target=0.5, smoothing=0.75)
    weight = AdaptiveWeight(0.1, target=0.5, smoothing=0.75)
    assert (swaps.k, weight.weight, weight.ratio) == (4, 0.1, 0.5)
    # averages 0.75 * old + 0.25 * new: of losses 1, 2 and of penalties 0.25, 2
    for loss, penalty, ratio in ((1.0, 0.25, 0.25), (2.0, 2.0, (0.1875 + 2) / (0.75 + 2))):
        for schedule in (swaps, weight):
            schedule.step(torch.tensor(loss, requires_grad=True), penalty)
            assert schedule.ratio == pytest.approx(ratio)
        assert swaps.k == round(4 * ratio / 0.5)
        assert weight.weight == pytest.approx(0.1 * ratio / 0.5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_more_while_the_penalty_is_large_and_less_as_it_vanishes(scale: float) -> None:
    swaps = AdaptiveSwaps(Uniform(4), k_min=2, k_max=10, smoothing=0.5)
    weight = AdaptiveWeight(0.1, weight_min=0.01, weight_max=0.5, smoothing=0.5)
    seen = []
    for penalty in (100.0, 2.0, 0.5, 0.2, 0.0, *(0.0,) * 40):
        for schedule in (swaps, weight):
            schedule.step(scale, penalty * scale)
        seen.append((swaps.k, weight.weight))
    assert seen[0] == (10, 0.5)
    assert seen[-1] == (2, 0.01)
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(
    ("loss", "penalty", "ratio"), [(0.0, 1.0, math.inf), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (5e-324, 1e300, math.inf)]
)
def test_ends_of_the_ratio(loss: float, penalty: float, ratio: float) -> None:
    swaps, weight = AdaptiveSwaps(Uniform(4)), AdaptiveWeight(0.1)
    for schedule in (swaps, weight):
        schedule.step(loss, penalty)
        assert schedule.ratio == ratio
    assert (swaps.k, weight.weight) == ((32, 1.0) if ratio else (1, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["loss", "penalty"])
def test_what_is_not_finite_is_left_out(bad: float, which: int) -> None:
    schedule = AdaptiveSwaps(Uniform(4))
    schedule.step(1.0, 3.0)
    before = schedule.state_dict()
    schedule.step(*((bad, 1.0) if which == 0 else (1.0, torch.tensor(bad))))
    assert schedule.state_dict() == before


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_is_the_sampler_with_another_k(sampler: Any) -> None:
    schedule = AdaptiveSwaps(sampler, k_max=6, smoothing=0)
    assert schedule.reach == getattr(sampler, "reach", None)
    assert f"k={schedule.k}" in repr(schedule)
    lengths = torch.tensor([5, 1, 9])
    drawn = {}
    for penalty in (1.0, 2.0, 0.4):
        schedule.step(1.0, penalty)
        drawn[schedule.k] = schedule(lengths, 3, torch.Generator().manual_seed(0))
        assert drawn[schedule.k].shape == (3, schedule.k, 2)
    assert [*drawn] == [3, 6, 1]
    # whatever k, the same random numbers: what is drawn next does not hang on the penalty
    six = dataclasses.replace(sampler, k=6)
    assert torch.equal(drawn[6], six(lengths, 3, torch.Generator().manual_seed(0)))
    assert torch.equal(drawn[6][:, :3], drawn[3])


def test_k_changes_under_a_converted_model() -> None:
    schedule = AdaptiveSwaps(Adjacent(2), k_max=5, smoothing=0)
    model = sire_fast.convert(torch.nn.Sequential(torch.nn.GRU(3, 4)), swaps=schedule, compare="swap")
    for penalty, k in ((2.0, 4), (9.0, 5), (0.0, 1)):
        schedule.step(1.0, penalty)
        model(torch.randn(6, 2, 3))
        ((compared, _),) = model[0]._ledger.counting()
        assert compared.penalty.shape == (2, k)
        sire_fast.penalty(model).backward()
    assert str(schedule) in repr(model)


def test_a_compiled_model_takes_every_k_and_weight() -> None:
    """torch.compile gives up after eight graphs, if each number needs its own."""
    swaps, weight = AdaptiveSwaps(Window(4, 2), smoothing=0), AdaptiveWeight(0.1, smoothing=0)
    layer = sire_fast.GRU(3, 4, swaps=swaps, compare="swap")
    graphs = 0

    def loss(x: Tensor) -> Tensor:
        output, _ = layer(x)
        return output[-1].square().mean() + weight.weight * sire_fast.penalty(layer)

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    x = torch.randn(6, 2, 3)
    for k in (4, 5, 9, 32, 7, 1, 2, 3, 17, 30, 11, 12, 13):
        swaps.step(1.0, k / 4)
        weight.step(1.0, k / 4)
        assert swaps.k == k
        values = []
        for run in (loss, compiled):
            torch.manual_seed(k)
            values.append(run(x))
            values[-1].backward()
        torch.testing.assert_close(*values)
    assert graphs <= 3


@pytest.mark.parametrize("make", [lambda: AdaptiveSwaps(Uniform(4)), lambda: AdaptiveWeight(0.1)], ids=["k", "weight"])
def test_state_dict_goes_on_where_it_was(make: Any, tmp_path: Any) -> None:
    first, second = make(), make()
    for n in range(5):
        first.step(1.0, 2.0 * n)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for penalty in (1.0, 2.0):
        assert repr(second) == repr(first) != repr(make())
        assert second.state_dict() == first.state_dict()
        for schedule in (first, second):
            schedule.step(1.0, penalty)
    with pytest.raises(ValueError, match=r"^state_dict: expected loss, penalty, ratio, got lr$"):
        second.load_state_dict({"lr": 1.0})


@pytest.mark.parametrize("sampler", [Adjacent("all"), lambda *_: None, Uniform], ids=["all", "function", "class"])
def test_refuses_what_has_no_number_of_swaps(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=r"^sampler: expected one with a number k"):
        AdaptiveSwaps(sampler)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AdaptiveSwaps(Uniform(4), k_min=0), "k_min, k_max"),
        (lambda: AdaptiveSwaps(Uniform(4), k_min=5), "k_min, k_max"),
        (lambda: AdaptiveSwaps(Uniform(4), k_max=3), "k_min, k_max"),
        (lambda: AdaptiveSwaps(Uniform(4), target=0), "target"),
        (lambda: AdaptiveSwaps(Uniform(4), target=math.nan), "target"),
        (lambda: AdaptiveSwaps(Uniform(4), smoothing=1), "smoothing"),
        (lambda: AdaptiveSwaps(Uniform(4), smoothing=-0.1), "smoothing"),
        (lambda: AdaptiveWeight(0.0), "weight"),
        (lambda: AdaptiveWeight(math.nan), "weight"),
        (lambda: AdaptiveWeight(2.0), "weight"),
        (lambda: AdaptiveWeight(0.1, weight_min=-1), "weight"),
        (lambda: AdaptiveWeight(0.1, weight_max=math.inf), "weight"),
        (lambda: AdaptiveWeight(0.1).step(-1.0, 1.0), "loss"),
        (lambda: AdaptiveWeight(0.1).step(1.0, torch.tensor(-1.0)), "penalty"),
    ],
)
def test_refuses(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        make()
