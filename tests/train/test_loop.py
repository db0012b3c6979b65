"""The training loop on tiny networks: exact resumes, one process and two, and what the run folder then holds."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from threading import Timer

import pytest
import timm
import torch
from few_digits import few_digits
from torch.testing import assert_close

import riformer
from riformer.config import AugmentConfig, DataConfig, DistillConfig, ModelConfig, OptimConfig, Recipe, TeacherConfig
from riformer.data import builtin
from riformer.distill.objective import Objective
from riformer.train import loop
from riformer.train import step as train_step
from riformer.train.loop import train
from riformer.train.run import Run

EPOCHS, STEPS = 3, 5  # steps an epoch
SPAWN = get_context("forkserver")


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes) -> Recipe:
    """Everything that could break a resume is on: every draw, EMA, accumulation, bf16, two teacher roles, clipping."""
    recipe = Recipe(
        name="tiny",
        data=DataConfig(name="digits", img_size=8, crop_pct=1.0),
        augment=AugmentConfig(),
        model=ModelConfig(depths=(1, 1), dims=(8, 8), stem_patch=2, stem_stride=2, drop_path_rate=0.3),
        teacher=TeacherConfig(mixer="pooling", epochs=1, lr=1e-2),
        distill=DistillConfig(
            logit_teacher="own",
            module_teacher="own",
            start_from_teacher=True,
            label_weight=0.1,
            soft_weight=1.0,
            block_weight=1.0,
            mixer_weight=1.0,
            relation_weight=1.0,
            schedule="cosine",
        ),
        optim=OptimConfig(
            lr=1e-2, epochs=EPOCHS, warmup_epochs=0.5, batch_size=40, accumulation=2, clip_grad=1.0, ema_decay=0.9
        ),
    )
    return dataclasses.replace(recipe, **changes)


def plain(**optim) -> Recipe:
    """Labels alone, without mixup and cutmix."""
    unmixed = AugmentConfig(mixup=0.0, cutmix=0.0)
    settings = {"lr": 1e-2, "epochs": 1, "warmup_epochs": 0.0, "batch_size": 40, "precision": "fp32", **optim}
    model = ModelConfig(depths=(1, 1), dims=(8, 8), stem_patch=2, stem_stride=2)
    return tiny(
        distill=DistillConfig(), teacher=TeacherConfig(), augment=unmixed, model=model, optim=OptimConfig(**settings)
    )


def lines(folder: Path) -> list[dict]:
    """The metrics without the times."""
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in Run(folder).metrics()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if line["kind"] == "step"]


def child(recipe: Recipe, folder: Path, rank: int, world_size: int, port: int, die_after: float | None) -> None:
    torch.set_num_threads(1)
    builtin.digits = few_digits
    os.environ["XDG_CACHE_HOME"] = str(folder.parent)
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if die_after is not None:
        Timer(die_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    train(recipe, folder)


def run_processes(
    recipe: Recipe, folder: Path, world_size: int = 1, die_after: float | None = None
) -> list[int | None]:
    """Trains in processes of their own; the last of them kills itself with SIGKILL after so many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SPAWN.Process(
            target=child, args=(recipe, folder, r, world_size, port, die_after if r == world_size - 1 else None)
        )
        for r in range(world_size)
    ]
    for process in processes:
        process.start()
    processes[-1].join(120)
    if processes[-1].exitcode != 0:  # as torchrun does when one has died
        for process in processes:
            process.kill()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of uninterrupted runs, by number of processes."""
    root = tmp_path_factory.mktemp("whole")
    folders = {world_size: root / str(world_size) for world_size in (1, 2)}
    for world_size, folder in folders.items():
        assert run_processes(tiny(), folder, world_size) == [0] * world_size
        assert len(losses(folder)) == EPOCHS * STEPS
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("trial", range(int(os.environ.get("RESUME_TRIALS", 1))))
def test_killed_at_random_moments_a_run_resumes_bit_for_bit(tmp_path, whole, world_size, trial):
    moments = random.Random(f"{world_size} {trial}")
    deaths = [any(run_processes(tiny(), tmp_path / "run", world_size, moments.uniform(0.2, 3.0))) for _ in range(3)]
    assert any(deaths)
    assert run_processes(tiny(), tmp_path / "run", world_size) == [0] * world_size
    assert lines(tmp_path / "run") == lines(whole[world_size])
    assert lines(tmp_path / "run" / "teacher") == lines(whole[world_size] / "teacher")
    ours, theirs = (riformer.load(folder).state_dict() for folder in (tmp_path / "run", whole[world_size]))
    assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("step", [1, 3, STEPS, STEPS + 2])
def test_an_interrupt_saves_the_step_and_the_same_call_goes_on(tmp_path, whole, step):
    def interrupt(line):
        if line["kind"] == "step" and line["step"] == step and line["name"] == "tiny":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", interrupt)
    assert len(losses(tmp_path / "run")) == step
    assert Run(tmp_path / "run").load_state()["step"] == step
    train(tiny(), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(whole[1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_in_the_teachers_last_step_ends_the_training_there(tmp_path):
    def interrupt(line):
        if line["kind"] == "step" and line["name"] == "tiny-teacher" and line["step"] == line["num_steps"]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path, interrupt)
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    ("section", "knobs", "message"),
    [
        ("research", {"positions": ("stages.9.blocks.0",)}, "are no blocks of the student"),
        ("model", {"mixer": "poolling"}, "mixer 'poolling' is unknown"),
        ("optim", {"name": "adamwww"}, "adamwww"),
        ("teacher", {"epochs": 1, "lr": -1.0}, "teacher.lr is -1.0"),
    ],
)
def test_what_is_wrong_with_the_student_fails_before_its_teacher_is_trained(tmp_path, section, knobs, message):
    with pytest.raises(ValueError, match=message):
        train(changed(tiny(), section, **knobs), tmp_path)
    assert not (tmp_path / "teacher").exists()


def test_leftovers_of_a_kill_are_no_obstacle(tmp_path):
    for name in (".recipe.json.abcdefgh.tmp", ".last.abcdefgh.tmp", ".best.abcdefgh.tmp"):
        (tmp_path / name / "new").mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    train(plain(), tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
    before = {path: path.read_bytes() for path in whole[1].rglob("*") if path.is_file()}
    train(tiny(), whole[1])
    assert {path: path.read_bytes() for path in whole[1].rglob("*") if path.is_file()} == before


def test_two_processes_and_accumulation_equal_one_process_with_the_whole_batch(tmp_path):
    def mixed(**optim) -> Recipe:
        return dataclasses.replace(plain(**optim), augment=AugmentConfig())

    train(mixed(), tmp_path / "one")
    train(mixed(accumulation=4), tmp_path / "parts")
    assert run_processes(mixed(), tmp_path / "two", world_size=2) == [0, 0]
    expected = torch.tensor(losses(tmp_path / "one"))
    assert len(expected) == STEPS
    assert mixed().augment.mixes
    assert_close(torch.tensor(losses(tmp_path / "parts")), expected, atol=1e-6, rtol=1e-5)
    assert_close(torch.tensor(losses(tmp_path / "two")), expected, atol=1e-6, rtol=1e-5)
    one, two = (lines(tmp_path / name)[-1] for name in ("one", "two"))
    assert two["val_top1"] == one["val_top1"]
    assert two["val_images"] == one["val_images"] == 60  # no image twice, none left out


def test_the_seed_decides_everything(tmp_path):
    train(plain(), tmp_path / "a")
    train(plain(), tmp_path / "b")
    train(dataclasses.replace(plain(), seed=1), tmp_path / "c")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_a_run_learns(tmp_path):
    light = AugmentConfig(
        crop_scale=(0.7, 1.0), hflip=0, color_jitter=0, auto_augment="", random_erasing=0, mixup=0, cutmix=0
    )
    train(dataclasses.replace(plain(epochs=15, batch_size=25, lr=2e-2), augment=light), tmp_path)
    epochs = [line for line in lines(tmp_path) if line["kind"] == "epoch"]
    assert epochs[-1]["val_top1"] > 30  # of ten classes
    assert losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Trains a recipe for an epoch and returns its weights; recipes may name the teacher folder given beside it."""
    root = tmp_path_factory.mktemp("learned")
    pooling = dataclasses.replace(plain(), model=dataclasses.replace(plain().model, mixer="pooling"))
    train(dataclasses.replace(pooling, seed=7), root / "teacher")
    known = {}

    def weights(recipe: Recipe) -> torch.Tensor:
        if recipe not in known:
            train(recipe, root / str(len(known)))
            state = Run(root / str(len(known))).load_state()
            known[recipe] = torch.cat([tensor.flatten() for tensor in state["model"].values()])
        return known[recipe]

    return weights, str(root / "teacher")


def changed(recipe: Recipe, section: str, **knobs) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **knobs)})


@pytest.mark.parametrize(
    ("section", "knob", "value"),
    [
        ("optim", "name", "sgd"),
        ("optim", "lr", 5e-3),
        ("optim", "weight_decay", 5.0),
        ("optim", "warmup_epochs", 0.8),
        ("optim", "min_lr", 5e-3),
        ("optim", "clip_grad", 1e-3),
        ("optim", "label_smoothing", 0.5),
        ("optim", "precision", "bf16"),
        ("model", "drop_path_rate", 0.5),
        ("model", "layer_scale_init", 0.5),
        ("model", "mixer", "identity"),
        ("augment", "mixup", 0.8),
        ("augment", "random_erasing", 1.0),
        ("augment", "auto_augment", ""),
    ],
)
def test_each_knob_of_a_training_changes_what_is_learned(learned, section, knob, value):
    weights, _ = learned
    base, other = weights(plain()), weights(changed(plain(), section, **{knob: value}))
    assert base.shape != other.shape or (base - other).abs().max() > 1e-6


@pytest.mark.parametrize(
    "knobs",
    [
        {"label_weight": 0.0},
        {"hard_weight": 1.0},
        {"soft_weight": 0.0, "hard_weight": 1.0},
        {"block_weight": 0.0},
        {"mixer_weight": 0.0},
        {"relation_weight": 0.0},
        {"temperature": 3.0},
        {"start_from_teacher": True},
        {"schedule": "cosine"},
        {"schedule": "first_phase"},
        {"research": {"positions": ("stages.0.blocks.0",)}},
        {"research": {"block_match": "raw"}},
        {"research": {"relation_tokens": 4}},
        {"schedule": "first_phase", "research": {"phase": 0.9}},
    ],
    ids=str,
)
def test_each_knob_of_distillation_changes_what_is_learned(learned, knobs):
    weights, teacher = learned
    terms = dict.fromkeys(("soft_weight", "block_weight", "mixer_weight", "relation_weight"), 1.0)
    roles = dict(logit_teacher=teacher, module_teacher=teacher, trust_teacher=True)  # it knows nothing
    recipe = changed(plain(), "distill", **roles, **terms)
    distill = {name: value for name, value in knobs.items() if name != "research"}
    if "research" in knobs:  # what the schedule alone changes is another case
        recipe = changed(recipe, "distill", **distill)
    other = changed(changed(recipe, "distill", **distill), "research", **knobs.get("research", {}))
    base, other = weights(recipe), weights(other)
    assert (base - other).abs().max() > 1e-6


def test_the_learning_rate_warms_up_and_follows_the_cosine_down(tmp_path):
    train(plain(epochs=4, warmup_epochs=1, min_lr=1e-4), tmp_path)
    rates = [line["lr"] for line in lines(tmp_path) if line["kind"] == "step"]
    assert rates[:STEPS] == sorted(rates[:STEPS])
    assert rates[STEPS:] == sorted(rates[STEPS:], reverse=True)
    assert max(rates) == rates[STEPS] == pytest.approx(1e-2)
    assert rates[-1] < 5e-4


def test_with_a_moving_average_that_is_what_is_kept(whole, tmp_path):
    train(plain(ema_decay=0.9), tmp_path)
    state, kept = Run(tmp_path).load_state(), riformer.load(tmp_path).state_dict()
    assert_close(kept, state["ema"], atol=0, rtol=0)
    assert (kept["stem.conv.weight"] - state["model"]["stem.conv.weight"]).abs().max() > 1e-5


def test_best_is_the_best_epoch_and_not_the_last(tmp_path, monkeypatch):
    accuracies = iter((30.0, 50.0, 40.0))
    real = loop.evaluate

    def pretended(*args):
        return dataclasses.replace(real(*args), top1=next(accuracies))

    kept = []
    monkeypatch.setattr(loop, "evaluate", pretended)
    monkeypatch.setattr(loop, "save", lambda model, path: kept.append(path))
    train(plain(epochs=3), tmp_path)
    assert len(kept) == 2


def test_a_run_folder_holds_the_best_model_with_its_classes_and_preprocessing(whole):
    run = Run(whole[1])
    model = timm.create_model(f"local-dir:{run.path / 'best'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    assert model.pretrained_cfg["input_size"] == (3, 8, 8)
    images = torch.randn(2, 3, 8, 8)
    assert_close(riformer.load(run.path)(images), model(images))
    assert run.recipe() == tiny()
    assert run.read("env.json")["torch"] == version("torch")
    assert run.read("data.json")["classes"] == [str(i) for i in range(10)]


def test_the_saved_state_holds_no_teacher(whole):
    state = Run(whole[1]).load_state()
    student = set(riformer.load(whole[1]).state_dict())
    counts = {"step", "best", "num_skipped", "world_size"}
    assert set(state) == {"model", "ema", "optimizer", "projections", "rng"} | counts
    assert set(state["model"]) == set(state["ema"]) == student
    assert state["projections"] == {}
    assert len(state["optimizer"]["state"]) == len(student)


def test_every_active_term_is_logged_unweighted(whole):
    steps = [line for line in lines(whole[1]) if line["kind"] == "step"]
    assert {"label", "soft", "block", "mixer", "relation", "loss", "top1", "lr"} <= steps[0].keys()
    first = steps[0]
    weighted = 0.1 * first["label"] + sum(first[name] for name in ("soft", "block", "mixer", "relation"))
    assert first["loss"] == pytest.approx(weighted, rel=1e-4)  # at step 0 the cosine is at 1


def test_another_recipe_in_the_same_folder_is_refused_by_the_name_of_the_difference(whole):
    other = dataclasses.replace(tiny(), optim=dataclasses.replace(tiny().optim, lr=0.5))
    with pytest.raises(ValueError, match=r"another recipe.*\n  optim\.lr: 0\.01 there, 0\.5 now"):
        train(other, whole[1])


def test_a_run_that_never_trained_makes_way_for_another_recipe(tmp_path):
    wrong = dataclasses.replace(plain(), data=dataclasses.replace(plain().data, name="digist"))
    with pytest.raises(ValueError, match="digist"):
        train(wrong, tmp_path)
    with pytest.raises(ValueError, match="is more than the 200 training images"):
        train(plain(batch_size=2000), tmp_path)
    train(plain(), tmp_path)
    assert Run(tmp_path).recipe() == plain()


def test_another_number_of_processes_is_refused(tmp_path):
    assert run_processes(plain(), tmp_path / "two", world_size=2) == [0, 0]
    with pytest.raises(ValueError, match="begun with 2 processes"):
        train(plain(), tmp_path / "two")


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and not a run folder"):
        train(plain(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    run = Run(tmp_path)
    run.save_state({"step": 1, "model": {}})
    run.save_state({"step": 2, "model": {}})
    assert run.load_state()["step"] == 2
    file = tmp_path / "last" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run.load_state()["step"] == 1
    assert "last cannot be used (its checksum differs)" in caplog.text
    (tmp_path / "last.previous" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no saved state in .* can be used"):
        run.load_state()


def test_metrics_are_cut_back_to_the_step_that_is_resumed(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.log({"kind": "step", "step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')
    run.cut_metrics(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_losses_that_are_not_finite_stop_the_run_and_the_step_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite in 10 steps in a row, the last of them step \d+"):
        train(plain(lr=1e30, epochs=3), tmp_path)


@pytest.mark.parametrize("mixer", ["attention", "global_filter"])
def test_token_mixer_networks_train_under_the_same_loop(tmp_path, mixer):
    recipe = dataclasses.replace(plain(), model=dataclasses.replace(plain().model, mixer=mixer))
    train(recipe, tmp_path)
    assert len(losses(tmp_path)) == STEPS


def test_a_compiled_student_learns_the_same(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model, real=torch.compile: real(model, backend="aot_eager"))
    recipe = tiny(augment=AugmentConfig(auto_augment=""), model=plain().model)
    optim = dataclasses.replace(recipe.optim, epochs=1, precision="fp32")
    for compiled in (False, True):
        chosen = dataclasses.replace(recipe, optim=dataclasses.replace(optim, compile=compiled))
        train(chosen, tmp_path / str(compiled))
    eager, compiled_losses = (torch.tensor(losses(tmp_path / name)) for name in ("False", "True"))
    assert_close(compiled_losses, eager, atol=1e-4, rtol=1e-4)


def test_a_second_training_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    train(plain(epochs=1), tmp_path)
    holder = (
        "import sys, time; from riformer.train.run import Run\n"
        f"with Run({str(tmp_path)!r}).locked(): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        for recipe in (plain(epochs=1), plain(epochs=2)):
            with pytest.raises(ValueError, match=r"another process trains in .*: wait for it, or choose another --out"):
                train(recipe, tmp_path)
        process.kill()
    train(plain(epochs=1), tmp_path)


def test_channels_last_changes_the_layout_and_not_what_is_learned(tmp_path, monkeypatch):
    built = []

    def build_optimizer(recipe, model, projections, real=train_step.build_optimizer):
        built.append(model)
        return real(recipe, model, projections)

    monkeypatch.setattr(train_step, "build_optimizer", build_optimizer)
    for channels_last in (False, True):
        recipe = plain(epochs=1, channels_last=channels_last, precision="fp32")
        train(recipe, tmp_path / str(channels_last))
    plainly, last = (torch.tensor(losses(tmp_path / name)) for name in ("False", "True"))
    assert_close(last, plainly, atol=1e-4, rtol=1e-4)
    layouts = [model.stem.conv.weight.is_contiguous(memory_format=torch.channels_last) for model in built]
    assert layouts == [False, True]


def test_affines_start_fitted_where_that_is_asked_for(tmp_path):
    recipe = changed(tiny(), "distill", start_from_teacher=True)
    recipe = changed(recipe, "research", fit_affine_batches=2)
    fitted, started = train(recipe, tmp_path / "fitted"), train(tiny(), tmp_path / "started")
    first = {run.path.name: losses(run.path)[0] for run in (fitted, started)}
    assert first["fitted"] != first["started"]
    assert lines(fitted.path)[0]["mixer"] < lines(started.path)[0]["mixer"]


def test_out_of_memory_says_what_to_do(tmp_path, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(Objective, "__call__", run_out)
    with pytest.raises(RuntimeError, match=r"^20 images at once do not fit; raise --optim\.accumulation, .*: CUDA out"):
        train(plain(accumulation=2), tmp_path)
