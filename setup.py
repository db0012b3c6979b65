"""Compiles the native engine into the wheel, where there is a C++ compiler; pyproject.toml has everything else.

A wheel with the libraries runs on machines without a compiler. It has one for each instruction set, and no part that
depends on the version of Python. Without a compiler, or on other systems, the wheel has the sources alone, which are
compiled when the engine is first used. An editable installation compiles nothing either.
"""

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from riformer_runtime.native.library import (
    INSTRUCTION_SETS,
    UnavailableError,
    compile_library,
    find_compiler,
    installed,
)

LINKED = ("-static-libgcc", "-static-libstdc++", "-Wl,-rpath,$ORIGIN")
"""The compiler's own libraries inside, and OpenMP's beside: not every system without a compiler has it."""


def can_compile() -> bool:
    """Whether this machine has a compiler for the processors that the engine runs on."""
    try:
        find_compiler()
    except UnavailableError:
        return False
    return sys.platform == "linux" and platform.machine() == "x86_64"


class BuildWithLibraries(build_py):
    """Adds the libraries to what is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not can_compile():
            return
        folder = Path(self.build_lib) / "riformer_runtime" / "native" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        openmp = subprocess.run([*find_compiler(), "-print-file-name=libgomp.so.1"], capture_output=True, check=True)
        shutil.copy2(openmp.stdout.decode().strip(), folder / "libgomp.so.1")
        with ThreadPoolExecutor() as threads:
            for name in INSTRUCTION_SETS:
                threads.submit(compile_library, name, folder / installed(name).name, *LINKED)
        missing = [name for name in INSTRUCTION_SETS if not (folder / installed(name).name).is_file()]
        if missing:  # such as those that an old compiler does not know
            print(f"riformer: the compiler has no {', '.join(missing)}; compiled on first use where it is needed")


class WheelForAnyPython(bdist_wheel):
    """A wheel for any Python 3, since ctypes loads the libraries; and for this platform where it has some."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class DistributionWithLibraries(Distribution):
    """Belongs to a platform where it has libraries."""

    def has_ext_modules(self) -> bool:
        return can_compile()


setup(
    distclass=DistributionWithLibraries,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelForAnyPython},
)
