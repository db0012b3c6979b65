"""What does serving cost? 200 clients at once beside the engine alone, every answer checked, and memory over time.

The engine alone, the engine with reading and preprocessing (`riformer_runtime.predict`), and `riformer serve` take
turns on the same JPEG files and threads. Clients send one image after the other over loopback and share the processors
with the server. Then one client alone, and more requests, while the server's memory is watched.

python benchmarks/serve.py
"""

import asyncio
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

import numpy as np
from options import of_machine, options
from PIL import Image

from riformer.atomic import write_text
from riformer.export.artifact import Samples, export
from riformer.machine import environment
from riformer.measure.bench import open_network
from riformer_runtime import Artifact, Runner, open_runner, predict
from riformer_runtime.engines import describe, input_of
from riformer_runtime.images import read_image
from riformer_runtime.predict import probabilities

NUM_FILES, BATCH_SIZE = 40, 16


def photographs(size: int) -> list[Image.Image]:
    """Smooth coloured noise, which compresses about as well as photographs."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)) for _ in range(NUM_FILES)]
    return [image.resize((size * 4 // 3, size), Image.Resampling.BICUBIC) for image in noise]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def request(content: bytes) -> bytes:
    """A whole HTTP request for a JPEG file."""
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + content + b"\r\n--x--\r\n"
    head = "POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    return f"{head}Content-Length: {len(part)}\r\n\r\n".encode() + part


@contextmanager
def served(artifact: Path) -> Iterator[str]:
    """`riformer serve` in a process of its own; its address."""
    command = [sys.executable, "-m", "riformer_cli", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


class Load:
    """Clients of a server.

    Attributes:
        seconds: that each right answer took.
        wrong: answers that are not the engine's.
        lost: requests without an answer.
    """

    def __init__(self, url: str, requests: list[bytes], expected: list[dict[str, float]]):
        self.host, self.port = url.removeprefix("http://").split(":")
        self.requests, self.expected = requests, expected
        self.seconds: list[float] = []
        self.wrong = self.lost = 0

    def run(self, num_clients: int, num_images: int) -> float:
        """Each client sends so many images; the images per second of all."""
        began = time.perf_counter()
        asyncio.run(self._clients(num_clients, num_images))
        return num_clients * num_images / (time.perf_counter() - began)

    async def _clients(self, num_clients: int, num_images: int) -> None:
        await asyncio.gather(*(self._client(i, num_images) for i in range(num_clients)))

    async def _client(self, number: int, num_images: int) -> None:
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        for i in range(num_images):
            which = (number * 7 + i) % len(self.requests)
            began = time.perf_counter()
            try:
                writer.write(self.requests[which])
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1]) if length else 0)
            except (OSError, asyncio.IncompleteReadError):
                self.lost += num_images - i
                break
            if head.startswith(b"HTTP/1.1 200") and is_right(json.loads(body), self.expected[which]):
                self.seconds.append(time.perf_counter() - began)
            else:
                self.wrong += 1
        writer.close()


def is_right(answer: dict[str, Any], expected: dict[str, float]) -> bool:
    """Whether an answer has the engine's probabilities, which change in the last places with the batch."""
    (prediction,) = answer["predictions"]
    found = {one["name"]: one["probability"] for one in prediction["classes"]}
    return len(found) == 5 and all(abs(share - expected[name]) < 1e-4 for name, share in found.items())


def engine_rate(runner: Runner, inputs: list[np.ndarray]) -> float:
    began = time.perf_counter()
    for i in range(0, len(inputs), BATCH_SIZE):
        probabilities(runner, inputs[i : i + BATCH_SIZE])
    return len(inputs) / (time.perf_counter() - began)


def predict_rate(runner: Runner, files: list[bytes]) -> float:
    began = time.perf_counter()
    for _ in predict(runner, map(io.BytesIO, files), batch_size=BATCH_SIZE):
        pass
    return len(files) / (time.perf_counter() - began)


def resident_mib(url: str) -> float:
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]) / 2**20  # type: ignore[index]


def main() -> None:
    parser = options(__doc__, of_machine() / "serve.json", rounds=10)
    parser.add_argument("--model", default="riformer_s12", help="as for riformer bench; a name has random weights")
    parser.add_argument("--clients", type=int, default=200, help="at once")
    parser.add_argument("--images", type=int, default=1, help="of each client in a turn")
    parser.add_argument("--requests", type=int, default=10_000, help="over which memory is watched")
    given = parser.parse_args()
    model, size = (given.model, 256) if not given.smoke else ("riformer_micro", 32)
    clients, requests, rounds = (given.clients, given.requests, given.rounds) if not given.smoke else (20, 400, 3)
    images = photographs(size)
    files = [encoded(image) for image in images]
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artefact"
        export(open_network(model, deploy=False), artifact, Samples("noise", images), ["native"])
        runner = open_runner(Artifact(artifact))
        inputs = [input_of(runner, read_image(io.BytesIO(file))) for file in files]
        names = runner.manifest.class_names
        expected = [dict(zip(names, map(float, row), strict=True)) for row in probabilities(runner, inputs)]
        with served(artifact) as url:
            load = Load(url, [request(file) for file in files], expected)
            record = measured(runner, inputs, files, load, url, (clients, given.images, requests, rounds))
    what = {"kind": "serve", "model": model, "engine": describe(runner)}
    record = what | {"file_bytes": sum(map(len, files)) // len(files)} | record
    write_text(given.out, json.dumps(record | {"env": environment(1)}, indent=1) + "\n")
    report(record)


def measured(
    runner: Runner, inputs: list[np.ndarray], files: list[bytes], load: Load, url: str, given: tuple[int, int, int, int]
) -> dict[str, Any]:
    """Rates in turns, latencies, errors and memory."""
    clients, num_images, requests, rounds = given
    repeats = max(1, clients * num_images // len(files))  # so that turns are about as long
    load.run(clients, 1)
    rates: dict[str, list[float]] = {"engine": [], "predict": [], "served": []}
    load.seconds.clear()
    for _ in range(rounds):
        rates["engine"].append(engine_rate(runner, inputs * repeats))
        rates["predict"].append(predict_rate(runner, files * repeats))
        rates["served"].append(load.run(clients, num_images))
    full = latencies(load.seconds)
    load.seconds.clear()
    load.run(1, len(files))
    alone = latencies(load.seconds)
    num_sent = clients * (1 + rounds * num_images) + len(files)
    memory = [(num_sent, resident_mib(url))]
    while num_sent < requests:
        load.run(clients, 1000 // clients)
        num_sent += 1000 // clients * clients
        memory.append((num_sent, resident_mib(url)))
    return {
        "num_clients": clients,
        "num_sent": num_sent,
        "num_wrong": load.wrong,
        "num_lost": load.lost,
        "images_per_s": rates,
        "latency_ms": {"full_load": full, "one_client": alone},
        "resident_mib": memory,
    }


def latencies(seconds: list[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=100)
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98]}


def report(record: dict[str, Any]) -> None:
    rates = record["images_per_s"]
    print(f"{record['model']} on {record['engine']}, {record['num_clients']} clients")
    for name in ("engine", "predict"):
        shares = [served / rate for served, rate in zip(rates["served"], rates[name], strict=True)]
        print(f"served beside {name}: {median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})")
    for name, latency in record["latency_ms"].items():
        print(f"latency, {name.replace('_', ' ')}: p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms")
    print(f"{record['num_sent']:,} requests: {record['num_wrong']} wrong, {record['num_lost']} lost")
    first, last = record["resident_mib"][0], record["resident_mib"][-1]
    print(f"memory: {first[1]:.0f} MiB after {first[0]:,} requests, {last[1]:.0f} MiB after {last[0]:,}")


if __name__ == "__main__":
    main()
