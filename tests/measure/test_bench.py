import ctypes
import json
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from tiny import images, tiny

from riformer import cli
from riformer.cli.tables import print_bench
from riformer.export.engines import ENGINES, Engine
from riformer.measure import bench as module
from riformer.measure.bench import Competitor, bench, competitors, measure, open_network, peak_mib
from riformer.measure.cost import count_macs
from riformer.measure.limit import product_peak, products_alone
from riformer.runtime.parity import compare

QUICK = dict(batch_sizes=[2], img_sizes=[32], threads=[1], rounds=3, seconds=0.001, memory=False)
BARS = {"fp32": 1e-5, "bf16x3": 5e-5, "bf16": 3e-2, "fp16": 3e-2, "int8": 0.2}
PRECISIONS = [
    pytest.param(name, p, marks=[pytest.mark.slow] if (name[:8], p) == ("openvino", "int8") else [])  # NNCF is heavy
    for name, engine in ENGINES.items()
    for p in engine.precisions
    if "compile" not in name
]
COMPILED = [
    pytest.param(*pair, marks=pytest.mark.slow) for pair in (("compile", "fp32"), ("compile-collapsed", "bf16"))
]


def entries(*names):
    return [Competitor("riformer_micro", name, "fp32") for name in names]


@pytest.fixture(scope="module")
def network():
    return open_network("riformer_micro:num_classes=7")


@pytest.mark.parametrize(("name", "precision"), [*PRECISIONS, *COMPILED])
def test_every_engine_computes_the_same(network, name, precision):
    for num in (1, 3):
        batch = images(num, 3, 32, 32)
        with torch.inference_mode():
            report = compare(network, ENGINES[name].build(network, batch, precision), [batch])
        assert report.max_rel < BARS[precision]
        if name.startswith("compile"):
            break  # once is enough to wait for


def test_a_wrong_engine_shows_in_its_row(monkeypatch):
    def wrong(model, example, precision):
        return lambda batch: model(batch).roll(1, dims=1)

    monkeypatch.setitem(ENGINES, "wrong", Engine(wrong, ("fp32",)))
    rows = bench(entries("eager", "wrong"), **QUICK)["groups"][0]["rows"]
    assert rows[0]["max_rel"] < 1e-5
    assert rows[1]["max_rel"] > 0.1
    assert rows[1]["top1_agreement"] == 0


def test_combinations_that_do_not_exist_are_listed():
    there, absent = competitors(["riformer_micro", "resnet10t"], ["eager", "ours"], ["fp32", "bf16x3"])
    assert [str(entry) for entry in there] == [
        "riformer_micro eager fp32",
        "riformer_micro ours fp32",
        "riformer_micro ours bf16x3",
        "resnet10t eager fp32",
    ]
    assert "resnet10t ours fp32" in map(str, absent)
    with pytest.raises(ValueError, match="none of the backends ours has int8"):
        competitors(["riformer_micro"], ["ours"], ["int8"])
    with pytest.raises(ValueError, match="no backend 'tvm'; known are eager"):
        competitors(["riformer_micro"], ["tvm"], ["fp32"])
    with pytest.raises(ValueError, match="no precision 'int2'"):
        competitors(["riformer_micro"], ["eager"], ["int2"])


def test_turns_alternate_and_ratios_are_taken_round_by_round(monkeypatch):
    def rates(runners, batch, rounds, seconds):
        assert {"riformer_micro eager fp32", "riformer_micro ours fp32"} < set(runners)
        for name, runner in runners.items():
            for _ in range(rounds if name.startswith("peak") else 0):
                runner(batch)
        slow = [1.0, 2.0, 40.0]  # the machine was busy, then was not; the ratio never changed
        factors = {"products": 2, "riformer_micro ours fp32": 3}
        return {name: [factors.get(name, factors.get(name.split()[0], 1)) * rate for rate in slow] for name in runners}

    monkeypatch.setattr(module, "images_per_s", rates)
    first, second = bench(entries("eager", "ours"), **QUICK)["groups"][0]["rows"]
    assert first["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert second["ratio"] == {"median": 3, "low": 3, "high": 3}
    assert second["of_products_alone"]["median"] == pytest.approx(3 / 2)
    assert second["rates"] == [3.0, 6.0, 120.0]


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    calls = []

    def interrupted(*args, **settings):
        calls.append(settings["batch_size"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **settings)

    monkeypatch.setattr(module, "measure", interrupted)
    sizes = QUICK | {"batch_sizes": [1, 2, 3]}
    with pytest.raises(KeyboardInterrupt):
        bench(entries("eager"), **sizes, file=file)
    kept = json.loads(file.read_text())["groups"]
    result = bench(entries("eager"), **sizes, file=file)
    assert calls == [1, 2, 2, 3]
    assert result["groups"][0] == kept[0]
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    with pytest.raises(ValueError, match=r"another comparison \(competitors differ\)"):
        bench(entries("ours"), **QUICK, file=file)


def test_threads_are_set_and_put_back():
    group = measure([Competitor("riformer_micro", "eager", "fp32")], 1, 32, 2, 3, 0.001, False)
    assert group["env"]["num_threads"] == 2
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", ["riformer_micro", "resnet10t", "vit_tiny_patch16_224:img_size=32", "convnext_atto"])
def test_products_alone_are_all_of_them(name):
    """Counted as costs are: of these networks, all but norms are convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    model = open_network(name)
    run = products_alone(model, images(1, 3, 32, 32), torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(images())
    with torch.no_grad(), FlopCounterMode(display=False) as expected:
        model(images(1, 3, 32, 32))
    assert counter.get_total_flops() == expected.get_total_flops() > 0.9 * 2 * count_macs(model, 32) * 0.5


def test_the_peak_is_a_rate():
    assert product_peak(torch.float32, torch.device("cpu"))() > 1e8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_memory_grows_with_the_network():
    small, large = (
        peak_mib(Competitor(name, "ours", "fp32"), (1, 3, 32, 32), 1) for name in ("riformer_micro", "riformer_s12")
    )
    assert small + 5 > 0
    assert large > small + 40  # 12 M parameters of 4 bytes


def test_networks_by_name_arguments_or_path(tmp_path):
    assert open_network("riformer_micro:mixer=pooling,num_classes=3").mixers == ["pooling", "pooling"]
    for wrong, message in (("riformer_s13", "no model 'riformer_s13'"), ("riformer_micro:mixer", "not NAME=VALUE")):
        with pytest.raises(ValueError, match=message):
            open_network(wrong)
    from riformer import save

    saved = timm.create_model("riformer_micro", num_classes=4)
    save(saved, tmp_path / "saved")
    assert open_network(str(tmp_path / "saved")).num_classes == 4


def signal_stack():
    stack = ctypes.create_string_buffer(64)
    assert ctypes.CDLL(None).sigaltstack(None, stack) == 0
    return stack.raw


def test_networks_of_openvino_leave_no_freed_signal_stack_behind():
    """Otherwise the next signal that Python handles ends the process."""
    before = signal_stack()
    first, second = (ENGINES["openvino"].build(tiny().eval(), images(), "fp32") for _ in range(2))
    assert signal_stack() == before
    del first
    del second
    assert signal_stack() == before


def test_int8_without_its_engine_is_explained(monkeypatch):
    import sys

    for name, extra in (("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, extra, None)
        with pytest.raises(RuntimeError, match=r"pip install 'riformer\[(export|onnx)\]'"):
            ENGINES[name].build(tiny(), images(), "fp32")


def test_the_verb_prints_error_and_limit_beside_every_speed(tmp_path, capsys):
    file = tmp_path / "bench.json"
    options = ["--batch-sizes", "2", "--img-sizes", "32", "--rounds=3", "--seconds=0.001", "--memory=false"]
    assert cli.run("bench", ["riformer_micro", "--backends=[eager,ours]", *options, f"--out={file}"]) == 0
    result = json.loads(file.read_text())
    console = Console(width=140, record=True)
    print_bench(result, console)
    text = console.export_text()
    for row in result["groups"][0]["rows"]:
        line = next(line for line in text.splitlines() if f"{row['backend']} {row['precision']}" in line)
        for shown in (f"{row['max_rel']:.0e}", f"{row['of_peak']:.0%}", f"{row['ratio']['median']:.2f}×"):
            assert shown in line
    assert cli.run("bench", ["riformer_macro"]) == 1
    assert "no model 'riformer_macro'" in capsys.readouterr().err
