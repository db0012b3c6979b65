"""The HTTP interface: answers are those of predict, each client's its own; what is refused is refused clearly."""

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.requests import Request

from riformer_runtime import open_runner, predict
from riformer_runtime.artifact import Artifact
from riformer_runtime.serve.app import make_app
from riformer_runtime.serve.limits import HELD_REQUESTS, Gate, Limits, RefusedError
from riformer_runtime.serve.samples import samples
from riformer_runtime.serve.service import Model

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def models(artifacts):
    return [Model(name, open_runner(path), samples(path, 8)) for name, path in artifacts.items()]


@pytest.fixture(scope="module")
def runners(models):
    return {model.name: model.runner for model in models}


@pytest.fixture(scope="module")
def client(models):
    with TestClient(make_app(models), raise_server_exceptions=False) as client:
        yield client


def expected(runner, content: bytes, top_k: int = 4) -> list[dict]:
    (prediction,) = predict(runner, [io.BytesIO(content)], top_k)
    return [{"name": name, "probability": pytest.approx(share, abs=1e-5)} for name, share in prediction.classes]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_form_and_json_are_answered_as_predict_answers(client, runners, image, kind):
    content = image(1, kind)
    form = client.post("/predict", files={"any": ("my cat.x", content)}, data={"model": "teacher", "top_k": "3"})
    body = {"images": [base64.b64encode(content).decode()], "model": "teacher", "top_k": 3}
    for answer, file in ((form, "my cat.x"), (client.post("/predict", json=body), "")):
        assert answer.status_code == 200, answer.text
        said = answer.json()
        assert (said["model"], said["engine"], said["precision"]) == ("teacher", "native", "fp32")
        (prediction,) = said["predictions"]
        assert (prediction["file"], prediction["error"]) == (file, "")
        assert prediction["classes"] == expected(runners["teacher"], content, 3)
        assert said["latency_ms"] >= prediction["compute_ms"] > 0


def test_several_files_are_answered_in_order_and_a_bad_one_has_its_error(client, runners, image):
    contents = [image(1), b"no image", image(2)]
    answer = client.post("/predict", files=[("files", (f"{i}.png", c)) for i, c in enumerate(contents)])
    assert answer.status_code == 200
    said = answer.json()["predictions"]
    assert [one["file"] for one in said] == ["0.png", "1.png", "2.png"]
    assert said[0]["classes"] == expected(runners["student"], contents[0])
    assert said[2]["classes"] == expected(runners["student"], contents[2])
    assert said[1]["error"].startswith("1.png: not an image")
    assert said[1]["classes"] == []


def test_clients_at_the_same_time_get_their_own_answers(client, runners, image):
    contents = [image(seed) for seed in range(24)]
    names = ["student", "teacher"] * 12

    def ask(content, name):
        return client.post("/predict", files={"files": content}, data={"model": name})

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, contents, names))
    for content, name, answer in zip(contents, names, answers, strict=True):
        assert answer.json()["predictions"][0]["classes"] == expected(runners[name], content)
    assert len({str([one["classes"] for one in answer.json()["predictions"]]) for answer in answers}) == 24


def test_names_of_files_come_back_as_they_were_sent(client, image):
    names = ["日本 é 🙂.png", '<img src=x onerror="alert(1)">', "a" * 300, "../../etc/passwd"]
    answer = client.post("/predict", files=[("files", (name, image(0))) for name in names])
    sent = [name.replace('"', "%22")[:255] for name in names]  # by httpx, as browsers do
    assert [one["file"] for one in answer.json()["predictions"]] == sent


def test_requests_above_the_limit_are_answered_503_at_once(models, image):
    gate = Gate(Limits(max_requests=2))
    with TestClient(make_app(models, gate)) as client:
        ask = partial(client.post, "/predict", files={"files": image(0)})
        gate.in_work = 2
        answer = ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        gate.in_work = 0
        assert ask().status_code == 200
        gate.stopping = True
        assert (ask().status_code, client.get("/ready").status_code) == (503, 503)
        assert client.get("/health").status_code == 200
        assert (gate.in_work, gate.answered, gate.refused) == (0, 1, 2)


def body_of(gate: Gate, chunks: list[bytes], **headers: str) -> bytearray:
    """What the gate reads of a request whose body comes in chunks, and is cut off where the last one is empty."""

    async def receive():
        chunk = chunks.pop(0)
        return (
            {"type": "http.request", "body": chunk, "more_body": bool(chunks)} if chunk else {"type": "http.disconnect"}
        )

    async def read():
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        async with gate.body(Request({"type": "http", "headers": pairs}, receive)) as body:
            return bytearray(body)

    return asyncio.run(read())


def test_a_body_without_a_length_is_counted_as_it_comes():
    gate = Gate(Limits(max_bytes=10))
    assert body_of(gate, [b"01234", b"56789"]) == b"0123456789"
    chunks = [b"01234", b"56789", b"x", b"never read"]
    with pytest.raises(RefusedError, match="more than") as refused:
        body_of(gate, chunks)
    assert (refused.value.status, chunks) == (413, [b"never read"])
    with pytest.raises(RefusedError, match="cut off") as refused:
        body_of(gate, [b"01234", b""])
    assert refused.value.status == 400
    assert (gate.in_work, gate._held_bytes) == (0, 0)


def test_bodies_of_all_requests_together_are_limited():
    gate = Gate(Limits(max_bytes=10))
    gate._held_bytes = HELD_REQUESTS * 10 - 5
    with pytest.raises(RefusedError, match="fill the memory") as refused:
        body_of(gate, [b"01234", b"5"])
    assert refused.value.status == 503
    assert gate._held_bytes == HELD_REQUESTS * 10 - 5


def test_a_body_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("riformer_runtime.serve.limits.BODY_SECONDS", 0.01)

    async def receive():
        await asyncio.sleep(60)

    async def read():
        async with Gate(Limits()).body(Request({"type": "http", "headers": []}, receive)):
            pass

    with pytest.raises(RefusedError, match="took more than") as refused:
        asyncio.run(read())
    assert refused.value.status == 408


def test_models_samples_and_metrics(client, image):
    models = {model["name"]: model for model in client.get("/models").json()}
    assert list(models) == ["student", "teacher"]
    assert (models["student"]["num_samples"], models["student"]["input_size"]) == (8, [3, 48, 48])
    assert client.get("/samples/student/3.png").content.startswith(b"\x89PNG")
    for path in ("student/8.png", "student/-1.png", "nobody/0.png", "student/a.png", "student/0", "../0.png"):
        assert 400 <= client.get(f"/samples/{path}").status_code < 500
    assert client.post("/predict", files={"files": client.get("/samples/student/0.png").content}).status_code == 200

    def counted(line: str) -> float:
        lines = [one for one in client.get("/metrics").text.splitlines() if one.startswith(line)]
        return float(lines[0].split()[-1]) if lines else 0.0

    lines = (
        'riformer_images_total{model="student",result="labelled"}',
        'riformer_images_total{model="student",result="refused"}',
        'riformer_requests_total{route="/predict",status="200"}',
        'riformer_request_seconds_count{route="/predict"}',
        'riformer_compute_seconds_count{model="student"}',
    )
    before = [counted(line) for line in lines]
    client.post("/predict", files=[("files", image(0)), ("files", b"no image")])
    assert [counted(line) for line in lines] == [number + 1 for number in before]
    assert counted("process_resident_memory_bytes") > 0


def test_every_path_and_method_that_is_not_there_is_a_plain_4xx(client):
    for method, path, status in (
        ("GET", "/predict", 405),
        ("PUT", "/models", 405),
        ("POST", "/metrics", 405),
        ("GET", "/nothing", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
        ("GET", "/redoc", 404),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    metrics = client.get("/metrics").text
    assert 'route="other"' in metrics
    assert "/nothing" not in metrics  # or anybody could fill the memory with counters


def test_a_key_is_needed_where_one_is_set(models, image):
    with TestClient(make_app(models, api_key=KEY)) as client:
        ask = partial(client.post, "/predict", files={"files": image(0)})
        for value in (None, "Bearer wrong", "Bearer ", f"Basic {KEY}", KEY, b"Bearer \xff", f"Bearer {KEY}x"):
            answer = ask(headers={} if value is None else {"authorization": value})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        right = {"authorization": f"Bearer {KEY}"}
        assert ask(headers=right).status_code == 200
        closed = ("/metrics", "/models", "/samples/student/0.png")
        opened = ("/", "/docs", "/openapi.json", "/health", "/ready")
        assert [client.get(path).status_code for path in (*closed, *opened)] == [401] * 3 + [200] * 5
        assert [client.get(path, headers=right).status_code for path in closed] == [200] * 3


def test_pages_of_other_sites_are_not_answered(client, image):
    ask = partial(client.post, "/predict", files={"files": image(0)})
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://testserver.evil.example"},
        {"sec-fetch-site": "cross-site", "origin": "http://testserver"},
    ):
        answer = ask(headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    for headers in (
        {"origin": "http://testserver"},
        {"sec-fetch-site": "same-origin", "origin": "https://proxy.example"},
    ):
        assert ask(headers=headers).status_code == 200
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert client.options("/predict", headers=preflight).status_code == 405


def test_the_pages_load_nothing_from_elsewhere(client):
    for path in ("/", "/docs", "/page/style.css", "/page/index.js", "/page/docs.js"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert not any(word in text for word in ("http://", "https://", "innerHTML", "@import", "eval("))


def test_the_description_says_what_is_answered(client, image):
    description = client.get("/openapi.json").json()
    predict = description["paths"]["/predict"]["post"]
    content = predict["requestBody"]["content"]
    assert set(content["multipart/form-data"]["schema"]["properties"]) == {"files", "model", "top_k"}
    assert set(content["application/json"]["schema"]["properties"]) == {"images", "model", "top_k"}
    assert set(predict["responses"]) == {"200", "400", "401", "403", "404", "408", "413", "415", "422", "503"}
    answer = client.post("/predict", files={"files": image(0)}).json()
    schemas = description["components"]["schemas"]
    assert set(answer) == set(schemas["Answer"]["properties"])
    assert set(answer["predictions"][0]) == set(schemas["Prediction"]["properties"])


class Failing:
    """The student, which fails on images of one colour."""

    engine, precision, detail = "native", "fp32", ""

    def __init__(self, runner):
        self.manifest, self.runner = runner.manifest, runner

    def __call__(self, images):
        if (np.ptp(images, axis=(2, 3)) == 0).all(axis=1).any():
            raise OSError("cannot read /home/somebody/secret")
        return self.runner(images)


def test_a_failing_engine_is_a_500_without_its_text_and_spoils_no_other_image(runners, image):
    white = io.BytesIO()
    Image.new("RGB", (48, 48), "white").save(white, "PNG")
    app = make_app([Model("student", Failing(runners["student"]))], max_wait=0.2)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/predict", files={"files": white.getvalue()})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        contents = [image(1), white.getvalue(), image(2)]
        said = client.post("/predict", files=[("files", content) for content in contents]).json()["predictions"]
        assert said[0]["classes"] == expected(runners["student"], contents[0])
        assert said[2]["classes"] == expected(runners["student"], contents[2])
        assert "could not compute" in said[1]["error"]


def test_a_model_without_classes_is_refused(runners):
    class Headless(Failing):
        def __init__(self, runner):
            self.manifest = replace(runner.manifest, num_classes=0, class_names=())

    with pytest.raises(ValueError, match="odd has no classifier"):
        make_app([Model("odd", Headless(runners["student"]))])


def test_samples_are_the_probe(artifacts):
    pixels = Artifact(artifacts["student"]).probe()["pixels"]
    found = samples(artifacts["student"], 3)
    assert len(found) == 3
    for content, values in zip(found, pixels, strict=False):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), values)
