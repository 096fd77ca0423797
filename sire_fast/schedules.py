"""How many swaps, or which weight, a step of training takes: what the penalty calls for beside the task's loss.

Both schedules follow one number, the ratio of the penalty to the loss, each averaged over the last steps:

    value = value_at_target * ratio / target, inside bounds                                     (1)

While the penalty is large beside the loss, order is what is left to unlearn: more swaps, or more weight. As it
vanishes a few swaps, or a small weight, keep it there. Only the averages are remembered: nothing winds up while a
bound holds.

    >>> from sire_fast.swaps import Uniform
    >>> schedule = AdaptiveSwaps(Uniform(4), target=0.5)
    >>> schedule.step(loss=0.2, penalty=0.3)  # three times the target
    >>> schedule.k
    12
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sire_fast import swaps
from sire_fast.swaps import Sampler


class _Adaptive:
    """The smoothed ratio of penalty to loss, and the value that follows it by (1).

    Attributes:
        ratio: averaged penalty / averaged loss; the target before the first step.
    """

    def __init__(self, at_target: float, least: float, most: float, target: float, smoothing: float) -> None:
        if not 0 < target < math.inf:
            raise ValueError(f"target: expected a number above 0, got {target}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected at least 0 and below 1, got {smoothing}")
        self.target, self.smoothing = target, smoothing
        self._at_target, self._least, self._most = at_target, least, most
        self.ratio = target
        self._loss = self._penalty = 0.0  # averages from 0: what both lack at the start cancels in their ratio

    def step(self, loss: Tensor | float, penalty: Tensor | float) -> None:
        """Follow one more step of training, after its backward: a checkpointed layer draws its swaps again there.

        A step with a loss or a penalty that is not finite is left out: one NaN would stay in the averages for good.
        At a loss of 0 the ratio is infinite, and the upper bound holds; unless the penalty is 0 too, which is ratio 0.

        Args:
            loss: the task's loss, a scalar of at least 0.
            penalty: what sire_fast.penalty gave, without a weight.

        Tensors are read by `.item()`, for which the host waits if they lie on a GPU; every tenth step will do there.

        Raises:
            ValueError: one of the two is negative, so that their ratio says nothing.
        """
        loss, penalty = (v.item() if isinstance(v, Tensor) else float(v) for v in (loss, penalty))
        for name, value in (("loss", loss), ("penalty", penalty)):
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if not math.isfinite(loss + penalty):
            return
        self._loss += (1 - self.smoothing) * (loss - self._loss)
        self._penalty += (1 - self.smoothing) * (penalty - self._penalty)
        if self._penalty == 0:
            self.ratio = 0.0
        else:
            self.ratio = self._penalty / self._loss if self._loss else math.inf
        self._follow()

    def _value(self) -> float:
        return min(max(self._at_target * self.ratio / self.target, self._least), self._most)

    def _follow(self) -> None:
        """Act on a new ratio."""

    def state_dict(self) -> dict[str, float]:
        """What `step` has changed, as numbers; the settings are those of the object that loads it."""
        return {"loss": self._loss, "penalty": self._penalty, "ratio": self.ratio}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is no such dictionary.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(f"state_dict: expected {', '.join(self.state_dict())}, got {', '.join(state_dict)}")
        self._loss, self._penalty, self.ratio = (state_dict[key] for key in ("loss", "penalty", "ratio"))
        self._follow()


class AdaptiveSwaps(_Adaptive):
    """A sampler whose number of swaps follows the ratio of penalty to loss: k = sampler.k * ratio / target, rounded.

    It stands wherever a sampler does: as `swaps=` of a layer, of sire_fast.convert and of sire_fast.swap_penalty. A
    copy of the model holds its own copy of the schedule.

    Args:
        sampler: one with a number k (sire_fast.swaps.Uniform, Window, Adjacent, Blocks or Pairs), the number of swaps
            at the target, and until the first step.
        target: the ratio of penalty to loss at which k is the sampler's.
        k_min: smallest k, at least 1.
        k_max: largest k.
        smoothing: part of an average that a step keeps, in [0, 1): 0.99 looks back over about 100 steps.

    Attributes:
        reach: the sampler's, None where it has none.

    It draws k_max pairs and gives the first k of them, so that random numbers do not depend on k, and a compiled
    model takes a new k as a tensor of another size, without being compiled again (but once in all, and once for k = 1).

    Raises:
        ValueError: the sampler has no number k, or an argument is out of range.

    Example:
        >>> import torch, sire_fast
        >>> schedule = AdaptiveSwaps(sire_fast.swaps.Adjacent(4), k_max=16)
        >>> layer = sire_fast.GRU(3, 5, swaps=schedule, compare="swap")
        >>> output, _ = layer(torch.randn(7, 2, 3))
        >>> loss, penalty = output[-1].square().mean(), sire_fast.penalty(layer)
        >>> (loss + 0.1 * penalty).backward()
        >>> schedule.step(loss, penalty)
        >>> schedule(7, 2).shape[1] == schedule.k
        True
    """

    def __init__(
        self, sampler: Sampler, *, target: float = 1.0, k_min: int = 1, k_max: int = 32, smoothing: float = 0.99
    ) -> None:
        k = getattr(sampler, "k", None)
        if not dataclasses.is_dataclass(sampler) or not isinstance(k, int):
            raise ValueError(f"sampler: expected one with a number k (see sire_fast.swaps), got {sampler!r}")
        if not 1 <= k_min <= k <= k_max:
            raise ValueError(f"k_min, k_max: expected 1 <= k_min <= k <= k_max, got {k_min}, k={k} and {k_max}")
        self.sampler: Any = dataclasses.replace(sampler, k=k_max)
        self.reach: int | None = getattr(sampler, "reach", None)
        super().__init__(k, k_min, k_max, target, smoothing)
        self._follow()

    def _follow(self) -> None:
        # k is the size of a tensor: torch.compile takes other sizes, but compiles again for every other number
        self._chosen = torch.empty(round(self._value()), 0)

    @property
    def k(self) -> int:
        """Number of swaps that the next call returns."""
        return self._chosen.shape[0]

    def count(self, length: int) -> int:
        """Number of different pairs that a sequence of this length allows, as the sampler counts them."""
        return self.sampler.count(length)

    def __call__(
        self,
        lengths: int | Tensor,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the swaps of one pass: arguments and result as for the sampler, with K = k."""
        return self.sampler(lengths, batch, generator, device)[:, : self.k]

    def __repr__(self) -> str:
        return f"AdaptiveSwaps({dataclasses.replace(self.sampler, k=self.k)})"


class AdaptiveWeight(_Adaptive):
    """A weight of the penalty that follows its ratio to the loss: weight at the target * ratio / target.

    Args:
        weight: the weight at the target, and until the first step; above 0.
        target: the ratio of penalty to loss at which the weight is that.
        weight_min: smallest weight, at least 0.
        weight_max: largest weight.
        smoothing: part of an average that a step keeps, in [0, 1): 0.99 looks back over about 100 steps.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, sire_fast
        >>> schedule = AdaptiveWeight(0.1, target=0.5)
        >>> layer = sire_fast.GRU(3, 5, swaps=sire_fast.swaps.Uniform(4))
        >>> output, _ = layer(torch.randn(7, 2, 3))
        >>> loss, penalty = output[-1].square().mean(), sire_fast.penalty(layer)
        >>> (loss + schedule.weight * penalty).backward()
        >>> schedule.step(loss, penalty)
    """

    def __init__(
        self,
        weight: float,
        *,
        target: float = 1.0,
        weight_min: float = 0.0,
        weight_max: float = 1.0,
        smoothing: float = 0.99,
    ) -> None:
        if not (0 <= weight_min <= weight <= weight_max < math.inf and weight > 0):
            raise ValueError(
                "weight: expected above 0 and 0 <= weight_min <= weight <= weight_max, "
                f"got {weight}, {weight_min} and {weight_max}"
            )
        super().__init__(weight, weight_min, weight_max, target, smoothing)

    @property
    def weight(self) -> float:
        """For `loss + schedule.weight * penalty`; a number, which a compiled model takes without being compiled again
        (but once)."""
        return self._value()

    def __call__(self) -> float:
        """The same, for the argument `weight` of a layer or of sire_fast.convert."""
        return self.weight

    def __repr__(self) -> str:
        return f"AdaptiveWeight(weight={self.weight:g})"


class _Scaled:
    """A weight times the factor by which a loop multiplies its loss. Out of the loop, in a copy or a file, the factor
    is 1."""

    def __init__(self, weight: float | AdaptiveWeight, factor: Callable[[], float] = lambda: 1.0) -> None:
        self.weight, self.factor = weight, factor

    def __call__(self) -> float:
        return (self.weight() if callable(self.weight) else self.weight) * self.factor()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Scaled, (self.weight,)


# so that a file of a whole model may hold them, see sire_fast.layers
torch.serialization.add_safe_globals([AdaptiveSwaps, AdaptiveWeight, _Scaled])


def parse(text: str) -> Sampler | None:
    """The sampler that a command line names: as sire_fast.swaps.parse, or one of those with a number of swaps behind
    "adaptive:", for AdaptiveSwaps.

    Raises:
        ValueError: the text names no sampler.

    >>> parse("adaptive:uniform:4")
    AdaptiveSwaps(Uniform(k=4))
    """
    rest = text.removeprefix("adaptive:")
    sampler: Any = swaps.parse(rest)
    if rest == text:
        return sampler
    try:
        return AdaptiveSwaps(sampler)
    except ValueError as error:
        raise ValueError(f"swaps: {text!r}: {error}") from None
