"""Evaluation of models from anywhere: whose outputs mean which classes, and logits that are no numbers."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import riformer
from riformer import cli
from riformer.config import DataConfig
from riformer.study.evaluation import evaluate_model

NAMES = [str(i) for i in range(1, 13)]  # natural order: 1, 2, ... 12; order of code points: 1, 10, 11, 12, 2, ...


class Grey(nn.Module):
    """Knows class i by the grey value 20 * i of its images; its outputs mean `order`."""

    def __init__(self, order: list[str], label_names: list[str] | None = None):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([20.0 * int(name) for name in order]))
        self.num_classes = len(order)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}
        self.pretrained_cfg["label_names"] = label_names

    def forward(self, images: Tensor) -> Tensor:
        return -(255 * images.mean((1, 2, 3))[:, None] - self.values).abs()


@pytest.fixture
def greys(tmp_path: Path) -> DataConfig:
    for name in NAMES:
        (tmp_path / "greys" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (20 * int(name) + i,) * 3).save(tmp_path / "greys" / name / f"{i}.png")
    return DataConfig(name=f"folder:{tmp_path / 'greys'}", num_workers=0)


def test_a_model_without_names_is_taken_in_natural_order(greys):
    assert evaluate_model(Grey(NAMES), greys)["as saved"].top1 == 100


def test_a_model_without_names_that_means_another_order_is_refused_until_its_classes_are_stated(greys):
    other = sorted(NAMES)
    with pytest.raises(
        ValueError, match=r"8\.33% with the data's order.* 100\.00% with the order of code points.*--classes"
    ):
        evaluate_model(Grey(other), greys)
    assert evaluate_model(Grey(other), greys, classes=other)["as saved"].top1 == 100
    assert evaluate_model(Grey(other, label_names=other), greys)["as saved"].top1 == 100
    with pytest.raises(ValueError, match="carries its own"):
        evaluate_model(Grey(other, label_names=other), greys, classes=other)


def test_classes_are_stated_in_a_file(greys, tmp_path, capsys):
    model = timm.create_model("riformer_micro", num_classes=12, pretrained_cfg_overlay={"input_size": (3, 8, 8)})
    riformer.save(model, tmp_path / "model.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    command = [str(tmp_path / "model.safetensors"), "--data", greys.name, "--classes", str(tmp_path / "names.txt")]
    assert cli.run("eval", command) == 0
    (tmp_path / "names.txt").write_text("\n".join(NAMES[1:]))
    assert cli.run("eval", command) == 1
    assert "the model has 12 classes, but 11 names" in capsys.readouterr().err.replace("\n", " ")


def test_a_bad_model_without_names_is_measured(greys):
    assert evaluate_model(Grey(NAMES[::-1]), greys)["as saved"].top1 < 10


def test_logits_that_are_no_numbers_have_no_accuracy(greys):
    model = Grey(NAMES)
    with torch.no_grad():
        model.values[3] = torch.nan
    with pytest.raises(ValueError, match="as saved: the logits of 72 of 72 images are not finite"):
        evaluate_model(model, greys)


def test_a_runtime_is_evaluated_like_its_model(greys):
    config = {"input_size": (3, 16, 16), "label_names": NAMES}
    model = timm.create_model("riformer_micro", num_classes=12, pretrained_cfg_overlay=config).eval()
    fast = riformer.optimize(model, torch.randn(2, 3, 16, 16), "fp64", "portable")
    expected, measured = (evaluate_model(network, greys)["as saved"] for network in (model.double(), fast))
    assert measured.confusion == expected.confusion
    assert measured.loss == pytest.approx(expected.loss, rel=1e-5)
