"""What was exported runs in environments that have no PyTorch, and no compiler."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from riformer.export.artifact import Samples, export
from riformer.measure.bench import randomised
from riformer.runtime.runner import Eager
from riformer_runtime import predict
from riformer_runtime.native.library import supported

ROOT = Path(__file__).parents[2]
NAMES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32), "label_names": list(NAMES)}
    return randomised(timm.create_model("riformer_micro", num_classes=3, pretrained_cfg_overlay=overlay)).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(8)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((60, 40)).save(path)
    return paths


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


class Environment:
    """A virtual environment with the wheel and some extras, whose programs find no compiler."""

    def __init__(self, folder: Path, wheel: Path, extras: str = ""):
        self.bin, self.folder = folder / "venv" / "bin", folder
        venv.create(folder / "venv")
        install = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        subprocess.run([*install, f"{wheel}{extras}"], check=True)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A program of the environment."""
        program, *arguments = map(str, command)
        clean = {"PATH": str(self.folder / "nothing"), "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            [self.bin / program, *arguments], env=clean, cwd=self.folder, capture_output=True, text=True
        )


def exported(model, images: list[Path], folder: Path, targets: list[str]) -> Path:
    export(model, folder, Samples("noise", map(Image.open, images)), targets)
    return folder


def assert_predicts(environment: Environment, artifact: Path, engine: str, model, images: list[Path]) -> None:
    """That the command's answers are those of the training form in PyTorch."""
    answer = environment.run("riformer", "predict", artifact, *images, "--json", "--top-k", "3", "--engine", engine)
    assert answer.returncode == 0, answer.stderr
    assert f"engine: {engine}" in answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(lines) == len(images)
    for line, expected in zip(lines, predict(Eager(model), images, top_k=3), strict=True):
        said = {one["class"]: one["probability"] for one in line["classes"]}
        assert said == pytest.approx(dict(expected.classes), abs=1e-4)


def test_the_wheel_alone_predicts_and_checks_without_torch_and_without_a_compiler(wheel, model, images, tmp_path):
    if "avx2" not in supported():
        pytest.skip("the native engine needs AVX2")
    assert "linux" in wheel.name  # it carries libraries
    environment = Environment(tmp_path, wheel)
    artifact = exported(model, images, tmp_path / "out", ["native", "onnx"])
    assert_predicts(environment, artifact, "native", model, images)
    assert not (tmp_path / ".cache").exists()  # nothing was compiled
    listed = environment.run("python", "-c", "import riformer_runtime, sys; print(*sys.modules)").stdout.split()
    others = (
        {name.partition(".")[0] for name in listed} - sys.stdlib_module_names - {"numpy", "PIL", "riformer_runtime"}
    )
    assert {name for name in others if not name.startswith("_")} == set()
    checked = environment.run("riformer", "check", artifact)
    assert checked.returncode == 0, checked.stderr
    assert "the engine onnxruntime is not installed: pip install 'riformer[onnx]'" in checked.stdout
    imported = environment.run("python", "-c", "import riformer")
    assert imported.stderr.splitlines()[-1].startswith(
        "ModuleNotFoundError: riformer needs torch, torchvision, timm here: pip install 'riformer[train]'"
    )
    for arguments in (["train"], ["eval", artifact], ["predict", tmp_path, images[0]]):
        answer = environment.run("riformer", *arguments)
        assert answer.returncode == 1
        assert "pip install 'riformer[train]'" in answer.stderr
        assert answer.stderr.count("\n") == 1
    served = environment.run("riformer", "serve", artifact)
    assert served.stderr == "riformer serve: serving needs fastapi: pip install 'riformer[serve]'\n"
    for verb in ("predict", "check", "serve"):
        assert environment.run("riformer", verb, "--help").returncode == 0


@pytest.mark.slow
def test_the_engines_of_others_predict_without_torch(wheel, model, images, tmp_path):
    environment = Environment(tmp_path, wheel, "[onnx,openvino]")
    artifact = exported(model, images, tmp_path / "out", ["onnx", "openvino"])
    for engine in ("onnxruntime", "openvino"):
        assert_predicts(environment, artifact, engine, model, images)
    assert environment.run("riformer", "check", artifact).stdout.count("right") == 2
    assert "torch" not in os.listdir(next((environment.bin.parent / "lib").glob("python*")) / "site-packages")


def test_verbs_that_run_exports_import_no_torch():
    """In an installation that has it, where importing it would cost seconds."""
    code = "import sys, riformer_cli\ntry: riformer_cli.run('{}', ['-h'])\nfinally: print('modules:', *sys.modules)"
    for verb in ("predict", "check", "serve"):
        command = [sys.executable, "-c", code.format(verb)]
        modules = subprocess.run(command, capture_output=True, text=True).stdout
        modules = modules.partition("modules:")[2].split()
        assert "riformer_runtime" in modules
        assert not {"torch", "timm", "riformer", "fastapi", "onnxruntime", "openvino"}.intersection(modules)
