import logging

import pytest
import torch
from tiny import images, randomised, tiny
from torch import nn

import riformer
from riformer.runtime import optimize as optimizing
from riformer.runtime.optimize import BACKENDS, optimize
from riformer.runtime.parity import compare
from riformer_runtime.native.library import UnavailableError, supported

HERE = [(b, p) for b, precisions in BACKENDS.items() for p in precisions if b != "triton"]


@pytest.fixture(autouse=True)
def said_anew():
    optimizing._warn_once.cache_clear()


@pytest.mark.parametrize(("backend", "precision"), HERE)
def test_every_backend_and_precision_computes_what_the_model_does(backend, precision):
    model = randomised(tiny()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = optimize(model, images(), precision, backend)
    for batch in (images(1, 3, 64, 64), images(3, 3, 57, 90)):
        with torch.inference_mode():
            report = compare(model, optimized, [batch])
        assert report.max_rel < (3e-2 if precision in ("bf16", "fp16") else 5e-5)
    assert optimized.parity.num_images == 2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "example",
    [images()[0], images()[:0], images()[:, :1], images().numpy(), None],
    ids=["3d", "empty", "grey", "np", "-"],
)
def test_an_example_that_is_no_batch_of_images_is_refused(example):
    with pytest.raises(ValueError, match=r"example is .*; it must be a tensor of one or more images, \[N, 3, H, W\]"):
        optimize(tiny(), example)


def test_training_mode_and_bf16_weights_are_taken_as_they_are():
    model = randomised(tiny(drop_path_rate=0.5, drop_rate=0.5)).train()
    assert optimize(model, images()).parity.max_rel < 1e-5
    assert model.training
    assert optimize(model.bfloat16(), images(dtype=torch.bfloat16)).parity.max_rel < 1e-5


@pytest.mark.skipif(not supported(), reason="no native network here")
def test_auto_takes_the_native_network_and_falls_back_once(monkeypatch, caplog):
    model = randomised(tiny()).eval()
    assert optimize(model, images()).engine == "native"
    assert optimize(model, images(), "fp64").engine == "portable"

    def unavailable(*_):
        raise UnavailableError("no compiler")

    monkeypatch.setattr(optimizing, "NativeNetwork", unavailable)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert optimize(model, images()).engine == "portable"
    assert [r.message for r in caplog.records] == ["no compiler; running in plain PyTorch instead"]
    with pytest.raises(RuntimeError, match="no compiler"):
        optimize(model, images(), backend="native")


def test_a_precision_that_the_processor_lacks_is_said_once(monkeypatch, caplog):
    if not supported():
        pytest.skip("no native network here")
    monkeypatch.setattr("riformer_runtime.native.library.supported", lambda: ("avx2",))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert optimize(randomised(tiny()), images(), "bf16").parity.max_rel < 1e-5
    assert [r.message for r in caplog.records] == ["bf16 is computed in fp32: this processor has avx2"]


def test_a_wrong_answer_is_not_handed_out(monkeypatch):
    class Wrong(nn.Module):
        def __init__(self, *_):
            super().__init__()

        def forward(self, batch):
            return torch.full((len(batch), 5), torch.nan)

    monkeypatch.setattr(optimizing, "Collapsed", Wrong)
    with pytest.raises(RuntimeError, match="of the largest logit away"):
        optimize(randomised(tiny()), images(), backend="portable")


def test_bad_requests_are_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"precision is 'int3'; allowed are fp64, fp32"):
        optimize(model, images(), "int3")
    with pytest.raises(ValueError, match="backend is 'gpu'; allowed are auto, native"):
        optimize(model, images(), backend="gpu")
    with pytest.raises(ValueError, match="'native' has no fp16 on cpu; this is what portable have"):
        optimize(model, images(), "fp16", "native")
    with pytest.raises(ValueError, match="mixes tokens"):
        optimize(tiny(mixer="pooling"), images())


def test_is_a_public_name():
    assert riformer.optimize is optimize
