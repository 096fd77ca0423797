"""SIRE in a Lightning Trainer.

>>> trainer = lightning.Trainer(max_epochs=1, callbacks=[Sire(0.1)])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
from torch import Tensor

from sire_fast.integrations import Joined, factor_of


class Sire(Joined, lightning.Callback):
    """Converts the recurrent layers of the module that is fitted; the module and its loss stay as they are.

    It logs the penalty, its ratio to the loss and the weight every `log_every_n_steps`, and the order sensitivity after
    each validation. Accumulated batches and loss scales are taken into account. Where `training_step` returns no loss
    (manual optimisation, a batch that is left out) there is no ratio, and schedules stay as they are. Checkpoints hold
    their state. Arguments: see Joined.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.join(pl_module, factor_of(trainer, _factor))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        found = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else None
        # Lightning has divided it by the number of accumulated batches
        whole = None if found is None else found * trainer.accumulate_grad_batches
        pl_module.log_dict(self.after_step(pl_module, whole))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        told = self.order_sensitivity(pl_module) if trainer.loggers else {}
        for logger in trainer.loggers if told else ():
            logger.log_metrics(told, step=trainer.global_step)


def _factor(trainer: lightning.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return (scaler.get_scale() if scaler else 1.0) / trainer.accumulate_grad_batches
