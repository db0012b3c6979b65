"""Model repositories of inference servers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import riformer_cli
from riformer.export.artifact import Samples, export
from riformer.export.repository import write_repository
from riformer_runtime.artifact import Artifact, Manifest, Payload, file_sum
from riformer_runtime.preprocess import Preprocessing


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    """With payloads of three engines; nothing here runs them."""
    folder, files = tmp_path / "cats", {}
    folder.mkdir()
    for name in ("native.npz", "fp32.onnx", "fp32.xml", "fp32.bin"):
        (folder / name).write_bytes(name.encode())
        files[name] = file_sum(folder / name)
    groups = {"native": ["native.npz"], "onnxruntime": ["fp32.onnx"], "openvino": ["fp32.xml", "fp32.bin"]}
    payloads = [
        Payload(engine, "fp32", {name: files[name] for name in names}, speed={"images_per_s": 10.0 * i})
        for i, (engine, names) in enumerate(groups.items())
    ]
    preprocessing = Preprocessing((3, 48, 32), 0.9, "center", "bicubic", (0.5,) * 3, (0.2,) * 3)
    manifest = Manifest("riformer_micro", "deploy", 2, ("tabby cat", "line\nend"), preprocessing)
    manifest = Manifest(**{**manifest.__dict__, "payloads": tuple(payloads)})
    (folder / "manifest.json").write_text(manifest.to_json())
    return Artifact(folder)


def test_triton_gets_versions_a_configuration_and_class_names(artifact, tmp_path):
    repository = tmp_path / "models"
    for number in ("1", "2"):
        version = write_repository(artifact, repository, "triton", "cats")
        assert version == repository / "cats" / number
        assert (version / "model.xml").read_bytes() == b"fp32.xml"
        assert (version / "model.bin").read_bytes() == b"fp32.bin"
        assert Manifest.from_json((version / "manifest.json").read_text(), "copy") == artifact.manifest
    assert (repository / "cats" / "labels.txt").read_text() == "tabby cat\nline end\n"
    assert (repository / "cats" / "config.pbtxt").read_text() == (
        'name: "cats"\n'
        'backend: "openvino"\n'
        'default_model_filename: "model.xml"\n'
        "max_batch_size: 64\n"
        'input [{ name: "images" data_type: TYPE_FP32 dims: [3, -1, -1] }]\n'
        'output [{ name: "logits" data_type: TYPE_FP32 label_filename: "labels.txt" dims: [2] }]\n'
        "dynamic_batching { max_queue_delay_microseconds: 2000 }\n"
    )


def test_the_configuration_is_one_by_tritons_own_schema(artifact, tmp_path):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    write_repository(artifact, tmp_path / "models", "triton", "cats")
    config = text_format.Parse((tmp_path / "models" / "cats" / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("cats", "openvino", 64)
    assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [[3, -1, -1], [2]]
    assert config.input[0].data_type == schema.TYPE_FP32


def test_openvino_model_server_gets_all_models_in_one_configuration(artifact, tmp_path):
    for name in ("cats", "dogs", "cats"):
        write_repository(artifact, tmp_path / "models", "openvino", name)
    content = json.loads((tmp_path / "models" / "config.json").read_text())
    assert content == {
        "model_config_list": [
            {"config": {"name": "dogs", "base_path": "/models/dogs"}},
            {"config": {"name": "cats", "base_path": "/models/cats"}},
        ]
    }
    written = {str(path.relative_to(tmp_path / "models")) for path in (tmp_path / "models").rglob("model.*")}
    assert written == {f"{place}/model.{kind}" for place in ("cats/1", "cats/2", "dogs/1") for kind in ("xml", "bin")}


def test_what_a_server_cannot_run_is_named(artifact, tmp_path, capsys):
    for name in ("../up", ".hidden", ""):
        with pytest.raises(ValueError, match="cannot be called"):
            write_repository(artifact, tmp_path / "models", "triton", name)
    assert riformer_cli.run("layout", [str(artifact.path), str(tmp_path / "models"), "--server", "openvino"]) == 0
    assert "models/cats/1: manifest.json model.bin model.xml" in " ".join(capsys.readouterr().out.split())
    native = Path(shutil.copytree(artifact.path, tmp_path / "native"))
    manifest = Manifest(**{**artifact.manifest.__dict__, "payloads": artifact.payloads[:1]})
    (native / "manifest.json").write_text(manifest.to_json())
    assert riformer_cli.run("layout", [str(native), str(tmp_path / "models")]) == 1
    assert "triton runs payloads for onnxruntime and openvino" in capsys.readouterr().err


@pytest.mark.slow
def test_the_laid_out_graph_has_the_names_that_the_configuration_says(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = timm.create_model("riformer_micro", num_classes=5, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    samples = Samples("red", [Image.new("RGB", (32, 32), "red")])
    artifact = export(model.eval(), tmp_path / "out", samples, ["openvino"]).artifact
    version = write_repository(artifact, tmp_path / "models", "openvino", "net")
    compiled = openvino.Core().compile_model(version / "model.xml", "CPU")
    answer = compiled({"images": np.zeros((3, 3, 32, 32), np.float32)})
    assert answer["logits"].shape == (3, 5)
