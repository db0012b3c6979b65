"""Compiles the native network into the wheel, for every instruction set, where there is a C++ compiler on x86-64 Linux.

Such a wheel is for one platform, whatever the version of Python. Without a compiler, and elsewhere, the wheel holds the
sources alone, which are compiled on first use. Everything about the package stands in pyproject.toml.
"""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("riformer_runtime", "native")
LINK = ("-static-libgcc", "-static-libstdc++", "-Wl,--exclude-libs,ALL,--gc-sections,-s,-rpath,$ORIGIN")
"""The libraries need glibc and the runtime of OpenMP, which not every system has: it is copied beside them."""


class BuildWithLibraries(build_py):
    """Copies the package, and compiles the native network unless the installation is editable."""

    def run(self) -> None:
        """Fills the folder from which the wheel is packed."""
        super().run()
        if not self.editable_mode:
            compile_into(Path(self.build_lib) / NATIVE / "compiled")


class WheelForAnyPython(bdist_wheel):
    """A wheel with compiled libraries is for this platform and any version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """What stands in the file's name for Python, its binary interface and the platform."""
        if any(Path(self.bdist_dir).glob(f"{NATIVE}/compiled/*.so")):
            self.root_is_pure = False
            return "py3", "none", super().get_tag()[2]
        return super().get_tag()


def compile_into(folder: Path) -> None:
    """Writes the libraries that can be compiled here, and the runtime of OpenMP; says why where it is none."""
    shutil.rmtree(folder, ignore_errors=True)
    sets = _load("instruction_sets")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print(f"no compiled libraries: the native network needs x86-64 Linux, not {sys.platform} {platform.machine()}")
        return
    if not (compiler := sets.compiler()):
        print("no compiled libraries: there is no C++ compiler; the native network is compiled on first use")
        return
    folder.mkdir(parents=True)

    def compile_for(name: str) -> None:
        file = folder / sets.library_name(name)
        command = [*compiler, *sets.flags(name), *LINK, "-o", str(file), str(sets.SOURCES[0])]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{file.name}: {f'not compiled: {done.stderr[:500]}' if done.returncode else 'compiled'}")

    with ThreadPoolExecutor() as threads:
        list(threads.map(compile_for, sets.INSTRUCTION_SETS))
    for library in list(folder.glob("native-*.so"))[:1]:
        needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
        for file in re.findall(r"=> (/\S*/lib[gi]?omp\S*) ", needed):
            shutil.copy(file, folder / Path(file).name)


def _load(name: str) -> Any:
    """A module beside network.cpp, without the package, which needs NumPy."""
    spec = importlib.util.spec_from_file_location(name, NATIVE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelForAnyPython})
