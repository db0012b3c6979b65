"""What records, exports, differentiates, copies or moves a native runtime does it right or says what to do instead."""

import copy
import io
import pickle

import pytest
import torch
from tiny import images, tiny
from torch.fx.experimental.proxy_tensor import make_fx

import riformer
from riformer.runtime.native import supported

pytestmark = pytest.mark.skipif(not supported(), reason="no native network on this machine")
REFUSED = r"a native runtime .*(riformer\.fuse|riformer\.optimize)"


@pytest.fixture(scope="module")
def model():
    return tiny().eval()


@pytest.fixture(scope="module")
def fast(model):
    return riformer.optimize(model, images(), "fp32", "native")


def to_onnx(module, x, dynamo):
    torch.onnx.export(module, (x,), io.BytesIO() if not dynamo else None, dynamo=dynamo)


def to_openvino(module, x):
    pytest.importorskip("openvino").convert_model(module, example_input=x)


def in_fake_mode(module, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.empty(x.shape))


TRACERS = {
    "torch.jit.trace": lambda module, x: torch.jit.trace(module, x),
    "torch.jit.script": lambda module, x: torch.jit.script(module),
    "onnx by tracing": lambda module, x: to_onnx(module, x, dynamo=False),
    "onnx by export": lambda module, x: to_onnx(module, x, dynamo=True),
    "openvino": to_openvino,
    "torch.export": lambda module, x: torch.export.export(module, (x,)),
    "torch.export strict": lambda module, x: torch.export.export(module, (x,), strict=True),
    "torch.fx": lambda module, x: torch.fx.symbolic_trace(module),
    "make_fx": lambda module, x: make_fx(module)(x),
    "fake tensors": in_fake_mode,
    "vmap": lambda module, x: torch.func.vmap(module)(x[None]),
    "grad": lambda module, x: torch.func.grad(lambda y: module(y).sum())(x),
    "meta": lambda module, x: module(x.to("meta")),
    "autograd": lambda module, x: module(x.clone().requires_grad_()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_native_runtime_is_not_recorded_but_says_what_to_do(fast, tracer):
    with pytest.raises(Exception, match=REFUSED):
        TRACERS[tracer](fast, images())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", ["torch.jit.trace", "onnx by tracing", "torch.export", "make_fx", "autograd"])
def test_a_portable_runtime_is_recorded(model, tracer):
    TRACERS[tracer](riformer.optimize(model, images(), "fp32", "portable"), images())


def test_torch_compile_leaves_a_native_runtime_as_it_is(fast):
    torch._dynamo.reset()
    x = images(seed=5)
    compiled = torch.compile(lambda y: fast(2 * y) + 1, backend="eager")
    torch.testing.assert_close(compiled(x), fast(2 * x) + 1, atol=0, rtol=0)


def test_a_copy_computes_the_same_and_what_needs_the_weights_is_refused(fast):
    x = images(seed=3)
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x), atol=0, rtol=0)
    torch.testing.assert_close(fast.train()(x), fast(x), atol=0, rtol=0)
    refused = [
        lambda: pickle.dumps(fast), lambda: torch.save(fast, io.BytesIO()), lambda: fast.state_dict(),
        lambda: fast.load_state_dict({}), lambda: fast.to(torch.bfloat16), lambda: fast.half(), lambda: fast.to("meta"),
    ]  # fmt: skip
    for call in refused:
        with pytest.raises(RuntimeError, match=REFUSED):
            call()


def test_a_portable_runtime_is_copied_saved_and_cast_like_any_module(model):
    portable = riformer.optimize(model, images(), "fp32", "portable")
    x = images(seed=3)
    for again in (copy.deepcopy(portable), pickle.loads(pickle.dumps(portable)), portable.to("cpu")):
        torch.testing.assert_close(again(x), portable(x), atol=0, rtol=0)
    assert portable.state_dict()


def test_a_runtime_says_what_it_computes_in(model):
    fast = riformer.optimize(model, images(), "bf16x3", "native")
    assert fast.requested_precision == "bf16x3"
    assert fast.precision == ("bf16x3" if supported()[0] == "amx" else "fp32")
    assert fast.num_classes == model.num_classes
