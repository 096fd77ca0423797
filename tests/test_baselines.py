"""The rivals: shapes, padding, what order does to them, and their size."""

import pytest
import torch

import sire_fast
from sire_fast import swaps
from sire_fast.lab import baselines

SETS = {
    **{f"DeepSets {r}": lambda r=r: baselines.DeepSets(3, 8, 2, r) for r in baselines.REDUCTIONS},
    "SAB": lambda: baselines.SetTransformer(3, 8, 2),
    "ISAB": lambda: baselines.SetTransformer(3, 8, 2, inducing=5),
}
SEQUENCES = {cell: lambda cell=cell: baselines.Recurrent(3, 8, 2, cell) for cell in baselines.RECURRENT}
EACH_SET = pytest.mark.parametrize("build", SETS.values(), ids=SETS)


# A rival that sees order would lose to SIRE for a mistake of ours.
@EACH_SET
def test_sets_ignore_order(build):
    model, x = build().eval(), torch.randn(9, 4, 3)
    torch.testing.assert_close(model(baselines.shuffled(x)), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", (SETS | SEQUENCES).values(), ids=SETS | SEQUENCES)
def test_padding_is_not_read(build):
    model, x = build().eval(), torch.randn(9, 3, 3)
    lengths = torch.tensor([9, 1, 4])
    outputs = model(x, lengths)
    assert outputs.shape == (3, 2)
    for n, length in enumerate(lengths):
        torch.testing.assert_close(outputs[n : n + 1], model(x[:length, n : n + 1]), rtol=0, atol=1e-5)


def test_janossy_averages_over_orders():
    x = torch.randn(6, 5, 3)
    body = baselines.Recurrent(3, 8, 2)
    single, mean = (baselines.Janossy(body, orders).eval() for orders in (1, 400))
    change = {model: (model(x) - model(x)).abs().mean().item() for model in (single, mean)}
    assert change[mean] < change[single] / 5


def test_the_published_swaps_leave_out_the_last_element_and_are_one_for_the_batch():
    pairs = torch.stack([baselines.PublishedSwaps()(5, 3) for _ in range(100)])
    assert pairs.shape == (100, 3, 1, 2)
    assert (pairs == pairs[:, :1]).all()
    assert {tuple(pair) for pair in pairs[:, 0, 0].tolist()} == {(0, 1), (1, 2), (2, 3)}
    assert baselines.PublishedSwaps()(2, 3).tolist() == [[[0, 0]]] * 3


def test_recurrent_models_have_a_penalty():
    model = baselines.Recurrent(3, 8, 2, "gru", swaps.Uniform(2))
    output = model(torch.randn(6, 5, 3))
    assert sire_fast.penalty(model) > 0
    output.sum().backward()


def test_images():
    assert baselines.ImageCNN(28, 28, 10)(torch.randn(28, 4, 28)).shape == (4, 10)


def test_the_point_encoder_keeps_to_its_points():
    encoder, x = baselines.PointEncoder(3, 8), torch.randn(9, 4, 3)
    order = torch.randperm(9)
    torch.testing.assert_close(encoder(x[order]), encoder(x)[order])


def test_parameter_counts():
    # by hand: phi 3*8+8 + 8*8+8, rho 8*8+8 + 8*2+2
    assert baselines.parameters(baselines.DeepSets(3, 8, 2)) == 32 + 72 + 72 + 18
    # gates 3*(8*3 + 8*8 + 8 + 8), head 8*2+2
    assert baselines.parameters(baselines.Recurrent(3, 8, 2)) == 312 + 18


@pytest.mark.parametrize("multiple", [1, 4])
def test_equal_size(multiple):
    def build(width: int) -> torch.nn.Module:
        return baselines.SetTransformer(3, width, 2, heads=1)

    width = baselines.of_size(build, 5000, multiple)
    miss = {w: abs(baselines.parameters(build(w)) - 5000) for w in range(multiple, 100, multiple)}
    assert width == min(miss, key=miss.get)


@pytest.mark.parametrize(
    "build", [lambda: baselines.DeepSets(3, 8, 2, "min"), lambda: baselines.SetTransformer(3, 7, 2)]
)
def test_bad_arguments(build):
    with pytest.raises(ValueError, match="expected"):
        build()
