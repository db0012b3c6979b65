"""The scripts in benchmarks/ run, small; and what they conclude follows from what they measured."""

import json
import shutil
import sys

import pytest
from scripts import ROOT, load_script

import riformer
from riformer.config import DataConfig, check
from riformer.recipes import RUNGS, at_budget
from riformer.study.evaluation import evaluate_model
from riformer.train.run import Run

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = {
    "cpu.py": ["cpu_riformer_micro.json"],
    "gpu.py": ["s12.json", "resolution.json"],
    "throughput.py": ["throughput.json"],
    "resolution.py": ["resolution.json"],
    "serve.py": ["serve.json"],
    "latency.py": ["riformer_micro_mixer-pooling.json", "riformer_micro_mixer-pooling.svg"],
}


@pytest.fixture
def run_script(capsys, monkeypatch):
    """Runs a script of benchmarks/ in this process, which saves the seconds of its imports; returns what it prints."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        load_script(f"benchmarks/{script}").main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_measures_prints_and_keeps(tmp_path, script, run_script):
    files = [tmp_path / name for name in SCRIPTS[script]]
    out = files[0] if script in ("throughput.py", "resolution.py", "serve.py") else tmp_path
    output = run_script(script, "--smoke", "--rounds", "3", "--out", str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    measured = json.loads(files[0].read_text())
    if measured.get("kind") == "bench":
        for row in measured["groups"][0]["rows"]:
            assert f"{row['backend']} {row['precision']}" in output
            assert row["max_rel"] < 3e-2
            assert len(row["rates"]) == 3
    if measured.get("kind") == "serve":
        assert (measured["num_wrong"], measured["num_lost"]) == (0, 0)
        assert [len(rates) for rates in measured["images_per_s"].values()] == [3, 3, 3]
    assert "riformer_micro" in output


@pytest.fixture
def gpu():
    return load_script("benchmarks/gpu.py")


def test_the_bars_of_a_gpu_follow_from_the_files(tmp_path, gpu):
    assert [value for _, value, _, _ in gpu.bars(tmp_path)] == [None] * 6

    def write(name, rates_by_size):
        groups = [
            {"img_size": size, "rows": [{**vars(entry), "rates": rates} for entry, rates in rows]}
            for size, rows in rates_by_size.items()
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"groups": groups}))

    write("s12", {224: [(gpu.EAGER, [1e3, 1e3, 1e3]), (gpu.OURS, [3e3, 4e3, 6e3])]})
    write("compiled", {224: [(gpu.PLAIN, [1e3, 2e3, 3e3]), (gpu.OURS, [3e3, 4e3, 6e3])]})
    write("poolformer", {224: [(gpu.POOLFORMER, [1e3, 1e3, 1e3]), (gpu.OURS, [3e3, 4e3, 6e3])]})
    write("s12_one_image", {224: [(gpu.OURS, [1e4, 1e4, 1e4])]})
    write("resolution", {size: [(gpu.OURS, [1e9 / size**2 * (1.1 if size == 512 else 1)] * 3)] for size in gpu.SIZES})
    rate, over_plain, over_poolformer, m36, microseconds, spread = (value for _, value, _, _ in gpu.bars(tmp_path))
    assert (rate, over_plain, over_poolformer, m36, microseconds) == (4e3, 2.0, 4.0, None, 100.0)
    assert spread == pytest.approx(10)


def test_every_gpu_question_names_engines_that_exist(gpu):
    from riformer.export.engines import ENGINES

    for question in (*gpu.QUESTIONS, *gpu.SMOKE):
        for entry in question.entries:
            assert entry.precision in ENGINES[entry.backend].precisions


def test_the_ladder_records_each_run_once_and_repeats_bit_for_bit(tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*more):
        output = run_script("ladder.py", "--out", str(tmp_path / "records"), *more)
        return output[output.index("|  | paper | 4 steps |") :]

    first = run("--smoke")
    files = sorted((tmp_path / "records").iterdir())
    names = [f"glyphs-1x{rung}-seed{seed}.json" for rung in ("-identity", "") for seed in (0, 1)]
    assert [file.name for file in files] == names
    records = {file.name: json.loads(file.read_text()) for file in files}
    best = max(records.values(), key=lambda record: max(record["val_top1"]))
    kept = {name: riformer.load(tmp_path / f"records_{name}.safetensors") for name in ("best", "best_riformer")}
    for model in kept.values():
        result = evaluate_model(model, DataConfig(name="digits"))["fused"]
        assert result.top1 == pytest.approx(best["top1"]["deploy"])
    for record in records.values():
        assert record["steps"] == len(record["val_top1"]) * 4
        assert 0 < record["top1"]["deploy"] <= 100
        assert record["recipe"]["data"]["root"] == ""
    files[0].unlink()
    shutil.rmtree(tmp_path / "runs")
    again = run("--smoke", "--runs", str(tmp_path / "elsewhere"))
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["glyphs-1x-identity-seed0"]
    repeated = json.loads(files[0].read_text())
    assert repeated["losses_sha256"] == records[files[0].name]["losses_sha256"]
    assert repeated["top1"] == records[files[0].name]["top1"]
    assert again == first == run("--table")


def test_the_ladder_of_s12_runs_small(tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run_script("ladder.py", "--gpu", "--smoke")
    (run,) = (tmp_path / "runs" / "ladder").glob("glyphs-s12-1x-seed0")
    recipe = Run(run).recipe()
    assert (recipe.model.name, recipe.optim.precision) == ("riformer_s12", "bf16")
    assert (recipe.optim.channels_last, recipe.augment.policy) == (True, "warp")
    assert "| full | 75.36 |" in output


def test_the_ladders_plans_name_rungs_and_s12_is_what_it_says():
    ladder = load_script("benchmarks/ladder.py")
    for base, plan in ((ladder.small(), ladder.PLAN), (ladder.s12(), ladder.GPU), (ladder.small(), ladder.SMOKE)):
        for part in plan:
            for rung in part.rungs:
                check(RUNGS[rung](at_budget(base, part.budget)))
    recipe = ladder.s12()
    assert (recipe.model.name, recipe.model.depths, recipe.data.img_size) == ("riformer_s12", None, 64)
    assert recipe.optim.epochs >= 100
