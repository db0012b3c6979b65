"""What does each installation weigh, and how soon does `riformer predict` answer in it?

Builds the wheel, installs it with each extra into a virtual environment of its own, and predicts one image with an
exported network: the time from the command to its end, environments taking turns, beside that of `python -c pass`.

    python benchmarks/install.py
"""

import json
import subprocess
import sys
import time
import venv
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from options import RESULTS, options
from PIL import Image

from riformer.atomic import write_text
from riformer.export.artifact import Samples, export
from riformer.machine import environment
from riformer.measure.bench import randomised
from riformer.runtime.latency import Spread

ROOT = Path(__file__).parents[1]
ENGINES = {"": "native", "[onnx]": "onnxruntime", "[openvino]": "openvino", "[serve]": "native"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    given = options(__doc__, RESULTS / "install.json").parse_args()
    name, size, targets = ("riformer_s12", 224, ["native", "onnx", "openvino"])
    if given.smoke:
        name, size, targets = ("riformer_micro", 32, ["native"])
    engines = {extra: engine for extra, engine in ENGINES.items() if not (given.smoke and extra)}
    overlay = {"input_size": (3, size, size)}
    model = randomised(timm.create_model(name, pretrained_cfg_overlay=overlay)).eval()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Image.new("RGB", (640, 480), "green").save(folder / "image.jpg")
        export(model, folder / "out", Samples("one colour", [Image.new("RGB", (640, 480), "red")]), targets)
        subprocess.run([*PIP, "wheel", "-q", "--no-deps", "-w", temporary, str(ROOT)], check=True)
        (wheel,) = folder.glob("*.whl")
        rows, commands = [], {"": [sys.executable, "-c", "pass"]}
        for extra, engine in engines.items():
            place = folder / f"riformer{extra}"
            venv.create(place)
            python = str(place / "bin" / "python")
            subprocess.run([*PIP, "--python", python, "install", "-q", f"{wheel}{extra}"], check=True)
            size_mb = sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())
            rows.append({"install": place.name, "engine": engine, "size_mb": size_mb / 1e6})
            predict = [str(place / "bin" / "riformer"), "predict", str(folder / "out"), str(folder / "image.jpg")]
            commands[place.name] = [*predict, "--engine", engine]
        show(rows, timed(commands, given.rounds))
    write_text(given.out, json.dumps({"env": environment(1), "model": name, "rows": rows}, indent=1) + "\n")


def timed(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each command in each round, after one round in which Python compiles its bytecode."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_number in range(rounds + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(rows: list[dict[str, Any]], seconds: dict[str, list[float]]) -> None:
    """Adds the times to the rows and prints them."""
    for row in rows:
        values = seconds[row["install"]]
        row["first_answer_s"] = asdict(Spread.of(values))
        row["times_python"] = asdict(Spread.of([a / b for a, b in zip(values, seconds[""], strict=True)]))
        ratio = row["times_python"]["median"]
        print(f"{row['install']}: {row['size_mb']:.0f} MB, answers in {ratio:.0f} times the time of python -c pass")


if __name__ == "__main__":
    main()
