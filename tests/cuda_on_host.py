"""Builds the CUDA kernels for the CPU, with gpu_on_host.h in place of what csrc/cuda/gpu.h has for a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from sire_fast.backends import cuda
from sire_fast.backends.cuda import Chip

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-DSIRE_ON_HOST", '-DSIRE_ARCHITECTURES="8.0 9.0+PTX 10.0"']


def build(folder: Path, extra: Sequence[str] = ("-O1", "-Werror")) -> Path:
    """The extension module, compiled into a folder."""
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{path}" for path in (TESTS, CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [CSRC / "cuda" / "launch.cu", CSRC / "cuda_bindings.cpp"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *extra, *includes, "-x", "c++", *sources, "-o", target]
    subprocess.run(command, check=True)
    return target


def use(module: ModuleType, processors: int, set_: Callable[[object, str, object], None] = setattr) -> None:
    """Make the backend run its kernels in a module of `load`, as on a Hopper GPU with so many multiprocessors."""
    set_(cuda, "_cuda", module)
    set_(cuda, "_chip", lambda _: Chip((9, 0), processors, 227 << 10, torch.device("cpu")))


def load(path: Path) -> ModuleType:
    # another module than sire_fast._cuda, and than that of any other path: pybind11 knows them by their names
    spec = importlib.util.spec_from_file_location(f"{path.parent}._cuda", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
