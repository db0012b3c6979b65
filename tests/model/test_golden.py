"""Parity with the reference implementations, from a checkpoint file of theirs to our logits."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from golden.golden import checkpoint, image, spec_of
from timm.models.metaformer import checkpoint_filter_fn

import riformer
from riformer.model.weights import convert

FOLDER = Path(__file__).parents[1] / "golden"
PRECISIONS = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 1e-4, id="float32")]


def read(name: str) -> SimpleNamespace:
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    state = {key: torch.from_numpy(value) for key, value in checkpoint(spec_of(arrays)).items()}
    return SimpleNamespace(
        state=state,
        images=torch.from_numpy(image(tuple(arrays["input_shape"]))),
        **{key: torch.from_numpy(array) for key, array in arrays.items() if array.dtype == np.float64},
    )


@pytest.fixture(scope="module", params=["riformer_s12_224", "riformer_s24_96x160"])
def golden(request, tmp_path_factory):
    """A golden file, and the float64 model that comes out of its checkpoint in mmpretrain's layout."""
    golden = read(request.param)
    golden.model = converted(golden.state, tmp_path_factory.mktemp(request.param))
    return golden


@pytest.fixture(scope="module")
def s12():
    return read("riformer_s12_224")


@pytest.fixture(scope="module")
def pooling():
    return read("poolformer_s12_224")


def converted(state: dict, tmp_path: Path, **args) -> riformer.MetaFormer:
    """The model that comes out of a checkpoint file with this state dict."""
    source = tmp_path / "foreign.pth"
    torch.save({"state_dict": state, "meta": {"epoch": 600}}, source)
    return riformer.load(convert(source, tmp_path / "ours.safetensors", **args))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=tolerance)


def assert_parity(model: riformer.MetaFormer, golden: SimpleNamespace, tolerance: float) -> None:
    with torch.no_grad():
        last, stages = model.forward_intermediates(golden.images.to(model.stem.conv.weight.dtype))
        logits = model.forward_head(last)
    assert len(stages) == 4
    for i, stage in enumerate(stages):
        assert_near(stage.mean((2, 3)), getattr(golden, f"stage{i}"), tolerance)
        assert_near(stage[..., 0, 0], getattr(golden, f"corner{i}"), tolerance)
    assert_near(logits, golden.logits, tolerance)
    assert_near(logits, golden.deploy_logits, tolerance)


def deploy_layout(state: dict) -> dict:
    """mmpretrain's inference form of its training form, written down here a second time."""
    deploy = {key: value for key, value in state.items() if ".token_mixer." not in key and ".norm1." not in key}
    for key in state:
        if key.endswith(".token_mixer.affine.weight"):
            block = key.removesuffix(".token_mixer.affine.weight")
            gain, shift = state[key].flatten() - 1, state[f"{block}.token_mixer.affine.bias"]
            deploy[f"{block}.norm_reparam.weight"] = state[f"{block}.norm1.weight"] * gain
            deploy[f"{block}.norm_reparam.bias"] = state[f"{block}.norm1.bias"] * gain + shift
    return deploy


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("form", [deepcopy, riformer.fuse, riformer.fold], ids=["training form", "fuse", "fold"])
def test_every_form(golden, form, dtype, tolerance):
    assert_parity(form(golden.model).to(dtype), golden, tolerance)


def test_deploy_checkpoint(s12, tmp_path):
    model = converted(deploy_layout(s12.state), tmp_path)
    assert not any("token_mixer" in key for key in model.state_dict())
    assert_parity(model, s12, 1e-9)
    in_timm = timm.create_model("riformer_s12", mixer="identity", checkpoint_path=tmp_path / "ours.safetensors")
    assert_parity(in_timm.eval(), s12, 1e-4)


def test_float32_checkpoint(s12, tmp_path):
    model = converted({key: value.float() for key, value in s12.state.items()}, tmp_path)
    assert model.stem.conv.weight.dtype == torch.float32
    assert_parity(model, s12, 1e-4)
    in_timm = timm.create_model("riformer_s12", checkpoint_path=tmp_path / "ours.safetensors").eval()
    torch.testing.assert_close(in_timm.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["mmpretrain", "authors", "timm"])
def test_poolformer(pooling, layout, tmp_path):
    state = pooling.state
    if layout != "mmpretrain":
        state = {k.removeprefix("backbone.").replace("norm6.", "norm."): v for k, v in state.items()}
        state = {key.replace("head.fc.", "head."): value for key, value in state.items()}
    if layout == "timm":
        with torch.device("meta"):
            state = checkpoint_filter_fn(state, timm.create_model("poolformer_s12"))
    # timm's keys do not say whether a network without mixer weights is a PoolFormer
    model = converted(state, tmp_path, **({"form": "poolformer"} if layout == "timm" else {}))
    with torch.no_grad():
        assert_near(model(pooling.images), pooling.logits, 1e-9)
        assert_near(model.float()(pooling.images.float()), pooling.logits, 1e-4)


def test_wrong_architecture_writes_nothing(tmp_path):
    with np.load(FOLDER / "riformer_s24_96x160.npz") as arrays:
        state = {key: torch.zeros(()).expand(shape) for key, shape in spec_of(arrays)}
    with pytest.raises(ValueError, match=r"unexpected: stages\.2\.blocks\.11\.mlp\.fc2\.weight \(320, 1280, 1, 1\)"):
        converted(state, tmp_path, model_name="riformer_s12")
    with pytest.raises(ValueError, match=r"missing: conv1\.weight \(64, 3, 7, 7\)"):
        converted(state, tmp_path, model_name="resnet18")
    with pytest.raises(ValueError, match=r"'riformer_s13' is unknown; did you mean one of .*riformer_s12"):
        converted(state, tmp_path, model_name="riformer_s13")
    deploy = {key: value for key, value in state.items() if ".token_mixer." not in key}
    with pytest.raises(ValueError, match=r"resnet18 cannot be built with .*mixer"):
        converted(deploy, tmp_path, model_name="resnet18")
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.pth"]
