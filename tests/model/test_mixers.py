"""The contract of every entry of MIXERS, and what each mixer computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from riformer.model.mixers import MIXERS, Affine, Attention, GlobalFilter, Identity, Pooling, RandomMatrix, TokenMatrix

PER_CHANNEL = {"affine", "identity"}
GRID = (6, 7)


def built(name: str, dim: int = 8, grid: tuple[int, int] = GRID) -> nn.Module:
    """The mixer with every parameter away from its start."""
    torch.manual_seed(0)
    mixer = MIXERS[name](dim, grid)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def token_map(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (2, 8, *GRID), generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_keeps_shape_and_dtype(name, dtype):
    y = token_map(dtype=dtype)
    out = built(name).to(dtype)(y)
    assert out.shape == y.shape
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_autocast(name):
    mixer, y = built(name), token_map()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(y)
    exact = mixer(y)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("name", MIXERS)
def test_channels_last(name):
    mixer, y = built(name), token_map()
    torch.testing.assert_close(mixer(y.to(memory_format=torch.channels_last)), mixer(y))


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"nothing"}))
def test_gradients_reach_the_input_and_every_trainable_parameter(name):
    mixer, y = built(name), token_map().requires_grad_()
    (mixer(y) * token_map(2, 8, *GRID).flip(1)).sum().backward()
    gradients = {"input": y.grad} | {key: p.grad for key, p in mixer.named_parameters() if p.requires_grad}
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_equal_finite_differences(name):
    mixer = built(name, dim=2, grid=(3, 3)).double()
    keys = [key for key, parameter in mixer.named_parameters() if parameter.requires_grad]
    values = [mixer.get_parameter(key).detach().clone().requires_grad_() for key in keys]
    y = token_map(1, 2, 3, 3, dtype=torch.float64).requires_grad_()

    def function(y, *values):
        return torch.func.functional_call(mixer, dict(zip(keys, values, strict=True)), (y,))

    assert torch.autograd.gradcheck(function, (y, *values), rtol=1e-6, atol=1e-8)


def test_nothing_is_an_affine_that_has_not_learned():
    y = token_map().requires_grad_()
    nothing, affine = built("nothing"), MIXERS["affine"](8, GRID)
    torch.testing.assert_close(nothing(y), affine(y), atol=0, rtol=0)
    nothing(y).sum().backward()
    torch.testing.assert_close(y.grad, torch.zeros_like(y), atol=0, rtol=0)


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"nothing"}))
def test_mixes_tokens_or_does_not(name):
    mixer, y = built(name), token_map()
    changed = y.clone()
    changed[:, :, 2, 3] += 1
    difference = (mixer(changed) - mixer(y)).abs().amax((0, 1))
    here = torch.zeros(GRID, dtype=torch.bool)
    here[2, 3] = True
    assert difference[here].item() > 1e-3
    assert (difference[~here].max().item() > 1e-3) == (name not in PER_CHANNEL)


@pytest.mark.parametrize("name", MIXERS)
def test_samples_stay_apart(name):
    mixer, y = built(name), token_map()
    torch.testing.assert_close(mixer(y[1:]), mixer(y)[1:])


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"token_matrix", "random_matrix"}))
def test_takes_other_grids(name):
    y = token_map(1, 8, 5, 11)
    assert built(name)(y).shape == y.shape


@pytest.mark.parametrize("mixer", [TokenMatrix, RandomMatrix])
def test_matrices_are_bound_to_their_grid(mixer):
    with pytest.raises(
        ValueError, match=r"token map is \(7, 6\), but this mixer was built for \(6, 7\): pass img_size"
    ):
        mixer(8, GRID)(token_map(1, 8, 7, 6))


def test_affine_is_the_formula():
    mixer, y = built("affine"), token_map()
    s, t = mixer.weight.view(-1, 1, 1), mixer.bias.view(-1, 1, 1)
    torch.testing.assert_close(mixer(y), s * y + t - y)


def test_affine_starts_as_zero():
    y = token_map()
    torch.testing.assert_close(Affine(8, GRID)(y), torch.zeros_like(y), rtol=0, atol=0)


def test_affine_folds_into_a_norm():
    mixer, y, norm = built("affine").double(), token_map(dtype=torch.float64), nn.GroupNorm(1, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    weight, bias = mixer.fold_into(norm)
    torch.testing.assert_close(F.group_norm(y, 1, weight, bias), mixer(norm(y)), rtol=0, atol=1e-13)


def test_identity():
    y = token_map()
    torch.testing.assert_close(Identity(8, GRID)(y), y, rtol=0, atol=0)


def test_pooling_counts_no_padding():
    y = token_map()
    out = Pooling(8, GRID)(y)
    torch.testing.assert_close(out[..., 0, 0], y[..., :2, :2].mean((2, 3)) - y[..., 0, 0])
    torch.testing.assert_close(out[..., 3, 3], y[..., 2:5, 2:5].mean((2, 3)) - y[..., 3, 3])


@pytest.mark.parametrize(("dim", "num_heads"), [(64, 2), (24, 1)])
def test_attention_is_softmax_attention(dim, num_heads):
    mixer, y = built("attention", dim).double(), token_map(1, dim, 3, 2, dtype=torch.float64)
    q, k, v = (mixer.qkv.weight.flatten(1) @ y.flatten(2)[0]).view(3, num_heads, dim // num_heads, 6)
    weights = (q.transpose(1, 2) @ k / (dim // num_heads) ** 0.5).softmax(-1)
    heads = (v @ weights.transpose(1, 2)).reshape(dim, 6)
    expected = mixer.proj.weight.flatten(1) @ heads + mixer.proj.bias[:, None]
    assert isinstance(mixer, Attention)
    torch.testing.assert_close(mixer(y).flatten(2)[0], expected)


@pytest.mark.parametrize("grid", [(6, 7), (5, 4), (1, 1)])
def test_global_filter_is_a_circular_convolution(grid):
    mixer, y = GlobalFilter(8, grid).double(), token_map(2, 8, *grid, dtype=torch.float64)
    kernel = torch.zeros(grid, dtype=torch.float64)
    kernel[-1, 0] = 1  # shifts by one row up
    spectrum = torch.view_as_real(torch.fft.rfft2(kernel))
    with torch.no_grad():
        mixer.complex_weight.copy_(spectrum[:, :, None].expand_as(mixer.complex_weight))
    torch.testing.assert_close(mixer(y), y.roll(-1, dims=2))


def test_global_filter_resamples_bicubically():
    mixer, y = GlobalFilter(8, (6, 7)).double(), token_map(2, 8, 12, 14, dtype=torch.float64)
    nn.init.constant_(mixer.complex_weight, 0.0)
    with torch.no_grad():
        mixer.complex_weight[..., 0] = 1.0  # the identity's spectrum is constant, so every resampling keeps it
    torch.testing.assert_close(mixer(y), y)


def test_random_matrix_averages_and_is_frozen():
    mixer = RandomMatrix(8, GRID)
    ones = torch.ones(2, 8, *GRID)
    torch.testing.assert_close(mixer(ones), ones)
    assert [key for key, parameter in mixer.named_parameters() if parameter.requires_grad] == []
    assert "weight" in mixer.state_dict()
    assert TokenMatrix(8, GRID).weight.requires_grad


def test_global_filter_on_another_grid_keeps_its_lowest_frequency():
    torch.manual_seed(0)
    mixer = MIXERS["global_filter"](3, (8, 8))
    constant = torch.ones(1, 3, 12, 10)  # has no other frequency
    gain = mixer.complex_weight[0, 0, :, 0].view(1, 3, 1, 1)
    torch.testing.assert_close(mixer(constant), gain * constant)
