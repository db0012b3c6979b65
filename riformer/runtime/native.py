"""The collapsed form on a CPU: C++ compiled on first use, chosen by the processor's instructions.

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
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from riformer.caches import cache_folder
from riformer.runtime.collapse import NetworkWeights
from riformer.runtime.opaque import OpaqueNetwork


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
    """The library for an instruction set, compiled unless it was before.

    Raises:
        UnavailableError: there is no C++ compiler, or it fails.
    """
    try:
        command, library = _compilation(instruction_set, *more_flags)
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                beside = Path(folder) / library.name
                subprocess.run([*command, "-o", str(beside)], capture_output=True, check=True)
                beside.replace(library)
        return _with_signatures(ctypes.CDLL(str(library)))
    except subprocess.CalledProcessError as error:
        first_error = next((line for line in error.stderr.decode().splitlines() if "error" in line), error)
        raise UnavailableError(f"{error.cmd[0]} does not compile the native network: {first_error}") from error
    except OSError as error:
        raise UnavailableError(f"the native network cannot be built or loaded: {error}") from error


def is_compiled() -> bool:
    """Whether this machine has the library of its best instruction set, so that no compiler has to run."""
    try:
        return bool(supported()) and _compilation(supported()[0])[1].is_file()
    except (UnavailableError, OSError, subprocess.CalledProcessError):
        return False


def _compilation(instruction_set: str, *more_flags: str) -> tuple[list[str], Path]:
    """The command without its output, and the file in which the library is kept."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not compiler[0]:
        raise UnavailableError("the native network needs a C++ compiler: install g++, or name one in CXX")
    command = [*compiler, *FLAGS, *INSTRUCTION_SETS[instruction_set].compile_with, *more_flags, str(SOURCES[0])]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(repr((command, version)).encode() + b"".join(s.read_bytes() for s in SOURCES))
    return command, cache_folder() / f"native-{instruction_set}-{key.hexdigest()[:16]}.so"


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


def products_in_cache(precision: str, repeats: int) -> float:
    """Computes products whose operands stay in the first-level cache, on all threads; returns the number of MACs.

    Divided by the time it takes, this is the processor's peak, which no network exceeds.

    Raises:
        UnavailableError: this machine has no products of that precision.
    """
    instruction_set, products = best_products(precision)
    if products != precision:
        raise UnavailableError(f"{instruction_set} has no products in {precision}")
    library = build(instruction_set)
    network = library.riformer_new(products.encode())
    if not network:
        raise UnavailableError(f"the system grants no {products} products of {instruction_set}")
    try:
        products_done = library.riformer_multiply_in_cache(network, torch.get_num_threads(), repeats)
        _check(products_done < 0)
        return products_done
    finally:
        library.riformer_delete(network)


class NativeNetwork(OpaqueNetwork):
    """A network built in native memory, run by all threads that torch is allowed (`torch.set_num_threads`).

    Nothing changes from call to call, so several threads may call it at once. What cannot be done with it, such as
    tracing and gradients, can be done with `riformer.runtime.collapse.Collapsed`.

    Shape: images [N, C, H, W] on the CPU -> logits [N, K] in float32.

    Raises:
        UnavailableError: this machine cannot build or run it.
        MemoryError: the weights do not fit into memory.
    """

    backend = "native"

    def __init__(self, weights: NetworkWeights, instruction_set: str, products: str, *more_flags: str):
        super().__init__(weights, torch.bfloat16 if products == "bf16" else torch.float32, torch.device("cpu"))
        self.instruction_set, self.products = instruction_set, products
        self._library = library = build(instruction_set, *more_flags)
        self._network = library.riformer_new(products.encode())
        if not self._network:
            raise UnavailableError(f"the system grants no {products} products of {instruction_set}")
        weakref.finalize(self, library.riformer_delete, self._network)
        for conv, blocks in zip(weights.convs, weights.stages, strict=True):
            weight, bias = _floats(conv.weight, conv.bias)
            columns, in_chans, kernel, _ = weight.shape
            sizes = (columns, in_chans, kernel, conv.stride, conv.padding)
            _check(library.riformer_add_conv(self._network, weight.data_ptr(), bias.data_ptr(), *sizes))
            for block in blocks:
                tensors = _floats(*block)
                pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
                _check(library.riformer_add_block(self._network, pointers, len(block.fc1_bias)))
        weight, bias = _floats(weights.head_weight, weights.head_bias)
        head = (weight.data_ptr(), bias.data_ptr(), self.num_outputs, weights.eps)
        _check(library.riformer_set_head(self._network, *head))

    def compute(self, images: Tensor) -> Tensor:
        num, _, height, width = images.shape
        (pixels,) = _floats(images)
        logits = torch.empty(num, self.num_outputs, dtype=torch.float32, device="cpu")
        pointers, sizes = (pixels.data_ptr(), logits.data_ptr()), (num, height, width, torch.get_num_threads())
        if num:
            status = self._library.riformer_forward(self._network, *pointers, *sizes)
            _check(status, f"{num} images of {height} x {width} pixels")
        return logits

    def extra_repr(self) -> str:
        return f"products={self.products!r}, instruction_set={self.instruction_set!r}"


def _floats(*tensors: Tensor) -> list[Tensor]:
    """The tensors as C reads them: float32, in memory as they are indexed."""
    return [tensor.detach().to("cpu", torch.float32).resolve_neg().contiguous() for tensor in tensors]


def _check(status: int, what: str = "the native network") -> None:
    """Raises MemoryError where a function of the library returns that there is no memory."""
    if status:
        raise MemoryError(f"no memory for {what}")
