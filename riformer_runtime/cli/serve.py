"""The verb serve: models over HTTP, with a page to try them."""

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from riformer_runtime.artifact import is_artifact
from riformer_runtime.cli.options import OpenModel, console, errors, verb_parser
from riformer_runtime.cli.predict import open_any

EXAMPLES = (
    ("riformer serve exported/", "a page to try it at http://127.0.0.1:8000"),
    ("riformer serve student=exported/ teacher=runs/photos-seed0/teacher", "two models, side by side on the page"),
    ("curl -F files=@cat.jpg http://127.0.0.1:8000/predict", "the classes of an image"),
    (
        "RIFORMER_API_KEY=... riformer serve exported/ --host 0.0.0.0",
        "for other machines, with a key that is asked for",
    ),
)
KEY_VARIABLE = "RIFORMER_API_KEY"
MAX_SAMPLES = 8
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ABOUT = """Concurrent requests are computed together. An image waits for others at most --max-wait-ms, and under load
for the batch before its own. What a request may cost is limited; sizes of images are read from their headers before
anything is decoded.

Ctrl-C or SIGTERM stops: what was accepted is still answered, what comes then is refused with 503. A second one ends the
process at once.

The samples on the page are those in the artefact, which are images of the training data: whoever may use the server
sees them.

The description of the API is at /docs, counters for Prometheus are at /metrics, and /health and /ready are for load
balancers."""


def serve_verb(argv: list[str], open_model: OpenModel) -> int:
    """Answers HTTP requests with the classes of images, and has a page to try it.

    POST /predict takes images as files of a form or as base64 in JSON. Several models are served at once, each under
    its name: NAME=MODEL, or the name of its file or folder. Requests name one; the first is the default.
    """
    parser = verb_parser("serve", serve_verb, EXAMPLES, ABOUT)
    model_help = "what riformer export wrote (a folder or an .onnx file); or a run folder, model folder or weights file"
    parser.add_argument("models", type=str, nargs="+", help=f"[NAME=]MODEL: {model_help}")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free")
    key_help = f"file with the key that requests have to show; or the variable {KEY_VARIABLE} (default: no key)"
    parser.add_argument("--api-key-file", type=str, default="", help=key_help)
    parser.add_argument("--batch-size", type=int, default=16, help="most images computed at once")
    wait_help = "longest time that an image waits for others to be computed with"
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help=wait_help)
    parser.add_argument("--engine", type=str, default="auto", help="what computes, see predict (default: the fastest)")
    parser.add_argument("--precision", type=str, default="", help="of an artefact that has several, see predict")
    parser.add_argument("--max-mib", type=float, default=32.0, help="largest request")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="largest image")
    parser.add_argument("--max-files", type=int, default=16, help="images in a request")
    parser.add_argument("--max-requests", type=int, default=256, help="requests in work at once; more are answered 503")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_mib", "max_pixels", "max_files", "max_requests"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name):g}; it must be more than 0")
    if not 0 <= options.max_wait_ms <= 10_000:
        parser.error(f"--max-wait-ms is {options.max_wait_ms:g}; it must be between 0 and 10000")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; it must be between 0 and 65535")
    key = api_key(options.api_key_file)
    paths = named(options.models)
    try:
        from riformer_runtime.serve.app import make_app
        from riformer_runtime.serve.limits import Gate, Limits
        from riformer_runtime.serve.samples import samples
        from riformer_runtime.serve.server import listen, serve
        from riformer_runtime.serve.service import Model, warm_up
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("riformer"):
            raise
        raise RuntimeError(f"serving needs {error.name}: pip install 'riformer[serve]'") from error
    limits = Limits(int(options.max_mib * 2**20), options.max_pixels, options.max_files, options.max_requests)
    with listen(options.host, options.port) as listener:
        models = []
        for name, path in paths.items():
            runner, _ = open_any(path, open_model, options.engine, options.precision)
            models.append(Model(name, runner, samples(path, MAX_SAMPLES) if is_artifact(path) else ()))
        warm_up(models)
        gate = Gate(limits)
        app = make_app(models, gate, key, options.batch_size, options.max_wait_ms / 1e3)
        _say(models, listener, options, bool(key))
        serve(app, gate, listener)
    errors.print(f"stopped: {gate.answered:,} requests answered, {gate.refused:,} refused", soft_wrap=True)
    return 0


def api_key(file: str) -> str:
    """The key in a file or in the environment; "" for none.

    Raises:
        ValueError: the file or the variable is there and has no key, or one that no header can carry.
        OSError: the file cannot be read.
    """
    source = file or KEY_VARIABLE
    text = Path(file).read_text(encoding="utf-8", errors="replace") if file else os.environ.get(KEY_VARIABLE)
    if text is None:
        return ""
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{source} has no key: one word of ASCII characters")
    return key


def named(given: Sequence[str]) -> dict[str, str]:
    """Paths of models by the names that they are served under.

    Raises:
        ValueError: a name that is no plain word, or that two models have.
    """
    paths: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            name, path = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).resolve().stem).lstrip("._-") or "model", text
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} in {text!r} is no name of a model: letters, digits, dots and dashes")
        if name in paths:
            raise ValueError(f"two models have the name {name}; name them: one={paths[name]} other={path}")
        paths[name] = path
    return paths


def _say(models: Sequence[Any], listener: socket.socket, options: Any, has_key: bool) -> None:
    """Prints what is served, where, and within which limits."""
    table = Table("model", "engine", "precision", "classes", "input")
    for model in models:
        runner = model.runner
        engine = " ".join(filter(None, (runner.engine, runner.detail)))
        size = " x ".join(map(str, runner.manifest.preprocessing.input_size[1:]))
        table.add_row(model.name, engine, runner.precision, f"{runner.manifest.num_classes:,}", size)
    errors.print(table)
    host, port = listener.getsockname()[:2]
    errors.print(
        f"batches of up to {options.batch_size} images; an image waits for others at most {options.max_wait_ms:g} ms\n"
        f"limits: {options.max_mib:g} MiB and {options.max_files} images a request, {options.max_pixels:,} pixels an "
        f"image, {options.max_requests} requests in work",
        soft_wrap=True,
    )
    if not has_key and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        errors.print(f"no key is asked for, and other machines can reach this: set {KEY_VARIABLE}", soft_wrap=True)
    errors.print("Ctrl-C stops, and answers what was accepted before", soft_wrap=True)
    console.print(f"http://{f'[{host}]' if ':' in host else host}:{port}", soft_wrap=True)
