"""User text on pages and cards is text: it adds no element, changes none, and is there whole."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile import NAMES, parsed, shown, texts
from huggingface_hub import ModelCard
from run_folders import (
    CARD_RECIPE,
    FULL,
    LABELS,
    make_bench,
    make_png,
    make_run,
    report_of,
    small_ladder,
    speed_report_of,
    write_run,
)

from riformer.measure.profile import KINDS, Module, Profile, Step
from riformer.pages.card import model_card
from riformer.pages.ladder import write_ladder_report
from riformer.pages.markdown import code, plain
from riformer.pages.profile import draw
from riformer.pages.report import _in_legend, write_report
from riformer.pages.style import drawing, one_line, readable, svg
from riformer.runtime.latency import Spread

TAME = {kind: f"tame-{i:02}" for i, kind in enumerate(NAMES)}

pytestmark = pytest.mark.usefixtures("_few_digits")


def report(folder: Path, names: dict[str, str]) -> str:
    """A page with these names in every place for user text: recipes, data sets, classes, left-out files, samples."""
    runs = []
    for kind, name in names.items():
        data = replace(LABELS.data, name=f"folder:/data/{name}")
        recipe = replace(FULL if kind == "script" else LABELS, name=f"recipe {name}", data=data)
        run = make_run(folder / kind, recipe, 97.0, tuple(names.values()), steps_per_epoch=1)
        edit(run / "data.json", skipped=[{"path": f"left out {name}", "reason": name}])
        index = list(names).index(kind)
        samples = [dict(name=name, label=index, prediction=0, probability=0.9, png=make_png(3))]
        edit(run / "evaluation.json", samples=samples, confusion={str(i): {str(i): 3, "0": 2} for i in range(1, 17)})
        runs.append(run)
    return report_of(*runs)


def edit(file: Path, **more: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def speed(folder: Path, names: dict[str, str]) -> str:
    """A page about networks that were named by their paths, on a device of a strange name."""
    rows = [(f"runs/{name}", "eager", "fp32", 15.0) for name in names.values()]
    return speed_report_of(make_bench(folder / "bench.json", *rows, device=" ".join(names.values())))


@pytest.mark.parametrize("make", [report, speed])
def test_names_change_no_element_of_a_page_and_are_shown_whole(make, tmp_path):
    page, tame = make(tmp_path / "hostile", NAMES), make(tmp_path / "tame", TAME)
    assert elements(page) == elements(tame)
    pieces, expected = texts(page), texts(tame)
    for kind, name in NAMES.items():
        count = sum(TAME[kind] in text for text in expected)
        shortened = 4  # places that shorten it, as a legend, or quote it, as JSON and a command
        assert sum(shown(name) in text for text in pieces) >= count - shortened > 0, kind
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page)
    page.encode()


SVG_PARTS = {"svg", "defs", "style", "g", "path", "use", "text", "clippath", "rect"}


def elements(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Elements of a page with their attributes' names; of figures, whose parts follow the layout, the unusual ones."""
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    inside = [element for figure in figures for element in parsed(figure).elements]
    outside = parsed(re.sub(r"<svg.*?</svg>", "<svg></svg>", page, flags=re.DOTALL)).elements
    return outside + [element for element in inside if element[0] not in SVG_PARTS]


@pytest.mark.parametrize("kind", ["script", "image", "comment"])
def test_the_check_sees_a_name_that_is_not_escaped(kind, tmp_path):
    """A negative control."""
    page = report(tmp_path, {"script": "tame"})
    assert elements(page.replace("tame", NAMES[kind])) != elements(page)


@pytest.mark.parametrize("kind", NAMES)
def test_names_in_figures_are_shown_whole(kind):
    from matplotlib.figure import Figure

    name = one_line(NAMES[kind])
    with drawing():
        figure = Figure()
        axes = figure.subplots()
        axes.plot([1, 2], label=_in_legend(name[:30]))
        axes.set_title(name)
        axes.legend()
        page = svg(figure, "picture")
    elements(page)
    assert shown(NAMES[kind]) in texts(page)
    assert shown(NAMES[kind])[:30] in [text.removeprefix("\u200b") for text in texts(page)]


@pytest.mark.parametrize("kind", ["script", "control", "undecodable", "mathtext", "unicode"])
def test_a_folder_may_have_any_name_that_the_system_allows(kind, tmp_path):
    name = NAMES[kind].replace("/", "∕").replace("\x00", "")
    run = make_run(tmp_path / name, LABELS, 96.0)
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert shown(name) in " ".join(texts(page))
    assert "<script" not in page


def test_the_ladder_page_shows_the_names_of_ladder_and_data(tmp_path):
    """Rungs are a closed list; what users name is the recipe, that is the ladder, and the data."""
    name = "a <b>[x] $y_1$ |"
    small_ladder(tmp_path / "runs", ["mixer", "full"], name=name)
    page = write_ladder_report([tmp_path / "runs"], tmp_path / "ladder.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert any(f"of {name}" in text for text in texts(page))
    assert any(f"{name}-1x-seed0" in text for text in texts(page))


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_stays_text_on_the_card(kind, tmp_path):
    name = NAMES[kind]
    recipe = replace(CARD_RECIPE, name=name, data=replace(CARD_RECIPE.data, name=f"folder:x/{name.replace('/', '')}"))
    card = model_card(write_run(tmp_path, recipe, classes=(name, "ant", "bee", "cow", "dog")))
    front = ModelCard(card).data
    assert front.model_name == f"riformer_s12-{shown(name)}"
    assert front.eval_results[0].metric_value == 88.0625
    titles = ["# ", "## Accuracy", "## Training", "## Preprocessing", "## Classes", "## Use", "## Versions"]
    assert [line for line in card.split("\n---\n", 1)[1].splitlines() if line.startswith("#")] == [
        next(line for line in card.splitlines() if line.startswith("# ")),
        *titles[1:],
    ]
    assert (
        unescaped(card.partition("\n## Classes\n")[2].partition("\n## ")[0].strip())
        == f"5: {shown(name)}, ant, bee, cow, dog."
    )
    row = next(line for line in card.splitlines() if line.startswith("| data |"))
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3
    card.encode()


def unescaped(text: str) -> str:
    """What Markdown shows of text in which punctuation is escaped by backslashes; anything that is not is an error."""
    bare = re.sub(r"\\[\\`*\[\]<>|&$~#@:_.]", "", text)
    assert not re.search(r"[`*\[\]<>|&$~#@]", bare), bare
    return re.sub(r"\\([\\`*\[\]<>|&$~#@:_.])", r"\1", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", "`plain`"), ("a`b", "``a`b``"), ("`a``", "``` `a`` ```"), ("", "`  `"), ("a\nb|c", "`a b|c`")],
)
def test_a_code_span_ends_where_its_text_does(text, expected):
    assert code(text) == expected


def test_links_that_markdown_would_make_are_broken():
    assert plain("see www.example.org or http://x.y and me@x.y") == r"see www\.example.org or http\://x.y and me\@x.y"


def test_every_character_can_be_written():
    everything = "".join(map(chr, range(0x110000)))
    text = readable(everything)
    assert len(text) == len(everything)
    text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert one_line(" a\n\tb ") == "a b"
    assert one_line("a" * 50, most=40) == "a" * 39 + "…"


@pytest.mark.parametrize("kind", NAMES)
def test_the_picture_of_a_profile_takes_any_title(kind, tmp_path):
    spread = Spread(10.0, 9.0, 11.0)
    steps = [Step(step, spread, 2.0) for step in ("embedding", "norm", "token mixer", "MLP", "head")]
    profile = Profile(spread, steps, [Module(part, part, 1.0, 1, 1) for part in KINDS], spread, 1.0)
    draw(profile, NAMES[kind], tmp_path / "profile.svg")
    assert "<svg" in (tmp_path / "profile.svg").read_text(encoding="utf-8")
