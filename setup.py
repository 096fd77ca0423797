"""Builds sire_fast._C, with the loops of csrc/cpu_kernel.cpp once for each instruction set, and, where a GPU is visible
or FORCE_CUDA=1 asks for it, sire_fast._cuda.

What does not compile costs its extension alone, with a warning: everything works without them, slower.
Everything else about the package stands in pyproject.toml.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# name in csrc/swap_rnn.h -> compiler flags; cpu.cpp picks one of them at run time
INSTRUCTION_SETS = {"Baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["Avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["Avx512"] = ["-mavx512f", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["Avx512Bf16"] = [*INSTRUCTION_SETS["Avx512"], "-mavx512vl", "-mavx512bf16"]

# -O2 compiles in two thirds of the time, and costs 5% of a step's
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

# of A100, H100 and B200, as TORCH_CUDA_ARCH_LIST has them; all later GPUs take the PTX of the first with clusters
ARCHITECTURES = ["8.0", "9.0+PTX", "10.0"]


def told(*command):
    """The words that a command prints; none if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def newer_than(target, sources):
    return os.path.exists(target) and all(os.path.getmtime(f) < os.path.getmtime(target) for f in sources)


def find_nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


NVCC = find_nvcc()
FORCED = os.environ.get("FORCE_CUDA") == "1"


def architectures():
    """Compute capabilities to compile for; none where there is no GPU and nobody asks."""
    visible = sorted({*told("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")})
    if not (FORCED or visible or os.path.exists("/dev/nvidia0")):
        return []
    listed = re.findall(r"[\d.]+[af]?(?:\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    known = told(NVCC, "--list-gpu-arch")
    usual = [name for name in ARCHITECTURES if f"compute_{number(name)}" in known]
    usable = visible and all(f"compute_{number(name)}" in known for name in visible)
    chosen = listed or (visible if usable and not FORCED else usual)
    return [name for name in chosen if float(name.split("+")[0].rstrip("af")) >= 8]  # older ones lack instructions


def number(architecture):
    return architecture.split("+")[0].replace(".", "")


class BuildKernels(build_ext):
    """Compiles kernels before the extension that links them."""

    def build_extension(self, ext):
        if ext.name == "sire_fast._cuda":
            ext.extra_objects.append(self.compile_cuda(ext))
        else:
            ext.extra_objects += self.compile_instruction_sets(ext)
        super().build_extension(ext)

    def compile_instruction_sets(self, ext):
        """csrc/cpu_kernel.cpp as object files, which all environments of a checkout share."""
        commands = [self.compiler.compiler_so, getattr(self.compiler, "compiler_so_cxx", [])]
        key = f"{zlib.crc32(repr(commands).encode()):08x}"

        def compiled(name):
            folder = f"build/{name}-{key}"
            if newer_than(target := f"{folder}/csrc/cpu_kernel.o", ext.depends):
                return [target]
            return self.compiler.compile(
                ["csrc/cpu_kernel.cpp"],
                output_dir=folder,
                macros=[("SIRE_ISA", name)],
                extra_postargs=[*FLAGS, *INSTRUCTION_SETS[name]],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [o for objects in pool.map(compiled, INSTRUCTION_SETS) for o in objects]

    def compile_cuda(self, ext):
        """csrc/cuda/launch.cu as an object file."""
        key = f"{zlib.crc32(' '.join(told(NVCC, '--version')).encode()):08x}"
        target = f"build/cuda-{'-'.join(CUDA)}-{key}.o"  # where a wheel and an editable install both find it
        if newer_than(target, ext.depends):
            return target
        os.makedirs("build", exist_ok=True)
        code = []
        for name in CUDA:
            kinds = [f"sm_{number(name)}"] + [f"compute_{number(name)}"] * name.endswith("+PTX")
            code.append(f"-gencode=arch=compute_{number(name)},code=[{','.join(kinds)}]")
        flags = ["-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        try:
            subprocess.run([NVCC, *flags, *code, "-c", "csrc/cuda/launch.cu", "-o", target], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{NVCC}: {error}") from error
        return target


extensions = [
    Pybind11Extension(
        "sire_fast._C",
        ["csrc/bindings.cpp", "csrc/cpu.cpp"],
        depends=["setup.py", "csrc/cpu_kernel.cpp", *sorted(glob("csrc/*.h"))],
        extra_compile_args=FLAGS,
        libraries=["dl", "pthread"] if sys.platform.startswith("linux") else [],
        optional=True,
    )
]
CUDA = architectures() if NVCC and sys.platform.startswith("linux") else []
if FORCED and not CUDA:
    sys.exit("FORCE_CUDA=1: expected Linux, nvcc, and compute capability 8.0 or above in TORCH_CUDA_ARCH_LIST")
if CUDA:
    root = os.path.dirname(os.path.dirname(os.path.realpath(NVCC)))
    extensions.append(
        Pybind11Extension(
            "sire_fast._cuda",
            ["csrc/cuda_bindings.cpp"],
            depends=["setup.py", "csrc/bindings.h", "csrc/cells.h", *sorted(glob("csrc/cuda/*.*"))],
            define_macros=[("SIRE_ARCHITECTURES", f'"{" ".join(CUDA)}"')],
            extra_compile_args=FLAGS,
            library_dirs=[os.path.join(root, name) for name in ("lib64", "lib")],  # of the toolkit, of pip and conda
            libraries=["cudart_static", "dl", "pthread", "rt"],  # the driver itself is looked up when it is needed
            optional=not FORCED,
        )
    )

setup(
    packages=[*find_packages(include=["sire_fast*"]), "sire_fast.kernels"],
    package_dir={"sire_fast": "sire_fast", "sire_fast.kernels": "kernels"},
    package_data={"sire_fast": ["py.typed"]},
    # the kernels are written with GCC's and Clang's vector types, which Microsoft's compiler does not have
    ext_modules=[] if sys.platform == "win32" else extensions,
    cmdclass={"build_ext": BuildKernels},
)
