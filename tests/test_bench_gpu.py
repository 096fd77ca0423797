"""What bench.gpu does on a GPU, on the CPU: its check lets a right kernel pass and finds a wrong one, which is then not
timed; its floor is the one computed by hand. Streams, graphs and events need a GPU."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cuda_on_host
import pytest
import torch

from bench import gpu, gpu_check, gpu_time, processes, tune
from bench.gpu_check import Checked
from bench.gpu_plan import Goal, Item
from bench.processes import Lost
from sire_fast import functional, swaps
from sire_fast.backends.gpu import plan
from sire_fast.cells import CELLS
from sire_fast.kernels import launch
from sire_fast.lab.benchmark import CONTESTANTS, Setting
from sire_fast.proof import Case, make

SMALL = [case for case in gpu_check.CASES if case.T <= 20 and case.B < 20 and case.H <= 100]
TINY = Setting("GRU", T=6, B=3, I=4, H=8, swaps="uniform:2", compare="end")


@pytest.fixture(autouse=True)
def _not_poisoned_yet():
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "tf32"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_right_kernel_passes(cell, arithmetic):
    checked = gpu_check.check_cases(Checked("cpu", cell, arithmetic), SMALL, "cpu")
    assert (checked.failures, checked.passed, checked.skipped) == ([], len(SMALL), 0)
    assert checked.correct
    assert checked.why_not_timed() is None


def test_the_cases_hold_what_users_have():
    assert {case.H for case in gpu_check.CASES} == {7, 32, 64, 100, 128, 192, 256, 512}
    assert {case.compare for case in gpu_check.CASES if case.ragged and case.recompute} == {"end", "swap"}
    assert any(case.T == 1 and case.B == 1 for case in gpu_check.CASES)
    assert any(case.swaps == "none" for case in gpu_check.CASES)
    plans = [
        (case, plan(case.T, case.B, swaps.parse(case.swaps).k, case.T, 16, groups))
        for case in gpu_check.CASES
        if case.swaps.startswith("uniform")
        for groups in (132 if case.H < 512 else 132 // 16,)  # of an H200: clusters of 16 for the largest
    ]
    assert any(swaps.parse(case.swaps).k > found.in_step for case, found in plans)  # variants behind the lock step
    assert any(found.sequences * 132 // 16 < case.B for case, found in plans if case.H == 512)  # a second tile
    arguments = make("lstm", Case(9, 5, 4, "uniform:3", "swap", I=2, ragged=True), 0, torch.float32, "cpu")
    i, j = arguments["swaps"].unbind(-1)
    assert bool((j < arguments["lengths"][:, None]).all())
    assert torch.equal(arguments["ends"], j)
    assert i[0, 0] == j[0, 0]


def wrong_gradient(result):
    return result._replace(output=1.01 * result.output - 0.01 * result.output.detach())


def unwritten_output(result):
    return result._replace(variants=0 * result.variants + torch.empty_like(result.variants).nan_to_num(7.0))


def moody(result):
    return result._replace(h_n=result.h_n * (1 + 1e-7 * torch.rand(())))


def shorter(result):
    return result._replace(penalty=result.penalty[:, 1:])


@pytest.mark.parametrize(
    ("accident", "told"),
    [
        (wrong_gradient, "d_x_proj: error"),
        (unwritten_output, "variants"),
        (moody, "other bits"),
        (shorter, "penalty: ex"),
    ],
)
def test_a_wrong_kernel_is_found_and_not_timed(monkeypatch, accident, told):
    kernel = functional.swap_rnn
    monkeypatch.setattr(functional, "swap_rnn", lambda *args, **kwargs: accident(kernel(*args, **kwargs)))
    item = Item(TINY, "float32", ("kernel", "kernel plain", "plain"), (Goal(1.0, "plain"),))
    checked = gpu.prepare(item, "cpu", True)
    measured = gpu.time_item(item, ["cpu"], {("cpu", "gru", "float32"): checked}, {(item, "cpu")}, 1)
    assert not checked.correct
    assert any(told in failure for failure in checked.failures)
    assert measured["cpu"] == measured["cpu plain"] == "not timed: wrong"
    assert len(measured["plain"]["step"]) == 1
    (row,) = gpu.reached(item, ["cpu"], measured)
    assert (row["reached"], row["measured"], row["why"]) == (False, None, "not timed: wrong")


def test_what_a_kernel_raises_is_a_failure_and_what_it_refuses_is_none(monkeypatch):
    refused = gpu_check.check_cases(Checked("cpu", "gru", "float16"), SMALL, "cpu")
    assert refused.correct
    assert refused.why_not_timed().startswith("not available: cpu: computes in")
    monkeypatch.setattr(functional, "swap_rnn", lambda *args, **kwargs: 1 / 0)
    raised = gpu_check.check_cases(Checked("cpu", "gru", "float32"), SMALL[:1], "cpu")
    assert "ZeroDivisionError" in raised.failures[0]


def test_memory_that_others_took_is_no_failure(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_check, "check_case", no_memory)
    checked = gpu_check.check_cases(Checked("cpu", "gru", "float32"), SMALL[:2], "cpu")
    assert (checked.failures, checked.passed, checked.skipped) == ([], 0, 2)
    checked.add(checked)
    assert checked.skipped == 4


def test_what_breaks_the_context_at_full_length_is_wrong_and_not_run_again(monkeypatch, capfd):
    """In the process that times the others it would take all of them along."""
    monkeypatch.setattr(gpu, "broken", lambda: True)
    item = Item(TINY, "float32", ("kernel", "plain"))
    checked = gpu.prepare(item, "cpu", True)
    assert checked.failures == [f"cpu {item}: breaks the CUDA context of its process"]
    for checks, told in ((True, "not timed: wrong"), (False, "skipped: time")):
        groups = {("cpu", "gru", "float32"): Checked("cpu", "gru", "float32")}
        monkeypatch.setattr(gpu, "answers", lambda *_: iter([(0, checked)]))
        ready = gpu.prepare_all([item], [], groups, "cpu", checks, gpu.Clock(60), lambda: None)
        assert gpu.time_item(item, ["cpu"], groups if checks else None, ready, 1)["cpu"] == told


def test_no_more_processes_than_a_gpu_has_room_for(monkeypatch):
    assert 1 <= processes.workers() <= 16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 16)
    for gigabytes, workers in ((0.5, 1), (11.2, 11), (139, 16)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=gigabytes: (int(free * 2**30), 0))
        assert processes.workers() == workers


@pytest.mark.parametrize(("cell", "hidden", "draws"), [("gru", 64, 1), ("gru", 8, 3), ("rnn_relu", 64, 3)])
def test_luck_has_as_many_chances_as_before_a_kernel_is_used(cell, hidden, draws, monkeypatch):
    tried = []
    monkeypatch.setattr(gpu_check, "check_case", lambda *arguments: tried.append(arguments[4]) or found)
    for found, expected in (([["error"], []], draws), ([["error"], ["other bits"]], 1), ([[], []], 1)):
        tried.clear()
        checked = gpu_check.check_cases(Checked("cpu", cell, "float32"), [Case(3, 2, hidden)], "cpu")
        assert (tried, len(checked.failures)) == ([*range(expected)], len(found[0] + found[1]))
        assert checked.passed == (not checked.failures)


def hang() -> None:
    time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_later() -> None:
    threading.Timer(0.1, die).start()


def fine(n: int) -> tuple[int, int]:
    return n, os.getpid()


@pytest.mark.proof
def test_one_that_hangs_or_dies_does_not_take_the_others_along():
    tasks = [partial(fine, 0), die, hang, partial(fine, 3), partial(fine, 4)]
    found = dict(processes.answers(tasks, 2, 200, 25))
    assert [found[n][0] for n in (0, 3, 4)] == [0, 3, 4]
    assert found[1] == Lost("its process died: exit code -9", died=True)
    assert found[2] == Lost("no answer in 25 s", died=False)
    assert len({found[n][1] for n in (0, 3, 4)}) <= 2  # a process answers one task behind the other


def test_what_comes_after_the_time_is_up_does_not_come_and_leaves_no_process():
    began = time.monotonic()
    assert dict(processes.answers([hang, hang, hang], 2, 0.5, 60)) == {}
    assert time.monotonic() - began < 30


def test_a_process_that_dies_between_two_tasks_takes_none_along():
    found = {}
    for n, answer in processes.answers([die_later, partial(fine, 1)], 1, 200, 25):
        found[n] = answer
        while n == 0 and multiprocessing.active_children():
            time.sleep(0.05)
    assert (found[0], found[1][0]) == (None, 1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("lost", "correct", "told"),
    [(Lost("no answer in 9 s", False), False, "skipped: time"), (Lost("it died", True), False, "not timed: wrong")],
)
def test_what_does_not_answer_is_skipped_and_what_dies_is_wrong(lost, correct, told, monkeypatch, capfd):
    item = Item(TINY, "float32", ("kernel", "plain"))
    groups = {("cpu", "gru", "float32"): Checked("cpu", "gru", "float32")}
    good = Checked("cpu", "gru", "float32", passed=1)
    # a task for the item, one for each case
    monkeypatch.setattr(gpu, "answers", lambda *_: iter([(0, lost), (1, good), (2, good)]))
    ready = gpu.prepare_all([item], SMALL[:2], groups, "cpu", True, gpu.Clock(60), lambda: None)
    (group,) = groups.values()
    assert (group.passed, group.skipped, bool(group.failures)) == (2, 0, lost.died)
    assert gpu.time_item(item, ["cpu"], groups, ready, 1)["cpu"] == told
    monkeypatch.setattr(gpu, "answers", lambda *_: iter([(0, good)]))
    groups = {("cpu", "gru", "float32"): Checked("cpu", "gru", "float32")}
    assert gpu.prepare_all([item], SMALL[:2], groups, "cpu", True, gpu.Clock(60), lambda: None) == {(item, "cpu")}
    (group,) = groups.values()
    assert (group.skipped, group.correct) == (2, True)  # nothing was found wrong
    monkeypatch.setattr(gpu, "answers", lambda *_: iter([(0, good), (1, lost), (2, good)]))
    groups = {("cpu", "gru", "float32"): Checked("cpu", "gru", "float32")}
    gpu.prepare_all([item], SMALL[:2], groups, "cpu", True, gpu.Clock(60), lambda: None)
    (group,) = groups.values()
    assert group.failures == [f"cpu gru float32 {SMALL[0]}: {lost.why}"]  # of a case: a hang is a fault


def test_one_that_fails_does_not_take_the_others_along(monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "shared", CONTESTANTS["shared"]._replace(forward=lambda *_: 1 / 0))
    measured = gpu_time.measure(Item(TINY, "float32", ()), ["plain", "shared", "reference"], seconds=0, rounds=5)
    assert measured["shared"] == "failed: ZeroDivisionError: division by zero"
    assert len(measured["plain"]["step"]) == len(measured["reference"]["forward"]) == gpu_time.FEWEST


def test_the_floor_by_hand():
    setting = Setting("LSTM", T=3, B=2, I=5, H=4, swaps="adjacent:all", compare="swap", dtype="bfloat16")
    # rows: 3 * 2 originals and 2 * 2 variants of 2 steps, the first of which needs no product
    flops = 2 * 4 * 4 * (5 * 6 + 4 * (6 + 4))
    x, weights, states, output = 3 * 2 * 5, 16 * (5 + 4 + 2), (6 + 8) * 4 * 2, 3 * 2 * 4
    forward = 2 * (x + weights + states)
    step = forward + 2 * (x + weights + states + output + x + weights)
    assert gpu_time.work(setting, True) == (flops, forward, 3 * flops, step)
    assert gpu_time.work(setting, False)[:2] == (2 * 4 * 4 * (5 * 6 + 4 * 6), 2 * (x + weights + 6 * 4 * 2))
    assert gpu_time.work(setting, True).floor(flops, 1e9, 0) == {"forward": 1, "step": 3}
    assert gpu_time.work(setting, True).floor(1e9, forward, 0)["forward"] == 1
    assert gpu_time.work(setting, True).floor(1e9, 1e9, 2) == {"forward": 2, "step": 4}


@pytest.fixture
def small(monkeypatch):
    for name, value in (("STEPS", 4), ("SEQUENCES", 2), ("SWAPS", 2), ("ROUNDS", 1), ("REPEAT", 1)):
        monkeypatch.setattr(tune, name, value)


def test_who_is_fastest(small):
    first, told = tune.winner("lstm", 8, torch.float32, "cpu", ["cpu", "reference"])
    assert first in ("cpu", "torch")
    assert [line.split()[0] for line in told.split(", ")] == ["cpu", "reference", "torch"]


def test_launches_are_tuned_in_turns_and_the_table_stays_as_it_was(small, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    what = tune.Tuned("lstm", 20, torch.float32, 90, "cpu")
    assert what.key == ("lstm", 32, "tf32x3", 90)
    candidates = what.candidates()
    assert candidates[0] == what.in_use
    assert len({*candidates}) == len(candidates) > 6
    assert what.why_not(candidates[0]) == ""
    medians = tune.fastest(what, candidates[:2])
    assert [*medians.values()] == sorted(medians.values())
    assert {*medians} == {*candidates[:2]}
    assert launch.TUNED == {}


def test_a_launch_that_breaks_the_context_is_out(small, monkeypatch):
    """What goes wrong on the GPU is told when the host waits for it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tune, "broken", lambda: True)
    what = tune.Tuned("gru", 20, torch.float32, 90, "cpu")
    assert "breaks the CUDA context" in what.why_not(what.in_use)


def test_a_launch_that_does_not_compile_is_out(small, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(functional, "swap_rnn", lambda *_, **__: 1 / 0)
    what = tune.Tuned("gru", 20, torch.float32, 90, "cpu")
    assert what.why_not(what.in_use) == "ZeroDivisionError: division by zero"
    assert launch.TUNED == {}


@pytest.mark.parametrize("backend", ["cuda"])
def test_barriers_are_timed(backend, monkeypatch, host_build):
    cuda_on_host.use(host_build, 16, monkeypatch.setattr)
    monkeypatch.setattr(gpu_time, "BARRIERS", 2)
    found = gpu_time.barriers("cpu")
    assert {*found} == {
        "barrier", "barrier of 2", "barrier of 4", "barrier of 8", "barrier of 16",
        "barrier of 2 in memory", "barrier of 16 in memory"
    }  # fmt: skip
    assert all(value > 0 for value in found.values())


def test_global_flags_are_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for arithmetic, allowed in (("float32", False), ("tf32", True)):
        with gpu_check.arithmetic_of(arithmetic), gpu_check._poisoned():
            assert torch.empty(3).isnan().all()
            assert torch.backends.cudnn.allow_tf32 == (torch.get_float32_matmul_precision() == "high") == allowed
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_everything_that_is_planned_can_run():
    items = gpu.plan("cpu")
    known = {*CONTESTANTS, "reference", "compiled", "kernel", "kernel plain"}
    for item in items:
        assert {*item.names} <= known
        assert {goal.against for goal in item.goals} - {None} <= {*item.names}
        assert {goal.ours for goal in item.goals} <= {*item.names}
    assert {item.sweep for item in items} == {None, "B", "H", "T"}


def test_a_whole_run(tmp_path, capfd):
    options = argparse.Namespace(quick=True, only=None, cells=["lstm"], dtypes=["bfloat16"])
    result = gpu.run("cpu", ["cpu"], options, tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["correct"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [checked["failures"] for checked in result["checks"]] == [[]]
    for point in result["times"]:
        assert point["contestants"]["cpu plain"]["step"]["us_per_step"] > 0
    told = gpu.report(result).splitlines()
    assert told[-1] == "correct: true, failures: 0"
    assert sum(line.startswith("cpu ") for line in told) == len(result["goals"]) > 5
    assert capfd.readouterr().out == ""


def test_barriers_that_wait_for_ever_take_nothing_along(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "answers", lambda *_: iter([(0, Lost("no answer in 30 s", False))]))
    monkeypatch.setattr(gpu, "prepare_all", lambda *_: set())
    monkeypatch.setattr(gpu, "plan", lambda device: [Item(TINY, "float32", ("plain",))])
    options = argparse.Namespace(quick=True, only="time", cells=["gru"], dtypes=["float32"])
    result = gpu.run("cpu", ["cpu"], options, tmp_path)
    assert result["times"][0]["contestants"]["plain"]["step"]["floor_us_per_step"] > 0
    assert "barriers: no answer in 30 s" in capfd.readouterr().err


def test_a_kernel_that_hangs_ends_with_what_was_found(tmp_path):
    """In the process that times it: those that check have a limit of their own."""
    code = (
        "import argparse, threading, time; from pathlib import Path; from bench import gpu\n"
        "timing = threading.Event()\n"
        "class Timer(threading.Thread):\n"  # over as soon as an item is timed, however slow the machine
        "    def __init__(self, seconds, end):\n"
        "        assert seconds == gpu.TOTAL + gpu.OVERDUE\n"
        "        super().__init__(target=lambda: (timing.wait(), end()))\n"
        "threading.Timer = Timer\n"
        "gpu.prepare_all, gpu.time_item = lambda *_: set(), lambda *_: (timing.set(), time.sleep(100))\n"
        "options = argparse.Namespace(quick=True, only=None, cells=['gru'], dtypes=['bfloat16'])\n"
        f"gpu.run('cpu', ['cpu'], options, Path({str(tmp_path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "correct: false, failures: 1"
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["correct"] is False
    assert result["faults"] == ["GRU T=6 B=3 I=16 H=16 uniform:8 end bfloat16: hangs"]


def test_a_broken_context_ends_the_timing_not_the_report(tmp_path, monkeypatch, capfd):
    """Nothing else can be timed in this process, and everything raises."""

    def raises():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "broken", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    monkeypatch.setattr(gpu, "prepare_all", lambda *_: set())
    monkeypatch.setattr(gpu, "plan", lambda device: 2 * [Item(TINY, "float32", ("plain",))])
    options = argparse.Namespace(quick=True, only="time", cells=["gru"], dtypes=["float32"])
    result = gpu.run("cpu", ["cpu"], options, tmp_path)
    assert len(result["times"]) == 1
    assert [fault.partition(": ")[2][:23] for fault in result["faults"]] == ["breaks the CUDA context"]
    assert not result["correct"]
    assert list(tmp_path.glob("*.png"))


def test_what_a_kernel_raises_at_the_size_that_is_timed_is_a_failure(monkeypatch):
    """It was checked with fewer steps."""
    monkeypatch.setattr(gpu_time.Runner, "run", lambda *_: 1 / 0)
    item = Item(TINY, "float32", ("kernel", "plain"))
    checked = gpu.prepare(item, "cpu", True)
    assert checked.failures == [f"cpu {item}: ZeroDivisionError: division by zero"]
    assert gpu.prepare(item._replace(names=("compiled",)), "compiled", False).failures == []


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no GPU" in err


@pytest.mark.parametrize(("passed", "failures", "code"), [(0, [], 2), (0, ["wrong"], 1), (1, ["wrong"], 1), (1, [], 0)])
def test_a_gpu_that_no_kernel_serves_is_not_one_where_they_are_wrong(passed, failures, code, monkeypatch, capsys):
    reason = "triton: needs compute capability 8.0 or above, cuda has 7.5"
    check = {"passed": passed, "failures": failures, "not_available": [] if passed else [reason]}
    result = {"checks": [check, check], "correct": bool(passed and not failures), "faults": []}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "kernels", lambda: ["triton"])
    monkeypatch.setattr(gpu, "run", lambda *_: result)
    monkeypatch.setattr(gpu, "report", lambda _: "")
    assert gpu.main(["--quick"]) == code
    assert capsys.readouterr().err == (f"bench.gpu: no kernel was checked: {reason}\n" if code == 2 else "")
