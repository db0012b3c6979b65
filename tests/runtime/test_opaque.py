"""What PyTorch's tools do with runtimes: right results or an error that says what to use, never a wrong result."""

import copy
import io
import pickle

import onnxruntime
import openvino
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from tiny import images, randomised, tiny
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

import riformer
from riformer_runtime.engines import same_signal_stack
from riformer_runtime.native.library import supported

needs_native = pytest.mark.skipif(not supported(), reason="the native network is for x86-64 with AVX2, on Linux")


@pytest.fixture(scope="module")
def model():
    return randomised(tiny()).eval()


@pytest.fixture
def native(model):
    return riformer.optimize(model, images(), backend="native")


@pytest.fixture(scope="module")
def portable(model):
    return riformer.optimize(model, images(), backend="portable")


def _onnx(network, x, dynamo):
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(network, (x,), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(network, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _openvino(network, x):
    converted = openvino.convert_model(network, example_input=x)
    with same_signal_stack():
        compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy()])[0])


def _flops(network, x):
    with FlopCounterMode(display=False) as counter:
        logits = network(x)
    assert counter.get_total_flops() > 0
    return logits


def _autograd(network, x):
    x = x.clone().requires_grad_()
    logits = network(x)
    logits.sum().backward()
    assert x.grad.abs().max() > 0
    return logits.detach()


def _forward_mode(network, x):
    with forward_ad.dual_level():
        logits = forward_ad.unpack_dual(network(forward_ad.make_dual(x, x)))
        assert logits.tangent.abs().max() > 0
        return logits.primal.clone()


TOOLS = {
    "jit.trace": lambda network, x: torch.jit.trace(network, x)(x),
    "jit.trace of a function": lambda network, x: torch.jit.trace(lambda x: network(x), x)(x),
    "jit.trace of a parent": lambda network, x: torch.jit.trace(nn.Sequential(network), x)(x),
    "legacy ONNX": lambda network, x: _onnx(network, x, dynamo=False),
    "ONNX": lambda network, x: _onnx(network, x, dynamo=True),
    "OpenVINO": _openvino,
    "export": lambda network, x: torch.export.export(network, (x,)).module()(x),
    "strict export": lambda network, x: torch.export.export(network, (x,), strict=True).module()(x),
    "full graph": lambda network, x: torch.compile(network, fullgraph=True, backend="aot_eager")(x),
    "fx": lambda network, x: torch.fx.symbolic_trace(network)(x),
    "make_fx": lambda network, x: make_fx(network)(x)(x),
    "vmap": lambda network, x: torch.vmap(lambda image: network(image[None])[0])(x),
    "func.vjp": lambda network, x: torch.func.vjp(network, x)[0],
    "functionalize": lambda network, x: torch.func.functionalize(network)(x),
    "flops": _flops,
    "autograd": _autograd,
    "forward mode": _forward_mode,
}


@needs_native
@pytest.mark.filterwarnings("ignore")  # what tools say of themselves
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_refused_by_the_native_network_and_right_with_what_the_error_names(tool, model, native, portable):
    x, expected = images(seed=5), model(images(seed=5)).detach()
    with pytest.raises(Exception, match=r"riformer\.fuse\(model\), or riformer\.optimize\(model, example, backend="):
        TOOLS[tool](native, x)
    assert (TOOLS[tool](portable, x).detach() - expected).abs().max() < 1e-5 * expected.abs().max()
    torch.testing.assert_close(native(x), expected, atol=1e-4, rtol=0)  # it works on afterwards


@needs_native
def test_fake_tensors_and_scripts_are_refused(native, portable):
    x = images()
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), FakeTensorMode()):
        with mode, pytest.raises(RuntimeError, match="FakeTensor cannot see what the native network computes"):
            native(mode.from_tensor(x))
        with mode, pytest.raises(RuntimeError, match="FakeTensorMode cannot see"):
            native(x)
    with pytest.raises(RuntimeError, match=r"torch.jit.script .*riformer.fuse\(model\)"):
        torch.jit.script(native)
    with pytest.raises(RuntimeError, match=r"script riformer.fuse\(model\)"):
        torch.jit.script(portable)


@needs_native
def test_compiled_models_call_the_native_network_between_two_graphs(native):
    x = images(seed=2)
    expected = native(x * 2) + 1
    compiled = torch.compile(lambda x: native(x * 2) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled(images(3, 3, 48, 40)), native(images(3, 3, 48, 40) * 2) + 1, rtol=0, atol=0)


@needs_native
def test_images_of_any_kind_are_read_as_they_are_meant(native):
    x = images()
    expected = native(x)
    equal = {
        "subclass": tv_tensors.Image(x),
        "parameter": nn.Parameter(x, requires_grad=False),
        "negative view": torch._neg_view(-x),
        "conjugate": torch.complex(x, -x).conj().imag,
        "strided": x.repeat_interleave(2, dim=3)[..., ::2],
    }
    for kind, same in equal.items():
        torch.testing.assert_close(native(same), expected, rtol=0, atol=0, msg=kind)
    torch.testing.assert_close(native((x * 50 + 100).byte()), native((x * 50 + 100).byte().float()), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(native(x.clone().requires_grad_()), expected, rtol=0, atol=0)
    for bad, error in ((x.to(torch.complex64), ValueError), (x.to_sparse(), ValueError), (x.tolist(), TypeError)):
        with pytest.raises(error, match="images are"):
            native(bad)
    with pytest.raises(ValueError, match=r"images are .* on meta"):
        native(x.to("meta"))


@needs_native
def test_defaults_of_the_process_change_nothing(native):
    x = images()
    expected = native(x)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(native(x), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        logits = native(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@needs_native
def test_a_native_runtime_can_be_copied_but_not_stored_changed_or_moved(native, model):
    expected = native(images())
    for same in (copy.deepcopy(native), copy.copy(native), native.train(), native.to("cpu"), native.float()):
        torch.testing.assert_close(same(images()), expected, rtol=0, atol=0)
        assert not same.training
    for store in (pickle.dumps, lambda runtime: torch.save(runtime, io.BytesIO())):
        with pytest.raises(TypeError, match=r"riformer\.save.*riformer\.optimize"):
            store(native)
    for parent in (native, nn.Sequential(native)):
        with pytest.raises(RuntimeError, match=r"no state dict.*riformer\.save"):
            parent.state_dict()
        with pytest.raises(RuntimeError, match="cannot be changed"):
            parent.load_state_dict(model.state_dict(), strict=False)
    for change in (native.half, native.bfloat16, native.double, lambda: native.to("meta")):
        with pytest.raises(RuntimeError, match=r"riformer\.optimize again"):
            change()
    torch.testing.assert_close(native(images()), expected, rtol=0, atol=0)


def test_a_portable_runtime_can_be_stored_but_stays_in_its_precision(portable):
    expected = portable(images())
    stored = io.BytesIO()
    torch.save(portable, stored)
    stored.seek(0)
    for same in (copy.deepcopy(portable), pickle.loads(pickle.dumps(portable)), torch.load(stored, weights_only=False)):
        same.load_state_dict(portable.state_dict())
        torch.testing.assert_close(same(images()), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="stays in its precision, fp32"):
        portable.half()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_portable_runtime_keeps_its_norms_in_float32(model, precision, dtype):
    runtime = riformer.optimize(model, images(), precision, "portable")
    expected = runtime(images())
    with pytest.raises(RuntimeError, match=f"stays in its precision, {precision}"):
        runtime.to(dtype)  # the type of its products, but not of its norms and head
    torch.testing.assert_close(runtime.to("cpu")(images()), expected, rtol=0, atol=0)
