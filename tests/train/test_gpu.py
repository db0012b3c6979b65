"""Training on a GPU; skipped without one. `pytest -m gpu` runs what needs one."""

import dataclasses
import os
import socket

import pytest
import torch
from train.test_loop import changed, losses, plain, tiny

from riformer.measure.dryrun import dry_run
from riformer.train.loop import train
from riformer.train.run import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """Atomic additions, as in the backward pass of interpolation, would differ between two equal trainings."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def stop_after(step):
    def progress(line):
        if line["kind"] == "step" and line["step"] == step and line["name"] == "tiny":
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_with_two_teachers_resumes_exactly(tmp_path, precision):
    recipe = changed(tiny(), "optim", precision=precision)
    train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "resumed", stop_after(7))
    train(recipe, tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    terms = [line for line in Run(tmp_path / "whole").metrics() if line["kind"] == "step"][-1]
    assert all(torch.tensor(terms[name]).isfinite() for name in ("soft", "block", "mixer", "relation"))


def test_the_losses_are_those_of_the_cpu(tmp_path, monkeypatch):
    recipe = plain(epochs=2)
    train(recipe, tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(recipe, tmp_path / "cpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_one_process_with_nccl_learns_as_without(tmp_path, monkeypatch):
    recipe = dataclasses.replace(tiny(), model=plain().model)
    train(recipe, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    train(recipe, tmp_path / "group")
    assert losses(tmp_path / "group") == losses(tmp_path / "alone")


def test_the_dry_run_tells_the_memory_of_the_training(tmp_path):
    recipe = changed(plain(batch_size=40), "data", img_size=64)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dims=(64, 64)))
    (projection,) = dry_run(recipe)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(recipe, tmp_path)
    assert projection.memory == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)


def test_out_of_memory_says_what_to_do(tmp_path):
    recipe = changed(plain(batch_size=40), "data", img_size=256)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dims=(256, 256)))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**29 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(RuntimeError, match=r"images at once do not fit; raise --optim\.accumulation"):
            train(recipe, tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_cudas_state_is_as_it_was_after_a_training(tmp_path):
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    train(plain(), tmp_path)
    after = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    assert after == flags
    assert os.environ.get("WORLD_SIZE") is None
