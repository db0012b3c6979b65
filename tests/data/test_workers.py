"""Workers live as long as the training process and no longer, and what goes wrong in them is one message."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train.test_loop import lines, plain

from riformer.config import AugmentConfig, DataConfig
from riformer.data import workers
from riformer.data.batches import TrainBatches, eval_batches, preprocessing
from riformer.data.dataset import ImageList
from riformer.data.workers import check_shared_memory, dead_workers_explained, load
from riformer.train.loop import train
from riformer.train.run import Run

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
TRAINING = """
import sys
import torch
from data.test_workers import with_workers
from riformer.train.loop import train

torch.set_num_threads(1)
try:
    train(with_workers(), sys.argv[1], lambda line: print(line["kind"], line["step"], flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""
SLEEPING = """
import multiprocessing, os, sys, time
from pathlib import Path
from riformer.data.workers import load

class Sleep:
    def __getitem__(self, seconds):
        Path(sys.argv[2], str(os.getpid())).touch()
        time.sleep(seconds)
        return (1,)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    batches = load(Sleep(), [0, 0, 600, 600], 2)
    next(batches), next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""
FAILING = """
import time
from riformer.data.workers import load

class Numbers:
    def __getitem__(self, key):
        return (key,)

batches = load(Numbers(), list(range(100)), 2)
for number, in batches:
    if number == 2:
        print("raising", flush=True)
        raise KeyError("a mistake in the user's script")
"""


class Parts:
    """Parts that are the squares of their keys, but for keys that name what goes wrong."""

    def __getitem__(self, key):
        if key == "unreadable":
            raise ValueError("photos/cat.jpg:\n  the file is empty")
        if key == "no such key":
            raise KeyError("labels")
        if key == "not to be pickled":
            raise type("Local", (Exception,), {})("of a class that no other process knows")
        if key in ("SIGKILL", "SIGBUS"):
            os.kill(os.getpid(), getattr(signal, key))
        if key == "signals":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return (4,)
        if key == "hangs":
            time.sleep(600)
        if key == "large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # shared memory is a file
            return (torch.zeros(2**20),)
        return (key * key,)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_come_in_order(num_workers):
    assert [part for (part,) in load(Parts(), [3, 1, 2], num_workers)] == [9, 1, 4]


def test_workers_ignore_signals_that_are_not_for_them():
    assert [part for (part,) in load(Parts(), [1, "signals", 3], 1)] == [1, 4, 9]


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("unreadable", ValueError, r"^photos/cat\.jpg:\n  the file is empty$"),
        ("no such key", RuntimeError, "^KeyError: 'labels'$"),
        ("not to be pickled", RuntimeError, "^Local: of a class that no other process knows$"),
        ("large", RuntimeError, r"^a worker cannot put its part into shared memory \(.*\): .* --shm-size, lower"),
        ("SIGKILL", RuntimeError, r"^a worker of --data\.num-workers died, .* --shm-size, lower"),
        ("SIGBUS", RuntimeError, r"^a worker of --data\.num-workers died, .* --shm-size, lower"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_one_message(key, kind, message):
    with pytest.raises(kind, match=message) as caught:
        list(load(Parts(), [1, key, 2], 1))
    assert "Traceback" not in str(caught.value)
    if not key.startswith("SIG"):  # for those who look for a mistake of ours
        assert "Traceback" in str(caught.value.__cause__)


def test_a_worker_that_dies_during_a_step_is_the_same_message():
    @dead_workers_explained()
    def steps():
        for _ in load(Parts(), [1, "SIGKILL"], 2):
            time.sleep(30)  # in which torch's handler of SIGCHLD raises

    with pytest.raises(RuntimeError, match=r"^a worker of --data\.num-workers died"):
        steps()
    with pytest.raises(RuntimeError, match=r"^out of memory on the GPU$"), dead_workers_explained():
        raise RuntimeError("out of memory on the GPU")


def test_a_worker_that_hangs_is_an_error_and_ends(monkeypatch):
    monkeypatch.setattr(workers, "WORKER_SECONDS", 1)
    with pytest.raises(RuntimeError, match="has computed the next part of a batch in 1 s"):
        list(load(Parts(), ["hangs"], 1))
    assert multiprocessing.active_children() == []


def test_an_error_that_nobody_catches_ends_python_at_once():
    command = [sys.executable, "-c", FAILING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT) as python:
        assert python.stdout.readline() == "raising\n"
        began = time.monotonic()
        errors = python.stderr.read()
    assert time.monotonic() - began < 15
    assert python.returncode == 1
    assert errors.strip().endswith("""KeyError: "a mistake in the user's script\"""")


# --- shared memory ----------------------------------------------------------------------------------------------------


def test_more_than_fits_into_shared_memory_is_refused_with_advice(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    folder = str(tmp_path)
    check_shared_memory(free // 10, 100, 2, held=2, folder=folder)  # 6 parts
    check_shared_memory(free, 100, 0, folder=folder)
    check_shared_memory(free, 100, 8, folder=str(tmp_path / "absent"))
    check_shared_memory(free // 10, 5, 8, folder=folder)  # never more parts than there are
    advice = r"--shm-size, lower --data\.num-workers or --optim\.batch-size, or raise --optim\.accumulation"
    with pytest.raises(ValueError, match=rf"--data\.num-workers 8 keeps up to 18 parts .* {advice}"):
        check_shared_memory(free // 10, 100, 8, folder=folder)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # processes of torchrun share the memory of their machine
    with pytest.raises(ValueError, match="in each of 2 processes"):
        check_shared_memory(free // 10, 100, 2, held=2, folder=folder)


def test_training_and_evaluation_are_refused_before_they_hang():
    images = ImageList(["a"] * 64, [0] * 64, np.zeros((64, 8, 8), np.uint8), "")
    vast = DataConfig(img_size=100_000, num_workers=2)
    with pytest.raises(ValueError, match=r"--data\.num-workers 2 keeps up to 2 parts"):
        TrainBatches(images, 10, vast, AugmentConfig(), 0, batch_size=32)
    with pytest.raises(ValueError, match=r"--data\.num-workers 2 keeps up to 4 parts"):
        eval_batches(images, preprocessing(vast), 16, num_workers=2)
    TrainBatches(images, 10, vast, AugmentConfig(policy="warp"), 0, batch_size=32)  # workers send 8 x 8 bytes


# --- signals and deaths -----------------------------------------------------------------------------------------------


def with_workers(num_workers=2):
    recipe = plain(epochs=3, batch_size=200)
    return replace(recipe, data=replace(recipe.data, num_workers=num_workers))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    train(with_workers(0), folder)
    return lines(folder)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_loses_no_step_and_the_run_resumes_exactly(tmp_path, uninterrupted, signum):
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 7"):
                os.killpg(process.pid, signum)
                break
        process.stdout.read()
    assert process.returncode == 130
    done = Run(tmp_path).load_state()["step"]
    assert 7 <= done < 15
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "step"] == list(range(1, done + 1))
    train(with_workers(), tmp_path)
    assert lines(tmp_path) == uninterrupted


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_do_not_outlive_a_training_process_that_is_killed(tmp_path, method):
    script, folder = tmp_path / "sleeping.py", tmp_path / "workers"
    script.write_text(SLEEPING)
    folder.mkdir()
    command = [sys.executable, str(script), method, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == "ready\n"
        pids = [int(path.name) for path in folder.iterdir()]
        assert len(running(pids)) == 2
        process.kill()
    deadline = time.monotonic() + 10
    while running(pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pids: list[int]) -> list[int]:
    """Those of the processes that exist and have not ended."""
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    """The letter that Linux gives the state of a process, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
