"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess


def pool(workers: int | None, prepare: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Fresh processes, as many as there are cores with None, which begin with `prepare`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(prepare,))


def _begin(prepare: Callable[[], object] | None) -> None:
    end_with_parent()
    if prepare:
        prepare()


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, however that ends: nobody else would stop what it computes."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_behind, args=(parent,), daemon=True).start()


def _end_behind(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
