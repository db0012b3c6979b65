"""Nothing loads that is not what was written."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from riformer_runtime.artifact import Artifact, Manifest, Payload, _text, file_sum, manifest_behind_graph
from riformer_runtime.engines import open_file
from riformer_runtime.native.library import supported
from riformer_runtime.native.weights import BlockWeights, ConvWeights, NetworkWeights, read_weights, write_weights
from riformer_runtime.preprocess import Preprocessing


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """Every kind of file that an artefact can have. Nothing runs it, so its graph need not be one."""
    folder, rng = tmp_path_factory.mktemp("artifact") / "out", np.random.default_rng(0)
    folder.mkdir()
    preprocessing = Preprocessing((3, 32, 32), 0.9, "center", "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    manifest = Manifest("riformer_micro", "deploy", 3, ("cat", "dog", "bird"), preprocessing)
    payload = Payload("onnxruntime", "fp32", {"graph": ""})
    (folder / "fp32.onnx").write_bytes(manifest_behind_graph(rng.bytes(3000), replace(manifest, payloads=(payload,))))
    write_weights(weights(), folder / "native.npz")
    for name in ("fp32.xml", "fp32.bin"):
        (folder / name).write_bytes(rng.bytes(2000))
    np.savez_compressed(folder / "probe.npz", pixels=rng.bytes(100))
    groups = {"native": ["native.npz"], "onnxruntime": ["fp32.onnx"], "openvino": ["fp32.xml", "fp32.bin"]}
    payloads = [
        Payload(engine, "fp32", {name: file_sum(folder / name) for name in names}) for engine, names in groups.items()
    ]
    manifest = replace(manifest, probe=file_sum(folder / "probe.npz"), payloads=tuple(payloads))
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


KINDS = ("bit", "byte", "cut", "append", "swap bytes", "delete", "zero", "swap files")


def damage(path: Path, rng: random.Random) -> str:
    """Changes a file or the folder at random; says how."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    file, kind = (
        rng.choice(files),
        rng.choice(["bit", "byte", "cut", "append", "swap bytes", "delete", "zero", "swap files"]),
    )
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if kind == "swap files" and len(files) > 1:
        other = rng.choice([one for one in files if one != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"{file.name} and {other.name} swapped"
    if kind in ("delete", "swap files"):
        file.unlink()
        return f"{file.name} deleted"
    before = bytes(content)
    if kind == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[place] = rng.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "append":
        content += rng.randbytes(rng.randrange(1, 20))
    elif kind == "swap bytes":
        other_place = rng.randrange(len(content))
        content[place], content[other_place] = content[other_place], content[place]
    else:
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    if bytes(content) == before:
        content[place] ^= 255
    file.write_bytes(content)
    return f"{file.name}: {kind} at {place}"


@pytest.mark.parametrize("form", ["folder", "one file"])
def test_no_damaged_artifact_loads(artifact, tmp_path, form):
    rng, original = random.Random(form), artifact if form == "folder" else artifact / "fp32.onnx"
    Artifact(original)
    for trial in range(400 if form == "folder" else 200):
        copied = tmp_path / f"{trial}{original.suffix}"
        (shutil.copytree if original.is_dir() else shutil.copy)(original, copied)
        change = damage(copied, rng)
        with pytest.raises(ValueError, match=re.escape(str(copied))) as refused:
            Artifact(copied)
        assert "\n" not in str(refused.value), change
        if copied.is_dir():
            shutil.rmtree(copied)
        else:
            copied.unlink(missing_ok=True)


def rewritten(artifact: Path, folder: Path, change) -> Path:
    """A copy whose manifest was changed by somebody who knows how to compute its checksum."""
    copied = shutil.copytree(artifact, folder / "rewritten")
    content = json.loads((copied / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    (copied / "manifest.json").write_text(_text(content))
    return copied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "has format 2, newer than this version"),
        (lambda m: m.update(format="1"), "has no format version"),
        (lambda m: m.pop("architecture"), "lacks what a manifest has"),
        (lambda m: m.pop("payloads"), "lacks what a manifest has"),
        (lambda m: m.update(extra=1), "has no 'extra'"),
        (lambda m: m.update(num_classes="3"), "num-classes is '3'"),
        (lambda m: m.update(class_names=["a"]), "1 class names for 3 classes"),
        (lambda m: m.update(class_names=[1, 2, 3]), "class-names is"),
        (lambda m: m.update(payloads=None), "in another form"),
        (lambda m: m.update(payloads=[1]), "payload"),
        (lambda m: m["preprocessing"].update(std=[0, 1, 1]), "std is"),
        (lambda m: m["preprocessing"].update(input_size=[3, 32]), "input-size is (3, 32)"),
        (lambda m: m["preprocessing"].update(input_size="abc"), "takes images of a channels"),
        (lambda m: m["preprocessing"].update(mean=None), "in another form"),
        (lambda m: m.update(preprocessing=None), "preprocessing"),
        (lambda m: m["payloads"][0].update(files={"../native.npz": "0"}), "is no plain name"),
        (lambda m: m["payloads"][0].update(files={}), "has no file"),
        (lambda m: m["payloads"][0].update(files={"absent": "0"}), "absent is missing"),
        (lambda m: m["payloads"][0].update(precision="fp7"), "fp7"),
        (lambda m: m["payloads"][0].update(batch=-1), "batch is -1"),
        (lambda m: m["payloads"][0].update(files=3), "files is 3"),
        (lambda m: m["payloads"][0]["speed"].update(images_per_s="fast"), "images_per_s is 'fast'"),
        (lambda m: m.update(class_names=3), "class-names is 3"),
        (lambda m: m["preprocessing"].update(mean=[10**400, 0, 0]), "mean is"),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(artifact, tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Artifact(rewritten(artifact, tmp_path, change))


def test_what_is_no_artifact_is_named(artifact, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "payload").mkdir()
    shutil.copytree(artifact, tmp_path / "nested")
    (tmp_path / "nested" / "native.npz").unlink()
    (tmp_path / "nested" / "native.npz").mkdir()
    for name in ("absent", "absent.onnx", "folder.onnx", "model.onnx", "deep", "payload", "nested"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            Artifact(tmp_path / name)


def test_a_manifest_survives_its_text(artifact):
    manifest = Artifact(artifact).manifest
    assert Manifest.from_json(manifest.to_json(), "again") == manifest
    assert Artifact(artifact / "fp32.onnx").manifest.class_names == manifest.class_names


# the native engine's file: its checksum may be right and its content absurd


def weights(**changes) -> NetworkWeights:
    """A small network; changes are functions of arrays by name."""
    rng = np.random.default_rng(0)

    def array(name: str, *shape: int) -> np.ndarray:
        values = rng.normal(size=shape).astype(np.float32)
        return changes[name](values) if name in changes else values

    blocks = (
        BlockWeights(
            *(array(name, 8) for name in BlockWeights._fields[:4]),
            array("fc1_weight", 32, 8), array("fc1_bias", 32), array("fc2_weight", 8, 32), array("fc2_bias", 8),
        ),
    )  # fmt: skip
    stem = ConvWeights(array("conv_weight", 8, 3, 4, 4), array("conv_bias", 8), changes.get("stride", 4), 0)
    return NetworkWeights((stem,), (blocks,), array("head_weight", 5, 8), array("head_bias", 5), 1e-5)


@pytest.mark.parametrize("name", [*BlockWeights._fields, "conv_weight", "conv_bias", "head_weight", "head_bias"])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:-1],
        lambda a: np.concatenate([a, a]),
        lambda a: a[None],
        lambda a: a[..., :0],
        lambda a: a[()].sum(),
    ],
    ids=["short", "long", "deeper", "empty", "number"],
)
def test_weights_of_other_shapes_never_reach_the_engine(tmp_path, name, change):
    write_weights(weights(), tmp_path / "right.npz")
    assert read_weights(tmp_path / "right.npz").in_chans == 3
    write_weights(weights(**{name: change}), tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match=r"wrong\.npz holds no weights of the native network"):
        read_weights(tmp_path / "wrong.npz")


@pytest.mark.parametrize("stride", [0, -1, 2**40])
def test_a_stride_that_cannot_be_is_refused(tmp_path, stride):
    write_weights(weights(stride=stride), tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "wrong.npz")


def test_weights_that_are_no_floats_or_not_finite_are_refused(tmp_path):
    for change in (lambda a: a.astype(complex), lambda a: a.astype("U8"), lambda a: a * np.nan):
        write_weights(weights(fc1_weight=change), tmp_path / "wrong.npz")
        with pytest.raises(ValueError, match="holds no weights"):
            read_weights(tmp_path / "wrong.npz")
    (tmp_path / "text.npz").write_text("no weights")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "text.npz")


@pytest.mark.skipif(not supported(), reason="no native network here")
@pytest.mark.parametrize("change", ["channels", "classes"])
def test_weights_that_are_not_the_manifests_never_compute(tmp_path, change):
    write_weights(weights(), tmp_path / "native.npz")  # 3 channels, 5 classes
    channels, num_classes = (1, 5) if change == "channels" else (3, 4)
    ones = (0.5,) * channels
    preprocessing = Preprocessing((channels, 32, 32), 0.9, "center", "bicubic", ones, ones)
    manifest = Manifest("riformer", "deploy", num_classes, tuple("abcde"[:num_classes]), preprocessing)
    payload = Payload("native", "fp32", {"native.npz": file_sum(tmp_path / "native.npz")})
    runner = open_file(tmp_path / "native.npz", payload, manifest)
    with pytest.raises((ValueError, RuntimeError), match=r"weights are for 3|the manifest says \[2, 4\]"):
        runner(np.zeros((2, channels, 32, 32), np.float32))
