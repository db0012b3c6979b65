"""The models in timm's tools: feature maps of every form, layer-wise learning rates, heads, devices, TorchScript.

timm's own tests of its models are run by `make timm-tests`.
"""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from tiny import SIZE, images, randomised, tiny
from torch import nn
from torch.testing import assert_close

import riformer
from riformer.model.mixers import MIXERS

FORMS = {
    "training": dict(),
    "fused": dict(mixer="identity"),
    "folded": dict(mixer="identity", layer_scale_init=0),
}


def tiny_gfnet(**args) -> nn.Module:
    return timm.create_model("gfnet_h_ti", **{**SIZE, **args})


@pytest.fixture(params=[tiny, tiny_gfnet], ids=["riformer", "gfnet"])
def build(request):
    return request.param


@pytest.fixture
def model(build):
    return randomised(build()).eval()


# feature maps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_four_maps_with_strides_4_to_32_in_every_form(form, size):
    extractor = tiny(features_only=True, **FORMS[form])
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]
    assert extractor.feature_info.channels() == list(SIZE["dims"])
    maps = extractor(images(2, 3, *size))
    assert [x.shape for x in maps] == [(2, dim, size[0] >> i, size[1] >> i) for i, dim in enumerate(SIZE["dims"], 2)]


def test_the_paper_sizes_have_four_maps():
    for name in timm.list_models(["riformer_[sm][0-9]*", "gfnet_h_*"]):
        extractor = timm.create_model(name, features_only=True, device="meta")
        maps = extractor(torch.empty(1, 3, 224, 224, device="meta"))
        assert [224 // x.shape[-1] for x in maps] == extractor.feature_info.reduction() == [4, 8, 16, 32]
        assert [x.shape[1] for x in maps] == extractor.feature_info.channels()


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_have_the_same_maps(form, tmp_path):
    trained = randomised(tiny()).eval()
    expected = trained.forward_intermediates(images(), intermediates_only=True)
    saved = {"training": copy.deepcopy, "fused": riformer.fuse, "folded": riformer.fold}[form](trained)
    riformer.save(saved, tmp_path / "model")
    extractor = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True).eval()
    assert any("token_mixer" in key for key in extractor.state_dict()) == (form == "training")
    assert any("layer_scale" in key for key in extractor.state_dict()) == (form != "folded")
    assert_close(extractor(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2)])
def test_timms_reparameterize_fuses_a_feature_extractor(out_indices):
    extractor = randomised(tiny(features_only=True, out_indices=out_indices)).double().eval()
    fused = reparameterize_model(extractor)
    x = images(dtype=torch.float64)
    assert_close(fused(x), extractor(x), rtol=0, atol=1e-12)
    deploy = tiny(features_only=True, out_indices=out_indices, mixer="identity").double()
    deploy.load_state_dict(fused.state_dict())
    assert_close(deploy(x), fused(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"not FeatureGetterNet: .*reparameterize_model"):
        riformer.fuse(extractor)


def test_grad_checkpointing_of_a_feature_extractor_gives_the_same_gradients(build):
    gradients = []
    for enable in (False, True):
        extractor = randomised(build(features_only=True)).train()
        extractor.model.set_grad_checkpointing(enable)
        sum(x.square().mean() for x in extractor(images())).backward()
        gradients.append({key: p.grad for key, p in extractor.named_parameters()})
    assert None not in gradients[0].values()
    assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


def test_an_early_stop_ends_at_its_map(model):
    x = images()
    for norm in (False, True):
        last, maps = model.forward_intermediates(x, [1], stop_early=True, norm=norm)
        assert_close(last, maps[0], rtol=0, atol=0)
        assert_close(last, model.forward_intermediates(x, [1], intermediates_only=True)[0], rtol=0, atol=0)


# layer-wise learning rates


def reached(model: nn.Module) -> list[str]:
    """Names of the modules in the order in which the forward pass comes to them."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
    ]
    model(images())
    for hook in hooks:
        hook.remove()
    return names


def test_layer_decay_in_timms_optimizer(model):
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75).param_groups
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of) == len(list(model.parameters()))
    parameters = dict(model.named_parameters())
    scales = {name: group_of[id(parameter)]["lr_scale"] for name, parameter in parameters.items()}
    decays = {name: group_of[id(parameter)]["weight_decay"] for name, parameter in parameters.items()}

    direct = [[key for key, _ in model.get_submodule(name).named_parameters(name, False)] for name in reached(model)]
    in_order = [scales[key] for keys in direct for key in keys if key != "pos_embed"]
    assert in_order == sorted(in_order)
    layers = 1 + sum(SIZE["depths"]) + 1
    assert sorted(set(in_order)) == [0.75**i for i in reversed(range(layers))]
    stem, classifier = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    assert scales[f"{stem}.weight"] == scales.get("pos_embed", in_order[0]) == in_order[0]
    assert scales[f"{classifier}.weight"] == 1

    plain = {name for name, decay in decays.items() if decay == 0}
    assert set(decays.values()) == {0, 0.05}
    assert plain == {name for name, parameter in parameters.items() if parameter.ndim == 1 or name == "pos_embed"}
    for kind in ("norm1.weight", "norm2.bias", "head.bias", "head.fc.bias", "token_mixer.weight", "layer_scale1.scale"):
        assert {name for name in parameters if name.endswith(kind)} <= plain


# heads


@pytest.mark.parametrize("global_pool", ["avg", "max"])
def test_a_new_classifier_keeps_the_rest(build, global_pool):
    model, x = randomised(build(global_pool=global_pool)).eval(), images()
    classifier = model.pretrained_cfg["classifier"]
    before, pooled = copy.deepcopy(model.state_dict()), model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    after = model.state_dict()
    assert model.num_classes == model(x).shape[1] == 7
    assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled, rtol=0, atol=0)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        f"{classifier}.weight",
        f"{classifier}.bias",
    }
    assert after[f"{classifier}.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert after[f"{classifier}.bias"].abs().max() == 0
    model.reset_classifier(0)
    assert_close(model(x), pooled, rtol=0, atol=0)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    with pytest.raises(ValueError, match="'catavgmax', which changes the width"):
        model.reset_classifier(7, "catavgmax")


def test_a_new_classifier_is_trainable_and_a_frozen_backbone_stays_frozen(model):
    model.requires_grad_(False).train().to(torch.bfloat16)
    model.reset_classifier(3)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{model.pretrained_cfg['classifier']}.{kind}" for kind in ("weight", "bias")}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {module.training for module in model.modules()} == {True}


# where and how wide


def test_device_and_dtype_are_arguments_of_create_model(build):
    on_meta = build(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in on_meta.parameters()} == {("meta", torch.bfloat16)}
    assert {p.device.type for p in build().parameters()} == {"cpu"}
    with torch.device("meta"):
        assert {p.device.type for p in build().parameters()} == {"meta"}


# TorchScript; the two mixers that check their grid compare tuples, which it cannot


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("size", [(64, 64), (96, 70)])
@pytest.mark.parametrize("mixer", [name for name in MIXERS if "matrix" not in name] + ["gfnet"])
def test_torchscript(mixer, size, monkeypatch):
    """With a store of types of its own: torch.jit keeps those of modules that others recorded in the same process."""
    monkeypatch.setattr(torch.jit._recursive, "concrete_type_store", torch.jit._recursive.ConcreteTypeStore())
    model = randomised(tiny_gfnet() if mixer == "gfnet" else tiny(mixer=mixer)).eval()
    x = images(2, 3, *size)
    assert_close(torch.jit.script(model)(x), model(x))
