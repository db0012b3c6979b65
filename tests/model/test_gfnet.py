"""GFNet-H: parity with the authors' implementation, other resolutions, checkpoints, exports."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import openvino
import pytest
import timm
import torch
from model.test_golden import assert_near, read
from tiny import images, randomised
from torch.testing import assert_close

import riformer
from riformer.model.gfnet import GFNet
from riformer.model.keys import fit_state
from riformer.model.variants import GFNETS
from riformer.model.weights import convert, identify
from riformer_runtime.engines import same_signal_stack

NUM_PARAMS = {"gfnet_h_ti": 15_085_096, "gfnet_h_s": 32_162_632, "gfnet_h_b": 53_744_200}
SIZE = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5, img_size=64)


def tiny(**args) -> GFNet:
    return timm.create_model("gfnet_h_ti", **{**SIZE, **args})


@pytest.fixture
def gfnet() -> GFNet:
    return randomised(tiny()).eval()


def test_logits_equal_the_authors(tmp_path):
    golden = read("gfnet_h_ti_224")
    torch.save({"model": golden.state}, tmp_path / "gfnet-h-ti.pth")
    model = riformer.load(convert(tmp_path / "gfnet-h-ti.pth", tmp_path / "ours"))
    with torch.no_grad():
        assert_near(model(golden.images), golden.logits, 1e-9)
        assert_near(model.float()(golden.images.float()), golden.logits, 1e-4)
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    with torch.no_grad():
        assert_near(again(golden.images.float()), golden.logits, 1e-4)


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_parameters_and_filters_of_each_size(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMS[name]
    shapes = [tuple(stage[0].filter.complex_weight.shape[:2]) for stage in model.blocks]
    assert shapes == [(56, 29), (28, 15), (14, 8), (7, 4)]
    assert identify(model.state_dict()) == (name, {})
    assert set(GFNETS) == set(NUM_PARAMS) == set(timm.list_models("gfnet_*"))


@pytest.mark.parametrize("size", [(96, 96), (48, 80), (64, 32)])
def test_another_resolution_resamples_the_same_in_the_pass_and_on_loading(gfnet, size):
    x = images(2, 3, *size)
    other = tiny(img_size=size).eval()
    other.load_state_dict(fit_state({"model": gfnet.state_dict()}, other))
    assert_close(gfnet(x), other(x))
    assert gfnet.forward_features(x).shape == (2, 32, size[0] // 32, size[1] // 32)
    assert not torch.equal(other.pos_embed, gfnet.pos_embed[:, : other.pos_embed.shape[1]])


def test_a_resampled_filter_keeps_its_corners(gfnet):
    other = tiny(img_size=128)
    state = fit_state(gfnet.state_dict(), other)
    before, after = (s["blocks.0.0.filter.complex_weight"] for s in (gfnet.state_dict(), state))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert_close(after[corner], before[corner])


def test_a_checkpoint_of_another_resolution_is_told_from_its_shapes(gfnet, tmp_path):
    with torch.device("meta"):
        state = timm.create_model("gfnet_h_s", img_size=(256, 192), num_classes=3, in_chans=1).state_dict()
    args = {"img_size": (256, 192), "num_classes": 3, "in_chans": 1}
    assert identify(state) == ("gfnet_h_s", args)
    riformer.save(gfnet, tmp_path / "tiny")
    assert_close(riformer.load(tmp_path / "tiny").state_dict(), gfnet.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"no variant has depths \(1, 2, 1, 1\)"):
        identify(gfnet.state_dict())


def test_the_filter_is_computed_in_float32_under_autocast_and_in_a_bf16_model(gfnet):
    x = images(2, 16, 16, 8)
    mixer = gfnet.blocks[0][0].filter
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(mixer(x), mixer(x.float()), rtol=0, atol=0)
    rounded = gfnet.to(torch.bfloat16)(images().to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert rounded.isfinite().all()


def test_every_parameter_gets_a_gradient(gfnet):
    gfnet.train()(images()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in gfnet.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.abs().max() > 0] == []


def test_layer_groups_cover_every_parameter_in_order(gfnet):
    groups = timm.models.group_parameters(gfnet, gfnet.group_matcher(), reverse=True)
    assert groups.keys() == dict(gfnet.named_parameters()).keys()
    assert groups["pos_embed"] == groups["patch_embed.0.proj.weight"] == 0
    order = ["blocks.0.0.gamma", "blocks.1.0.gamma", "blocks.1.1.gamma", "blocks.3.0.gamma", "norm.weight"]
    assert [groups[name] for name in order] == [1, 2, 3, 5, 5]
    assert groups["patch_embed.1.proj.bias"] == groups["blocks.1.0.gamma"]


def in_onnx(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@torch.no_grad()
def in_openvino(model: torch.nn.Module, x: torch.Tensor, folder: Path) -> torch.Tensor:
    converted = openvino.convert_model(model, example_input=x)  # by tracing: from torch.export it knows no FFT
    with same_signal_stack():
        compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(x.numpy())[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("export", [in_onnx, in_openvino])
def test_exports_compute_the_same(gfnet, export: Callable, tmp_path):
    x = images()
    with torch.no_grad():
        assert_near(export(gfnet, x, tmp_path), gfnet(x).double(), 1e-5)


def test_another_number_of_stages_is_refused():
    with pytest.raises(ValueError, match=r"depths \(1, 1\) and dims \(8,\)"):
        GFNet(depths=(1, 1), dims=(8,))
