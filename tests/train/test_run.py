"""The run folder, against kills, damage and deleted files."""

import json
import logging
import os
import random
import shutil
from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch
from tiny import tiny, tiny_recipe

import riformer
from riformer.train import run as run_module
from riformer.train.loop import train
from riformer.train.run import Run

EPOCHS, STEPS = 3, 15  # five steps an epoch


def step(number: int) -> dict[str, object]:
    return {"kind": "step", "step": number, "epoch": (number - 1) // 5, "loss": 1 / number}


def epoch(number: int) -> dict[str, object]:
    return {"kind": "epoch", "step": 5 * number + 5, "epoch": number, "val_top1": 90.0 + number}


def logged(folder: Path, last_step: int = STEPS) -> Run:
    """A run with metrics and nothing else."""
    run = Run(folder)
    run.begin(tiny_recipe(), world_size=1)
    for number in range(1, last_step + 1):
        run.log(step(number))
        if number % 5 == 0:
            run.log(epoch(number // 5 - 1))
    return run


def state(number: int) -> dict[str, object]:
    return {"step": number, "model": {"weight": torch.full((3,), float(number))}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe(), tmp_path_factory.mktemp("finished") / "run").path


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in the second epoch."""
    folder = tmp_path_factory.mktemp("begun") / "run"

    def stop(line: dict) -> None:
        if line["kind"] == "step" and line["step"] == 8:
            os.kill(os.getpid(), 2)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe(), folder, stop)
    return folder


def copy(source: Path, destination: Path) -> Run:
    shutil.copytree(source, destination)
    return Run(destination)


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if line["kind"] == "step"]


# metrics


def test_metrics_come_back_as_they_were_logged(tmp_path: Path) -> None:
    run = logged(tmp_path, 5)
    assert run.metrics() == [*map(step, range(1, 6)), epoch(0)]
    assert run.read_metrics()[1] == []


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_here(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log({**step(1), "loss": nan, "soft": inf, "skipped": [3, 4]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (written["loss"], written["soft"], written["skipped"]) == (None, None, [3, 4])
    (line,) = run.metrics()
    assert isnan(line["loss"])
    assert isnan(line["soft"])


def test_any_flipped_bit_costs_the_lines_that_it_is_in_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = logged(tmp_path)
    file, expected = tmp_path / "metrics.jsonl", run.metrics()
    whole = file.read_bytes()
    draw = random.Random(0)
    for position in draw.sample(range(len(whole) - 1), 200):
        flip(file, position, draw.randrange(8))
        number = whole[:position].count(b"\n")
        lines, damaged = run.read_metrics()
        is_end = whole[position : position + 1] == b"\n"
        if damaged:
            assert damaged == [number + 1]
            assert lines == expected[:number] + expected[number + 1 + is_end :]
        else:  # in the name of the checksum, which is then one number more
            kept = [{k: v for k, v in line.items() if k in expected[i]} for i, line in enumerate(lines)]
            assert kept == expected
        file.write_bytes(whole)
    flip(file, whole.index(b"\n") + 5)
    run.metrics()
    assert caplog.messages == [f"{file}: damaged lines are left out: 2"]


def test_lines_without_a_checksum_are_read(tmp_path: Path) -> None:
    lines = [step(1), epoch(0), {"kind": "other", "step": 1}, {"step": 2}, {"kind": "step", "step": "2"}, [], 7, None]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Run(tmp_path).read_metrics() == ([step(1), epoch(0)], [3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("is_finished", [False, True])
def test_metrics_that_end_before_the_saved_state_are_said_to_be_lost(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_finished: bool
) -> None:
    run = Run(shutil.copytree(finished, tmp_path / "run"))
    if not is_finished:
        state = run.load_state()
        shutil.rmtree(run.path / "last")
        run.save_state({**state, "step": 10})
    file = run.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:9]))  # 8 steps and the first epoch
    train(tiny_recipe(), run.path)
    done = 15 if is_finished else 10
    assert f"{file} ends at step 8, but the saved state is of step {done}: lines were lost" in caplog.messages
    train(tiny_recipe(), shutil.copytree(finished, tmp_path / "whole"))
    assert len([message for message in caplog.messages if "lines were lost" in message]) == 1


def test_a_line_that_a_kill_cut_short_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = logged(tmp_path, 2)
    for rest in (b'{"kind": "st', b"\xff\xc3", b"\0" * 50, b"{"):
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(rest)
        assert run.metrics() == [step(1), step(2)]
        assert not caplog.messages
        run.cut_metrics(2)
        assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 2
    run.log(step(3))
    assert run.metrics() == [step(1), step(2), step(3)]


def test_a_resume_drops_later_lines_and_keeps_all_others_byte_for_byte(tmp_path: Path) -> None:
    run = logged(tmp_path)
    file = tmp_path / "metrics.jsonl"
    flip(file, file.read_bytes().index(b'"step": 3'))
    texts = file.read_bytes().splitlines(keepends=True)
    assert len(texts) == STEPS + EPOCHS
    run.cut_metrics(STEPS)
    assert file.read_bytes() == b"".join(texts)
    for at, kept in ((13, 15), (5, 6), (4, 4), (0, 0)):
        (tmp_path / str(at)).mkdir()
        shutil.copy(file, tmp_path / str(at))
        Run(tmp_path / str(at)).cut_metrics(at)
        assert (tmp_path / str(at) / "metrics.jsonl").read_bytes() == b"".join(texts[:kept])


def test_the_metrics_are_on_the_disk_before_a_state_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = logged(tmp_path, 3)
    flushed = []
    inode = (tmp_path / "metrics.jsonl").stat().st_ino

    def fsync(descriptor: int, real=os.fsync) -> None:
        flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "last").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run.save_state(state(3))
    assert flushed[0] == (inode, False)


# finished runs


def test_a_finished_run_is_left_as_it_is_whatever_its_metrics_are(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "metrics.jsonl").read_bytes()
    draw = random.Random(1)
    damages = [lambda content: content[: content.rindex(b"{")]]  # the line of the last epoch lost
    damages += [lambda content: content[:-1], lambda content: content + b'{"kind": "st', lambda content: b""]
    for position in (*draw.sample(range(len(whole)), 4), len(whole) - 1):
        damages.append(lambda content, at=position: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    for number, damage in enumerate(damages):
        run = copy(finished, tmp_path / str(number))
        (run.path / "metrics.jsonl").write_bytes(damage(whole))
        before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
        assert run.is_trained()
        train(tiny_recipe(), run.path)
        assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_a_finished_run_without_its_states_is_not_trained_again(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    for name in ("last", "last.previous"):
        shutil.rmtree(run.path / name)
    before = (run.path / "metrics.jsonl").read_bytes()
    assert run.is_trained()
    train(tiny_recipe(), run.path)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert not (run.path / "last").exists()


def test_a_run_is_trained_when_its_last_state_is_saved(finished: Path, begun: Path, tmp_path: Path) -> None:
    assert Run(finished).is_trained()
    assert not Run(begun).is_trained()
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(run.path / "last")  # killed after the last line, before the last state
    assert len([line for line in run.metrics() if line["kind"] == "epoch"]) == EPOCHS
    assert not run.is_trained()
    before = losses(run)
    train(tiny_recipe(), run.path)
    assert run.is_trained()
    assert losses(run) == before


def test_a_run_with_damaged_metrics_resumes_and_loses_no_later_line(
    finished: Path, begun: Path, tmp_path: Path
) -> None:
    whole = losses(Run(finished))
    file = begun / "metrics.jsonl"
    for line in (1, 4, 8):
        run = copy(begun, tmp_path / str(line))
        position = sum(map(len, file.read_bytes().splitlines(keepends=True)[: line - 1])) + 3
        flip(run.path / "metrics.jsonl", position)
        damaged = run.read_metrics()[1]
        assert damaged == [line]
        train(tiny_recipe(), run.path)
        kept = [loss for i, loss in enumerate(whole) if i != (line - 1 if line < 6 else line - 2)]
        assert losses(run) == kept
        assert run.read_metrics()[1] == damaged


# states


def write_state(folder: Path, content: bytes) -> None:
    """A state whose checksum is right, whatever it holds."""
    (folder / "state.pt").write_bytes(content)
    manifest = {"state.pt": run_module._sha256(folder / "state.pt"), "finished": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_state_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    assert run.load_state() is None
    run.save_state(state(1))
    run.save_state(state(2))
    last, before = tmp_path / "last", tmp_path / "whole"
    shutil.copytree(last, before)
    buffer = tmp_path / "list.pt"
    torch.save([1, 2], buffer)
    damages = {
        "its checksum differs": lambda: flip(last / "state.pt", 100),
        "its manifest.json is missing or damaged": lambda: (last / "manifest.json").write_text("[]"),
        "No such file": lambda: (last / "state.pt").unlink(),
        "state.pt cannot be unpickled": lambda: write_state(last, b"no pickle at all"),
        "its weights are not finite": lambda: (
            torch.save({**state(2), "ema": {"w": torch.tensor([nan])}}, last / "state.pt"),
            write_state(last, (last / "state.pt").read_bytes()),
        ),
        "list indices": lambda: write_state(last, buffer.read_bytes()),
    }
    for reason, damage in damages.items():
        caplog.clear()
        damage()
        loaded = run.load_state()
        assert loaded is not None
        assert loaded["step"] == 1
        (message,) = caplog.messages
        assert str(last) in message
        assert reason in message
        assert "weights_only" not in message
        shutil.rmtree(last)
        shutil.copytree(before, last)
    assert run.load_state()["step"] == 2
    for folder in (last, tmp_path / "last.previous"):
        write_state(folder, b"no pickle at all")
    with pytest.raises(ValueError, match=r"no saved state in .* can be used; start anew with another --out"):
        run.load_state()


def test_a_resume_from_the_state_before_learns_the_same(finished: Path, begun: Path, tmp_path: Path) -> None:
    run = copy(begun, tmp_path / "run")
    write_state(run.path / "last", b"no pickle at all")
    train(tiny_recipe(), run.path)
    assert losses(run) == losses(Run(finished))


# what else a run holds


@pytest.mark.parametrize("content", ["[]", "7", "null", '"text"', "{", "", "\xff"])
@pytest.mark.parametrize("name", ["recipe.json", "env.json", "data.json", "inputs.json", "evaluation.json"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: str) -> None:
    run = logged(tmp_path, 1)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{tmp_path / name} .*it is damaged; .*(restore|delete) it"):
        run.read(name)


@pytest.mark.parametrize("name", ["recipe.json", "env.json", "data.json", "inputs.json"])
def test_nothing_is_trained_over_a_damaged_file(begun: Path, tmp_path: Path, name: str) -> None:
    run = copy(begun, tmp_path / "run")
    (run.path / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name} holds no JSON object: it is damaged"):
        train(tiny_recipe(), run.path)


def test_the_best_model_is_used_after_a_kill_between_two_renames(finished: Path, tmp_path: Path) -> None:
    run = copy(finished, tmp_path / "run")
    expected = riformer.load(run.path).state_dict()
    (run.path / ".best.abcdefgh.tmp").mkdir()
    (run.path / ".best.abcdefgh.tmp" / "lock").touch()
    (run.path / "best").rename(run.path / ".best.abcdefgh.tmp" / "old")
    torch.testing.assert_close(riformer.load(run.path).state_dict(), expected, rtol=0, atol=0)
    assert run.best() == run.path / "best"
    (run.path / "best").rename(run.path / "best.previous")  # as version 0.1 left it
    assert run.best() == run.path / "best.previous"


def test_a_run_without_a_best_model_says_to_train_it(tmp_path: Path) -> None:
    run = logged(tmp_path / "run", 1)
    for action in (run.best, lambda: riformer.load(run.path)):
        with pytest.raises(ValueError, match=r"run has no best/ yet: train it first"):
            action()


def test_a_run_folder_that_is_deleted_during_the_training_is_named(tmp_path: Path) -> None:
    def delete(line: dict) -> None:
        if line["kind"] == "step" and line["step"] == 2:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(OSError, match=r"^the run folder .*/run is gone: it was deleted or moved during the training$"):
        train(tiny_recipe(), tmp_path / "run", delete)
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_locked_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write .*/run/\.lock: Is a directory"):
        train(tiny_recipe(), tmp_path / "run")


def test_a_run_before_its_training_makes_way_with_all_that_it_recorded(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin(tiny_recipe(), world_size=1)
    for name in ("data.json", "inputs.json"):
        run.write(name, {"of": "another recipe"})
    run.begin(tiny_recipe(seed=1), world_size=1)
    assert run.recipe().seed == 1
    assert run.read("data.json") is None
    assert run.read("inputs.json") is None


def test_metrics_that_cannot_be_written_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        Run(tmp_path).log(step(1))


def test_loading_an_unrelated_folder_says_what_it_is_not(tmp_path: Path) -> None:
    riformer.save(tiny(), tmp_path / "m")
    riformer.load(tmp_path / "m")
    with pytest.raises(ValueError, match="is neither a run folder nor a model folder"):
        riformer.load(tmp_path)


def test_nothing_is_logged_by_a_clean_run(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "riformer"):
        Run(finished).metrics()
        Run(finished).load_state()
    assert not caplog.messages
