"""Counted costs against the published ones."""

import pytest
import timm
import torch
from tiny import tiny
from torch import nn

import riformer
from riformer.measure.cost import count_macs, count_params

PUBLISHED_GMACS = {  # at 224 and 384 px
    "riformer_s12": (1.822, 5.355),
    "riformer_s24": (3.412, 10.028),
    "riformer_s36": (5.003, 14.702),
    "riformer_m36": (8.801, 25.865),
    "riformer_m48": (11.59, 34.06),
}


@pytest.mark.parametrize("name", PUBLISHED_GMACS)
def test_published_macs(name):
    with torch.device("meta"):
        model = timm.create_model(name, mixer="identity")
    for img_size, published in zip((224, 384), PUBLISHED_GMACS[name], strict=True):
        assert count_macs(model, img_size) / 1e9 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "gmacs"),  # of torchvision's and the models' authors' tables, which count no norms
    [("resnet50", 4.09), ("test_vit", None), ("deit_tiny_patch16_224", 1.258), ("swin_tiny_patch4_window7_224", 4.5)],
)
def test_other_models(name, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    macs = count_macs(model, model.pretrained_cfg["input_size"])
    assert macs > 0
    if gmacs:
        assert macs / 1e9 == pytest.approx(gmacs, rel=0.03)


def test_by_hand():
    assert count_macs(nn.Conv2d(3, 8, 3, padding=1), 10) == 3 * 3 * 3 * 8 * 100
    assert count_macs(nn.GroupNorm(1, 3), 10) == 5 * 3 * 100
    assert count_macs(nn.BatchNorm2d(3), 10) == 5 * 3 * 100
    assert count_macs(nn.LayerNorm(20), (3, 10, 20)) == 5 * 3 * 200
    assert count_macs(nn.Linear(16, 5), (3, 8, 16)) == 3 * 8 * 16 * 5


def test_attention_and_fft():
    tokens, dim = 16 * 16, 8
    plain = count_macs(tiny(depths=(1,), dims=(dim,), mixer="identity"), 64)
    attention = count_macs(tiny(depths=(1,), dims=(dim,), mixer="attention"), 64)
    filtered = count_macs(tiny(depths=(1,), dims=(dim,), mixer="global_filter"), 64)
    assert attention - plain == tokens * 4 * dim * dim + 2 * tokens * tokens * dim
    assert filtered - plain == 2 * 2.5 * dim * tokens * 8 / 2  # two transforms, log2(256) = 8


def test_forms_cost_the_same_on_paper():
    model = tiny()
    assert count_macs(model, 64) == count_macs(riformer.fuse(model), 64) == count_macs(riformer.fold(model), 64)


def test_shapes():
    model = tiny(in_chans=4)
    assert count_macs(model, 64) == count_macs(model, (64, 64)) == count_macs(model, [4, 64, 64])
    assert count_macs(model, (64, 128)) > count_macs(model, 64)


def test_the_model_stays_as_it_is():
    model = timm.create_model("test_resnet").train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    count_macs(model, 64)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes


def test_count_params():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].weight.requires_grad_(False)
    assert count_params(model) == 3 * 4 + 4 + 4 + 4
