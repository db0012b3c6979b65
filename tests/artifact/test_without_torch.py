"""What was exported runs in environments that have no PyTorch, and no compiler."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from riformer.export.artifact import Samples, export
from riformer.measure.bench import randomised
from riformer.runtime.runner import Eager
from riformer_runtime import Payload, predict
from riformer_runtime.artifact import file_sum, read_manifest
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


SOURCES = ("LICENSE", "README.md", "pyproject.toml", "riformer", "riformer_cli.py", "riformer_runtime", "setup.py")


def pip(*arguments: str | Path, **env: str) -> str:
    """Runs pip, which looks at neither the checkout nor its environment; returns what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def built_wheel(folder: Path, **env: str) -> tuple[Path, str]:
    """From a copy of the sources, since what a build leaves behind becomes part of the next one; and what it prints."""
    (folder / "sources").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "sources" / name)
    printed = pip("wheel", "--verbose", "--no-deps", "--wheel-dir", folder, folder / "sources", **env)
    (wheel,) = folder.glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("wheel"))[0]


class Environment:
    """A virtual environment with the wheel and some extras, whose programs find no compiler."""

    def __init__(self, folder: Path, wheel: Path, extras: str = ""):
        self.bin, self.folder = folder / "venv" / "bin", folder
        venv.create(folder / "venv")
        pip("--python", self.bin / "python", "install", "--quiet", "--no-compile", f"{wheel}{extras}")

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


def with_payloads_of(engines: tuple[str, ...], artifact: Path) -> Path:
    """The artefact with payloads of engines that are not installed, which therefore nothing opens."""
    manifest = read_manifest(artifact)
    payloads = list(manifest.payloads)
    for engine in engines:
        (artifact / engine).write_bytes(b"a graph")
        payloads.append(Payload(engine, "fp32", {engine: file_sum(artifact / engine)}))
    (artifact / "manifest.json").write_text(replace(manifest, payloads=tuple(payloads)).to_json())
    return artifact


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
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")  # it carries libraries
    environment = Environment(tmp_path, wheel)
    artifact = exported(model, images, tmp_path / "out", ["native"])
    artifact = with_payloads_of(("onnxruntime", "openvino"), artifact)
    assert_predicts(environment, artifact, "native", model, images)
    assert not (tmp_path / ".cache").exists()  # nothing was compiled
    (compiled,) = environment.bin.parent.glob("lib/python*/site-packages/riformer_runtime/native/compiled")
    for library in compiled.glob("native-*.so"):  # what else it needs is there on every system
        needs = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
        assert f"libgomp.so.1 => {compiled}/" in needs
        assert {line.split()[0].partition(".")[0] for line in needs.splitlines()} <= {
            "linux-vdso", "libgomp", "libc", "libm", "/lib64/ld-linux-x86-64",
        }  # fmt: skip
    listed = environment.run("python", "-c", "import riformer_runtime, sys; print(*sys.modules)").stdout.split()
    others = (
        {name.partition(".")[0] for name in listed} - sys.stdlib_module_names - {"numpy", "PIL", "riformer_runtime"}
    )
    assert {name for name in others if not name.startswith("_")} == set()
    checked = environment.run("riformer", "check", artifact)
    assert checked.returncode == 0, checked.stderr
    for engine, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        assert f"{engine} fp32: the engine {engine} is not installed: pip install 'riformer[{extra}]'" in checked.stdout
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
    for library in compiled.glob("native-*.so"):
        library.write_bytes(b"of another system")
    answer = environment.run("riformer", "predict", artifact, images[0], "--engine", "native")
    assert answer.returncode == 1
    assert "the installed native network cannot be loaded here" in answer.stderr
    assert "the native network needs a C++ compiler: install g++, or name one in CXX" in answer.stderr


@pytest.mark.slow
def test_without_a_compiler_the_wheel_holds_the_sources_alone(tmp_path):
    wheel, printed = built_wheel(tmp_path, PATH=str(tmp_path / "nothing"), CXX="")
    assert "no compiled libraries: there is no C++ compiler" in printed
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "riformer_runtime/native/network.cpp" in names
    assert not [name for name in names if ".so" in name]


@pytest.mark.slow
def test_the_engines_of_others_predict_without_torch(wheel, model, images, tmp_path):
    environment = Environment(tmp_path, wheel, "[onnx,openvino]")
    artifact = exported(model, images, tmp_path / "out", ["onnx", "openvino"])
    for engine in ("onnxruntime", "openvino"):
        assert_predicts(environment, artifact, engine, model, images)
    assert environment.run("riformer", "check", artifact).stdout.count("right") == 2
    assert "torch" not in os.listdir(next((environment.bin.parent / "lib").glob("python*")) / "site-packages")


def test_verbs_that_run_exports_import_no_torch():
    """In an installation that has it, where importing it would cost seconds; nor what else they can do without."""
    code = "import sys, riformer_cli\ntry: riformer_cli.run('{}', ['-h'])\nfinally: print('modules:', *sys.modules)"
    unwanted = {"torch", "timm", "riformer", "fastapi", "onnxruntime", "openvino", "importlib.metadata", "pygments"}
    for verb in ("predict", "check", "serve"):
        command = [sys.executable, "-c", code.format(verb)]
        modules = subprocess.run(command, capture_output=True, text=True).stdout
        modules = modules.partition("modules:")[2].split()
        assert "riformer_runtime" in modules
        assert not unwanted.intersection(modules)
    modules = subprocess.run([sys.executable, "-c", code.format("--help")], capture_output=True, text=True).stdout
    assert not {"numpy", "PIL", "rich", "riformer_runtime"}.intersection(modules.partition("modules:")[2].split())


def test_of_pillows_plugins_those_of_the_formats_that_are_read_are_imported(images):
    code = "import sys, riformer_runtime.images as i\ni.read_image(sys.argv[1])\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code, images[0]], capture_output=True, text=True).stdout.split()
    assert "PIL.PngImagePlugin" in modules
    assert not {"PIL.PdfImagePlugin", "PIL.EpsImagePlugin", "PIL.PsdImagePlugin"}.intersection(modules)
