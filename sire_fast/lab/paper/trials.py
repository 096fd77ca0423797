"""One model trained once, measured after a number of steps and after a time; and a pool of processes for many.

Every trial is a file that appears when it ends, so that a stopped experiment goes on with those that lack.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sire_fast import schedules
from sire_fast.lab import baselines, benchmark
from sire_fast.lab.paper import data
from sire_fast.lab.paper.problems import Classes, LocalImages, Sequences
from sire_fast.lab.tasks import TASKS
from sire_fast.lab.train import CLIP, write
from sire_fast.schedules import AdaptiveSwaps
from sire_fast.swaps import Sampler

AVERAGED = 0.998  # part of the averaged weights that a step keeps: they stand in for a schedule of the learning rate
RECORDS = 50  # lines of history of a trial

Problem = Sequences | Classes


@dataclass(frozen=True)
class Trial:
    """Settings of one training.

    Attributes:
        problem: a key of sire_fast.lab.tasks.TASKS, "lp-mnist" or "points".
        model: "rnn", "gru", "lstm", "janossy", "deepsets-" and one of baselines.REDUCTIONS, "sab", "isab" or "cnn".
        cell, hidden: of the recurrent model, whose number of parameters all but the CNN get.
        fresh: a new order of every example whenever it is seen.
        swaps: as sire_fast.swaps.parse reads it; "published", see PublishedSwaps; "adaptive:" before one with a K, see
            AdaptiveSwaps; for images also "local:N" and "neighbours:K", see LocalImages.
        compare, weight: of the penalty.
        through: compare the outputs, what the head makes of the states.
        steps: of the optimiser, after which the model is measured, as after
        seconds: of training, of one core.
        until: stop where validation reaches it.
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


def sampler(text: str) -> Sampler | None:
    """The sampler that a trial names; None for none, and for those that are no part of a layer."""
    if text == "published":
        return baselines.PublishedSwaps()
    if text.startswith(("local:", "neighbours:")):
        return None
    return schedules.parse(text)


def make_problem(trial: Trial, generator: torch.Generator) -> Problem:
    """What a trial learns."""
    path = None if trial.data is None else Path(trial.data)
    if trial.problem == "lp-mnist":
        return LocalImages(data.images(path), trial.swaps)
    if trial.problem == "points":
        return Classes(data.points(path), trial.train_lengths[0])
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
            return baselines.SetTransformer(inputs, width, outputs, inducing=16 if name == "isab" else 0)
        encoder = baselines.PointEncoder(inputs, width) if trial.problem == "points" else None
        inputs = width if encoder else inputs
        kind, _, reduce = name.partition("-")
        if kind == "deepsets":
            model = baselines.DeepSets(inputs, width, outputs, reduce)
        else:
            cell = trial.cell if name == "janossy" else name
            model = baselines.Recurrent(inputs, width, outputs, cell, sampler, trial.compare)
        if encoder:
            model = baselines.Encoded(encoder, model)
        return baselines.Janossy(model) if name == "janossy" else model

    width = trial.hidden
    if trial.model not in (*baselines.RECURRENT, "janossy", "cnn"):
        with torch.device("meta"):
            wanted = baselines.parameters(build(trial.cell, trial.hidden))
        multiple = 4 if trial.model in ("sab", "isab") else 1
        width = baselines.of_size(lambda n: build(trial.model, n), wanted, multiple)
    return problem.wrap(build(trial.model, width, sampler(trial.swaps)))


def run(trial: Trial) -> dict[str, Any]:
    """Train and measure.

    Returns:
        trial, parameters, source (of the data), epoch (examples in one, 0 if all are new), adaptive_swaps (their
        number), history, machine, and "steps" and "seconds": what problem.evaluate finds there, with the step and
        the seconds. Times are those of the process on a core: another program on the machine hardly lengthens them.
        Without a limit in seconds, or where `until` is reached first, both are one. diverged is the step after which
        the loss or its gradient was no longer finite, None as a rule; the model before it is then measured.
    """
    torch.manual_seed(trial.seed)
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 40, ())))
    problem = make_problem(trial, generator)
    model = make_model(trial, problem)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    averaged: list[torch.Tensor] = [*average.parameters()]
    trained: list[torch.Tensor] = [*model.parameters()]
    optimiser = torch.optim.Adam(model.parameters(), lr=trial.lr, fused=True)
    recurrent = next((m for m in model.modules() if isinstance(m, baselines.Recurrent)), None)
    schedule = recurrent.layer.swaps if recurrent and isinstance(recurrent.layer.swaps, AdaptiveSwaps) else None
    through = recurrent.head if recurrent and trial.through else None
    history: list[dict[str, float]] = []
    found: dict[str, dict[str, Any]] = {}
    step, seconds, swapped, losses, diverged = 0, 0.0, 0, [], None
    every = math.ceil(trial.steps / RECORDS)
    while len(found) < 2:
        began = time.process_time()
        x, y = problem.batch(trial.batch, generator)
        if trial.fresh:
            x = problem.reorder(x, generator)
        model.train()
        loss = problem.loss(model(x), y)
        penalty = problem.penalty(model, through) if trial.swaps != "none" else torch.zeros(())
        optimiser.zero_grad()
        (loss + trial.weight * penalty).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        values = loss.item(), penalty.item()
        if not math.isfinite(sum(values) + norm.item()):
            measured = {"step": step, "seconds": seconds, **problem.evaluate(average)}
            found, diverged = {"steps": measured, "seconds": measured} | found, step
            break
        optimiser.step()
        losses.append(values)
        if schedule:
            swapped += schedule.k * trial.batch
            schedule.step(*losses[-1])
        step += 1
        with torch.no_grad():  # AveragedModel of torch's swa_utils would begin with the first step's weights
            torch._foreach_lerp_(averaged, trained, 1 - min(AVERAGED, step / (step + 9)))
        seconds += time.process_time() - began
        reached = False
        if step % every == 0 or step == trial.steps:
            history.append(_line(step, seconds, losses, problem.validate(average)))
            losses = []
            reached = trial.until is not None and history[-1]["validation"] >= trial.until
        due = {"steps": step == trial.steps, "seconds": 0 < trial.seconds <= seconds}
        for name in [name for name in due if name not in found and (due[name] or reached)]:
            found[name] = {"step": step, "seconds": seconds, **problem.evaluate(average)}
        if trial.seconds == 0 and "steps" in found:
            found["seconds"] = found["steps"]
    return {
        "trial": asdict(trial),
        "parameters": baselines.parameters(model),
        "source": problem.source,
        "epoch": problem.epoch,
        "adaptive_swaps": swapped,
        "history": history,
        "diverged": diverged,
        **found,
        "machine": benchmark.machine(),
    }


def _line(step: int, seconds: float, losses: list[tuple[float, float]], validation: float) -> dict[str, float]:
    loss, penalty = (sum(values) / len(values) for values in zip(*losses, strict=True))
    return {"step": step, "seconds": seconds, "loss": loss, "penalty": penalty, "validation": validation}


def run_all(trials: Sequence[tuple[Path, Trial]], workers: int, finished: Callable[[], None]) -> None:
    """Run the trials whose files lack, or hold another trial, several at a time, each on one thread.

    Args:
        trials: where each one's result goes, and the trial.
        workers: number of processes; 1 for this one alone.
        finished: called for every trial that is done, at once for those that have been.

    Raises:
        ValueError: data cannot be read.
    """
    waiting = []
    for path, trial in trials:
        if _done(path, trial):
            finished()
        else:
            waiting.append((path, trial))
    if workers == 1 or len(waiting) < 2:
        for path, trial in waiting:
            _run_into(path, trial)
            finished()
        return
    context = multiprocessing.get_context("spawn")
    # joblib would be no shorter: its workers know as little of Ctrl-C, threads and trials
    with ProcessPoolExecutor(workers, context, initializer=_worker) as pool:
        futures = [pool.submit(_run_into, path, trial) for path, trial in waiting]
        try:
            for future in as_completed(futures):
                future.result()
                finished()
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """However that ends: nobody else would stop a training."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _done(path: Path, trial: Trial) -> bool:
    try:
        saved = json.loads(path.read_text())["trial"]
        return json.dumps(asdict(Trial(**saved))) == json.dumps(asdict(trial))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _run_into(path: Path, trial: Trial) -> None:
    text = json.dumps(run(trial)) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda temporary: temporary.write_text(text))
