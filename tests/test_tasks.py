"""Answers against hand-written ones, and what may be reordered."""

import pytest
import torch

from sire_fast import swaps
from sire_fast.lab.tasks import TASKS
from sire_fast.reference import with_variants

EACH_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.mark.parametrize(
    ("name", "sequence", "answer"),
    [
        ("parity", [1, 0, 1], 0),
        ("parity", [1, 0, 1, 1], 1),
        ("parity", [0], 0),
        ("sum", [3, 99, 0, 5], 107),
        ("range", [40, 7, 90, 12], 83),
        ("range", [5, 5], 0),
        ("variance", [1, 2, 3, 6], 3.5),  # of the population: (4 + 1 + 0 + 9) / 4
        ("poker", [0, 14, 28, 42, 24], 0),
        ("poker", [0, 13, 28, 42, 25], 1),
        ("poker", [0, 13, 28, 15, 25], 2),
        ("poker", [0, 13, 26, 15, 25], 3),
        ("poker", [8, 22, 10, 11, 12], 4),
        ("poker", [12, 13, 1, 2, 3], 4),  # an ace before the two
        ("poker", [11, 25, 0, 1, 2], 0),  # but not between king and two
        ("poker", [0, 2, 4, 6, 12], 5),
        ("poker", [0, 13, 26, 1, 14], 6),
        ("poker", [0, 13, 26, 39, 1], 7),
        ("poker", [12, 0, 1, 2, 3], 8),
        ("poker", [25, 24, 23, 22, 21], 9),
        ("half-range", [10, 60, 20, 30], 40),
        ("half-range", [10, 20, 60, 30], -10),  # the halves are not the same thing
    ],
)
def test_labels(name, sequence, answer):
    label = TASKS[name].label(torch.tensor(sequence)[:, None])
    assert label.tolist() == [answer]


@EACH_TASK
def test_samples(task):
    x, y = task.sample(6, 5000, torch.Generator().manual_seed(1))
    assert x.shape == (6, 5000)
    assert y.shape == (5000,)
    assert set(x.unique().tolist()) == set(range(task.vocabulary))
    assert task.distinct == all(len(set(sequence)) == 6 for sequence in x.T.tolist())
    again, _ = task.sample(6, 5000, torch.Generator().manual_seed(1))
    assert torch.equal(x, again)


def test_a_deck_has_no_more_cards():
    assert len(TASKS["poker"].sample(52, 2, torch.Generator())[0]) == 52
    with pytest.raises(ValueError, match=r"^length: expected at most 52, of different numbers, got 60$"):
        TASKS["poker"].sample(60, 2, torch.Generator())


# The penalty would otherwise push the model away from the right answer.
@EACH_TASK
def test_the_swaps_of_a_task_leave_its_answers_alone(task):
    generator = torch.Generator().manual_seed(0)
    for length in task.train_lengths:
        x, y = task.sample(length, 50, generator)
        pairs = swaps.parse(task.swaps)(length, 50, generator)
        variants = with_variants(x[..., None], pairs)[..., 0]  # (T, B, 1 + K)
        for k in range(variants.shape[-1]):
            assert torch.equal(task.label(variants[..., k]), y)


@EACH_TASK
def test_reordering_leaves_the_answers_alone(task):
    generator = torch.Generator().manual_seed(0)
    for length in {*task.train_lengths, *task.test_lengths}:
        x, y = task.sample(length, 50, generator)
        reordered = task.reorder(x, generator)
        torch.testing.assert_close(task.label(reordered), y)  # a variance may differ in rounding
        assert torch.equal(reordered.sort(0).values, x.sort(0).values)
    assert not torch.equal(reordered, x)


def test_reordering_reaches_every_order_inside_the_blocks_and_no_other():
    x = torch.arange(6)[:, None].expand(6, 2000)
    reordered = TASKS["half-range"].reorder(x, torch.Generator().manual_seed(0))
    assert len({tuple(half) for half in reordered[:3].T.tolist()}) == 6
    assert set(reordered[:3].flatten().tolist()) == {0, 1, 2}
    assert len(reordered.unique(dim=1).T) == 36


@EACH_TASK
def test_loss_and_metrics_of_right_answers(task):
    _, y = task.sample(5, 20, torch.Generator().manual_seed(0))
    # an output of 1 stands for the task's scale
    classes = torch.eye(task.outputs)[y.long()] * 100 if task.outputs > 1 else None
    outputs = (y / task.answer(torch.ones(1)))[:, None] if classes is None else classes
    assert task.loss(outputs, y).item() == 0
    for name, metric in task.metrics.items():
        assert metric(task.answer(outputs), y).item() == pytest.approx(1 if name == "accuracy" else 0, abs=1e-4)


def test_metrics_of_wrong_answers():
    answers, y = torch.tensor([[3.4], [3.6], [-1.0]]), torch.tensor([3.0, 3.0, 3.0])
    metrics = TASKS["sum"].metrics
    assert metrics["accuracy"](answers, y).item() == pytest.approx(1 / 3)
    assert metrics["mae"](answers, y).item() == pytest.approx((0.4 + 0.6 + 4) / 3)
    assert metrics["mse"](answers, y).item() == pytest.approx((0.16 + 0.36 + 16) / 3)
    assert TASKS["parity"].metrics["accuracy"](torch.tensor([[0.6, 0.4]] * 4), torch.tensor([0, 0, 0, 1])) == 0.75
