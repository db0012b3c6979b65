"""From a file to probabilities: every payload gives what the training form gives in PyTorch, with timm's transform."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from picture_files import write_pictures
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from riformer.export import artifact as exporting
from riformer.export.artifact import Samples, export
from riformer.measure.bench import randomised
from riformer_runtime import open_runner
from riformer_runtime.engines import input_of
from riformer_runtime.images import read_image
from riformer_runtime.native.library import supported
from riformer_runtime.predict import probabilities
from riformer_runtime.preprocess import cut_long


def network(**config) -> torch.nn.Module:
    """With probabilities that depend on the image: all classes occur."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, 64, 64), "crop_pct": 0.9, **config}
    model = randomised(timm.create_model("riformer_micro", num_classes=5, pretrained_cfg_overlay=overlay)).eval()
    with torch.no_grad():
        model.head.fc.weight.mul_(3)
    return model


def by_timm(model: torch.nn.Module, paths: list[Path]) -> np.ndarray:
    """The probabilities of the training form on the images as timm transforms them."""
    transform = create_transform(**resolve_model_data_config(model))
    cut = (lambda image: image) if model.pretrained_cfg.get("crop_mode") == "squash" else cut_long
    with torch.inference_mode():
        return np.stack([model(transform(cut(read_image(path)))[None]).softmax(1)[0].numpy() for path in paths])


def by_runner(runner, paths: list[Path]) -> np.ndarray:
    return np.concatenate([probabilities(runner, [input_of(runner, read_image(path))]) for path in paths])


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    """90 files, or as many as NUM_PICTURES says: `NUM_PICTURES=1000 pytest -s tests/artifact/test_picture_files.py`."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), int(os.environ.get("NUM_PICTURES", 90)))


CASES = [
    ({}, ""),
    pytest.param({}, "resize", marks=pytest.mark.slow),
    pytest.param({}, "normalise", marks=pytest.mark.slow),
    pytest.param({"crop_mode": "squash", "interpolation": "bilinear"}, "", marks=pytest.mark.slow),
    pytest.param({"crop_mode": "squash", "interpolation": "bilinear"}, "resize", marks=pytest.mark.slow),
    pytest.param({"crop_mode": "border"}, "", marks=pytest.mark.slow),
    pytest.param({"input_size": (3, 48, 80), "crop_pct": 0.8}, "resize", marks=pytest.mark.slow),
    pytest.param({"input_size": (3, 48, 80), "interpolation": "lanczos"}, "normalise", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("config", "inside"), CASES)
def test_files_of_all_kinds_get_the_same_probabilities(config, inside, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_rates_by_form", lambda *arguments: {})
    model = network(**config)
    expected = by_timm(model, paths)
    assert len(paths) >= 60
    assert expected.std(axis=0).max() > 0.1
    targets = [*(["native"] if supported() and not inside else []), "onnx", "openvino"]
    samples = Samples("noise", [Image.new("RGB", (70, 70), (i * 9, 80, 200 - i * 9)) for i in range(16)])
    artifact = export(model, tmp_path / "out", samples, targets, inside=inside).artifact
    for payload in artifact.payloads:
        actual = by_runner(open_runner(artifact, payload.engine), paths)
        largest = np.abs(actual - expected).max()
        print(f"{payload}, inside {inside or 'nothing'}, {len(paths)} files: largest difference {largest:.1e}")  # noqa: T201
        assert largest < 1e-3


def test_another_interpolation_would_show(paths):
    """A control: the probabilities depend on the preprocessing by far more than is allowed above."""
    differences = np.abs(by_timm(network(interpolation="bilinear"), paths) - by_timm(network(), paths))
    assert differences.max() > 0.05
