"""The fuse and the fold are exact, and the tests would notice if they were not."""

from copy import deepcopy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3, reparameterize_model
from tiny import SIZE, images, randomised, tiny
from torch import nn

import riformer
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
@pytest.mark.parametrize("size", ["riformer_s12", "riformer_m36"])
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
