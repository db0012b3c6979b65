"""The HTTP interface: right answers, and a clear refusal of everything else."""

import base64
import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from riformer_runtime.serve.requests import Limits

from riformer_runtime import open_runner, predict
from riformer_runtime.artifact import Artifact
from riformer_runtime.serve.app import Served, create_app, sample_images

LIMITS = Limits(mib=0.5, pixels=200_000, files=4, requests=8)
KEY = "correct horse battery"


def image(seed: int, kind: str = "PNG", size: tuple[int, int] = (90, 60), **settings) -> bytes:
    """The content of an image file."""
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels.convert("P" if kind == "GIF" else "RGB").save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def runners(artifacts):
    return {name: open_runner(path) for name, path in artifacts.items()}


@pytest.fixture(scope="module")
def client(artifacts, runners):
    models = {
        name: Served(runner, sample_images(Artifact(artifacts[name]).probe()["pixels"]))
        for name, runner in runners.items()
    }
    with TestClient(create_app(models, LIMITS), raise_server_exceptions=False) as client:
        yield client


def expected(runner, content: bytes, top_k: int = 4) -> list[dict]:
    (prediction,) = predict(runner, [io.BytesIO(content)], top_k)
    return [{"name": name, "probability": pytest.approx(share, abs=1e-5)} for name, share in prediction.classes]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_form_and_json_are_answered_as_predict_answers(client, runners, kind):
    content = image(1, kind)
    form = client.post("/predict", files={"files": ("my cat.x", content)}, data={"model": "teacher", "top_k": "4"})
    body = {"images": [base64.b64encode(content).decode()], "model": "teacher", "top_k": 4}
    for answer, file in ((form, "my cat.x"), (client.post("/predict", json=body), "")):
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert (said["model"], said["engine"], said["precision"]) == ("teacher", "native", "fp32")
        assert said["latency_ms"] > 0
        classes = expected(runners["teacher"], content)
        assert said["predictions"] == [{"file": file, "classes": classes, "error": ""}]


def test_several_files_are_answered_in_order_and_a_bad_one_has_its_error(client, runners):
    contents = [image(1), b"no image", image(2)]
    answer = client.post("/predict", files=[("files", (f"{i}.png", c)) for i, c in enumerate(contents)])
    assert answer.status_code == 200
    said = answer.json()["predictions"]
    assert [one["file"] for one in said] == ["0.png", "1.png", "2.png"]
    assert said[0]["classes"] == expected(runners["student"], contents[0])
    assert said[2]["classes"] == expected(runners["student"], contents[2])
    assert said[1]["error"].startswith("not an image")
    assert said[1]["classes"] == []


def test_clients_at_the_same_time_get_their_own_answers(client, runners):
    contents = [image(seed) for seed in range(24)]
    names = ["student", "teacher"] * 12

    def ask(content, name):
        return client.post("/predict", files={"files": content}, data={"model": name, "top_k": "4"})

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, contents, names))
    for content, name, answer in zip(contents, names, answers, strict=True):
        assert answer.json()["predictions"][0]["classes"] == expected(runners[name], content)
    assert len({str(answer.json()["predictions"]) for answer in answers}) == 24


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header promises 30,000 x 30,000 pixels."""
    content = bytearray(image(0, size=(1, 1)))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def form(*files: bytes, **fields: str) -> dict:
    return {"files": [("files", ("a.png", content)) for content in files], "data": fields}


def raw(content: bytes, kind: str) -> dict:
    return {"content": content, "headers": {"content-type": kind}}


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


GOOD = image(3)
BOUNDARY = "multipart/form-data; boundary=x"
BAD = {
    "no body": {},
    "empty form": raw(b"--x--\r\n", BOUNDARY),
    "form without a boundary": raw(b"--x\r\n", "multipart/form-data"),
    "form with an empty boundary": raw(b"----", "multipart/form-data; boundary="),
    "form cut in a header": raw(b"--x\r\nContent-Disposition: form-da", BOUNDARY),
    "form cut in a file": raw(
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + GOOD[:50], BOUNDARY
    ),
    "form of garbage": raw(bytes(range(256)) * 8, BOUNDARY),
    "form part without a name": raw(b"--x\r\nContent-Disposition: form-data\r\n\r\nv\r\n--x--\r\n", BOUNDARY),
    "fields alone": {"data": {"model": "student"}, "files": {"": ("", b"")}},
    "too many files": form(*[GOOD] * 5),
    "too many fields": raw(
        b"".join(b'--x\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n' % i for i in range(99)) + b"--x--\r\n",
        BOUNDARY,
    ),
    "a huge field": form(GOOD, model="m" * 5000),
    "an unknown field": form(GOOD, url="http://127.0.0.1/"),
    "an unknown model": form(GOOD, model="../../etc/passwd"),
    "top_k of a word": form(GOOD, top_k="five"),
    "a negative top_k": form(GOOD, top_k="-1"),
    "a huge top_k": form(GOOD, top_k="9" * 100),
    "text": form(b"hello"),
    "an empty file": form(b""),
    "a program": form(b"\x7fELF" + bytes(500)),
    "SVG": form(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "EPS": form(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
    "PDF": form(b"%PDF-1.7\n"),
    "a cut PNG": form(GOOD[: len(GOOD) // 2]),
    "a cut JPEG": form(image(3, "JPEG")[:300]),
    "a PNG with damage": form(GOOD[:60] + bytes(40) + GOOD[100:]),
    "a signature alone": form(b"\x89PNG\r\n\x1a\n"),
    "a decompression bomb": form(bomb()),
    "too many pixels": form(image(3, size=(500, 500))),
    "too many bytes": form(image(3) + bytes(600_000)),
    "too many bytes in JSON": {"json": {"images": ["A" * 600_000]}},
    "a large Content-Length": {"content": b"", "headers": {"content-type": BOUNDARY, "content-length": "9" * 15}},
    "no JSON": raw(b"{", "application/json"),
    "JSON of another kind": raw(b'"images"', "application/json"),
    "JSON nested deeply": raw(b"[" * 100_000, "application/json"),
    "JSON in another encoding": raw(b"\xff\xfe\x00", "application/json"),
    "images that are no list": {"json": {"images": "abcd"}},
    "no images": {"json": {"images": []}},
    "images that are numbers": {"json": {"images": [1, None, {}]}},
    "a URL for an image": {"json": {"images": ["http://127.0.0.1/cat.png"]}},
    "a path for an image": {"json": {"images": ["/etc/passwd"]}},
    "a data URL": {"json": {"images": ["data:image/png;base64," + encoded(GOOD)]}},
    "base64 that is no image": {"json": {"images": [encoded(b"hello")]}},
    "an unknown entry": {"json": {"images": [encoded(GOOD)], "path": "/etc/passwd"}},
    "a model that is a number": {"json": {"images": [encoded(GOOD)], "model": 3}},
    "a top_k that is true": {"json": {"images": [encoded(GOOD)], "top_k": True}},
    "another type of content": raw(GOOD, "image/png"),
    "no type of content": {"content": GOOD},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_a_reason_and_harms_nothing(client, name):
    answer = client.post("/predict", **BAD[name])
    assert 400 <= answer.status_code < 500, answer.text
    reason = answer.json()["detail"]
    assert isinstance(reason, str)
    assert reason
    assert not any(text in reason for text in (str(Path.cwd()), "Traceback", "site-packages", "/tmp"))
    assert client.post("/predict", files={"files": GOOD}).status_code == 200


def test_the_bad_requests_are_many():
    assert len(BAD) >= 40


def test_requests_above_the_limit_are_answered_503_at_once(artifacts, runners):
    app = create_app({"student": Served(runners["student"])}, Limits(requests=2))
    with TestClient(app) as client:
        app.state.num_in_flight = 2
        answer = client.post("/predict", files={"files": GOOD})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        app.state.num_in_flight = 0
        assert client.post("/predict", files={"files": GOOD}).status_code == 200


def test_health_readiness_metrics_and_models(client, runners):
    app = client.app
    assert client.get("/health").json() == {"status": "alive"}
    assert client.get("/ready").json() == {"status": "ready"}
    app.state.stopping = True
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    app.state.stopping = False
    before = client.get("/metrics").text
    client.post("/predict", files={"files": GOOD})
    after = client.get("/metrics").text
    assert f'riformer_images_total{{model="student"}} {images_counted(before) + 1}' in after
    assert "riformer_batch_images_bucket" in after
    models = {model["name"]: model for model in client.get("/models").json()}
    assert list(models) == ["student", "teacher"]
    assert models["student"]["num_samples"] == 8
    assert client.get("/samples/student/3").content.startswith(b"\x89PNG")
    for path in ("/samples/student/8", "/samples/student/-1", "/samples/nobody/0", "/samples/student/a", "/nothing"):
        assert 400 <= client.get(path).status_code < 500
    assert client.get("/predict").status_code == 405
    description = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(description) == {"multipart/form-data", "application/json"}


def images_counted(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith('riformer_images_total{model="student"}')]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_a_key_is_needed_where_one_is_set(runners):
    with TestClient(create_app({"student": Served(runners["student"])}, LIMITS, api_key=KEY)) as client:
        ask = partial(client.post, "/predict", files={"files": GOOD})
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer "},
            {"authorization": b"Bearer \xff"},
        ):
            answer = ask(headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert ask(headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert [client.get(path).status_code for path in ("/metrics", "/models", "/samples/student/0")] == [401] * 3
        assert [client.get(path).status_code for path in ("/health", "/ready", "/", "/page.js")] == [200] * 4


def test_pages_of_other_sites_are_not_answered(client):
    for origin in ("http://evil.example", "null", "http://testserver.evil.example"):
        answer = client.post("/predict", files={"files": GOOD}, headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert client.post("/predict", files={"files": GOOD}, headers={"origin": "http://testserver"}).status_code == 200


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    texts = [page.text, client.get("/page.css").text, client.get("/page.js").text]
    assert not any(word in text for text in texts for word in ("http://", "https://", "innerHTML", "@import"))
    assert client.get("/page.py").status_code == 422


def test_a_failing_engine_is_a_500_without_its_text(runners):
    class Failing:
        manifest, engine, precision, detail = runners["student"].manifest, "native", "fp32", ""
        calls = 0

        def __call__(self, images):
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("secret of the engine")
            return runners["student"](images)

    app = create_app({"student": Served(Failing())}, LIMITS)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/predict", files={"files": GOOD})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert json.loads(answer.text)["detail"]
        assert client.get("/health").status_code == 200
        assert app.state.num_in_flight == 0
