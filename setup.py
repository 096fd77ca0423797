"""Builds sire_fast._C, with the loops of csrc/cpu_kernel.cpp once for each instruction set, and, where nvcc is found,
sire_fast._cuda.

Everything else about the package stands in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# name in csrc/swap_rnn.h -> compiler flags; cpu.cpp picks one of them at run time
INSTRUCTION_SETS = {"Baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["Avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["Avx512"] = ["-mavx512f", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["Avx512Bf16"] = [*INSTRUCTION_SETS["Avx512"], "-mavx512vl", "-mavx512bf16"]

FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

# compute capabilities whose machine code is embedded, those of them that nvcc knows; and, for all later GPUs, the PTX
# of the first that has clusters of blocks
CAPABILITIES = ("80", "90", "100")
PTX = "90"


def find_nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


NVCC = find_nvcc()


class BuildKernels(build_ext):
    """Compiles kernels before the extension that links them."""

    def build_extension(self, ext):
        if ext.name == "sire_fast._cuda":
            ext.extra_objects.append(self.compile_cuda(ext))
        else:
            ext.extra_objects += self.compile_instruction_sets(ext)
        super().build_extension(ext)

    def compile_instruction_sets(self, ext):
        def compiled(name):
            return self.compiler.compile(
                ["csrc/cpu_kernel.cpp"],
                output_dir=f"{self.build_temp}/{name}",
                macros=[("SIRE_ISA", name)],
                extra_postargs=[*FLAGS, *INSTRUCTION_SETS[name]],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [o for objects in pool.map(compiled, INSTRUCTION_SETS) for o in objects]

    def compile_cuda(self, ext):
        """csrc/cuda/launch.cu as an object file; what does not compile costs this extension alone, with a warning."""
        target = "build/cuda.o"  # where a wheel and an editable install both find it
        if os.path.exists(target) and all(os.path.getmtime(f) < os.path.getmtime(target) for f in ext.depends):
            return target
        os.makedirs("build", exist_ok=True)
        try:
            told = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
            codes = {c: [f"sm_{c}"] for c in CAPABILITIES if f"compute_{c}" in told}
            codes.setdefault(PTX, []).append(f"compute_{PTX}")
            code = [f"-gencode=arch=compute_{c},code=[{','.join(kinds)}]" for c, kinds in codes.items()]
            flags = ["-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
            subprocess.run([NVCC, *flags, *code, "-c", "csrc/cuda/launch.cu", "-o", target], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{NVCC}: {error}") from error
        return target


extensions = [
    Pybind11Extension(
        "sire_fast._C",
        ["csrc/bindings.cpp", "csrc/cpu.cpp"],
        depends=["csrc/bindings.h", "csrc/cpu_kernel.cpp", "csrc/cells.h", "csrc/simd.h", "csrc/swap_rnn.h"],
        extra_compile_args=FLAGS,
        libraries=["dl", "pthread"] if sys.platform.startswith("linux") else [],
    )
]
if NVCC and sys.platform.startswith("linux"):
    root = os.path.dirname(os.path.dirname(os.path.realpath(NVCC)))
    extensions.append(
        Pybind11Extension(
            "sire_fast._cuda",
            ["csrc/cuda_bindings.cpp"],
            depends=["setup.py", "csrc/bindings.h", "csrc/cells.h", *sorted(glob("csrc/cuda/*.*"))],
            extra_compile_args=FLAGS,
            library_dirs=[os.path.join(root, "lib64")],
            libraries=["cudart_static", "dl", "pthread", "rt"],  # the driver itself is looked up when it is needed
            optional=True,
        )
    )

setup(
    packages=[
        "sire_fast",
        "sire_fast.backends",
        "sire_fast.integrations",
        "sire_fast.kernels",
        "sire_fast.lab",
        "sire_fast.lab.paper",
    ],
    package_dir={"sire_fast": "sire_fast", "sire_fast.kernels": "kernels"},
    package_data={"sire_fast": ["py.typed"]},
    # the kernels are written with GCC's and Clang's vector types, which Microsoft's compiler does not have
    ext_modules=[] if sys.platform == "win32" else extensions,
    cmdclass={"build_ext": BuildKernels},
)
