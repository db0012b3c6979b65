"""What the verbs share: consoles, parsers, and what a command line names."""

from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from riformer.model.weights import load
from riformer.train.distributed import is_main_process
from riformer_runtime.cli import options
from riformer_runtime.cli.console import Console
from riformer_runtime.cli.options import console
from riformer_runtime.cli.options import errors as errors
from riformer_runtime.cli.parsing import Parser

EXAMPLES = {
    "train": (
        ("riformer train", "the quickstart: built-in digits, minutes on a processor"),
        ("riformer train --recipe photos --data.name folder:PATH", "your own photographs, for a GPU"),
        ("riformer train --recipe photos --data.name folder:PATH --dry-run", "time and memory that this takes here"),
        ("riformer train --rung labels --seed 3", "the control: the same network on labels alone"),
        ("riformer train --resume runs/photos-seed0", "an interrupted run, as it was begun"),
        ("riformer train --distill.logit-teacher runs/a runs/b", "two teachers that are there already"),
    ),
    "ladder": (
        ("riformer ladder --seeds 0 1 2", "labels alone beside the full recipe, three times"),
        ("riformer ladder --rungs mixer identity full --budgets 1 3", "what lasts in longer trainings"),
    ),
    "eval": (
        ("riformer eval runs/photos-seed0", "on its own data, with its teacher"),
        ("riformer eval model.safetensors --data folder:PATH", "any saved model on other images"),
    ),
    "fuse": (("riformer fuse runs/photos-seed0 model.safetensors", "the deploy form, in one file"),),
    "export": (
        ("riformer export runs/photos-seed0 exported/", "for every engine that is installed"),
        ("riformer export runs/photos-seed0 exported/ --to onnx openvino --precision fp32 int8", "also quantised"),
    ),
    "layout": (
        ("riformer layout exported/ models/ --server triton", "for tritonserver --model-repository models"),
        (
            "riformer layout exported/ models/ --server openvino --name cats",
            "for ovms --config_path models/config.json",
        ),
    ),
    "profile": (("riformer profile riformer_s12:mixer=pooling --out profile", "a PoolFormer, with a picture"),),
    "bench": (
        ("riformer bench riformer_s12 resnet50 --backends eager ours", "two networks on two engines"),
        ("riformer bench riformer_s12 --batch-sizes 1 8 64 --out speed.json", "and a file for riformer report"),
    ),
    "publish": (("riformer publish runs/photos-seed0 my-model", "a folder that timm reads, with a card"),),
    "convert": (("riformer convert riformer-s12.pth riformer-s12.safetensors", "a checkpoint of mmpretrain"),),
    "report": (
        ("riformer report runs", "all runs below a folder"),
        ("riformer report --ladder runs/quickstart", "the rungs of a ladder"),
    ),
    "list": (("riformer list recipes", "what --recipe takes"),),
}


def verb_parser(name: str, verb: Callable, about: str = "", renamed: dict[str, str] | None = None) -> Parser:
    """A parser whose help is the verb's docstring, then `about`, then examples."""
    return options.verb_parser(name, verb, EXAMPLES[name], about, renamed)


def load_model(path: str | Path) -> nn.Module:
    """The model, in float32 and where it runs fastest."""
    return load(path).to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def check_name(name: str, table: Collection[str], kind: str) -> str:
    """The name, if the table has it.

    Raises:
        ValueError: it has not; the message has a near miss or the names that there are.
    """
    if name not in table:
        near = get_close_matches(name, table)
        raise ValueError(
            f"no {kind} {name!r}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}")
        )
    return name


def main_console() -> Console:
    """The console; a silent one in all but the first process of a distributed run."""
    return console if is_main_process() else Console(quiet=True)
