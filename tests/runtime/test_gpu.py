"""The kernels and the runtime on a GPU; skipped without one. `pytest -m gpu` runs what needs one."""

import threading
from collections.abc import Callable

import pytest
import timm
import torch
from tiny import images, randomised, tiny

import riformer
from riformer.runtime.collapse import BlockWeights, ConvWeights, network_weights
from riformer.runtime.optimize import TOLERANCE
from riformer.runtime.parity import compare, full_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
if torch.cuda.is_available():
    from riformer.runtime import cuda, kernels

EPS = 1e-5
BARS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(3, 49, 24), (2, 196, 96), (5, 7, 40), (3, 1, 320), (1, 130, 8), (64, 196, 64), (16, 49, 128), (7, 3136, 64)]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, bar: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max() <= bar * expected.float().abs().max()


def block(channels: int, dtype: torch.dtype) -> BlockWeights:
    (weights,) = network_weights(randomised(tiny(depths=(1,), dims=(channels,), num_classes=2)).cuda()).stages[0]
    return cuda._in_types(weights, dtype)


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("shape", SHAPES)
@full_float32()
def test_kernels_equal_their_references(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num, tokens, channels = shape
    x, weights = images(num * tokens, channels).to("cuda", dtype), block(channels, dtype)
    assert_near(kernels.moments(x, tokens), kernels.moments_reference(x, tokens), 1e-4)
    moments = kernels.moments_reference(x, tokens)
    table = kernels.coefficient_table_reference(moments, weights, EPS)
    assert_near(kernels.coefficient_table(moments, weights, EPS), table, 2e-5)
    assert_near(kernels.pooled(moments, EPS), kernels.pooled_reference(moments, EPS), 2e-5)
    actual, expected = x.clone(), x.clone()
    assert_near(kernels.affine(actual, table, tokens), kernels.affine_reference(expected, table, tokens), BARS[dtype])
    assert_near(actual, expected, BARS[dtype])
    if channels <= cuda.FUSED_WIDTH:
        actual, expected = x.clone(), x.clone()
        arguments = (table, weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, tokens)
        kernels.mlp(actual, *arguments)
        kernels.mlp_reference(expected, *arguments)
        assert_near(actual, expected, BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("conv", [(3, 7, 4, 2), (16, 3, 2, 1), (64, 3, 2, 1), (3, 2, 2, 0)])
@full_float32()
def test_convolutions_equal_their_reference(conv: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    channels, kernel, stride, padding = conv
    batch = images(3, channels, 45, 30).cuda() + 10
    weight, bias = images(24, channels, kernel, kernel, seed=1).to("cuda", dtype), images(24, seed=2).cuda()
    weights = ConvWeights(kernels.pack(weight, dtype), bias, stride, padding)
    packed = kernels.pack_reference(batch, dtype).contiguous()
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(kernels.pack(batch.to(memory_format=layout), dtype), packed, rtol=0, atol=0)
    actual, sides = kernels.conv(packed, weights)
    expected, expected_sides = kernels.conv_reference(packed, weights)
    assert sides == expected_sides
    assert_near(actual, expected, BARS[dtype])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["riformer_s12", "riformer_m36"])
def test_networks_equal_their_training_form_at_odd_sizes(name: str, precision: str) -> None:
    model = randomised(timm.create_model(name, num_classes=10)).cuda().eval()
    fast = riformer.optimize(model, images(2, 3, 224, 224).cuda(), precision)
    assert (fast.engine, fast.precision) == ("triton", precision)
    for shape in ((1, 3, 224, 224), (2, 3, 197, 131), (9, 3, 224, 224)):  # replayed, replayed, launched
        batch = images(*shape).cuda()
        assert compare(model, fast, [batch]).max_rel < TOLERANCE[precision]
        torch.testing.assert_close(fast(batch), fast(batch), rtol=0, atol=0)  # to the bit


@pytest.fixture(scope="module")
def fast() -> riformer.runtime.optimize.Runtime:
    return riformer.optimize(randomised(tiny()).cuda().eval(), images(1, 3, 64, 64).cuda(), "fp32")


def test_threads_with_streams_of_their_own_share_one_graph(fast) -> None:
    batches = [images(1, 3, 64, 64, seed=seed).cuda() for seed in range(2)]
    expected = [fast.network.launch(batch) for batch in batches]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    torch.cuda.synchronize()
    wrong = [0, 0]

    def call(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(1000):
                wrong[i] += int((fast(batches[i]) != expected[i]).any())

    _in_threads([lambda i=i: call(i) for i in range(2)])
    assert wrong == [0, 0]


def test_threads_may_capture_replay_and_launch_at_once() -> None:
    fast = riformer.optimize(randomised(tiny()).cuda().eval(), images(1, 3, 64, 64).cuda(), "bf16")
    sizes = [32 + 16 * i for i in range(2 * cuda.MAX_GRAPHS)]  # more than are kept, so that graphs are freed too
    batches = [images(1, 3, size, 64).cuda() for size in sizes] + [images(600, 3, 64, 64).cuda()]
    expected = [fast.network.launch(batch) for batch in batches]
    torch.cuda.synchronize()
    wrong = [0, 0, 0]

    def call(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for round in range(3):
                for j in range(len(batches)):
                    j = (j * (i + 1) + round) % len(batches)
                    wrong[i] += int((fast(batches[j]) != expected[j]).any())

    _in_threads([lambda i=i: call(i) for i in range(3)])
    assert wrong == [0, 0, 0]


def _in_threads(calls: list[Callable[[], None]]) -> None:
    """Calls all at once; raises what one of them raises."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_images_of_another_type_are_not_truncated(fast) -> None:
    pixels = torch.randint(0, 256, (1, 3, 80, 64), dtype=torch.uint8, device="cuda")
    expected = fast.network.launch(pixels.float())
    torch.testing.assert_close(fast(pixels), expected, rtol=0, atol=0)
    batch = images(1, 3, 80, 64).cuda()  # of the shape for which bytes came first
    torch.testing.assert_close(fast(batch), fast.network.launch(batch), rtol=0, atol=0)
    assert (fast(batch) - fast(batch.byte())).abs().max() > 1e-2


def test_images_on_another_device_are_refused(fast) -> None:
    with pytest.raises(ValueError, match=r"images are .* on cpu; the triton network takes .* on cuda:0"):
        fast(images(1, 3, 64, 64))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_network_on_the_second_gpu_is_called_from_a_thread_on_the_first() -> None:
    model = randomised(tiny()).to("cuda:1").eval()
    fast = riformer.optimize(model, images().to("cuda:1"), "fp32")
    results: list[torch.Tensor] = []
    _in_threads([lambda: results.append(fast(images().to("cuda:1")))])  # a new thread's current device is 0
    assert compare(model, lambda _: results[0], [images().to("cuda:1")]).max_rel < TOLERANCE["fp32"]


def test_a_graph_of_the_caller_records_the_kernels(fast) -> None:
    batch, other = images(1, 3, 64, 64).cuda(), images(1, 3, 64, 64, seed=2).cuda()
    expected = fast(other)
    fast(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = fast(batch)
    batch.copy_(other)
    graph.replay()
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_modes_of_calls_may_change(fast) -> None:
    batch = images(1, 3, 96, 64).cuda()
    with torch.inference_mode():
        expected = fast(batch)
    logits = fast(batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    head = torch.nn.Linear(5, 1, device="cuda")  # features of a frozen network train what comes after it
    head(logits).sum().backward()
    assert head.weight.grad is not None


def test_a_triton_runtime_stays_where_it_is(fast) -> None:
    assert fast.to("cuda") is fast
    with pytest.raises(RuntimeError, match=r"riformer\.optimize again"):
        fast.cpu()
    with pytest.raises(RuntimeError, match=r"riformer\.fuse"):
        torch.jit.trace(fast, images(1, 3, 64, 64).cuda())
