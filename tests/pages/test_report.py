"""The report: what it computes from run folders, how it words it, and that it is one file that needs no other."""

import base64
import io
import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from riformer.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, Recipe, to_dict
from riformer.pages.report import write_report

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
    draw = random.Random(f"{recipe.name} {recipe.seed}")
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


def make_study(folder: Path, scores: dict[Recipe, tuple[float, ...]], steps_per_epoch: int = 0) -> Path:
    for recipe, values in scores.items():
        for seed, top1 in enumerate(values):
            run = folder / f"{recipe.name}-seed{seed}"
            make_run(run, replace(recipe, seed=seed), top1, steps_per_epoch=steps_per_epoch)
    return folder


def page_of(*runs: Path) -> str:
    destination = runs[0].parent / "out" / "report.html"
    assert write_report(list(runs), destination) == destination
    return destination.read_text(encoding="utf-8")


def text_of(page: str) -> str:
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
    return re.sub(r" (?=[.,:;)])|(?<=\() ", "", re.sub(r"\s+", " ", body))


@pytest.fixture(scope="module")
def study_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    scores = {LABELS: (95.0, 96.0, 95.5), LONG: (96.0, 97.2, 96.4), FULL: (97.0, 97.2, 96.6)}
    return page_of(make_study(tmp_path_factory.mktemp("study") / "runs", scores, steps_per_epoch=5))


def test_page_needs_no_other_file(study_page: str) -> None:
    links = re.findall(r"""\b(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", study_page)
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.findall(r"url\((?!#)|@import|<script|<link|<iframe", study_page)
    assert study_page.count("<svg") == 2


def test_every_id_is_unique_and_every_reference_resolves(study_page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', study_page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', study_page)
    assert references
    assert set(references) <= set(ids)


def test_verdict_and_differences_are_computed_from_the_runs(study_page: str) -> None:
    text = text_of(study_page)
    assert (
        "Over 3 seeds, quickstart reaches 96.93 ± 0.31 % top-1 on digits, 1.43 points more than the same network "
        "trained on labels alone (ahead with 3 of 3 seeds) and 0.27 points less than its teacher" in text
    )
    assert "+1.43 0: +2.00 1: +1.20 2: +1.10 3 of 3" in text  # 97-95, 97.2-96, 96.6-95.5
    assert (
        "from +1.10 to +2.00, ahead with 3 of 3 seeds. All 3 seeds agree, which by luck alone happens once in 4" in text
    )
    assert "0.40 points more than the other on average, from +0.00 to +1.00" in text
    assert "The seeds disagree about the sign" in text
    assert "quickstart-labels-long spends at least as many on labels alone" in text


def test_labels_that_win_are_said_to_win(tmp_path: Path) -> None:
    text = text_of(page_of(make_study(tmp_path / "runs", {FULL: (95.0, 95.2, 94.8), LABELS: (96.0, 96.4, 95.0)})))
    assert "0.80 points less than the same network trained on labels alone" in text
    assert "(ahead with 0 of 3 seeds: labels alone did better here)" in text
    assert "Here labels alone did better." in text
    assert "so the comparison favours quickstart by the teacher’s epochs" in text


def test_a_mixed_outcome_is_not_sold_as_a_win(tmp_path: Path) -> None:
    text = text_of(page_of(make_study(tmp_path / "runs", {FULL: (96.0, 97.0), LABELS: (95.0, 97.5)})))
    assert (
        "0.25 points more than the same network trained on labels alone (ahead with 1 of 2 seeds, which does not"
        in text
    )
    assert "this does not settle which of the two is better" in text


def test_only_equal_seeds_on_equal_images_are_paired(tmp_path: Path) -> None:
    full = [make_run(tmp_path / "a" / str(seed), replace(FULL, seed=seed), 97.0) for seed in (0, 1)]
    labels = [make_run(tmp_path / "b" / str(seed), replace(LABELS, seed=seed), 96.0) for seed in (1, 2)]
    assert "ahead with 1 of 1 seed." in text_of(page_of(*full, *labels))
    evaluation = json.loads((labels[0] / "evaluation.json").read_text())
    write_json(labels[0] / "evaluation.json", evaluation | {"split": "val"})
    assert "they share no finished seed on the same images" in text_of(page_of(*full, *labels))


def test_equal_names_with_other_settings_stay_apart(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", LABELS, 96.0)
    second = make_run(tmp_path / "b", replace(LABELS, optim=replace(LABELS.optim, lr=0.5)), 90.0)
    text = text_of(page_of(first, second))
    assert "quickstart-labels (optim.lr 0.5)" in text
    assert "93.00" not in text  # the mean of the two would be a mean of nothing


def test_single_run_without_teacher(tmp_path: Path) -> None:
    text = text_of(page_of(make_run(tmp_path / "run", LABELS, 96.0)))
    assert "With one seed, quickstart-labels reaches 96.00 % top-1 on digits." in text
    assert "Comparison" not in text
    assert "its teacher" not in text
    assert "Fusing changed no logit by more than 2.4e-06" in text
    assert "train 1,000, val 297, test 500 images, 10 classes" in text
    assert "truncated file" in text
    assert f"riformer train --config {tmp_path}/run/recipe.json --out {tmp_path}/run-again" in text
    assert "optim.epochs 300 6" in text
    assert "Testcore 9000 (2 threads) · riformer 0.1.0 · torch 2.11.0 · timm 1.0.31 · 2026-03-01" in text


def test_nested_teacher_is_part_of_its_run(tmp_path: Path) -> None:
    make_run(tmp_path / "deep" / "down" / "run", FULL, 97.0, steps_per_epoch=5)
    page = page_of(tmp_path / "deep")
    assert "from 1 run folder;" in text_of(page)
    assert "teacher, on labels" in page


def test_unfinished_run_and_half_a_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FULL, None, steps_per_epoch=5)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "step": 31, "lo\xc3')
    page = page_of(run)
    text = text_of(page)
    assert "quickstart is unfinished: 3 of 6 epochs on digits, with" in text
    assert "1 run of 1 is unfinished (no evaluation.json yet)" in text
    assert "1 unreadable line in metrics.jsonl left out" in text
    assert page.count("<svg") == 2


def test_a_resumed_run_counts_each_epoch_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, None, steps_per_epoch=5)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind="epoch", epoch=2, step=15, val_top1=88.25, seconds=1.5)) + "\n")
    assert "quickstart-labels is unfinished: 3 of 6 epochs on digits, with 88.25 %" in text_of(page_of(run))


def test_an_early_evaluation_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, 96.0, steps_per_epoch=5)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:12]))
    assert f"Evaluated before the last epoch, and counted as they are: {run}" in text_of(page_of(run))


def test_validation_as_the_test_split_is_called_optimistic(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, 96.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    write_json(run / "evaluation.json", evaluation | {"split": "val"})
    assert "chosen on these same images, so the numbers are optimistic" in text_of(page_of(run))


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "recipe.json", to_dict(FULL))
    assert "quickstart is unfinished: 0 of 6 epochs" in text_of(page_of(tmp_path / "run"))


@pytest.mark.parametrize("missing", ["models", "fuse", "speed", "confusion", "samples", "split", "num_images", "date"])
def test_missing_parts_of_the_evaluation(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run", FULL, 97.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation[missing]
    write_json(run / "evaluation.json", evaluation)
    assert "What was run" in text_of(page_of(run))


def test_missing_numbers_of_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FULL, 97.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["models"] = {"teacher": {}, "deploy": {"top1": 97.0}}
    write_json(run / "evaluation.json", evaluation)
    (run / "data.json").unlink()
    (run / "env.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert "With one seed, quickstart reaches 97.00 % top-1 on digits" in text_of(page_of(run))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    recipe = replace(FULL, name=hostile)
    runs = [
        make_run(tmp_path / f"{i}", replace(recipe, seed=i), 97.0, (hostile, "$x_1$", "\udcff", "é"), 5) for i in (0, 1)
    ]
    page = page_of(*runs)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_many_long_class_names(tmp_path: Path) -> None:
    classes = tuple(f"a rather long name of class number {i}" for i in range(120))
    page = page_of(make_run(tmp_path / "run", LABELS, 60.0, classes))
    assert "All 120 classes" in page
    assert "Most confused of 120 classes" in page
    assert 'class="heat"' not in page


def test_both_forms_of_the_confusion_are_one_picture(tmp_path: Path) -> None:
    """Three classes, where a dense row could be taken for (true, predicted, count)."""
    run = make_run(tmp_path / "run", LABELS, 60.0, ("ant", "bee", "cow"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    pages = []
    for confusion in ([[5, 0, 2], [0, 6, 0], [1, 0, 7]], {"0": {"0": 5, "2": 2}, "1": {"1": 6}, "2": {"0": 1, "2": 7}}):
        write_json(run / "evaluation.json", evaluation | {"confusion": confusion})
        pages.append(page_of(run))
    assert pages[0] == pages[1]
    assert "ant 5 · 2 bee · 6 · cow 1 · 7" in text_of(pages[0])
    assert "Is Read as Images ant cow 2 cow ant 1" in text_of(pages[0])


def test_many_classes_show_their_worst_confusions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, 60.0)
    data = json.loads((run / "data.json").read_text())
    write_json(run / "data.json", data | {"classes": [f"class {i}" for i in range(10_001)]})
    evaluation = json.loads((run / "evaluation.json").read_text())
    confusion = {"9999": {"3": 2, "9999": 5}, "10000": {"0": 7}}
    write_json(run / "evaluation.json", evaluation | {"confusion": confusion})
    page = page_of(run)
    assert "Most confused of 10001 classes Is Read as Images class 10000 class 0 7 class 9999 class 3 2" in text_of(
        page
    )
    assert len(page) < 1_000_000


def test_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run in .*nothing: a run folder is what `riformer train` writes"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="one run folder or more"):
        write_report([], tmp_path / "report.html")
    write_json(tmp_path / "broken" / "recipe.json", {})
    (tmp_path / "broken" / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken/recipe\.json is not JSON"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=r"pip install 'riformer\[report\]'"):
        write_report([tmp_path], tmp_path / "report.html")
