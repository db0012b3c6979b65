"""The native library: which instruction sets there are, and C++ compiled on first use where none came compiled.

Nothing is linked to torch: network.cpp is compiled with the system's compiler into a library of a few hundred KiB, kept
in the user's cache under a name that changes with the source, the flags and the compiler, and reached by ctypes.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from riformer_runtime.caches import cache_folder


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


class UnavailableError(RuntimeError):
    """This machine cannot build or run the native network; the message says why."""


@cache
def supported() -> tuple[str, ...]:
    """The instruction sets of this machine, the best first; none outside of Linux, whose /proc/cpuinfo is read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return tuple(name for name, kind in INSTRUCTION_SETS.items() if flags.issuperset(kind.needs))


def best_products(precision: str) -> tuple[str, str]:
    """The best instruction set of this machine, and the products for a precision: its own, or else float32's.

    Raises:
        UnavailableError: the processor has none of the instruction sets.
    """
    if not supported():
        needed = " and ".join(_AVX2.needs)
        raise UnavailableError(
            f"the native network needs Linux and a processor with {needed} ({platform.machine()} here)"
        )
    best = supported()[0]
    return best, precision if precision in INSTRUCTION_SETS[best].products else "fp32"


@cache
def build(instruction_set: str, *more_flags: str) -> ctypes.CDLL:
    """The library for an instruction set: as it was installed, or else compiled unless it was before.

    Raises:
        UnavailableError: there is no C++ compiler, or it fails; or the library cannot be loaded.
    """
    try:
        library = installed(instruction_set)
        if more_flags or not library.is_file():
            library = _in_cache(instruction_set, *more_flags)
            if not library.is_file():
                compile_library(instruction_set, library, *more_flags)
        return _with_signatures(ctypes.CDLL(str(library)))
    except OSError as error:
        hint = ": install libgomp1, OpenMP's library" if "libgomp" in str(error) else ""
        raise UnavailableError(f"the native network cannot be built or loaded: {error}{hint}") from error


def installed(instruction_set: str) -> Path:
    """The file of a library that came with the package, where there is one; setup.py makes them."""
    return Path(__file__).with_name("compiled") / f"native-{instruction_set}-{_key(instruction_set)}.so"


def is_compiled() -> bool:
    """Whether this machine has the library of its best instruction set, so that no compiler has to run."""
    try:
        return bool(supported()) and (installed(supported()[0]).is_file() or _in_cache(supported()[0]).is_file())
    except (UnavailableError, OSError):
        return False


def compile_library(instruction_set: str, file: Path, *more_flags: str) -> None:
    """Compiles the library into a file, which appears whole or not at all.

    Raises:
        UnavailableError: there is no C++ compiler, or it fails.
    """
    flags = (*FLAGS, *INSTRUCTION_SETS[instruction_set].compile_with, *more_flags)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        beside = Path(folder) / file.name
        command = [*find_compiler(), *flags, str(SOURCES[0]), "-o", str(beside)]
        try:
            subprocess.run(command, capture_output=True, check=True)
        except subprocess.CalledProcessError as error:
            first_error = next((line for line in error.stderr.decode().splitlines() if "error" in line), error)
            raise UnavailableError(f"{command[0]} does not compile the native network: {first_error}") from error
        beside.replace(file)


def find_compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        UnavailableError: there is none.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not compiler[0]:
        raise UnavailableError("the native network needs a C++ compiler: install g++, or name one in CXX")
    return compiler


def _in_cache(instruction_set: str, *more_flags: str) -> Path:
    """Where a library that is compiled here is kept; the name changes with the compiler too.

    Raises:
        UnavailableError: there is no C++ compiler, or it does not run.
    """
    compiler = find_compiler()
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{compiler[0]} --version fails: name a C++ compiler in CXX") from error
    key = _key(instruction_set, repr((compiler, more_flags, version)))
    return cache_folder() / f"native-{instruction_set}-{key}.so"


def _key(instruction_set: str, more: str = "") -> str:
    """Changes with the source and with what it is compiled by."""
    text = repr((FLAGS, INSTRUCTION_SETS[instruction_set], more)).encode()
    return hashlib.sha256(text + b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "new": (pointer, [ctypes.c_char_p]),
        "add_conv": (number, [pointer] * 3 + [number] * 5),
        "add_block": (number, [pointer, ctypes.POINTER(pointer), number]),
        "set_head": (number, [pointer] * 3 + [number, ctypes.c_float]),
        "forward": (number, [pointer] * 3 + [number] * 4),
        "multiply_in_cache": (ctypes.c_double, [pointer] + [number] * 2),
        "delete": (None, [pointer]),
        "gelu": (None, [pointer] * 2 + [number] * 2),
    }
    for name, (result, arguments) in signatures.items():
        function: Callable = getattr(library, f"riformer_{name}")
        function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return library
