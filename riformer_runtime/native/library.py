"""The native library for the best instruction set of this machine: as it was installed, or compiled on first use.

A wheel that was built where there is a compiler holds the libraries, see setup.py. Otherwise network.cpp is compiled by
the system's compiler into a library of a few hundred KiB, kept in the user's cache under a name that changes with the
source, the flags and the compiler. Either is reached by ctypes, and neither is linked to torch.
"""

import ctypes
import logging
import platform
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from riformer_runtime.caches import cache_folder
from riformer_runtime.native.instruction_sets import INSTRUCTION_SETS, SOURCES, compiler, flags, library_name

logger = logging.getLogger(__name__)


class UnavailableError(RuntimeError):
    """This machine cannot build or run the native network; the message says why."""


@cache
def supported() -> tuple[str, ...]:
    """The instruction sets of this machine, the best first; none outside of Linux, whose /proc/cpuinfo is read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    has = set(next((line for line in lines if line.startswith("flags")), "").split())
    return tuple(name for name, kind in INSTRUCTION_SETS.items() if has.issuperset(kind.needs))


def best_products(precision: str) -> tuple[str, str]:
    """The best instruction set of this machine, and the products for a precision: its own, or else float32's.

    Raises:
        UnavailableError: the processor has none of the instruction sets.
    """
    if not supported():
        needed = " and ".join(INSTRUCTION_SETS["avx2"].needs)
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
    if not more_flags and (library := installed(instruction_set)):
        return library
    try:
        command, file = _compilation(instruction_set, *more_flags)
        if not file.is_file():
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                beside = Path(folder) / file.name
                subprocess.run([*command, "-o", str(beside)], capture_output=True, check=True)
                beside.replace(file)
        return _opened(file)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        first_error = next((line for line in lines if "error" in line), error)
        raise UnavailableError(f"{error.cmd[0]} does not compile the native network: {first_error}") from error
    except OSError as error:
        raise UnavailableError(f"the native network cannot be built or loaded: {error}") from error


@cache
def installed(instruction_set: str) -> ctypes.CDLL | None:
    """The library that came with the package; None where none did, or where this system cannot load it."""
    file = Path(__file__).with_name("compiled") / library_name(instruction_set)
    try:
        return _opened(file) if file.is_file() else None
    except OSError as error:
        logger.warning("the installed native network cannot be loaded here: %s", error)
        return None


def is_compiled() -> bool:
    """Whether this machine has the library of its best instruction set, so that no compiler has to run."""
    try:
        best = supported()[:1]
        return any(installed(name) is not None or _compilation(name)[1].is_file() for name in best)
    except (UnavailableError, OSError, subprocess.CalledProcessError):
        return False


def _compilation(instruction_set: str, *more_flags: str) -> tuple[list[str], Path]:
    """The command without its output, and the file in which the library is kept."""
    if not (cxx := compiler()):
        raise UnavailableError("the native network needs a C++ compiler: install g++, or name one in CXX")
    command = [*cxx, *flags(instruction_set), *more_flags, str(SOURCES[0])]
    version = subprocess.run([*cxx, "--version"], capture_output=True, check=True).stdout
    return command, cache_folder() / library_name(instruction_set, repr((cxx, more_flags, version)))


def _opened(file: Path) -> ctypes.CDLL:
    """The library in a file, with the types of its functions."""
    library = ctypes.CDLL(str(file))
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
