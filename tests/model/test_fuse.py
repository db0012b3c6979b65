"""The fuse and the fold are exact, and the tests would notice if they were not."""

from collections import OrderedDict
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from timm.utils import ModelEmaV3, reparameterize_model
from tiny import SIZE, images, randomised, tiny
from torch import nn
from torch.nn.utils.prune import random_unstructured

import riformer
from riformer.distill.taps import tap
from riformer.model.fuse import deploy_form
from riformer.model.mixers import MIXERS, Affine, Identity
from riformer.model.variants import VARIANTS

FUSIBLE = [name for name, mixer in MIXERS.items() if hasattr(mixer, "fold_into")]
TRANSFORMS = [riformer.fuse, reparameterize_model, riformer.fold]
PRECISIONS = [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]


def difference(actual: nn.Module, expected: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of the logits, relative to the largest logit."""
    with torch.no_grad():
        logits = expected.eval()(x)
        return ((actual.eval()(x) - logits).abs().max() / logits.abs().max()).item()


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_something_is_fusible():
    assert "affine" in FUSIBLE


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mixer", FUSIBLE)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_exact(transform, mixer, dtype, tolerance):
    model = randomised(tiny(mixer=mixer)).to(dtype)
    assert difference(transform(model), model, images(dtype=dtype)) < tolerance


@pytest.mark.parametrize("mixer", FUSIBLE)
@pytest.mark.parametrize("size", ["riformer_s12", pytest.param("riformer_m36", marks=pytest.mark.slow)])
def test_exact_at_real_size(size, mixer):
    model = randomised(timm.create_model(size, mixer=mixer))
    x = images(1, 3, 64, 64)
    fused, folded = riformer.fuse(model), riformer.fold(model)
    assert difference(fused, model, x) < 1e-5
    assert difference(folded, model, x) < 1e-5
    model, x = model.double(), x.double()
    assert difference(riformer.fuse(model), model, x) < 1e-12
    assert difference(riformer.fold(model), model, x) < 1e-12


WRONG_ALGEBRA = {
    'no "-1"': lambda mixer, norm: (norm.weight * mixer.weight, norm.bias * mixer.weight + mixer.bias),
    "dropped bias": lambda mixer, norm: (norm.weight * (mixer.weight - 1), norm.bias * (mixer.weight - 1)),
    "dropped mixer": lambda mixer, norm: (norm.weight, norm.bias),
    "dropped norm": lambda mixer, norm: (mixer.weight - 1, mixer.bias),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wrong", WRONG_ALGEBRA)
def test_negative_control(transform, wrong, monkeypatch):
    model = randomised(tiny()).double()
    transform(model)
    monkeypatch.setattr(Affine, "fold_into", WRONG_ALGEBRA[wrong])
    with pytest.raises(ValueError, match="Affine cannot be merged: the result differs by"):
        transform(model)


@pytest.mark.parametrize("scale", ["layer_scale1", "layer_scale2"])
def test_negative_control_of_the_fold(scale):
    model = randomised(tiny()).double()
    wrong = deepcopy(model)
    nn.init.ones_(getattr(wrong.stages[3].blocks[0], scale).scale)
    assert difference(riformer.fold(wrong), model, images(dtype=torch.float64)) > 1e-2


@pytest.mark.parametrize("transform", [riformer.fuse, riformer.fold])
def test_idempotent(transform):
    once = transform(randomised(tiny()))
    twice = transform(once)
    assert twice is not once
    assert str(twice) == str(once)
    torch.testing.assert_close(dict(twice.state_dict()), dict(once.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("training", [True, False])
def test_argument_untouched(transform, training):
    model = randomised(tiny()).train(training)
    before, text, x = deepcopy(model.state_dict()), str(model), images()
    fused = transform(model)
    assert str(model) == text
    assert {module.training for module in model.modules()} == {training}
    assert {module.training for module in fused.modules()} == {training}
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model(x).isfinite().all()


def test_a_block_fuses_into_a_new_block():
    block = randomised(tiny()).eval().stages[1].blocks[0]
    before, x = deepcopy(block), images(2, 16, 8, 8)
    fused = block.fuse()
    torch.testing.assert_close(fused(x), block(x))
    assert str(block) == str(before)
    torch.testing.assert_close(dict(block.state_dict()), dict(before.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_affine_left(transform):
    fused = transform(tiny())
    mixers = [block.token_mixer for stage in fused.stages for block in stage.blocks]
    assert [type(mixer) for mixer in mixers] == [Identity] * sum(SIZE["depths"])


class DataParallelLike(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("transform", [riformer.fuse, riformer.fold])
@pytest.mark.parametrize("wrap", [DataParallelLike, torch.compile, ModelEmaV3, lambda model: model.stages[0].blocks[0]])
def test_wrapped_models_are_refused(transform, wrap):
    with pytest.raises(ValueError, match=rf"{transform.__name__} takes a MetaFormer, not \w+: unwrap it first"):
        transform(wrap(tiny()))


def test_fuse_keeps_token_mixers():
    model = randomised(tiny(mixer=("pooling", "affine", "attention", "identity"))).double()
    fused = riformer.fuse(model)
    assert [type(stage.blocks[0].token_mixer).__name__ for stage in fused.stages] == [
        "Pooling", "Identity", "Attention", "Identity",
    ]  # fmt: skip
    assert difference(fused, model, images(dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("mixer", ["pooling", ("affine", "affine", "affine", "attention")])
def test_fold_refuses_token_mixers(mixer):
    model = tiny(mixer=mixer)
    before = str(model)
    with pytest.raises(ValueError, match=r"fold: stages\.[03]\.blocks\.0 has a (Pooling|Attention) mixer"):
        riformer.fold(model)
    assert str(model) == before


def test_folded_form_is_the_one_without_layer_scales():
    folded = riformer.fold(tiny())
    assert folded.state_dict().keys() == tiny(mixer="identity", layer_scale_init=0).state_dict().keys()


def test_parameter_counts():
    per_channel = sum(depth * dim for depth, dim in zip(SIZE["depths"], SIZE["dims"], strict=True))
    model = tiny()
    assert num_params(riformer.fuse(model)) == num_params(model) - 2 * per_channel
    assert num_params(riformer.fold(model)) == num_params(model) - 4 * per_channel


@pytest.mark.parametrize("name", VARIANTS)
def test_works_on_the_meta_device(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        deploy = timm.create_model(name, mixer="identity")
    assert num_params(riformer.fuse(model)) == num_params(deploy)


# modules that a user changed


def parametrised(norm: str, part: str) -> nn.Module:
    """A network whose `part` of each block computes its weight."""
    parametrisation = getattr(nn.utils.parametrizations, norm)
    model = randomised(tiny()).double().eval()
    for stage in model.stages:
        for block in stage.blocks:
            module = block.get_submodule(part)
            if norm == "spectral_norm" and module.weight.ndim == 1:
                nn.utils.parametrize.register_parametrization(module, "weight", Halved())
            else:
                parametrisation(module, "weight")
    return model


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("part", ["norm1", "norm2", "token_mixer", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_computed_weights_become_plain(transform, part, norm, training):
    model, x = parametrised(norm, part), images(dtype=torch.float64)
    expected, state = model(x), deepcopy(model.state_dict())
    fused = transform(model.train(training))
    assert {module.training for module in fused.modules()} == {training}
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)
    assert difference(fused, model, x) < 1e-12
    plain = tiny(mixer="identity", layer_scale_init=0 if transform is riformer.fold else 1)
    assert fused.state_dict().keys() == plain.state_dict().keys()


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward, before": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "pruning": lambda module: random_unstructured(module, "weight", 0.5),
    "old weight norm": lambda module: nn.utils.weight_norm(module, "weight"),
    "own forward": lambda module: setattr(module, "forward", lambda x: x),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("part", ["norm1", "token_mixer", "mlp.fc2"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_refused(transform, part, hook):
    if transform is reparameterize_model:  # in place: copying is what torch refuses of weights that hooks compute
        transform = partial(reparameterize_model, inplace=True)
    model = tiny()
    HOOKS[hook](model.get_submodule(f"stages.1.blocks.0.{part}"))
    with pytest.raises(ValueError, match=rf"{part} has hooks or a replaced forward"):
        transform(model)


def test_a_fuse_inside_a_tap_is_refused():
    model = tiny()
    refused = pytest.raises(ValueError, match=r"token_mixer has hooks .* fuse outside of `tap`")
    with tap(model, ["stages.0.blocks.0.token_mixer"]), refused:
        riformer.fuse(model)
    riformer.fuse(model)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_another_norm_is_refused(transform):
    for norm in (nn.BatchNorm2d(8), nn.GroupNorm(1, 8, affine=False)):
        model = tiny()
        model.stages[0].blocks[0].norm1 = norm
        with pytest.raises(ValueError, match=r"only an nn\.GroupNorm with weight and bias"):
            transform(model)


class Shifting(Affine):
    """An affine by its class that is not one: `fold_into` cannot know."""

    def forward(self, y):
        return super().forward(y.roll(1, dims=-1))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_mixer_that_is_not_what_it_folds_into_is_refused(transform):
    model = randomised(tiny())
    mixer = Shifting(16, (8, 8))
    mixer.load_state_dict(model.stages[1].blocks[1].token_mixer.state_dict())
    model.stages[1].blocks[1].token_mixer = mixer
    with pytest.raises(ValueError, match="Shifting cannot be merged: the result differs"):
        transform(model)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_mlp_that_scales_otherwise_is_refused_by_the_fold(transform):
    model = randomised(tiny())
    model.stages[1].blocks[1].mlp = nn.Sequential(OrderedDict(model.stages[1].blocks[1].mlp.named_children()))
    if transform is riformer.fold:  # the same modules, without GELU: linear, so that the scale still passes
        assert difference(transform(model), model, images()) < 1e-5
        model.stages[1].blocks[1].mlp.append(nn.Tanh())
        with pytest.raises(ValueError, match="LayerScale cannot be merged"):
            transform(model)
    else:
        assert difference(transform(model), model, images()) < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tied_parts(transform):
    model = randomised(tiny(depths=(1, 3, 1, 1))).double()
    blocks = model.stages[1].blocks
    blocks[0].norm2 = blocks[0].norm1  # within a block
    blocks[1].norm1 = blocks[0].norm1  # over blocks with different affines
    blocks[1].mlp = blocks[0].mlp
    blocks[2] = blocks[1]  # a block twice
    assert difference(transform(model), model, images(dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(transform, dtype, tolerance):
    model = randomised(tiny()).to(dtype)
    fused = transform(model)
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    assert difference(fused.float(), model.float(), images()) < tolerance


def test_weights_that_are_not_finite_are_refused():
    model = tiny()
    nn.init.constant_(model.stages[1].blocks[0].norm1.weight, float("nan"))
    with pytest.raises(ValueError, match="Affine cannot be merged: the result differs by nan"):
        riformer.fuse(model)


def test_a_fuse_that_leaves_mixers_says_so(caplog):
    riformer.fuse(tiny(mixer=("pooling", "affine", "attention", "identity")))
    assert "2 of 5 blocks keep their token mixer (pooling, attention)" in caplog.text
    caplog.clear()
    deploy_form(tiny(mixer="pooling"))  # what evaluation and teachers use for any network
    reparameterize_model(tiny(mixer="pooling"))
    riformer.fuse(tiny())
    assert not caplog.records


def test_the_other_order_of_the_head_survives():
    model = randomised(tiny(pool_first=True)).double()
    official = tiny(pool_first=False).double()
    official.load_state_dict(model.state_dict())
    x = images(dtype=torch.float64)
    assert difference(official, model, x) > 1e-2
    for transform in TRANSFORMS:
        assert difference(transform(model), model, x) < 1e-12
    torch.jit.script(model)
