"""Training that starts from other weights: a deploy form is a start that computes the same from the first step."""

import pytest
import timm
import torch
from tiny import images, randomised, tiny

import riformer
from riformer import cli
from riformer.distill.teachers import open_model
from riformer.model.start import start_at, start_from
from riformer.model.weights import load, save

DEPLOYED = {"deploy": riformer.fuse, "folded": riformer.fold}


@pytest.mark.parametrize("form", DEPLOYED)
@pytest.mark.parametrize("start", [start_at, start_from])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_deploy_form_is_a_start_with_the_same_function(form, start, dtype, tolerance, tmp_path, caplog):
    trained = randomised(tiny()).to(dtype).eval()
    published = open_model(str(save(DEPLOYED[form](trained), tmp_path / "published")))
    model = randomised(tiny(), seed=3).to(dtype).eval()
    x = images(dtype=dtype)
    assert (model(x) - trained(x)).abs().max() > 0.1
    start(model, published) if start is start_from else start(model, published, "published")
    torch.testing.assert_close(model(x), published(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x), trained(x), rtol=tolerance, atol=tolerance * 10)
    assert model.mixers == ["affine"] * 5
    assert not caplog.records


def test_the_start_of_a_run_may_be_published(tmp_path):
    args = dict(depths=(1, 1), dims=(8, 8), stem_patch=2, stem_stride=2, img_size=8, num_classes=10)
    save(riformer.fuse(randomised(timm.create_model("riformer_micro", **args))), tmp_path / "published")
    sizes = ["--model.depths", "[1,1]", "--model.dims", "[8,8]", "--model.stem_patch", "2", "--model.stem_stride", "2"]
    recipe = ["--data.name", "digits", "--data.img_size", "8", "--optim.epochs", "1", "--optim.warmup_epochs", "0"]
    recipe += ["--distill.logit_teacher", "", "--distill.module_teacher", "", "--distill.start_from_teacher", "false"]
    recipe += ["--distill.label_weight", "1", "--distill.soft_weight", "0", "--distill.schedule", "constant"]
    recipe += [f"--distill.{term}_weight=0" for term in ("block", "mixer", "relation")]
    start = ["--model.start", str(tmp_path / "published"), "--out", str(tmp_path / "run")]
    assert cli.run("train", [*recipe, *sizes, *start]) == 0
    assert load(tmp_path / "run").mixers == ["affine", "affine"]


def test_a_network_with_mixers_is_no_start_for_affines():
    model = tiny()
    with pytest.raises(ValueError, match=r"missing: stages\.0\.blocks\.0\.token_mixer\.weight"):
        start_at(model, tiny(mixer="pooling"), "poolformer")


def test_fresh_affines_stay_fresh_for_a_module_teacher_with_mixers():
    student = tiny()
    start_from(student, randomised(tiny(mixer="pooling")))
    torch.testing.assert_close(student.stages[3].blocks[0].token_mixer.weight, torch.ones(32))


def test_a_start_that_computes_something_else_is_reported(caplog):
    args = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5)
    start = randomised(tiny(mixer="pooling", pool_first=True, **args))
    model = tiny(mixer="pooling", **args).train()
    start_at(model, start, "my start")
    assert "my start computes another function" in caplog.text
    assert model.training
    caplog.clear()
    start_at(tiny(mixer="pooling", pool_first=True, **args), start, "my start")
    start_at(
        tiny(mixer="pooling", **{**args, "num_classes": 3}), start, "my start"
    )  # another classifier is no surprise
    assert not caplog.records


@pytest.mark.parametrize("start", [start_at, lambda model, other, source: start_from(model, other)])
def test_a_classifier_is_matched_by_class_names(start, caplog):
    def named(*names, seed=0):
        return randomised(tiny(num_classes=len(names), pretrained_cfg_overlay={"label_names": names}), seed)

    model, other = named("ant", "bee", "cow", seed=1), named("cow", "dog", "ant", "bee")
    start(model, other, "start")
    for tensor in ("weight", "bias"):
        assert torch.equal(getattr(model.head.fc, tensor), getattr(other.head.fc, tensor)[[2, 3, 0]])
    model = named("ant", "bee", "elk", "fox", seed=1)
    fresh = model.head.fc.weight.clone()
    with caplog.at_level("INFO", "riformer"):
        start(model, other, "start")
    assert torch.equal(model.head.fc.weight, fresh)
    assert torch.equal(model.stem.conv.weight, other.stem.conv.weight)
    assert "does not know the class elk: the classifier starts fresh" in caplog.text
