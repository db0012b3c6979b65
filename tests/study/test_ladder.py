"""A ladder: rungs by seeds, resumable, with teachers that are trained once and shared."""

import os
import shutil
import signal
from dataclasses import replace

import pytest
from few_digits import few_digits

from riformer.data import builtin
from riformer.recipes import RECIPES, RUNGS
from riformer.study import ladder
from riformer.study.ladder import run_ladder
from riformer.train.loop import train
from riformer.train.run import Run

real_train_one = ladder._train_one


def _train_one(*arguments):
    """What runs in the processes of a ladder, on few digits as here."""
    builtin.digits = few_digits
    real_train_one(*arguments)


@pytest.fixture(autouse=True)
def _fast(_few_digits, monkeypatch):
    monkeypatch.setattr(ladder, "_train_one", _train_one)


@pytest.fixture(scope="module")
def rungs():
    recipe = RECIPES["quickstart"]()
    optim = replace(recipe.optim, epochs=1, warmup_epochs=0.0, batch_size=50)
    recipe = replace(recipe, optim=optim, teacher=replace(recipe.teacher, epochs=1))
    other = replace(recipe, name="other", teacher=replace(recipe.teacher, mixer="pooling"))
    return [*(RUNGS[name](recipe) for name in ("soft", "full")), RUNGS["soft"](other)]


class Lines(list):
    """Progress lines, and how often each training began."""

    def __call__(self, line):
        self.append(line)

    def steps_of(self, name):
        return [(line["run"], line["step"]) for line in self if line["kind"] == "step" and line["name"] == name]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_teacher_is_trained_once_for_each_seed_and_taken_over(tmp_path, rungs, jobs):
    lines = Lines()
    runs = run_ladder(rungs, tmp_path, lines, jobs)
    assert [run.path.name for run in runs] == [f"{rung.name}-seed0" for rung in rungs]
    teachers = {line["name"] for line in lines if line["kind"] == "step" and line["name"].endswith("-teacher")}
    assert teachers == {"quickstart-soft-teacher", "other-soft-teacher"}
    for name in ("quickstart-soft-teacher", "other-soft-teacher"):
        trained = lines.steps_of(name)
        assert len(trained) == len(set(trained)) == 4
    soft, full, other = (run.path for run in runs)
    for file in ("best/model.safetensors", "metrics.jsonl", "data.json"):
        assert (full / "teacher" / file).read_bytes() == (soft / "teacher" / file).read_bytes()
        assert file == "data.json" or (other / "teacher" / file).read_bytes() != (soft / "teacher" / file).read_bytes()
    assert Run(full / "teacher").recipe().name == "quickstart-teacher"
    again = Lines()
    run_ladder(rungs, tmp_path, again)
    assert [line for line in again if line["kind"] == "step"] == []


def test_who_takes_a_teacher_over_learns_the_same_as_alone(tmp_path, rungs):
    soft, full = rungs[:2]
    run_ladder([replace(rung, seed=3) for rung in (soft, full)], tmp_path / "ladder", Lines())
    alone = train(replace(full, seed=3), tmp_path / "alone")

    def losses(run):
        return [
            {k: v for k, v in line.items() if k != "images_per_s"} for line in run.metrics() if line["kind"] == "step"
        ]

    together = Run(tmp_path / "ladder" / "quickstart-seed3")
    assert losses(together) == losses(alone)
    assert len(losses(alone)) == 4


def test_a_run_that_has_begun_its_own_teacher_keeps_it(tmp_path, rungs):
    soft, full = rungs[:2]
    train(replace(full, seed=5), tmp_path / "full")
    folder = tmp_path / "ladder" / "quickstart-seed5"
    shutil.copytree(tmp_path / "full", folder)
    before = (folder / "teacher" / "recipe.json").stat().st_mtime_ns
    run_ladder([replace(rung, seed=5) for rung in (soft, full)], tmp_path / "ladder", Lines())
    assert (folder / "teacher" / "recipe.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_training_that_fails_is_named_at_once_and_the_others_go_on(tmp_path, rungs, jobs, caplog):
    soft, full, other = (tmp_path / f"{rung.name}-seed0" for rung in rungs)
    soft.write_text("in the way of the run folder")
    with pytest.raises(RuntimeError) as raised:
        run_ladder(rungs, tmp_path, Lines(), jobs)
    message = str(raised.value)
    assert message.startswith("2 of 3 trainings failed:")
    assert f"  {full}: its teacher is that of {soft}, which failed" in message
    assert caplog.messages[0].startswith(f"{soft} failed, the other trainings go on: ")
    assert Run(other).is_trained()
    assert (other / "evaluation.json").exists()
    soft.unlink()
    assert [run.path for run in run_ladder(rungs, tmp_path, Lines())] == [soft, full, other]


def test_a_process_that_is_killed_is_a_failure(tmp_path, rungs, monkeypatch):
    monkeypatch.setattr("riformer.study.ladder._train_one", _killed)
    with pytest.raises(RuntimeError, match="its process ended with exit code -9"):
        run_ladder(rungs[:1], tmp_path, Lines(), jobs=2)


def _killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_teacher_is_borrowed_from_a_run_that_failed_after_it(tmp_path, rungs):
    soft, full = rungs[:2]
    folder = tmp_path / f"{soft.name}-seed0"

    def fails(line):
        if line["run"] == str(folder):
            raise RuntimeError("the student's first line")

    with pytest.raises(RuntimeError, match=r"1 of 2 trainings failed"):
        run_ladder([soft, full], tmp_path, fails)
    assert Run(tmp_path / f"{full.name}-seed0").is_trained()


def test_no_training_at_a_time_is_refused(tmp_path, rungs):
    with pytest.raises(ValueError, match="jobs is 0; it must be 1 or more"):
        run_ladder(rungs, tmp_path, Lines(), jobs=0)
