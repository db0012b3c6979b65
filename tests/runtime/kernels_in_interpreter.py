"""The Triton kernels against their references, in triton's interpreter; test_kernels.py runs this file.

The interpreter must be chosen before triton is imported, so this is a process of its own: TRITON_INTERPRET=1.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import images, randomised, tiny

from riformer.runtime import cuda, kernels
from riformer.runtime.collapse import BlockWeights, ConvWeights, network_weights
from riformer.runtime.parity import compare

EPS = 1e-5
# Samples, tokens and channels: tiles that end inside a map, that span several, and of one token a sample.
SHAPES = [(3, 49, 24), (2, 196, 96), (5, 7, 40), (3, 1, 320), (1, 130, 8)]
BARS = {torch.float32: 1e-5, torch.float16: 4e-3}  # the interpreter multiplies bf16 as integers, so not here


def block(channels: int, dtype: torch.dtype, seed: int = 0) -> BlockWeights:
    (weights,) = network_weights(randomised(tiny(depths=(1,), dims=(channels,), num_classes=2), seed)).stages[0]
    return cuda._in_types(weights, dtype)


def problem(num: int, tokens: int, channels: int, dtype: torch.dtype, ratio: float = 0.0):
    """A map, weights, and the block's coefficients, by the references."""
    x = (images(num * tokens, channels) + ratio).to(dtype)
    weights = block(channels, dtype)
    return x, weights, kernels.coefficient_table_reference(kernels.moments_reference(x, tokens), weights, EPS)


def assert_near(found: torch.Tensor, expected: torch.Tensor, bar: float) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= bar * expected.float().abs().max()


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0, 1e2, 1e3])
def test_moments_and_coefficients(shape, dtype, ratio):
    num, tokens, channels = shape
    x, weights, table = problem(*shape, dtype, ratio)
    found = kernels.moments(x, tokens)
    by_sample = x.double().view(num, tokens, channels)
    assert_near(found[:, 0], by_sample.mean(1), 1e-5)
    assert_near(found[:, 1], by_sample.var(1, correction=0), 1e-4)
    found = kernels.coefficient_table(kernels.moments_reference(x, tokens), weights, EPS)
    for vector in range(4):
        assert_near(found[:, vector], table[:, vector], 2e-5)
    moments = kernels.moments_reference(x, tokens)  # what float32 keeps of a mean limits what is pooled
    assert_near(kernels.pooled(moments, EPS), kernels.pooled_reference(moments, EPS), 2e-5 + 1e-6 * ratio)


def test_moments_around_zero_would_not_survive_a_large_mean():
    x = images(196, 24) + 1e3
    naive = x.square().mean(0) - x.mean(0).square()
    exact = x.double().var(0, correction=0)
    assert (naive / exact - 1).abs().max() > 10 * (kernels.moments(x, 196)[0, 1] / exact - 1).abs().max()


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
def test_affine(shape, dtype):
    x, _, table = problem(*shape, dtype)
    expected_x = x.clone()
    expected = kernels.affine_reference(expected_x, table, shape[1])
    assert_near(kernels.affine(x, table, shape[1]), expected, BARS[dtype])
    assert_near(x, expected_x, BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("conv", [(3, 7, 4, 2), (16, 3, 2, 1), (40, 3, 2, 1), (3, 2, 2, 0)])
@pytest.mark.parametrize("size", [(3, 16, 16), (2, 29, 14)])
def test_convolutions(conv, size, dtype):
    (channels, kernel, stride, padding), (num, *sides) = conv, size
    batch = images(num, channels, *sides) + 10
    weight, bias = images(24, channels, kernel, kernel, seed=1).to(dtype), images(24, seed=2)
    weights = ConvWeights(kernels.pack(weight, dtype), bias, stride, padding)
    packed = kernels.pack_reference(batch, dtype).contiguous()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(kernels.pack(batch.to(memory_format=layout), dtype), packed)
    x, found_sides = kernels.conv(packed, weights)
    expected, expected_sides = kernels.conv_reference(packed, weights)
    assert found_sides == expected_sides
    assert_near(x, expected, BARS[dtype])
    exact = F.conv2d(batch.to(dtype).float(), weight.float(), bias, stride, padding)
    assert_near(x, exact.permute(0, 2, 3, 1).flatten(0, 2), BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mlp_in_one_kernel(shape, dtype):
    x, weights, table = problem(*shape, dtype)
    arguments = (table, weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, shape[1])
    expected = x.clone()
    kernels.mlp_reference(expected, *arguments)
    kernels.mlp(x, *arguments)
    assert_near(x, expected, BARS[dtype])


@pytest.mark.parametrize("vector", range(4))
def test_a_wrong_coefficient_shows(vector):
    x, weights, table = problem(3, 49, 24, torch.float32)
    wrong, expected = table.clone(), x.clone()
    wrong[1, vector] = table[0, vector]  # another sample's
    arguments = (weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, 49)
    kernels.mlp_reference(expected, table, *arguments)
    kernels.mlp(x, wrong, *arguments)
    assert (x - expected).abs().max() > 1e-2


def test_gelu_is_as_close_as_promised():
    x, eye = torch.linspace(-12, 12, 4096).view(-1, 16), torch.eye(16)
    table = torch.zeros(1, 4, 16)
    table[:, 0] = 1  # scale; gain 0 leaves fc2(gelu(x))
    for dtype, unit, bar in ((torch.float16, kernels.GELU_SCALE, 3e-4), (torch.float32, 1.0, 1e-6)):
        narrow, back = (x * unit).to(dtype), 1.0 if unit == 1 else 2 * unit
        expected = F.gelu(narrow.double() / unit)
        kernels.mlp(narrow, table, eye.to(dtype), torch.zeros(16), eye.to(dtype), len(x))
        assert ((narrow.double() / back - expected).abs() <= bar + x.abs() * 2**-10).all()


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("dims", [(8, 24, 200, 40)])
def test_the_network_equals_the_training_form(dtype, dims):
    model = randomised(tiny(dims=dims)).eval()  # 200 channels take two products, the others the one kernel
    network = cuda.TritonNetwork(network_weights(model), dtype)
    for batch in (images(1, 3, 32, 32), images(2, 3, 35, 22)):
        logits = network(batch)
        with torch.inference_mode():
            assert compare(model, lambda _, logits=logits: logits, [batch]).max_rel < BARS[dtype]
    torch.testing.assert_close(network(batch), logits, rtol=0, atol=0)  # to the bit
    pixels = images(2, 3, 35, 22).mul(50).add(100).byte()
    torch.testing.assert_close(network(pixels), network(pixels.float()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="cannot see what the triton network computes"):
        torch.jit.trace(network, batch)


class Replayed:
    """What stands for a graph here, where there are none: it knows whether its end was waited for."""

    def __init__(self):
        self.waited = False

    def wait(self) -> None:
        self.waited = True


def test_graphs_are_kept_by_shape_and_type_and_freed_when_they_have_ended():
    graphs = cuda.GraphCache(size=3)
    batches = [images(1, 3, 32, 32), images(1, 3, 32, 32).byte(), images(2, 3, 32, 32), images(1, 3, 32, 48)]
    first, second, third = (graphs.graph_for(batch, Replayed) for batch in batches[:3])
    assert len({first, second, third}) == 3
    assert graphs.graph_for(images(1, 3, 32, 32, seed=9), Replayed) is first
    graphs.graph_for(batches[3], Replayed)
    assert [graph.waited for graph in (first, second, third)] == [False, True, False]  # the longest unused
    assert graphs.graph_for(batches[1], Replayed) is not second
