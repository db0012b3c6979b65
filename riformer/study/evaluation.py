"""What a finished run is worth: accuracy before and after the fuse, parity, size, speed beside its teacher."""

import base64
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from riformer.config import DataConfig
from riformer.data.batches import eval_batches
from riformer.data.dataset import Dataset, ImageList, open_dataset
from riformer.data.leaks import open_for_evaluation
from riformer.data.workers import dead_workers_explained
from riformer.distill.teachers import class_names, describe, known_names
from riformer.machine import environment
from riformer.measure.cost import count_macs, count_params
from riformer.model.fuse import deploy_form
from riformer.model.metaformer import MetaFormer
from riformer.model.preprocessing import preprocessing_of
from riformer.model.weights import load
from riformer.runtime.latency import Spread, images_per_s
from riformer.runtime.parity import compare, full_float32
from riformer.train.build import build_teachers
from riformer.train.evaluate import Evaluation, evaluate
from riformer.train.inputs import wrong_order
from riformer.train.run import Run

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
NUM_SAMPLES = 30
MAX_KEPT_BYTES = 2**28  # an evaluation goes over the images six times; a smaller split is read once
SPEED_ROUNDS, SPEED_SECONDS = 15, 0.02  # how often the models take turns, and the length of a turn


def evaluate_run(path: str | Path) -> dict[str, Any]:
    """What `evaluation` returns, written into the run folder as evaluation.json too."""
    result = evaluation(path)
    Run(path).write("evaluation.json", result)
    return result


@dead_workers_explained()
@full_float32()
def evaluation(path: str | Path) -> dict[str, Any]:
    """Accuracy, parity, size and speed of the best model of a run, and of its teacher.

    The split is test where the data has one, otherwise val, on which the best model was also chosen. All in float32,
    without the TF32 that GPUs else use for convolutions. The teacher is the logit teacher.

    Raises:
        ValueError: no run there, or nothing trained yet; logits that are not finite.
    """
    run = Run(path)
    recipe, best = run.recipe(), run.best()
    data = open_dataset(recipe.data, run.read("data.json"))
    split = _chosen_split(data, "")
    images, num_classes = data.splits[split], len(data.classes)
    logger.info("evaluating on %s of %s, %d images", split, data.name, len(images))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    student = load(best).to(device)
    preprocessing, num_workers = preprocessing_of(student), recipe.data.num_workers

    def read() -> Iterable[tuple[Tensor, Tensor]]:
        return eval_batches(images, preprocessing, BATCH_SIZE, num_workers)

    is_small = 4 * len(images) * prod(preprocessing.input_size) <= MAX_KEPT_BYTES
    kept = list(read()) if is_small else []

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        return kept or read()

    models = {"student": student, "deploy": deploy_form(student)}
    distill = replace(recipe.distill, module_teacher="", compile_teachers=False)
    teacher, _ = build_teachers(replace(recipe, distill=distill), run, data.classes, device)
    if teacher:  # which sees the images at its own size, under its own normalisation
        models = {"teacher": teacher, **models}

    rows: dict[str, dict[str, Any]] = {}
    results: dict[str, Evaluation] = {}
    for name, model in models.items():
        results[name] = _finite(evaluate(model, batches(), num_classes), name)
        rows[name] = {
            "name": describe(model),
            **{key: getattr(results[name], key) for key in ("top1", "top5", "loss")},
            "params": count_params(model),
            "macs": count_macs(model, recipe.data.img_size),
        }

    example = next(iter(batches()))[0].to(device)
    rates = images_per_s(models, example, SPEED_ROUNDS, SPEED_SECONDS)
    for name, values in rates.items():
        rows[name]["images_per_s"] = asdict(Spread.of(values))
    speed: dict[str, Any] = {
        "batch_size": len(example),
        "rounds": len(rates["deploy"]),
        "img_size": recipe.data.img_size,
        "precision": "fp32",
    }
    if "teacher" in models:
        pairs = zip(rates["deploy"], rates["teacher"], strict=True)
        speed["ratio"] = asdict(Spread.of([fused / own for fused, own in pairs]))

    parity = compare(student, models["deploy"], (x.to(device) for x, _ in batches()))
    return {
        **environment(world_size=1),
        "split": split,
        "num_images": len(images),
        "models": rows,
        "fuse": asdict(parity),
        "speed": speed,
        "confusion": results["deploy"].confusion,
        "samples": _samples(models["deploy"], images, batches()),
    }


@dead_workers_explained()
@full_float32()
def evaluate_model(
    model: nn.Module,
    data: DataConfig,
    split: str = "",
    seed: int | None = None,
    record: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Evaluation]:
    """Accuracy of any saved model on a data set, before and after the fuse, with the model's own preprocessing.

    Args:
        model: as `load` gives it, or what `riformer.optimize` returns.
        data: the data set.
        split: see `open_split`, as for the others.
        seed: of the split of a folder, instead of `data.split_seed`.
        record: the data.json of the run whose split it is.
        classes: class names of a model that carries none, in the order of its outputs.

    Raises:
        ValueError: the data has no such split, or a class that the model does not know; the model's outputs seem to
            mean the classes in another order; its logits are not finite.
    """
    opened = open_split(model, data, split, seed, record, classes)
    forms = {"as saved": model, "fused": deploy_form(model)} if isinstance(model, MetaFormer) else {"as saved": model}
    results = {form: opened.evaluate(m, form) for form, m in forms.items()}
    measured = results["as saved"]
    if not opened.known and (problem := wrong_order(measured.confusion, opened.classes, measured.num_images)):
        raise ValueError(f"the model carries no class names, and {problem}. State its classes with --classes FILE")
    return results


@dataclass(frozen=True)
class OpenSplit:
    """Images on which a model can be evaluated, and what their classes are to it.

    Attributes:
        images: of the split.
        classes: of the data set.
        own_index: the model's output for each class of the data set.
        num_outputs: of the model.
        known: whether the model's classes are known by name.
        num_workers: that read images.
    """

    images: ImageList
    classes: tuple[str, ...]
    own_index: Tensor
    num_outputs: int
    known: bool
    num_workers: int

    def evaluate(self, model: nn.Module, name: str) -> Evaluation:
        """What the model, or another one with the same outputs, does on the images, with its own preprocessing.

        Raises:
            ValueError: logits that are not finite; the message has the name.
        """
        batches = eval_batches(self.images, preprocessing_of(model), BATCH_SIZE, self.num_workers)
        renamed = ((images, self.own_index[labels]) for images, labels in batches)
        return _finite(evaluate(model, renamed, self.num_outputs), name)


def open_split(
    model: nn.Module,
    data: DataConfig,
    split: str = "",
    seed: int | None = None,
    record: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> OpenSplit:
    """Images of a data set, for the evaluation of a model.

    The data's classes are matched with the model's by name; those of a model without class names by their order. A
    folder without splits on which the model was trained is split as in that training.

    Args:
        model: as `load` gives it.
        data: the data set.
        split: train, val or test; empty takes test, else val, and all images of a folder without splits, unless the
            model was trained on them.
        seed: of the split of a folder, instead of `data.split_seed`.
        record: the data.json of the run whose split it is.
        classes: class names of a model that carries none, in the order of its outputs.

    Raises:
        ValueError: the data has no such split, or a class that the model does not know.
    """
    data = replace(data, img_size=preprocessing_of(model).input_size[-1])  # of which only glyphs take notice
    if seed is not None:
        data = replace(data, split_seed=seed)
    train_data = model.pretrained_cfg.get("train_data")
    dataset = open_dataset(data, record) if record else open_for_evaluation(data, split, train_data)
    split = _chosen_split(dataset, split)
    dataset.log()
    logger.info("evaluating on %s, %d images", split, len(dataset.splits[split]))
    if classes and class_names(model):
        raise ValueError("class names are stated, but the model carries its own: leave --classes out")
    known = known_names(model, dataset.classes, classes)
    names = known or list(dataset.classes)
    if len(names) != model.num_classes:
        carried = (
            f"classes, but {len(known)} names" if known else f"classes without names, but the data has {len(names)}"
        )
        raise ValueError(f"the model has {model.num_classes} {carried}; state its classes with --classes FILE")
    if unknown := sorted(set(dataset.classes) - set(names)):
        raise ValueError(f"the model does not know the classes {unknown[:5]}; it knows {', '.join(names[:20])}")
    own_index = torch.tensor([names.index(name) for name in dataset.classes])
    return OpenSplit(dataset.splits[split], dataset.classes, own_index, len(names), bool(known), data.num_workers)


def _finite(result: Evaluation, name: str) -> Evaluation:
    """The result.

    Raises:
        ValueError: some logits were not finite, so that its accuracy says nothing.
    """
    if not result.finite:
        raise ValueError(
            f"{name}: the logits of {result.num_nonfinite} of {result.num_images} images are not finite; the weights "
            f"are damaged"
        )
    return result


def _chosen_split(data: Dataset, split: str) -> str:
    split = split or ("test" if "test" in data.splits else "val")
    if split not in data.splits:
        raise ValueError(f"{data.name} has no split {split!r}; it has {sorted(data.splits)}")
    return split


@torch.no_grad()
def _samples(model: nn.Module, images: ImageList, batches: Iterable[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Some images with their predictions: up to a third wrong ones, the rest right, both spread over the split."""
    device = next(model.parameters()).device
    best = [model(x.to(device)).softmax(1).max(dim=1) for x, _ in batches]
    probability, prediction = (torch.cat(values).cpu() for values in zip(*best, strict=True))
    is_right = prediction == torch.tensor(images.labels)
    wrong = _spread_out((~is_right).nonzero().flatten(), NUM_SAMPLES // 3)
    chosen = wrong + _spread_out(is_right.nonzero().flatten(), NUM_SAMPLES - len(wrong))
    return [
        {
            "name": images.names[i],
            "label": images.labels[i],
            "prediction": int(prediction[i]),
            "probability": float(probability[i]),
            "png": _thumbnail(images.read(i)),
        }
        for i in chosen
    ]


def _spread_out(indices: Tensor, count: int) -> list[int]:
    positions = torch.linspace(0, len(indices) - 1, min(count, len(indices))).round().long()
    return indices[positions].tolist()


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((112, 112))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
