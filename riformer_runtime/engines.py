"""The engines that run an artefact's payloads, behind one protocol: float32 arrays in, logits out.

An engine's package is imported when a payload is opened for it, and not before. Engines that need PyTorch (pt2, aoti,
executorch) come with the full installation, as entry points of the group "riformer.engines".
"""

import ctypes
import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from riformer_runtime.artifact import Artifact, Manifest, Payload
from riformer_runtime.native.library import UnavailableError, best_products, is_compiled
from riformer_runtime.native.network import Network
from riformer_runtime.native.weights import check_size, read_weights
from riformer_runtime.preprocess import cut_long

Compute = Callable[[np.ndarray], np.ndarray]


class Runner(Protocol):
    """What runs a network: an artefact's payload, or what `riformer.optimize` returns. Threads may call it at once.

    Attributes:
        manifest: what the network is: class names, preprocessing.
        engine: that runs it.
        precision: that it computes in, whatever was asked for.
        detail: the instruction set of the native engine, the version of others; may be empty.

    Shape: images [N, C, H, W], float32 -> logits [N, K], float32.
    """

    @property
    def manifest(self) -> Manifest: ...
    @property
    def engine(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def detail(self) -> str: ...
    def __call__(self, images: np.ndarray, /) -> np.ndarray: ...


class PayloadRunner:
    """A payload on its engine; see `Runner`.

    Attributes:
        payload: that it runs.
    """

    def __init__(self, compute: Compute, manifest: Manifest, payload: Payload, precision: str, detail: str):
        self._compute = compute
        self.manifest, self.payload = manifest, payload
        self.engine, self.precision, self.detail = payload.engine, precision, detail

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The logits.

        Raises:
            ValueError: the images are no float32 array of the network's shape.
            RuntimeError: the engine fails.
        """
        channels, height, width = self.manifest.preprocessing.input_size
        expected = f"[N, {channels}, {'H, W' if self.payload.any_size else f'{height}, {width}'}]"
        is_array = isinstance(images, np.ndarray)
        if not is_array or images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != channels:
            given = f"{images.dtype} {list(images.shape)}" if is_array else type(images).__name__
            raise ValueError(f"images are {given}; the network takes a float32 array {expected}")
        if not self.payload.any_size and images.shape[2:] != (height, width):
            raise ValueError(f"images are {list(images.shape)}; this payload takes {expected} alone")
        if not len(images):
            return np.empty((0, self.manifest.num_classes), np.float32)
        with _errors_of(describe(self)):
            logits = self._in_batches(images) if self.payload.batch else self._compute(images)
        num_classes = self.manifest.num_classes or logits.shape[-1]  # without a classifier they are features
        if logits.shape != (len(images), num_classes):
            expected_shape = [len(images), num_classes]
            raise RuntimeError(
                f"{describe(self)} gives logits {list(logits.shape)}, but the manifest says {expected_shape}"
            )
        return logits

    def _in_batches(self, images: np.ndarray) -> np.ndarray:
        """In batches of the one size that the payload takes, the last filled up."""
        size = self.payload.batch
        filled = np.concatenate([images, np.repeat(images[-1:], -len(images) % size, axis=0)])
        logits = [self._compute(filled[i : i + size]) for i in range(0, len(filled), size)]
        return np.concatenate(logits)[: len(images)]


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Whatever an engine raises, as one kind of error; many of them have their own."""
    try:
        yield
    except (ValueError, MemoryError, UnavailableError):
        raise
    except Exception as error:
        raise RuntimeError(f"{name} fails: {' '.join(str(error).split())}") from error


def describe(runner: Runner) -> str:
    """Engine, precision and detail in a few words, such as "native, fp32, avx512_bf16"."""
    return ", ".join(filter(None, (runner.engine, runner.precision, runner.detail)))


def input_of(runner: Runner, image: Image.Image) -> np.ndarray:
    """What the runner takes for an RGB image: all of the preprocessing but what its graph does itself.

    Shape: [C, H, W].
    """
    preprocessing, inside = runner.manifest.preprocessing, inside_of(runner)
    if not inside:
        return preprocessing(image)
    if inside == "normalise":
        return preprocessing.pixels(image)
    if preprocessing.crop_mode != "squash":
        image = cut_long(image)
    values = np.asarray(image.convert("L" if preprocessing.input_size[0] == 1 else "RGB"), np.float32) / np.float32(255)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


def inside_of(runner: Runner) -> str:
    """What of the preprocessing the runner does itself, see `Payload`."""
    return runner.payload.inside if isinstance(runner, PayloadRunner) else ""


def _native(file: Path, payload: Payload, threads: int) -> tuple[Compute, str, str]:
    instruction_set, products = best_products(payload.precision)
    weights = read_weights(file)
    network, geometry = Network(weights, instruction_set, products), weights.geometry

    def compute(images: np.ndarray) -> np.ndarray:
        check_size(geometry, *images.shape[2:])
        return network(images, threads)

    return compute, products, instruction_set


def _onnxruntime(file: Path, payload: Payload, threads: int) -> tuple[Compute, str, str]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised as well
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    precision = "fp32" if payload.precision == "fp16" else payload.precision  # this provider widens float16
    return lambda images: session.run(None, {name: images})[0], precision, ort.__version__


def _openvino(file: Path, payload: Payload, threads: int) -> tuple[Compute, str, str]:
    import openvino as ov

    hints = {
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp16": "f16"}.get(payload.precision, "f32"),
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = ov.Core()
    with same_signal_stack():
        network = core.compile_model(str(file), "CPU", hints)
    used = network.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    floats = {"bf16": "bf16", "f16": "fp16"}.get(used, "fp32")
    compute = openvino_requests(network)
    return compute, "int8" if payload.precision == "int8" else floats, ov.__version__.partition("-")[0]


def openvino_requests(network: Any) -> Compute:
    """A function that threads may call at once: each call takes a request that no other uses."""
    idle: queue.SimpleQueue = queue.SimpleQueue()

    def compute(images: np.ndarray) -> np.ndarray:
        try:
            request = idle.get_nowait()
        except queue.Empty:
            request = network.create_infer_request()
        try:
            return request.infer([images], share_inputs=True)[0].copy()
        finally:
            idle.put(request)

    return compute


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Gives the thread back its alternate signal stack, for code that compiles a network with OpenVINO.

    OpenVINO's CPU plugin sets one for each compiled network and restores the one before when the network is freed. If
    networks are freed in the order of their creation, the one before is freed memory, and Python's next signal, such as
    Ctrl-C or the end of a data worker, ends the process with a segmentation fault.
    """
    if os.name == "nt":
        yield
        return
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # a stack_t, which has 24 bytes on Linux
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


class Engine(NamedTuple):
    """An engine.

    Attributes:
        open: (file, payload, threads) -> what computes, the precision that it computes in, and a detail.
        package: that it needs; "" where it needs none.
        extra: of the distribution riformer that brings the package.
        runs_code: whether a payload can run any code when it is opened, so that it has to be trusted.
    """

    open: Callable[[Path, Payload, int], tuple[Compute, str, str]]
    package: str
    extra: str
    runs_code: bool = False


ENGINES: dict[str, Engine] = {
    "native": Engine(_native, "", ""),
    "onnxruntime": Engine(_onnxruntime, "onnxruntime", "onnx"),
    "openvino": Engine(_openvino, "openvino", "openvino"),
}
"""By name; where no speed was measured, the first is taken for the fastest."""


def engine(name: str) -> Engine:
    """The engine of that name, among `ENGINES` and those of other packages.

    Raises:
        ValueError: there is none.
        RuntimeError: its package is not installed.
    """
    if name in ENGINES:
        found = ENGINES[name]
    else:
        from importlib.metadata import entry_points  # here, because it takes longer to import than an image to compute

        named = [point for point in entry_points(group="riformer.engines") if point.name == name]
        if not named:
            raise ValueError(f"no engine {name!r}; known are {', '.join(ENGINES)}, and others with riformer[train]")
        try:
            found = named[0].load()
        except ImportError as error:
            raise RuntimeError(f"the engine {name} is not installed: pip install 'riformer[train]'") from error
    if found.package and find_spec(found.package) is None:
        raise RuntimeError(f"the engine {name} is not installed: pip install 'riformer[{found.extra}]'")
    return found


def open_payload(artifact: Artifact, payload: Payload, threads: int = 0) -> PayloadRunner:
    """A payload of an artefact on its engine; see `open_file`."""
    return open_file(artifact.file(payload), payload, artifact.manifest, threads)


def open_file(file: Path, payload: Payload, manifest: Manifest, threads: int = 0) -> PayloadRunner:
    """A payload on its engine.

    Args:
        file: that the engine opens.
        payload: what the file is.
        manifest: what the network is.
        threads: of the engine; 0 for as many as the process may use.

    Raises:
        RuntimeError: the engine is not installed, or cannot run here.
        ValueError: no such engine; or the file is not what the payload says.
    """
    found = engine(payload.engine)
    with _errors_of(str(payload)):
        compute, precision, detail = found.open(file, payload, threads or num_processors())
    return PayloadRunner(compute, manifest, payload, precision, detail)


def num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_payloads(artifact: Artifact, engine_name: str = "auto", precision: str = "") -> list[Payload]:
    """The payloads that may be run, the fastest first: those of an engine and a precision, where these are stated.

    Raises:
        ValueError: the artefact has none.
    """
    found = [
        payload
        for payload in artifact.payloads
        if engine_name in ("auto", payload.engine) and precision in ("", payload.precision)
    ]
    if not found:
        wanted = " ".join(name for name in (engine_name, precision) if name not in ("", "auto"))
        has = ", ".join(map(str, artifact.payloads)) or "nothing"
        raise ValueError(f"{artifact.path} has nothing for {wanted or 'any engine'}; it has {has}")
    return sorted(found, key=lambda payload: -payload.speed.get("images_per_s", 0.0))


def open_runner(
    artifact: Artifact | str | Path,
    engine_name: str = "auto",
    precision: str = "",
    threads: int = 0,
    compile_native: bool = True,
) -> PayloadRunner:
    """The artefact on the fastest engine that is installed and can run here.

    Args:
        artifact: opened, or its path.
        engine_name: "auto", or the one engine to take.
        precision: "", or the one precision to take.
        threads: see `open_payload`.
        compile_native: whether "auto" may run a compiler, which takes half a minute once on a machine.

    Raises:
        ValueError: there is no whole artefact, or it has nothing for the engine and the precision.
        RuntimeError: no engine that fits can run here; the message says why, for each.
    """
    artifact = artifact if isinstance(artifact, Artifact) else Artifact(artifact)
    reasons = []
    for payload in chosen_payloads(artifact, engine_name, precision):
        if payload.engine == "native" and engine_name == "auto" and not (compile_native or is_compiled()):
            reasons.append("native: not compiled on this machine yet; --engine native does it")
            continue
        try:
            if engine_name == "auto" and engine(payload.engine).runs_code:
                reasons.append(f"{payload.engine}: its files can run code; --engine {payload.engine} trusts them")
                continue
            return open_payload(artifact, payload, threads)
        except (UnavailableError, RuntimeError, ImportError) as error:
            reasons.append(f"{payload.engine}: {error}")
    raise RuntimeError(f"no engine can run {artifact.path} here: " + "; ".join(dict.fromkeys(reasons)))
