"""Trainings whose later epochs run without the logit teacher: the same losses, exact resumes, what is refused."""

import dataclasses
import os
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from train.test_loop import changed, lines, losses, plain, run_processes, tiny

import riformer
from riformer.config import DistillConfig, Recipe, ResearchConfig
from riformer.data.dataset import Dataset
from riformer.distill.cache import TeacherCache
from riformer.distill.teachers import Teacher
from riformer.study.evaluation import evaluate_run
from riformer.train.build import build_model
from riformer.train.loop import train
from riformer.train.run import Run

EPOCHS, KEPT, BATCHES = 4, 2, 10  # epochs, augmentations, batches in an epoch: 5 steps of 2 parts


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A model folder; what an untrained network says of an image is as good as anything to learn."""
    pooling = changed(plain(), "model", mixer="pooling")
    torch.manual_seed(5)
    model = build_model(pooling, Dataset("digits", tuple("0123456789"), {}))
    torch.nn.init.normal_(model.head.fc.weight)
    return str(riformer.save(model, tmp_path_factory.mktemp("teacher") / "model"))


def cached(teacher: str, top_k: int = 0, **optim) -> Recipe:
    """What could break a resume is on, but for mixing: every other draw, EMA, accumulation, bf16."""
    optim = {"epochs": EPOCHS, "precision": "bf16", "accumulation": 2, "ema_decay": 0.9, **optim}
    terms = dict(label_weight=0.1, soft_weight=1.0, temperature=2.0, cache_augmentations=KEPT)
    distill = DistillConfig(teacher, trust_teacher=teacher != "own", **terms)  # it is untrained
    research = ResearchConfig(cache_top_k=top_k)
    return dataclasses.replace(plain(**optim), distill=distill, model=tiny().model, research=research)


def imitating(teacher: str) -> Recipe:
    """One network in both teacher roles, imitated in the first half."""
    imitation = dict(module_teacher=teacher, block_weight=1.0, mixer_weight=1.0, schedule="first_phase")
    return changed(changed(cached(teacher), "distill", **imitation), "research", phase=0.55)


def taught(folder) -> list[int]:
    """Batches in each epoch for which a teacher ran."""
    return [line["teacher_batches"] for line in lines(folder) if line["kind"] == "epoch"]


def learned(folder) -> list[dict]:
    """The metrics, without which of the batches needed a teacher, and so without what a resume may change."""
    return [{k: v for k, v in line.items() if k != "teacher_batches"} for line in lines(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    """An uninterrupted run, in a process of its own as those that are killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_processes(cached(teacher), folder) == [0]
    return folder


@pytest.mark.parametrize("kind", ["bf16", "fp32", "top-k", "imitation", "remainder"])
def test_a_cached_run_learns_bit_for_bit_what_it_would_from_the_live_teacher(tmp_path, teacher, monkeypatch, kind):
    recipe = {
        "bf16": cached(teacher),
        "fp32": cached(teacher, precision="fp32"),
        "top-k": cached(teacher, top_k=3),
        "imitation": imitating(teacher),
        "remainder": cached(teacher, precision="fp32", batch_size=60),  # 3 steps of 2 parts; 20 images fill none
    }[kind]
    batches, left_out, size = (6, 1, 30) if kind == "remainder" else (BATCHES, 0, 20)
    measured = [size] * (60 // size)  # on the validation images, before the training
    calls = []
    real = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, images: calls.append(len(images)) or real(self, images))
    train(recipe, tmp_path / "cached")
    phase = 2 if kind == "imitation" else 0  # of the third epoch's batches, the first step's still have maps to imitate
    assert taught(tmp_path / "cached") == [batches, batches, phase, 0]
    assert calls == measured + [size] * (2 * (batches + left_out) + phase)

    def live(cache, augmentation, indices, compute):
        return cache._unpack(cache._pack(compute())) if cache.top_k else compute()

    monkeypatch.setattr(TeacherCache, "logits", live)
    train(recipe, tmp_path / "live")
    assert taught(tmp_path / "live") == [batches] * EPOCHS
    assert learned(tmp_path / "cached") == learned(tmp_path / "live")


def test_augmentations_in_turns_and_the_squeeze_change_what_is_learned(tmp_path, teacher):
    """The controls of the equalities above."""
    recipe = cached(teacher)
    for name, altered in {
        "all": recipe,
        "one": changed(recipe, "distill", cache_augmentations=1),
        "top": changed(recipe, "research", cache_top_k=1),
    }.items():
        train(altered, tmp_path / name)
    train(changed(recipe, "distill", cache_augmentations=0), tmp_path / "anew")
    runs = {name: losses(tmp_path / name) for name in ("all", "one", "top", "anew")}
    assert runs["all"][:10] == runs["anew"][:10]  # the first two epochs are as ever
    assert runs["all"][10:] != runs["anew"][10:]
    assert runs["one"][:5] == runs["all"][:5]
    assert runs["one"][5:10] != runs["all"][5:10]
    assert runs["top"][0] != runs["all"][0]
    assert taught(tmp_path / "one") == [BATCHES, 0, 0, 0]
    assert not (tmp_path / "anew" / "teacher_outputs").exists()
    assert "teacher_batches" not in lines(tmp_path / "anew")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(int(os.environ.get("RESUME_TRIALS", 1))))
def test_killed_at_random_moments_a_cached_run_resumes_bit_for_bit(tmp_path, teacher, whole, trial):
    moments = random.Random(trial)
    deaths = [any(run_processes(cached(teacher), tmp_path, 1, moments.uniform(0.2, 3.0))) for _ in range(3)]
    assert any(deaths)
    assert run_processes(cached(teacher), tmp_path) == [0]
    assert learned(tmp_path) == learned(whole)


@pytest.mark.parametrize("step", [1, 4, 10, 13])
def test_an_interrupted_cached_run_resumes_bit_for_bit(tmp_path, teacher, whole, step):
    def interrupt(line):
        if line["kind"] == "step" and line["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(cached(teacher), tmp_path, interrupt)
    train(cached(teacher), tmp_path)
    assert learned(tmp_path) == learned(whole)
    assert taught(tmp_path)[2:] == [0, 0]


def test_a_step_that_is_repeated_finds_what_it_wrote_and_learns_the_same(tmp_path, teacher, whole):
    """As after a kill between two saved states: the outputs are there, the step is not."""

    def stop(line):
        if line["kind"] == "step" and line["step"] == 3:
            raise OSError("the power fails")

    with pytest.raises(OSError, match="power"):
        train(cached(teacher), tmp_path, stop)
    assert Run(tmp_path).load_state() is None
    file = tmp_path / "teacher_outputs" / "outputs.bin"
    content = bytearray(file.read_bytes())
    content[: 44 * 100] = bytes(44 * 100)  # of the rows that were written, only some reached the disk
    file.write_bytes(content)
    train(cached(teacher), tmp_path)
    assert learned(tmp_path) == learned(whole)


def test_damaged_rows_are_computed_again_in_the_epoch_that_needs_them(tmp_path, teacher, whole):
    def interrupt(line):
        if line["kind"] == "step" and line["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(cached(teacher), tmp_path, interrupt)
    file = tmp_path / "teacher_outputs" / "outputs.bin"
    content = bytearray(file.read_bytes())
    content[44 * 7 + 5] ^= 16  # image 7 under augmentation 0
    content[44 * 208 + 41] ^= 1  # image 8 under augmentation 1, in the checksum
    file.write_bytes(content)
    train(cached(teacher), tmp_path)
    assert taught(tmp_path) == [BATCHES, BATCHES, 1, 1]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_that_an_epoch_leaves_out_are_kept_too(tmp_path, teacher, world_size):
    recipe = cached(teacher, batch_size=36, accumulation=1, ema_decay=0.0)
    assert run_processes(recipe, tmp_path, world_size) == [0] * world_size
    assert taught(tmp_path) == [5 * world_size, 5 * world_size, 0, 0]


def test_two_processes_share_the_outputs_and_learn_what_one_does(tmp_path, teacher):
    recipe = dataclasses.replace(cached(teacher, precision="fp32", accumulation=1), model=plain().model)
    for world_size in (1, 2):
        assert run_processes(recipe, tmp_path / str(world_size), world_size) == [0] * world_size
        assert taught(tmp_path / str(world_size)) == [5 * world_size, 5 * world_size, 0, 0]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def test_the_size_is_told_before_anything_is_written_and_is_the_size_on_disk(tmp_path, teacher):
    seen = []

    def look(line):
        if line["kind"] == "start":
            seen.append((line["teacher_outputs"], (tmp_path / "teacher_outputs").exists()))

    train(cached(teacher, top_k=3), tmp_path, look)
    size = (tmp_path / "teacher_outputs" / "outputs.bin").stat().st_size
    assert size == 12_800
    told = f"200 images x 2 augmentations x 3 probabilities, 12.8 kB in {tmp_path / 'teacher_outputs'}"
    assert seen == [(told, False)]


def test_a_disk_without_room_is_refused_before_a_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"no room for teacher outputs: 200 images .* 17\.6 kB"):
        train(cached("own"), tmp_path)
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(ValueError, match="cache_top_k is 10, but must be below the 10 classes"):
        train(cached("own", top_k=10), tmp_path)


def test_another_teacher_under_the_same_name_is_refused_on_resume(tmp_path, teacher):
    def interrupt(line):
        if line["kind"] == "step" and line["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    copied = str(shutil.copytree(teacher, tmp_path / "teacher"))
    with pytest.raises(KeyboardInterrupt):
        train(cached(copied), tmp_path / "run", interrupt)
    model = riformer.load(copied)
    with torch.no_grad():
        model.head.fc.bias += 1
    riformer.save(model, copied)
    with pytest.raises(ValueError, match=r"teacher changed since .*run began"):
        train(cached(copied), tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()  # as in runs of version 0.1
    with pytest.raises(
        ValueError, match=r"run/teacher_outputs holds other .*delete the folder(.|\n)*teachers_sha256: "
    ):
        train(cached(copied), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "teacher_outputs")
    train(cached(copied), tmp_path / "run")
    assert taught(tmp_path / "run")[2:] == [BATCHES, 0]  # of augmentation 0 nothing was left


def test_a_finished_run_needs_its_outputs_no_more_and_evaluates_its_teacher_live(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    rows = evaluate_run(folder)["models"]
    shutil.rmtree(folder / "teacher_outputs")
    train(Run(folder).recipe(), folder)
    assert not (folder / "teacher_outputs").exists()
    again = evaluate_run(folder)["models"]
    for model in ("teacher", "student", "deploy"):
        assert again[model]["top1"] == rows[model]["top1"]
        assert again[model]["loss"] == rows[model]["loss"]
