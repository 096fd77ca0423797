"""The contestants compute the same, the measurement counts what it says, and both commands end in a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import suite
from sire_fast import swaps
from sire_fast.lab import benchmark, cli
from sire_fast.lab.benchmark import LAYERS, Setting, Step, contestants

ROOT = Path(__file__).parent.parent
SMALL = {"T": 9, "B": 3, "I": 4, "H": 5, "dtype": "float64"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def outcome(setting: Setting, name: str, sampler) -> list[torch.Tensor]:
    """The penalty of a step and all its gradients."""
    step = Step(setting, name, sampler)
    step()  # a second step must not add to the gradients of the first
    return [step().detach(), *step.gradients()]


@pytest.mark.parametrize("compare", ["swap", "end"])
@pytest.mark.parametrize("kind", ["adjacent:3", "adjacent:all", "uniform:3", "window:3:2"])
@pytest.mark.parametrize("cell", LAYERS)
def test_the_contestants_compute_the_same(cell, kind, compare):
    setting = Setting(cell, **SMALL, swaps=kind, compare=compare)
    pairs = swaps.parse(kind)(setting.T, setting.B)
    # what is easily got wrong: no state before the swap, nothing exchanged, nothing exchanged at either edge
    pairs[0, :2] = torch.tensor([[0, 1], [0, 0]])
    pairs[1, :2] = torch.tensor([[4, 4], [8, 8]])
    expected = outcome(setting, "stacked", lambda *_: pairs)
    assert expected[0] > 1e-4
    for name in ("sire_fast", "shared"):
        torch.testing.assert_close(outcome(setting, name, lambda *_: pairs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch.compile
@pytest.mark.parametrize(("kind", "compare"), [("window:8:2", "swap"), ("uniform:3", "end")])
@pytest.mark.parametrize("cell", LAYERS)
def test_those_that_compile_compute_the_same(cell, kind, compare):
    # what is easily got wrong: a graph that keeps the pairs of the first step, a variant that runs beyond its end
    setting = Setting(cell, **SMALL | {"dtype": "float32"}, swaps=kind, compare=compare)
    slow = {*contestants(setting, slow_starts=True)} - {*contestants(setting)}
    assert len(slow) == (4 if compare == "swap" else 3)
    steps = {name: Step(setting, name) for name in ("stacked", *slow)}
    for seed in range(2):
        found = {}
        for name, step in steps.items():
            torch.manual_seed(seed)
            found[name] = [step().detach(), *step.gradients()]
        for name in slow:
            torch.testing.assert_close(found[name], found["stacked"])


def test_who_compiles(monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name)
    assert {"stacked in JAX", "shared in JAX"} < {*contestants(Setting(), slow_starts=True)}
    assert "shared in JAX" not in contestants(Setting(swaps="uniform:2"), slow_starts=True)
    assert "stacked in JAX" not in contestants(Setting(dtype="float64"), slow_starts=True) + contestants(Setting())
    monkeypatch.setenv("CXX", "missing-compiler")
    assert "stacked in JAX" in contestants(Setting(), slow_starts=True)
    assert not {"stacked compiled", "shared compiled"} & {*contestants(Setting(), slow_starts=True)}


def _their_kernel(states):
    """TorchRL's kernel of a cell with so many states, by torch."""

    def run(x, *tensors, input_precision):
        *start, w_ih, w_hh, b_ih, b_hh, restarts, dtype = tensors
        batch, steps, _ = x.shape
        assert {x.dtype, w_ih.dtype, b_hh.dtype} == {torch.float32}
        assert (dtype, input_precision) == (torch.float32, "tf32x3")
        assert [(s.shape, s.dtype) for s in start] == states * [((batch, steps, w_hh.shape[1]), torch.float32)]
        assert (restarts.shape, restarts.dtype, restarts.any()) == ((batch, steps), torch.bool, False)
        start = [s[:, 0].unsqueeze(0) for s in start]
        arguments = [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, True, False, True
        return torch.lstm(x, start, *arguments) if states == 2 else torch.gru(x, start[0], *arguments)

    return run


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_torchrl_is_called_as_it_is_made(cell, monkeypatch):
    theirs = SimpleNamespace(gru_triton=_their_kernel(1), lstm_triton=_their_kernel(2))
    module = "torchrl.modules.tensordict_module"
    for name in ("torchrl", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(_rnn_triton=theirs))
    setting = Setting(cell, **SMALL | {"dtype": "float32"}, swaps="uniform:3", compare="end")
    pairs = swaps.parse("uniform:3")(setting.T, setting.B)
    drawn, expected = (outcome(setting, name, lambda *_: pairs) for name in ("torchrl stacked", "stacked"))
    torch.testing.assert_close(drawn, expected)
    plain, theirs = Step(setting, "plain"), Step(setting, "torchrl")
    assert plain() is theirs() is None
    torch.testing.assert_close(theirs.gradients(), plain.gradients())


def test_who_runs_torchrl(monkeypatch):
    assert "torchrl" not in contestants(Setting())
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name)
    monkeypatch.setattr(benchmark, "check_device", lambda device: None)
    assert "torchrl" not in contestants(Setting()) + contestants(Setting("RNN", device="cuda"))
    assert {"torchrl", "torchrl stacked"} < {*contestants(Setting("LSTM", dtype="bfloat16", device="cuda"))}
    assert "torchrl" not in contestants(Setting(dtype="float16", device="cuda"))


@pytest.mark.parametrize("cell", LAYERS)
def test_the_published_procedure_is_that_of_one_adjacent_pair(cell):
    setting = Setting(cell, **SMALL, swaps="adjacent:1", compare="swap")
    step = Step(setting, "published")
    for start in range(setting.T - 2):  # as they draw it, never the last pair
        seed = next(s for s in range(1000) if _drawn(s, setting.T - 2) == start)
        torch.manual_seed(seed)
        published = [step().detach(), *step.gradients()]
        pairs = torch.tensor([start, start + 1]).expand(setting.B, 1, 2)
        torch.testing.assert_close(
            published, outcome(setting, "shared", lambda *_, pairs=pairs: pairs), rtol=1e-10, atol=1e-10
        )


def _drawn(seed: int, n: int) -> int:
    torch.manual_seed(seed)
    return int(torch.randint(n, ()))


@pytest.mark.parametrize("cell", LAYERS)
def test_the_plain_steps_compute_the_same(cell):
    setting = Setting(cell, **SMALL)
    ours, torchs = Step(setting, "sire_fast plain"), Step(setting, "plain")
    assert ours() is torchs() is None
    torch.testing.assert_close(ours.gradients(), torchs.gradients(), rtol=1e-10, atol=1e-10)


def test_the_swaps_are_drawn_anew_in_every_step():
    for name in ("sire_fast", "stacked", "shared", "published"):
        step = Step(Setting(**SMALL, swaps="adjacent:1"), name)
        assert len({step().item() for _ in range(8)}) > 1


def test_rounds_are_interleaved_and_what_follows_another_step_is_not_counted(monkeypatch):
    ran, rounds, now = [], [], [0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def step(name):
        now[0] += 1 if ran[-1:] == [name] else 100
        ran.append(name)

    steps = {name: partial(step, name) for name in "abc"}
    seconds = benchmark.measure(steps, 20, lambda: rounds.append(len(ran)))
    assert {name: len(times) for name, times in seconds.items()} == {"a": 20, "b": 20, "c": 20}
    assert all({*times} == {1} for times in seconds.values())
    assert rounds == [6 * n for n in range(1, benchmark.WARM_UP + 20 + 1)]
    assert ran[::2] == ran[1::2]
    orders = {"".join(ran[n : n + 6 : 2]) for n in range(0, len(ran), 6)}
    assert len(orders) > 3
    assert {"".join(sorted(order)) for order in orders} == {"abc"}


def test_ratios_are_taken_round_by_round():
    # a machine that slows down tenfold on the way; the medians' quotient would be 0.67
    seconds = {"a": [1.0, 2.0, 10.0], "b": [2.0, 3.0, 20.0], "c": [9.0, 1.0, 90.0]}
    assert benchmark.ratio(seconds, "a", "b") == pytest.approx((0.5, 0.5, (0.5 + 2 / 3) / 2))
    assert benchmark.ratio(seconds, "a", "b", "c") == pytest.approx((0.5, 0.5, 1.25))
    assert benchmark.ratio(seconds, "b", "b") == (1, 1, 1)


def test_operations_are_counted_once():
    # products of a GRU by hand: projection 5x4, recurrence 5x5, 2 operations each
    setting = Setting("GRU", T=4, B=2, I=4, H=5)
    projection, recurrence = (2 * 3 * width * 5 for width in (4, 5))
    assert setting.operations() == 8 * (projection + recurrence)
    pairs = torch.tensor([[[0, 1], [2, 2]], [[1, 3], [0, 3]]])  # 1 + 0 + 2 + 3 rows to j, 3 + 0 + 2 + 3 to the end
    assert setting.operations(pairs) - setting.operations() == 6 * recurrence
    at_end = replace(setting, compare="end")
    assert at_end.operations(pairs) - at_end.operations() == 8 * recurrence


def test_the_rate_is_that_of_the_swaps_of_each_round(monkeypatch):
    clock, drawn = iter(range(1000)), []  # everything takes a second

    class Counting(swaps.Uniform):
        def __call__(self, *arguments):
            drawn.append(super().__call__(*arguments))
            return drawn[-1]

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(swaps, "parse", lambda _: Counting(2))
    setting = Setting("RNN", **SMALL | {"dtype": "float32"}, swaps="uniform:2", compare="end")
    found = suite.measured(setting, ["sire_fast", "sire_fast plain"], 3, 64, lambda: None)
    best = 2 * 64**3
    assert found.flops == 3 * [best]
    assert found.rates["sire_fast"] == [3 * setting.operations(pairs) / best for pairs in drawn[-5::2]]
    assert found.rates["sire_fast plain"] == 3 * [3 * setting.operations() / best]
    assert len({*found.rates["sire_fast"]}) > 1


@pytest.mark.parametrize(
    ("told", "processor", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel\t\t: 9\n",
            "AMD EPYC (family 26 model 2)",
            "amd-epyc-family-26-model-2-avx2",
        ),
        (
            "cpu family\t: 6\nmodel\t\t: 79\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\n",
            "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6 model 79)",
            "intel-xeon-family-6-model-79-avx2",
        ),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
            "aarch64 (implementer 0x41 part 0xd40)",
            "aarch64-implementer-0x41-part-0xd40-avx2",
        ),
        (None, "aarch64", "aarch64-avx2"),
    ],
)
def test_the_processor_is_told_by_the_numbers_of_its_model(monkeypatch, told, processor, name):
    def read(path: Path) -> str:
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(benchmark.Path, "read_text", read)
    monkeypatch.setattr(benchmark.platform, "processor", lambda: "")
    monkeypatch.setattr(benchmark.platform, "machine", lambda: "aarch64")
    assert benchmark._processor() == processor
    assert suite.file_name({"device": processor, "instruction_set": "avx2"}) == name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
def test_peak_memory_grows_with_the_variants():
    plain, stacked = (
        benchmark.peak_memory(Setting(T=100, B=16, I=32, H=32, swaps="adjacent:8"), name)
        for name in ("plain", "stacked")
    )
    # the rows of all variants: input, output and, at the least, one copy of the gates
    assert stacked - plain > 8 * 100 * 16 * (32 + 32 + 3 * 32) * 4


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_bench(capsys, tmp_path):
    out = tmp_path / "result.json"
    size = ("--T", 5, "--B", 2, "--I", 3, "--H", 4, "--K", 2)
    code, told, err = command(capsys, "bench", "--cell", "lstm", *size, "--rounds", 3, "--out", out)
    assert (code, err) == (0, "")
    result = json.loads(out.read_text())
    assert set(result) == {"setting", "machine", "rounds", "contestants"}
    assert Setting(**result["setting"]) == Setting("LSTM", 5, 2, 3, 4, "adjacent:2", "swap")
    assert result["rounds"] == 3
    assert list(result["contestants"]) == contestants(Setting())
    assert result["contestants"]["plain"]["ratio_to_plain"] == {"lower": 1, "median": 1, "upper": 1}
    assert set(result["machine"]) == {"device", "instruction_set", "threads", "versions", "commit"}
    if Path(__file__).parents[1].joinpath(".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert result["machine"]["commit"].removesuffix("-dirty") == head.stdout.strip()
    for name, row in result["contestants"].items():
        assert f"{name}:" in told
        assert 0 < row["seconds"]["lower"] <= row["seconds"]["median"] <= row["seconds"]["upper"]


def test_a_device_is_tried_first(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, _, err = command(capsys, "bench", "--device", "cuda:99")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("sire-fast: device: 'cuda:99' cannot be used: ")


def test_blocks_shorter_than_the_first_step_of_another_process_pass_in_silence(capfd):
    """Which it runs in sequences of two, to load what is loaded then."""
    size = ("--T", 6, "--B", 2, "--H", 4, "--rounds", 1)
    assert cli.run([str(word) for word in ("bench", *size, "--swaps", "blocks:1:.5")]) == 0
    assert capfd.readouterr().err == ""


def test_the_result_is_written_before_it_is_shown(monkeypatch, tmp_path):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(cli._console, "print", gone)
    out = tmp_path / "result.json"
    size = ("--T", 5, "--B", 2, "--H", 4, "--K", 2, "--rounds", 1)
    assert cli.run([str(word) for word in ("bench", *size, "--out", out)]) == 1
    assert json.loads(out.read_text())["rounds"] == 1


def test_who_can_compare_at_the_end():
    assert contestants(Setting(compare="end")) == [name for name in contestants(Setting()) if name != "published"]


def test_defaults_of_the_swaps(capsys, monkeypatch):
    settings = []

    def stop(setting: Setting, name: str) -> None:
        settings.append(setting)
        raise ValueError("seen")

    monkeypatch.setattr(benchmark, "Step", stop)
    for arguments in ("", "--K 3 --swaps uniform", "--swaps window:2:5 --H 9"):
        assert command(capsys, "bench", *arguments.split())[0] == 2
    assert [s.swaps for s in settings] == ["adjacent:8", "uniform:3", "window:2:5"]
    assert (settings[2].I, settings[2].H) == (9, 9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--cell elman", "cell"),
        ("--T 1", "T:"),
        ("--B 0", "B:"),
        ("--I 0", "I:"),
        ("--H -1", "H:"),
        ("--K 0", "k:"),
        ("--K many", "--K"),
        ("--swaps none", "swaps"),
        ("--swaps some", "swaps"),
        ("--swaps adjacent:all --K 3", "K:"),
        ("--swaps pairs:1:200-201", "nothing to swap"),
        ("--swaps window:1:99999999999999999999", "width"),
        ("--T 99999999999999999999", "T:"),
        ("--compare middle", "compare"),
        ("--dtype int64", "dtype"),
        ("--device quantum", "device"),
        ("--device cuda:99", "cuda:99"),
        ("--rounds 0", "rounds"),
        ("--out missing/result.json", "missing"),
        ("--out .", "file"),
        ("--H 99999999999", "H:"),
        ("--H 2000000000", "size"),
        ("--out ", "empty"),
        ("--out=", "empty"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, "bench", *arguments.split(" "))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("sire-fast: ")
    assert named in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_result_does_not_take_the_place_of_a_pipe_or_device(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        code, out, err = command(capsys, "bench", "--out", str(tmp_path / name))
        assert (code, out) == (2, "")
        assert err == f"sire-fast: {tmp_path / name}: expected a regular file in a directory that exists\n"


def test_the_suite_measures_every_goal_and_draws(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.suite", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "130"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(path.read_text())
    assert result["quick"]
    # figures held to AVX2 cannot be told from others by the processor's name, nor JAX's without its version
    assert result["machine"]["environment"]["OMP_NUM_THREADS"] == "1"
    assert result["machine"]["torch_instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert ("jax" in result["machine"]["versions"]) == (find_spec("jax") is not None)
    assert {axis: len(points) for axis, points in result["sweeps"].items()} == {"K": 5, "H": 4, "T": 4}
    for point in result["sweeps"]["K"]:
        assert list(point["seconds"]) == contestants(Setting())
    for point in result["rivals"]:
        assert list(point["seconds"]) == contestants(Setting(**point["setting"]))
        assert "{cell} T={T} B={B} H={H}".format(**point["setting"]) in done.stdout
    assert len(result["rivals"]) == 3
    rows = [(row["what"].split(",")[0], row["setting"]["cell"]) for row in result["goals"]]
    assert len(rows) == 3 * 6 + 1 + 2 + 2 * 9 + 3 * 9 + (sys.platform == "linux")
    assert {"swap", "end", "arithmetic rate"} <= {what for what, _ in rows}
    for row in result["goals"]:
        lower, median, upper = row["measured"].values()
        assert lower <= median <= upper
        assert row["reached"] == (median <= row["limit"] if row["bound"] == "at most" else median >= row["limit"])
        assert f"{row['bound']} {row['limit']:.2f}" in done.stdout
        if row["what"] != "peak memory, against stacked":
            assert row["arithmetic_rate"]["median"] > 0 < row["gflops"]["median"]
