"""Fused training of recurrent networks that do not care about the order of their input (SIRE).

model = sire_fast.convert(model, swaps=sire_fast.swaps.Adjacent(8))
loss = task_loss(model(x), y) + weight * sire_fast.penalty(model)
"""

import warnings

from sire_fast import backends, cells, functional, layers, reference, schedules, swaps
from sire_fast.backends import cpu
from sire_fast.checking import check
from sire_fast.inspection import inspect
from sire_fast.layers import GRU, LSTM, RNN, convert, revert
from sire_fast.penalties import penalty, swap_penalty

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "backends",
    "cells",
    "check",
    "convert",
    "functional",
    "inspect",
    "layers",
    "penalty",
    "reference",
    "revert",
    "schedules",
    "swap_penalty",
    "swaps",
]

if cpu.MISSING:
    warnings.warn(
        f"sire_fast runs without its compiled kernels, slowly: {cpu.MISSING}",
        RuntimeWarning,
        stacklevel=2,
    )
