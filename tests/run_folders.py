"""Run folders and bench results with made-up numbers, for tests of pages and cards."""

import base64
import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tiny import randomised, tiny

import riformer
from riformer.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, Recipe, TeacherConfig, to_dict
from riformer.pages.report import write_report
from riformer.pages.speed import write_speed_report
from riformer.recipes import RUNGS, at_budget, quickstart
from riformer.study.ladder import run_ladder

LABELS = Recipe(
    name="quickstart-labels",
    data=DataConfig(name="digits", img_size=16),
    model=ModelConfig(depths=(2, 2), dims=(32, 64), stem_patch=2, stem_stride=2),
    optim=OptimConfig(lr=2e-3, epochs=6, warmup_epochs=1, batch_size=100, precision="fp32"),
)
LONG = replace(LABELS, name="quickstart-labels-long", optim=replace(LABELS.optim, epochs=126))
FULL = replace(
    LABELS,
    name="quickstart",
    distill=DistillConfig(
        logit_teacher="own",
        module_teacher="own",
        start_from_teacher=True,
        label_weight=0.0,
        soft_weight=1.0,
        block_weight=1.0,
        mixer_weight=1.0,
        relation_weight=1.0,
    ),
)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_png(digit: int, size: int = 8) -> str:
    image = Image.new("L", (size, size))
    image.putdata([(digit * 37 + 29 * (x * y % 7)) % 256 for x in range(size) for y in range(size)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_run(
    folder: Path,
    recipe: Recipe,
    top1: float | None,
    classes: tuple[str, ...] = tuple("0123456789"),
    steps_per_epoch: int = 0,
    teacher_top1: float = 97.2,
) -> Path:
    """A run folder with plausible numbers; `top1` None leaves it unfinished after half of its epochs.

    Without steps there are no metrics and so no curves, which take most of a page's time.
    """
    draw = random.Random(f"{recipe.name} {recipe.seed}".encode("utf-8", "replace"))
    env = dict(riformer="0.1.0", torch="2.11.0", timm="1.0.31", python="3.11", device="Testcore 9000", num_threads=2)
    env["date"] = "2026-03-01T10:00:00+00:00"
    distilled = bool(recipe.distill.logit_teacher)
    num_epochs = recipe.optim.epochs if top1 is not None else recipe.optim.epochs // 2
    write_json(folder / "recipe.json", to_dict(recipe))
    write_json(folder / "env.json", env)
    skipped = [{"path": "train/3/broken.png", "reason": "truncated file"}]
    splits = {split: {"num_images": count} for split, count in (("train", 1000), ("val", 297), ("test", 500))}
    write_json(folder / "data.json", dict(name=recipe.data.name, classes=classes, splits=splits, skipped=skipped))
    names = [t for t in ("label", "soft", "block", "mixer", "relation") if getattr(recipe.distill, f"{t}_weight")]
    lines = []
    for epoch in range(num_epochs if steps_per_epoch else 0):
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i + 1
            share = step / recipe.optim.epochs / steps_per_epoch
            terms = {n: (1 + k) * math.exp(-4 * share) * draw.uniform(0.8, 1.2) + 0.02 for k, n in enumerate(names)}
            lr = recipe.optim.lr * min(step / 10, (1 + math.cos(math.pi * share)) / 2)
            lines.append(dict(kind="step", step=step, epoch=epoch, lr=lr, loss=sum(terms.values()), **terms))
            lines[-1] |= dict(top1=100 * (1 - math.exp(-5 * share)), images_per_s=3000.0)
        val_top1 = (top1 or 95) - 60 * math.exp(-9 * (epoch + 1) / recipe.optim.epochs) + draw.uniform(-0.6, 0.6)
        lines.append(dict(kind="epoch", epoch=epoch, step=step, val_top1=val_top1, val_loss=0.2, seconds=1.5))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if distilled:
        own = replace(LABELS, name=f"{recipe.name}-teacher", seed=recipe.seed)
        make_run(folder / "teacher", replace(own, optim=recipe.optim), teacher_top1, classes, steps_per_epoch)
    if top1 is None:
        return folder

    def model(name: str, top1: float, rate: float) -> dict:
        speed = {"median": rate, "low": rate * 0.97, "high": rate * 1.02}
        return dict(name=name, top1=top1, top5=99.9, loss=0.1, params=123456, macs=12345678, images_per_s=speed)

    fused = 4200 * draw.uniform(0.98, 1.02)
    models = {"teacher": model("riformer_s12 attention", teacher_top1, 3000.0)} if distilled else {}
    models |= {"student": model("riformer_s12 affine", top1, 4000.0)}
    models |= {"deploy": model("riformer_s12 identity", top1, fused)}
    speed = dict(batch_size=64, rounds=15, img_size=16, precision="fp32")
    if distilled:
        ratio = fused / 3000
        speed["ratio"] = {"median": ratio, "low": ratio - 0.02, "high": ratio + 0.03}
    k = len(classes)
    confusion = {
        str(i): {str(i): 47} | {str(j): draw.randint(1, 3) for j in range(k) if j != i and draw.random() < 0.15}
        for i in range(k)
    }
    samples = [
        dict(name=f"{i}.png", label=i % k, prediction=(i + 1) % k if i < 4 else i % k, probability=0.9, png=make_png(i))
        for i in range(16)
    ]
    evaluation = dict(env, split="test", num_images=500, models=models, speed=speed)
    evaluation |= dict(fuse=dict(max_abs=2.4e-6, max_rel=3e-7, top1_agreement=1.0), confusion=confusion)
    write_json(folder / "evaluation.json", dict(evaluation, samples=samples))
    return folder


def report_of(*runs: Path) -> str:
    destination = runs[0].parent / "out" / "report.html"
    assert write_report(list(runs), destination) == destination
    return destination.read_text(encoding="utf-8")


CARD_LABELS = Recipe(
    name="mine-labels",
    seed=7,
    data=DataConfig(name="digits", img_size=64),
    model=ModelConfig(name="riformer_s12"),
    optim=OptimConfig(lr=2e-3, epochs=6, warmup_epochs=1, batch_size=100, precision="fp32"),
)
CARD_RECIPE = replace(
    CARD_LABELS,
    name="mine",
    teacher=TeacherConfig(mixer="global_filter", epochs=11),
    distill=DistillConfig(
        logit_teacher="own",
        module_teacher="own",
        start_from_teacher=True,
        label_weight=0.0,
        soft_weight=0.5,
        block_weight=2.0,
        schedule="cosine",
    ),
)
ENV = dict(
    date="2026-03-01T10:00:00+00:00", riformer="0.1.0", python="3.11.9", torch="2.11.0", torchvision="0.26.0",
    timm="1.0.31", platform="Testix", device="Testcore 9000", num_threads=2, world_size=1,
)  # fmt: skip
CLASSES = ("ant", "bee", "cow", "dog", "elk")


def write_run(
    folder: Path,
    recipe: Recipe = CARD_RECIPE,
    split: str = "test",
    classes: tuple[str, ...] = CLASSES,
    noted: dict[str, Any] | None = None,
    **args: Any,
) -> Path:
    """A run folder with a small network in best/, and with plausible numbers; `split` empty leaves it unevaluated.

    `noted` is what the model notes about its preprocessing, `args` are its arguments.
    """
    overlay = dict(input_size=(3, 64, 64), crop_pct=0.875, mean=(0.1, 0.2, 0.3), label_names=classes) | (noted or {})
    model = randomised(tiny(num_classes=len(classes), pretrained_cfg_overlay=overlay, **args))
    riformer.save(model, folder / "best")
    files: dict[str, dict] = {"recipe": to_dict(recipe), "env": ENV}
    splits = {name: {"num_images": count} for name, count in (("train", 1000), ("val", 297), ("test", 500))}
    files["data"] = dict(name=recipe.data.name, classes=classes, splits=splits)
    files["data"]["skipped"] = [{"path": "/home/x/photos/3/broken.png", "reason": "truncated file"}]

    def row(name: str, top1: float, params: int) -> dict:
        speed = {"median": 4321.5, "low": 4200.5, "high": 4400.5}
        name = f"riformer_s12 {name}"
        return dict(name=name, top1=top1, top5=top1 + 5.015, loss=top1 / 700, params=params, macs=7 * params) | {
            "images_per_s": speed
        }

    models = {"teacher": row("global_filter", 91.23, 66666)} if recipe.distill.logit_teacher else {}
    models |= {"student": row("affine", 88.125, 55555), "deploy": row("identity", 88.0625, 44444)}
    speed: dict[str, Any] = dict(batch_size=64, rounds=15, img_size=64, precision="fp32")
    if "teacher" in models:
        speed["ratio"] = {"median": 1.654, "low": 1.571, "high": 1.773}
    fuse = dict(max_abs=2.4e-6, max_rel=3e-7, top1_agreement=1.0, num_images=500)
    if split:
        files["evaluation"] = ENV | dict(split=split, num_images=500, models=models, speed=speed, fuse=fuse)
        files["evaluation"]["date"] = "2026-03-02T10:00:00+00:00"
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    lines = [dict(kind="epoch", epoch=i, step=i, val_top1=top1) for i, top1 in enumerate((50.0, 87.654, 87.654, 60.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


PEAKS = {"float32": 58e9, "bfloat16": 114e9}


def spread(value):
    return {"median": value, "low": 0.98 * value, "high": 1.03 * value}


def make_row(model, backend, precision, rate, first, macs=1.8e9, peak_mib=None):
    row = dict(model=model, backend=backend, precision=precision, params=12_000_000, size_mib=22.9, macs=macs)
    row |= dict(peak_mib=peak_mib, max_rel=2e-3, top1_agreement=0.875, rates=[rate] * 3)
    row |= dict(images_per_s=spread(rate), ratio=spread(rate / first))
    if precision != "int8":
        peak = PEAKS["float32" if precision == "fp32" else "bfloat16"]
        row |= dict(of_products_alone=spread(0.9), of_peak=rate * macs / peak)
    return row


def make_bench(file: Path, *rows, batch_sizes=(8,), img_size=224, device="Testcore <9000>"):
    env = dict(date="2026-03-01T10:00:00+00:00", riformer="0.1.0", torch="2.11.0", timm="1.0.31")
    env |= dict(device=device, num_threads=1, world_size=1, instruction_sets=["avx2"])
    made = [make_row(*row, first=rows[0][3]) if len(row) == 4 else row for row in rows]
    groups = [
        dict(env=env, batch_size=b, img_size=img_size, num_threads=1, rounds=3, macs_per_s_peak=PEAKS, rows=made)
        for b in batch_sizes
    ]
    competitors = [{key: row[key] for key in ("model", "backend", "precision")} for row in made]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(kind="bench", competitors=competitors, rounds=3, seconds=0.2, groups=groups)))
    return file


def speed_report_of(*files: Path) -> str:
    destination = files[0].parent / "out" / "speed.html"
    assert write_speed_report(list(files), destination) == destination
    return destination.read_text()


def small_ladder(
    folder: Path, rungs: Sequence[str], times: int = 1, seeds: Sequence[int] = (0,), name: str = ""
) -> None:
    """Trains rungs of the quickstart for an epoch of two steps of few_digits; `name` is the recipe's."""
    base = quickstart()
    optim = replace(base.optim, epochs=1, warmup_epochs=0, batch_size=100)
    base = replace(base, optim=optim, teacher=replace(base.teacher, epochs=1), name=name or base.name)
    recipes = [RUNGS[rung](at_budget(replace(base, seed=seed), times)) for seed in seeds for rung in rungs]
    run_ladder(recipes, folder, lambda line: None)
