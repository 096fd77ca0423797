"""Tasks with generated data: questions about a sequence of whole numbers whose answer ignores (part of) its order.

A task is a few small functions; sire_fast.train holds the one loop that all of them share. A batch has one length,
so that it is dense. Protocols: parity and half-range as in the SIRE paper, sum, range and variance as in Murphy et
al., "Janossy Pooling", ICLR 2019, with training lengths 2..10 in order to look at longer sequences afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        about: the question, in a few words.
        label: sequences (T, B) int64 -> right answers (B), int64.. for classes, float32 for numbers.
        vocabulary: the numbers of a sequence are uniform in 0..vocabulary-1.
        train_lengths: lengths of training sequences, drawn uniformly.
        test_lengths: lengths of test sequences.
        outputs: width of the model's output, 1 for a number, the number of classes for a class.
        scale: what the model's output is multiplied with to give a number; unused for classes.
        loss: (outputs (B, outputs), scaled as `answer` gives them, answers (B)) -> scalar.
        metrics: name -> (answers given, right answers) -> scalar; the first is the task's metric.
        boundaries: where one block ends and the next begins, as fractions of the length; the answer ignores the
            order inside a block only. One block if empty.
    """

    about: str
    label: Callable[[Tensor], Tensor]
    vocabulary: int
    train_lengths: tuple[int, ...]
    test_lengths: tuple[int, ...]
    outputs: int
    scale: float
    loss: Metric
    metrics: dict[str, Metric]
    boundaries: tuple[float, ...] = ()
