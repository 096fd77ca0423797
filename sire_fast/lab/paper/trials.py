"""One model trained once, measured after a number of steps and after a time; and a pool of processes for many.

Every trial is a file that appears when it ends, so that a stopped experiment goes on with those that lack; a stopped
trial goes on from a checkpoint beside that file, which is gone when it ends. No trial replaces the files of another.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sire_fast.lab import baselines, benchmark
from sire_fast.lab.files import write
from sire_fast.lab.paper import data
from sire_fast.lab.paper.problems import Classes, LocalImages, Sequences
from sire_fast.lab.tasks import TASKS
from sire_fast.lab.train import CLIP, too_short_to_swap
from sire_fast.lab.workers import pool
from sire_fast.schedules import AdaptiveSwaps
from sire_fast.swaps import Sampler

AVERAGED = 0.998  # part of the averaged weights that a step keeps: they stand in for a schedule of the learning rate
SAVED_EVERY = 60.0  # seconds between checkpoints

Problem = Sequences | Classes


@dataclass(frozen=True)
class Trial:
    """Settings of one training.

    Attributes:
        problem: a key of sire_fast.lab.tasks.TASKS, "lp-mnist" (by rows), "lp-mnist-pixels" or "points".
        model: a key of baselines.RECURRENT, "janossy", "deepsets-" and one of baselines.REDUCTIONS, "sab", "isab" or
            "cnn".
        cell, hidden: of the recurrent model, whose number of parameters all but the CNN get.
        fresh: a new order of every example whenever it is seen.
        swaps: as sire_fast.swaps.parse reads it; "published", see PublishedSwaps; "adaptive:" before one with a K, see
            AdaptiveSwaps; for images also those of LocalImages.
        compare, weight: of the penalty.
        warm_up: steps over which the weight grows to that.
        through: compare the outputs, what the head makes of the states.
        dropout: before the head (of Deep Sets: before rho).
        window: of recurrent models, steps of the sequence that an optimiser's step learns from, the answer being asked
            for behind each window (truncated backpropagation, as the authors do); 0 for all.
        augment: stretch and turn point clouds.
        steps: of the optimiser, after which the model is measured, as after
        seconds: of training, of one core.
        records: lines of the history, each with a validation.
        until: stop where validation reaches it.
        patience: lines of the history without better validation after which to stop; what is measured is then the
            model of the best line. 0 for the last model after all steps.
        batch, lr, seed: as usual.
        examples: size of the training set; 0 for new ones at every step. Tasks only.
        train_lengths, test_lengths: of sequences, in place of the task's own; of points: how many are read.
        data: path for images and point clouds, None for generated ones.
    """

    problem: str
    model: str = "gru"
    cell: str = "gru"
    hidden: int = 64
    fresh: bool = False
    swaps: str = "none"
    compare: str = "end"
    weight: float = 0.1
    steps: int = 4000
    seconds: float = 0.0
    until: float | None = None
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0
    examples: int = 0
    train_lengths: tuple[int, ...] = ()
    test_lengths: tuple[int, ...] = ()
    data: str | None = None
    through: bool = False
    warm_up: int = 0
    patience: int = 0
    dropout: float = 0.0
    window: int = 0
    augment: bool = False
    records: int = 50


def make_problem(trial: Trial, generator: torch.Generator) -> Problem:
    """What a trial learns."""
    path = None if trial.data is None else Path(trial.data)
    if trial.problem in ("lp-mnist", "lp-mnist-pixels"):
        return LocalImages(data.images(path), trial.swaps, by_pixels=trial.problem == "lp-mnist-pixels")
    if trial.problem == "points":
        return Classes(data.points(path), trial.train_lengths[0], trial.augment)
    task = TASKS[trial.problem]
    lengths = {name: getattr(trial, name) or getattr(task, name) for name in ("train_lengths", "test_lengths")}
    return Sequences(replace(task, **lengths), trial.examples, generator)


def make_model(trial: Trial, problem: Problem) -> nn.Module:
    """The model of a trial, x (T, B, ...) -> (B, O)."""

    def build(name: str, width: int, sampler: Sampler | None = None) -> nn.Module:
        model: nn.Module
        inputs, outputs = problem.inputs, problem.outputs
        if isinstance(problem, LocalImages) and name == "cnn":
            return baselines.ImageCNN(problem.height, problem.width, outputs)
        if name in ("sab", "isab"):
            inducing = 16 if name == "isab" else 0
            return baselines.SetTransformer(inputs, width, outputs, inducing=inducing, dropout=trial.dropout)
        encoder = baselines.PointEncoder(inputs, width) if trial.problem == "points" else None
        inputs = width if encoder else inputs
        kind, _, reduce = name.partition("-")
        if kind == "deepsets":
            model = baselines.DeepSets(inputs, width, outputs, reduce, trial.dropout)
        else:
            cell = trial.cell if name == "janossy" else name
            model = baselines.Recurrent(inputs, width, outputs, cell, sampler, trial.compare, trial.dropout)
        if encoder:
            model = baselines.Encoded(encoder, model)
        return baselines.Janossy(model) if name == "janossy" else model

    width = trial.hidden
    if trial.model not in (*baselines.RECURRENT, "janossy", "cnn"):
        with torch.device("meta"):
            wanted = baselines.parameters(build(trial.cell, trial.hidden))
        multiple = 4 if trial.model in ("sab", "isab") else 1
        width = baselines.of_size(lambda n: build(trial.model, n), wanted, multiple)
    return problem.wrap(build(trial.model, width, problem.sampler(trial.swaps)))


@dataclass
class Progress:
    """What a training has done so far, beside its weights.

    Attributes:
        swapped: what `run` returns as adaptive_swaps.
        losses: task loss and penalty of each step since the last line of the history.
        found: what `run` returns under "steps" and "seconds".
        best, waited: the best line's score, and the lines since.
        diverged: see `run`.
    """

    step: int = 0
    seconds: float = 0.0
    swapped: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: float = -math.inf
    waited: int = 0
    diverged: int | None = None


class Training:
    """A trial at some step, from which it can go on: all that a checkpoint holds."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        torch.manual_seed(trial.seed)
        self.generator = torch.Generator().manual_seed(int(torch.randint(1 << 40, ())))
        self.problem = make_problem(trial, self.generator)
        self.model = make_model(trial, self.problem)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.measured = copy.deepcopy(self.average) if trial.patience else self.average
        self.weights: tuple[list[Tensor], list[Tensor]] = [*self.average.parameters()], [*self.model.parameters()]
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=trial.lr, fused=True)
        self.recurrent = next((m for m in self.model.modules() if isinstance(m, baselines.Recurrent)), None)
        sampler = self.recurrent.layer.swaps if self.recurrent else None
        self.schedule = sampler if isinstance(sampler, AdaptiveSwaps) else None
        self.at = Progress()

    def advance(self) -> bool:
        """Learn from a batch; False, and its window is not learned, if the loss or its gradient is no longer finite."""
        began, trial, at = time.process_time(), self.trial, self.at
        x, y = self.problem.batch(trial.batch, self.generator)
        if trial.fresh:
            x = self.problem.reorder(x, self.generator)
        self.model.train()
        carrying = self.recurrent if trial.window else None
        through = self.recurrent.head if self.recurrent and trial.through else None
        weight = trial.weight * (min(1.0, at.step / trial.warm_up) if trial.warm_up else 1.0)
        for window in x.split(trial.window or len(x)):
            loss = self.problem.loss(self.model(window), y)
            penalty = self.problem.penalty(self.model, through) if trial.swaps != "none" else torch.zeros(())
            self.optimiser.zero_grad()
            (loss + weight * penalty).backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            values = loss.item(), penalty.item()
            if not math.isfinite(sum(values) + norm.item()):
                return False
            self.optimiser.step()
            at.losses.append(values)
            if carrying:
                carrying.initial = carrying.last
        if carrying:
            carrying.initial = None
        if self.schedule:
            at.swapped += self.schedule.k * trial.batch
            self.schedule.step(*at.losses[-1])
        at.step += 1
        with torch.no_grad():  # AveragedModel of torch's swa_utils would begin with the first step's weights
            torch._foreach_lerp_(*self.weights, 1 - min(AVERAGED, at.step / (at.step + 9)))
        at.seconds += time.process_time() - began
        return True

    def record(self) -> bool:
        """Add a line to the history; True where the training has nothing left to reach."""
        trial, at = self.trial, self.at
        loss, penalty = (sum(values) / len(values) for values in zip(*at.losses, strict=True))
        validation = self.problem.validate(self.average)
        line = {"step": at.step, "seconds": at.seconds, "loss": loss, "penalty": penalty, "validation": validation}
        at.history.append(line)
        at.losses = []
        at.waited += 1
        if sign(trial) * validation > at.best:
            at.best, at.waited = sign(trial) * validation, 0
            if trial.patience:
                self.measured.load_state_dict(self.average.state_dict())
        reached = trial.until is not None and validation >= trial.until
        return reached or 0 < trial.patience <= at.waited

    def measure(self) -> dict[str, Any]:
        return {"step": self.at.step, "seconds": self.at.seconds, **self.problem.evaluate(self.measured)}

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"trial": _told(self.trial), "at": vars(self.at)}
        state |= {"generator": self.generator.get_state(), "random": torch.get_rng_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint as if there had been no stop.

        Raises:
            ValueError: it is damaged, or another trial's.
        """
        try:
            state = torch.load(path, weights_only=True)
            _check(path, state["trial"], self.trial)
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.at = Progress(**state["at"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["random"])
        except Another:
            raise
        except Exception as error:  # a damaged file can fail in any way
            reason = f"is damaged, or of another version ({type(error).__name__})"
            raise ValueError(f"{path}: {reason}; without it the training begins anew") from error

    def _parts(self) -> dict[str, Any]:
        names = "model", "average", "measured", "optimiser", "schedule"
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def run(trial: Trial, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train and measure.

    Args:
        checkpoint: a file to go on from, if it is there, and to write now and then.

    Returns:
        trial, parameters, source (of the data), epoch (examples in one, 0 if all are new), adaptive_swaps (their
        number), history, machine, and "steps" and "seconds": what problem.evaluate finds there, with the step and
        the seconds. Times are those of the process on a core: another program on the machine hardly lengthens them.
        Without a limit in seconds, or where `until` is reached or `patience` ends first, both are one. diverged is the
        step after which the loss or its gradient was no longer finite, None as a rule; the model before it is then
        measured.
    """
    machine = benchmark.machine()  # before the checkout can move on
    training = Training(trial)
    if checkpoint and checkpoint.exists():
        training.load(checkpoint)
    at, saved = training.at, time.monotonic()
    every = math.ceil(trial.steps / trial.records)
    while len(at.found) < 2:
        if checkpoint and time.monotonic() - saved >= SAVED_EVERY:
            training.save(checkpoint)
            saved = time.monotonic()
        if not training.advance():
            measured = training.measure()
            at.found, at.diverged = {"steps": measured, "seconds": measured} | at.found, at.step
            break
        ended = (at.step % every == 0 or at.step == trial.steps) and training.record()
        due = {"steps": at.step == trial.steps, "seconds": 0 < trial.seconds <= at.seconds}
        for name in [name for name in due if name not in at.found and (due[name] or ended)]:
            at.found[name] = training.measure()
        if trial.seconds == 0 and "steps" in at.found:
            at.found["seconds"] = at.found["steps"]
    return {
        "trial": _told(trial),
        "parameters": baselines.parameters(training.model),
        "source": training.problem.source,
        "epoch": training.problem.epoch,
        "adaptive_swaps": at.swapped,
        "history": at.history,
        "diverged": at.diverged,
        **at.found,
        "machine": machine,
    }


def sign(trial: Trial) -> int:
    """-1 where less of a trial's metric is better."""
    return -1 if trial.problem in TASKS and TASKS[trial.problem].metric != "accuracy" else 1


def best(result: dict[str, Any]) -> float:
    """The best validation of what `run` returned; more is better."""
    factor = sign(Trial(**result["trial"]))
    return max((factor * line["validation"] for line in result["history"]), default=-math.inf)


def _told(trial: Trial) -> dict[str, Any]:
    """A trial for its files, which tell the name of the data, not where they lie."""
    return asdict(replace(trial, data=None if trial.data is None else Path(trial.data).name))


def run_all(trials: Sequence[tuple[Path, Trial]], workers: int, finished: Callable[[], None]) -> None:
    """Run the trials whose files lack, several at a time.

    Args:
        trials: where each one's result goes, and the trial.
        workers: number of processes, of one thread each; 1 for this one alone, with as many as it has.
        finished: called for every trial that is done, at once for those that have been.

    Raises:
        ValueError: data or a checkpoint cannot be read, or a file is another trial's.
    """
    waiting = []
    for path, trial in trials:
        if _done(path, trial):
            finished()
        else:
            waiting.append((path, trial))
    if workers == 1:
        for path, trial in waiting:
            _run_into(path, trial)
            finished()
        return
    # joblib would be no shorter: its workers know as little of Ctrl-C, threads and trials
    with pool(workers, _worker) as running:
        futures = [running.submit(_run_into, path, trial) for path, trial in waiting]
        try:
            for future in as_completed(futures):
                future.result()
                finished()
        except BaseException:
            for process in list(running._processes.values()):
                process.terminate()
            running.shutdown(wait=False, cancel_futures=True)
            raise


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(1)


class Another(ValueError):
    """The file of another trial is in the way."""


def _check(path: Path, told: dict[str, Any], trial: Trial) -> None:
    """Raise Another unless a file tells of this trial. What an older one does not tell has its default."""
    found, wanted = (json.loads(json.dumps(each)) for each in (asdict(Trial("")) | told, _told(trial)))
    differing = [f"{key} {found[key]!r}, not {wanted.get(key)!r}" for key in found if found[key] != wanted.get(key)]
    if differing:
        raise Another(f"{path}: is of another training: {', '.join(differing)}; take another --out, or move it away")


def _done(path: Path, trial: Trial) -> bool:
    """Whether a file holds the result of a trial; Another if it is another's."""
    try:
        told = json.loads(path.read_text())["trial"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that nobody can use
        return False
    _check(path, told, trial)
    return True


def _run_into(path: Path, trial: Trial) -> None:
    checkpoint = path.with_suffix(".pt")
    with too_short_to_swap():
        found = run(trial, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(found) + "\n")
    checkpoint.unlink(missing_ok=True)
