"""Every target computes what the training form computes, in batches of any size, and a wrong one is never written."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from riformer.export import artifact as exporting
from riformer.export.artifact import Samples, combinations, export
from riformer.export.graph import Options, can_collapse
from riformer.export.int8 import Limits
from riformer.export.probe import make_probe
from riformer.export.targets import EXPORTERS, Target
from riformer.measure.bench import randomised
from riformer_runtime import Artifact, open_runner
from riformer_runtime.check import TOLERANCE, check, check_runner, inputs_of
from riformer_runtime.engines import PayloadRunner
from riformer_runtime.native.library import supported

SLOW = {"aoti", "executorch", "pt2"}
TARGETS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXPORTERS]


def network(name: str = "riformer_micro", **args) -> torch.nn.Module:
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32), "crop_pct": 0.9}
    return randomised(timm.create_model(name, num_classes=5, pretrained_cfg_overlay=overlay, **args)).eval()


def pictures(number: int = 16) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    pixels = [Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)) for _ in range(number)]
    return [image.resize((60, 45), Image.Resampling.BICUBIC) for image in pixels]


NETWORKS = {
    "riformer": lambda: network(),
    "pooling": lambda: network(mixer="pooling"),
    "global filter": lambda: network(mixer="global_filter", img_size=32),
    "resnet": lambda: network("resnet10t"),
    "deit": lambda: network("deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48),
}


def exported(model, target: str, folder: Path, options: Options) -> tuple[PayloadRunner, dict]:
    """The payload, and the probe that it is compared with."""
    if target == "native" and not supported():
        pytest.skip("no native network here")
    if target == "executorch":
        pytest.importorskip("executorch")
    probe, pixels = make_probe(model, pictures(), options.inside)
    example = torch.from_numpy(inputs_of(pixels, exporting.manifest_of(model).preprocessing, options.inside))
    return exporting._exported(model, EXPORTERS[target], example[:2].numpy(), folder, options, probe), probe


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["deploy", "collapsed"])
def test_a_riformer_is_the_same_in_every_target_and_form(tmp_path, target, form):
    if form not in EXPORTERS[target].forms:
        pytest.skip("the target has one form")
    runner, probe = exported(network(), target, tmp_path, Options(form=form))
    found = check_runner(runner, probe)
    assert found.problem == ""
    assert found.parity["max_rel"] < 1e-5
    assert found.parity["top1_agreement"] == 1
    assert (runner.precision, runner.payload.graph) == ("fp32", form)
    assert runner(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 5)
    assert runner.payload.any_size == (target != "executorch")
    with pytest.raises(ValueError, match="the network takes a float32 array"):
        runner(np.zeros((1, 3, 32, 32)))


FAST = (("openvino", "global filter"),)
OTHERS = [
    pytest.param(target, name, marks=[] if (target, name) in FAST else [pytest.mark.slow])
    for target in EXPORTERS
    for name in NETWORKS
    if target != "native" and name != "riformer"
]


@pytest.mark.parametrize(("target", "name"), OTHERS)
def test_other_networks_are_the_same_where_the_target_takes_them(tmp_path, target, name):
    if (target, name) == ("executorch", "global filter"):
        with pytest.raises(RuntimeError, match="cannot be exported to ExecuTorch"):
            exported(NETWORKS[name](), target, tmp_path, Options())
        return
    runner, probe = exported(NETWORKS[name](), target, tmp_path, Options())
    found = check_runner(runner, probe)
    assert found.problem == ""
    assert found.parity["max_rel"] < 2e-5
    assert runner.payload.graph == "training"


PRECISIONS = [
    pytest.param(name, precision, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, target in EXPORTERS.items()
    for precision in target.precisions
    if precision not in ("fp32", "int8")
]


@pytest.mark.parametrize(("target", "precision"), PRECISIONS)
def test_narrow_precisions_keep_to_their_tolerance(tmp_path, target, precision):
    runner, probe = exported(network(), target, tmp_path, Options(precision=precision))
    found = check_runner(runner, probe)
    assert found.problem == ""
    assert found.parity["max_rel"] < 0.3 * TOLERANCE[precision]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "pt2"])
@pytest.mark.parametrize("inside", ["normalise", "resize"])
def test_preprocessing_inside_the_graph(tmp_path, target, inside):
    runner, probe = exported(network(), target, tmp_path, Options(inside=inside))
    found = check_runner(runner, probe)
    assert found.problem == ""
    assert found.parity["max_rel"] < 1e-4
    assert runner.payload.inside == inside


def test_targets_without_a_graph_of_any_size_refuse_preprocessing_inside(tmp_path):
    with pytest.raises(ValueError, match="has no graph, so no --inside normalise"):
        exported(network(), "native", tmp_path, Options(inside="normalise"))
    with pytest.raises(ValueError, match="no --inside resize"):
        EXPORTERS["executorch"].export(network(), torch.zeros(1, 3, 32, 32), tmp_path, Options(inside="resize"))
    border = network()
    border.pretrained_cfg["crop_mode"] = "border"
    with pytest.raises(ValueError, match="no resize inside the graph for crop_mode='border'"):
        EXPORTERS["onnx"].export(border, torch.zeros(1, 3, 32, 32), tmp_path, Options(inside="resize"))


# artefacts

rates_by_form = exporting._rates_by_form


def wrong_native(model, example, folder, options):
    """An exporter of other weights."""
    return EXPORTERS["native"].export(randomised(network(), seed=1), example, folder, options)


@pytest.mark.skipif(not supported(), reason="no native network here")
def test_a_payload_that_computes_something_else_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTERS, "native2", Target(wrong_native, ("fp32",), ("collapsed",)))
    with pytest.raises(RuntimeError, match=r"native2 fp32: .* of the largest logit away from the training form"):
        export(network(), tmp_path / "out", Samples("noise", pictures()), ["native2"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not supported(), reason="no native network here")
def test_an_artifact_is_replaced_whole_and_keeps_what_is_not_its_own(tmp_path):
    out = tmp_path / "out"
    first = export(
        network(), out, Samples("noise", pictures()), ["native"], ["fp32", "bf16"], source={"run": "a"}
    ).artifact
    assert [str(payload) for payload in first.payloads] == ["native fp32", "native bf16"]
    assert (first.manifest.source["run"], first.manifest.form) == ("a", "deploy")
    assert len(first.manifest.source["weights_sha256"]) == 64
    assert {file.name for file in out.iterdir()} == {"manifest.json", "probe.npz", "native.npz"}
    assert all(not found.problem and not found.skipped for found in check(first))
    second = export(network(), out, Samples("noise", pictures()), ["native"]).artifact
    assert [str(payload) for payload in second.payloads] == ["native fp32"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has other things in it \(notes.txt\)"):
        export(network(), out, Samples("noise", pictures()), ["native"])
    assert Artifact(out).manifest == second.manifest


@pytest.mark.slow
def test_the_faster_form_is_written_and_both_rates_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_rates_by_form", rates_by_form)
    (payload,) = export(network(), tmp_path / "a", Samples("noise", pictures()), ["onnx"]).artifact.payloads
    rates = payload.speed["forms"]
    assert set(rates) == {"deploy", "collapsed"}
    assert payload.graph == max(rates, key=rates.get)
    assert payload.speed["images_per_s"] > 0


def test_one_file_has_everything(tmp_path):
    model = network()
    model.pretrained_cfg["label_names"] = ["a", "b", "c", "d", "e"]
    export(model, tmp_path / "model.onnx", Samples("noise", pictures()), ["onnx"])
    runner = open_runner(shutil.copy(tmp_path / "model.onnx", tmp_path / "elsewhere.onnx"))
    assert runner.manifest.class_names == ("a", "b", "c", "d", "e")
    assert runner.manifest.preprocessing == exporting.manifest_of(model).preprocessing
    images = torch.randn(3, 3, 32, 32)
    np.testing.assert_allclose(runner(images.numpy()), model(images).detach(), atol=1e-4)


def test_what_does_not_exist_is_named():
    riformer, teacher = network(), network(mixer="pooling")
    assert combinations(riformer, ["native", "onnx"], ["fp32", "bf16"]) == [
        ("native", "fp32"), ("native", "bf16"), ("onnx", "fp32"),
    ]  # fmt: skip
    for model, targets, precisions, message in (
        (riformer, ["tflite"], ["fp32"], "no target 'tflite'"),
        (riformer, ["onnx"], ["fp7"], "no precision 'fp7'"),
        (riformer, ["native"], ["int8"], "the target native has no int8"),
        (teacher, ["native"], ["fp32"], "takes RIFormers alone"),
    ):
        with pytest.raises(ValueError, match=message):
            combinations(model, targets, precisions)
    assert not can_collapse(teacher)


# int8


def agreement(model):
    """A stand-in for accuracy on validation images: the share of images with the training form's class, percent."""
    values = np.stack([np.asarray(image.resize((32, 32))) for image in pictures(64)])
    images = inputs_of(values, exporting.manifest_of(model).preprocessing, "")
    expected = model(torch.from_numpy(images)).detach().numpy().argmax(1)

    def accuracy(runner) -> float:
        return 100 * float((runner(images).argmax(1) == expected).mean())

    return accuracy


@pytest.mark.parametrize("target", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_is_written_where_it_keeps_its_limits(tmp_path, target):
    pytest.importorskip("nncf")
    model, samples = network(), Samples("noise", pictures(24))
    samples = replace(samples, accuracy=agreement(model))
    done = export(model, tmp_path / "out", samples, [target], ["fp32", "int8"], limits=Limits(5.0, 0.01))
    assert done.refused == {}
    float32, int8 = done.artifact.payloads
    assert (int8.precision, int8.accuracy["top1_fp32"]) == ("int8", 100.0)
    assert int8.accuracy["top1"] >= 95
    assert int8.accuracy["speedup"] > 0
    sizes = [sum((tmp_path / "out" / name).stat().st_size for name in p.files) for p in (float32, int8)]
    assert float32.parity["max_rel"] < 1e-5 < int8.parity["max_rel"]
    assert open_runner(done.artifact, precision="int8").precision == "int8"
    assert sizes[0] != sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_int8_that_is_not_worth_it_is_not_written_and_the_costliest_layers_are_named(tmp_path, target):
    pytest.importorskip("nncf")
    model = network()
    samples = Samples("noise", pictures(24), agreement(model))
    done = export(model, tmp_path / "out", samples, [target], ["fp32", "int8"], limits=Limits(5.0, 1000.0))
    assert [payload.precision for payload in done.artifact.payloads] == ["fp32"]
    assert "--min-speedup is 1000" in done.refused[target]
    assert "stages.0.blocks.0.mlp.fc1" in done.refused[target] or "stem.conv" in done.refused[target]
    with pytest.raises(RuntimeError, match=r"top-1 falls from 100.00 % .* more than --max-drop -200 allows"):
        export(model, tmp_path / "none", samples, [target], ["int8"], limits=Limits(-200.0, 0.0))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_layer_that_suffers_stays_in_float(tmp_path, target):
    """A layer whose channels differ by a million in size cannot be quantised by tensor: its input is."""
    pytest.importorskip("nncf")
    model = network()
    with torch.no_grad():
        block = model.stages[1].blocks[0]
        block.norm2.weight[0] *= 1e4
        block.mlp.fc1.weight[:, 0] /= 1e4
    samples = Samples("noise", pictures(24), agreement(model))
    (payload,) = export(model, tmp_path / "out", samples, [target], ["int8"], limits=Limits(7.0, 0.0)).artifact.payloads
    assert "stages.1.blocks.0.mlp.fc1" in " ".join(payload.accuracy["unquantised"])
    assert payload.accuracy["top1"] >= 93
