"""What is learned: batches, loss, the orders that may be exchanged, and measures on held-out examples.

A problem has, for the loop of all trials in trials.py:

    inputs, outputs, source, epoch        sizes, where its data come from, examples in an epoch (0: all are new)
    sampler(text) -> sampler or None      of swaps in a layer; None where there are none, or `penalty` draws them
    batch(n, generator) -> x, y           x (T, n, ...) and right answers (n)
    loss(outputs (n, O), y) -> scalar
    reorder(x, generator) -> x            in a random order that leaves the answers alone
    penalty(model, through) -> scalar     of the model's last forward; through: as for sire_fast.penalty
    validate(model) -> float              the metric on examples that are neither trained nor tested on
    evaluate(model) -> metrics, order_sensitivity   as sire_fast.lab.train.evaluate
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sire_fast
from sire_fast import schedules, swaps
from sire_fast.lab import train
from sire_fast.lab.baselines import PublishedSwaps, shuffled
from sire_fast.lab.paper.data import Split, augmented, local_orders, neighbours
from sire_fast.lab.tasks import Task
from sire_fast.swaps import Sampler

LOCAL_SWAPS = 1176  # 1.5 for each pixel of MNIST: with as many a CNN reaches 96 % and a row RNN 87 %, as published
_CHUNK = 4096  # images perturbed at once: their swaps take memory
_DATA_SEED = 1 << 43  # of perturbed images: the same for every trial
_ORDERS = 5  # random orders of test examples whose order sensitivity is measured
_SHARE = 10  # one of so many training examples is held out for validation

Head = Callable[[Tensor], Tensor] | None


def sampler(text: str) -> Sampler | None:
    """The sampler that a trial names."""
    return PublishedSwaps() if text == "published" else schedules.parse(text)


class Numbers(nn.Module):
    """Fixed random features of whole numbers before a model of sequences (T, B, I); Murphy et al."""

    features: Tensor

    def __init__(self, vocabulary: int, body: nn.Module) -> None:
        super().__init__()
        self.register_buffer("features", torch.rand(vocabulary, train.EMBEDDING) - 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.features[x])


class Sequences:
    """A task of sire_fast.lab.tasks.

    Args:
        task: the task.
        examples: number of training sequences, shared out evenly among the lengths; 0 for new ones at every step.
        generator: draws them.
    """

    inputs, source = train.EMBEDDING, "generated sequences"
    sampler = staticmethod(sampler)

    def __init__(self, task: Task, examples: int, generator: torch.Generator) -> None:
        self.task, self.outputs, self.loss, self.reorder = task, task.outputs, task.loss, task.reorder
        share = examples // len(task.train_lengths)
        self.epoch = share * len(task.train_lengths)
        self._examples = [task.sample(length, share, generator) for length in task.train_lengths if share]

    def wrap(self, body: nn.Module) -> nn.Module:
        return Numbers(self.task.vocabulary, body)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.task.batch(self._examples, n, generator)

    def penalty(self, model: nn.Module, through: Head) -> Tensor:
        return sire_fast.penalty(model, through)

    def validate(self, model: nn.Module) -> float:
        return train.validate(model, self.task)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        return train.evaluate(model, self.task)


def check_elements(split: Split, elements: int) -> None:
    """Raise a ValueError where examples (N, P, I) have fewer elements than a model is to read."""
    there = min(split.x.shape[1], split.test_x.shape[1])
    if elements > there:
        raise ValueError(f"data: expected at least {elements} points in a cloud, got {there} ({split.source})")


class Classes:
    """Examples in classes: point clouds, of which a trial reads some points, in a new draw at every step.

    Args:
        split: examples (N, P, I).
        elements: how many of the P elements a model reads.
        augment: stretch and turn the clouds that are trained on.

    Raises:
        ValueError: an example has fewer elements.
    """

    sampler = staticmethod(sampler)

    def __init__(self, split: Split, elements: int, augment: bool = False) -> None:
        check_elements(split, elements)
        self.source, self.outputs, self.inputs = split.source, split.classes, split.x.shape[-1]
        order = torch.randperm(len(split.x), generator=torch.Generator().manual_seed(_DATA_SEED))
        held, kept = order.split([len(order) // _SHARE, len(order) - len(order) // _SHARE])
        self._train, self._held = (split.x[kept], split.y[kept]), (split.x[held], split.y[held])
        self._test = split.test_x, split.test_y
        self.elements, self.augment, self.epoch = elements, augment, len(kept)

    def wrap(self, body: nn.Module) -> nn.Module:
        return body

    def read(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Examples (n, P, I) -> sequences (T, n, I): some elements, the same of all."""
        return x[:, torch.randperm(x.shape[1], generator=generator)[: self.elements]].transpose(0, 1)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = self._train
        chosen = torch.randint(len(y), (n,), generator=generator)
        x = self.read(x[chosen], generator)
        return augmented(x, generator) if self.augment else x, y[chosen]

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(outputs, y)

    def reorder(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return shuffled(x, generator)

    def penalty(self, model: nn.Module, through: Head) -> Tensor:
        return sire_fast.penalty(model, through)

    def validate(self, model: nn.Module) -> float:
        return self._measure(model, self._held, 0)["accuracy"]

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        found = self._measure(model, self._test, _ORDERS)
        largest = found.pop("largest_change")
        return {
            "metrics": {"test": found},
            "order_sensitivity": {"mean": found["order_sensitivity"], "max": largest},
        }

    @torch.no_grad()
    def _measure(self, model: nn.Module, examples: tuple[Tensor, Tensor], orders: int) -> dict[str, float]:
        """Accuracy, and the change of the classes' probabilities in random orders."""
        generator = torch.Generator().manual_seed(_DATA_SEED)
        right, changes = [], []
        for x, y in zip(*(part.split(256) for part in examples), strict=True):
            x = self.read(x, generator)
            answers = model(x).softmax(-1)
            right.append(answers.argmax(-1) == y)
            for _ in range(orders):
                changes.append((model(self.reorder(x, generator)).softmax(-1) - answers).abs().flatten())
        found = {"accuracy": torch.cat(right).float().mean().item()}
        if orders:
            change = torch.cat(changes)
            found |= {"order_sensitivity": change.mean().item(), "largest_change": change.max().item()}
        return found


class LocalImages(Classes):
    """Images in which random neighbouring pixels have changed places (locally perturbed MNIST).

    Args:
        split: images (N, H, W).
        sampler: "local:N" compares states for an image and for the image after N more swaps of neighbours;
            "neighbours:K" for K images with one swap each; anything else, see `sampler`, swaps in the layer.
        by_pixels: a step of the sequence is a pixel, along the rows; else a row.
    """

    def __init__(self, split: Split, sampler: str, by_pixels: bool = False) -> None:
        self.height, self.width = split.x.shape[1:]
        pixels = self.height * self.width
        self.pairs = neighbours(self.height, self.width)
        self.local_swaps = LOCAL_SWAPS * pixels // 784
        generator = torch.Generator().manual_seed(_DATA_SEED)
        split = split._replace(x=self._perturbed(split.x, generator), test_x=self._perturbed(split.test_x, generator))
        super().__init__(split, self.height)
        if by_pixels:
            self.elements, self.inputs = pixels, 1
        self.source += f", {self.local_swaps} swaps of neighbouring pixels in each"
        kind, _, count = sampler.partition(":")
        self._kind, self._seen = kind, torch.empty(0)
        # composed once: a batch would take longer to perturb than to learn from
        self._orders, self._penalised = (
            local_orders(swaps.Pairs(n, self.pairs)(pixels, 1024, generator), pixels)
            for n in (self.local_swaps, int(count) if kind == "local" else 1)
        )
        self._single = swaps.Pairs(int(count), self.pairs) if kind == "neighbours" else None

    def sampler(self, text: str) -> Sampler | None:
        """As for other problems; by pixels also "vertical:K", pairs above each other, and "grid:K", of neighbours."""
        kind, _, count = text.partition(":")
        if kind in ("local", "neighbours"):
            return None
        if kind in ("vertical", "grid"):
            pairs = [pair for pair in self.pairs if kind == "grid" or pair[1] - pair[0] == self.width]
            return swaps.Pairs(int(count), pairs)
        return sampler(text)

    def _perturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        sampler, flat = swaps.Pairs(self.local_swaps, self.pairs), images.flatten(1)
        parts = [
            part.gather(1, local_orders(sampler(part.shape[1], len(part), generator), part.shape[1]))
            for part in flat.split(_CHUNK)
        ]
        return torch.cat(parts).view(images.shape)

    def read(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._sequences(x.flatten(1).T)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = super().batch(n, generator)
        self._seen = x
        return x, y

    def reorder(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self._sequences(_in_orders(self._pixels(x), self._orders, generator))

    def penalty(self, model: Any, through: Head) -> Tensor:
        if self._kind not in ("local", "neighbours"):
            return super().penalty(model, through)

        def state(pixels: Tensor) -> Tensor:
            h = model.layer(self._sequences(pixels))[0][-1]
            return h if through is None else through(h)

        pixels = self._pixels(self._seen)
        if self._single:
            return sire_fast.swap_penalty(state, pixels, self._single)
        perturbed = _in_orders(pixels, self._penalised)
        a, b = state(torch.cat((pixels, perturbed), 1)).chunk(2)
        return (a - b).square().sum(-1).mean()

    def _pixels(self, x: Tensor) -> Tensor:
        """Sequences (T, B, I) -> pixels (H * W, B)."""
        return x.transpose(1, 2).flatten(0, 1)

    def _sequences(self, pixels: Tensor) -> Tensor:
        return pixels.unflatten(0, (self.elements, self.inputs)).transpose(1, 2).contiguous()


def _in_orders(pixels: Tensor, orders: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels (P, B) of each image in one of the orders (N, P)."""
    chosen = orders[torch.randint(len(orders), (pixels.shape[1],), generator=generator)]
    return pixels.gather(0, chosen.T)
