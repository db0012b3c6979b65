"""Verbs around a trained model: fuse, publish, convert; and what predict and serve open."""

from pathlib import Path
from typing import Literal

import torch

from riformer.cli.options import console, load_model, verb_parser
from riformer.distill.teachers import describe
from riformer.measure.cost import count_params
from riformer.model.fuse import FORMS, remaining_mixers
from riformer.model.hub import check_repository, push
from riformer.model.metaformer import MetaFormer
from riformer.model.weights import convert, load, save, save_pretrained
from riformer.pages.card import model_card
from riformer.runtime.optimize import BACKENDS
from riformer.runtime.parity import compare
from riformer.runtime.runner import as_runner
from riformer.train.run import Run
from riformer_runtime.engines import Runner


def fuse_verb(argv: list[str]) -> int:
    """Writes the deploy form of a run or model, after checking that it computes the same.

    The check compares logits on random images; a difference above --tolerance of the largest logit writes nothing.
    """
    parser = verb_parser("fuse", fuse_verb)
    parser.add_argument("source", type=str, help="run folder, model folder or weights file")
    parser.add_argument("destination", type=str, help="FILE.safetensors, or a folder that timm's local-dir: reads too")
    parser.add_argument("--fold", action="store_true", help="also fold the layer scales into norms and MLPs")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed")
    options = parser.parse_args(argv)
    model = load(options.source)
    if mixers := remaining_mixers(model):
        raise ValueError(f"{options.source} mixes tokens ({mixers}), which nothing can merge away")
    fused, difference = _in_form("folded" if options.fold else "deploy", model, options.tolerance)
    save(fused, options.destination)
    console.print(f"{options.destination}: {_outcome(model, fused, difference)}")
    return 0


def open_model(path: str, engine: str, num_images: int | None) -> tuple[Runner, str]:
    """A run or model as a runner, for the verbs of `riformer_runtime`, and why it has no faster engine; or ""."""
    engines = ("auto", "eager", *BACKENDS)
    if engine not in engines:
        raise ValueError(f"--engine is {engine!r}; a run or model runs on {', '.join(engines)}")
    return as_runner(load_model(path), engine, num_images)


def publish(argv: list[str]) -> int:
    """Writes a run's best model and a model card to a folder that timm reads, and pushes it to the Hugging Face Hub.

    The card is the folder's README.md, with what the run folder says of the model, its accuracy and its training. An
    existing model folder is replaced, its card included. Pushing needs a network and a token (`hf auth login`).
    """
    parser = verb_parser("publish", publish)
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("folder", type=str, help="where to write; timm reads it as local-dir:FOLDER")
    form_help = "deploy (fused), folded (layer scales merged as well), or training (as it was trained)"
    parser.add_argument("--form", type=Literal["deploy", "folded", "training"], default="deploy", help=form_help)
    parser.add_argument("--push", type=str, metavar="OWNER/NAME", default="", help="push it to this Hub repository too")
    parser.add_argument("--private", action="store_true", help="make that repository private, where it is new")
    options = parser.parse_args(argv)
    if options.push:
        check_repository(options.push)
    elif options.private:
        raise ValueError("--private has no effect without --push OWNER/NAME")
    best = Run(options.run).best()
    if best.resolve() == Path(options.folder).resolve():
        raise ValueError(f"{options.folder} is the run's own best model, which the run needs; give another folder")
    card, model = model_card(options.run, options.form, options.push), load(best)
    published, difference = _in_form(options.form, model)
    save_pretrained(published, options.folder, card)
    console.print(f"{options.folder}: {_outcome(model, published, difference)}; README.md is its card")
    if options.push:
        push(options.folder, options.push, options.private)
        console.print(f"pushed: hf-hub:{options.push}")
    return 0


def convert_verb(argv: list[str]) -> int:
    """Reads an mmpretrain, PoolFormer or timm checkpoint and writes safetensors with this package's names.

    Nothing in a checkpoint is executed. One that does not fit the architecture is refused, each difference named. So is
    one whose keys are those of several networks, unless --form says which it is.
    """
    parser = verb_parser("convert", convert_verb)
    parser.add_argument("source", type=str, help="checkpoint file, .pth or .safetensors")
    parser.add_argument("destination", type=str, help="FILE.safetensors, or a folder that timm's local-dir: reads too")
    model_help = "what it must be, such as riformer_s12.mmpretrain_in1k_384 (default: by its shapes, at 224 px)"
    parser.add_argument("--model", type=str, help=model_help)
    form_help = "what a file whose keys fit several networks holds: deploy, poolformer, timm-poolformer or deleted"
    parser.add_argument("--form", type=str, default="", help=form_help)
    parser.add_argument("--plain", action="store_true", help="take the plain weights of a file with EMA weights too")
    unverified_help = "read a model that differs from its checksum, such as after editing its config.json"
    parser.add_argument("--unverified", action="store_true", help=unverified_help)
    options = parser.parse_args(argv)
    written = convert(
        options.source, options.destination, options.model, options.form, not options.plain, not options.unverified
    )
    model = load(written)
    console.print(f"{written}: {describe(model)}, {count_params(model):,} parameters")
    return 0


def _in_form(form: str, model: MetaFormer, tolerance: float = 1e-4) -> tuple[MetaFormer, float]:
    """The model in that form, and the largest difference of logits of random images, as a share of the largest."""
    changed = FORMS[form](model)
    images = torch.randn(8, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    difference = compare(model, changed, [images.to(next(model.parameters()))]).max_rel
    if not difference <= tolerance:
        raise RuntimeError(f"the {form} form differs by {difference:.2g} of the largest logit; nothing was written")
    return changed, difference


def _outcome(before: MetaFormer, after: MetaFormer, difference: float) -> str:
    return (
        f"{describe(after)}, {count_params(after):,} parameters, {count_params(before):,} before; "
        f"largest difference {difference:.1e} of the largest logit"
    )
