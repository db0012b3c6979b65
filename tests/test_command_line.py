"""Options, their values and their help, and text of users on the terminal; nothing is trained here."""

import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any, Literal

import pytest
from rich.table import Table

import riformer_cli
from riformer import cli
from riformer.cli.progress import TrainProgress
from riformer.cli.recipe import KNOBS, SHORT_HELP, RecipeOptions
from riformer.config import Recipe, from_dict, to_dict
from riformer.config.knobs import option, value_of
from riformer.data.dataset import open_dataset
from riformer.recipes import RECIPES, RENAMED, TeacherConfig, quickstart
from riformer_runtime.cli.console import Console, LogHandler, printable
from riformer_runtime.cli.parsing import Parser, written


def recipe_of(command: str, verb: str = "train") -> Recipe:
    """The recipe that a command line names."""
    return RecipeOptions(verb, getattr(cli, verb), shlex.split(command)).parse()[1]


def refused(capsys, verb: str, command: str) -> str:
    """The message with which a command ends, be it by its parser or by what it does."""
    try:
        code = riformer_cli.run(verb, shlex.split(command))
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize("joint", ["-", "_"])
def test_words_are_joined_by_dashes_and_underscores_are_understood(joint, tmp_path):
    name = f"--data.val{joint}fraction"
    for command in (f"{name} 0.5", f"{name}=0.5"):
        recipe = recipe_of(f"--data.name folder:my_photos_of_2020 {command}")
        assert recipe.data.val_fraction == 0.5
        assert recipe.data.name == "folder:my_photos_of_2020"


@pytest.mark.parametrize(
    ("command", "knob", "value"),
    [
        ("--model.depths 2 2 6 2", "model.depths", (2, 2, 6, 2)),
        ("--model.depths '[2, 2]'", "model.depths", (2, 2)),
        ("--model.depths [2, 2]", "model.depths", (2, 2)),
        ("--model.depths=[2,2]", "model.depths", (2, 2)),
        ("--model.depths 2", "model.depths", (2,)),
        ("--model.depths null", "model.depths", None),
        ("--model.mixer pooling", "model.mixer", "pooling"),
        ("--model.mixer pooling affine", "model.mixer", ("pooling", "affine")),
        ("""--model.mixer '["pooling"]'""", "model.mixer", ("pooling",)),
        ("--model.stem-patch 3", "model.stem_patch", 3),
        ("--model.stem-patch null", "model.stem_patch", None),
        ("--model.layer-scale-init 1e-5", "model.layer_scale_init", 1e-5),
        ("""--model.args '{"a": [1, null]}'""", "model.args", {"a": [1, None]}),
        ("--model.args {}", "model.args", {}),
        ("--augment.crop-scale 0.3 1", "augment.crop_scale", (0.3, 1.0)),
        ("--data.mean 0.5 5e-1 .5", "data.mean", (0.5, 0.5, 0.5)),
        ("--data.std '[0.2, 0.2, 0.2]'", "data.std", (0.2, 0.2, 0.2)),
        ("--distill.logit-teacher runs/a 'runs/b c'", "distill.logit_teacher", ("runs/a", "runs/b c")),
        ("--distill.logit-teacher '[v]'", "distill.logit_teacher", "[v]"),
        ("--distill.logit-teacher=", "distill.logit_teacher", ""),
        ("--distill.trust-teacher", "distill.trust_teacher", True),
        ("--optim.compile False", "optim.compile", False),
        ("--seed -3", "seed", -3),
        ("--optim.lr 1e-2", "optim.lr", 0.01),
        ("--name 'exp [v]'", "name", "exp [v]"),
        ("--name 3", "name", "3"),
        ("--research.positions all", "research.positions", "all"),
        ("--research.positions stages.0.blocks.0 b", "research.positions", ("stages.0.blocks.0", "b")),
    ],
)  # fmt: skip
def test_an_option_is_read_as_its_knob_says(command, knob, value):
    assert value_of(recipe_of(command), knob) == value
    assert type(value_of(recipe_of(command), knob)) is type(value)


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_can_be_given_as_its_help_shows_it(knob):
    """Options with the values of another recipe, as the help of that recipe writes them, make that recipe."""
    recipe = replace(RECIPES["glyphs-riformer"](), name="another", seed=5)
    value = value_of(recipe, knob)
    words = shlex.join(written(value).split() if isinstance(value, tuple) else [written(value)])
    assert not words or value_of(recipe_of(f"{option(knob)} {words}"), knob) == value


@pytest.mark.parametrize(
    ("verb", "command", "message"),
    [
        ("train", "--hepl", "no option --hepl; did you mean --help"),
        ("predict", "--hepl", "no option --hepl; did you mean --help"),
        ("predict", "model image.png --topk 3", "no option --topk; did you mean --top-k"),
        ("train", "--data.on_bd skip", "no option --data.on-bd; did you mean --data.on-bad"),
        ("train", "--optim.learning-rate=1", "no option --optim.learning-rate; did you mean --optim."),
        ("train", "-seed 3", "no option -seed; did you mean --seed"),
        ("train", "--distill.positions all", "--distill.positions is now --research.positions"),
        ("train", "--distill.cache_top_k 3", "--distill.cache-top-k is now --research.cache-top-k"),
        ("train", "runs/x", "unrecognized arguments: runs/x"),
        ("train", "--optim.epochs ten", "--optim.epochs is 'ten', but must be a whole number"),
        ("train", "--optim.epochs 1.5", "--optim.epochs is '1.5', but must be a whole number"),
        ("train", "--optim.lr fast", "--optim.lr is 'fast', but must be a number"),
        ("train", "--optim.lr nan", "--optim.lr is nan, but must be a number"),
        ("train", "--optim.precision bf61", "but must be 'fp32' or 'bf16'; did you mean 'bf16'"),
        ("train", "--optim.compile maybe", "--optim.compile is 'maybe', but must be true or false"),
        ("train", "--data.mean 0.5 0.5", "--data.mean is (0.5, 0.5), but must be 3 numbers"),
        ("train", "--data.mean 0.5 -0.5 -1e-1", "--data.mean is (0.5, -0.5, -0.1), but must be 3 numbers at least 0"),
        ("train", "--data.mean 0.5 x 0.5", "--data.mean is (0.5, 'x', 0.5), but must be 3 numbers"),
        ("train", "--model.depths 2 two", "--model.depths is (2, 'two'), but must be whole numbers or null"),
        ("train", "--model.args [1]", "--model.args is '[1]', but must be a dict"),
        ("train", "--optim.epochs", "argument --optim.epochs: expected one argument"),
        ("train", "--optim.epochs 0", "--optim.epochs is 0, but must be a whole number at least 1"),
        ("train", "--augment.crop-scale 1 0.1", "is (1.0, 0.1), but the smaller share comes first"),
        ("train", "--data.on-bad skip", "--data.on-bad is 'skip', but has no effect: digits is no folder of images"),
        ("train", "--recipe glyphs", "the recipe glyphs is now glyphs-overlap"),
        ("train", "--recipe quikstart", "did you mean quickstart?"),
        ("train", "--config absent.json", "absent.json"),
        ("ladder", "--seed 3", "no option --seed; did you mean --seeds"),
        ("ladder", "--seeds 0,1", "--seeds is ['0,1'], but must be whole numbers"),
        ("ladder", "--rungs full ful", "did you mean full?"),
        ("bench", "riformer_s12 --memory perhaps", "--memory is 'perhaps', but must be true or false"),
        ("profile", "riformer_s12 --precision fp61", "--precision is 'fp61', but must be 'fp32' or 'bf16' or 'fp16'"),
        ("publish", "a b --form deplyo", "did you mean 'deploy'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_named_with_what_can(verb, command, message, capsys):
    assert message in refused(capsys, verb, command)


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("--seeds 0 1 2", [0, 1, 2]),
        ("--seeds '[0, 1, 2]'", [0, 1, 2]),
        ("--seeds=[0,1,2]", [0, 1, 2]),
        ("--seeds 1", [1]),  # what bash makes of [0,1,2] beside a file named 1
        ("--seeds -1 0", [-1, 0]),
        ("", [0, 1]),
    ],
)
def test_lists_are_words(command, values):
    parser = Parser("verb")
    parser.add_argument("--seeds", type=list[int], default=[0, 1], help="seeds")
    parser.add_argument("--names", type=list[str], default=[], help="names")
    assert parser.parse_args(shlex.split(command)).seeds == values
    assert parser.parse_args(["--names", "[a,b]"]).names == parser.parse_args(["--names", "a", "b"]).names == ["a", "b"]


def test_a_parser_keeps_types_defaults_and_dots():
    parser = Parser("verb")
    parser.add_argument("paths", type=str, nargs="+", help="files")
    parser.add_argument("--data.on_bad", type=Literal["error", "skip"], default="error", help="what to do")
    parser.add_argument("--data.val_fraction", type=float, default=0.2, help="100 % of it")
    parser.add_argument("--json", action="store_true", help="as JSON")
    values = parser.parse_args(["a", "-", "--data.val-fraction", "1"])
    assert (values.paths, values.json) == (["a", "-"], False)
    assert vars(values.data) == {"on_bad": "error", "val_fraction": 1.0}
    assert "--data.on-bad {error,skip}" in parser.format_help()
    assert "100 % of it (default: 0.2)" in parser.format_help()
    assert parser.format_help().startswith("usage: verb [options] paths [paths ...]\n")


@pytest.mark.parametrize("verb", riformer_cli.VERBS)
def test_every_verb_explains_every_option_and_shows_examples_that_are_right(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as error:
        riformer_cli.run(verb, ["--help-all"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: riformer {verb} [options]")
    entries = text[text.index("options:") : text.index("examples:")].split("\n  -")
    bare = [entry for entry in entries[1:] if len(entry.split()) < 3]
    assert bare == []
    names = set(re.findall(r"\n  (?:-\w, )?(--[\w.-]+)", text))
    assert not any("_" in name for name in names)
    examples = re.findall(rf"^  (riformer {verb}.*)$", text, re.MULTILINE)
    assert examples
    used = {word.partition("=")[0] for example in examples for word in shlex.split(example) if word.startswith("--")}
    assert used - names <= {"--data"}  # which is short for --data.name


@pytest.mark.parametrize("verb", ["train", "ladder"])
def test_help_is_short_and_help_all_is_whole(verb, capsys):
    texts = {}
    for name in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            cli.run(verb, ["--recipe", "photos", name])
        texts[name] = capsys.readouterr().out
    short, whole = texts.values()
    knobs = [option(knob) for knob in KNOBS if (verb, knob) != ("ladder", "seed")]
    assert [knob for knob in knobs if f"\n  {knob} " not in whole] == []
    shown = [knob for knob in knobs if f"\n  {knob} " in short]
    assert shown == [knob for knob in knobs if "." not in knob or knob in {option(k) for k in SHORT_HELP}]
    assert "--research" not in short
    assert short.count("\n") < 120 < whole.count("\n")
    sections = [whole.index(f"\n{name}:\n") for name in ("options", "data", "model", "distill", "optim", "research")]
    assert sections == sorted(sections)
    assert "--help-all" in short[-2000:]
    for text in texts.values():
        assert "The recipe photos: Photographs at 224 pixels" in text
        assert "--optim.epochs N              passes over the training images (default: 120)" in text


def test_the_help_of_the_command_is_instant():
    code = "import sys; sys.argv[1:] = ['trian']\nimport riformer_cli\ntry: riformer_cli.main()\n"
    code += "except SystemExit as e: print(e, {*sys.modules} & {'torch', 'timm', 'riformer', 'rich'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "riformer: no verb 'trian'; did you mean train? set()\n"


def test_what_overrides_leave_without_effect_goes_back_and_what_was_given_without_effect_is_refused(capsys):
    start = "--distill.logit-teacher timm:a --distill.module-teacher timm:a"
    recipe = recipe_of(start)
    assert recipe.teacher == TeacherConfig()
    assert quickstart().teacher != TeacherConfig()
    assert "--teacher.epochs is 3, but has no effect" in refused(capsys, "train", f"{start} --teacher.epochs 3")
    assert recipe_of("--teacher.epochs 3").teacher == replace(quickstart().teacher, epochs=3)
    assert recipe_of("--optim.epochs 3").optim.epochs == 3


def test_a_file_is_checked_as_the_command_line_is(tmp_path, capsys):
    file = tmp_path / "recipe.json"
    for section, name, value, message in (
        ("optim", "precision", "fp16", "--optim.precision is 'fp16', but must be 'fp32' or 'bf16'"),
        ("research", "block_match", "normalized", "did you mean 'normalised'?"),
        ("data", "std", [0.2, 0, 0.2], "--data.std is (0.2, 0, 0.2), but must be 3 numbers above 0"),
        ("data", "val_fraction", 0.4, "--data.val-fraction is 0.4, but has no effect"),
        ("optim", "epoch", 1, "optim has no 'epoch'; did you mean 'epochs'?"),
    ):
        values = to_dict(quickstart())
        values[section][name] = value
        file.write_text(json.dumps(values))
        assert message in refused(capsys, "train", f"--config {file}")
    values = to_dict(quickstart())
    values["distill"]["positions"] = values["research"].pop("positions")
    file.write_text(json.dumps(values))  # as an earlier version wrote it
    assert recipe_of(f"--config {file}") == quickstart() == from_dict(to_dict(quickstart()))
    file.write_text("{")
    assert f"--config {file}: " in refused(capsys, "train", f"--config {file}")


DISCARDED = [
    ("--rung mixer --model.mixer attention", "--model.mixer attention", "mixer", "global_filter"),
    ("--rung hard --distill.label-weight 0.9 --distill.hard-weight 0.1", "--distill.label-weight 0.9", "hard", "0.5"),
    ("--rung labels --teacher.epochs 3", "--teacher.epochs 3", "labels", "120"),
    ("--rung labels --distill.soft-weight 0.5", "--distill.soft-weight 0.5", "labels", "0.0"),
    ("--rung soft --distill.module-teacher runs/a", "--distill.module-teacher runs/a", "soft", "empty"),
    ("--rung soft-t4 --distill.temperature 3", "--distill.temperature 3.0", "soft-t4", "4"),
]


def on_rung(command: str) -> Recipe:
    settings = RecipeOptions("train", cli.train, shlex.split(command))
    settings.parser.add_argument("--rung", type=str)
    options, recipe = settings.parse()
    return settings.on_rungs(recipe, [options.rung])[0]


@pytest.mark.parametrize(("command", "override", "rung", "instead"), DISCARDED)
def test_an_override_that_a_rung_discards_is_refused(command, override, rung, instead):
    message = f"{override} has no effect in the rung {rung}, where it is {instead}; leave one of the two out"
    with pytest.raises(ValueError, match=re.escape(message)):
        on_rung(command)


@pytest.mark.parametrize(
    ("command", "knob", "value"),
    [
        ("--rung imitation --distill.start-from-teacher false", "distill.start_from_teacher", False),
        ("--rung mixer --teacher.mixer attention", "model.mixer", "attention"),
        ("--rung labels --optim.epochs 3", "optim.epochs", 3),
        ("--rung labels-long --teacher.epochs 3", "optim.epochs", 28),
        ("--rung hard --distill.label-weight 0.5", "distill.label_weight", 0.5),
        ("--rung full --distill.soft-weight 0.5", "distill.soft_weight", 0.5),
    ],
)
def test_an_override_that_a_rung_uses_or_agrees_with_is_taken(command, knob, value):
    assert value_of(on_rung(command), knob) == value


def test_in_a_ladder_an_override_must_have_an_effect_in_one_rung_and_be_replaced_in_none():
    def changed(command: str, rungs: list[str], budgets: tuple[int, ...] = ()) -> list[Recipe]:
        settings = RecipeOptions("ladder", cli.ladder, shlex.split(command))
        return settings.on_rungs(settings.parse()[1], rungs, budgets)

    plain, full = changed("--teacher.epochs 3", ["identity", "full"])
    assert (plain.teacher, full.teacher.epochs) == (TeacherConfig(), 3)
    long = changed("--optim.epochs 3 --optim.warmup-epochs 0", ["labels", "full"], (1, 2))
    assert [recipe.optim.epochs for recipe in long] == [3, 3, 6, 6]
    with pytest.raises(
        ValueError, match=r"--model\.mixer pooling has no effect in the rung identity, where it is identity"
    ):
        changed("--model.mixer pooling", ["full", "identity"])
    with pytest.raises(ValueError, match=r"--teacher\.epochs 3 has no effect in the rung labels"):
        changed("--teacher.epochs 3", ["labels", "identity"])


def test_recipes_are_named_by_what_they_are():
    assert set(RENAMED.values()) <= set(RECIPES)
    assert not RENAMED.keys() & RECIPES.keys()
    assert not RECIPES["glyphs-overlap"]().distill.trains_teacher
    assert RECIPES["glyphs-riformer"]().model.mixer == "affine"


NASTY = [
    "lesion [benign]", "[/]", "[bold]x[/bold]", "[red", "[link=x]y", ":smile:", "a\\[b]",
    "\x1b[31mred\x1b[0m", "a\rb", "a\x00b",
    b"caf\xe9".decode("utf-8", "surrogateescape"), "\x9b2J", "\u202egnp.exe",
    "a\nriformer: all is well",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_names_of_users_are_shown_as_text(name):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    console = Console(file=file, width=200, force_terminal=True, color_system=None)
    table = Table(name, "one", title=name, caption=name)
    table.add_row(name, "1")
    console.print(table)
    console.print(printable(name), soft_wrap=True)
    console.print(f"before {printable(name)} after")
    with console.activity(name) as show:
        show(name)
    log = logging.LogRecord("riformer", logging.WARNING, "", 1, "left out %s", (printable(name),), None)
    LogHandler(console).handle(log)
    file.flush()
    shown = file.buffer.getvalue().decode()
    assert shown.count(printable(name)) >= 7
    if name not in printable(name):
        assert name not in shown


def start(run: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "start", "run": run, "step": 0, "num_steps": 2, "pairs": [], "teacher_outputs": "", **changes}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_shows_the_validation_of_the_epoch_that_ended(is_terminal):
    file = io.StringIO()
    run = "exp [v]/[bold]"
    with TrainProgress(Console(file=file, width=200, force_terminal=is_terminal, color_system=None)) as progress:
        progress(start(run, step=1, pairs=["a imitates b"]))
        for epoch, top1 in enumerate((41.0, 87.5)):
            step = {"run": run, "step": epoch + 1, "num_steps": 2}
            progress({**step, "kind": "step", "loss": 1.0, "label": 1.0, "top1": 50.0, "images_per_s": 1000.0})
            progress({**step, "kind": "epoch", "val_top1": top1})
            numbers = progress.trainings[run].numbers
            assert numbers == f"loss 1 (label 1) top-1 50 val {top1} 1,000 img/s"
    shown = file.getvalue()
    assert f"{run}: going on at step 1" in shown
    assert f"{run}: a imitates b" in shown
    assert "val 87.5" in shown


def test_a_fraction_for_validation_is_refused_where_a_folder_has_val(image_folder, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copytree(image_folder, tmp_path / "whole" / split)
    command = f"--data.name folder:{tmp_path / 'whole'} --optim.batch-size 8 --out {tmp_path / 'run'}"
    message = refused(capsys, "train", f"{command} --data.val-fraction 0.4")
    assert "--data.val-fraction is 0.4, but has no effect:" in message
    assert "has a val folder" in message
    assert open_dataset(recipe_of(command.partition(" --out")[0]).data).splits.keys() == {"train", "val"}
