"""What the README promises runs as written; README, Makefile and docs name things that exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load_script

import riformer_cli
from riformer.cli.recipe import KNOBS
from riformer.config.knobs import option
from riformer.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_readme_has_the_blocks_that_these_tests_run():
    assert len(PYTHON) == 2
    assert [line.split("#")[0].strip() for line in SHELL[:2]] == ["make quickstart", "make test"]
    assert len(SHELL) == 13


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=["python", "backbone"])
def test_python_examples_run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    comments = re.findall(r"print\(.*\)  # (.*)", code)
    assert result.stdout.splitlines() == comments


@pytest.mark.parametrize("target", ["quickstart", "test", "timm-tests", "ci"])
def test_make_targets_exist_and_set_themselves_up(target):
    plan = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" in plan


SMALL = "--optim.epochs 1 --teacher.epochs 1 --optim.warmup-epochs 0 --model.name riformer_micro"


def shrunk(command: str, more: str = "") -> list[str]:
    """The arguments of a command of the README or the Makefile, small enough for a test."""
    for network, smaller in (("riformer_s12", "riformer_micro"), ("vit_base_patch16_224", "vit_tiny_patch16_224")):
        command = command.replace(network, smaller)
    arguments = shlex.split(command, comments=True)[1:]
    smaller = {
        "train": f"{SMALL} {more}",
        "bench": "--img_sizes [32] --batch_sizes [2] --rounds 3 --seconds 0.001 --memory false",
    }
    smaller |= {"ladder": smaller["train"], "profile": "--batch-size 1 --rounds 3"}
    return arguments + smaller.get(arguments[0], "").split()


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """Runs command lines of `riformer` one after the other, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def run(commands):
        for verb, *arguments in commands:
            assert riformer_cli.run(verb, arguments) == 0, (verb, arguments)

    return run


@pytest.mark.slow
def test_the_quickstart_of_the_makefile_runs(tmp_path, run_all):
    recipe = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    commands = [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()]
    assert [command.split()[1] for command in commands] == ["ladder", "fuse", "predict", "report"]
    for name, value in (
        ("$(RUNS)", "runs/quickstart"),
        ("0 1 2", "0"),
        ("--jobs 2", ""),
        ("examples/", f"{ROOT}/examples/"),
    ):
        commands = [command.replace(name, value) for command in commands]
    run_all([shrunk(command, "--optim.batch-size 500") for command in commands])
    assert (tmp_path / "runs/quickstart/report.html").stat().st_size > 50_000
    assert (tmp_path / "runs/quickstart/riformer-digits.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_for_own_images_run(tmp_path, image_folder, run_all):
    (tmp_path / "more-photos").mkdir()
    image = next(image_folder.rglob("*.png"))
    shutil.copy(image, tmp_path / "holiday.jpg")
    shutil.copy(image, tmp_path / "more-photos")
    commands = [line.removeprefix(".venv/bin/").replace("folder:PATH", f"folder:{image_folder}") for line in SHELL[2:]]
    served = [command for command in commands if command.startswith("riformer serve")]  # which ends with a signal alone
    assert len(served) == 1
    commands.remove(served[0])
    more = "--data.img-size 16 --data.num-workers 0 --optim.batch-size 8"
    run_all([shrunk(command, more) for command in commands])
    assert (tmp_path / "runs/mine/report.html").is_file()
    assert (tmp_path / "my-model/README.md").is_file()
    assert (tmp_path / "speed.html").is_file()
    assert (tmp_path / "profile/profile.svg").is_file()


GLOB = re.compile(r"[*?\[\]{}~]")
PAGES = [ROOT / "README.md", ROOT / "Makefile", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]


def commands(page: str) -> list[str]:
    """Command lines of `riformer` in code blocks, code spans and recipes of make, without their comments."""
    joined = re.sub(r"\\\n\s*", " ", page).replace("$(BIN)/", "").replace(".venv/bin/", "")
    lines = [line.strip() for line in joined.splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", joined, flags=re.DOTALL).replace("\n", " "))
    return [text.split("  #")[0] for text in [*lines, *spans] if re.match(r"(riformer|torchrun|python) |--\w", text)]


def unquoted(command: str) -> str:
    """The command without what stands in quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", command)


def test_no_command_has_a_character_that_a_shell_expands():
    """`[0,1,2]` is a pattern: with a file named 1 in the folder, bash passes 1, and zsh fails without one."""
    shown = [(page.name, command) for page in PAGES for command in commands(page.read_text())]
    assert len(shown) > 30
    assert [(name, command) for name, command in shown if GLOB.search(unquoted(command).replace("...", ""))] == []
    assert GLOB.search(unquoted(commands("\trun\n\t$(BIN)/riformer ladder --seeds [0,1,2]")[0]))
    assert not GLOB.search(unquoted("riformer train --model.args '{\"a\": [1]}'"))


def test_options_in_the_docs_are_spelt_with_dashes_and_exist():
    options = {option(knob) for knob in KNOBS}
    for page in PAGES:
        for name in re.findall(r"--[a-z]+\.[\w-]+", page.read_text()):
            assert name in options, f"{name} in {page.name}"


def test_docs_name_files_verbs_and_recipes_that_exist():
    text = README + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    named = set(
        re.findall(r"`((?:model|distill|data|train|runtime|export|measure|study|pages)/\w+\.py|recipes\.py)", text)
    )
    assert len(named) > 8
    assert [name for name in named if not (ROOT / "riformer" / name).is_file()] == []
    tests = set(re.findall(r"`(tests/[\w/]+\.py)", text))
    assert len(tests) > 5
    assert [name for name in tests if not (ROOT / name).is_file()] == []
    assert set(re.findall(r"`?riformer (\w+)[ `]", "\n".join(SHELL))) <= set(riformer_cli.VERBS)
    assert set(re.findall(r"--recipe ([\w-]+)", README + MAKEFILE)) <= set(RECIPES)


def test_the_readme_gives_the_published_recipes_as_they_are():
    rows = re.findall(r"^\| (`.*`) \|.*\| ([\d. ]+) \| ([\d, ]+) \|$", README, re.MULTILINE)
    named = set()
    for names, accuracies, hours in rows:
        columns = re.findall(r"[\w-]+", names), accuracies.split(), hours.split()
        for name, accuracy, cost in zip(*columns, strict=True):
            named.add(name)
            assert f"top-1 {accuracy}" in RECIPES[name].__doc__
            assert f"Cost: {cost} GPU-hours" in RECIPES[name].__doc__
    assert named == {name for name in RECIPES if RECIPES[name].__module__ == "riformer.published"}


def test_links_of_the_readme_lead_somewhere():
    local = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(local) >= 3
    assert [link for link in local if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize(
    ("name", "script", "page"),
    [
        ("quickstart", "tools/record_quickstart.py", "docs/paper-map.md"),
        ("teachers", "benchmarks/teachers.py", "docs/teachers.md"),
    ],
)
def test_a_documented_table_is_the_recorded_one(name, script, page):
    module = load_script(script)
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", (ROOT / page).read_text(), re.DOTALL)[1]
    assert shown == module.table(json.loads(module.RESULTS.read_text()))


def test_the_speeds_in_the_docs_are_the_recorded_ones():
    shown = 0
    for page, texts in load_script("tools/show.py").blocks().items():
        for name, text in texts.items():
            assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page.read_text()
            shown += 1
    assert shown == 15
