"""The one evaluation transform: timm's for ordinary images, and bounded for very thin ones."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import riformer  # noqa: F401  (registers the networks)
from riformer.config import DataConfig
from riformer.model.preprocessing import preprocessing_of
from riformer.runtime.runner import Eager
from riformer.study.evaluation import evaluate_model
from riformer_runtime import predict
from riformer_runtime.preprocess import CROP_MODES, MAX_ASPECT, Preprocessing, cut_long

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width + 1000 * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (7, 7), (2, 64), (320, 10)])
def test_ordinary_images_are_transformed_as_by_timm(size: tuple[int, int], mode: str) -> None:
    ours = Preprocessing((3, 24, 24), 0.9, mode, "bicubic", MEAN, STD)
    timms = create_transform((3, 24, 24), crop_pct=0.9, crop_mode=mode, interpolation="bicubic", mean=MEAN, std=STD)
    np.testing.assert_array_equal(ours(noise(*size)), timms(noise(*size)))


CONFIGS = [
    {}, {"interpolation": "bilinear"}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"crop_pct": 0.875},
    {"crop_pct": None}, {"crop_mode": None}, {"interpolation": ""},
    {"input_size": (3, 24, 40)}, {"input_size": (3, 40, 24), "crop_pct": 0.9}, {"mean": (0, 0, 0), "std": (1, 1, 1)},
    {"input_size": (3, 24, 40), "crop_mode": "squash", "interpolation": "lanczos"},
    {"input_size": (3, 24, 40), "crop_mode": "border", "crop_pct": 1.1},
]  # fmt: skip


def network(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    overlay = {"input_size": (3, 24, 24), "crop_pct": 0.9, **config}
    args = {name: overlay.pop(name) for name in ("in_chans",) if name in overlay}
    return timm.create_model("riformer_micro", num_classes=3, pretrained_cfg_overlay=overlay, **args).eval()


@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_timms_for_what_the_model_carries(config: dict[str, Any]) -> None:
    model = network(**config)
    expected = create_transform(**resolve_model_data_config(model))
    for size in ((50, 30), (30, 50), (17, 90), (200, 200)):
        np.testing.assert_array_equal(preprocessing_of(model)(noise(*size)), expected(noise(*size)))


@pytest.mark.parametrize(
    "config", [{}, *CONFIGS[1:4], {"input_size": (3, 24, 40)}, {"in_chans": 1, "mean": 0.4, "std": 0.2}]
)
def test_prediction_and_evaluation_see_the_same_inputs(config: dict[str, Any], image_folder: Path) -> None:
    model = network(label_names=["one", "seven", "zero"], **config)
    with torch.no_grad():  # far from equal probabilities, so that other inputs show
        model.head.fc.weight.mul_(300)
    result = evaluate_model(model, DataConfig(name=f"folder:{image_folder}", num_workers=0))["as saved"]
    paths = sorted(image_folder.rglob("*.png"))
    losses, right = [], 0
    for path, prediction in zip(paths, predict(Eager(model), paths, top_k=3), strict=True):
        losses.append(-math.log(dict(prediction.classes)[path.parent.name]))
        right += prediction.classes[0][0] == path.parent.name
    assert len(paths) == result.num_images == 60
    assert 100 * right / 60 == pytest.approx(result.top1)
    assert sum(losses) / 60 == pytest.approx(result.loss, rel=1e-4)


def test_grey_networks_see_grey_images() -> None:
    model = network(in_chans=1, mean=(0.5,), std=(0.25,))
    grey = np.asarray(noise(24, 24).convert("L"), dtype=np.float32) / 255
    used = preprocessing_of(model)
    transform = Preprocessing((1, 24, 24), 1.0, used.crop_mode, used.interpolation, used.mean, used.std)
    np.testing.assert_allclose(transform(noise(24, 24))[0], (grey - 0.5) / 0.25, rtol=1e-6)
    for mode in CROP_MODES:
        model.pretrained_cfg["crop_mode"] = mode
        images = torch.from_numpy(preprocessing_of(model)(noise(50, 20))[None])
        assert model(images).shape == (1, 3)


def test_random_interpolation_is_bilinear_and_one_number_counts_for_all_channels() -> None:
    random, bilinear = (network(interpolation=name, mean=(0.5,), std=0.25) for name in ("random", "bilinear"))
    assert preprocessing_of(random) == preprocessing_of(bilinear)
    assert preprocessing_of(random).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_chans": 4, "mean": 0.5, "std": 0.5}, "takes images of 4 channels"),
        ({"in_chans": 1}, r"mean is \(0.485, .*\), but the network takes images of 1 channel"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\), but the network takes images of 3 channel"),
        ({"std": (1, 0, 1)}, "std is .*must be positive"),
        ({"crop_pct": 1e-9}, "crop_pct 1e-09"),
        ({"crop_mode": "centre"}, "crop_mode is 'centre'; allowed are center, squash, border"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; allowed are nearest, bilinear"),
    ],
)
def test_values_that_no_image_can_be_brought_to_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessing_of(network(**config))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (2, 3_000_000), (3, 97)])
def test_thin_images_are_cut_around_their_centre_before_they_are_resized(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    middle = cut_long(image)
    assert max(middle.size) == MAX_ASPECT * min(size)
    transform = Preprocessing((3, 24, 24), 0.9, "center", "bicubic", (0, 0, 0), (1, 1, 1))
    expected = np.broadcast_to(np.array([1.0, 0, 0], np.float32)[:, None, None], (3, 24, 24))
    np.testing.assert_array_equal(transform(image), expected)


def test_the_cut_keeps_what_the_crop_would_have_kept() -> None:
    image = noise(4, 4 * MAX_ASPECT + 40)
    timms = create_transform((3, 24, 24), crop_pct=0.9, interpolation="bicubic", mean=MEAN, std=STD)
    ours = Preprocessing((3, 24, 24), 0.9, "center", "bicubic", MEAN, STD)
    assert cut_long(image).size != image.size
    np.testing.assert_allclose(ours(image), timms(image), atol=0.05)
