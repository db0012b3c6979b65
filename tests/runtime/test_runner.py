"""Models of PyTorch as runners, and what they predict."""

import io

import pytest
import timm
import torch
from PIL import Image

import riformer
from riformer.runtime.manifest import class_names
from riformer.runtime.parity import compare
from riformer.runtime.runner import AsModule, Eager, as_runner
from riformer_runtime import predict
from riformer_runtime.engines import describe
from riformer_runtime.native.library import supported

LOGITS = torch.tensor([[1.0, -4.0], [0.5, 0.25], [2.0, 3.0]])


def test_parity_reports_the_largest_difference_over_all_batches():
    batches = [torch.zeros(3, 1), torch.ones(3, 1)]

    def candidate(images):
        return LOGITS + torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 0.0]]) * images

    report = compare(lambda images: LOGITS, candidate, batches)
    assert report.num_images == 6
    assert report.max_abs == pytest.approx(0.5)
    assert report.max_rel == pytest.approx(0.5 / 4)
    assert report.top1_agreement == pytest.approx(5 / 6)


def test_nan_is_no_agreement():
    report = compare(torch.ones_like, lambda x: x * torch.nan, [torch.ones(1, 2), torch.ones(1, 2)])
    assert not report.max_rel <= 1e9


def test_parity_of_equals_is_zero_and_of_nothing_an_error():
    report = compare(lambda x: LOGITS, lambda x: LOGITS, [torch.zeros(3, 1)])
    assert (report.max_abs, report.max_rel, report.top1_agreement) == (0, 0, 1)
    with pytest.raises(ValueError, match="no images"):
        compare(lambda x: LOGITS, lambda x: LOGITS, [])


def small(**config):
    torch.manual_seed(0)
    overlay = {"input_size": (3, 16, 16), "crop_pct": 1.0, **config}
    return timm.create_model("riformer_micro", num_classes=3, pretrained_cfg_overlay=overlay).eval()


def png(color: str) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), color).save(buffer, "PNG")
    return buffer


def test_predictions_keep_the_order_whatever_the_batch_and_are_the_models_own():
    model = small(label_names=["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    colors = ["red", "green", "blue", "white", "black"]
    one, many = (list(predict(Eager(model), map(png, colors), top_k=3, batch_size=n)) for n in (1, 4))
    assert len(one) == 5
    for color, single, batched in zip(colors, one, many, strict=True):
        pixel = torch.tensor(Image.new("RGB", (1, 1), color).getpixel((0, 0))) / 255
        pixel = (pixel - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
        expected = model(pixel.view(1, 3, 1, 1).expand(1, 3, 16, 16)).softmax(1)[0]
        for prediction in (single, batched):
            assert {n: pytest.approx(p, abs=1e-4) for n, p in prediction.classes} == dict(
                zip("abc", expected.tolist(), strict=True)
            )


def test_an_unreadable_image_is_an_error_of_its_own():
    predictions = list(predict(Eager(small()), [png("red"), io.BytesIO(b"no image"), png("blue")]))
    assert [bool(p.error) for p in predictions] == [False, True, False]
    assert predictions[1].classes == ()


def test_class_names_fall_back_to_imagenets_and_to_numbers():
    assert class_names(small()) == ["0", "1", "2"]
    with torch.device("meta"):
        names = class_names(timm.create_model("riformer_s12"))
    assert len(names) == 1000
    assert "goldfish" in names[1]


def test_top_k_below_one_is_refused():
    with pytest.raises(ValueError, match="top_k is 0"):
        list(predict(Eager(small()), [png("red")], top_k=0))


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_a_runtime_predicts_like_its_model_with_its_names_and_preprocessing(backend):
    model = small(label_names=["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    fast = riformer.optimize(model, torch.randn(2, 3, 16, 16), "fp32", backend)
    colors = ["red", "green", "blue"]
    for one, other in zip(*(predict(r, map(png, colors), top_k=3) for r in (Eager(model), fast)), strict=True):
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=1e-4)


@pytest.mark.skipif(not supported(), reason="no native network here")
def test_the_native_network_computes_unless_it_would_be_compiled_for_few_images(monkeypatch, tmp_path):
    model = small()
    with monkeypatch.context() as on_new_machine:
        on_new_machine.setenv("XDG_CACHE_HOME", str(tmp_path))
        runner, reason = as_runner(model, num_images=1)
    assert describe(runner) == "eager PyTorch, fp32"
    assert reason.startswith("for so few images the native network is not compiled")
    assert not list(tmp_path.rglob("*.so"))
    native, reason = as_runner(model, "native", num_images=1)
    assert (native.engine, native.precision, reason) == ("native", "fp32", "")
    assert as_runner(model, num_images=1)[0].engine == as_runner(model)[0].engine == "native"  # it is compiled now
    assert next(iter(predict(native, [png("red")]))).classes


def test_what_the_runtime_does_not_take_is_computed_by_pytorch():
    mixing = timm.create_model("riformer_micro", mixer="pooling", num_classes=3).eval()
    assert as_runner(small(), "eager")[1] == ""
    runner, reason = as_runner(mixing)
    assert describe(runner) == "eager PyTorch, fp32"
    assert reason.startswith("the model mixes tokens (pooling)")
    for network in (mixing, timm.create_model("resnet18", num_classes=3).eval()):
        assert len(next(iter(predict(as_runner(network)[0], [png("red")]))).classes) == 3
        with pytest.raises(ValueError, match=r"mixes tokens|takes a MetaFormer"):
            as_runner(network, "portable")


def test_a_runner_as_a_model_carries_names_and_preprocessing():
    model = small(label_names=["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    again = AsModule(Eager(model))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images), model(images))
    assert Eager(again).manifest.class_names == ("a", "b", "c")
    assert Eager(again).manifest.preprocessing == Eager(model).manifest.preprocessing


def test_networks_that_predict_no_classes_are_refused():
    with pytest.raises(ValueError, match="no classifier"):
        list(predict(Eager(timm.create_model("riformer_micro", num_classes=0)), [png("red")]))
    with pytest.raises(ValueError, match="carries no preprocessing"):
        Eager(torch.nn.Flatten())
    with pytest.raises(ValueError, match="carries 2 class names, but has 3 outputs"):
        Eager(small(label_names=["a", "b"]))


def test_logits_that_are_not_finite_name_no_class():
    model = small()
    with torch.no_grad():
        model.head.fc.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="logits are not finite"):
        list(predict(Eager(model), [png("red")]))
