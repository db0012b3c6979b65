"""The artefact: what `riformer export` writes and every engine reads.

A folder with
    manifest.json   what the network is, its classes, its preprocessing, and an entry for each payload
    probe.npz       images of the training data, and the logits of the training form on them
    payloads        files of the engines, such as native.npz, fp32.onnx, fp32.xml and fp32.bin

or one .onnx file that has the manifest behind its graph, as metadata. Every file has a checksum in the manifest, and so
has the manifest. An artefact that differs from any of them is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from riformer_runtime.preprocess import Preprocessing
from riformer_runtime.validate import CountOrZero, build, refusal, refusals

FORMAT = 1
MANIFEST, PROBE = "manifest.json", "probe.npz"
MAX_MANIFEST_BYTES = 2**26
ONNX_KEY = b"riformer.manifest"
Precision = Literal["fp32", "bf16x3", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class Payload:
    """One form of the network, for one engine in one precision.

    Attributes:
        engine: that runs it, a name in `riformer_runtime.engines.ENGINES`.
        precision: that it was made for. What an engine computes in is said by its `Runner`.
        files: SHA-256 of each file by its name, the one that the engine opens first.
        graph: "deploy" (norms and products) or "collapsed" (products alone); or the form of another network.
        inside: what of the preprocessing the graph does itself: nothing, "normalise" (it takes values in 0..1), or
            "resize" (it takes values in 0..1 of an image of any size, one at a time).
        batch: number of images that it takes; 0 for any.
        any_size: whether it takes images of any height and width.
        parity: largest differences from the training form on the probe images, and the share of equal predictions.
        speed: images per second when it was exported, beside other payloads in turns, and where.
        accuracy: top-1 on validation images before and after it was quantised.
    """

    engine: str
    precision: Precision
    files: dict[str, str]
    graph: str = "deploy"
    inside: Literal["", "normalise", "resize"] = ""
    batch: CountOrZero = 0
    any_size: bool = True
    parity: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)

    @property
    def main_file(self) -> str:
        """The file that the engine opens."""
        return next(iter(self.files))

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


@dataclass(frozen=True)
class Manifest:
    """What a network is, and what has to be known to use it.

    Attributes:
        architecture: timm's name of the network.
        form: "deploy" for a fused RIFormer, as all exported ones are; "training" for every other network.
        num_classes: number of logits.
        class_names: one for each logit.
        preprocessing: from an RGB image to the network's input.
        source: where it comes from: the run's name and the SHA-256 of its weights.
        environment: date, versions and machine of the export.
        probe: SHA-256 of probe.npz; "" where there is none.
        payloads: what engines can run.
    """

    architecture: str
    form: str
    num_classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    source: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    probe: str = ""
    payloads: tuple[Payload, ...] = ()

    def to_json(self) -> str:
        """The text of manifest.json, with its own checksum."""
        return _text({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, name: str) -> "Manifest":
        """The manifest in a text.

        Args:
            text: as `to_json` gives it.
            name: of the file, for messages.

        Raises:
            ValueError: it is of a newer version, damaged or changed, or no manifest; the message names it.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is no manifest: it is not JSON ({error})") from error
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError(f"{name} is no manifest of riformer: it has no format version")
        if content["format"] > FORMAT:
            raise ValueError(
                f"{name} has format {content['format']}, newer than this version of riformer reads ({FORMAT}): upgrade "
                f"riformer"
            )
        content.pop("sha256", None)
        if text != _text(content):
            raise ValueError(f"{name} is damaged or was changed: it differs from its checksum; export again")
        content.pop("format")
        try:
            payloads = [build(payload, Payload, "payload") for payload in content.pop("payloads")]
            manifest = replace(build(content, cls, "manifest"), payloads=tuple(payloads))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} lacks what a manifest has, or has it in another form: {error}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        wrong = [*refusals(replace(manifest, payloads=()), ""), *(r for p in payloads for r in refusals(p, "payload."))]
        if wrong or (wrong := _contradictions(manifest)):
            raise ValueError(f"{name}: {wrong[0]}")
        return manifest


class Artifact:
    """An artefact whose files are those that were written.

    Attributes:
        path: of the folder or the .onnx file.
        manifest: what it says.
    """

    def __init__(self, path: str | Path):
        """Opens and verifies an artefact.

        Raises:
            ValueError: there is none at `path`, a file is missing or differs from its checksum, or it is of a newer
                version; the message names the file.
        """
        self.path = Path(path)
        if self.path.suffix == ".onnx":
            self.manifest = _manifest_behind_graph(self.path)
            return
        self.manifest = read_manifest(self.path)
        sums = {name: digest for payload in self.manifest.payloads for name, digest in payload.files.items()}
        if self.manifest.probe:
            sums[PROBE] = self.manifest.probe
        for name, digest in sums.items():
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path / name} is missing: the manifest names it; export again or copy it")
            if file_sum(self.path / name) != digest:
                raise ValueError(f"{self.path / name} is damaged or was changed: it differs from its checksum")

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """What engines can run."""
        return self.manifest.payloads

    def file(self, payload: Payload) -> Path:
        """The file that the payload's engine opens."""
        return self.path if self.path.suffix == ".onnx" else self.path / payload.main_file

    def probe(self) -> dict[str, np.ndarray]:
        """The probe: `pixels` and `logits`, and `odd_pixels` and `odd_logits` at another size; empty where none is.

        Shape: pixels [N, H, W, C] in 0..255, logits [N, K] of the training form in float32.

        Raises:
            ValueError: it holds something else.
        """
        if not self.manifest.probe:
            return {}
        try:
            with np.load(self.path / PROBE, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # of damaged files zipfile and NumPy raise nearly anything
            raise ValueError(f"{self.path / PROBE} holds no probe: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder, whose other files are not looked at.

    Raises:
        ValueError: there is none, or it is of a newer version, damaged or changed.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is no artefact: it has no {MANIFEST}. `riformer export` writes one")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{file} is no manifest: it has more than {MAX_MANIFEST_BYTES} bytes")
    return Manifest.from_json(file.read_bytes().decode("utf-8", "replace"), str(file))


def is_artifact(path: str | Path) -> bool:
    """Whether a path looks like an artefact, without a look at what is inside."""
    path = Path(path)
    return (path / MANIFEST).is_file() or (path.suffix == ".onnx" and path.is_file())


def file_sum(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contradictions(manifest: Manifest) -> list[str]:
    """What cannot be in a manifest though each value is of its type."""
    wrong = []
    for payload in manifest.payloads:
        names = [file for file in payload.files if Path(file).name != file or not file]
        wrong += [f"payload file {file!r} is no plain name" for file in names]
        if not payload.files:
            wrong.append(f"payload {payload} has no file")
        wrong.append(refusal("payload.speed.images_per_s", payload.speed.get("images_per_s", 0.0), float))
    if len(manifest.class_names) != manifest.num_classes:
        wrong.append(f"{len(manifest.class_names)} class names for {manifest.num_classes} classes")
    return [reason for reason in wrong if reason]


def _text(content: Mapping[str, Any]) -> str:
    """The one text of a manifest's content, which begins with the content's checksum."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({"sha256": digest, **content}, indent=1, allow_nan=False) + "\n"


# An ONNX file is a message of protocol buffers: fields in any order, each a tag, a length and bytes. The manifest is
# the last of its metadata entries, and has the checksum of everything before it.


def manifest_behind_graph(graph: bytes, manifest: Manifest) -> bytes:
    """The content of an .onnx file with the manifest behind its graph; its one payload gets the graph's checksum."""
    (payload,) = manifest.payloads
    payload = replace(payload, files={"graph": hashlib.sha256(graph).hexdigest()})
    return graph + _metadata(replace(manifest, payloads=(payload,), probe="").to_json().encode())


def _manifest_behind_graph(path: Path) -> Manifest:
    """The manifest behind the graph of an .onnx file.

    Raises:
        ValueError: there is none, or the file is damaged.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    content = path.read_bytes()
    start = content.rfind(ONNX_KEY + _field(b"\x12", b"")[:1])
    if start < 0:
        raise ValueError(f"{path} has no manifest of riformer in its metadata: `riformer export` writes one")
    text = content[content.find(b"{", start) :]
    graph = content[: len(content) - len(_metadata(text))]
    manifest = Manifest.from_json(text.decode("utf-8", errors="replace"), f"the manifest of {path}")
    if graph + _metadata(text) != content or [hashlib.sha256(graph).hexdigest()] != [
        digest for payload in manifest.payloads for digest in payload.files.values()
    ]:
        raise ValueError(f"{path} is damaged or was changed: its graph differs from its checksum")
    return manifest


def _metadata(text: bytes) -> bytes:
    """An entry of ONNX's metadata_props, field 14: a message of key, field 1, and value, field 2."""
    return _field(b"\x72", _field(b"\x0a", ONNX_KEY) + _field(b"\x12", text))


def _field(tag: bytes, content: bytes) -> bytes:
    length, size = bytearray(), len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return tag + bytes(length) + content
