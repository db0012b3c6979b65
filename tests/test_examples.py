"""The scripts in examples/ do what they say."""

import re
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from scripts import ROOT, load_script
from timm.utils import reparameterize_model

from riformer.export.artifact import Samples, export
from riformer.model.mixers import Affine, Identity
from riformer_runtime import open_runner, predict

PATH = ROOT / "examples" / "detection.py"


@pytest.fixture(scope="module")
def detection():
    return load_script("examples/detection.py")


def test_detection_learns_and_detects_the_same_when_fused(detection, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--steps", "30"])
    detection.main()
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (.*)$", output, re.MULTILINE)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    forms = re.findall(
        r"^(\w+) form: (\d+) detections, (\d+) of (\d+) rectangles found, (.*) param", output, re.MULTILINE
    )
    (training, *same, parameters), (deploy, *again, fewer) = forms
    assert (training, deploy) == ("training", "deploy")
    assert same == again
    assert int(same[1]) > 0.8 * int(same[2])
    assert int(parameters.replace(",", "")) - int(fewer.replace(",", "")) == 2 * 2 * (32 + 64 + 128)
    assert float(re.search(r"coordinate: (\S+) pixels", output)[1]) < 1e-3


def test_the_maps_would_differ_without_the_fuse(detection):
    """The affines matter to the detector above, so that its sameness says something."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    detector = detection.build("riformer_mini", 64)
    detection.train(detector, 10, 4, 64, generator)
    pyramid, x = detector.eval().backbone, torch.rand(1, 3, 64, 64, generator=generator)
    maps = {"as trained": pyramid(x)["0"], "fused": reparameterize_model(pyramid)(x)["0"]}
    for module in list(pyramid.modules()):
        if isinstance(getattr(module, "token_mixer", None), Affine):
            module.token_mixer = Identity(0, grid=(0, 0))
    maps["dropped"] = pyramid(x)["0"]
    scale = maps["as trained"].abs().max().item()
    torch.testing.assert_close(maps["fused"], maps["as trained"], rtol=0, atol=1e-5 * scale)
    assert (maps["dropped"] - maps["as trained"]).abs().max() > 0.1 * scale


@pytest.mark.parametrize("model", ["riformer_mini", "riformer_s12"])
def test_the_pyramid_has_every_map_at_its_stride(detection, model):
    pyramid = detection.build(model, 64).backbone
    maps = pyramid(torch.zeros(1, 3, 64, 64))
    strides = pyramid.backbone.feature_info.reduction()
    assert strides == [4, 8, 16, 32][: 3 if model == "riformer_mini" else 4]
    assert [tuple(x.shape) for x in maps.values()] == [(1, pyramid.out_channels, 64 // s, 64 // s) for s in strides]


def test_help(detection, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--help"])
    with pytest.raises(SystemExit, match="0"):
        detection.main()
    assert "python examples/detection.py --model riformer_s12 --pretrained" in capsys.readouterr().out


@pytest.mark.slow
def test_two_replicas_of_ray_serve_answer_as_predict_does(tmp_path):
    pytest.importorskip("ray.serve")
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32), "label_names": ["cat", "dog"]}
    model = timm.create_model("riformer_micro", num_classes=2, pretrained_cfg_overlay=overlay).eval()
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue", "white") * 5]
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    export(model, tmp_path / "out", Samples("colours", images), ["native"])
    command = [sys.executable, ROOT / "examples" / "ray_serve.py", tmp_path / "out", *paths]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^(\S+): (.*) \(replica (\d+)\)$", answers, re.MULTILINE)
    assert len({replica for _, _, replica in lines}) == 2
    predictions = predict(open_runner(tmp_path / "out"), paths)
    expected = [", ".join(f"{name} {share:.1%}" for name, share in one.classes) for one in predictions]
    assert [classes for _, classes, _ in lines] == expected
