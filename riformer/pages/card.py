"""The model card of a run: Markdown with the Hub's front matter, for README.md beside the weights.

Nothing but the run folder is read, and no number is typed. Where something was not measured, the card says so. Of paths
on the machine only the last component is shown.
"""

import json
from dataclasses import fields
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from riformer.config import Recipe
from riformer.distill.objective import IMITATION
from riformer.measure.cost import count_macs, count_params
from riformer.model.fuse import FORMS, remaining_mixers
from riformer.model.metaformer import MetaFormer
from riformer.model.preprocessing import preprocessing_of
from riformer.model.weights import load
from riformer.pages.markdown import code, plain, table
from riformer.pages.style import one_line
from riformer.runtime.manifest import class_names
from riformer.train.run import Run

TASK = "image-classification"
NUM_CLASSES_SHOWN = 20
_ROWS = {"training": "student", "deploy": "deploy"}  # the forms that evaluation.json has, and their names there
_CROPS = {
    "center": "{interpolation} resize, centre crop of {share} to",
    "squash": "{interpolation} resize that changes the aspect ratio, centre crop of {share} to",
    "border": "{interpolation} resize of the longer side, centre crop of {share} with borders in the mean color to",
}

_USE = """\
```python
import riformer  # registers the architecture with timm
import timm
import torch
from PIL import Image

model = timm.create_model({reference}, pretrained=True).eval()
preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    probabilities = model(preprocess(Image.open("image.jpg").convert("RGB"))[None]).softmax(dim=1)[0]
print(model.pretrained_cfg["label_names"][probabilities.argmax()], probabilities.max().item())
```"""


def model_card(run_folder: str | Path, form: str = "deploy", repository: str = "") -> str:
    """The card of a run's best model, as Markdown.

    Args:
        run_folder: as `riformer train` writes it, evaluated or not.
        form: of the weights that the card belongs to: training, deploy or folded.
        repository: OWNER/NAME on the Hub, for a model that is pushed there.

    Raises:
        ValueError: no run there, or nothing trained yet; an unknown form, or one that the network does not have.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed are {', '.join(FORMS)}")
    run = Run(run_folder)
    recipe, trained = run.recipe(), load(run.best())
    mixers = remaining_mixers(trained)
    if mixers and form != "training":
        raise ValueError(
            f"form is {form!r}, but {run_folder} mixes tokens ({mixers}), and token mixers cannot be fused: publish "
            f"its training form"
        )
    model = FORMS[form](trained)
    data, evaluation = run.read("data.json") or {}, run.read("evaluation.json") or {}
    rows = dict(evaluation.get("models", {}))
    if mixers:  # its deploy form is the same network, measured a second time
        rows.pop("deploy", None)
    name = repository.partition("/")[2] or f"{recipe.model.name}-{recipe.name}"
    parts = [
        f"# {plain(name)}",
        _what_it_is(form, mixers, trained),
        _facts(model, form, recipe, data),
        "## Accuracy",
        _accuracy(form, rows, evaluation, recipe),
        "## Training",
        _training(run, recipe, data),
        "## Preprocessing",
        _preprocessing(model),
        "## Classes",
        _classes(model),
        "## Use",
        _use(repository),
        "## Versions",
        _versions(run, evaluation),
    ]
    front = _front_matter(name, model, recipe, evaluation, rows.get(_ROWS.get(form, "")))
    return f"---\n{front.strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(
    name: str, model: nn.Module, recipe: Recipe, evaluation: dict[str, Any], row: dict[str, Any] | None
) -> str:
    """Metadata for the Hub in YAML, with the accuracy of this form where it was measured."""
    data = one_line(_last_part(recipe.data.name))
    about: dict[str, Any] = {}
    if row:
        kind = "imagefolder" if recipe.data.name.startswith("folder:") else data
        measured = dict(metric_type="accuracy", metric_name="top-1 accuracy, %", metric_value=row["top1"])
        where = dict(dataset_type=kind, dataset_name=data, dataset_split=evaluation["split"])
        about = dict(
            model_name=one_line(name), metrics=["accuracy"], eval_results=[EvalResult(TASK, **where, **measured)]
        )
    card = ModelCardData(
        license=model.pretrained_cfg.get("license"),
        library_name="timm",
        pipeline_tag=TASK,
        tags=[TASK, "timm", "riformer"],
        **about,
    )
    return str(card.to_yaml())


def _what_it_is(form: str, mixers: str, trained: nn.Module) -> str:
    paper = "[RIFormer](https://arxiv.org/abs/2304.05659)"
    if not isinstance(trained, MetaFormer):
        return f"An image classifier: a {code(mixers)}, trained like a {paper} or like one of its teachers."
    if mixers:
        return f"An image classifier that mixes tokens ({code(mixers)}): the network of a {paper} with token mixers."
    stand_ins = ", ".join(code(mixer) for mixer in dict.fromkeys(trained.mixers) if mixer != "identity")
    text = f"An image classifier without token mixers, a {paper}. "
    if not stand_ins:
        return f"{text}It was trained without anything in their place{', then folded' * (form == 'folded')}."
    if form == "training":
        return f"{text}This is the training form, with {stand_ins} in their place; `riformer fuse` merges that exactly."
    merged = f"{text}What was in their place in training ({stand_ins}) is merged into the norms"
    return f"{merged}, and the layer scales into norms and MLPs." if form == "folded" else f"{merged}."


def _facts(model: nn.Module, form: str, recipe: Recipe, data: dict[str, Any]) -> str:
    splits = {split: content["num_images"] for split, content in data.get("splits", {}).items()}
    sizes = ", ".join(f"{count:,} {split}" for split, count in splits.items()) or "number of images not recorded"
    _, height, width = preprocessing_of(model).input_size
    rows = {
        "architecture": f"{code(recipe.model.name)}, {form} form",
        "parameters": f"{count_params(model):,}",
        "multiply-accumulates": f"{count_macs(model, (height, width)):,} for an image of {height} × {width} pixels",
        "classes": str(model.num_classes),
        "data": f"{plain(_last_part(recipe.data.name))}: {sizes}",
    }
    return table(["", ""], [[name, value] for name, value in rows.items()], align="ll")


def _accuracy(form: str, rows: dict[str, dict[str, Any]], evaluation: dict[str, Any], recipe: Recipe) -> str:
    if not rows:
        return "Not measured: this run was not evaluated. `riformer eval RUN` does it."
    titles = {"teacher": "logit teacher", "student": "training form", "deploy": "deploy form"}
    own = _ROWS.get(form)
    cells = [
        [
            f"{titles[key]}, {code(row['name'])}" + " (this model)" * (key == own),
            *[f"{row[key]:.2f}" for key in ("top1", "top5")],
            f"{row['loss']:.4f}",
            *[f"{row[key]:,}" for key in ("params", "macs")],
        ]
        for key, row in rows.items()
    ]
    split = evaluation["split"]
    lines = [f"On the {evaluation['num_images']:,} images of the {split} split, one run with seed {recipe.seed}."]
    if split == "val":
        lines.append("The published epoch was chosen on the same images, which favours it.")
    if form == "folded":
        lines.append("The folded form itself was not measured; it differs from the deploy form by rounding only.")
    if "teacher" not in rows:
        lines.append("There is no logit teacher to compare with.")
    after = []
    if "deploy" in rows:
        after.append(f"The fuse changed logits by {evaluation['fuse']['max_rel']:.0e} of the largest at most.")
    speed = evaluation.get("speed", {})
    if form == "deploy" and "ratio" in speed:
        ratio, threads = speed["ratio"], evaluation["num_threads"]
        after.append(
            f"It ran at {ratio['median']:.2f} times its teacher's images per second ({ratio['low']:.2f} to "
            f"{ratio['high']:.2f} in {speed['rounds']} rounds), in {speed['precision']} with batches of "
            f"{speed['batch_size']}, on {evaluation['device']}, {threads} thread{'s' * (threads != 1)}."
        )
    heads = ["", "top-1 %", "top-5 %", "loss", "parameters", "multiply-accumulates"]
    return "\n\n".join([" ".join(lines), table(heads, cells, align="lrrrrr"), *([" ".join(after)] if after else [])])


def _training(run: Run, recipe: Recipe, data: dict[str, Any]) -> str:
    optim, distill = recipe.optim, recipe.distill
    epochs = [line for line in run.metrics() if line["kind"] == "epoch"]
    if not epochs:
        done = f"{optim.epochs} epochs were planned; how many were trained is not recorded"
    else:
        best = max(epochs, key=lambda line: line["val_top1"])  # of equal ones the first, which is the one in best/
        done = (
            f"{len(epochs)} of {optim.epochs} epochs were trained; of these epoch {best['epoch'] + 1} was kept, which "
            f"has the highest top-1 on val, {best['val_top1']:.2f} %"
        )
    lines = [
        f"Recipe {code(recipe.name)}, seed {recipe.seed}: {done}.",
        f"Optimiser: {plain(optim.name)} in {optim.precision}, learning rate up to {optim.lr:g}, weight decay "
        f"{optim.weight_decay:g}, batches of {optim.batch_size:,} images"
        + (f", moving average of the weights with decay {optim.ema_decay:g}" if optim.ema_decay else "")
        + ".",
        f"Augmentation: {_augmentation(recipe)}.",
        f"Loss: {_terms(recipe)}.",
    ]
    if recipe.model.start:
        lines.append(f"It started from the weights of {_teacher(recipe.model.start, recipe)}.")
    roles = {"logit teacher": distill.logit_teachers, "module teacher": (distill.module_teacher,)}
    teachers = [name for name in dict.fromkeys((*distill.logit_teachers, distill.module_teacher)) if name]
    for reference in teachers:
        as_what = " and ".join(role for role, names in roles.items() if reference in names)
        lines.append(f"{as_what.capitalize()}: {_teacher(reference, recipe)}.")
    if len(distill.logit_teachers) > 1:
        shares = ", ".join(f"{share:g}" for share in recipe.research.logit_teacher_weights) or "equal"
        lines.append(f"The logit teachers' probabilities were averaged, with shares: {shares}.")
    if distill.cache_augmentations:
        kept = (
            f"its {recipe.research.cache_top_k} largest probabilities" if recipe.research.cache_top_k else "all of it"
        )
        lines.append(
            f"Each image had {distill.cache_augmentations} augmentations, taken in turns by the epochs; of the logit "
            f"teacher's output on each of them, {kept} was kept and learned."
        )
    if not teachers:
        lines.append("There was no teacher.")
    if distill.start_from_teacher:
        lines.append("The student started from the module teacher's weights, without those of its token mixers.")
    if data.get("skipped"):
        lines.append(f"Images left out because they could not be read: {len(data['skipped']):,}.")
    return "\n".join(f"- {line}" for line in lines)


def _augmentation(recipe: Recipe) -> str:
    """The settings that are on, by name."""
    values = {setting.name: getattr(recipe.augment, setting.name) for setting in fields(recipe.augment)}
    values["crop_scale"] = " to ".join(f"{share:g}" for share in recipe.augment.crop_scale)
    return ", ".join(f"{name.replace('_', ' ')} {plain(str(value))}" for name, value in values.items() if value)


def _terms(recipe: Recipe) -> str:
    """The weighted terms of the loss."""
    distill = recipe.distill
    weights = {term: weight for term, weight in distill.weights.items() if weight}
    text = " + ".join(f"{weight:g} × {term}" for term, weight in weights.items())
    if "label" in weights and recipe.optim.label_smoothing:
        text += f", labels smoothed by {recipe.optim.label_smoothing:g}"
    if "soft" in weights:
        text += f", at temperature {distill.temperature:g}"
    if distill.schedule == "constant" or not set(weights) & set(IMITATION):
        return text
    how = {
        "cosine": "going to 0 by a cosine",
        "first_phase": f"for the first {recipe.research.phase:.0%} of training only",
    }
    return f"{text}; {', '.join(term for term in weights if term in IMITATION)} {how[distill.schedule]}"


def _teacher(reference: str, recipe: Recipe) -> str:
    if reference != "own":
        return code(_last_part(reference))
    teacher = recipe.teacher
    what = f"a {code(teacher.name)}" if teacher.name else f"the same sizes with {code(teacher.mixer)} as token mixer"
    return f"trained first, on labels, for {teacher.epochs} epochs: {what}"


def _preprocessing(model: nn.Module) -> str:
    used = preprocessing_of(model)
    channels, height, width = used.input_size
    share = f"{used.crop_pct:.4g} of {'the side' if height == width else 'each side'}"
    crop = _CROPS.get(used.crop_mode, _CROPS["center"]).format(interpolation=used.interpolation, share=share)
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (used.mean, used.std))
    values = "grey" if channels == 1 else "RGB"
    return (
        f"{values} values in 0..1; {crop} {channels} × {height} × {width}; minus mean ({mean}), divided by std ({std})"
        f". All of this is in config.json, where timm reads it."
    )


def _classes(model: nn.Module) -> str:
    names = class_names(model)
    text = f"{len(names):,}: {', '.join(plain(name) for name in names[:NUM_CLASSES_SHOWN])}"
    more = len(names) - NUM_CLASSES_SHOWN
    return f"{text}, and {more:,} more, which are in config.json under `label_names`." if more > 0 else f"{text}."


def _use(repository: str) -> str:
    where = "" if repository else "FOLDER is the folder of this file.\n\n"
    return where + _USE.format(reference=json.dumps(f"hf-hub:{repository}" if repository else "local-dir:FOLDER"))


def _versions(run: Run, evaluation: dict[str, Any]) -> str:
    """A line for the training and one for the evaluation, which may be from another day and machine."""
    lines = []
    for title, record in (("Trained", run.read("env.json") or {}), ("Evaluated", evaluation)):
        if record:
            names = ("riformer", "torch", "torchvision", "timm", "python")
            versions = ", ".join(f"{name} {record[name]}" for name in names if name in record)
            lines.append(f"- {title} on {record['date'][:10]} with {versions}, on {record['device']}.")
    return "\n".join(lines) or "Not recorded."


def _last_part(reference: str) -> str:
    """The name of a data set or a teacher; of a path only the last component, which reveals nothing of the machine."""
    name, at, file = reference.partition("@")
    if name.startswith(("timm:", "hf-hub:")):
        return f"{name}{at}{PureWindowsPath(file).name}"
    return PureWindowsPath(reference.removeprefix("folder:")).name.strip(".") or "unnamed folder"
