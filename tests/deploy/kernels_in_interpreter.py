"""The Triton kernels against their references, in triton's interpreter; test_kernels.py runs this file.

The interpreter must be chosen before triton is imported, so this is a process of its own: TRITON_INTERPRET=1.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import images, randomised, tiny

from riformer.deploy import cuda, kernels
from riformer.deploy.collapse import BlockWeights, network_weights
from riformer.deploy.parity import compare

EPS = 1e-5
# Samples, tokens and channels: tiles that end inside a map, that span several, and of one token a sample.
SHAPES = [(3, 49, 24), (2, 196, 96), (5, 7, 40), (3, 1, 320), (1, 130, 8)]
BARS = {torch.float32: 1e-5, torch.float16: 4e-3}  # the interpreter multiplies bf16 as integers, so not here


def block(channels: int, dtype: torch.dtype, seed: int = 0) -> BlockWeights:
    (weights,) = network_weights(randomised(tiny(depths=(1,), dims=(channels,), num_classes=2), seed)).stages[0]
    return cuda._in_types(weights, dtype)


def problem(num: int, tokens: int, channels: int, dtype: torch.dtype, ratio: float = 0.0):
    """A map, its first tokens, weights, and the block's coefficients by the references."""
    x = (images(num * tokens, channels) + ratio).to(dtype)
    weights, centre = block(channels, dtype), x[::tokens].clone()
    table = kernels.coefficient_table_reference(kernels.sums_reference(x, centre, tokens), centre, weights, tokens, EPS)
    return x, centre, weights, table


def assert_near(found: torch.Tensor, expected: torch.Tensor, bar: float) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= bar * expected.float().abs().max()


def touched(partials: torch.Tensor, num: int, tokens: int) -> torch.Tensor:
    """Only the sums of samples that a tile touches; the other room is never read."""
    rows, kept = kernels.tile_rows(num * tokens, tokens), torch.zeros_like(partials)
    for tile in range(len(partials)):
        last = (min((tile + 1) * rows, num * tokens) - 1) // tokens
        spans = last - tile * rows // tokens + 1
        kept[tile, :spans] = partials[tile, :spans]
    return kept


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0, 1e2, 1e3])
def test_sums_and_coefficients(shape, dtype, ratio):
    num, tokens, _ = shape
    x, centre, weights, table = problem(*shape, dtype, ratio)
    partials = kernels.sums(x, centre, tokens)
    assert_near(touched(partials, num, tokens), touched(kernels.sums_reference(x, centre, tokens), num, tokens), 1e-5)
    found = kernels.coefficient_table(partials, centre, weights, tokens, EPS)
    for vector in range(kernels.COEFFICIENTS):
        assert_near(found[:, vector], table[:, vector], 2e-5)


def test_sums_around_zero_would_not_survive_a_large_mean():
    x, centre, weights, table = problem(2, 196, 24, torch.float32, 1e3)
    around_zero = kernels.sums(x, torch.zeros_like(centre), 196)
    found = kernels.coefficient_table(around_zero, torch.zeros_like(centre), weights, 196, EPS)
    assert (found[:, 0] / table[:, 0] - 1).abs().max() > 2e-3


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, dtype):
    x, _, weights, table = problem(*shape, dtype)
    tokens, bar = shape[1], BARS[dtype]
    hidden = kernels.fc1(x, table, weights.fc1_weight, weights.fc1_bias, tokens)
    assert_near(hidden, kernels.fc1_reference(x, table, weights.fc1_weight, weights.fc1_bias, tokens), bar)
    expected, found = x.clone(), x.clone()
    sums = kernels.fc2_reference(hidden, weights.fc2_weight, expected, table, tokens)
    partials = kernels.fc2(hidden, weights.fc2_weight, found, table, tokens)
    assert_near(found, expected, bar)
    assert_near(touched(partials, shape[0], tokens), touched(sums, shape[0], tokens), 10 * bar)


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mlp_in_one_kernel(shape, dtype):
    x, _, weights, table = problem(*shape, dtype)
    arguments = (weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, shape[1])
    expected, found = x.clone(), x.clone()
    sums = kernels.mlp_reference(expected, table, *arguments)
    partials = kernels.mlp(found, table, *arguments)
    assert_near(found, expected, BARS[dtype])
    assert_near(touched(partials, shape[0], shape[1]), touched(sums, shape[0], shape[1]), 10 * BARS[dtype])


@pytest.mark.parametrize("vector", range(4))
def test_a_wrong_coefficient_shows(vector):
    x, _, weights, table = problem(3, 49, 24, torch.float32)
    wrong, expected, found = table.clone(), x.clone(), x.clone()
    wrong[1, vector] = table[0, vector]  # another sample's
    arguments = (weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, 49)
    kernels.mlp_reference(expected, table, *arguments)
    kernels.mlp(found, wrong, *arguments)
    assert (found - expected).abs().max() > 1e-2


def test_gelu_is_as_close_as_promised():
    x = torch.linspace(-12, 12, 4096).view(-1, 16)
    table = torch.zeros(1, 5, 16)
    table[:, 0] = 1
    for dtype, bar in ((torch.float16, 1e-4), (torch.float32, 1e-6)):
        narrow = x.to(dtype)
        hidden = kernels.fc1(narrow, table, torch.eye(16, dtype=dtype), torch.zeros(16), len(x))
        assert ((hidden - F.gelu(narrow.double()).to(dtype)).abs() <= bar + narrow.abs() * 2**-10).all()


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("dims", [(8, 24, 136, 40)])
def test_the_network_equals_the_training_form(dtype, dims):
    model = randomised(tiny(dims=dims)).eval()  # 136 channels take the two kernels, the others the one
    network = cuda.TritonNetwork(network_weights(model), dtype)
    for batch in (images(1, 3, 64, 64), images(3, 3, 51, 38)):
        with torch.inference_mode():
            assert compare(model, network, [batch]).max_rel < BARS[dtype]
        torch.testing.assert_close(network(batch), network(batch), rtol=0, atol=0)  # to the bit
