"""The scripts in benchmarks/ run, small; and what they conclude follows from what they measured."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from scripts import ROOT, load_script

BENCHMARKS = ROOT / "benchmarks"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side
SCRIPTS = {
    "cpu.py": ["cpu_riformer_micro.json"],
    "gpu.py": ["s12.json", "resolution.json"],
    "throughput.py": ["throughput.json"],
    "resolution.py": ["resolution.json"],
    "latency.py": ["riformer_micro_mixer-pooling.json", "riformer_micro_mixer-pooling.svg"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_measures_prints_and_keeps(tmp_path, script):
    files = [tmp_path / name for name in SCRIPTS[script]]
    out = files[0] if script in ("throughput.py", "resolution.py") else tmp_path
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", "--rounds", "3", "--out", str(out)]
    result = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    measured = json.loads(files[0].read_text())
    if measured.get("kind") == "bench":
        for row in measured["groups"][0]["rows"]:
            assert f"{row['backend']} {row['precision']}" in result.stdout
            assert row["max_rel"] < 3e-2
            assert len(row["rates"]) == 3
    assert "riformer_micro" in result.stdout


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

    write("s12", {224: [(gpu.PLAIN, [1e3, 2e3, 3e3]), (gpu.POOLFORMER, [1e3, 1e3, 1e3]), (gpu.OURS, [3e3, 4e3, 6e3])]})
    write("s12_one_image", {224: [(gpu.OURS, [1e4, 1e4, 1e4])]})
    write("resolution", {size: [(gpu.OURS, [1e9 / size**2 * (1.1 if size == 512 else 1)] * 3)] for size in gpu.SIZES})
    rate, over_plain, over_poolformer, m36, microseconds, spread = (value for _, value, _, _ in gpu.bars(tmp_path))
    assert (rate, over_plain, over_poolformer, m36, microseconds) == (4e3, 2.0, 4.0, None, 100.0)
    assert spread == pytest.approx(10)


def test_every_gpu_question_names_engines_that_exist(gpu):
    from riformer.deploy.backends import BACKENDS

    for question in (*gpu.QUESTIONS, *gpu.SMOKE):
        for entry in question.entries:
            assert entry.precision in BACKENDS[entry.backend].precisions


def test_the_ladder_records_each_run_once_and_repeats_bit_for_bit(tmp_path):
    def run(*more):
        command = [sys.executable, str(BENCHMARKS / "ladder.py"), "--out", str(tmp_path / "records"), *more]
        result = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = run("--smoke")
    files = sorted((tmp_path / "records").iterdir())
    assert [file.name for file in files] == [f"{r}-1x-seed{s}.json" for r in ("full", "identity") for s in (0, 1)]
    records = {file.name: json.loads(file.read_text()) for file in files}
    assert "identity → " not in first.replace("identity → full", "")
    for record in records.values():
        assert record["steps"] == len(record["val_top1"]) * 20
        assert 0 < record["top1"]["deploy"] <= 100
        assert record["recipe"]["data"]["root"] == ""
    files[0].unlink()
    shutil.rmtree(tmp_path / "runs")
    again = run("--smoke", "--runs", str(tmp_path / "elsewhere"))
    repeated = json.loads(files[0].read_text())
    assert repeated["losses_sha256"] == records[files[0].name]["losses_sha256"]
    assert repeated["top1"] == records[files[0].name]["top1"]
    assert again.splitlines()[-4:] == first.splitlines()[-4:]
    assert run("--table").splitlines()[-4:] == first.splitlines()[-4:]


def test_the_ladders_table_pairs_by_seed():
    ladder = load_script("benchmarks/ladder.py")
    scores = {"identity": {0: 80.0, 1: 82.0, 2: 90.0}, "soft": {0: 81.0, 1: 83.5, 2: 91.5, 3: 50.0}, "mixer": {0: 95.0}}
    records = [
        {"rung": rung, "budget": 1, "seed": seed, "steps": 1008, "top1": {"deploy": value}}
        for rung, by_seed in scores.items()
        for seed, value in by_seed.items()
    ]
    lines = ladder.table(records).splitlines()
    assert "| identity | 84.00 ± 5.29 (3 seeds) |" in lines
    assert "| identity → soft | +1.33 [+0.62, +2.05] |" in lines  # 1, 1.5, 1.5: 4.303 * 0.2887 / 3 ** 0.5
    assert "| identity → mixer | +15.00 (1 seed) |" in lines
