"""One thread per test process: small models gain nothing from more, and lose much when the machine is shared."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from few_digits import few_digits

from riformer.config import DataConfig
from riformer.data import builtin
from riformer.data.dataset import open_dataset
from riformer.export import artifact, int8
from riformer.study import evaluation

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it runs in the background


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A flat folder of class folders with 20 PNG files each: scans of the digits 0, 1 and 7, 12 pixels wide."""
    images = open_dataset(DataConfig(name="digits")).splits["train"]
    root = tmp_path / "images"
    for name, digit in (("one", 1), ("seven", 7), ("zero", 0)):
        (root / name).mkdir(parents=True)
        for i in [i for i, label in enumerate(images.labels) if label == digit][:20]:
            images.read(i).resize((12, 12)).save(root / name / f"{images.names[i]}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def _not_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests, so that the native network is compiled once."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_measurements() -> Iterator[None]:
    """Evaluations and exports measure speeds, which no test compares, for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (artifact, int8):
            patch.setattr(module, "ROUNDS", 3)
            patch.setattr(module, "SECONDS", 0.002)
        patch.setattr(evaluation, "SPEED_ROUNDS", 3)
        patch.setattr(evaluation, "SPEED_SECONDS", 0.001)
        yield


@pytest.fixture(scope="module")
def _few_digits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "digits", few_digits)
        yield
