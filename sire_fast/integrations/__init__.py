"""Callbacks that train a model with SIRE in the loops of others: sire_fast.integrations.lightning.Sire and
sire_fast.integrations.transformers.Sire. Each is imported only where its library is installed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sire_fast.inspection import evaluating
from sire_fast.layers import _SwapLayer, convert
from sire_fast.penalties import penalty
from sire_fast.schedules import AdaptiveWeight, _Adaptive, _Scaled
from sire_fast.swaps import Adjacent, Sampler

Loop = TypeVar("Loop")


def factor_of(loop: Loop, factor: Callable[[Loop], float]) -> Callable[[], float]:
    """What a loop multiplies its losses by; 1 once it is gone, which the model may outlive."""
    held = weakref.ref(loop)

    def now() -> float:
        there = held()
        return 1.0 if there is None else factor(there)

    return now


class Joined:
    """What the callbacks share: a model whose penalty joins by itself, and what is logged of it.

    Args:
        weight: of the penalty, as it would be added to the loss of a batch, which the loop may then divide or multiply;
            or an AdaptiveWeight, which follows the loss.
        swaps: see sire_fast.convert; an AdaptiveSwaps follows the loss, too.
        compare: see sire_fast.convert.
        probe: sequences, (B, T, ...), or (T, B, ...) without batch_first, on which the order sensitivity is measured;
            None to measure none.
        batch_first: of the probe.
        predict: (model, probe) -> answers (B, ...); model(probe) if not given.
    """

    def __init__(
        self,
        weight: float | AdaptiveWeight = 0.1,
        *,
        swaps: Sampler = Adjacent(8),  # noqa: B008
        compare: str = "swap",
        probe: Tensor | None = None,
        batch_first: bool = True,
        predict: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x),
    ) -> None:
        super().__init__()
        self.weight, self.swaps, self.compare = weight, swaps, compare
        self.probe, self.batch_first, self.predict = probe, batch_first, predict

    def join(self, model: nn.Module, factor: Callable[[], float]) -> None:
        """Convert a model whose loop multiplies the loss of each batch by a factor."""
        convert(model, self.swaps, self.compare, _Scaled(self.weight, factor))

    def after_step(self, model: nn.Module, loss: float | None) -> dict[str, float]:
        """Numbers of a step to log: penalty, its ratio to the loss, and the weight, which then follows them. What there
        is not, a loss or a forward so far, is left out."""
        told = {"sire/weight": _Scaled(self.weight)()}
        if all(m._ledger.joined() is None for m in model.modules() if isinstance(m, _SwapLayer)):
            return told
        told["sire/penalty"] = found = penalty(model).item()
        if loss is None:
            return told
        if loss > 0:
            told["sire/penalty_to_loss"] = found / loss
        if loss >= 0:
            for schedule in self._schedules.values():
                schedule.step(loss, found)
        return told

    @property
    def _schedules(self) -> dict[str, _Adaptive]:
        given = {"weight": self.weight, "swaps": self.swaps}
        return {name: each for name, each in given.items() if isinstance(each, _Adaptive)}

    def state_dict(self) -> dict[str, Any]:
        """Of the schedules, for a checkpoint."""
        return {name: schedule.state_dict() for name, schedule in self._schedules.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, schedule in self._schedules.items():
            if name in state_dict:
                schedule.load_state_dict(state_dict[name])

    @torch.no_grad()
    def order_sensitivity(self, model: nn.Module) -> dict[str, float]:
        """The mean change of the answers to the probe when each sequence comes in a random order; none without a
        probe."""
        if self.probe is None:
            return {}
        parameter = next(model.parameters())
        x = self.probe.to(parameter.device, parameter.dtype if self.probe.is_floating_point() else None)
        time, batch = (1, 0) if self.batch_first else (0, 1)
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(x.shape[batch], x.shape[time], generator=generator).argsort(1).to(x.device)
        rows = torch.arange(x.shape[batch], device=x.device)[:, None]
        reordered = x[rows, order] if self.batch_first else x.transpose(0, 1)[rows, order].transpose(0, 1)
        with evaluating(model):
            change = (self.predict(model, reordered) - self.predict(model, x)).abs().mean().item()
        return {"sire/order_sensitivity": change}
