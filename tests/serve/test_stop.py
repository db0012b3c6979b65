"""A server that is told to stop answers what it has accepted; a connection that says nothing is closed."""

import http.client
import json
import re
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest

from riformer_runtime.serve.server import listen

NUM_CLIENTS = 8


def form(content: bytes) -> tuple[bytes, dict[str, str]]:
    """A request for a prediction: body and headers."""
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return part + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def ask_until_refused(host: str, keep: bool, body: bytes, headers: dict[str, str], answers: list) -> None:
    """Sends requests until one is not answered, over one connection or over new ones, and keeps the answers."""
    connection = http.client.HTTPConnection(host, timeout=60)
    while True:
        try:
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        except OSError:
            return
        finally:
            if not keep:
                connection.close()


@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))])
def test_sigterm_in_the_middle_of_load_loses_no_accepted_request(serve, artifacts, image, trial):
    """The server counts what it accepted and answered; the clients must have received exactly as many answers."""
    server, answers = serve(artifacts["student"]), []
    body, headers = form(image(0, size=(400, 300)))
    arguments = [(urlsplit(server.url).netloc, keep, body, headers, answers) for keep in (True, False)]
    clients = [threading.Thread(target=ask_until_refused, args=arguments[i % 2]) for i in range(NUM_CLIENTS)]
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
    labelled = [text for status, text in answers if status == 200]
    assert {status for status, _ in answers} <= {200, 503}
    assert int(re.search(r"stopped: ([\d,]+) requests answered", said)[1].replace(",", "")) == len(labelled)
    shares = [[c["probability"] for c in json.loads(text)["predictions"][0]["classes"]] for text in labelled]
    np.testing.assert_allclose(shares, [shares[0]] * len(shares), atol=1e-6)


def test_while_it_stops_it_is_not_ready_and_refuses_but_answers_what_it_accepted(serve, artifacts, image):
    """A request is accepted by its header; its body comes after the signal."""
    server = serve(artifacts["student"])
    host = urlsplit(server.url).netloc
    body, headers = form(image(0))
    accepted = http.client.HTTPConnection(host, timeout=30)
    accepted.putrequest("POST", "/predict")
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        accepted.putheader(name, value)
    accepted.endheaders(body[:10])
    while "riformer_requests_in_work 1.0" not in fetch(host, "GET", "/metrics")[1]:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    while fetch(host, "GET", "/ready")[0] != 503:
        time.sleep(0.01)
    assert fetch(host, "GET", "/health")[0] == 200
    assert fetch(host, "POST", "/predict", body, headers) == (503, '{"detail":"the server is stopping"}')
    accepted.send(body[10:])
    assert accepted.getresponse().status == 200
    said = server.process.communicate(timeout=30)[1]
    assert server.process.returncode == 0
    assert said.endswith("stopped: 1 requests answered, 1 refused\n")
    with pytest.raises(ConnectionRefusedError):
        fetch(host, "GET", "/ready")


def test_a_second_signal_ends_it_at_once(serve, artifacts, image):
    server = serve(artifacts["student"])
    host = urlsplit(server.url).netloc
    waiting = http.client.HTTPConnection(host, timeout=30)
    waiting.putrequest("POST", "/predict")
    waiting.putheader("Content-Length", "100")
    waiting.endheaders(b"x")
    while "riformer_requests_in_work 1.0" not in fetch(host, "GET", "/metrics")[1]:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGINT)
    while fetch(host, "GET", "/ready")[0] != 503:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGINT)
    server.process.communicate(timeout=20)


def fetch(host: str, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_answers_are_sent_without_waiting_for_acknowledgements():
    """Header and body of an answer are two packets. Accepted sockets must say their protocol, or asyncio lets the
    second wait up to 40 ms.
    """
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


@pytest.mark.slow
def test_connections_without_a_whole_header_are_closed_and_others_are_answered(serve, artifacts):
    server = serve(artifacts["student"])
    host, port = urlsplit(server.url).hostname, urlsplit(server.url).port
    silent = [socket.create_connection((host, port), timeout=60) for _ in range(50)]
    for i, one in enumerate(silent):
        one.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\n"[: i % 30])
    busy = http.client.HTTPConnection(f"{host}:{port}", timeout=30)
    began = time.monotonic()
    while time.monotonic() - began < 14:  # longer than a silent connection may last
        busy.request("GET", "/health")
        assert busy.getresponse().read() == b'{"status":"ok"}'
        silent[-1].sendall(b"a")  # a header that never ends
        time.sleep(0.2)
        if time.monotonic() - began > 9:
            break
    for one in silent:
        assert one.recv(1) == b""
