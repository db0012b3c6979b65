"""Data in another place: a run goes on exactly if its content is equal, and is refused otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from image_folders import put
from train.test_inputs import stop_after
from train.test_loop import losses, plain

from riformer import cli
from riformer.config import DistillConfig, TeacherConfig
from riformer.train.loop import train
from riformer.train.run import Run


@pytest.fixture
def recipe(image_folder: Path):
    base = plain(batch_size=16, epochs=2)
    distill = DistillConfig(logit_teacher="own", soft_weight=1.0)
    data = replace(base.data, name=f"folder:{image_folder}")
    return replace(base, data=data, distill=distill, teacher=TeacherConfig(epochs=1))


def test_a_moved_folder_resumes_exactly(image_folder: Path, tmp_path: Path, recipe) -> None:
    train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_in_student(3))
    moved = image_folder.rename(tmp_path / "moved")
    put(moved / "one" / "later.png")  # which the record does not have
    with pytest.raises(ValueError, match=r"there is no folder .*train --resume RUN --data\.name folder:PATH"):
        train(recipe, tmp_path / "run")
    assert cli.run("train", ["--resume", str(tmp_path / "run"), "--data.name", f"folder:{moved}"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for run in (Run(tmp_path / "run"), Run(tmp_path / "run" / "teacher")):
        assert run.recipe().data.name == run.read("data.json")["name"] == f"folder:{moved}"
        assert (run.read("data.json")["splits"]) == Run(tmp_path / "whole").read("data.json")["splits"]
    assert cli.run("train", ["--resume", str(tmp_path / "run"), "--data.num-workers", "1"]) == 0
    assert Run(tmp_path / "run").recipe().data.num_workers == 1


def test_a_folder_of_other_content_is_refused_and_the_difference_named(
    image_folder: Path, tmp_path: Path, recipe, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_in_student(3))
    before = (tmp_path / "run" / "recipe.json").read_bytes()
    moved = image_folder.rename(tmp_path / "moved")
    first = json.loads((tmp_path / "run" / "data.json").read_text())["splits"]["val"]["images"]["one"][0]
    content = (moved / first).read_bytes()
    put(moved / first, 77)
    resume = ["--resume", str(tmp_path / "run"), "--data.name", f"folder:{moved}"]
    assert cli.run("train", resume) == 1
    assert f"has changed since the run began (in val: 1 images, such as {first})" in one_line(capsys)
    (moved / first).unlink()
    assert cli.run("train", resume) == 1
    assert f"{first}: No such file" in one_line(capsys)
    assert (tmp_path / "run" / "recipe.json").read_bytes() == before
    (moved / first).write_bytes(content)
    assert cli.run("train", [*resume, "--optim.lr", "1"]) == 1
    assert "--optim.lr cannot be given with it, but for --data.name, --data.root, --data.num-workers" in one_line(
        capsys
    )
    assert cli.run("train", resume) == 0


def one_line(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().err.split())


def stop_in_student(step: int):
    stop = stop_after(step)
    return lambda line: None if "teacher" in line["name"] else stop(line)
