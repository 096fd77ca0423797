"""Runs tasks side by side in processes, for bench.gpu and bench.tune: a kernel may hang, break the CUDA context of its
process, or take the process with it, and must not take the others along. Pools of the standard library end, or wait for
ever, when one of their processes dies."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from sire_fast.lab.workers import end_with_parent


def workers() -> int:
    """Processes that processor and GPU have room for: each takes half a GB at once, and as much again later."""
    room = torch.cuda.mem_get_info()[0] >> 30 if torch.cuda.is_available() else 16
    return max(1, min(16, os.cpu_count() or 1, room))


class Lost(NamedTuple):
    """What comes in place of an answer.

    Attributes:
        why: in words.
        died: whether the process has ended by itself; else it took too long.
    """

    why: str
    died: bool


@dataclass
class _Running:
    process: BaseProcess
    task: int
    until: float


def answers(
    tasks: Sequence[Callable[[], Any]], workers: int, seconds: float, limit: float
) -> Iterator[tuple[int, Any]]:
    """What tasks return, or Lost, with their numbers, as they come; those that come after the time is up do not come.

    Args:
        tasks: functions that can be sent to a process (of a module, or a partial of such), begun in this order.
        workers: processes at once.
        seconds: for all tasks together.
        limit: seconds for each.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    waiting, idle, running = (
        [*range(len(tasks))][::-1],
        list[tuple[Connection, BaseProcess]](),
        dict[Connection, _Running](),
    )
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < workers:
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs,), daemon=True)
                    process.start()
                    theirs.close()
                    idle.append((ours, process))
                pipe, process = idle.pop()
                try:
                    pipe.send(tasks[waiting[-1]])
                except OSError:  # it has died since its last answer: another one takes the task
                    process.join()
                    continue
                running[pipe] = _Running(process, waiting.pop(), time.monotonic() + limit)
            soonest = min(end, *(each.until for each in running.values()))
            for pipe in wait([*running], max(0, soonest - time.monotonic())):
                each = running.pop(pipe)
                try:
                    answer, goes_on = pipe.recv()
                except (EOFError, OSError):
                    each.process.join()
                    answer, goes_on = Lost(f"its process died: exit code {each.process.exitcode}", True), False
                if goes_on:
                    idle.append((pipe, each.process))
                yield each.task, answer
            for pipe, each in [*running.items()]:
                if time.monotonic() >= each.until:
                    del running[pipe]
                    each.process.kill()
                    each.process.join()
                    yield each.task, Lost(f"no answer in {limit:.0f} s", False)
    finally:
        for process in [*(each.process for each in running.values()), *(process for _, process in idle)]:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    """Answer one task behind the other, until one has broken the CUDA context."""
    end_with_parent()
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # of a parent that has ended
        goes_on = True
        while goes_on:
            answer = pipe.recv()()
            goes_on = not broken()
            if goes_on:
                torch.cuda.empty_cache()  # others want the memory of their GPU
            pipe.send((answer, goes_on))


def broken() -> bool:
    """Whether something has broken the CUDA context of this process, in which nothing runs any more."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
