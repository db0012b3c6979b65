"""Artefacts as model repositories of inference servers: Triton Inference Server and OpenVINO Model Server."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from riformer.atomic import replace_folder, write_text
from riformer_runtime.artifact import MANIFEST, Artifact, Manifest, Payload

MAX_BATCH_SIZE = 64
MAX_DELAY_US = 2000  # that Triton waits for more images, microseconds


def write_repository(artifact: Artifact, folder: str | Path, server: str, name: str) -> Path:
    """Writes a payload into a model repository, as the next version of a model; returns the version's folder.

    The manifest goes along. With both servers preprocessing is the client's part, unless the graph has it inside.

    Args:
        artifact: with a payload that the server runs.
        folder: the repository; other models in it stay as they are.
        server: a name in `SERVERS`.
        name: of the model.

    Raises:
        ValueError: no such server, a name that no folder can have, or no payload that the server runs.
    """
    if server not in SERVERS:
        raise ValueError(f"no server {server!r}; known are {', '.join(SERVERS)}")
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"a model cannot be called {name!r}: the name is a folder's")
    engines = SERVERS[server].engines
    runnable = [payload for engine in engines for payload in artifact.payloads if payload.engine == engine]
    if not runnable:
        raise ValueError(
            f"{server} runs payloads for {' and '.join(engines)}, but {artifact.path} has "
            f"{', '.join(map(str, artifact.payloads))}"
        )
    payload = max(runnable, key=lambda one: one.speed.get("images_per_s", 0.0))
    model = Path(folder) / name
    versions = [int(version.name) for version in model.glob("*") if version.name.isdigit()]
    version = model / str(max(versions, default=0) + 1)
    with replace_folder(version) as new:
        is_folder = artifact.path.is_dir()
        for source in (artifact.path / file for file in payload.files) if is_folder else [artifact.path]:
            shutil.copy2(source, new / f"model{source.suffix}")
        (new / MANIFEST).write_text(artifact.manifest.to_json(), encoding="utf-8")
    SERVERS[server].configure(artifact.manifest, payload, Path(folder), name)
    return version


def _configure_triton(manifest: Manifest, payload: Payload, folder: Path, name: str) -> None:
    """Writes config.pbtxt, a ModelConfig of Triton in protobuf's text format, and the class names."""
    channels, *size = manifest.preprocessing.input_size
    height, width = (-1, -1) if payload.any_size else size
    lines = [
        f'name: "{name}"',
        f'backend: "{payload.engine}"',
        f'default_model_filename: "model{Path(payload.main_file).suffix or ".onnx"}"',
        f"max_batch_size: {payload.batch or MAX_BATCH_SIZE}",
        f'input [{{ name: "images" data_type: TYPE_FP32 dims: [{channels}, {height}, {width}] }}]',
        'output [{ name: "logits" data_type: TYPE_FP32 label_filename: "labels.txt" '
        f"dims: [{manifest.num_classes}] }}]",
    ]
    if not payload.batch:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {MAX_DELAY_US} }}")
    names = (" ".join(class_name.split()) for class_name in manifest.class_names)  # a line each
    write_text(folder / name / "labels.txt", "".join(f"{class_name}\n" for class_name in names))
    write_text(folder / name / "config.pbtxt", "\n".join(lines) + "\n")


def _configure_openvino(manifest: Manifest, payload: Payload, folder: Path, name: str) -> None:
    """Adds the model to config.json, whose paths are those inside the server's container."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model_config_list": []}
    others = [entry for entry in content["model_config_list"] if entry["config"]["name"] != name]
    content["model_config_list"] = [*others, {"config": {"name": name, "base_path": f"/models/{name}"}}]
    write_text(file, json.dumps(content, indent=2) + "\n")


class Server(NamedTuple):
    """An inference server.

    Attributes:
        engines: whose payloads it runs.
        configure: (manifest, payload, repository, model name) writes its configuration.
    """

    engines: tuple[str, ...]
    configure: Callable[[Manifest, Payload, Path, str], None]


SERVERS = {
    "triton": Server(("onnxruntime", "openvino"), _configure_triton),
    "openvino": Server(("openvino", "onnxruntime"), _configure_openvino),
}
