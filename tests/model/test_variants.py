"""The five sizes as timm sees them."""

import re

import pytest
import timm
import torch
from tiny import randomised

import riformer
from riformer.model.variants import VARIANTS

NUM_PARAMS = {  # training form, deploy form
    "riformer_s12": (11_921_832, 11_915_176),
    "riformer_s24": (21_402_280, 21_388_968),
    "riformer_s36": (30_882_728, 30_862_760),
    "riformer_m36": (56_199_016, 56_172_520),
    "riformer_m48": (73_508_776, 73_473_448),
}


def on_meta(name: str, **args) -> riformer.MetaFormer:
    with torch.device("meta"):
        return timm.create_model(name, **args)


def num_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_parameter_counts(name):
    model = on_meta(name)
    training, deploy = NUM_PARAMS[name]
    assert num_params(model) == training
    assert num_params(riformer.fuse(model)) == deploy
    assert num_params(on_meta(name, mixer="identity")) == num_params(on_meta(name, mixer="pooling")) == deploy


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_first_layer_scale(name):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    expected = torch.full((model.num_features,), 1e-5 if name in ("riformer_s12", "riformer_s24") else 1e-6)
    torch.testing.assert_close(model.stages[3].blocks[0].layer_scale2.scale.detach(), expected, rtol=1e-6, atol=0)


def test_listed_in_timm():
    assert set(timm.list_models("riformer_*")) == set(VARIANTS) == set(NUM_PARAMS) | {"riformer_micro", "riformer_mini"}
    assert set(timm.list_pretrained("riformer_*")) == {
        f"{name}.mmpretrain_in1k{size}" for name in NUM_PARAMS for size in ("", "_384")
    }
    assert timm.is_model("riformer_s12")


@pytest.mark.parametrize("name", NUM_PARAMS)
@pytest.mark.parametrize(("tag", "img_size"), [("mmpretrain_in1k", 224), ("mmpretrain_in1k_384", 384)])
def test_pretrained_cfg(name, tag, img_size):
    model = on_meta(f"{name}.{tag}")
    cfg = model.pretrained_cfg
    assert cfg["tag"] == tag
    assert cfg["input_size"] == (3, img_size, img_size)
    assert cfg["pool_size"] == (img_size // 32, img_size // 32)
    assert cfg["crop_pct"] == (0.949 if "_m" in name else 0.9)
    assert cfg["interpolation"] == "bicubic"
    size = name.removeprefix("riformer_")
    assert re.search(
        rf"/riformer-{size}_32xb128_in1k{'-384px' if img_size == 384 else ''}_\d{{8}}-[0-9a-f]{{8}}\.pth$", cfg["url"]
    )
    keys = model.state_dict().keys()
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= keys
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"]) == (cfg["input_size"], cfg["crop_pct"])


@pytest.mark.parametrize(("num_classes", "in_chans"), [(1000, 3), (7, 3), (1000, 1)])
def test_pretrained_weights_come_through_the_key_map(num_classes, in_chans, tmp_path):
    source = randomised(timm.create_model("riformer_s12"))
    state = {}
    for key, value in source.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj", key)
        key = key.replace("stem.conv", "patch_embed.proj").replace("head.norm", "norm6")
        key = re.sub(r"layer_scale([12])\.scale", r"layer_scale_\1", key).replace("token_mixer.", "token_mixer.affine.")
        value = value[:, None, None, None] if key.endswith("affine.weight") else value
        state[key if key.startswith("head.") else f"backbone.{key}"] = value
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "zoo.pth")
    overlay = dict(file=str(tmp_path / "zoo.pth"))
    args = dict(num_classes=num_classes, in_chans=in_chans, pretrained_cfg_overlay=overlay)
    model = timm.create_model("riformer_s12", pretrained=True, **args)
    expected = source.state_dict()
    replaced = {"head.fc.weight", "head.fc.bias"} if num_classes == 7 else set()
    if in_chans == 1:
        replaced.add("stem.conv.weight")
        torch.testing.assert_close(model.stem.conv.weight, expected["stem.conv.weight"].sum(1, keepdim=True))
    kept = {key: value for key, value in model.state_dict().items() if key not in replaced}
    torch.testing.assert_close(kept, {key: expected[key] for key in kept}, rtol=0, atol=0)
    assert len(kept) == len(expected) - len(replaced)


def test_any_argument_may_be_given():
    model = on_meta("riformer_m36", depths=(1, 1), dims=(8, 16), mixer=("pooling", "attention"), num_classes=3)
    assert [type(stage.blocks[0].token_mixer).__name__ for stage in model.stages] == ["Pooling", "Attention"]
    assert model.get_classifier().out_features == 3


@pytest.mark.parametrize("mixer", ["token_matrix", "global_filter"])
def test_the_small_sizes_are_built_for_their_own_images(mixer):
    for name, size in (("riformer_micro", 16), ("riformer_mini", 32)):
        model = timm.create_model(name, mixer=mixer, num_classes=3)
        assert model.pretrained_cfg["input_size"] == (3, size, size)
        assert model(torch.randn(1, 3, size, size)).shape == (1, 3)


def test_an_image_size_given_is_noted_on_the_model():
    model = timm.create_model("riformer_micro", img_size=24)
    assert model.pretrained_cfg["input_size"] == (3, 24, 24)
