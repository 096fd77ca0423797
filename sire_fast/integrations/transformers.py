"""SIRE in Hugging Face's Trainer.

>>> trainer = transformers.Trainer(model, settings, train_dataset=rows)  # doctest: +SKIP
>>> Sire(0.1).attach(trainer)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from sire_fast.integrations import Joined


class Sire(Joined, transformers.TrainerCallback):
    """Converts the recurrent layers of the model that is trained; the model and its loss stay as they are.

    Wherever the Trainer logs a loss, it adds the penalty of the last step, its ratio to the loss and the weight, and to
    the metrics of an evaluation the order sensitivity. An AdaptiveWeight follows what is logged: its steps are the
    Trainer's `logging_steps` apart. Accumulated batches and loss scales are taken into account.
    Arguments: see Joined.
    """

    def attach(self, trainer: transformers.Trainer) -> Sire:
        """Add it to a Trainer, before the callbacks that report, so that they see what it logs."""

        def factor() -> float:
            scaler = getattr(trainer.accelerator, "scaler", None)
            return (scaler.get_scale() if scaler else 1.0) / trainer.current_gradient_accumulation_steps

        self.join(trainer.model, factor)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.factor is None:
            raise ValueError(
                "Sire: expected to be added by Sire(...).attach(trainer), which knows how losses are scaled"
            )

    def on_log(
        self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self._tell(state, logs, self.after_step(model, float(logs["loss"])))

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, metrics: dict, **kwargs: Any) -> None:
        self._tell(state, metrics, self.order_sensitivity(model))

    def _tell(self, state: Any, told: dict[str, Any], more: dict[str, float]) -> None:
        told.update(more)
        if state.log_history:
            state.log_history[-1].update(more)
