"""The network against timm's PoolFormer, and as a model of timm."""

import re
from copy import deepcopy

import pytest
import timm
import torch
from timm.models import group_modules, group_parameters
from timm.optim import param_groups_layer_decay
from tiny import SIZE, images, randomised, tiny

import riformer
from riformer.model.mixers import MIXERS

NUM_BLOCKS = sum(SIZE["depths"])


@pytest.fixture
def model():
    return randomised(tiny()).eval()


# what it computes


@pytest.fixture(scope="module")
def poolformers():
    """Ours and timm's, with the same random weights, in float64."""
    theirs = randomised(timm.create_model("poolformer_s12")).double().eval()
    ours = timm.create_model("riformer_s12", mixer="pooling").double().eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("size", [(64, 64), (96, 70)])
def test_trunk_parity_with_timm(poolformers, size):
    ours, theirs = poolformers
    x = images(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.forward_features(x)
        scale = expected.abs().max()
        torch.testing.assert_close(ours.forward_features(x) / scale, expected / scale, rtol=0, atol=1e-12)


def test_the_head_norms_before_it_pools(poolformers):
    ours, theirs = poolformers
    x = images(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() > 1e-2
        features = ours.forward_features(x)
        expected = ours.head.fc(ours.head.norm(features).mean((2, 3)))
        torch.testing.assert_close(ours(x), expected)


def test_start_values():
    model = tiny()
    convolutions = torch.cat([p.flatten() for p in model.parameters() if p.ndim == 4])
    assert convolutions.std().item() == pytest.approx(0.02, rel=0.05)
    assert convolutions.abs().max() < 0.2
    biases = [p for key, p in model.named_parameters() if key.endswith("bias")]
    assert len(biases) == 4 + NUM_BLOCKS * 5 + 2
    assert sum(bias.abs().sum().item() for bias in biases) == 0


def test_first_weights_have_the_standard_deviation_asked_for():
    torch.manual_seed(0)
    model = tiny(init_std=0.1, num_classes=1000)
    for weight in (model.stages[3].blocks[0].mlp.fc1.weight, model.head.fc.weight):
        assert weight.std().item() == pytest.approx(0.1, rel=0.1)
    model.reset_classifier(2000)
    assert model.head.fc.weight.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        ("affine", ["affine"] * 5),
        (["pooling", "affine", "identity", "nothing"], ["pooling", "affine", "affine", "identity", "nothing"]),
        (["pooling", "affine", "pooling", "identity", "nothing"],) * 2,
    ],
    ids=["one", "by stage", "by block"],
)
def test_mixers_by_stage_or_by_block_survive_being_saved(mixer, expected, tmp_path):
    model = randomised(tiny(mixer=mixer)).eval()
    assert model.mixers == expected
    riformer.save(model, tmp_path / "model")
    loaded = riformer.load(tmp_path / "model")
    assert loaded.mixers == expected
    torch.testing.assert_close(loaded(images()), model(images()))
    fused = riformer.fuse(loaded)
    assert fused.mixers == [name if name == "pooling" else "identity" for name in expected]
    torch.testing.assert_close(fused(images()), model(images()), atol=1e-5, rtol=1e-5)


def test_kernels_between_stages_that_do_not_overlap():
    model = tiny(stem_patch=4, stem_stride=4, down_patch=2).eval()
    assert [tuple(stage.downsample.conv.weight.shape[2:]) for stage in model.stages[1:]] == [(2, 2)] * 3
    x = images().requires_grad_()
    model.stages[1].downsample(model.stem(x))[:, :, 2, 3].sum().backward()
    assert x.grad.abs().sum((0, 1)).nonzero().aminmax(dim=0).min.tolist() == [16, 24]
    assert x.grad.abs().sum((0, 1)).nonzero().aminmax(dim=0).max.tolist() == [23, 31]


def test_a_fresh_mixer_branch_is_exact_identity():
    block = tiny().eval().stages[0].blocks[0]
    torch.nn.init.zeros_(block.layer_scale2.scale)
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_state_dict_keys_are_timms(model):
    block = r"stages\.\d\.blocks\.\d\."
    pattern = (
        rf"(stem\.conv|stages\.[123]\.downsample\.conv|head\.(norm|fc)"
        rf"|{block}(norm1|norm2|token_mixer|mlp\.fc1|mlp\.fc2))\.(weight|bias)|{block}layer_scale[12]\.scale"
    )
    keys = list(model.state_dict())
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []
    assert len(keys) == 2 * (1 + 3 + 2) + NUM_BLOCKS * 12
    pooling = timm.create_model("riformer_s12", mixer="pooling").state_dict()
    theirs = timm.create_model("poolformer_s12").state_dict()
    assert {key: value.shape for key, value in pooling.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - {"nothing"}))
def test_every_mixer_trains(mixer):
    model = randomised(tiny(mixer=mixer)).train()
    model(images()).square().sum().backward()
    trainable = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(list(model.parameters())) - (NUM_BLOCKS if mixer == "random_matrix" else 0)
    for key, gradient in trainable.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize("shape", [(1, 3, 197, 131), (1, 3, 32, 32), (3, 3, 64, 224)])
def test_any_input_size(model, shape):
    x = images(*shape)
    assert model(x).shape == (shape[0], 5)
    assert model.forward_features(x).shape[2:] == tuple((n + 31) // 32 for n in shape[2:])


def test_samples_stay_apart(model):
    x = images()
    torch.testing.assert_close(model(x[:1]), model(x)[:1])


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans):
    model = tiny(in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(2, in_chans, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast(mixer):
    model, x = randomised(tiny(mixer=mixer)).eval(), images()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_drop_path():
    model = tiny(depths=(2, 2, 2, 2), drop_path_rate=0.7)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(drop, "drop_prob", 0.0) for block in blocks for drop in (block.drop_path1, block.drop_path2)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.7, 8).repeat_interleave(2))
    randomised(model)
    x = images(8, 3, 64, 64)
    torch.manual_seed(0)
    assert (model.train()(x) - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("silent", ["layer_scale1", "layer_scale2"])
def test_drop_path_drops_whole_branches_of_samples(silent):
    block = randomised(tiny(drop_path_rate=0.5)).train().stages[3].blocks[0]
    torch.nn.init.zeros_(getattr(block, silent).scale)
    x = images(1, 32, 2, 2).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    branch = block(x) - x
    kept = branch.abs().amax((1, 2, 3)) > 1e-6
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(branch[kept] / 2, (block.eval()(x) - x)[kept])  # what is kept counts double


def test_drop_rate():
    model = randomised(tiny(drop_rate=0.5))
    x = images()
    torch.manual_seed(0)
    assert (model.train()(x) - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(mixer="afine"), r"mixer 'afine' is unknown; did you mean one of \['affine'"),
        (dict(mixer=("affine", "affine", "affine", "poling")), r"mixer 'poling' is unknown; .*'pooling'"),
        (dict(mixer="zzz"), r"did you mean one of \['affine', 'attention', .*'token_matrix'\]"),
        (dict(mixer=("affine",)), "must name the same number of stages"),
        (dict(dims=(8, 16)), "must name the same number of stages"),
        (dict(global_pool="catavgmax"), "global_pool is 'catavgmax', which changes the width"),
    ],
)
def test_wrong_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        tiny(**args)


def test_deepcopy(model):
    copy, x = deepcopy(model), images()
    torch.testing.assert_close(copy(x), model(x), rtol=0, atol=0)
    torch.nn.init.zeros_(copy.head.fc.weight)
    assert model.head.fc.weight.abs().max() > 0


# what timm expects


def test_forward_is_features_and_head(model):
    x = images()
    features = model.forward_features(x)
    assert features.shape == (2, 32, 2, 2)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))


def test_intermediates(model):
    x = images()
    last, stages = model.forward_intermediates(x)
    assert [stage.shape for stage in stages] == [(2, dim, 16 >> i, 16 >> i) for i, dim in enumerate(SIZE["dims"])]
    torch.testing.assert_close(last, model.forward_features(x))
    torch.testing.assert_close(stages[-1], last)
    for indices, expected in (([0, 2], [0, 2]), ([-1], [3]), (2, [2, 3]), ([1], [1])):
        for stop_early in (True, False):
            chosen = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            torch.testing.assert_close(chosen, [stages[i] for i in expected], rtol=0, atol=0)
    stopped, _ = model.forward_intermediates(x, [1], stop_early=True)
    torch.testing.assert_close(stopped, stages[1])
    with pytest.raises(ValueError, match="output_fmt is 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_intermediates_with_norm(model):
    x = images()
    last, plain = model.forward_intermediates(x)
    _, normed = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(normed[:3], plain[:3])
    torch.testing.assert_close(normed[3], model.head.norm(last))


@pytest.mark.parametrize("out_indices", [None, (1, 3), (0, 1), (-2,)])
def test_features_only(model, out_indices):
    args = {} if out_indices is None else {"out_indices": out_indices}
    extractor = tiny(features_only=True, **args).eval()
    wanted = [0, 1, 2, 3] if out_indices is None else [i % 4 for i in out_indices]
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    own = extractor.state_dict()
    extractor.load_state_dict({key: state[key] for key in own})
    assert not any(key.startswith("model.head.fc") for key in own)
    assert extractor.feature_info.channels() == [SIZE["dims"][i] for i in wanted]
    assert extractor.feature_info.reduction() == [4 << i for i in wanted]
    x = images()
    expected = model.forward_intermediates(x, wanted, intermediates_only=True)
    torch.testing.assert_close(extractor(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("indices", [1, [0, 1], [3]])
def test_prune_intermediate_layers(model, indices):
    x = images()
    expected = model.forward_intermediates(x, indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices)
    assert len(model.stages) == taken[-1] + 1
    assert model.num_features == SIZE["dims"][taken[-1]]
    torch.testing.assert_close(model.forward_intermediates(x, taken, intermediates_only=True), expected)
    assert model(x).shape[:2] == (2, model.num_features)


@pytest.mark.parametrize(
    ("args", "shape"),
    [((0,), (2, 32)), ((0, ""), (2, 32, 2, 2)), ((10,), (2, 10)), ((5, "max"), (2, 5)), ((0, "avg"), (2, 32))],
)
@pytest.mark.parametrize("training", [True, False])
def test_reset_classifier(model, args, shape, training):
    model.train(training).double()
    model.reset_classifier(*args)
    assert model.num_classes == args[0]
    assert model(images(dtype=torch.float64)).shape == shape
    assert {module.training for module in model.modules()} == {training}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert isinstance(model.get_classifier(), torch.nn.Linear if args[0] else torch.nn.Identity)


@pytest.mark.parametrize(
    ("args", "shape"),
    [
        (dict(num_classes=0), (2, 32)),
        (dict(num_classes=0, global_pool=""), (2, 32, 2, 2)),
        (dict(global_pool="max"), (2, 5)),
        (dict(global_pool="avgmax"), (2, 5)),
    ],
    ids=str,
)
def test_heads(args, shape):
    assert tiny(**args)(images()).shape == shape


def test_max_pooling_is_not_the_average():
    average, maximum = randomised(tiny()).eval(), randomised(tiny(global_pool="max")).eval()
    assert (average(images()) - maximum(images())).abs().max() > 1e-2


def test_grad_checkpointing_gives_the_same_gradients():
    gradients = []
    for enable in (False, True):
        model = randomised(tiny()).train()
        model.set_grad_checkpointing(enable)
        assert [stage.grad_checkpointing for stage in model.stages] == [enable] * 4
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = model(images()).square().sum()
        loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        gradients[-1]["saved tensors"] = torch.tensor(len(saved))
    without, recomputed = gradients
    assert recomputed.pop("saved tensors") < without.pop("saved tensors")
    torch.testing.assert_close(recomputed, without, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("coarse", [True, False])
def test_group_matcher_covers_every_parameter(model, coarse):
    matcher = model.group_matcher(coarse=coarse)
    layers = group_parameters(model, matcher, reverse=True)
    assert layers.keys() == {key for key, _ in model.named_parameters()}
    assert len(set(layers.values())) == 1 + (4 if coarse else NUM_BLOCKS) + 1
    ordered = [
        layers[key] for key in ("stem.conv.weight", "stages.0.blocks.0.norm1.weight", "stages.2.downsample.conv.bias")
    ]
    ordered += [layers[key] for key in ("stages.3.blocks.0.mlp.fc2.bias", "head.norm.weight")]
    assert ordered == sorted(set(ordered))
    assert {key for key, layer in layers.items() if layer == max(layers.values())} == {
        "head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias",
    }  # fmt: skip
    modules = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    assert group_modules(model, matcher, reverse=True).keys() >= modules


def test_layer_decay(model):
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(1 + NUM_BLOCKS + 1)}


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiles_without_graph_breaks(mixer):
    model, x = randomised(tiny(mixer=mixer)).eval(), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("form", [lambda m: m, riformer.fuse, riformer.fold], ids=["training", "fused", "folded"])
def test_exports(model, form):
    model, x = form(model).eval(), images()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = images(size, 3, 64, 64)
        torch.testing.assert_close(program.module()(x), model(x))
