"""The verbs export and layout."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from torch import nn

from riformer.cli.options import console, errors, verb_parser
from riformer.config import DataConfig
from riformer.data.dataset import open_dataset
from riformer.data.splits import hash_ranks
from riformer.export.artifact import Samples, combinations, export
from riformer.export.graph import can_collapse
from riformer.export.int8 import Limits
from riformer.export.repository import write_repository
from riformer.export.targets import EXPORTERS
from riformer.model.preprocessing import preprocessing_of
from riformer.model.weights import load
from riformer.runtime.runner import AsModule
from riformer.study.evaluation import open_split
from riformer.train.run import Run
from riformer_runtime.artifact import Artifact
from riformer_runtime.cli.check import table_of_payloads
from riformer_runtime.engines import PayloadRunner

NUM_PROBE, NUM_CALIBRATION = 16, 256  # images of the training split


def export_verb(argv: list[str]) -> int:
    """Writes a run or model for other engines: one folder with everything that is needed to use it.

    The network is fused and folded. Each payload is then run in its own engine and compared with the training form on
    training images, in several batch sizes and at another image size; one that differs is an error, and nothing is
    written. What was exported runs without PyTorch: `riformer predict OUT images/`, `riformer check OUT`. OUT.onnx as
    the destination is a single file, with class names and preprocessing inside.
    """
    argv = [re.sub(r"^--data(?==|$)", "--data.name", argument) for argument in argv]
    parser = verb_parser("export", export_verb)
    parser.add_argument("source", type=str, help="run folder, model folder or weights file")
    parser.add_argument("destination", type=str, help="folder, or FILE.onnx for the target onnx alone")
    to_help = f"targets, from {', '.join(EXPORTERS)} (default: native and onnx; onnx for other networks and FILE.onnx)"
    parser.add_argument("--to", type=list[str], default=[], help=to_help)
    precision_help = "fp32, bf16x3, bf16, fp16, int8; a target that lacks one has the others"
    parser.add_argument("--precision", type=list[str], default=["fp32"], help=precision_help)
    inside_help = (
        "preprocessing inside the graph: normalise (it takes values in 0..1), or resize (and images of any size, one "
        "at a time)"
    )
    parser.add_argument("--inside", type=Literal["", "normalise", "resize"], default="", help=inside_help)
    drop_help = "points of top-1 that int8 may lose on the validation images"
    parser.add_argument("--max-drop", type=float, default=Limits.max_drop, help=drop_help)
    speedup_help = "how many times as fast as the engine's best floating point int8 has to be, measured here"
    parser.add_argument("--min-speedup", type=float, default=Limits.min_speedup, help=speedup_help)
    for name in ("name", "root", "val_fraction", "split_seed", "on_bad", "num_workers"):
        default = "" if name == "name" else getattr(DataConfig(), name)
        text = "data of a model that is no run: for the comparison, and for int8" if name == "name" else "see train"
        parser.add_argument(f"--data.{name}", type=get_type_hints(DataConfig)[name], default=default, help=text)
    options = parser.parse_args(argv)
    model = load(options.source)
    one_file = options.destination.endswith(".onnx")
    targets = options.to or (["onnx"] if one_file or not can_collapse(model) else ["native", "onnx"])
    combinations(model, targets, options.precision, options.inside)  # before data are read
    samples, source = _samples(options, model)
    with errors.activity(f"exporting {options.source}") as show:
        exported = export(
            model, options.destination, samples, targets, options.precision, options.inside,
            Limits(options.max_drop, options.min_speedup), source, show,
        )  # fmt: skip
    console.print(table_of_payloads(exported.artifact))
    console.print(f"compared on {samples.name}; it runs without PyTorch: riformer predict {options.destination} IMAGES")
    for target, reason in exported.refused.items():
        errors.print(f"{target} int8 was not written: {reason}", soft_wrap=True)
    return 0


def layout_verb(argv: list[str]) -> int:
    """Writes what was exported into a model repository of Triton Inference Server or OpenVINO Model Server.

    The model becomes the next version in NAME/1, NAME/2 and so on, with the server's configuration, the class names and
    the manifest. Of several payloads that the server runs, the fastest is taken.
    """
    parser = verb_parser("layout", layout_verb)
    parser.add_argument("artifact", type=str, help="what riformer export wrote: a folder or an .onnx file")
    parser.add_argument("repository", type=str, help="folder of the repository; other models in it stay")
    parser.add_argument("--server", type=Literal["triton", "openvino"], default="triton", help="whose layout")
    parser.add_argument("--name", type=str, default="", help="of the model (default: the artefact's name)")
    options = parser.parse_args(argv)
    artifact = Artifact(options.artifact)
    name = options.name or Path(options.artifact).resolve().stem
    version = write_repository(artifact, options.repository, options.server, name)
    console.print(f"{version}: {' '.join(sorted(file.name for file in version.iterdir()))}", soft_wrap=True)
    return 0


def _samples(options: Any, model: nn.Module) -> tuple[Samples, dict[str, Any]]:
    """Images of the training split, and what is recorded of the source."""
    path = Path(options.source)
    is_run = (path / "recipe.json").is_file()
    source: dict[str, Any] = {"train_data": getattr(model, "pretrained_cfg", {}).get("train_data")}
    record = None
    if options.data.name:
        data = DataConfig(**vars(options.data))
    elif is_run:
        data, record = Run(path).recipe().data, Run(path).read("data.json")
        source["run"] = path.resolve().name
    else:
        data = DataConfig(name="digits")
    data = replace(data, img_size=preprocessing_of(model).input_size[-1])
    dataset = open_dataset(data, record)
    if "int8" not in options.precision:
        dataset.log()
    train = dataset.splits["train"]
    ranks = hash_ranks(train.names, train.labels)
    wanted = NUM_CALIBRATION if "int8" in options.precision else NUM_PROBE
    chosen = sorted(range(len(train)), key=lambda i: (ranks[i], train.labels[i]))[:wanted]

    samples = Samples(dataset.name, (train.read(i) for i in chosen))
    if "int8" not in options.precision or not (is_run or options.data.name):
        return samples, source
    validation = open_split(model, data, "val", record=record)

    def accuracy(runner: PayloadRunner) -> float:
        return validation.evaluate(AsModule(runner), str(runner.payload)).top1

    return replace(samples, accuracy=accuracy), source
