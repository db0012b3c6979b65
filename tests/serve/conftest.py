"""Two small artefacts, and a server of them in a process of its own."""

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from riformer.export.artifact import Samples, export
from riformer.measure.bench import randomised
from riformer_runtime.native.library import supported

NAMES = ("cat", "dog", "<b>bird</b>", "a fish with a rather long name, as some data sets have them")


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> dict[str, Path]:
    """By name, with classes that are no plain words."""
    if not supported():
        pytest.skip("no native network here")
    rng, paths = np.random.default_rng(0), {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        overlay = {"input_size": (3, 48, 48), "label_names": list(NAMES)}
        model = timm.create_model("riformer_micro", num_classes=len(NAMES), pretrained_cfg_overlay=overlay)
        images = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((64, 48)) for _ in range(8)]
        paths[name] = tmp_path_factory.mktemp("served") / name
        export(randomised(model, seed).eval(), paths[name], Samples("noise", images), ["native"])
    return paths


def image_file(seed: int, kind: str = "PNG", size: tuple[int, int] = (90, 60), **settings) -> bytes:
    """The content of an image file."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels.convert("P" if kind == "GIF" else "RGB").save(file, kind, **settings)
    return file.getvalue()


@pytest.fixture(scope="session")
def image() -> Callable[..., bytes]:
    """`image_file`."""
    return image_file


class Process:
    """A server in a process of its own.

    Attributes:
        process: of `riformer serve`.
        url: that it answers at.
    """

    def __init__(self, arguments: list[str]):
        command = [sys.executable, "-m", "riformer_cli", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", self.url), self.process.stderr.read()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Process]]:
    """Starts servers; ends those that still run."""
    started: list[Process] = []

    def start(*arguments: str | Path) -> Process:
        started.append(Process([str(argument) for argument in arguments]))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
