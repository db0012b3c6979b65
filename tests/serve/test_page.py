"""The page, in a real browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")


@pytest.fixture(scope="module")
def png(image):
    """Makes a file as a person would choose it."""
    return lambda seed: {"name": f"holiday {seed}.png", "mimeType": "image/png", "buffer": image(seed, size=(120, 90))}


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = running.chromium.launch(executable_path=BROWSER, args=arguments)
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
    page.locator(".samples button").nth(7).wait_for()
    return page


def rows(page, model: str) -> list[tuple[str, float]]:
    """Classes and percentages that are shown for a model."""
    page.locator(f".card:not(.empty)[data-model={model}] li").first.wait_for()
    items = page.locator(f".card[data-model={model}] li").all()
    texts = [(item.locator(".name").inner_text(), item.locator(".share").inner_text()) for item in items]
    return [(name, float(share.removesuffix(" %"))) for name, share in texts]


def photograph(page, name: str) -> None:
    """Keeps a picture of the page where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_an_image_is_labelled_by_both_models_with_names_shown_as_text(browser, url, png):
    page = opened(browser, url)
    photograph(page, "start")
    page.set_input_files("#file", png(0))
    found = {model: rows(page, model) for model in ("student", "teacher")}
    status = page.locator("#status:not(:empty)").inner_text()
    photograph(page, "two-models")
    for shown in found.values():
        assert "<b>bird</b>" in {name for name, _ in shown}
        assert sum(share for _, share in shown) == pytest.approx(100, abs=0.3)
        assert [share for _, share in shown] == sorted((share for _, share in shown), reverse=True)
    assert found["student"] != found["teacher"]
    best = {shown[0][0] for shown in found.values()}
    assert status.startswith("Both models say" if len(best) == 1 else "The models disagree")
    assert "ms in the network" in page.locator(".card[data-model=student] .times").inner_text()
    assert page.locator(".classes b").count() == 0
    assert page.locator("#preview").get_attribute("alt") == "preview of holiday 0.png"


def test_a_file_that_is_no_image_is_refused_and_the_next_one_works(browser, url, png):
    page = opened(browser, url)
    page.set_input_files("#file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"not an image"})
    error = page.get_by_role("alert")
    error.wait_for()
    assert error.inner_text().startswith("notes.png: not an image in a format that is read")
    photograph(page, "wrong-file")
    page.set_input_files("#file", png(1))
    assert rows(page, "student")
    playwright.expect(error).to_be_hidden()


def test_an_image_can_be_dropped_anywhere_and_pasted(browser, url, image):
    page = opened(browser, url)
    for event, name in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        transfer = page.evaluate_handle(
            """([content, event]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(content)], `${event}.png`, { type: "image/png" }));
                return transfer;
            }""",
            [list(image(5)), event],
        )
        page.evaluate(
            """([event, name, transfer]) => dispatchEvent(event === "drop"
                ? new DragEvent(event, { [name]: transfer, cancelable: true })
                : new ClipboardEvent(event, { [name]: transfer, cancelable: true }))""",
            [event, name, transfer],
        )
        playwright.expect(page.locator("#caption")).to_have_text(f"{event}.png")
        assert rows(page, "teacher")


def test_two_people_at_once_get_their_own_answers(browser, url, png):
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


def test_a_sample_is_one_tap_or_key_away_also_on_a_phone_in_the_dark(browser, url):
    page = opened(browser, url, 375, 812, color_scheme="dark", has_touch=True)
    page.get_by_role("button", name="sample 3").tap()
    assert len(rows(page, "student")) == 4
    page.locator("#status:not(:empty)").wait_for()
    photograph(page, "phone-dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_role("button", name="sample 4", exact=True).focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#preview")).to_have_attribute("alt", "preview of sample 4")
    assert page.get_by_role("button", name="sample 4", exact=True).get_attribute("aria-pressed") == "true"


def test_the_description_of_the_api_needs_no_other_server(browser, url):
    context = browser.new_context(viewport={"width": 375, "height": 812})
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/docs")
    page.get_by_role("heading", name="POST /predict").wait_for()
    assert "predictions[].classes[].probability" in page.locator("body").inner_text()
    assert all(one.startswith((url, "data:")) for one in asked)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_a_server_with_a_key_asks_for_it(browser, serve, artifacts, tmp_path, png):
    (tmp_path / "key").write_text("correct-horse-battery\n")
    url = serve(artifacts["student"], "--api-key-file", tmp_path / "key").url
    page = browser.new_context(viewport={"width": 900, "height": 700}).new_page()
    page.goto(url)
    key = page.get_by_label("This server asks for a key")
    key.fill("wrong")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("alert")).to_have_text("That key is not accepted.")
    photograph(page, "key")
    key.fill("correct-horse-battery")
    page.keyboard.press("Enter")
    page.locator(".samples button").nth(7).wait_for()
    playwright.expect(key).to_be_hidden()
    page.set_input_files("#file", png(4))
    assert rows(page, "student")
