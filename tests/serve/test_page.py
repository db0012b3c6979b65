"""The page, in a real browser."""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")


def png(seed: int, size: tuple[int, int] = (120, 90)) -> dict:
    """A file as a person would choose it."""
    buffer, rng = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC).save(
        buffer, "PNG"
    )
    return {"name": f"holiday {seed}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(serve, artifacts) -> str:
    return serve(*(f"{name}={path}" for name, path in artifacts.items())).url


def opened(browser, url: str, width: int = 1280, height: int = 860, **settings) -> playwright.Page:
    """The page in a context of its own, whose errors fail the test."""
    page = browser.new_context(viewport={"width": width, "height": height}, **settings).new_page()
    page.on("pageerror", lambda error: pytest.fail(f"error on the page: {error}"))
    page.goto(url)
    page.locator(".strip button").nth(7).wait_for()
    return page


def rows(page, model: str) -> list[tuple[str, float]]:
    """Classes and percentages that are shown for a model."""
    items = page.locator(f"#card-{model} .bars li")
    items.first.wait_for()
    texts = [(item.locator(".name").inner_text(), item.locator(".share").inner_text()) for item in items.all()]
    return [(name, float(share.removesuffix(" %"))) for name, share in texts]


def photograph(page, name: str) -> None:
    """Keeps a picture of the page where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_an_image_is_labelled_by_both_models_with_names_shown_as_text(browser, url):
    page = opened(browser, url)
    photograph(page, "start")
    page.set_input_files("#file", png(0))
    found = {model: rows(page, model) for model in ("student", "teacher")}
    photograph(page, "two-models")
    for shown in found.values():
        assert {name for name, _ in shown} >= {"<b>bird</b>"}
        assert sum(share for _, share in shown) == pytest.approx(100, abs=0.3)
        assert [share for _, share in shown] == sorted((share for _, share in shown), reverse=True)
    assert found["student"] != found["teacher"]
    assert "ms on the server" in page.locator("#card-student .latency").inner_text()
    assert page.locator(".bars b").count() == 0


def test_a_file_that_is_no_image_is_refused_and_the_next_one_works(browser, url):
    page = opened(browser, url)
    page.set_input_files("#file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"not an image"})
    problem = page.locator("#problem")
    problem.wait_for()
    assert "notes.png: not an image in a format that is read" in problem.inner_text()
    photograph(page, "wrong-file")
    page.set_input_files("#file", png(1))
    assert rows(page, "student")
    playwright.expect(problem).to_be_hidden()


def test_two_people_at_once_get_their_own_answers(browser, url):
    pages = [opened(browser, url) for _ in range(2)]
    alone = []
    for seed in (2, 3):
        pages[0].reload()
        pages[0].set_input_files("#file", png(seed))
        alone.append(rows(pages[0], "student"))
    assert alone[0] != alone[1]
    for _ in range(5):
        for page, seed in zip(pages, (2, 3), strict=True):
            page.reload()
            page.set_input_files("#file", png(seed))
        assert [rows(page, "student") for page in pages] == alone


def test_a_sample_is_one_click_or_key_away_also_on_a_phone_in_the_dark(browser, url):
    page = opened(browser, url, 375, 812, color_scheme="dark", has_touch=True)
    page.locator(".strip button").nth(2).tap()
    assert len(rows(page, "student")) == 4
    photograph(page, "phone-dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.locator(".strip button").nth(3).focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#preview")).to_have_attribute("alt", "sample-4.png")


def test_a_server_with_a_key_asks_for_it(browser, serve, artifacts, tmp_path):
    (tmp_path / "key").write_text("correct horse battery\n")
    url = serve(artifacts["student"], "--api-key-file", tmp_path / "key").url
    page = browser.new_context(viewport={"width": 900, "height": 600}).new_page()
    page.goto(url)
    page.locator("#key-input").fill("wrong key, wrong key")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#served")).to_have_text("That key is not accepted.")
    page.locator("#key-input").fill("correct horse battery")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#served")).to_have_text(re.compile("4 classes"))
    page.set_input_files("#file", png(4))
    assert rows(page, "student")
    photograph(page, "key")
