"""Tasks with generated data: questions about a sequence of whole numbers whose answer ignores its order.

A task is a few small functions; sire_fast.lab.train holds the loop that trains all of them. All sequences of
a batch have one length, so that it is dense. Parity and half-range follow the SIRE paper; sum, range and
variance follow Murphy et al., "Janossy Pooling", ICLR 2019, but train on lengths 2..10, to look at longer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        about: the question, in a few words.
        label: sequences (T, B) int64 -> right answers (B), int64 for a class, float32 for a number.
        vocabulary: the numbers of a sequence are uniform in 0..vocabulary-1.
        train_lengths: lengths of the training sequences, equally likely.
        test_lengths: lengths of the test sequences.
        outputs: width of the model's output, O: the number of classes, or 1 for a number.
        loss: (outputs (B, O), right answers (B)) -> scalar to train on.
        answer: outputs (B, O) -> answers (B, O): probabilities of the classes, or the number.
        metrics: name -> ((answers (B, O), right answers (B)) -> scalar); the first is the task's own.
        boundaries: where blocks of the sequence begin, as fractions of its length; the answer then ignores
            the order inside each block only. Empty if it ignores the order altogether.
        distinct: whether no number comes twice in a sequence, as no card of a deck does.
    """

    about: str
    label: Callable[[Tensor], Tensor]
    vocabulary: int
    train_lengths: tuple[int, ...]
    test_lengths: tuple[int, ...]
    outputs: int
    loss: Compare
    answer: Callable[[Tensor], Tensor]
    metrics: dict[str, Compare]
    boundaries: tuple[float, ...] = ()
    distinct: bool = False

    @property
    def metric(self) -> str:
        """Name of the task's own metric."""
        return next(iter(self.metrics))

    @property
    def swaps(self) -> str:
        """Swaps that leave the answer alone, for sire_fast.swaps.parse."""
        return f"blocks:4:{','.join(map(str, self.boundaries))}" if self.boundaries else "uniform:4"

    def sample(self, length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random sequences (T, B) int64 and their right answers (B).

        Raises:
            ValueError: so many different numbers there are not.
        """
        if self.distinct and length > self.vocabulary:
            raise ValueError(f"length: expected at most {self.vocabulary}, of different numbers, got {length}")
        if self.distinct:
            x = torch.rand(self.vocabulary, batch, generator=generator).argsort(0)[:length]
        else:
            x = torch.randint(self.vocabulary, (length, batch), generator=generator)
        return x, self.label(x)

    def batch(
        self, examples: list[tuple[Tensor, Tensor]], batch: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Sequences to train on, all of one length, and their right answers: of the examples of that length, given for
        each of train_lengths, or new ones if there are none."""
        n = int(torch.randint(len(self.train_lengths), (), generator=generator))
        if not examples:
            return self.sample(self.train_lengths[n], batch, generator)
        x, y = examples[n]
        chosen = torch.randint(len(y), (batch,), generator=generator)
        return x[:, chosen], y[chosen]

    def reorder(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each of the sequences (T, B) in a random order that leaves its answer alone."""
        starts = torch.tensor([int(b * len(x)) for b in self.boundaries], dtype=torch.int64)
        block = torch.searchsorted(starts, torch.arange(len(x)), right=True)
        # sorting by block number plus a random fraction permutes inside the blocks
        keys = block[:, None] + torch.rand(x.shape, generator=generator, dtype=torch.float64)
        return x.gather(0, keys.argsort(0))


def _parity(x: Tensor) -> Tensor:
    return x.sum(0) % 2


def _sum(x: Tensor) -> Tensor:
    return x.sum(0).float()


def _range(x: Tensor) -> Tensor:
    return (x.amax(0) - x.amin(0)).float()


def _variance(x: Tensor) -> Tensor:
    return x.float().var(0, correction=0)


def _max(x: Tensor) -> Tensor:
    return x.amax(0).float()


def _counts(x: Tensor) -> Tensor:
    """How often each of the digits 0..9 stands in a sequence, (10, B)."""
    return (x[None] == torch.arange(10)[:, None, None]).sum(1)


def _unique_sum(x: Tensor) -> Tensor:
    """Sum of the different digits."""
    return ((_counts(x) > 0) * torch.arange(10)[:, None]).sum(0).float()


def _unique_count(x: Tensor) -> Tensor:
    """Number of different digits."""
    return (_counts(x) > 0).sum(0).float()


def _half_range(x: Tensor) -> Tensor:
    """Largest of the first half minus smallest of the second."""
    half = len(x) // 2
    return (x[:half].amax(0) - x[half:].amin(0)).float()


def _hand(x: Tensor) -> Tensor:
    """What five cards are worth, suit * 13 + rank from two to ace, numbered as in UCI's data: nothing, pair, two pairs,
    three of a kind, straight, flush, full house, four of a kind, straight flush, royal flush."""
    rank, suit = x % 13, x // 13
    counts = (rank[None] == torch.arange(13)[:, None, None]).sum(1)  # (13, B)
    pairs, most = (counts == 2).sum(0), counts.amax(0)
    low, high, below = rank.amin(0), rank.amax(0), rank.sort(0).values[-2]
    straight = (most == 1) & ((high - low == 4) | ((high == 12) & (below == 3)))  # an ace may stand before the two
    flush = (suit == suit[0]).all(0)
    hand = torch.where(most == 4, 7, torch.where(most == 3, torch.where(pairs > 0, 6, 3), pairs.clamp(max=2)))
    hand = torch.where(straight, torch.where(flush, torch.where(low == 8, 9, 8), 4), hand)
    return torch.where(flush & ~straight, 5, hand)


def _right_class(answers: Tensor, y: Tensor) -> Tensor:
    return (answers.argmax(-1) == y).float().mean()


def _right_rounded(answers: Tensor, y: Tensor) -> Tensor:
    return (answers[:, 0].round() == y).float().mean()


def _mae(answers: Tensor, y: Tensor) -> Tensor:
    return l1_loss(answers[:, 0], y)


def _mse(answers: Tensor, y: Tensor) -> Tensor:
    return mse_loss(answers[:, 0], y)


def _classes(n: int) -> dict[str, Any]:
    return {
        "outputs": n,
        "loss": cross_entropy,
        "answer": partial(torch.softmax, dim=-1),
        "metrics": {"accuracy": _right_class},
    }


def _number(scale: float, vocabulary: int = 100, **metrics: Compare) -> dict[str, Any]:
    """A number of about the size `scale`, of which the model's output is the multiple."""
    return {
        "vocabulary": vocabulary,
        "outputs": 1,
        "loss": lambda outputs, y: l1_loss(outputs[:, 0], y / scale),
        "answer": lambda outputs: outputs * scale,
        "metrics": metrics,
    }


_EXACT: dict[str, Any] = {"accuracy": _right_rounded, "mae": _mae, "mse": _mse}
_SHORT = tuple(range(2, 11))
_LONGER = (5, 10, 20, 30, 40, 50, 75, 100)

TASKS = {
    "parity": Task(
        "is the number of ones odd?",
        _parity,
        vocabulary=2,
        train_lengths=tuple(range(1, 11)),
        test_lengths=(10, 20, 30, 40, 50, 75, 100, 200),
        **_classes(2),
    ),
    "sum": Task("sum", _sum, train_lengths=_SHORT, test_lengths=_LONGER, **_number(100, **_EXACT)),
    "range": Task(
        "largest minus smallest", _range, train_lengths=_SHORT, test_lengths=_LONGER, **_number(100, **_EXACT)
    ),
    "variance": Task(
        "variance", _variance, train_lengths=_SHORT, test_lengths=_LONGER, **_number(1000, mse=_mse, mae=_mae)
    ),
    "max": Task("largest digit", _max, train_lengths=_SHORT, test_lengths=_LONGER, **_number(10, 9, **_EXACT)),
    "unique-sum": Task(
        "sum of the different digits", _unique_sum, train_lengths=(10,), test_lengths=(10,), **_number(10, 10, **_EXACT)
    ),
    "unique-count": Task(
        "number of different digits",
        _unique_count,
        train_lengths=(10,),
        test_lengths=(10,),
        **_number(10, 10, **_EXACT),
    ),
    "poker": Task(
        "worth of five cards",
        _hand,
        vocabulary=52,
        train_lengths=(5,),
        test_lengths=(5,),
        distinct=True,
        **_classes(10),
    ),
    "half-range": Task(
        "largest of the first half minus smallest of the second",
        _half_range,
        train_lengths=tuple(range(4, 21, 2)),
        test_lengths=(4, 10, 20, 30, 40, 50, 76, 100),
        boundaries=(0.5,),
        **_number(100, **_EXACT),
    ),
}
