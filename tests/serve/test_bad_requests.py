"""Bad requests: each is refused with a reason and its 4xx, harms nothing, and says nothing about the machine."""

import base64
import io
import struct
import zlib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from riformer_runtime import open_runner
from riformer_runtime.serve.app import make_app
from riformer_runtime.serve.costs import CostlyImageError, check_cost
from riformer_runtime.serve.limits import Gate, Limits
from riformer_runtime.serve.service import Model

LIMITS = Limits(max_bytes=2**19, max_pixels=200_000, max_files=4, max_requests=8)


@pytest.fixture(scope="module")
def client(artifacts):
    app = make_app([Model("student", open_runner(artifacts["student"]))], Gate(LIMITS))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def picture(kind: str = "PNG", size: tuple[int, int] = (90, 60), **settings) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind, **settings)
    return file.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes whose header promises many pixels."""
    content = bytearray(picture(size=(1, 1)))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, comes again and again."""
    content = picture("JPEG", progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 200 + content[-2:]


def tiff_of_many_strips(order: str = "<", num: int = 70_000) -> bytes:
    """A TIFF with a strip for each pixel; their offsets are one array that is also taken for their sizes."""
    shorts = ((256, 1), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1))
    longs = ((257, 1, num), (273, num, 110), (279, num, 110))
    entries = [(tag, struct.pack(order + "HHIHH", tag, 3, 1, value, 0)) for tag, value in shorts]
    entries += [(tag, struct.pack(order + "HHII", tag, 4, count, value)) for tag, count, value in longs]
    start = (
        (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(entries))
    )
    return (start + b"".join(entry for _, entry in sorted(entries))).ljust(110, b"\0") + bytes(4 * num)


def form(*files: bytes, **fields: str) -> dict:
    return {"files": [("files", ("a.png", content)) for content in files], "data": fields}


def raw(content: bytes, kind: str) -> dict:
    return {"content": content, "headers": {"content-type": kind}}


def in_json(*images: object, **more: object) -> dict:
    return {"json": {"images": list(images), **more}}


def part(header: str, content: bytes = b"v") -> bytes:
    return f"--x\r\nContent-Disposition: form-data{header}\r\n\r\n".encode() + content + b"\r\n"


GOOD = picture()
TEXT = base64.b64encode(GOOD).decode()
FORM = "multipart/form-data; boundary=x"
BAD = {
    "no body": (415, {}),
    "no type of content": (415, {"content": GOOD}),
    "another type of content": (415, raw(GOOD, "image/png")),
    "a form in the address's encoding": (415, raw(b"files=a.png", "application/x-www-form-urlencoded")),
    "a form without an end": (400, raw(part('; name="files"; filename="a"', GOOD), FORM)),
    "a form without a boundary": (400, raw(b"--x\r\n", "multipart/form-data")),
    "a form with an empty boundary": (400, raw(b"----", "multipart/form-data; boundary=")),
    "a form with another boundary": (400, raw(part('; name="files"; filename="a"') + b"--x--\r\n", FORM + "y")),
    "an empty form": (400, raw(b"--x--\r\n", FORM)),
    "a form cut in a header": (400, raw(b"--x\r\nContent-Disposition: form-da", FORM)),
    "a form cut in a file": (400, raw(part('; name="files"; filename="a"', GOOD[:50]), FORM)),
    "a form of garbage": (400, raw(bytes(range(256)) * 8, FORM)),
    "a part without a name": (400, raw(part("") + b"--x--\r\n", FORM)),
    "fields alone": (400, raw(part('; name="model"', b"student") + b"--x--\r\n", FORM)),
    "a field twice": (400, raw(part('; name="top_k"', b"1") * 2 + b"--x--\r\n", FORM)),
    "ten thousand fields": (400, raw(part('; name="top_k"') * 5_000 + b"--x--\r\n", FORM)),
    "a huge field": (400, form(GOOD, model="m" * 5000)),
    "a field of a URL": (400, form(GOOD, url="http://127.0.0.1/")),
    "a field of a path": (400, form(GOOD, path="/etc/passwd")),
    "top_k of a word": (400, form(GOOD, top_k="five")),
    "top_k of 0": (400, form(GOOD, top_k="0")),
    "a huge top_k": (400, form(GOOD, top_k="9" * 900)),
    "an unknown model": (404, form(GOOD, model="../../etc/passwd")),
    "a model of half a character": (404, form(GOOD, model=b"\xff\xfe")),
    "too many files": (413, form(*[GOOD] * 5)),
    "too many bytes": (413, form(GOOD + bytes(600_000))),
    "too many bytes in JSON": (413, in_json("A" * 600_000)),
    "a length that is not sent": (413, {"content": b"", "headers": {"content-type": FORM, "content-length": "9" * 15}}),
    "too many pixels": (413, form(picture(size=(500, 500)))),
    "a bomb": (413, form(bomb())),
    "a bomb larger than Pillow opens": (413, form(bomb(2**31 - 1))),
    "a JPEG of many scans": (413, form(jpeg_of_many_scans())),
    "a TIFF of many strips": (413, form(tiff_of_many_strips())),
    "a TIFF of many strips, the other order": (413, form(tiff_of_many_strips(">"))),
    "text": (415, form(b"hello")),
    "a program": (415, form(b"\x7fELF" + bytes(500))),
    "SVG": (415, form(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')),
    "EPS, which other programs would draw": (415, form(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")),
    "PDF": (415, form(b"%PDF-1.7\n")),
    "a signature alone": (415, form(b"\x89PNG\r\n\x1a\n")),
    "several files, none an image": (415, form(b"a", b"b")),
    "an empty file": (422, form(b"")),
    "a cut PNG": (422, form(GOOD[:150])),
    "a cut JPEG": (422, form(picture("JPEG")[:700])),
    "a cut WebP": (422, form(picture("WEBP", lossless=True)[:60])),
    "a cut TIFF": (422, form(picture("TIFF")[:900])),
    "a cut GIF": (422, form(picture("GIF")[:800])),
    "a PNG with damage": (422, form(GOOD[:60] + bytes(40) + GOOD[100:])),
    "a TIFF whose offsets are not there": (415, form(tiff_of_many_strips(num=3)[:90])),
    "JSON cut short": (400, raw(b"{", "application/json")),
    "JSON of another kind": (400, raw(b'"images"', "application/json")),
    "JSON nested deeply": (400, raw(b"[" * 100_000, "application/json")),
    "JSON in another encoding": (400, raw(b"\xff\xfe\x00", "application/json")),
    "half a character in JSON": (400, raw(b'{"images": ["\\ud800"]}', "application/json")),
    "a huge number in JSON": (400, raw(b'{"images": [], "top_k": ' + b"9" * 9000 + b"}", "application/json")),
    "no list": (400, {"json": {"images": "abcd"}}),
    "an empty list": (400, in_json()),
    "a list of numbers": (400, in_json(1, None, {})),
    "a URL": (400, in_json("http://127.0.0.1/cat.png")),
    "a path": (400, in_json("/etc/passwd")),
    "a data URL": (400, in_json("data:image/png;base64," + TEXT)),
    "base64 with a letter too few": (400, in_json(TEXT[:-1])),
    "too many images in JSON": (413, in_json(*["AAAA"] * 5)),
    "base64 that is no image": (415, in_json(base64.b64encode(b"hello").decode())),
    "an unknown entry": (400, in_json(TEXT, path="/etc/passwd")),
    "a model that is a number": (400, in_json(TEXT, model=3)),
    "a top_k that is true": (400, in_json(TEXT, top_k=True)),
    "an unknown model in JSON": (404, in_json(TEXT, model="nobody")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_a_reason_and_harms_nothing(client, name):
    status, request = BAD[name]
    answer = client.post("/predict", **request)
    assert answer.status_code == status, answer.text
    (reason,) = answer.json().values()
    assert isinstance(reason, str)
    assert reason
    assert "\n" not in reason
    assert not any(text in reason for text in (str(Path.cwd()), "Traceback", "site-packages", "/tmp", " at 0x"))
    assert client.post("/predict", files={"files": GOOD}).status_code == 200


def test_the_bad_requests_are_many_and_those_like_them_that_are_good_are_answered(client):
    assert len(BAD) >= 40
    progressive, few = picture("JPEG", progressive=True), tiff_of_many_strips(num=2_000)
    for content in (progressive, few, picture("TIFF"), picture("JPEG") + bytes(300_000), bomb(1)):
        assert client.post("/predict", **form(content)).status_code == 200


def test_a_costly_file_is_told_before_anything_is_decoded():
    """Sizes at which a decoder would take minutes; and both orders of bytes."""
    large = picture("JPEG", size=(1000, 1000), progressive=True)
    scan = large[large.rindex(b"\xff\xda") : -2]
    for content in (large[:-2] + scan * 1_000, tiff_of_many_strips("<", 10**6), tiff_of_many_strips(">", 10**6)):
        with pytest.raises(CostlyImageError, match=r"a\.img: the (JPEG|TIFF) has more than"):
            check_cost(content, "a.img")
    check_cost(large, "a.img")
