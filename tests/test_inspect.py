"""inspect: against a plain loop over swaps and orders, on layers, functions and trained runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sire_fast
from sire_fast.lab import cli
from sire_fast.lab.train import INSPECTED

T, B = 5, 3
LENGTHS = torch.tensor([5, 2, 4])


def exchanged(x: Tensor, i: int, j: int) -> Tensor:
    order = list(range(len(x)))
    order[i], order[j] = order[j], order[i]
    return x[order]


def change(answer: Any, x: Tensor, other: Tensor) -> float:
    """Of one sequence (T, I)."""
    return (answer(other[:, None]) - answer(x[:, None])).abs().mean().item()


@pytest.fixture(params=["kernel", "torch", "function"])
def asked(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """What is inspected, and the same as a function of sequences without padding."""
    if request.param == "function":
        weight = torch.randn(4, 2, dtype=torch.float64)

        def model(x: Tensor, lengths: Tensor | None = None) -> Tensor:
            inside = torch.ones(x.shape[:2]) if lengths is None else torch.arange(len(x))[:, None] < lengths
            return ((x @ weight).cumsum(0).tanh() * inside[..., None]).sum(0)

        return model, model
    kind = sire_fast.GRU if request.param == "kernel" else nn.GRU
    layer = kind(4, 6, num_layers=1 if request.param == "kernel" else 2).double()
    return layer, lambda x: layer(x)[1][-1]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
def test_against_a_plain_loop(asked: tuple[Any, Any], lengths: Tensor | None) -> None:
    model, answer = asked
    x = torch.randn(T, B, 4, dtype=torch.float64)
    found = sire_fast.inspect(model, x, lengths=lengths, rows=4)
    sequences = [x[: T if lengths is None else lengths[b], b] for b in range(B)]
    for i, j in itertools.combinations(range(T), 2):
        held = [s for s in sequences if j < len(s)]
        expected = sum(change(answer, s, exchanged(s, i, j)) for s in held) / len(held)
        assert found.heat_map[i, j].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert torch.equal(found.heat_map, found.heat_map.T)
    for b, sequence in enumerate(sequences):
        order = found.worst_order[b]
        assert sorted(order.tolist()) == list(range(T))
        assert order[len(sequence) :].tolist() == list(range(len(sequence), T))  # padding keeps its place
        worst = change(answer, sequence, sequence[order[: len(sequence)]])
        assert found.worst[b].item() == pytest.approx(worst, rel=1e-10, abs=1e-12)
        every = [change(answer, sequence, sequence[list(o)]) for o in itertools.permutations(range(len(sequence)))]
        assert found.max[b].item() <= worst + 1e-12
        assert worst <= max(every) + 1e-12
        assert min(every) - 1e-12 <= found.changes[:, b].min().item()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
def test_a_layer_with_the_batch_in_front_answers_with_its_last_h(directions: int, lengths: Tensor | None) -> None:
    """An LSTM has two last states, a second direction adds a row to each: either could be taken for the answer."""
    layer = nn.LSTM(4, 6, batch_first=True, bidirectional=directions == 2).double()
    x = torch.randn(B, T, 4, dtype=torch.float64)
    found = sire_fast.inspect(layer, x, lengths=lengths, batch_first=True)
    for b in range(B):
        _, (h_n, _) = layer(x[b, : T if lengths is None else lengths[b]])
        torch.testing.assert_close(found.answer[b], h_n.flatten(), rtol=0, atol=1e-12)


def test_a_hook_is_part_of_the_model() -> None:
    """The kernel would run past it."""
    layer, x = sire_fast.GRU(4, 6), torch.randn(T, B, 4)
    layer.register_forward_pre_hook(lambda _, arguments: (arguments[0].cumsum(0).mul(0), *arguments[1:]))
    assert sire_fast.inspect(layer, x).worst.max() == 0


class Sum(sire_fast.GRU):
    def forward(self, x: Tensor, *others: Any) -> Any:  # type: ignore[override]
        return super().forward(x.sum(0, keepdim=True).expand_as(x), *others)


class Doubled(nn.RNNBase):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        output, last = super().forward(x, hx)
        return 2 * output, 2 * last


class Mixed(Doubled, nn.GRU):
    pass


def _replaced() -> nn.Module:
    layer: Any = sire_fast.GRU(2, 3)
    plain = layer.forward
    layer.forward = lambda x: plain(x.cumsum(0))
    return layer


@pytest.mark.parametrize(
    "layer",
    [Sum(2, 3), Mixed(2, 3), sire_fast.convert(Mixed(2, 3)), _replaced()],
    ids=["own", "mixin", "converted", "replaced"],
)
def test_a_forward_of_its_own_is_part_of_the_model(layer: Any) -> None:
    x = torch.randn(5, 4, 2)
    as_function = sire_fast.inspect(lambda x: layer(x)[0][-1], x)
    torch.testing.assert_close(sire_fast.inspect(layer, x).heat_map, as_function.heat_map, equal_nan=True)


@pytest.mark.parametrize("steps", [2, 7])
def test_progress_grows_to_its_end(steps: int) -> None:
    seen: list[tuple[int, int]] = []
    layer = sire_fast.GRU(4, 6)
    sire_fast.inspect(layer, torch.randn(steps, B, 4), orders=3, rows=4, report=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, B, 4), {}), ((T, B, 4), {"lengths": torch.ones(B, dtype=torch.int64)}), ((2, B, 4), {"boundaries": [0.5]})],
    ids=["one step", "lengths of one", "blocks of one"],
)
def test_that_there_is_nothing_to_exchange_is_told(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Zeros alone would say that the model is invariant."""
    with pytest.warns(UserWarning, match="inspect: nothing to exchange in these sequences") as told:
        found = sire_fast.inspect(lambda x, *_: x[0], torch.randn(shape), **options)
    assert told[0].filename == __file__
    assert found.worst.max() == 0


def test_an_invariant_model_does_not_move() -> None:
    found = sire_fast.inspect(lambda x: x.sum(0), torch.randn(T, B, 4, dtype=torch.float64))
    assert found.worst.max() < 1e-14
    assert found.heat_map.max() < 1e-14


def test_orders_inside_blocks_leave_others_alone() -> None:
    """Where order matters between the halves and not inside them, only the heat map crosses."""
    x = torch.randn(6, B, 1, dtype=torch.float64)
    found = sire_fast.inspect(lambda x: x[:3].sum(0) - x[3:].sum(0), x, boundaries=[0.5])
    assert found.worst.max() < 1e-14
    assert found.heat_map[0, 5] > 0.1
    assert found.heat_map[0, 2] < 1e-14


def test_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    layer = sire_fast.GRU(4, 6, swaps=sire_fast.swaps.Uniform(2))
    head = nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5))
    before, x = torch.get_rng_state(), torch.randn(T, B, 4, generator=torch.Generator().manual_seed(0))
    first, second = (sire_fast.inspect(layer, x, through=head) for _ in range(2))
    assert torch.equal(first.changes, second.changes)  # the dropout is off
    assert torch.equal(before, torch.get_rng_state())
    assert layer.training
    assert head[1].training
    assert not first.answer.requires_grad


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("model: expected a module or a function", {"model": 3}),
        ("x: expected", {"x": torch.randn(4)}),
        ("lengths: expected", {"lengths": torch.tensor([5, 2])}),
        ("lengths: expected 1 <= length <= 5", {"lengths": torch.tensor([5, 2, 6])}),
        ("orders: expected at least 1", {"orders": 0}),
        ("rows: expected at least 1", {"rows": 0}),
        ("batch_first: expected False, which the layer has", {"model": nn.GRU(4, 6), "batch_first": True}),
        ("model: expected answers of shape", {"model": lambda x: x.sum()}),
        ("model: expected finite answers", {"model": lambda x: x[0] / 0}),
    ],
)
def test_refuses(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        sire_fast.inspect(**{"model": lambda x: x[0], "x": torch.randn(T, B, 4)} | arguments)


@pytest.mark.parametrize("steps", [2, 40])
def test_the_picture_names_its_axes(steps: int, tmp_path: Path) -> None:
    figure = sire_fast.inspect(lambda x: x[0], torch.randn(steps, B, 4)).draw()
    assert {axes.get_xlabel() for axes in figure.axes} >= {"position i", "sequence, the most sensitive first"}
    figure.savefig(tmp_path / "order.png")
    assert (tmp_path / "order.png").stat().st_size > 1000


def test_small_changes_of_large_answers_fill_the_picture() -> None:
    found = sire_fast.inspect(lambda x: 100 + x[0], torch.randn(T, B, 4))
    _, whole_orders, _ = found.draw().axes
    assert whole_orders.get_ylim()[1] < 1.2 * found.worst.max()


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_inspects_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command(capsys, "train", "parity", "--steps", 3, "--hidden", 4, "--out", out)[0] == 0
    code, told, err = command(capsys, "inspect", out, "--length", 6, "--examples", 4)
    assert (code, err) == (0, "")
    assert "inspect.png" in told
    result = json.loads((out / "inspect.json").read_text())
    assert (result["length"], len(result["sequences"]), len(result["heat_map"])) == (6, 4, 6)
    assert (out / "inspect.png").read_bytes().startswith(b"\x89PNG")
    # what is told of a model must not outlive it
    assert command(capsys, "train", "parity", "--steps", 3, "--hidden", 4, "--out", out, "--force")[0] == 0
    assert not {path.name for path in out.iterdir()} & set(INSPECTED)


def test_that_it_takes_hours_is_told_before_they_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch):
    assert command(capsys, "train", "parity", "--steps", 3, "--hidden", 4, "--out", tmp_path)[0] == 0
    monkeypatch.setattr(cli, "_LONG", 0)
    code, _, err = command(capsys, "inspect", tmp_path, "--length", 6, "--examples", 4)
    assert code == 0
    assert err.count("\n") == 1
    assert "inspect: may take 0.0 hours, for 60 orders and swaps of sequences of length 6; fewer with --length" in err


def test_bad_input_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in ((tmp_path / "none",), (tmp_path, "--length", 1), (tmp_path, "--examples", 0)):
        code, told, err = command(capsys, "inspect", *arguments)
        assert (code, told, err.count("\n")) == (2, "", 1)
