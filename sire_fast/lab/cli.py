"""The command line: train, eval, inspect, bench, reproduce, doctor, check, demo.

Files are written before anything is shown: who reads the output may have gone.

Bad input ends with a line on stderr and exit code 2; --debug before the command shows where an error came from.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, Field, asdict, fields, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.table import Column, Table
from torch import distributed

import sire_fast
from sire_fast import backends, checking, proof
from sire_fast.backends import cpu
from sire_fast.backends.gpu import name_of
from sire_fast.cells import CELLS
from sire_fast.inspection import Inspection, inspect
from sire_fast.lab import benchmark
from sire_fast.lab.benchmark import CONTESTANTS, DTYPES, Setting, check_device, check_size
from sire_fast.lab.files import check_directory, write
from sire_fast.lab.paper.experiments import cost_rounds
from sire_fast.lab.paper.report import cost_overview, overview, rich_table
from sire_fast.lab.paper.reproduce import NAMES, PRESETS, QUICK, plan, reproduce
from sire_fast.lab.tasks import TASKS
from sire_fast.lab.train import (
    CHECKPOINT,
    INSPECTED,
    Config,
    Run,
    by_first,
    claim,
    evaluate,
    of_all,
    place,
)
from sire_fast.swaps import parse

# Parity is learned from so few sequences only by a network that knows that order does not matter.
DEMO = Config("parity", cell="gru", hidden=64, weight=0.1, examples=40, steps=8000)
_METHODS = {"plain": ("without SIRE", "none"), "sire": ("with SIRE", DEMO.swaps)}
_PICTURE = "demo.png"
_CHECKED = ("float32", "bfloat16", "float16")  # dtypes
_LARGEST = 4096  # units
_ORDERS = 20  # random ones of `inspect`
_LONG = 0.1  # hours of `inspect` that are told before they pass
_INSPECT_SEED = 1 << 42  # of the sequences: no run's seed

# of typer's own click or of the package click, whichever it brings
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Train recurrent networks that do not care about the order of their input.",
    epilog="sire-fast --debug COMMAND ... shows the traceback of an error.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv by default) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    arguments = arguments[debug:]
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        if by_torchrun:
            _join_group()
            if arguments[:1] != ["train"]:
                raise _UsageError(f"torchrun: expected the command train, got {' '.join(arguments[:1]) or 'none'}")
        if empty := [word for word in arguments if not word or (word.startswith("--") and word.endswith("="))]:
            raise _UsageError(f"expected no empty argument, got {empty[0]!r}")  # a path "" would be this directory
        with _traceback() if debug else nullcontext(), warnings.catch_warnings():
            warnings.showwarning = _warn
            code = app(arguments or ["--help"], prog_name="sire-fast", standalone_mode=False) or 0
    except _UsageError as error:
        _complain(error.format_message())
        code = 2
    except (ArithmeticError, OSError) as error:
        _complain(error)
        code = 1
    except (MemoryError, RuntimeError) as error:  # it may have struck this process alone, which waits for no other
        print(_line(error), file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # of a reader that has gone typer tells nothing, too
            _complain(error)
        code = code or 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at its end
    if by_torchrun and distributed.is_initialized():
        distributed.destroy_process_group()
    return code


@contextmanager
def _traceback() -> Iterator[None]:
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """In one line, in place of Python's own two with a path and a line of source."""
    print(_line(f"warning: {str(message).removeprefix('sire_fast: ')}"), file=sys.stderr)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"sire-fast {sire_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _join_group() -> None:
    """Make one group of the processes that torchrun has started; the first of them speaks for all."""
    gpu = int(os.environ["LOCAL_RANK"])
    if gpu < torch.cuda.device_count():
        torch.cuda.set_device(gpu)  # the device "cuda" of this process
    distributed.init_process_group()
    _console.quiet = distributed.get_rank() > 0


def _with_options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in place of its ** parameter, an argument or option for each field of a dataclass, whose
    annotations hold the help."""
    hints = get_type_hints(settings, include_extras=True)

    def parameter(field: Field) -> Parameter:
        kind, told = get_args(hints[field.name])
        required = field.default is MISSING
        told = typer.Argument(help=told, show_default=False) if required else typer.Option(help=told)
        default = Parameter.empty if required else field.default
        return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told])

    def extend(command: Any) -> Callable[..., None]:
        *own, _ = signature(command, eval_str=True).parameters.values()
        parameters = [*map(parameter, fields(settings)), *own]
        command.__signature__ = Signature([p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters])
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return extend


@app.command("train")
@_with_options_of(Config)
def train_command(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Directory for the run.", show_default="runs/TASK")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that the directory holds.")] = False,
    log: Annotated[Path | None, typer.Option(help="Directory for TensorBoard, where that is installed.")] = None,
    **settings: Any,
) -> None:
    """Train a model on a task.

    The directory gets result.json, history.jsonl, curves.png and model.pt.

    torchrun --nproc-per-node N -m sire_fast train ... splits every batch among N processes.
    """
    task = settings["task"]
    with _bad_input():
        if resume:
            chosen = Run.load(resume)
            _check_resume(context, chosen, task)
        else:
            _check_swaps_given(context, settings["swaps"])
            chosen = Run(Config(**settings), out or Path("runs", task))
            if (sampler := chosen.config.sampler()) and not chosen.rank:
                benchmark.check_swaps(sampler, chosen.task.train_lengths[-1])
    with _bad_input():
        if log:
            by_first(lambda: chosen.show_in_tensorboard(log))
        if not resume:
            by_first(lambda: claim(chosen.directory, force=force))
    try:
        with _progress() as progress:
            result = _follow(chosen, f"{task}, {chosen.config.cell}", progress)
    except KeyboardInterrupt:
        goes_on = f"to go on: {_command('train', task, resume=chosen.directory, log=log)}"
        if not (chosen.directory / CHECKPOINT).exists():
            goes_on = "there is no checkpoint yet: the same command starts again"
        _complain(f"interrupted after step {chosen.step}; {goes_on}")
        raise typer.Exit(130) from None
    _show_result(result)
    _tell(f"{result['seconds']:.1f} s of training on backend {result['backend']}, in {chosen.directory}")


@app.command("eval")
def eval_command(
    directory: Annotated[Path, typer.Argument(help="Directory of a run.", show_default=False)],
    device: Annotated[str | None, typer.Option(help="Another device than the run's.")] = None,
) -> None:
    """Measure the model of a run again, on the test lengths."""
    with _bad_input():
        chosen = Run.load(directory, device)
    config = chosen.config
    _tell(f"{config.task}, {config.cell}, step {chosen.step} of {config.steps}")
    _show_result(evaluate(chosen.model, chosen.task))


@app.command("inspect")
def inspect_command(
    directory: Annotated[Path, typer.Argument(help="Directory of a run.", show_default=False)],
    length: Annotated[
        int | None, typer.Option(help="Of the sequences.", show_default="the longest of training")
    ] = None,
    examples: Annotated[int, typer.Option(help="Number of sequences.")] = 16,
    device: Annotated[str | None, typer.Option(help="Another device than the run's.")] = None,
) -> None:
    """Tell what other orders do to the answers of a run's model.

    Random orders, the worst order found and every swap; the directory gets inspect.json and inspect.png.
    """
    with _bad_input():
        for name, value, least in (("length", length, 2), ("examples", examples, 1)):
            if value is not None:
                check_size(name, value, least)
        chosen = Run.load(directory, device)
        check_directory(directory)
        model, task = chosen.model.eval(), chosen.task
        length = length or task.train_lengths[-1]
        x, _ = task.sample(length, examples, torch.Generator().manual_seed(_INSPECT_SEED))
        features = model.features[x.to(model.features.device)]
    before: tuple[float, int] | None = (time.monotonic(), 0)
    with _passing_progress() as progress:
        bar = progress.add_task("orders and swaps", total=None)

        def report(done: int, total: int) -> None:
            nonlocal before
            progress.update(bar, completed=done, total=total)
            now = time.monotonic()
            if done <= _ORDERS:
                before = now, done
            elif before:  # the first swaps, which tell how long the others take
                hours = (now - before[0]) / (done - before[1]) * total / 3600
                before = None
                if hours >= _LONG:
                    _complain(
                        f"inspect: may take {hours:,.1f} hours, for {total:,} orders and swaps of sequences of length "
                        f"{length}; fewer with --length"
                    )

        found = inspect(
            model.layer,
            features,
            through=lambda h: task.answer(model.head(h)),
            boundaries=task.boundaries,
            orders=_ORDERS,
            report=report,
        )
    config = chosen.config
    title = f"{config.task}, {config.cell}, {examples} sequences of length {length}"
    result = {
        "task": config.task,
        "config": asdict(config),
        "step": chosen.step,
        "length": length,
        "sequences": x.T.tolist(),
        "answer": found.answer.tolist(),
        "changes": found.changes.T.tolist(),
        "worst": found.worst.tolist(),
        "worst_order": found.worst_order.tolist(),
        "heat_map": found.heat_map.tolist(),
        "versions": benchmark.versions(),
    }
    figure = found.draw()
    figure.suptitle(title)
    numbers, picture = (directory / name for name in INSPECTED)
    write(numbers, json.dumps(result) + "\n")
    write(picture, lambda file: figure.savefig(file, format="png", dpi=150))
    _show_inspection(found, title)
    _tell(f"numbers: {numbers}, picture: {picture}")


@app.command()
def bench(
    cell: Annotated[str, typer.Option(help=f"One of {', '.join(benchmark.LAYERS)}.")] = Setting.cell,
    steps: Annotated[int, typer.Option("--T", help="Steps of a sequence.")] = Setting.T,
    batch: Annotated[int, typer.Option("--B", help="Sequences.")] = Setting.B,
    features: Annotated[int | None, typer.Option("--I", help="Features of the input.", show_default="H")] = None,
    hidden: Annotated[int, typer.Option("--H", help="Units of the layer.")] = Setting.H,
    k: Annotated[int | None, typer.Option("--K", help="Swaps of each sequence.", show_default="8")] = None,
    swaps: Annotated[
        str,
        typer.Option(help="Positions exchanged: adjacent or uniform, K of them; or in full, adjacent:all, window:4:3."),
    ] = "adjacent",
    compare: Annotated[
        str, typer.Option(help="Where states are compared: swap (after the pair) or end (of the sequence).")
    ] = Setting.compare,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = Setting.dtype,
    device: Annotated[str, typer.Option(help="As torch names it.")] = Setting.device,
    rounds: Annotated[int, typer.Option(help="How often each step is timed.")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Time a training step against other ways to write it."""
    with _bad_input():
        if rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {rounds}")
        if ":" not in swaps and swaps != "none":
            swaps = f"{swaps}:{8 if k is None else k}"
        elif k is not None:
            raise ValueError(f"K: expected none beside --swaps {swaps}, got {k}")
        size = {"T": steps, "B": batch, "I": hidden if features is None else features, "H": hidden}
        setting = Setting(cell.upper(), **size, swaps=swaps, compare=compare, dtype=dtype, device=device)
        benchmark.check_swaps(parse(swaps), steps)
        if out:
            _check_file(out)
        contest = {name: benchmark.Step(setting, name) for name in benchmark.contestants(setting)}
    with _passing_progress() as progress:
        bar = progress.add_task("time", total=benchmark.WARM_UP + rounds)
        seconds = benchmark.measure(contest, rounds, lambda: progress.advance(bar))
        names = progress.track(contest, description="memory")
        peaks = {name: benchmark.peak_memory(setting, name) for name in names}
    result = benchmark.summary(setting, seconds, peaks)
    if out:
        write(out, json.dumps(result, indent=2) + "\n")

    machine = result["machine"]
    caption = f"{machine['device']}, threads: {machine['threads']}, rounds: {rounds}"
    table = Table(title=str(setting), caption=caption)
    table.add_column("contestant")
    for heading in ("median ms", "ratio to plain [quartiles]", "peak MB"):
        table.add_column(heading, justify="right")
    for name, row in result["contestants"].items():
        against, peak = row["ratio_to_plain"], row["peak_bytes"]
        table.add_row(
            f"{name}: {CONTESTANTS[name].label}",
            f"{1e3 * row['seconds']['median']:.2f}",
            f"{against['median']:.2f} [{against['lower']:.2f}, {against['upper']:.2f}]",
            "-" if peak is None else f"{peak / 1e6:.1f}",
        )
    _console.print(table)


@app.command("reproduce")
def reproduce_command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.", show_default=False)],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}: seconds, or an hour to a day.")] = "quick",
    seeds: Annotated[int | None, typer.Option(help="Number of them.", show_default="1 quick, 3 to 20 full")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File or folder with MNIST or point clouds; generated or small ones if not given."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory.", show_default="runs/paper/PRESET")] = None,
) -> None:
    """Run an experiment of the paper.

    The directory gets NAME.md, NAME.png and NAME.json, with published numbers beside ours.

    A stopped one goes on with the same command.
    """
    same = _command("reproduce", name, preset=preset, seeds=seeds, data=data, out=out)
    out = out or Path("runs", "paper", preset)
    with _bad_input():
        planned = plan(name, preset, seeds, data, out)
    workers = os.cpu_count() or 1 if preset == "full" else 1
    trainings = sum(len(row.choices) + len(row.results) for row in planned)
    columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=_console, speed_estimate_period=3600) as progress:
            kind, count = ("rounds", cost_rounds(preset)) if name == "cost" else ("trainings", trainings)
            bar = progress.add_task(f"{name}, {kind}", total=count)
            found = reproduce(name, preset, planned, out, workers, lambda: progress.advance(bar))
    except KeyboardInterrupt:
        _complain(f"interrupted; the same command goes on: {same}")
        raise typer.Exit(130) from None
    except ValueError as error:
        raise _UsageError(str(error)) from error
    _console.print(rich_table(*(cost_overview if name == "cost" else overview)(found)))
    if preset == "quick":
        _tell(QUICK)
    _tell(f"tables: {out / name}.md, picture: {out / name}.png, numbers: {out / name}.json")


@app.command()
def doctor() -> None:
    """Tell which backends serve here, and why others do not."""
    table = Table(box=None, show_header=False)
    table.add_row("sire_fast", sire_fast.__version__)
    table.add_row("torch", torch.__version__)
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    table.add_row("instruction set", cpu.instruction_set())
    table.add_row("threads", f"{torch.get_num_threads()} of torch, {os.cpu_count()} cores")
    devices = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    for backend, device in itertools.product(backends.BACKENDS, devices):
        answers: dict[str, list[str]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            call: dict[str, Any] = {"dtype": dtype, "device": device, "hidden_size": 128}
            # few reasons depend on the cell: each is told once
            reasons = dict.fromkeys(
                reason.removeprefix(f"{backend}: ")
                for cell in CELLS
                for reason in backends.why_not(backend, cell=cell, **call)
            )
            told = "; ".join(reasons) or "serves"
            if told == "serves" and backend in backends.PROVEN_BY_USE:
                told += ", once a small case was right on this card"
            answers.setdefault(told, []).append(name_of(dtype))
        for told, dtypes in answers.items():
            table.add_row(f"backend {backend}", f"{device}, {' and '.join(dtypes)}: {told}")
    table.add_row("layers", cpu.SLOWER_THAN_TORCH)
    _console.print(table)


@app.command("check")
def check_command(
    device: Annotated[
        str | None, typer.Option(help="As torch names it.", show_default="a GPU where there is one")
    ] = None,
    cells: Annotated[list[str], typer.Option("--cell", help=f"Of {', '.join(CELLS)}.")] = [*CELLS],  # noqa: B006
    dtypes: Annotated[list[str], typer.Option("--dtype", help=f"Of {', '.join(_CHECKED)}.")] = [*_CHECKED],  # noqa: B006
    sizes: Annotated[list[int], typer.Option("--H", help="Units.")] = [7, 64, 100, 128],  # noqa: B006
) -> None:
    """Hold the kernels against plain PyTorch in float64.

    The exit code is 1 if one is wrong. Options may be given several times. sire_fast.check(model, x) does it for the
    layers of a model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _bad_input():
        for name, values, known in (("cell", cells, CELLS), ("dtype", dtypes, _CHECKED)):
            for value in values:
                if value not in known:
                    raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        for size in sizes:
            if not 1 <= size <= _LARGEST:  # what lacks memory would look like a wrong kernel
                raise ValueError(f"H: expected at least 1 and at most {_LARGEST}, got {size}")
        check_device(device)
    calls = [*itertools.product(backends.KERNELS, cells, [getattr(torch, name) for name in dtypes])]
    with _passing_progress() as progress:
        tracked = progress.track(calls, description="check")
        report = checking.Report(
            [checking.check_kernel(*call, device, sizes) for call in tracked], proof.environment(device)
        )
    print(report)  # for a bug report: on a console it would be wrapped
    if not report.right:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Directory for the two runs and the picture.", show_default="runs/demo")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a demo that the directory holds.")] = False,
) -> None:
    """Train a model with and without SIRE, and compare the two.

    They learn the parity of 40 sequences of up to 10 bits, and are tested on up to 200.
    """
    again = _command("demo", "--force", out=out)
    out = out or Path("runs/demo")
    with _bad_input():
        claim(*(out / name for name in _METHODS), force=force, resumable=False)
    torch.set_num_threads(1)  # steps as small as these lose more to a second thread than it wins
    results = {}
    try:
        with _progress() as progress:
            for name, (title, swaps) in _METHODS.items():
                chosen = Run(replace(DEMO, swaps=swaps), out / name)
                results[title] = _follow(chosen, title, progress)
            figure = _demo_figure(results)
            write(out / _PICTURE, lambda file: figure.savefig(file, format="png", dpi=150))
    except KeyboardInterrupt:
        _complain(f"interrupted; to start again: {again}")
        raise typer.Exit(130) from None

    metric = TASKS[DEMO.task].metric
    lengths = [int(length) for length in results["with SIRE"]["metrics"]]
    table = Table(title=f"{DEMO.task} of {lengths[0]} to {lengths[-1]} bits, {DEMO.examples} training sequences")
    for heading in ("", f"test {metric}", f"at {lengths[-1]} bits", "order sensitivity", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for title, result in results.items():
        scores = [row[metric] for row in result["metrics"].values()]
        sensitivity = result["order_sensitivity"]["mean"]
        table.add_row(
            title,
            f"{sum(scores) / len(scores):.3f}",
            f"{scores[-1]:.3f}",
            f"{sensitivity:.2g}",
            f"{result['seconds']:.1f}",
        )
    _console.print(table)
    _tell(f"picture: {out / _PICTURE}")


def _demo_figure(results: dict[str, dict[str, Any]]) -> Figure:
    """Metric and order sensitivity against the length of the test sequences, a line for each method."""
    task = TASKS[DEMO.task]
    longest = task.train_lengths[-1]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(
        f"A GRU learns {DEMO.task} from {DEMO.examples} sequences of at most {longest} bits",
        fontweight="bold",
    )
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, (task.metric, "order_sensitivity"), strict=True):
        for (title, result), colour in zip(results.items(), ("#d1495b", "#00798c"), strict=True):
            lengths = [int(length) for length in result["metrics"]]
            values = [max(row[key], 1e-9) for row in result["metrics"].values()]  # 0 has no logarithm
            axes.plot(lengths, values, marker="o", color=colour, label=title, linewidth=2.2, clip_on=False)
        axes.axvspan(0, longest, color="#edae49", alpha=0.35, linewidth=0, label="lengths of training")
        axes.set(xlabel="length of the test sequences", xlim=(0, task.test_lengths[-1]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left, right = panels
    left.axhline(1 / task.outputs, color="0.5", linestyle="--", linewidth=1, label="guessing")
    left.set(ylim=(0.4, 1.02))
    left.set_title(f"Test {task.metric}", loc="left")
    left.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.6))
    right.set(yscale="log")
    right.set_title("Order sensitivity: mean change of the answer", loc="left")
    return figure


class _Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Bar) -> str:
        return f"{task.finished_speed or task.speed or 0:.0f} steps/s"


_console = Console(markup=False, emoji=False)  # [x] and :x: may stand in the name of a directory


def _tell(line: str) -> None:
    """Show a line, whole: one that is wrapped breaks the paths in it."""
    _console.print(line, soft_wrap=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("penalty {task.fields[penalty]}"),
        _Speed(Column(no_wrap=True)),
        TimeRemainingColumn(),
        console=_console,
    )


def _passing_progress() -> Progress:
    """Gone in the end; in a file it would leave an empty line."""
    return Progress(console=_console, transient=True, disable=not _console.is_terminal)


def _follow(chosen: Run, title: str, progress: Progress) -> dict[str, Any]:
    """Train with a progress bar."""
    bar = progress.add_task(title, total=chosen.config.steps, completed=chosen.step, loss="-", penalty="-")

    def report(step: int, loss: float, penalty: float) -> None:
        progress.update(bar, completed=step, loss=f"{loss:.4f}", penalty=f"{penalty:.4f}")

    return chosen.train(report)


def _show_result(result: dict[str, Any]) -> None:
    table = Table()
    rows = result["metrics"]
    for heading in ("length", *next(iter(rows.values()))):
        table.add_column(heading.replace("_", " "), justify="right")
    for length, row in rows.items():
        table.add_row(length, *(f"{value:.4g}" for value in row.values()))
    _console.print(table)
    sensitivity = result["order_sensitivity"]
    _tell(f"order sensitivity: mean {sensitivity['mean']:.4g}, max {sensitivity['max']:.4g}")


def _show_inspection(found: Inspection, title: str) -> None:
    table = Table(title=title, caption=f"mean |answer|: {found.size.mean():.4g}")
    table.add_column("|change of the answer|")
    for heading in ("mean", "largest", "mean / |answer|"):
        table.add_column(heading, justify="right")
    pairs = found.heat_map[torch.ones_like(found.heat_map, dtype=torch.bool).triu(1)]
    for name, changes in (
        (f"{len(found.changes)} random orders of each", found.changes),
        ("worst order found of each", found.worst),
        ("each swap, mean over the sequences", pairs),
    ):
        mean = changes.mean().item()
        table.add_row(name, f"{mean:.4g}", f"{changes.max():.4g}", f"{mean / found.size.mean():.4g}")
    _console.print(table)


def _check_resume(context: typer.Context, chosen: Run, task: str) -> None:
    if task != chosen.config.task:
        raise ValueError(f"task: expected {chosen.config.task}, which the run was started with, got {task!r}")
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    further = [f"--{name}" for name in given if name not in ("task", "resume", "log")]
    if further:
        raise ValueError(f"--resume keeps the settings of the run: expected no {', '.join(further)}")
    if chosen.processes != chosen.trained_by:
        expected = f"expected as many processes as the run was started with, {chosen.trained_by}"
        raise ValueError(f"torchrun: {expected}, got {chosen.processes}")


def _check_swaps_given(context: typer.Context, swaps: str | None) -> None:
    for name in ("weight", "compare") if swaps == "none" else ():
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            raise ValueError(f"{name}: expected none beside --swaps none, which has no penalty")


def _check_file(path: Path) -> None:
    """Raise a ValueError unless a file can be written there, before there is something to write."""
    target = path.resolve()
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        raise ValueError(f"{path}: expected a regular file in a directory that exists")
    check_directory(target.parent)


@contextmanager
def _bad_input() -> Iterator[None]:
    """Turn what any process finds wrong with the user's input into an error that `run` tells in one line."""
    wrong = None
    try:
        yield
    except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:
        wrong = error
    for message in of_all(wrong and str(wrong)):
        if message is not None:
            raise _UsageError(message) from wrong


def _command(*words: str, **options: object) -> str:
    """A command line for a shell, with those options that have a value."""
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    processes = place()[1]
    program = ["sire-fast"]
    if processes > 1:
        program = ["torchrun", "--nproc-per-node", str(processes), "-m", "sire_fast"]
    return shlex.join([*program, *words, *given])


def _complain(message: object) -> None:
    """Tell, once, what all processes know."""
    by_first(lambda: print(_line(message), file=sys.stderr))


def _line(message: object) -> str:
    return f"sire-fast: {next(iter(str(message).splitlines()), type(message).__name__)}"
