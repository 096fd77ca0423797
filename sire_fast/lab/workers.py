"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, however that ends: nobody else would stop what it computes."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_behind, args=(parent,), daemon=True).start()


def _end_behind(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
