"""The verb serve: predictions over HTTP, and a page to try them."""

import os
import re
from pathlib import Path

from rich.table import Table

from riformer_runtime.artifact import Artifact, is_artifact
from riformer_runtime.cli.options import OpenModel, console, errors, verb_parser
from riformer_runtime.cli.predict import chosen_runner

EXAMPLES = (
    ("riformer serve exported/", "a page at http://127.0.0.1:8000, predictions at /predict"),
    ("riformer serve student=exported/ teacher=runs/photos-seed0/teacher", "two models side by side"),
    ("riformer serve exported/ --host 0.0.0.0 --api-key-file key.txt", "for other machines, with a key"),
)


def serve_verb(argv: list[str], open_model: OpenModel) -> int:
    """Answers requests for predictions over HTTP, and shows a page to try the models on.

    POST /predict takes images as files of a form or as base64 in JSON; GET /docs describes it. Images of requests that
    come at the same time are computed at once. SIGTERM and Ctrl-C stop it when all accepted requests are answered. It
    answers this machine alone unless --host says otherwise; put a proxy with TLS in front of it on a network.
    """
    parser = verb_parser("serve", serve_verb, EXAMPLES)
    models_help = "what riformer export wrote, a run or a model, each as PATH or NAME=PATH; the first is the default"
    parser.add_argument("models", type=str, nargs="+", help=models_help)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any that is free")
    parser.add_argument("--api-key-file", type=str, default="", help="file with the key that requests must carry")
    parser.add_argument("--engine", type=str, default="auto", help="as for predict (default: the fastest)")
    parser.add_argument("--precision", type=str, default="", help="as for predict (default: the fastest)")
    parser.add_argument("--batch-size", type=int, default=16, help="most images computed at once")
    parser.add_argument("--max-wait-ms", type=float, default=2.0, help="longest time that an image waits for others")
    parser.add_argument("--max-mib", type=float, default=32.0, help="largest request, MiB")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="largest image, pixels")
    parser.add_argument("--max-files", type=int, default=32, help="most images in a request")
    parser.add_argument("--max-requests", type=int, default=256, help="most requests at the same time; others get 503")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_mib", "max_pixels", "max_files", "max_requests"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be positive")
    if options.max_wait_ms < 0 or not 0 <= options.port < 65536:
        raise ValueError("--max-wait-ms must be 0 or more, and --port from 0 to 65535")
    paths = _named(options.models)
    api_key = _read_key(options.api_key_file) if options.api_key_file else ""
    try:
        from riformer_runtime.serve.app import Served, create_app, sample_images
        from riformer_runtime.serve.requests import Limits
        from riformer_runtime.serve.server import bind, run
    except ImportError as error:
        raise RuntimeError(f"serving needs {error.name}: pip install 'riformer[serve]'") from error
    models = {}
    for name, path in paths.items():
        runner = chosen_runner(path, open_model, options.engine, options.precision)
        if not runner.manifest.num_classes:
            raise ValueError(f"{path} has no classifier, so it predicts no classes")
        probe = Artifact(path).probe() if is_artifact(path) else {}
        models[name] = Served(runner, sample_images(probe["pixels"]) if probe else ())
    limits = Limits(options.max_mib, options.max_pixels, options.max_files, options.max_requests)
    app = create_app(models, limits, options.batch_size, options.max_wait_ms, api_key)
    bound = bind(options.host, options.port)
    table = Table("model", "engine", "precision", "classes", "input")
    for name, served in models.items():
        manifest = served.runner.manifest
        size = " x ".join(map(str, manifest.preprocessing.input_size[1:]))
        table.add_row(name, served.runner.engine, served.runner.precision, str(manifest.num_classes), size)
    console.print(table)
    console.print(
        f"up to {options.batch_size} images at once, of requests that come within {options.max_wait_ms:g} ms; "
        f"{options.max_mib:g} MiB, {options.max_files} images and {options.max_pixels:,} pixels allowed; "
        f"{options.max_requests} requests at the same time; {'with' if api_key else 'without'} an API key"
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    console.print(f"http://{host}:{bound.getsockname()[1]} (Ctrl-C stops it)", soft_wrap=True)
    console.file.flush()
    unanswered = run(app, bound)
    errors.print(f"stopped; {app.state.num_answered} requests answered" + (f", {unanswered} not" if unanswered else ""))
    return int(bool(unanswered))


def _named(models: list[str]) -> dict[str, str]:
    """Paths by name; a path without a name has that of its last part.

    Raises:
        ValueError: a name that no URL can have, or two models of one name.
    """
    paths: dict[str, str] = {}
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            path, name = text, Path(text).resolve().stem
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{text!r} needs a name of letters, digits, dots and dashes: NAME=PATH")
        if name in paths:
            raise ValueError(f"two models are called {name}: give each a name, NAME=PATH")
        paths[name] = path
    return paths


def _read_key(file: str) -> str:
    key = Path(file).read_text(encoding="utf-8").strip()
    if len(key) < 16:
        raise ValueError(f"{file} has a key of {len(key)} characters; 16 or more are needed")
    return key
