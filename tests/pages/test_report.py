"""The report: what it computes from run folders, how it words it, and that it is one file that needs no other."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import FULL, LABELS, LONG, make_run, report_of, write_json

from riformer.config import Recipe, to_dict
from riformer.pages.report import write_report


def make_study(folder: Path, scores: dict[Recipe, tuple[float, ...]], steps_per_epoch: int = 0) -> Path:
    for recipe, values in scores.items():
        for seed, top1 in enumerate(values):
            run = folder / f"{recipe.name}-seed{seed}"
            make_run(run, replace(recipe, seed=seed), top1, steps_per_epoch=steps_per_epoch)
    return folder


def text_of(page: str) -> str:
    body = re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
    return re.sub(r" (?=[.,:;)])|(?<=\() ", "", re.sub(r"\s+", " ", body))


@pytest.fixture(scope="module")
def study_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    scores = {LABELS: (95.0, 96.0, 95.5), LONG: (96.0, 97.2, 96.4), FULL: (97.0, 97.2, 96.6)}
    return report_of(make_study(tmp_path_factory.mktemp("study") / "runs", scores, steps_per_epoch=5))


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
    assert "from +1.10 to +2.00, ahead with 3 of 3 seeds." in text
    assert "All 3 seeds agree, which happens by chance once in 4 times" in text
    assert "0.40 points more than the other on average, from +0.00 to +1.00" in text
    assert "The seeds disagree about the sign" in text
    assert "quickstart-labels-long spends at least as many on labels alone" in text


def test_labels_that_win_are_said_to_win(tmp_path: Path) -> None:
    text = text_of(report_of(make_study(tmp_path / "runs", {FULL: (95.0, 95.2, 94.8), LABELS: (96.0, 96.4, 95.0)})))
    assert "0.80 points less than the same network trained on labels alone" in text
    assert "(ahead with 0 of 3 seeds: labels alone did better here)" in text
    assert "Here labels alone did better." in text
    assert "so the comparison favours quickstart by the teacher’s epochs" in text


def test_a_mixed_outcome_is_not_sold_as_a_win(tmp_path: Path) -> None:
    text = text_of(report_of(make_study(tmp_path / "runs", {FULL: (96.0, 97.0), LABELS: (95.0, 97.5)})))
    assert (
        "0.25 points more than the same network trained on labels alone (ahead with 1 of 2 seeds, which does not"
        in text
    )
    assert "this does not settle which of the two is better" in text


def test_only_equal_seeds_on_equal_images_are_paired(tmp_path: Path) -> None:
    full = [make_run(tmp_path / "a" / str(seed), replace(FULL, seed=seed), 97.0) for seed in (0, 1)]
    labels = [make_run(tmp_path / "b" / str(seed), replace(LABELS, seed=seed), 96.0) for seed in (1, 2)]
    assert "ahead with 1 of 1 seed." in text_of(report_of(*full, *labels))
    evaluation = json.loads((labels[0] / "evaluation.json").read_text())
    write_json(labels[0] / "evaluation.json", evaluation | {"split": "val"})
    assert "they share no finished seed on the same images" in text_of(report_of(*full, *labels))


def test_equal_names_with_other_settings_stay_apart(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", LABELS, 96.0)
    second = make_run(tmp_path / "b", replace(LABELS, optim=replace(LABELS.optim, lr=0.5)), 90.0)
    text = text_of(report_of(first, second))
    assert "quickstart-labels (optim.lr 0.5)" in text
    assert "93.00" not in text  # the mean of the two would be a mean of nothing


def test_single_run_without_teacher(tmp_path: Path) -> None:
    text = text_of(report_of(make_run(tmp_path / "run", LABELS, 96.0)))
    assert "With one seed, quickstart-labels reaches 96.00 % top-1 on digits." in text
    assert "Comparison" not in text
    assert "its teacher" not in text
    assert "Fusing changed no logit by more than 2.4e-06" in text
    assert "train 1,000, val 297, test 500 images, 10 classes" in text
    assert "truncated file" in text
    assert f"riformer train --config {tmp_path}/run/recipe.json --out {tmp_path}/run-again" in text
    assert "optim.epochs 300 6" in text
    assert "Testcore 9000 (2 threads) · riformer 0.1.0 · torch 2.11.0 · timm 1.0.31 · 2026-03-01" in text


def test_a_network_that_keeps_its_mixers_is_not_said_to_be_fused(tmp_path: Path) -> None:
    recipe = replace(FULL, name="quickstart-mixer", model=replace(FULL.model, mixer="pooling"))
    text = text_of(report_of(make_run(tmp_path / "run", recipe, 97.0)))
    assert "This network keeps its token mixers: there is nothing to fuse." in text
    for wrong in ("fused", "Fusing changed", "Speed over", "times as fast", "after the fuse", "before the fuse"):
        assert not re.search(rf"\b{wrong}", text)
    fused = text_of(report_of(make_run(tmp_path / "other", FULL, 97.0)))
    assert all(right in fused for right in ("fused", "Fusing changed", "Speed over", "times as fast", "after the fuse"))


def test_nested_teacher_is_part_of_its_run(tmp_path: Path) -> None:
    make_run(tmp_path / "deep" / "down" / "run", FULL, 97.0, steps_per_epoch=5)
    page = report_of(tmp_path / "deep")
    assert "from 1 run folder;" in text_of(page)
    assert "teacher, on labels" in page


def test_unfinished_run_and_half_a_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FULL, None, steps_per_epoch=5)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "step": 31, "lo\xc3')
    page = report_of(run)
    text = text_of(page)
    assert "quickstart is unfinished: 3 of 6 epochs on digits, with" in text
    assert "1 run of 1 is unfinished (no evaluation.json yet)" in text
    assert "1 unreadable line in metrics.jsonl left out" in text
    assert page.count("<svg") == 2


def test_a_resumed_run_counts_each_epoch_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, None, steps_per_epoch=5)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind="epoch", epoch=2, step=15, val_top1=88.25, seconds=1.5)) + "\n")
    assert "quickstart-labels is unfinished: 3 of 6 epochs on digits, with 88.25 %" in text_of(report_of(run))


def test_an_early_evaluation_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, 96.0, steps_per_epoch=5)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:12]))
    assert f"Evaluated before the last epoch, and counted like the others: {run}" in text_of(report_of(run))


def test_validation_as_the_test_split_is_called_optimistic(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LABELS, 96.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    write_json(run / "evaluation.json", evaluation | {"split": "val"})
    assert "chosen on these same images, so the numbers are optimistic" in text_of(report_of(run))


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "recipe.json", to_dict(FULL))
    assert "quickstart is unfinished: 0 of 6 epochs" in text_of(report_of(tmp_path / "run"))


@pytest.mark.parametrize("missing", ["models", "fuse", "speed", "confusion", "samples", "split", "num_images", "date"])
def test_missing_parts_of_the_evaluation(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run", FULL, 97.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation[missing]
    write_json(run / "evaluation.json", evaluation)
    assert "What was run" in text_of(report_of(run))


def test_missing_numbers_of_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FULL, 97.0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["models"] = {"teacher": {}, "deploy": {"top1": 97.0}}
    write_json(run / "evaluation.json", evaluation)
    (run / "data.json").unlink()
    (run / "env.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert "With one seed, quickstart reaches 97.00 % top-1 on digits" in text_of(report_of(run))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    recipe = replace(FULL, name=hostile)
    runs = [
        make_run(tmp_path / f"{i}", replace(recipe, seed=i), 97.0, (hostile, "$x_1$", "\udcff", "é"), 5) for i in (0, 1)
    ]
    page = report_of(*runs)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_many_long_class_names(tmp_path: Path) -> None:
    classes = tuple(f"a rather long name of class number {i}" for i in range(120))
    page = report_of(make_run(tmp_path / "run", LABELS, 60.0, classes))
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
        pages.append(report_of(run))
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
    page = report_of(run)
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
