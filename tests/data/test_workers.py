"""Workers end when the training process says so, and what happens in them is one message."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train.test_loop import losses

from riformer.data.workers import check_shared_memory, load
from riformer.train.run import Run

TRAINING = """
import sys
from dataclasses import replace
from train.test_loop import plain
from riformer.train.loop import train

recipe = plain(epochs=3)
recipe = replace(recipe, data=replace(recipe.data, num_workers=2))
print("begun", flush=True)
try:
    train(recipe, sys.argv[1], lambda line: print(line["kind"], line["step"], flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""

SLEEPERS = """
import os, time
from riformer.data.workers import load

class Sleep:
    def __getitem__(self, seconds):
        open({folder!r} + f"/{{os.getpid()}}", "w").close()
        time.sleep(seconds)
        return (1,)

next(load(Sleep(), [0, 60], 2))
print("up", flush=True)
time.sleep(60)
"""


class Squares:
    """Parts that are squares of their keys, but for keys that misbehave."""

    def __getitem__(self, key):
        if key == "unreadable":
            raise ValueError("photos/cat.jpg: the file is empty")
        if key == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if key == "asked to end":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return (4,)
        return (key * key,)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_come_in_order(num_workers):
    assert [part for (part,) in load(Squares(), [3, 1, 2], num_workers)] == [9, 1, 4]


def test_a_worker_outlives_the_signals_of_its_process_group():
    assert [part for (part,) in load(Squares(), [1, "asked to end", 3], 1)] == [1, 4, 9]


def test_an_image_that_a_worker_cannot_read_is_named_without_its_traceback():
    with pytest.raises(ValueError, match=r"^photos/cat\.jpg: the file is empty$"):
        list(load(Squares(), [1, "unreadable"], 1))


def test_a_worker_that_is_killed_is_one_message():
    with pytest.raises(RuntimeError, match=r"a worker of --data\.num-workers died, .* --shm-size"):
        list(load(Squares(), [1, "killed", 2], 1))


def test_more_than_fits_into_shared_memory_is_refused_with_advice(tmp_path):
    check_shared_memory(64, 224, 0, str(tmp_path))
    check_shared_memory(64, 32, 2, str(tmp_path))
    check_shared_memory(10**9, 224, 8, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"8 workers keep 2 parts of 1000000000 images .* --shm-size, lower"):
        check_shared_memory(10**9, 224, 8, str(tmp_path))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_loses_no_step(tmp_path, signum):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def start():
        command = [sys.executable, "-c", TRAINING, str(tmp_path / "run")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)

    with start() as process:
        for line in process.stdout:
            if line.startswith("step 7"):
                os.killpg(process.pid, signum)
                break
        process.stdout.read()
    assert process.returncode == 130
    done = Run(tmp_path / "run").load_state()["step"]
    assert done == len(losses(tmp_path / "run")) >= 7
    with start() as process:
        resumed = process.stdout.read()
    assert process.returncode == 0
    assert resumed.splitlines()[1] == f"start {done}"
    assert len(losses(tmp_path / "run")) == 15


def test_workers_do_not_outlive_a_process_that_is_killed(tmp_path):
    code = SLEEPERS.format(folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        workers = [int(path.name) for path in Path(tmp_path).iterdir()]
        process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert workers


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
