"""The penalty in other people's training loops and models. What needs a package that is missing is skipped.

Each example learns the last number of a sequence, once as its user would have it and once with the penalty. Order
decides that answer, so the penalty shows in how far another order still moves the model.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import sire_fast
from sire_fast.integrations import Joined
from sire_fast.schedules import AdaptiveSwaps, AdaptiveWeight
from sire_fast.swaps import Adjacent, Uniform

WEIGHT = 100.0  # of the penalty
others_warn = pytest.mark.filterwarnings("ignore")  # their warnings are not ours to heed


def data() -> TensorDataset:
    x = torch.randn(64, 7, 1, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, -1])


def moved_by_swaps(fn: Callable[[Tensor], Tensor]) -> Tensor:
    """How far a swap moves the answers, without the layers' own swaps."""
    x, _ = data().tensors
    with torch.no_grad():
        return sire_fast.swap_penalty(fn, x, Uniform(8), batch_first=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def optimise(model: nn.Module, loss: Callable[[], Tensor], steps: int = 40) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return model.eval()


def test_the_probe_leaves_modes_as_they_were() -> None:
    model, fails = Model(), False

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        assert not model.training
        if fails:
            raise ArithmeticError
        return model(x)

    model.head.eval()
    joined = Joined(probe=data().tensors[0], predict=predict)
    assert joined.order_sensitivity(model)["sire/order_sensitivity"] > 0
    fails = True
    with pytest.raises(ArithmeticError):
        joined.order_sensitivity(model)
    assert [model.training, model.rnn.training, model.head.training] == [True, True, False]


def test_a_probe_has_the_dtype_of_the_model() -> None:
    joined = Joined(probe=data().tensors[0])
    assert joined.order_sensitivity(Model().double())["sire/order_sensitivity"] > 0


def test_a_step_tells_what_there_is() -> None:
    """An error here would end somebody's training for a line of its log."""
    schedule, number, model = AdaptiveWeight(0.1), AdaptiveSwaps(Uniform(4)), Model()
    joined = Joined(schedule, swaps=number)
    joined.join(model, lambda: 1.0)
    assert joined.after_step(model, 1.0) == {"sire/weight": 0.1}
    model(data().tensors[0]).square().mean().backward()
    assert joined.after_step(model, None).keys() == {"sire/weight", "sire/penalty"}
    assert schedule.ratio == number.ratio == 1
    assert joined.after_step(model, 1.0).keys() == {"sire/weight", "sire/penalty", "sire/penalty_to_loss"}
    assert schedule.ratio == number.ratio != 1


@pytest.mark.parametrize("weight", [0.1, AdaptiveWeight(0.1)], ids=["number", "adaptive"])
def test_a_joined_model_can_be_copied_and_saved(weight: float | AdaptiveWeight) -> None:
    """Whoever reads it has no loop, whose factor the gradient would keep; the loop may not be a thing to save."""

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        (0 * model(data().tensors[0])).sum().backward()  # the penalty's alone
        return model.rnn.weight_hh_l0.grad

    model, file = _seeded(), io.BytesIO()
    Joined(weight, swaps=Adjacent("all")).join(model, lambda: 7.0)
    expected = gradient(model) / 7
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([Model, set, nn.Linear]):
        loaded = torch.load(file, weights_only=True)
    for twin in (pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(gradient(twin), expected)
    torch.testing.assert_close(gradient(copy.deepcopy(model)) / 7, expected)  # of the same loop


def test_plain_loop() -> None:
    x, y = data().tensors
    plain, sire = Model(), sire_fast.convert(Model(), swaps=Uniform(4), compare="end")
    optimise(plain, lambda: mse_loss(plain(x), y))
    optimise(sire, lambda: mse_loss(sire(x), y) + WEIGHT * sire_fast.penalty(sire))
    assert moved_by_swaps(sire) < moved_by_swaps(plain) / 10


def _seeded() -> Model:
    torch.manual_seed(0)
    return Model()


def _lightning_module() -> Any:
    """Of the seeded model: a class for a Trainer."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _seeded()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return mse_loss(self.model(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("score", mse_loss(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module


def _lightning_trainer(*callbacks: Any, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    usual = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "log_every_n_steps": 1}
    return lightning.Trainer(callbacks=[*callbacks], **usual | quiet | options)


@pytest.mark.proof
@others_warn
def test_lightning() -> None:
    class Module(_lightning_module()):  # type: ignore[misc]  # made where Lightning is installed
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.02)

    class SireModule(Module):
        def training_step(self, *arguments: Any) -> Tensor:
            loss = super().training_step(*arguments)
            return loss + WEIGHT * sire_fast.penalty(self)

    plain, sire = Module(), sire_fast.convert(SireModule(), swaps=Uniform(4), compare="end")
    for module in (plain, sire):
        _lightning_trainer(max_epochs=20).fit(module, DataLoader(data(), batch_size=32))
        module.eval()
    assert moved_by_swaps(sire.model) < moved_by_swaps(plain.model) / 10


@pytest.mark.proof
@others_warn
def test_hugging_face_trainer(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # what its Trainer needs

    class WithLoss(Model):
        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = super().forward(inputs)
            return {"loss": mse_loss(logits, labels), "logits": logits}

        def answers(self, x: Tensor) -> Tensor:
            return Model.forward(self, x)

    class SireTrainer(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
            share = self.current_gradient_accumulation_steps if scaled else 1
            loss = loss + WEIGHT / share * sire_fast.penalty(model)  # 0 in evaluation
            return (loss, outputs) if return_outputs else loss

    class Normalised(Model):
        def forward(self, inputs: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
            count = kwargs.get("num_items_in_batch", len(labels))
            return {"loss": mse_loss(super().forward(inputs), labels, reduction="sum") / count}

    rows = [{"inputs": x, "labels": y} for x, y in data()]
    for kind in (WithLoss, Normalised):  # one step on two batches
        torch.manual_seed(0)
        model = sire_fast.convert(kind(), swaps=Adjacent("all"), compare="end")
        settings = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_grad_norm=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        constant = torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0)
        SireTrainer(model, settings, train_dataset=rows, optimizers=(optimiser, constant)).train()
        expected = _expected(WEIGHT)
        torch.testing.assert_close(model.rnn.weight_hh_l0, expected.rnn.weight_hh_l0, rtol=1e-4, atol=1e-5)

    settings = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        num_train_epochs=20,
        per_device_train_batch_size=32,
        learning_rate=0.02,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    plain, sire = WithLoss(), sire_fast.convert(WithLoss(), swaps=Uniform(4), compare="end")
    for model, trainer in ((plain, transformers.Trainer), (sire, SireTrainer)):
        trainer(model, settings, train_dataset=rows).train()
        model.eval()
    assert moved_by_swaps(sire.answers) < moved_by_swaps(plain.answers) / 10
    x, y = data().tensors
    evaluated = SireTrainer(sire, settings, eval_dataset=rows).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(mse_loss(sire.answers(x), y).item(), rel=1e-3)


def _expected(weight: float) -> nn.Module:
    """The model after one step on the mean of two batches' losses, each with its penalty."""
    model = sire_fast.convert(_seeded(), swaps=Adjacent("all"), compare="end")
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for batch in DataLoader(data(), batch_size=32):
        ((mse_loss(model(batch[0]), batch[1]) + weight * sire_fast.penalty(model)) / 2).backward()
    optimiser.step()
    return model


@pytest.mark.proof
@others_warn
def test_the_callback_for_lightning_joins_what_accumulation_divides(tmp_path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from sire_fast.integrations.lightning import Sire

    probe, schedule = data().tensors[0], AdaptiveWeight(3.0, weight_max=9.0)
    sire = Sire(schedule, swaps=Adjacent("all"), compare="end", probe=probe, predict=lambda module, x: module.model(x))
    trainer = _lightning_trainer(sire, logger=CSVLogger(tmp_path), accumulate_grad_batches=2)
    module = _lightning_module()()
    trainer.fit(module, DataLoader(data(), batch_size=32), DataLoader(data(), batch_size=32))
    first, second = (p.detach() for model in (module.model, _expected(3.0)) for p in [model.rnn.weight_hh_l0])
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-4)  # the schedule moves a little between the batches
    assert schedule.ratio != 1
    (told,) = tmp_path.rglob("metrics.csv")
    for name in ("penalty", "weight", "penalty_to_loss", "order_sensitivity"):
        assert f"sire/{name}" in told.read_text()


@pytest.mark.proof
@others_warn
@pytest.mark.parametrize("manual", [False, True], ids=["left-out", "manual"])
def test_the_callback_for_lightning_where_a_step_returns_no_loss(tmp_path, manual: bool) -> None:
    """And all loggers get what the first gets, and no model keeps its trainer alive."""
    pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from sire_fast.integrations.lightning import Sire

    class Module(_lightning_module()):  # type: ignore[misc]  # made where Lightning is installed
        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            if index == 0:
                return None
            loss = super().training_step(batch, index)
            if not manual:
                return loss
            self.manual_backward(loss)
            self.optimizers().step()
            return None

    loggers = [CSVLogger(tmp_path, name) for name in ("first", "second")]
    sire = Sire(0.1, probe=data().tensors[0], predict=lambda module, x: module.model(x))
    trainer = _lightning_trainer(sire, logger=loggers)
    module = Module()
    module.automatic_optimization = not manual
    batches = DataLoader(data(), batch_size=16)
    trainer.fit(module, batches, batches)
    for name in ("first", "second"):
        (told,) = (tmp_path / name).rglob("metrics.csv")
        header = told.read_text().splitlines()[0].split(",")
        assert {"sire/penalty", "sire/weight", "sire/order_sensitivity"} <= set(header)
        assert ("sire/penalty_to_loss" in header) is not manual
    model, trainer = module.model, weakref.ref(trainer)
    del module, sire, loggers, batches
    gc.collect()
    assert trainer() is None
    mse_loss(model(data().tensors[0]), data().tensors[1]).backward()


@pytest.mark.proof
@others_warn
def test_lightning_goes_on_with_schedules(tmp_path) -> None:
    pytest.importorskip("lightning")
    from sire_fast.integrations.lightning import Sire

    def fit(**options: Any) -> Sire:
        sire = Sire(AdaptiveWeight(0.1), swaps=AdaptiveSwaps(Uniform(4)))
        trainer = _lightning_trainer(sire)
        trainer.fit(_lightning_module()(), DataLoader(data(), batch_size=16), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return sire

    first = fit()
    assert first.state_dict()["weight"] != AdaptiveWeight(0.1).state_dict()
    assert first.state_dict()["swaps"] != AdaptiveSwaps(Uniform(4)).state_dict()
    assert fit(ckpt_path=tmp_path / "last.ckpt").state_dict() == first.state_dict()


@pytest.mark.proof
@others_warn
def test_the_callback_for_the_hugging_face_trainer(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sire_fast.integrations.transformers import Sire

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _seeded()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": mse_loss(logits, labels), "logits": logits}

    rows = [{"inputs": x, "labels": y} for x, y in data()]
    settings = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        eval_strategy="epoch",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = WithLoss()
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(torch.optim.SGD(model.parameters(), 0.1), None),
    )
    predict = lambda model, x: model.model(x)  # noqa: E731
    options = {"swaps": Adjacent("all"), "compare": "end", "probe": data().tensors[0], "predict": predict}
    with pytest.raises(ValueError, match=r"Sire\(\.\.\.\)\.attach\(trainer\)"):
        transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows, callbacks=[Sire(0.1)]).train()
    Sire(3.0, **options).attach(trainer)
    reported, probed = [], []

    class Reports(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            reported.append(dict(logs))

    trainer.add_callback(Reports())
    model.model.head.register_forward_hook(lambda head, x, y: probed.append(len(y) == len(rows)))
    trainer.train()
    assert sum(probed) == 2  # the probe and its reordered twin, once
    (evaluated,) = (line for line in reported if "eval_loss" in line)
    (kept,) = (line for line in trainer.state.log_history if "sire/order_sensitivity" in line)
    assert "eval_loss" in kept
    assert evaluated["sire/order_sensitivity"] == kept["sire/order_sensitivity"]
    trainer.log = lambda logs: transformers.Trainer.log(trainer, dict(logs))  # as a subclass may
    assert "sire/order_sensitivity" in trainer.evaluate()
    expected = _expected(3.0)
    torch.testing.assert_close(model.model.rnn.weight_hh_l0, expected.rnn.weight_hh_l0, rtol=1e-4, atol=1e-6)
    told = {name for line in trainer.state.log_history for name in line}
    assert {f"sire/{name}" for name in ("penalty", "weight", "penalty_to_loss", "order_sensitivity")} <= told


@pytest.mark.proof
@others_warn
@pytest.mark.parametrize("restore", [False, True])
def test_hugging_face_goes_on_with_schedules(tmp_path, restore: bool) -> None:
    """With a model that the Trainer builds anew in train()."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sire_fast.integrations.transformers import Sire

    class WithLoss(Model):
        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": mse_loss(super().forward(inputs), labels)}

    rows = [{"inputs": x, "labels": y} for x, y in data()]

    def train(steps: int, resume: bool) -> Sire:
        settings = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=32,
            report_to="none",
            save_steps=2,
            logging_steps=1,
            disable_tqdm=True,
            restore_callback_states_from_checkpoint=restore,
        )
        trainer = transformers.Trainer(model_init=WithLoss, args=settings, train_dataset=rows)
        sire = Sire(AdaptiveWeight(0.1), swaps=AdaptiveSwaps(Uniform(4))).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(trainer.model.rnn, sire_fast.LSTM)
        return sire

    first = train(2, resume=False)
    (told,) = tmp_path.rglob("trainer_state.json")
    assert first.state_dict() in json.loads(told.read_text())["stateful_callbacks"].values()
    again = train(2, resume=True)
    assert again.state_dict() == first.state_dict()
    assert first.state_dict()["weight"] != AdaptiveWeight(0.1).state_dict()
    assert first.state_dict()["swaps"] != AdaptiveSwaps(Uniform(4)).state_dict()


@pytest.mark.proof
@others_warn
@pytest.mark.parametrize("inside", [False, True], ids=["over-padding", "inside-lengths"])
def test_pytorch_geometric(inside: bool) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")

    class InsideLengths(geometric.GRUAggregation):
        def forward(self, x, index=None, ptr=None, dim_size=None, dim=-2, max_num_elements=None) -> Tensor:
            x, real = self.to_dense_batch(x, index, ptr, dim_size, dim, max_num_elements=max_num_elements)
            return self.gru(x, lengths=real.sum(1).clamp(min=1))[1][-1]  # a node without neighbours reads one zero

    class Graph(nn.Module):
        def __init__(self, aggregation: type[nn.Module]) -> None:
            super().__init__()
            self.conv, self.head = geometric.SAGEConv(8, 16, aggr=aggregation(8, 8)), nn.Linear(16, 1)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.head(self.conv(x, edges))

    counts = torch.arange(64) % 5  # neighbours of each node
    to = torch.repeat_interleave(torch.arange(64), counts)
    edges = torch.stack((torch.randint(64, to.shape), to))
    reordered = torch.stack((edges[0, (-to).argsort(stable=True).flip(0)], to))  # each node's in reverse
    x = torch.randn(64, 8)
    last = edges[0, (counts.cumsum(0) - 1).clamp(min=0)]
    y = x[last, :1] * (counts > 0)[:, None]

    plain = Graph(geometric.GRUAggregation)
    sire = sire_fast.convert(Graph(InsideLengths if inside else geometric.GRUAggregation), swaps=Uniform(4))
    optimise(plain, lambda: mse_loss(plain(x, edges), y))
    optimise(sire, lambda: mse_loss(sire(x, edges), y) + WEIGHT * sire_fast.penalty(sire))
    with_sire, without = ((model(x, edges) - model(x, reordered)).square().mean() for model in (sire, plain))
    assert with_sire < without / 10


class Attention(nn.Module):
    """Nothing that `convert` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(1, 8), nn.Parameter(torch.randn(7, 8))
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x) + self.places)[:, -1])


class OwnCell(nn.Module):
    """A loop over a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(1, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


@pytest.mark.parametrize("kind", [Attention, OwnCell])
def test_any_other_model(kind: type[nn.Module]) -> None:
    x, y = data().tensors
    plain, sire = kind(), kind()
    optimise(plain, lambda: mse_loss(plain(x), y))
    optimise(
        sire, lambda: mse_loss(sire(x), y) + WEIGHT * sire_fast.swap_penalty(sire, x, Uniform(4), batch_first=True)
    )
    assert moved_by_swaps(sire) < moved_by_swaps(plain) / 10
