"""What network.cpp is compiled for and how, for the library on its first use and for setup.py, when a wheel is built.

It imports the standard library alone, because setup.py loads this file before there is a package.
"""

import hashlib
import os
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple


class InstructionSet(NamedTuple):
    """An instruction set that network.cpp is compiled for.

    Attributes:
        needs: flags of a processor that has it, as /proc/cpuinfo has them.
        compile_with: flags of the compiler.
        products: precisions that it has products for.
    """

    needs: tuple[str, ...]
    compile_with: tuple[str, ...]
    products: tuple[str, ...]


_AVX2 = InstructionSet(("avx2", "fma"), ("-mavx2", "-mfma", "-Wno-psabi"), ("fp32",))
_AVX512 = InstructionSet(
    (*_AVX2.needs, "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    ("fp32",),
)
_AVX512_BF16 = InstructionSet(
    (*_AVX512.needs, "avx512_bf16"), (*_AVX512.compile_with, "-mavx512bf16"), ("fp32", "bf16")
)
_AMX = InstructionSet(
    (*_AVX512_BF16.needs, "amx_tile", "amx_bf16"),
    (*_AVX512_BF16.compile_with, "-mamx-tile", "-mamx-bf16", "-DRIFORMER_AMX"),
    ("fp32", "bf16", "bf16x3"),
)
INSTRUCTION_SETS = {"amx": _AMX, "avx512_bf16": _AVX512_BF16, "avx512": _AVX512, "avx2": _AVX2}
"""By name, the best first."""

FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("network.cpp", "products.h"))


def compiler() -> list[str]:
    """The command of the C++ compiler: the one in CXX, or the system's; empty where there is none."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    found = shutil.which("c++") or shutil.which("g++")
    return [found] if found else []


def flags(instruction_set: str) -> tuple[str, ...]:
    """What the compiler is given for an instruction set."""
    return (*FLAGS, *INSTRUCTION_SETS[instruction_set].compile_with)


def library_name(instruction_set: str, more: str = "") -> str:
    """The name of a library's file, which changes with the sources, the flags, and with `more`."""
    text = repr((flags(instruction_set), more)).encode()
    digest = hashlib.sha256(text + b"".join(source.read_bytes() for source in SOURCES)).hexdigest()
    return f"native-{instruction_set}-{digest[:16]}.so"
