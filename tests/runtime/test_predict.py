"""Parity and prediction."""

import io
import time

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import riformer
from riformer.preprocess import Preprocessing
from riformer.runtime.native import supported
from riformer.runtime.parity import compare
from riformer.runtime.predict import class_names, on_engine, predict

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
    one, many = (list(predict(model, map(png, colors), top_k=3, batch_size=n)) for n in (1, 4))
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
    predictions = list(predict(small(), [png("red"), io.BytesIO(b"no image"), png("blue")]))
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
        list(predict(small(), [png("red")], top_k=0))


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_a_runtime_predicts_like_its_model_with_its_names_and_preprocessing(backend):
    model = small(label_names=["a", "b", "c"], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    fast = riformer.optimize(model, torch.randn(2, 3, 16, 16), "fp32", backend)
    colors = ["red", "green", "blue"]
    for one, other in zip(*(predict(m, map(png, colors), top_k=3) for m in (model, fast)), strict=True):
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=1e-4)


def test_an_engine_is_chosen_and_named():
    model, text = on_engine(small())
    assert text.startswith("engine: native, fp32" if supported() else "engine: portable, fp32")
    assert next(iter(predict(model, [png("red")]))).classes
    mixing = timm.create_model("riformer_micro", mixer="pooling", num_classes=3).eval()
    model, text = on_engine(mixing)
    assert model is mixing
    assert text.startswith("engine: eager PyTorch, fp32 (the model mixes tokens (pooling)")
    assert on_engine(small(), "eager")[1] == "engine: eager PyTorch, fp32"
    with pytest.raises(ValueError, match="mixes tokens"):
        on_engine(mixing, "portable")


def test_logits_that_are_not_finite_name_no_class():
    model = small()
    with torch.no_grad():
        model.head.fc.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="logits are not finite"):
        list(predict(model, [png("red")]))


CONFIGS = [
    {}, {"interpolation": "bilinear"}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"crop_pct": 0.875},
    {"input_size": (3, 24, 40)}, {"input_size": (3, 40, 24), "crop_pct": 0.9}, {"mean": (0, 0, 0), "std": (1, 1, 1)},
    {"input_size": (3, 24, 40), "crop_mode": "squash", "interpolation": "bilinear"},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_preprocessing_is_timms_for_what_the_model_says(config):
    model = small(**{"crop_pct": 0.9, **config})
    expected = create_transform(**resolve_model_data_config(model))
    for size in ((50, 30), (30, 50), (17, 90), (200, 200)):
        image = Image.effect_noise(size, 90).convert("RGB")
        torch.testing.assert_close(Preprocessing.of_model(model).transform()(image), expected(image), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 100_000)])
def test_a_very_long_image_takes_no_more_than_its_middle(size):
    transform = Preprocessing.of_model(timm.create_model("riformer_s12")).transform()
    image = Image.new("RGB", size, "red")
    edges = [0 if side < 9 else side // 4 for side in size]
    image.paste("blue", (*edges, *(side - edge for side, edge in zip(size, edges, strict=True))))
    began = time.monotonic()
    pixels = transform(image)
    assert pixels.shape == (3, 224, 224)
    assert (pixels[2] > pixels[0]).all()  # blue, the middle
    assert time.monotonic() - began < 5
