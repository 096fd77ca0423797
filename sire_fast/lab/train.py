"""The command line's training loop, for every task: task loss + weight * swap penalty, with checkpoints and records.

A run is a directory:

    model.pt        checkpoint: model, optimiser, settings, step and states of the random numbers
    history.jsonl   a line every few steps: step, loss, penalty, metric on held-out sequences, seconds
    result.json     task, config, backend, metrics by test length, order sensitivity, seconds, versions
    curves.png      the history as a picture
    inspect.json, inspect.png   what `sire-fast inspect` found

The same settings give the same model, bit for bit, whether or not the run was interrupted and resumed.

In a group of processes (torch.distributed) each takes its part of every batch and draws its own swaps; the first
writes the files.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import torch
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn

import sire_fast
from sire_fast import schedules
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import check_device, check_size
from sire_fast.lab.files import alone, check_directory, write
from sire_fast.lab.tasks import TASKS, Task
from sire_fast.layers import COMPARES
from sire_fast.schedules import AdaptiveSwaps
from sire_fast.swaps import Sampler

LAYERS = {"rnn": sire_fast.RNN, "gru": sire_fast.GRU, "lstm": sire_fast.LSTM}
FILES = CHECKPOINT, HISTORY, RESULT, CURVES = "model.pt", "history.jsonl", "result.json", "curves.png"
INSPECTED = "inspect.json", "inspect.png"

EMBEDDING = 100  # features of a number
CLIP = 5.0  # largest norm of the gradient
RECORDS = 100  # lines of history, and checkpoints, of a whole run
ORDERS = 20  # random orders of each sequence whose order sensitivity is measured

# Held-out sequences: their seeds do not depend on the run, so that runs can be compared.
_TEST_SEED, _VALIDATION_SEED = 1 << 40, 1 << 41
_TEST_SEQUENCES, _VALIDATION_SEQUENCES, _REORDERED_SEQUENCES = 1000, 1000, 100

Report = Callable[[int, float, float], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Config:
    """Settings of a run; `sire-fast train` has an option for each.

    Raises:
        ValueError: a setting has no such value, or the device cannot be used.
    """

    task: Annotated[str, f"One of {', '.join(TASKS)}."]
    cell: Annotated[str, f"One of {', '.join(LAYERS)}."] = "gru"
    hidden: Annotated[int, "Units of the recurrent layer."] = 64
    swaps: Annotated[
        str | None,
        "Positions exchanged: none, uniform:4, adjacent:8, adjacent:all, window:4:3, blocks:4:0.5, pairs:2:0-1,2-3; "
        "adaptive: before one lets their number follow the penalty. The task's own if not given.",
    ] = None
    compare: Annotated[str, "Where states are compared: swap (after the pair) or end (of the sequence)."] = "end"
    weight: Annotated[float, "Factor of the penalty."] = 0.1
    steps: Annotated[int, "Steps of the optimiser."] = 4000
    batch: Annotated[int, "Sequences in a step, of all processes together."] = 64
    lr: Annotated[float, "Learning rate of Adam."] = 1e-3
    examples: Annotated[int, "Size of the training set, evenly among the training lengths; 0: always new."] = 0
    seed: Annotated[int, "Of the model, the data and the swaps."] = 0
    device: Annotated[str, "As torch names it."] = "cpu"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is float and isinstance(value, (int, float)):
                object.__setattr__(self, name, float(value))  # NumPy's could not be read from a checkpoint
            elif not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
        for name, known in (("task", TASKS), ("cell", LAYERS), ("compare", COMPARES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        for name in ("hidden", "steps", "batch"):
            check_size(name, getattr(self, name))
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: expected a number of at least 0, got {self.weight}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a number above 0, got {self.lr}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: expected at least 0 and below 2**63, got {self.seed}")
        task = TASKS[self.task]
        lengths = len(task.train_lengths)
        if self.examples and not lengths <= self.examples < 1 << 31:
            expected = f"expected 0, or at least one for each of {lengths} lengths and below 2**31"
            raise ValueError(f"examples: {expected}, got {self.examples}")
        if self.swaps is None:
            object.__setattr__(self, "swaps", task.swaps)
        self.sampler()
        check_device(self.device)

    def sampler(self) -> Sampler | None:
        """Of the swaps, None for none."""
        assert self.swaps is not None  # which stands for the task's own until the settings are checked
        return schedules.parse(self.swaps)


class Model(nn.Module):
    """Random features of each number, fixed; a recurrent layer; a linear head on its last output.

    Maps sequences (T, B) int64 to outputs (B, O).
    """

    features: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        task = TASKS[config.task]
        # a buffer: it is saved with the model but not trained (Murphy et al.)
        self.register_buffer("features", torch.rand(task.vocabulary, EMBEDDING) - 0.5)
        self.layer = LAYERS[config.cell](EMBEDDING, config.hidden, swaps=config.sampler(), compare=config.compare)
        self.head = nn.Linear(config.hidden, task.outputs)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(self.features[x])
        return self.head(output[-1])


def place() -> tuple[int, int]:
    """This process's number, from 0, and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def of_all(value: Result) -> list[Result]:
    """The value that each process gives."""
    values = [value] * place()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def by_first(action: Callable[[], Result]) -> Result:
    """Run something in the first process alone; what it returns or raises there, it returns or raises in all."""
    rank, processes = place()
    if processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except BaseException as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    result, wrong = outcome
    if wrong is not None:
        raise wrong
    return result


def claim(*directories: Path, force: bool = False, resumable: bool = True) -> None:
    """Make directories, and nobody else's runs in them, ready for new runs: nothing is deleted unless all can be.

    Args:
        force: whether to delete runs that they hold.
        resumable: whether the caller has a way to go on with one.

    Raises:
        ValueError: one is a file, cannot be written to, or holds a run, which `force` would delete.
        OSError: one cannot be made, or another process trains there.
    """
    held = []
    for directory in directories:
        check_directory(directory)
        if not any((directory / name).exists() for name in FILES):
            continue
        if not force:
            goes_on = "--resume goes on with it, " if resumable and (directory / CHECKPOINT).exists() else ""
            raise ValueError(f"{directory}: holds a run already; {goes_on}--force replaces it")
        held.append(directory)
    with ExitStack() as locks:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
            locks.enter_context(alone(directory))
        for directory in held:
            for name in (*FILES, *INSPECTED):
                (directory / name).unlink(missing_ok=True)


class Run:
    """A run at some step, from which it can go on: all that a checkpoint holds.

    Args:
        config: the settings.
        directory: where the run's files go, see `claim`.

    Torch's own random numbers are seeded: swaps are drawn from them.

    Raises:
        ValueError: the processes cannot share a batch evenly.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.rank, self.processes = place()
        if config.batch % self.processes:
            raise ValueError(f"batch: expected a multiple of the {self.processes} processes, got {config.batch}")
        self.task = TASKS[config.task]
        torch.manual_seed(config.seed)
        self.data = torch.Generator().manual_seed(int(torch.randint(1 << 40, ())))
        self.model = Model(config).to(config.device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        sampler = self.model.layer.swaps
        self.schedule = sampler if isinstance(sampler, AdaptiveSwaps) else None
        self.trained_by = self.processes
        self.step = 0
        self.seconds = 0.0
        self.sums = [0.0, 0.0, 0]  # loss, penalty and number of steps since the last line of the history
        self.history: list[dict[str, float]] = []
        self.board: Any = None
        lengths = self.task.train_lengths
        share, rest = divmod(config.examples, len(lengths))
        counts = [share + (n < rest) for n in range(len(lengths))]
        self.examples = [self.task.sample(*size, self.data) for size in zip(lengths, counts, strict=True) if share]
        if self.rank:  # swaps of its own, from the one seed
            torch.manual_seed(int(torch.randint(1 << 40, (self.rank,))[-1]))

    def advance(self) -> tuple[float, float]:
        """One step of the optimiser; returns the task's loss and the penalty before it, means over all processes.

        Raises:
            FloatingPointError: the loss or its gradient is no longer finite. The model is that of the step before.
        """
        began = time.perf_counter()
        of_all_processes = self.task.batch(self.examples, self.config.batch, self.data)
        x, y = (t[..., self.rank :: self.processes].to(self.config.device) for t in of_all_processes)
        self.model.train()
        task_loss = self.task.loss(self.model(x), y)
        penalty = sire_fast.penalty(self.model) if self.model.layer.swaps else torch.zeros(())
        loss = task_loss + self.config.weight * penalty
        values = self._mean(task_loss.item(), penalty.item())
        if not math.isfinite(sum(values)):
            self._refuse("loss", values[0] + self.config.weight * values[1])
        self.optimiser.zero_grad()
        loss.backward()
        self._share_gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP).item()
        if not math.isfinite(norm):
            self._refuse("norm of its gradient", norm)
        self.optimiser.step()
        if self.schedule:
            self.schedule.step(*values)
        self.step += 1
        self.sums = [total + value for total, value in zip(self.sums, (*values, 1), strict=True)]
        self.seconds += time.perf_counter() - began
        return values[0], values[1]

    def _refuse(self, what: str, value: float) -> NoReturn:
        raise FloatingPointError(f"the {what} is {value} after step {self.step}; a smaller lr or weight may help")

    def _share_gradients(self) -> None:
        """Make each gradient its mean over all processes."""
        if self.processes == 1:
            return
        # as one sum in one order: DistributedDataParallel learns its order anew in a resumed run, and rounds otherwise
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        joined = nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(joined)
        nn.utils.vector_to_parameters(joined / self.processes, gradients)

    def _mean(self, *values: float) -> tuple[float, ...]:
        """The mean of each value over all processes."""
        if self.processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.config.device)
        distributed.all_reduce(total)
        return tuple((total / self.processes).tolist())

    def record(self) -> None:
        """Add a line to the history: means since the last one, and the metric on held-out sequences."""
        loss, penalty, steps = self.sums
        self.sums = [0.0, 0.0, 0]
        line = {
            "step": self.step,
            "loss": loss / steps,
            "penalty": penalty / steps,
            self.task.metric: validate(self.model, self.task),
            "seconds": self.seconds,
        }
        self.history.append(line)
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write(self.directory / HISTORY, lines)  # no half line on a full disk
        if self.board:
            for name in ("loss", "penalty", self.task.metric):
                self.board.add_scalar(name, line[name], self.step)
            self.board.flush()

    def show_in_tensorboard(self, directory: Path) -> None:
        """Write the lines of the history there from now on, for TensorBoard.

        Raises:
            ValueError: it is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("log: TensorBoard is not installed: pip install tensorboard") from None
        self.board = SummaryWriter(directory, purge_step=self.step + 1)

    def save(self) -> None:
        """Write the checkpoint."""
        cuda = self.model.features.is_cuda
        random = [torch.get_rng_state(), torch.cuda.get_rng_state(self.config.device) if cuda else None]
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "data": self.data.get_state(),
            "random": of_all(random),
        }
        by_first(lambda: write(self.directory / CHECKPOINT, lambda file: torch.save(state, file)))

    @classmethod
    def load(cls, directory: Path, device: str | None = None) -> Run:
        """The run whose checkpoint lies in a directory, on its own device or on another.

        It goes on as if it had not stopped where as many processes train it as before, `trained_by`; others would
        begin with new swaps.

        Raises:
            ValueError: there is no checkpoint, or it cannot be used.
        """
        path = directory / CHECKPOINT
        if not path.is_file():
            raise ValueError(f"{directory}: expected a run with its checkpoint {CHECKPOINT}, found none")
        if device is not None:
            check_device(device)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            moved = {} if device is None else {"device": device}
            run = cls(Config(**state["config"] | moved), directory)
            run.model.load_state_dict(state["model"])
            run.optimiser.load_state_dict(state["optimiser"])
            if run.schedule:
                run.schedule.load_state_dict(state["schedule"])
            run.step, run.seconds, run.sums = state["step"], state["seconds"], state["sums"]
            run.data.set_state(state["data"])
            run.trained_by = len(state["random"])
            if run.trained_by == run.processes:
                random, cuda_random = state["random"][run.rank]
                torch.set_rng_state(random)
                if cuda_random is not None and device is None:
                    torch.cuda.set_rng_state(cuda_random, run.config.device)
            if (directory / HISTORY).exists():
                lines = map(json.loads, (directory / HISTORY).read_text().splitlines())
                run.history = [line for line in lines if line["step"] <= run.step]
        except json.JSONDecodeError as error:
            raise ValueError(f"{directory / HISTORY}: is damaged: {error}") from error
        except Exception as error:  # a damaged file can fail in any way, and most speak of their own insides
            reason = f"{CHECKPOINT} is damaged, or of another version or program ({type(error).__name__})"
            if isinstance(error, (OSError, ValueError)):
                reason = str(error).splitlines()[0]
            raise ValueError(f"{directory}: holds no run that can be used here: {reason}") from error
        return run

    def train(self, report: Report | None = None) -> dict[str, Any]:
        """Go on to the last step and write the result.

        Args:
            report: called after every step with its number, the task's loss and the penalty.

        Returns:
            What result.json holds.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint of the last step has been written.
            FloatingPointError: the loss or its gradient is no longer finite; the last checkpoint stays.
            OSError: the directory is not there, a file cannot be written, or another process trains there.
        """
        with ExitStack() as held:
            by_first(lambda: held.enter_context(alone(self.directory)))
            return self._train(report)

    def _train(self, report: Report | None) -> dict[str, Any]:
        every = math.ceil(self.config.steps / RECORDS)
        with _interrupts_held() as interrupted, too_short_to_swap():
            while self.step < self.config.steps:
                loss, penalty = self.advance()
                if report:
                    report(self.step, loss, penalty)
                stop = any(self._mean(interrupted()))  # Ctrl-C may reach processes at different steps
                due = self.step % every == 0 or self.step == self.config.steps
                if due:
                    by_first(self.record)
                if due or stop:
                    self.save()
                if stop:
                    raise KeyboardInterrupt
        # here Ctrl-C stops the first process at once, and the others, which wait, learn of it from there
        with _interrupts_held() if self.rank else nullcontext():
            return by_first(self._finish)

    def _finish(self) -> dict[str, Any]:
        """Measure the model and write the result."""
        result = {
            "task": self.config.task,
            "config": asdict(self.config),
            "backend": self.model.layer.backend,
            **evaluate(self.model, self.task),
            "seconds": self.seconds,
            "versions": benchmark.versions(),
        }
        curves = _curves(self)
        write(self.directory / CURVES, lambda file: curves.savefig(file, format="png", dpi=120))
        write(self.directory / RESULT, json.dumps(result, indent=2) + "\n")
        return result


@torch.no_grad()
def evaluate(model: Any, task: Task) -> dict[str, Any]:
    """Measure a model on held-out sequences, the same for every model.

    Returns:
        metrics: for every test length (as text) the task's metrics on 1000 sequences, and their order
            sensitivity: the mean |change of the answer| over 20 random orders of the first 100;
        order_sensitivity: mean and max of |change of the answer| over all test lengths.
    """
    model.eval()
    device = model.features.device
    metrics, changes = {}, []
    for length in task.test_lengths:
        generator = torch.Generator().manual_seed(_TEST_SEED + length)
        x, y = task.sample(length, _TEST_SEQUENCES, generator)
        answers = task.answer(model(x.to(device)))
        scores = {name: metric(answers, y.to(device)).item() for name, metric in task.metrics.items()}
        first = slice(_REORDERED_SEQUENCES)
        orders = [task.reorder(x[:, first], generator).to(device) for _ in range(ORDERS)]
        changes.append(torch.stack([(task.answer(model(o)) - answers[first]).abs() for o in orders]).flatten())
        metrics[str(length)] = {**scores, "order_sensitivity": changes[-1].mean().item()}
    change = torch.cat(changes)
    return {
        "metrics": metrics,
        "order_sensitivity": {"mean": change.mean().item(), "max": change.max().item()},
    }


@torch.no_grad()
def validate(model: Any, task: Task) -> float:
    """The task's metric on held-out sequences, shared out evenly among the training lengths."""
    model.eval()
    device = model.features.device
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    metric = task.metrics[task.metric]
    scores = []
    for length in task.train_lengths:
        x, y = task.sample(length, math.ceil(_VALIDATION_SEQUENCES / len(task.train_lengths)), generator)
        scores.append(metric(task.answer(model(x.to(device))), y.to(device)).item())
    return sum(scores) / len(scores)


def _curves(run: Run) -> Figure:
    """Loss and penalty, and the metric, against the step."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, metric = figure.subplots(1, 2)
    history = run.history
    steps = [line["step"] for line in history]
    losses.plot(steps, [line["loss"] for line in history], label="task loss")
    if run.model.layer.swaps:
        losses.plot(steps, [line["penalty"] for line in history], label="swap penalty")
    losses.set(xlabel="step", yscale="log", title=f"{run.config.task}, {run.config.cell}, training")
    losses.legend(frameon=False)
    metric.plot(steps, [line[run.task.metric] for line in history], color="C2")
    metric.set(xlabel="step", ylabel=run.task.metric, title="held-out sequences of the training lengths")
    for axes in (losses, metric):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@contextmanager
def too_short_to_swap() -> Iterator[None]:
    """Be silent of such batches, which some tasks have among others; the published sampler needs three steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sire_fast: .* nothing to swap in sequences of [12] step", UserWarning)
        yield


@contextmanager
def _interrupts_held() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of the step, so that no step is half done; a second one does not wait."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can and need do this
        yield seen.is_set
        return

    def hold(*_: object) -> None:
        seen.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)
