import json
import time
from itertools import pairwise

import pytest
import timm
import torch
from families import NETWORKS, build_small
from tiny import images, randomised, tiny
from torch import nn

from riformer import cli
from riformer.distill.families import family_of
from riformer.measure import profile as module
from riformer.measure.cost import count_macs
from riformer.measure.profile import KINDS, Module, Profile, Step, profile
from riformer.pages.profile import draw
from riformer.runtime.latency import Spread

QUICK = dict(rounds=3, seconds=0.001)


@pytest.fixture(params=NETWORKS)
def network(request):
    return build_small(request.param).eval(), images(2, 3, 32, 32)


def test_every_family_is_profiled_completely(network):
    model, batch = network
    found = profile(model, batch, **QUICK)
    assert [step.name for step in found.steps] == ["embedding", "norm", "token mixer", "MLP", "head"]
    kinds = {m.kind for m in found.modules}
    assert kinds == set(KINDS)
    counted = sum(m.macs for m in found.modules)
    assert counted == pytest.approx(len(batch) * count_macs(model, batch.shape[1:]), rel=2e-3)
    assert all(m.num_bytes > 0 for m in found.modules)
    assert json.loads(json.dumps(found.to_dict()))["by_kind"].keys() == set(KINDS)


def test_steps_have_the_parts_that_they_name(network):
    model, batch = network
    steps = module._build_up(randomised(model), family_of(model))
    with torch.no_grad():
        torch.testing.assert_close(steps["MLP"](batch), model.forward_features(batch), rtol=0, atol=0)
        torch.testing.assert_close(steps["head"](batch), model(batch), rtol=0, atol=0)
        features = [steps[kind](batch) for kind in ("embedding", "norm", "token mixer", "MLP")]
    for less, more in pairwise(features):
        assert less.shape == more.shape
    assert (features[-2] - features[-1]).abs().max() > 1e-3


class Slow(nn.Module):
    """Sleeps, then computes what was there."""

    def __init__(self, inside: nn.Module, seconds: float):
        super().__init__()
        self.inside, self.seconds = inside, seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.inside(x)


@pytest.mark.parametrize(
    ("part", "kind"), [("token_mixer", "token mixer"), ("mlp", "MLP"), ("norm2", "norm"), ("drop_path1", None)]
)
def test_time_is_put_down_to_where_it_is_spent(part, kind):
    model = tiny().eval()
    block = model.stages[2].blocks[0]
    setattr(block, part, Slow(getattr(block, part), 0.03))
    found = profile(model, images(), **QUICK | {"rounds": 15})  # medians, whatever else the machine does
    shares = {name: values["share"] for name, values in found.by_kind().items()}
    assert max(shares, key=shares.get) == (kind or "rest of the blocks")
    slowest = max(found.modules, key=lambda m: m.latency_ms)
    assert slowest.name == f"stages.2.blocks.0{f'.{part}' if kind else ''}"
    assert slowest.latency_ms > 29
    if kind:
        assert next(step for step in found.steps if step.name == kind).added_ms > 29


def made_up(sum_of_whole: float) -> Profile:
    spread = Spread(10.0, 9.0, 11.0)
    steps = [Step(name, spread, 2.0) for name in ("embedding", "norm", "token mixer", "MLP", "head")]
    return Profile(spread, steps, [Module(kind, kind, 1.0, 1, 1) for kind in KINDS], spread, sum_of_whole)


@pytest.mark.parametrize(
    ("ratio", "adds_up"), [(1.0, True), (0.951, True), (1.049, True), (0.94, False), (1.06, False)]
)
def test_parts_that_do_not_add_up_are_said_so(ratio, adds_up, tmp_path):
    found = made_up(ratio)
    assert found.adds_up is adds_up
    assert found.to_dict()["adds_up"] is adds_up
    draw(found, "made up", tmp_path / "a.svg")
    assert ("do not add up" in (tmp_path / "a.svg").read_text()) is (not adds_up)


def test_shares():
    assert made_up(1.0).mixer_share_built_up == pytest.approx(0.2)
    assert made_up(1.0).mixer_share_in_place == pytest.approx(1 / len(KINDS))


def test_the_model_stays_as_it_was_and_unknown_classes_are_named():
    model = tiny().train()
    profile(model, images(), **QUICK)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="the blocks of a ResNet are not known; known classes are ConvNeXt, GFNet"):
        profile(timm.create_model("resnet10t"), images())


def test_the_verb_writes_numbers_and_picture(tmp_path, capsys):
    out = tmp_path / "profile"
    options = ["--batch-size=1", "--img-size=32", "--rounds=3", f"--out={out}"]
    assert cli.run("profile", ["riformer_micro:mixer=pooling", *options]) == 0
    record = json.loads((out / "profile.json").read_text())
    assert record["settings"]["model"] == "riformer_micro:mixer=pooling"
    assert torch.__version__.startswith(record["env"]["torch"])
    assert (out / "profile.svg").read_text().count("<path") > 10
    text = capsys.readouterr().out
    assert f"{record['mixer_share_in_place']:.1%}" in text
    assert cli.run("profile", ["resnet10t", "--img-size=32"]) == 1
    assert "the blocks of a ResNet are not known" in capsys.readouterr().err
