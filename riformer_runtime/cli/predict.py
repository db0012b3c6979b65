"""The verb predict: labels images with an artefact, a run or a model."""

import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Column, Table

from riformer_runtime.artifact import is_artifact
from riformer_runtime.cli.options import OpenModel, console, errors, verb_parser
from riformer_runtime.engines import Runner, describe, open_runner
from riformer_runtime.predict import Prediction, predict
from riformer_runtime.walk import find_images

EXAMPLES = (
    ("riformer predict exported/ photos/ --top-k 3", "the three most probable classes of each image"),
    ("riformer predict exported/fp32.onnx cat.jpg --json", "a line of JSON for each image"),
    ("riformer predict runs/photos-seed0 photos/ --engine eager", "a run, in PyTorch"),
)
MIN_IMAGES_TO_COMPILE = 200


def predict_verb(argv: list[str], open_model: OpenModel) -> int:
    """Labels images with an exported artefact, a run or a saved model, on the fastest engine that is installed.

    Images that cannot be read, and paths that are not there, are named, the others still labelled; the exit code is
    then 1.
    """
    parser = verb_parser("predict", predict_verb, EXAMPLES)
    model_help = "what riformer export wrote (a folder or an .onnx file); or a run folder, model folder or weights file"
    parser.add_argument("model", type=str, help=model_help)
    parser.add_argument(
        "images", type=str, nargs="+", help="image files, folders, or - for one image on standard input"
    )
    parser.add_argument("--top-k", type=int, default=1, help="classes to name for each image, the most probable first")
    parser.add_argument("--json", action="store_true", help="a JSON line for each image instead of a table")
    parser.add_argument("--batch-size", type=int, default=32, help="images computed at once")
    engine_help = (
        "what computes: native, onnxruntime, openvino and so on of an artefact; eager, native, triton or portable of a "
        "run or model (default: the fastest)"
    )
    parser.add_argument("--engine", type=str, default="auto", help=engine_help)
    precision_help = "of an artefact that has several: fp32, bf16x3, bf16, fp16 or int8 (default: the fastest)"
    parser.add_argument("--precision", type=str, default="", help=precision_help)
    options = parser.parse_args(argv)
    piped = options.images == ["-"]
    images: list[Path | io.BytesIO] = [io.BytesIO(sys.stdin.buffer.read())] if piped else []
    files, problems = find_images([] if piped else options.images)
    images += files
    for problem in problems:
        errors.print(problem, soft_wrap=True)
    runner = chosen_runner(options.model, open_model, options.engine, options.precision, len(images))
    return _show(runner, images, options, failed=bool(problems))


def chosen_runner(
    path: str, open_model: OpenModel, engine: str = "auto", precision: str = "", num_images: int | None = None
) -> Runner:
    """The runner of an artefact, a run or a model; its engine is printed. See `open_any`."""
    runner, reason = open_any(path, open_model, engine, precision, num_images)
    errors.print(f"engine: {describe(runner)}" + (f" ({reason})" if reason else ""), soft_wrap=True)
    return runner


def open_any(
    path: str, open_model: OpenModel, engine: str = "auto", precision: str = "", num_images: int | None = None
) -> tuple[Runner, str]:
    """The runner of an artefact, a run or a model, and why no faster one.

    Args:
        path: of the artefact, run or model.
        open_model: opens a run or model.
        engine: "auto", or the one engine to take.
        precision: of an artefact.
        num_images: how many images there are to compute; None for many. For few no compiler is run.

    Raises:
        ValueError: nothing of that kind there, or not for this engine and precision.
        RuntimeError: no engine can run it here.
    """
    with errors.activity("preparing the network; the native one is compiled once on each machine"):
        if is_artifact(path):
            many = num_images is None or num_images >= MIN_IMAGES_TO_COMPILE
            return open_runner(path, engine, precision, compile_native=many), ""
        if precision:
            raise ValueError(f"--precision chooses among what an artefact has, and {path} is none")
        return open_model(path, engine, num_images)


def _show(runner: Runner, images: list[Any], options: Any, failed: bool) -> int:
    """Prints the prediction for each image, and returns the exit code."""
    predictions = predict(runner, images, options.top_k, options.batch_size)
    headings = [f"class {i + 1}" if options.top_k > 1 else "class" for i in range(options.top_k)]
    table = Table(Column("image", overflow="fold"), *headings)
    quiet = options.json or not errors.is_terminal
    try:
        for prediction in track(predictions, total=len(images), console=errors, transient=True, disable=quiet):
            failed |= bool(prediction.error)
            if options.json:
                console.out(json.dumps(_as_json(prediction)), highlight=False)
            elif prediction.error:
                errors.print(prediction.error, soft_wrap=True)
            else:
                table.add_row(prediction.path, *[f"{name} {share:.1%}" for name, share in prediction.classes])
    finally:  # with what was labelled before an error or Ctrl-C
        if table.rows:
            console.print(table)
    return int(failed)


def _as_json(prediction: Prediction) -> dict[str, Any]:
    if prediction.error:
        return {"path": prediction.path, "error": prediction.error}
    classes = [{"class": name, "probability": probability} for name, probability in prediction.classes]
    return {"path": prediction.path, "classes": classes}
