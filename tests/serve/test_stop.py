"""A server that is told to stop answers what it has accepted; addresses that cannot be listened on are named."""

import http.client
import io
import json
import re
import signal
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import riformer_cli

NUM_CLIENTS = 8


def form() -> tuple[bytes, dict[str, str]]:
    """A request for a prediction: body and headers."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(buffer, "PNG")
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return part + buffer.getvalue() + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def ask_until_refused(host: str, body: bytes, headers: dict[str, str], answers: list[tuple[int, bytes]]) -> None:
    """Sends requests over one connection after the other, and keeps the answers that came whole."""
    while True:
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        except (ConnectionError, http.client.RemoteDisconnected):
            return
        finally:
            connection.close()


@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))])
def test_sigterm_in_the_middle_of_load_loses_no_accepted_request(serve, artifacts, trial):
    """The server counts what it accepted and answered; the clients must have received exactly as many answers."""
    server, answers = serve(artifacts["student"]), []
    arguments = (urlsplit(server.url).netloc, *form(), answers)
    clients = [threading.Thread(target=ask_until_refused, args=arguments) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    while len(answers) < 20:
        time.sleep(0.01)
    time.sleep(0.03 * trial)
    server.process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join(60)
    said = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0, said
    assert "Traceback" not in said
    assert int(re.search(r"stopped; (\d+) requests answered\n", said)[1]) == len(answers)
    assert {status for status, _ in answers} == {200}
    shares = [[c["probability"] for c in json.loads(text)["predictions"][0]["classes"]] for _, text in answers]
    np.testing.assert_allclose(shares, [shares[0]] * len(shares), atol=1e-6)


def test_an_address_that_is_taken_and_bad_options_are_named(serve, artifacts, tmp_path, capsys):
    port = urlsplit(serve(artifacts["student"]).url).port
    path = str(artifacts["student"])
    (tmp_path / "short").write_text("secret")
    for arguments, message in (
        ([path, "--port", str(port)], f"cannot listen on 127.0.0.1, port {port}"),
        ([path, path], "two models are called student"),
        ([f"a b={path}"], "needs a name"),
        ([path, "--api-key-file", str(tmp_path / "short")], "16 or more are needed"),
        ([path, "--max-files", "0"], "--max-files is 0; it must be positive"),
        ([str(tmp_path / "absent")], "absent"),
    ):
        assert riformer_cli.run("serve", arguments) == 1
        assert message in " ".join(capsys.readouterr().err.split())
