from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import images, randomised, tiny
from torch import nn

from riformer.model.fuse import fold, fuse
from riformer.runtime.collapse import BlockWeights, Collapsed, CollapsedBlock, coefficients, moments, network_weights
from riformer.runtime.parity import compare

LARGER = [pytest.param(f"riformer_{size}", marks=pytest.mark.slow) for size in ("s24", "s36", "m36", "m48")]
VARIANTS = ["riformer_s12", *LARGER]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_training_form_in_every_precision_size_and_batch(name):
    model = randomised(timm.create_model(name)).eval().double()
    batch = images(8, 3, 101, 67)
    with torch.inference_mode():
        expected = model(batch.double())
        for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            collapsed = Collapsed(model, dtype)
            for num in (8, 3, 1):
                report = compare(lambda _, num=num: expected[:num], collapsed, [batch[:num].to(dtype)])
                assert report.max_rel < bar, f"{dtype}, batch {num}: {report}"
                print(f"{name} {dtype} batch {num}: {report}")  # noqa: T201  (pytest -rP shows it)


def test_deploy_and_folded_forms_collapse_to_the_same():
    model = randomised(tiny()).eval().double()
    batch = images(dtype=torch.float64)
    expected = Collapsed(model, torch.float64)(batch)
    for form in (fuse, fold):
        torch.testing.assert_close(Collapsed(form(model), torch.float64)(batch), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("wrong", ["norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "fc2_bias"])
def test_a_dropped_tensor_shows(wrong):
    model = randomised(tiny()).eval().double()
    collapsed = Collapsed(model, torch.float64)
    getattr(collapsed.stages[1][0], wrong).zero_()
    assert compare(model, collapsed, [images(dtype=torch.float64)]).max_rel > 1e-2


@pytest.mark.parametrize("ratio", [0, 1e2, 1e3])
@pytest.mark.parametrize("kind", ["of all channels", "of each channel"])
def test_moments_survive_a_large_mean(ratio, kind):
    channels = torch.ones(24) if kind == "of all channels" else images(24, seed=3)
    x = images(2, 24, 9, 7) + ratio * channels.view(-1, 1, 1)
    block = randomised(tiny(dims=(24, 16, 24, 32))).eval().stages[0].blocks[0]
    weights = network_weights(randomised(tiny(dims=(24, 16, 24, 32)))).stages[0][0]
    with torch.inference_mode():
        exact = deepcopy(block).double()(x.double())
        plain = block(x)
        collapsed = CollapsedBlock(weights, torch.float32, 1e-5)(x.flatten(2).transpose(1, 2))
    scale = (exact - x).abs().max()
    off_by = (collapsed.transpose(1, 2).view_as(x) - exact).abs().max() / scale
    assert off_by < 3 * (plain - exact).abs().max() / scale + 1e-6
    assert off_by < 2e-3  # which float32 itself costs at 1e3


def test_naive_variance_would_not_survive():
    x = images(2, 63, 24) + 1e3
    true = x.double().var(1, unbiased=False)
    naive = (x * x).mean(1) - x.mean(1) ** 2
    assert ((naive - true).abs() / true).max() > 1e-2
    assert ((moments(x)[1] - true).abs() / true).max() < 1e-4


def test_coefficients_are_norm_residual_and_norm():
    x, seeds = images(2, 5, 8, dtype=torch.float64), iter(range(10, 20))
    weights = BlockWeights(*(images(8, dtype=torch.float64, seed=next(seeds)) for _ in BlockWeights._fields))
    scale, shift, gain, offset, mean = (c[:, None] for c in coefficients(*moments(x), weights, 1e-5))

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x.transpose(1, 2), 1, weight, bias).transpose(1, 2)

    after = x + norm(x, *weights[:2])
    torch.testing.assert_close(gain * x + offset - weights.fc2_bias, after)
    torch.testing.assert_close(mean[:, 0], after.mean(1))
    torch.testing.assert_close(scale * x + shift, norm(after, *weights[2:4]))


def test_pooled_features_without_a_classifier():
    model = randomised(tiny(num_classes=0)).eval().double()
    assert compare(model, Collapsed(model, torch.float64), [images(dtype=torch.float64)]).max_rel < 1e-12


def test_what_does_not_collapse_is_refused():
    with pytest.raises(ValueError, match=r"mixes tokens \(pooling\)"):
        Collapsed(tiny(mixer="pooling"))
    with pytest.raises(ValueError, match="'max'"):
        Collapsed(tiny(global_pool="max"))
    with pytest.raises(ValueError, match="takes a MetaFormer, not DataParallel"):
        Collapsed(nn.DataParallel(tiny()))


@pytest.mark.slow
def test_compiles_and_exports_without_graph_breaks():
    model = randomised(tiny()).eval()
    collapsed = Collapsed(model)
    compiled = torch.compile(collapsed, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(
        collapsed, (images(),), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=2, max=64)}}
    )
    assert compare(model, compiled, [images()]).max_rel < 1e-5
    assert compare(model, exported.module(), [images(5, 3, 64, 64)]).max_rel < 1e-5
