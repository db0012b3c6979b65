import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from riformer.distill import losses

TERMS = {
    "label": lambda x, y: losses.label(x, y.softmax(1)),
    "soft": lambda x, y: losses.soft(x, y, temperature=2.0),
    "block": losses.block,
    "block raw": lambda x, y: losses.block(x, y, match="raw"),
    "mixer": losses.mixer,
    "relation": losses.relation,
    "relation pooled": lambda x, y: losses.relation(x, y, max_tokens=4),
}
MAPS = ("block", "block raw", "mixer", "relation", "relation pooled")


def inputs(name: str, seed: int = 0, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 5, 4, 6) if name in MAPS else (batch, 7)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("name", [name for name in TERMS if name != "label"])
def test_is_zero_at_equality_and_positive_elsewhere(name):
    x, y = inputs(name)
    assert_close(TERMS[name](x, x).double(), torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0)
    assert TERMS[name](x, y) > 1e-3


@pytest.mark.parametrize("name", TERMS)
def test_is_the_mean_over_the_batch(name):
    x, y = inputs(name)
    single = torch.stack([TERMS[name](x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    assert_close(TERMS[name](x, y), single.mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_gradient_agrees_with_finite_differences(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # terms compute in float32; check them in float64
    x, y = inputs(name)
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, y), x.requires_grad_(), atol=1e-6)


def test_hard_is_cross_entropy_to_the_argmax():
    x, y = inputs("hard")
    assert_close(losses.hard(x, y), F.cross_entropy(x.float(), y.argmax(1)))


def test_soft_matches_its_formula_and_temperature_keeps_the_gradient_scale():
    x, y = inputs("soft")
    p, q = y.softmax(1), x.softmax(1)
    assert_close(losses.soft(x, y).double(), (p * (p / q).log()).sum(1).mean(), atol=1e-6, rtol=1e-5)
    sizes = []
    for temperature in (1.0, 20.0):
        leaf = x.clone().requires_grad_()
        losses.soft(leaf, y, temperature).backward()
        sizes.append(leaf.grad.norm())
    assert 0.2 < sizes[1] / sizes[0] < 5  # without the square it would shrink 400 times


def test_label_takes_mixed_targets_and_smooths_them():
    x, _ = inputs("label")
    classes = torch.tensor([0, 3, 6])
    assert_close(losses.label(x, F.one_hot(classes, 7).float()), F.cross_entropy(x.float(), classes))
    smoothed = losses.label(x, F.one_hot(classes, 7).float(), smoothing=0.1)
    assert_close(smoothed, F.cross_entropy(x.float(), classes, label_smoothing=0.1))


def test_normalised_block_ignores_scale_and_shift_raw_does_not():
    x, _ = inputs("block")
    assert losses.block(x, 3 * x + 2) < 1e-5
    assert losses.block(x, 3 * x + 2, match="raw") > 1


def test_relation_ignores_width_and_channel_rotation():
    x, _ = inputs("relation")
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    rotated = torch.einsum("nchw,cd->ndhw", x, rotation)
    assert losses.relation(x, rotated) < 1e-10
    assert losses.relation(x, x[:, :3]) > 1e-3


def test_relation_pools_large_maps():
    x, y = (torch.randn(1, 4, 64, 48) for _ in range(2))
    expected = losses.relation(F.adaptive_avg_pool2d(x, (16, 12)), F.adaptive_avg_pool2d(y, (16, 12)))
    assert_close(losses.relation(x, y, max_tokens=196), expected)


@pytest.mark.parametrize("term", [losses.block, losses.mixer, losses.relation])
def test_refuses_maps_of_different_grids(term):
    with pytest.raises(ValueError, match="compares maps of one shape"):
        term(torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3))
