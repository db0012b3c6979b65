"""What a finished run is worth: accuracy before and after the fuse, parity, size, speed beside its teacher."""

import base64
import io
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from riformer.config import DataConfig
from riformer.data.batches import eval_batches
from riformer.data.dataset import Dataset, ImageList, open_dataset
from riformer.data.workers import dead_workers_explained
from riformer.distill.teachers import describe
from riformer.machine import environment
from riformer.measure.cost import count_macs, count_params
from riformer.measure.latency import Spread, images_per_s
from riformer.model.fuse import deploy_form
from riformer.model.metaformer import MetaFormer
from riformer.model.weights import load
from riformer.preprocess import Preprocessing
from riformer.runtime.parity import compare, full_float32
from riformer.train.build import build_teachers
from riformer.train.evaluate import Evaluation, evaluate
from riformer.train.run import Run

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
NUM_SAMPLES = 30


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
        ValueError: no run there, or nothing trained yet.
    """
    run = Run(path)
    recipe, best = run.recipe(), run.best()
    data = open_dataset(recipe.data, record=run.read("data.json"))
    split = _chosen_split(data, "")
    images, num_classes = data.splits[split], len(data.classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    student = load(best).to(device)
    preprocessing, num_workers = Preprocessing.of_model(student), recipe.data.num_workers

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        return eval_batches(images, preprocessing, BATCH_SIZE, num_workers)

    models = {"student": student, "deploy": deploy_form(student)}
    distill = replace(recipe.distill, module_teacher="", compile_teachers=False)
    teacher, _ = build_teachers(replace(recipe, distill=distill), run, data.classes, device)
    if teacher:  # which sees the images at its own size, under its own normalisation
        models = {"teacher": teacher, **models}

    rows: dict[str, dict[str, Any]] = {}
    results: dict[str, Evaluation] = {}
    for name, model in models.items():
        results[name] = evaluate(model, batches(), num_classes)
        rows[name] = {
            "name": describe(model),
            **{key: getattr(results[name], key) for key in ("top1", "top5", "loss")},
            "params": count_params(model),
            "macs": count_macs(model, recipe.data.img_size),
        }

    example = next(iter(batches()))[0].to(device)
    rates = images_per_s(models, example)
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
    model: nn.Module, data: DataConfig, split: str = "", record: dict[str, Any] | None = None
) -> dict[str, Evaluation]:
    """Accuracy of any saved model on a data set, before and after the fuse, with the model's own preprocessing.

    The data's classes are found among the model's by name. `split` is train, val or test; empty takes test, else val,
    and of a folder that has no splits all images; but of the folder that the model was trained on, what was held out.
    `record` is that of the run whose split it is, where it is a run's.

    Raises:
        ValueError: the data has no such split, or a class that the model does not know.
    """
    config = model.pretrained_cfg
    preprocessing = Preprocessing.of_model(model)
    data = replace(data, img_size=preprocessing.input_size[-1])  # of which only glyphs take notice
    dataset = _trained_on(model, data) if record is None and not split else None
    dataset = dataset or open_dataset(data, record, whole=not split and record is None)
    split = _chosen_split(dataset, split)
    names = list(config.get("label_names") or dataset.classes)
    if len(names) != model.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes without names, but the data has {len(names)}")
    if unknown := sorted(set(dataset.classes) - set(names)):
        raise ValueError(f"the model does not know the classes {unknown}; it knows {names}")
    own_index = torch.tensor([names.index(name) for name in dataset.classes])

    def batches() -> Any:
        images = eval_batches(dataset.splits[split], preprocessing, BATCH_SIZE, data.num_workers)
        return ((x, own_index[y]) for x, y in images)

    forms = {"as saved": model, "fused": deploy_form(model)} if isinstance(model, MetaFormer) else {"as saved": model}
    return {form: evaluate(m, batches(), len(names)) for form, m in forms.items()}


def _trained_on(model: nn.Module, data: DataConfig) -> Dataset | None:
    """The data split as for the model's training, if it is what the model was trained on; its val was held out then."""
    trained_on = model.pretrained_cfg.get("train_data") or {}
    if "split_seed" not in trained_on or not data.name.startswith("folder:"):
        return None
    split = {name: trained_on[name] for name in ("val_fraction", "split_seed")}
    dataset = open_dataset(replace(data, **split))
    if dataset.splits["train"].sha256 != trained_on["splits"].get("train"):
        return None
    logger.info("%s: the model was trained on a part of it; evaluated on the part that was held out", data.name)
    return dataset


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
