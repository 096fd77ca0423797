"""SIRE in Hugging Face's Trainer.

>>> trainer = transformers.Trainer(model, settings, train_dataset=rows)  # doctest: +SKIP
>>> Sire(0.1).attach(trainer)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from sire_fast.integrations import Joined, factor_of

_STATE = "sire_fast"  # no class of a callback, which the Trainer would build again without its arguments


class Sire(Joined, transformers.TrainerCallback):
    """Converts the recurrent layers of the model that is trained; the model and its loss stay as they are.

    Wherever the Trainer logs a loss, it adds the penalty of the last step, its ratio to the loss and the weight, and to
    the metrics of an evaluation the order sensitivity. Schedules follow what is logged: their steps are the Trainer's
    `logging_steps` apart; checkpoints hold their state. Accumulated batches and loss scales are taken into account.
    Arguments: see Joined.
    """

    _factor: Callable[[], float] | None = None
    _sensitivity: dict[str, float] | None = None  # of the evaluation that was logged last

    def attach(self, trainer: transformers.Trainer) -> Sire:
        """Add it to a Trainer, before the callbacks that report, so that they see what it logs."""
        self._factor = factor_of(trainer, _factor)
        self.join(trainer.model, self._factor)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self._factor is None:
            raise ValueError(
                "Sire: expected to be added by Sire(...).attach(trainer), which knows how losses are scaled"
            )
        self.join(model, self._factor)  # a Trainer with model_init has built another
        self.load_state_dict(state.stateful_callbacks.get(_STATE, {}))

    def on_log(
        self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            more = self.after_step(model, float(logs["loss"]))
            if self._schedules:
                state.stateful_callbacks[_STATE] = self.state_dict()
        elif any(key.startswith("eval_") for key in logs):
            more = self._sensitivity = self.order_sensitivity(model)
        else:
            return
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, metrics: dict, **kwargs: Any) -> None:
        metrics.update(self._sensitivity or {})  # a Trainer may log a copy of them


def _factor(trainer: transformers.Trainer) -> float:
    scaler = getattr(trainer.accelerator, "scaler", None)
    return (scaler.get_scale() if scaler else 1.0) / trainer.current_gradient_accumulation_steps
