"""Builds sire_fast._C, with the loops of csrc/cpu_kernel.cpp once for each instruction set.

Everything else about the package stands in pyproject.toml.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# name in csrc/swap_rnn.h -> compiler flags; cpu.cpp picks one of them at run time
INSTRUCTION_SETS = {"Baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["Avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["Avx512"] = ["-mavx512f", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["Avx512Bf16"] = [*INSTRUCTION_SETS["Avx512"], "-mavx512vl", "-mavx512bf16"]

FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]


class BuildKernels(build_ext):
    """Compiles the kernels of each instruction set before the extension that links them."""

    def build_extension(self, ext):
        def compiled(name):
            return self.compiler.compile(
                ["csrc/cpu_kernel.cpp"],
                output_dir=f"{self.build_temp}/{name}",
                macros=[("SIRE_ISA", name)],
                extra_postargs=[*FLAGS, *INSTRUCTION_SETS[name]],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += [o for objects in pool.map(compiled, INSTRUCTION_SETS) for o in objects]
        super().build_extension(ext)


extension = Pybind11Extension(
    "sire_fast._C",
    ["csrc/bindings.cpp", "csrc/cpu.cpp"],
    depends=["csrc/cpu_kernel.cpp", "csrc/cells.h", "csrc/simd.h", "csrc/swap_rnn.h"],
    extra_compile_args=FLAGS,
    libraries=["dl", "pthread"] if sys.platform.startswith("linux") else [],
)

setup(
    packages=["sire_fast", "sire_fast.paper", "sire_fast.kernels"],
    package_dir={"sire_fast": "sire_fast", "sire_fast.kernels": "kernels"},
    package_data={"sire_fast": ["py.typed"]},
    # the kernels are written with GCC's and Clang's vector types, which Microsoft's compiler does not have
    ext_modules=[] if sys.platform == "win32" else [extension],
    cmdclass={"build_ext": BuildKernels},
)
