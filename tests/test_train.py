"""The training loop, its files, and the command line."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

import sire_fast.__main__
import sire_fast.lab
from sire_fast import backends
from sire_fast.lab import cli, files, train
from sire_fast.lab.tasks import TASKS
from sire_fast.lab.train import FILES, Config, Run, claim

has_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path):
    """Short test sequences, one thread for what is too small for two, and a directory to leave things in."""
    torch.set_num_threads(1)
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(task, test_lengths=(4, 6)))
    monkeypatch.chdir(tmp_path)


def start(directory: Path, **settings) -> Run:
    claim(directory)
    return Run(Config(**{"task": "sum", "hidden": 8, "batch": 4, "steps": 151, **settings}), directory)


def interrupt_after(step: int):
    def report(now: int, loss: float, penalty: float) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


def without_seconds(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_tiny_run_learns(tmp_path):
    result = start(tmp_path / "run", hidden=32, batch=32, steps=300).train()
    history = without_seconds(tmp_path / "run" / "history.jsonl")
    assert history[-1]["loss"] < history[0]["loss"] / 5
    _, y = TASKS["sum"].sample(6, 1000, torch.Generator().manual_seed(0))
    assert result["metrics"]["6"]["mae"] < (y - y.median()).abs().mean() / 2


def test_the_penalty_lowers_order_sensitivity(tmp_path):
    mean = {}
    for swaps in ("none", "uniform:4"):
        settings = {"task": "range", "hidden": 32, "batch": 32, "steps": 300, "examples": 50, "weight": 10.0}
        run = start(tmp_path / swaps, **settings, swaps=swaps)
        mean[swaps] = run.train()["order_sensitivity"]["mean"]
    assert mean["uniform:4"] < mean["none"] / 2


def test_batches_too_short_to_swap_pass_in_silence(tmp_path, recwarn):
    assert 1 in TASKS["parity"].train_lengths
    start(tmp_path / "run", task="parity", steps=30, swaps="uniform:4").train()
    assert not recwarn.list


def test_files_of_a_run(tmp_path):
    run = start(tmp_path / "run", steps=250)
    result = run.train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert set(result) == {
        "task", "config", "backend", "metrics", "order_sensitivity", "seconds", "versions"
    }  # fmt: skip
    assert Config(**result["config"]) == run.config
    assert result["config"]["swaps"] == "uniform:4"
    assert set(result["metrics"]) == {"4", "6"}
    assert set(result["metrics"]["4"]) == {"accuracy", "mae", "mse", "order_sensitivity"}
    assert 0 < result["order_sensitivity"]["mean"] < result["order_sensitivity"]["max"]
    assert set(result["versions"]) == {"sire_fast", "torch", "python"}
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [*range(3, 250, 3), 250]
    assert set(history[0]) == {"step", "loss", "penalty", "accuracy", "seconds"}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_shows_the_history_of_a_resumed_run_too(tmp_path, monkeypatch):
    shown = []

    class Writer:
        def __init__(self, directory, purge_step):
            assert directory == tmp_path / "board"
            shown.append(purge_step)

        def add_scalar(self, name, value, step):
            shown.append((step, name, value))

        def flush(self):
            shown.append("flushed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run = start(tmp_path / "run", steps=4)
    run.advance()
    run.record()
    run.save()
    assert shown == []
    assert cli.run(["train", "sum", "--resume", str(tmp_path / "run"), "--log", str(tmp_path / "board")]) == 0
    lines = without_seconds(tmp_path / "run" / "history.jsonl")[1:]
    assert [line["step"] for line in lines] == [2, 3, 4]
    of_a_line = [
        [*((line["step"], name, line[name]) for name in ("loss", "penalty", "accuracy")), "flushed"] for line in lines
    ]
    assert shown == [2, *of_a_line[0], *of_a_line[1], *of_a_line[2]]


def test_without_tensorboard_a_log_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.run(["train", "sum", "--steps", "1", "--out", str(tmp_path / "run"), "--log", "board"]) == 2
    assert capsys.readouterr().err == "sire-fast: log: TensorBoard is not installed: pip install tensorboard\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "gru"},
        {"cell": "lstm", "swaps": "adjacent:all", "compare": "swap", "examples": 20},
        {"cell": "rnn", "task": "half-range"},
        {"task": "parity", "swaps": "none"},
        {"swaps": "adaptive:uniform:4"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, settings):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = start(whole, **settings).train()
    with pytest.raises(KeyboardInterrupt):
        start(parts, **settings).train(interrupt_after(75))  # between two lines of the history
    assert Run.load(parts).step == 75
    with (parts / "history.jsonl").open("a") as file:
        file.write('{"step": 76}\n')  # as if the run had been killed between a line and its checkpoint
    torch.manual_seed(123)
    result = Run.load(parts).train()

    assert without_seconds(parts / "history.jsonl") == without_seconds(whole / "history.jsonl")
    for name in ("config", "metrics", "order_sensitivity", "backend"):
        assert result[name] == expected[name]
    ours, theirs = (torch.load(d / "model.pt") for d in (parts, whole))
    for part in ("model", "optimiser", "schedule", "data", "random", "step", "sums"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_seeds(tmp_path):
    models = [
        start(tmp_path / str(n), steps=3, seed=seed, swaps=swaps)
        for n, (seed, swaps) in enumerate([(0, "none"), (0, "uniform:2"), (1, "none")])
    ]
    first, same, other = ([*run.model.state_dict().values()] for run in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # the swaps must not change which data is seen
    batches = [run.task.batch(run.examples, 8, run.data)[0] for run in models[:2]]
    assert torch.equal(*batches)


def test_a_training_set_is_reused(tmp_path):
    run = start(tmp_path / "run", examples=20)
    assert sum(x.shape[1] for x, _ in run.examples) == 20
    known = {tuple(column) for x, _ in run.examples for column in x.T.tolist()}
    for _ in range(30):
        x, _ = run.task.batch(run.examples, 8, run.data)
        assert {tuple(column) for column in x.T.tolist()} <= known


class Summing(nn.Module):
    """A model that answers with the exact sum of what `part` leaves of a sequence."""

    def __init__(self, part=slice(None)):
        super().__init__()
        self.register_buffer("features", torch.zeros(()))
        self.part = part

    def forward(self, x):
        return x[self.part].sum(0)[:, None] / 100


def test_order_sensitivity_is_that_of_the_answer():
    exact = train.evaluate(Summing(), TASKS["sum"])
    assert exact["order_sensitivity"] == {"mean": 0, "max": 0}
    rounded = pytest.approx(0, abs=1e-4)
    assert exact["metrics"]["6"] == {"accuracy": 1, "mae": rounded, "mse": rounded, "order_sensitivity": 0}
    first = train.evaluate(Summing(slice(1)), TASKS["sum"])["order_sensitivity"]
    # |a - b| of independent numbers is 33.33 on average, 5/6 or 3/4 of the orders bring another one to the front
    assert first["mean"] == pytest.approx(33.33 * (5 / 6 + 3 / 4) / 2, rel=0.1)
    assert 80 < first["max"] <= 99


def test_order_sensitivity_stays_inside_the_halves():
    halves = nn.Module()
    halves.register_buffer("features", torch.zeros(()))
    halves.forward = lambda x: x[: len(x) // 2].sum(0)[:, None].float()
    assert train.evaluate(halves, TASKS["half-range"])["order_sensitivity"] == {"mean": 0, "max": 0}


def test_the_backend_is_the_one_that_ran(tmp_path):
    assert start(tmp_path / "auto", steps=1).train()["backend"] == "cpu"
    with backends.use("reference"):
        assert start(tmp_path / "reference", steps=1).train()["backend"] == "reference"


def test_an_interrupted_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(path, fails)
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(Path("elsewhere/file"))
    for content in ("first", "second"):  # there is no such file yet, and there is one
        files.write(link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    assert [*target.parent.iterdir()] == [target]


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_told_and_leaves_a_run_that_goes_on(tmp_path, monkeypatch, name):
    """torch.save into a file tells of positions in it; half a line of the history would make it unreadable."""
    written = Path.write_bytes

    def fills_up(self, content):
        if run.step >= 75 and name in self.name:
            written(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(self, content)

    run, expected = start(tmp_path / "run"), start(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fills_up)
        with pytest.raises(OSError, match=rf"No space left on device: '.*{name}'"):
            run.train()
    assert not [*(tmp_path / "run").glob(".*")]
    torch.manual_seed(1)
    Run.load(tmp_path / "run").train()
    expected.__init__(expected.config, tmp_path / "whole")  # the seed is of the process
    expected.train()
    assert without_seconds(tmp_path / "run/history.jsonl") == without_seconds(tmp_path / "whole/history.jsonl")


@pytest.mark.skipif(files.fcntl is None, reason="no locks of directories")
def test_two_runs_do_not_share_a_directory(tmp_path, capsys):
    run = start(tmp_path / "run", steps=4)
    told = []

    def meanwhile(*_):
        arguments = ["--out", str(run.directory), "--force"], ["--resume", str(run.directory)]
        told.extend((cli.run(["train", "sum", *more]), capsys.readouterr().err) for more in arguments)

    run.train(meanwhile)
    assert {code for code, _ in told} == {1, 2}
    assert {err for _, err in told[2:]} == {
        f"sire-fast: {run.directory}: another process writes there; wait for it, or take another directory\n"
    }
    assert {path.name for path in run.directory.iterdir()} == set(FILES)
    assert Run.load(run.directory).step == 4


@pytest.mark.parametrize("settings", [{"lr": np.float64(1e-3)}, {"weight": np.float64(1)}, {"lr": 1, "weight": 2}])
def test_numbers_of_numpy_do_not_spoil_a_checkpoint(tmp_path, settings):
    run = start(tmp_path / "run", steps=1, **settings)
    run.train()
    assert Run.load(tmp_path / "run").config == run.config
    assert all(type(getattr(run.config, name)) is float for name in ("lr", "weight"))


@pytest.mark.parametrize(
    "settings", [{"hidden": "8"}, {"steps": 2.5}, {"seed": np.int64(3)}, {"batch": True}, {"task": ["sum"]}]
)
def test_settings_of_another_type_are_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: expected (int|str), got"):
        Config(**{"task": "sum", **settings})


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "arguments",
    ["train sum --hidden 8 --batch 4 --steps 1 --force --out run", "bench --T 10 --B 1 --H 8 --rounds 1 --compare end"],
)
def test_more_swaps_than_there_are_pairs_are_told(capsys, monkeypatch, tmp_path, arguments):
    """They work, and only the time is noticed."""
    monkeypatch.chdir(tmp_path)
    told = "sire-fast: warning: Uniform(k=46) repeats swaps: sequences of 10 steps have 45 pairs\n"
    for k, expected in ((46, told), (45, "")):
        code, _, err = command(capsys, *arguments.split(), "--swaps", f"uniform:{k}")
        assert (code, err) == (0, expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train", "TASK"),
        ("train sums", "task"),
        ("train sum --cell elman", "cell"),
        ("train sum --swaps uniform", "swaps"),
        ("train sum --swaps uniform:0", "swaps"),
        ("train sum --swaps adaptive:adjacent:all", "swaps"),
        ("train sum --swaps pairs:1:10-11", "nothing to swap"),
        ("train sum --swaps window:1:99999999999999999999", "width"),
        ("train sum --swaps none --weight 5", "weight"),
        ("train sum --compare swap --swaps none", "compare"),
        ("train sum --swaps ", "empty"),
        ("train sum --out=", "empty"),
        ("train sum --batch 99999999999999999999", "batch"),
        ("train sum --examples 99999999999999999999", "examples"),
        ("train sum --compare middle", "compare"),
        ("train sum --weight nan", "weight"),
        ("train sum --weight -1", "weight"),
        ("train sum --hidden 0", "hidden"),
        ("train sum --hidden 2000000000", "memory"),
        ("train sum --hidden many", "--hidden"),
        ("train sum --batch -3", "batch"),
        ("train sum --steps 0", "steps"),
        ("train sum --lr inf", "lr"),
        ("train sum --seed -1", "seed"),
        ("train sum --examples 3", "examples"),
        ("train sum --device quantum", "device"),
        ("train sum --device cuda:99", "device"),
        ("train sum --device meta", "device"),
        ("train sum --out file", "file"),
        ("train sum --out file/run", "file"),
        ("train sum --resume missing", "missing"),
        ("train sum --resume damaged", "damaged"),
        ("train sum --speed 3", "--speed"),
        ("eval", "DIRECTORY"),
        ("eval missing", "missing"),
        ("eval damaged", "damaged"),
        ("eval foreign", "foreign: holds no run that can be used here: model.pt is damaged, or of another"),
        ("eval pickle", "pickle: holds no run that can be used here: model.pt is damaged, or of another"),
        ("eval foreign --device cuda:99", "sire-fast: device: 'cuda:99' cannot be used"),
        ("tidy", "tidy"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, tmp_path, arguments, named):
    Path("file").touch()
    for name in ("damaged", "foreign", "pickle"):
        Path(name).mkdir()
    Path("damaged/model.pt").write_bytes(b"not a checkpoint")
    torch.save({"weights": torch.zeros(2)}, "foreign/model.pt")
    torch.save(nn.Linear(2, 2), "pickle/model.pt")
    before = {*tmp_path.rglob("*")}
    code, out, err = command(capsys, *arguments.split(" "))
    assert code == 2
    assert out == ""
    assert err.startswith("sire-fast: ")
    assert err.count("\n") == 1
    assert named.lower() in err.lower()
    assert {*tmp_path.rglob("*")} == before


def test_debug_shows_the_traceback_behind_the_line(capsys):
    code, out, err = command(capsys, "--debug", "eval", "missing")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback")
    assert "in load\n" in err
    assert err.splitlines()[-1] == command(capsys, "eval", "missing")[2].strip()


TINY = ("--hidden", 4, "--steps", 6, "--batch", 2)


def test_train_eval_and_a_run_in_the_way(capsys):
    code, out, err = command(capsys, "train", "sum", *TINY)
    assert (code, err) == (0, "")
    assert "order sensitivity" in out
    result = Path("runs/sum/result.json").read_text()

    for arguments, told in (
        (("train", "sum", *TINY), "--force"),
        (("train", "range", *TINY, "--out", "runs/sum"), "--force"),
        (("train", "sum", "--resume", "runs/sum", "--lr", "1", "--force"), "--lr, --force"),
        (("train", "range", "--resume", "runs/sum"), "range"),
    ):
        code, _, err = command(capsys, *arguments)
        assert code == 2
        assert told in err
        assert err.count("\n") == 1
    assert Path("runs/sum/result.json").read_text() == result

    code, out, _ = command(capsys, "eval", "runs/sum")
    assert code == 0
    assert f"mean {json.loads(result)['order_sensitivity']['mean']:.4g}" in out
    assert command(capsys, "train", "sum", "--resume", "runs/sum")[0] == 0
    assert Path("runs/sum/result.json").read_text() == result  # there was nothing left to do
    assert command(capsys, "train", "sum", *TINY, "--seed", 1, "--force")[0] == 0
    assert Path("runs/sum/result.json").read_text() != result


def test_a_loss_that_is_not_finite(capsys, monkeypatch):
    nan = replace(TASKS["sum"], loss=lambda outputs, y: outputs.sum() * torch.nan)
    monkeypatch.setitem(TASKS, "sum", nan)
    code, _, err = command(capsys, "train", "sum", *TINY)
    assert (code, err.count("\n")) == (1, 1)
    assert "nan after step 0" in err


def test_a_gradient_that_is_not_finite_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = start(tmp_path / "run", steps=20)

    def loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (outputs * 0).abs().sqrt().sum() if run.step == 9 else outputs.mean()

    worse = replace(run.task, loss=loss)
    monkeypatch.setattr(run, "task", worse)
    with pytest.raises(FloatingPointError, match="norm of its gradient is nan after step 9"):
        run.train()
    last = Run.load(tmp_path / "run")
    assert last.step == 9
    assert all(p.isfinite().all() for p in last.model.parameters())


@pytest.mark.parametrize("words", [("train", "sum"), ("demo",), ("reproduce", "figure1")], ids=lambda words: words[0])
@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_in_the_place_of_a_directory_is_told_first(capsys, words, inside):
    Path("file").write_text("mine")
    code, _, err = command(capsys, *words, "--out", Path("file", inside))
    assert (code, err.count("\n")) == (2, 1)
    assert "file: expected a directory, found a file" in err


@pytest.mark.parametrize(
    "words",
    ["train sum --out", "demo --out", "reproduce figure1 --out", "bench --T 9 --out", "inspect"],
    ids=lambda words: words.split()[0],
)
def test_a_directory_that_cannot_be_written_to_is_told_first(capsys, monkeypatch, words):
    start(Path("run"), steps=1).train()
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path).name == "run" and mode == os.W_OK))
    code, out, err = command(capsys, *words.split(), "run/new.json" if "bench" in words else "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "run: expected a directory that can be written to" in err


def test_names_are_shown_as_they_are(capsys):
    """Not as markup, and not in parts."""
    names = ["[/red]", "[red]", ":smile:", "long" * 40]
    for name in names:
        code, out, _ = command(capsys, "train", "sum", *TINY, "--out", name)
        assert code == 0
        assert out.endswith(f", in {name}\n")
        assert f"numbers: {name}/inspect.json, picture: {name}/inspect.png\n" in command(capsys, "inspect", name)[1]


def test_pictures_are_written_before_anything_is_shown(monkeypatch):
    monkeypatch.setattr(cli, "DEMO", replace(cli.DEMO, steps=4, hidden=4))
    start(Path("run"), steps=1).train()

    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(cli._console, "print", gone)
    assert (cli.run(["inspect", "run"]), cli.run(["demo"])) == (1, 1)
    assert Path("run/inspect.png").exists()
    assert Path("run/inspect.json").exists()
    assert Path("runs/demo/demo.png").exists()


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(capsys):
    code, _, err = command(capsys, "train", "sum", *TINY, "--swaps", "pairs:1:0-9")
    assert code == 0
    assert err.startswith("sire-fast: warning: GRU(100, 4, ")
    assert err.count("\n") == 1


def test_version_and_short_help(capsys):
    assert command(capsys, "--version") == (0, f"sire-fast {sire_fast.__version__}\n", "")
    assert command(capsys, "-h") == command(capsys, "--help") == command(capsys)
    assert "..." not in command(capsys)[1].split("Commands:\n")[1].split("\n\n")[0]  # no summary is cut
    assert "--hidden" in command(capsys, "train", "-h")[1]


def test_what_is_told_of_a_run_without_a_checkpoint_works(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        code, _, err = command(capsys, "train", "sum", *TINY)
    assert (code, err) == (
        130,
        "sire-fast: interrupted after step 0; there is no checkpoint yet: the same command starts again\n",
    )
    assert command(capsys, "train", "sum", *TINY)[0] == 0
    Path("runs/sum/model.pt").unlink()
    _, _, err = command(capsys, "train", "sum", *TINY)
    assert err == "sire-fast: runs/sum: holds a run already; --force replaces it\n"


def test_doctor(capsys):
    code, out, _ = command(capsys, "doctor")
    assert code == 0
    for word in ("torch", "instruction set", "threads", *backends.BACKENDS, "serves"):
        assert word in " ".join(out.split())  # lines are wrapped
    assert out.count("backend cpu ") == 1  # dtypes with the same answer share a line


def test_demo(capsys, monkeypatch):
    monkeypatch.setattr(cli, "DEMO", replace(cli.DEMO, steps=4, hidden=4))
    code, out, err = command(capsys, "demo")
    assert (code, err) == (0, "")
    assert "without SIRE" in out
    assert Path("runs/demo/demo.png").read_bytes().startswith(b"\x89PNG")
    plain, sire = (
        json.loads(Path(f"runs/demo/{name}/result.json").read_text())["config"] for name in ("plain", "sire")
    )
    assert {key for key in plain if plain[key] != sire[key]} == {"swaps"}
    assert command(capsys, "demo")[0] == 2
    assert command(capsys, "demo", "--force")[0] == 0


@pytest.mark.skipif(files.fcntl is None, reason="no locks of directories")
def test_a_demo_deletes_nothing_where_it_cannot_start(capsys):
    runs = [Path("runs/demo", name) for name in ("plain", "sire")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "result.json").write_text("{}")
    for held in runs:
        with files.alone(held):
            code, _, err = command(capsys, "demo", "--force")
        assert (code, err) == (
            2,
            f"sire-fast: {held}: another process writes there; wait for it, or take another directory\n",
        )
        assert all((run / "result.json").exists() for run in runs)


@pytest.mark.parametrize("words", [["--version"], ["check", "--cell", "gru", "--dtype", "float32", "--H", "7"]])
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=has_full)], ids=["reader gone", "disk full"])
def test_output_that_nobody_gets_ends_with_exit_code_1(words, full):
    """Python, which flushes it at its end, would show an ignored exception and end with 120."""
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full" if full else writing, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "sire_fast", *words],
            env={**os.environ, "PYTHONPATH": str(Path(sire_fast.__file__).parents[1]), "PYTHONUNBUFFERED": ""},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
    told = f"sire-fast: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n" if full else ""
    assert (done.returncode, done.stderr) == (1, told)


@pytest.mark.parametrize("out", [[], ["--out", "a b"]], ids=str)
def test_what_starts_a_demo_again_after_ctrl_c_has_all_that_was_given(capsys, monkeypatch, out):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_follow", interrupted)
    code, _, err = command(capsys, "demo", *out)
    assert code == 130
    assert shlex.split(err.partition("again: ")[2]) == ["sire-fast", "demo", "--force", *out]


def test_what_goes_on_after_ctrl_c_has_the_log(capsys, monkeypatch):
    def interrupted(run, *_):
        run.save()
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_follow", interrupted)
    monkeypatch.setattr(Run, "show_in_tensorboard", lambda *_: None)
    _, _, err = command(capsys, "train", "sum", *TINY, "--log", "a b")
    assert err.endswith("to go on: sire-fast train sum --resume runs/sum --log 'a b'\n")


def test_ctrl_c_keeps_the_checkpoint():
    root = Path(sire_fast.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "sire_fast", "train", "sum", "--hidden", "4", "--steps", "5000", "--out", "run"],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not Path("run/model.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    step = Run.load(Path("run")).step
    assert 0 < step < 5000
    assert err == f"sire-fast: interrupted after step {step}; to go on: sire-fast train sum --resume run\n"
    assert process.returncode == 130
    assert not Path("run/result.json").exists()


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_without_the_extra(capsys, monkeypatch, missing):
    for name in [*sys.modules]:
        if name.split(".")[0] == missing or name in ("sire_fast.lab.cli", "sire_fast.lab.train"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sire_fast.lab, "cli")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stopped:
        sire_fast.__main__.main()
    assert stopped.value.code == 2
    needs = "sire-fast: the command line needs the extra train: pip install 'sire_fast[train]'\n"
    assert capsys.readouterr().err == needs
