"""The experiments: small runs, resumption, what the files hold, and the data they read."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import sire_fast
from sire_fast.lab import baselines, cli, files
from sire_fast.lab.paper import data, experiments, problems, report, reproduce, trials
from sire_fast.lab.paper.experiments import EXPERIMENTS
from sire_fast.lab.paper.trials import Trial
from sire_fast.lab.tasks import TASKS

RESULTS = Path(__file__).parent.parent / "bench/results/paper"
TINY = Trial("parity", hidden=4, steps=3, batch=4, examples=20, test_lengths=(4,))


on_linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["half-range", "lp-mnist-rows", "lp-mnist-pixels", "figure2-long", "cost"])
def test_quick_presets(tmp_path, name, capsys):
    assert cli.run(["reproduce", name, "--out", str(tmp_path)]) == 0
    page = (tmp_path / f"{name}.md").read_text()
    assert "numbers mean nothing" in page
    found = json.loads((tmp_path / f"{name}.json").read_text())
    for row in found.get("rows", []):
        assert row["method"] in page
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "numbers mean nothing" in told
    assert "…" not in told  # of names
    assert re.search(rf"{name}, (trainings|rounds) \S+ (\d+)/\2 ", told)  # the bar was told of everything


@pytest.mark.parametrize("name", ["figure1", "cost"])
def test_results_of_another_preset_are_not_replaced(tmp_path, name, capsys):
    """The default would replace hours by seconds."""
    path = tmp_path / f"{name}.json"
    path.write_text('{"preset": "full"}')
    assert cli.run(["reproduce", name, "--out", str(tmp_path)]) == 2
    assert path.read_text() == '{"preset": "full"}'
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds results of the preset full; take another --out" in line


def test_a_stopped_experiment_goes_on_with_what_lacks(tmp_path):
    paths = [(tmp_path / f"{seed}.json", replace(TINY, seed=seed)) for seed in range(3)]
    trials.run_all(paths[:1], 1, lambda: None)
    before = paths[0][0].stat().st_mtime_ns
    counted = []
    trials.run_all(paths, 2, lambda: counted.append(1))
    assert len(counted) == 3
    assert paths[0][0].stat().st_mtime_ns == before
    assert all(json.loads(path.read_text())["trial"]["seed"] == trial.seed for path, trial in paths)


# A result may be of hours: other data, settings or presets must neither pass for it nor take its place.
@pytest.mark.parametrize(
    ("changes", "told"),
    [({"steps": 4}, "steps 3, not 4"), ({"data": "x/mnist", "lr": 0.1}, "lr 0.001, not 0.1, data None, not 'mnist'")],
)
@pytest.mark.parametrize("name", ["0.json", "0.pt"])
def test_a_file_of_another_trial_is_kept(tmp_path, name, changes, told):
    path = tmp_path / name
    if path.suffix == ".pt":
        trials.Training(TINY).save(path)
    else:
        trials.run_all([(path, TINY)], 1, lambda: None)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{name}: is of another training: {told};")):
        trials.run_all([(tmp_path / "0.json", replace(TINY, **changes))], 1, lambda: None)
    assert path.read_bytes() == before


# A new setting must not cost what older versions have trained, as long as it stands at its default.
def test_files_of_an_older_version_are_used(tmp_path, monkeypatch):
    path, older = tmp_path / "0.json", trials._told(TINY)
    del older["augment"], older["records"]
    monkeypatch.setattr(trials, "_told", lambda trial: older)
    trials.run_all([(path, TINY)], 1, lambda: None)
    training = trials.Training(TINY)
    assert training.advance()
    training.save(path.with_suffix(".pt"))
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert trials._done(path, TINY)
    going_on = trials.Training(TINY)
    going_on.load(path.with_suffix(".pt"))
    assert going_on.at.step == 1


@pytest.mark.parametrize("cut", [0, 100, -100])
def test_a_damaged_checkpoint_is_told_in_a_line(tmp_path, monkeypatch, capsys, cut):
    case = experiments.Case("s", "m", TINY)
    monkeypatch.setitem(EXPERIMENTS, "figure1", experiments.Experiment("about", lambda: iter([case])))
    (row,) = reproduce.plan("figure1", "quick", None, None, tmp_path)
    path = row.results[0].with_suffix(".pt")
    trials.Training(row.case.trial).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    assert cli.run(["reproduce", "figure1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: is damaged" in error
    assert error.count("\n") == 1
    assert path.exists()


class Stopped(Exception):
    pass


# Every state that a step leaves behind: of both generators, the optimiser, the averages, the best model, the schedule.
@pytest.mark.parametrize(
    "changes",
    [
        {"swaps": "adaptive:uniform:2", "fresh": True, "seconds": 0.05},
        {"swaps": "adjacent:2", "compare": "swap", "patience": 25, "dropout": 0.5, "window": 2},
    ],
)
def test_a_stopped_trial_goes_on_as_if_it_had_not(tmp_path, monkeypatch, changes):
    trial = replace(TINY, steps=40, train_lengths=(4,), **changes)
    whole = trials.run(trial)
    path = tmp_path / "trial.json"
    monkeypatch.setattr(trials, "SAVED_EVERY", 0.0)
    advance, steps = trials.Training.advance, iter(range(20))

    def stopping(training):
        if next(steps, None) is None:
            raise Stopped
        return advance(training)

    monkeypatch.setattr(trials.Training, "advance", stopping)
    with pytest.raises(Stopped):
        trials.run_all([(path, trial)], 1, lambda: None)
    assert [p.name for p in tmp_path.iterdir()] == ["trial.pt"]
    taken = []
    monkeypatch.setattr(trials.Training, "advance", lambda training: taken.append(1) or advance(training))
    trials.run_all([(path, trial)], 1, lambda: None)
    assert [p.name for p in tmp_path.iterdir()] == ["trial.json"]
    result = json.loads(path.read_text())
    assert len(taken) == result["history"][-1]["step"] - 20
    for line, wanted in zip(result["history"], whole["history"], strict=False):  # as many as the seconds allow
        assert line | {"seconds": 0} == wanted | {"seconds": 0}
    assert result["steps"]["metrics"] == whole["steps"]["metrics"]
    assert result["steps"]["step"] == whole["steps"]["step"]


@pytest.mark.parametrize(("problem", "values"), [("parity", [0.5, 0.7, 0.6, 0.6]), ("variance", [5.0, 3.0, 4.0, 4.0])])
def test_patience_keeps_the_best_model(monkeypatch, problem, values):
    told = iter(values)
    monkeypatch.setattr(problems.Sequences, "validate", lambda *_: next(told))
    trial = replace(TINY, problem=problem, steps=50)
    result = trials.run(replace(trial, patience=2))
    assert len(result["history"]) == 4
    assert result["seconds"] == result["steps"]
    assert trials.best(result) == (0.7 if problem == "parity" else -3.0)
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert result["steps"]["metrics"] == trials.run(replace(trial, steps=2))["steps"]["metrics"]


def test_the_weight_warms_up(monkeypatch):
    seen = []
    monkeypatch.setattr(problems.Sequences, "penalty", lambda _, model, __: Seen.apply(sire_fast.penalty(model), seen))
    trials.run(replace(TINY, swaps="uniform:1", weight=8.0, steps=6, warm_up=4))
    assert seen == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0]


class Seen(torch.autograd.Function):
    """0, whose gradient is noted: the weight."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(grad.item())
        return torch.zeros(()), None


def test_windows_hand_on_states_but_no_gradients():
    trial = replace(TINY, hidden=8, train_lengths=(6,), window=2, swaps="adjacent:all", compare="swap")
    training = trials.Training(trial)
    seen, layer = [], training.recurrent.layer
    layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], inputs[1], output[1])))
    assert training.advance()
    (x, first, after), (_, second, _), (_, third, _) = seen
    assert (len(x), first, len(training.at.losses)) == (2, None, 3)
    torch.testing.assert_close(second, after, rtol=0, atol=0)
    assert not second.requires_grad
    assert third is not None
    assert training.recurrent.initial is None  # the next sequence begins anew


# What is chosen must be the best by validation, of trials that no result shows.
def test_an_experiment_chooses_by_validation(monkeypatch, tmp_path):
    choices = tuple(replace(TINY, steps=24, lr=lr, patience=50) for lr in (1e-3, 1e-2, 1e-1))
    case = experiments.Case("s", "m", choices[0], choices, seeds=2)
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiments.Experiment("about", lambda: iter([case])))
    original, ran = trials.run, []
    monkeypatch.setattr(trials, "run", lambda trial, _: ran.append(trial) or original(trial))
    monkeypatch.setattr(reproduce, "best", lambda result: -abs(result["trial"]["lr"] - 1e-2))
    monkeypatch.setattr(reproduce, "NAMES", ("tiny",))
    rows = reproduce.plan("tiny", "full", 3, None, tmp_path)
    found = reproduce.reproduce("tiny", "full", rows, tmp_path, 1, lambda: None)
    assert [(t.seed, t.steps, t.lr, t.patience) for t in ran] == [
        *((experiments.CHOOSING_SEED, 3, lr, 0) for lr in (1e-3, 1e-2, 1e-1)),  # nothing stops so short a trial
        *((seed, 24, 1e-2, 50) for seed in range(2)),
    ]
    assert found["rows"][0]["chosen"] == {"lr": 0.01}
    assert "lr 0.01" in (tmp_path / "tiny.md").read_text()


def test_a_trial_repeats():
    first, second = (trials.run(TINY) for _ in range(2))
    assert first["steps"]["metrics"] == second["steps"]["metrics"]
    assert first["history"][-1]["loss"] == second["history"][-1]["loss"]


def test_a_result_tells_what_was_done():
    result = trials.run(TINY)
    assert result["trial"] == asdict(TINY)
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "threads"} <= set(result["machine"])
    assert result["epoch"] == 20
    assert result["seconds"] == result["steps"]


# The checkout may have moved on before hours of training end.
def test_a_result_tells_the_commit_that_it_began_with(monkeypatch):
    commits, advance = ["before"], trials.Training.advance
    monkeypatch.setattr(trials.benchmark, "machine", lambda: {"commit": commits[-1]})
    monkeypatch.setattr(trials.Training, "advance", lambda training: commits.append("after") or advance(training))
    assert trials.run(TINY)["machine"]["commit"] == "before"


def test_the_swaps_of_a_step_are_of_all_steps():
    trial = replace(TINY, swaps="adaptive:uniform:2", steps=5, records=2)
    run = trials.run(trial)
    begun = run["steps"] | {"step": 0}
    lost = run | {"history": [], "adaptive_swaps": 0, "steps": begun, "seconds": begun}  # diverged in the first step
    for runs in ([run], [run, lost]):
        case = experiments.Case("s", "m", trial)
        row = report.summary("name", EXPERIMENTS["swaps"], [case], [runs])["rows"][0]
        assert row["swaps_a_step"]["mean"] == run["adaptive_swaps"] / 5 / trial.batch / len(runs)


# NaN is no JSON, and a model of NaNs no result.
@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_trial_that_diverges_is_measured_before(monkeypatch, factor):
    losses = iter([1.0, 1.0, factor])
    parity = TASKS["parity"]
    monkeypatch.setitem(TASKS, "parity", replace(parity, loss=lambda *args: parity.loss(*args) * next(losses)))
    result = trials.run(replace(TINY, steps=9))
    assert result["diverged"] == 2
    assert result["seconds"] == result["steps"]
    assert result["steps"]["step"] == 2
    assert math.isfinite(result["steps"]["order_sensitivity"]["mean"])
    found = report.summary("name", EXPERIMENTS["figure1"], [experiments.Case("s", "m", TINY)], [[result]])
    assert "diverged" in report.markdown("name", [], report.tables(found))


@on_linux
@pytest.mark.proof
def test_ctrl_c_ends_all_processes_and_keeps_what_is_done(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "sire_fast", "reproduce", "figure1", "--preset", "full", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(sire_fast.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 600
        while not [*tmp_path.rglob("*.json")] and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err.count("\n")) == (130, 1)
    assert "the same command goes on: sire-fast reproduce figure1 --preset full" in err
    assert [json.loads(path.read_text())["trial"]["problem"] for path in tmp_path.rglob("*.json")]
    assert not [*tmp_path.rglob("*.tmp")]
    deadline = time.monotonic() + 10
    commands = [Path("/proc", child, "cmdline") for child in children]
    while alive := [path for path in commands if path.exists() and path.read_bytes()]:  # what has ended has no command
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


# Without --out it would begin anew in another folder.
@pytest.mark.parametrize("options", [[], ["--seeds", "2", "--data", "a b", "--out", "x"]], ids=str)
def test_what_goes_on_after_ctrl_c_has_all_that_was_given(monkeypatch, capsys, options):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plan", lambda *_: [])
    monkeypatch.setattr(cli, "reproduce", interrupted)
    assert cli.run(["reproduce", "table1", *options]) == 130
    _, _, told = capsys.readouterr().err.strip().partition("goes on: ")
    assert shlex.split(told) == ["sire-fast", "reproduce", "table1", "--preset", "quick", *options]


def test_equal_time_goes_on_behind_equal_steps():
    result = trials.run(replace(TINY, seconds=0.2))
    assert result["steps"]["step"] == 3
    assert result["seconds"]["step"] > 3
    assert result["seconds"]["seconds"] >= 0.2


# The widths of "sab" and "isab" are multiples of 4.
@pytest.mark.parametrize(
    ("model", "kind", "tolerance"),
    [
        ("rnn", sire_fast.RNN, None),
        ("irnn", sire_fast.RNN, None),
        ("lstm", sire_fast.LSTM, None),
        ("janossy", baselines.Janossy, 0),
        ("deepsets-prod", baselines.DeepSets, 0.1),
        ("sab", baselines.SelfAttention, 0.25),
        ("isab", baselines.InducedAttention, 0.25),
    ],
)
def test_models_of_a_task(model, kind, tolerance):
    trial = replace(TINY, model=model, hidden=8)
    training = trials.Training(trial)
    kinds = [each for each in training.model.modules() if isinstance(each, kind)]
    assert kinds
    if kind is sire_fast.RNN:
        assert kinds[0].nonlinearity == ("relu" if model == "irnn" else "tanh")
        assert torch.equal(kinds[0].weight_hh_l0, torch.eye(8)) == (model == "irnn")
    before = [p.detach().clone() for p in training.model.parameters()]
    assert training.advance()
    assert not any(map(torch.equal, before, training.model.parameters()))
    result = trials.run(trial)
    assert result["parameters"] == sum(p.numel() for p in before)
    if tolerance is not None:
        assert result["parameters"] == pytest.approx(trials.run(replace(TINY, hidden=8))["parameters"], rel=tolerance)


@pytest.mark.parametrize("swaps", ["none", "local:20", "neighbours:2", "adjacent:2"])
def test_images_by_rows(monkeypatch, swaps):
    x, y = torch.rand(60, 8, 8), torch.arange(60) % 3
    monkeypatch.setattr(data, "images", lambda path: data.Split(x, y, x, y, 3, "noise"))
    trial = Trial("lp-mnist", model="rnn", cell="rnn", hidden=4, swaps=swaps, steps=2, batch=4)
    result = trials.run(trial)
    assert (result["history"][-1]["penalty"] > 0) == (swaps != "none")
    assert 0 < result["steps"]["order_sensitivity"]["mean"] < 1


@pytest.mark.parametrize("swaps", ["none", "local:20", "adjacent:2", "vertical:2", "grid:2"])
@pytest.mark.parametrize("compare", ["end", "swap"])
def test_images_by_pixels(monkeypatch, swaps, compare):
    x, y = torch.rand(60, 8, 7), torch.arange(60) % 3
    monkeypatch.setattr(data, "images", lambda path: data.Split(x, y, x, y, 3, "noise"))
    trial = Trial(
        "lp-mnist-pixels", model="irnn", cell="irnn", hidden=4, swaps=swaps, compare=compare, steps=2, batch=4
    )
    training = trials.Training(trial)
    image, _ = training.problem.batch(1, torch.Generator().manual_seed(0))
    assert image.shape == (56, 1, 1)
    assert training.problem._seen.flatten().tolist() == image.flatten().tolist()  # along the rows
    if layer_swaps := training.recurrent.layer.swaps:
        i, j = layer_swaps(56, 200).unbind(-1)
        allowed = {"adjacent": {1}, "vertical": {7}, "grid": {1, 7}}[swaps.partition(":")[0]]
        assert set((j - i).flatten().tolist()) == allowed
    result = trials.run(trial)
    assert (result["history"][-1]["penalty"] > 0) == (swaps != "none")
    assert 0 < result["steps"]["order_sensitivity"]["mean"] < 1


# Rows of a table compare only if all are measured in the same orders.
def test_the_penalty_does_not_choose_the_orders_of_the_measure():
    x, y = torch.rand(60, 8, 8), torch.arange(60) % 3
    split = data.Split(x, y, x, y, 3, "noise")
    few, many = (problems.LocalImages(split, f"local:{n}") for n in (1, 500))
    rows = x[:5].transpose(0, 1)
    reordered = [p.reorder(rows, torch.Generator().manual_seed(0)) for p in (few, many)]
    changed = [(r != rows).float().mean() for r in reordered]
    assert changed[0] > 0.5
    assert changed[1] > 0.5


def test_local_orders_exchange_neighbours_only():
    pairs = data.neighbours(4, 5)
    assert len(pairs) == 4 * 4 + 3 * 5
    drawn = torch.tensor(pairs)[torch.randint(len(pairs), (10, 1))]
    order = data.local_orders(drawn, 20)
    for row, (i, j) in zip(order.tolist(), drawn[:, 0].tolist(), strict=True):
        expected = list(range(20))
        expected[i], expected[j] = j, i
        assert row == expected


def test_augmented_clouds_are_stretched_and_turned_about_z():
    clouds = torch.randn(50, 4, 3)
    changed = data.augmented(clouds, torch.Generator().manual_seed(0))
    for before, after in zip(clouds.unbind(1), changed.unbind(1), strict=True):
        matrix = torch.linalg.lstsq(before, after).solution  # linear, one for all points of a cloud
        torch.testing.assert_close(before @ matrix, after)
        stretch = matrix.norm(dim=1)
        assert (stretch > 0.79).all()
        assert (stretch < 1.26).all()
        assert matrix[2, :2].abs().max() < 1e-5
        assert abs(torch.atan2(matrix[0, 1], matrix[0, 0]).item()) < 0.1 * math.pi + 1e-5
    assert (changed - clouds).abs().max() > 0.01


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64])
def test_points_from_a_file(tmp_path, kind):
    x = np.random.default_rng(0).normal(5, 3, (40, 30, 3)).astype(np.float16)
    np.savez(tmp_path / "modelnet_tiny.npz", x=x, y=np.arange(40) % 2, test=(np.arange(40) > 29).astype(kind))
    split = data.points(tmp_path)
    assert split.x.shape == (30, 30, 3)
    assert split.test_x.shape == (10, 30, 3)
    assert split.test_y.tolist() == [0, 1] * 5
    torch.testing.assert_close(split.x.mean((1, 2)), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.x.std((1, 2)), torch.ones(30))
    trial = Trial("points", hidden=8, steps=2, batch=4, train_lengths=(10,), data=str(tmp_path), augment=True)
    result = trials.run(trial)
    assert "modelnet_tiny" in result["source"]
    assert result["trial"]["data"] == tmp_path.name  # a result is handed on; where its data lay concerns nobody
    path = tmp_path / "trial.json"
    path.write_text(json.dumps(result))
    assert trials._done(path, trial)


@pytest.mark.parametrize("layout", ["authors", "ModelNet40"])
def test_points_from_hdf5(tmp_path, layout):
    x, y = np.random.default_rng(0).normal(size=(6, 30, 3)).astype(np.float32), np.arange(6, dtype=np.uint8)[:, None]
    files = {
        "authors": {"clouds": {"tr_cloud": x[:4], "tr_labels": y[:4], "test_cloud": x[4:], "test_labels": y[4:]}},
        "ModelNet40": {
            "ply_data_train0": {"data": x[:1], "label": y[:1]},
            "ply_data_train1": {"data": x[1:4], "label": y[1:4]},
            "ply_data_test0": {"data": x[4:], "label": y[4:]},
        },
    }[layout]
    for name, arrays in files.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, array in arrays.items():
                file[key] = array
    split = data.points(tmp_path)
    # published numbers are set beside those of data of that name
    assert split.source.startswith({"authors": "clouds: ", "ModelNet40": f"{tmp_path.name}: "}[layout])
    assert (split.y.tolist(), split.test_y.tolist()) == ([0, 1, 2, 3], [4, 5])
    torch.testing.assert_close(split.test_x, data._standard(torch.from_numpy(x[4:])))


@pytest.mark.parametrize(
    ("experiment", "name", "content"),
    [
        ("lp-mnist-rows", "mnist.npz", b"no archive"),
        ("lp-mnist-pixels", "mnist.tgz", b"no archive"),
        ("table1", "modelnet.npz", b"PK\3\4 broken"),
        ("table1", "clouds.h5", b"no HDF5"),
        ("lp-mnist-rows", "train-images-idx3-ubyte.gz", gzip.compress(b"\0", mtime=0)),
        ("lp-mnist-rows", "train-images-idx3-ubyte.gz", gzip.compress(bytes(100), mtime=0)[:9] + bytes(20)),
    ],
)
def test_a_damaged_file_is_told_in_a_line(tmp_path, capsys, experiment, name, content):
    (tmp_path / name).write_bytes(content)
    assert cli.run(["reproduce", experiment, "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{name}: cannot be read" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.ones((6, 30))},
        {"x": np.full((6, 10, 3), "1")},
        {"y": np.arange(5) % 2},
        {"y": np.array([*"ababab"])},
        {"y": np.arange(6) - 1},
        {"y": np.arange(6) / 2},
        {"y": np.full(6, np.nan)},
        {"test": np.zeros(6)},
        {"test": np.ones(6)},
    ],
    ids=["flat", "text", "a class too few", "words", "negative", "halves", "NaN", "no test", "only a test"],
)
def test_arrays_that_do_not_fit_are_told_in_a_line(tmp_path, capsys, changes):
    arrays = {"x": np.ones((6, 10, 3)), "y": np.arange(6) % 2, "test": np.arange(6) > 3}
    np.savez(tmp_path / "modelnet.npz", **arrays | changes)
    assert cli.run(["reproduce", "table1", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "modelnet.npz: cannot be read: " in error
    assert error.count("\n") == 1


def test_images_of_more_than_ten_classes_are_told_in_a_line(tmp_path, capsys):
    x, y = np.ones((20, 8, 8), np.uint8), np.arange(20)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert cli.run(["reproduce", "lp-mnist-rows", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "mnist.npz: cannot be read: expected classes as whole numbers from 0 on, below 10" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_clouds_of_fewer_points_than_a_row_tells_are_refused(tmp_path, capsys, preset):
    """Before the first training: "1000 points" would read what there is, or end the experiment after a day."""
    count = {"quick": 99, "full": 999}[preset]
    x = np.random.default_rng(0).normal(size=(20, count, 3))
    np.savez(tmp_path / "modelnet.npz", x=x, y=np.arange(20) % 2, test=np.arange(20) > 15)
    assert cli.run(["reproduce", "table1", "--preset", preset, "--data", str(tmp_path), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert f"data: expected at least {count + 1} points in a cloud, got {count}" in error
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=f"at least {count + 1} points"):
        problems.Classes(data.points(tmp_path), count + 1)


def test_two_processes_do_not_run_one_experiment_into_one_directory(tmp_path, capsys):
    (tmp_path / "figure1").mkdir()
    with files.alone(tmp_path / "figure1"):
        code = cli.run(["reproduce", "figure1", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1, 1)
    assert "figure1: another process writes there" in error


# A kind that is made as another is, or labels of other clouds, could not be learned.
def test_generated_shapes_differ():
    made = [data._surface(kind, 100, torch.Generator().manual_seed(0)) for kind in data._SHAPES]
    assert not any(torch.allclose(*pair) for pair in itertools.combinations(made, 2))
    split = data.points(shapes=16)
    assert split.x.shape == (128, 1024, 3)
    assert split.y.bincount().tolist() == [16] * 8
    assert split.test_y.bincount().tolist() == [4] * 8
    assert "generated" in split.source
    radii, test_radii = (x.norm(dim=-1).sort(1).values for x in (split.x, split.test_x))
    means = torch.stack([radii[split.y == kind].mean(0) for kind in range(split.classes)])
    right = torch.cdist(test_radii, means).argmin(1) == split.test_y
    assert right.float().mean() > 0.3  # guessing is 1 / 8


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    arrays = [np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2) if d == 3 else np.arange(n, dtype=np.uint8)
              for n, d in ((5, 3), (5, 1), (2, 3), (2, 1))]  # fmt: skip
    for name, array in zip(data._IDX, arrays, strict=True):
        sizes = np.array(array.shape, ">i4").tobytes()
        content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
        (tmp_path / f"{name}-ubyte{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
    split = data.images(tmp_path)
    assert split.y.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(split.test_x[1] * 255, torch.tensor([[4.0, 5.0], [6.0, 7.0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure9"], "name: expected one of"),
        (["figure1", "--preset", "huge"], "preset: expected one of"),
        (["figure1", "--seeds", "0"], "seeds: expected at least 1"),
        (["cost", "--seeds", "7"], "seeds: expected none for cost"),
        (["figure1", "--data", "x"], "data: expected none for figure1"),
        (["table1", "--data", "x"], "data: expected point clouds"),
        (["lp-mnist-pixels", "--data", "x"], "data: expected MNIST"),
    ],
)
def test_bad_input_is_told_in_a_line(capsys, arguments, message):
    assert cli.run(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Two rows that shared a file would run again and again, each over the other.
@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_trial_has_a_file_of_its_own(monkeypatch, tmp_path, name, preset):
    x = torch.zeros(0, 1000, 2)
    nothing = data.Split(x, torch.zeros(0), x, torch.zeros(0), 1, "nothing")
    monkeypatch.setattr(data, "images", lambda path: nothing)
    monkeypatch.setattr(data, "points", lambda path: nothing)
    rows = reproduce.plan(name, preset, 2, None, tmp_path)
    files = [path for row in rows for path in (*row.choices, *row.results)]
    assert len(set(files)) == len(files)
    methods = {(row.case.setting, row.case.method) for row in rows}
    if preset == "full":
        assert set(EXPERIMENTS[name].published) <= methods


def test_the_overview_tells_the_last_target_that_all_runs_reach():
    def row(method, **targets):
        return {"setting": "s", "method": method, "budget": "steps", "targets": targets}

    reached, never = [{"epochs": 1.5, "seconds": 9.0}], [None]
    rows = [row("a", low=reached, middle=reached, high=reached), row("b", low=reached, middle=reached, high=never)]
    title, (headings, *lines) = report.overview({"about": "about", "rows": rows})
    assert (title, headings[1:]) == ("about", ["s: epochs, s to middle"])
    assert lines == [["a", "1.50, 9.0 (1 of 1)"], ["b", "1.50, 9.0 (1 of 1)"]]


def test_a_drawn_history_is_the_mean_over_seeds():
    run, case = trials.run(TINY), experiments.Case("s", "m", TINY)
    first, *others = run["history"]
    better = {"seconds": first["seconds"] + 3.0, "validation": first["validation"] + 0.5}
    better = run | {"history": [first | better]}  # and ended earlier
    experiment = experiments.Experiment("about", lambda: iter(()), "epochs")
    (row,) = report.summary("name", experiment, [case], [[run, better]])["rows"]
    assert others
    assert row["epoch"] == run["epoch"]
    mean = {"step": first["step"], "seconds": first["seconds"] + 1.5, "validation": first["validation"] + 0.25}
    assert row["history"] == [pytest.approx(mean)]


@pytest.mark.parametrize("name", ["half-range", "rivals"])  # errors within a decade, and over six
def test_the_scales_of_a_picture_can_be_read(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    figure = report.picture(found, EXPERIMENTS[name].picture)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            least, most = axis.get_view_interval()
            told = [x for x in axis.get_majorticklocs() if least <= x <= most]
            assert 3 <= len(told) <= 14, f"{name}, {axes.get_title('left')}, {axis.get_label_text()}: {told}"


def test_the_gap_to_a_published_number_is_printed():
    case = experiments.Case("s", "m", TINY)
    run = trials.run(TINY)
    run["steps"]["metrics"] = {"test": {"accuracy": 0.8}}
    experiment = experiments.Experiment("about", lambda: iter(()), published={("s", "m"): 0.9})
    found = report.summary("name", experiment, [case], [[run]])
    page = report.markdown("name", [], report.tables(found))
    assert "0.900 | -0.100" in page
