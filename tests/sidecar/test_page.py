"""The page in headless Chromium: what a person does and sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crypten_espn.bundle import Description
from crypten_espn.bundle.images import decode_image

from .browser import Browser, browsing, programs
from .conftest import IMAGES, Start, photo

TAB, WIDE = "\ue004", 1200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        programs() is None, reason="needs chromium and chromium-driver (chromedriver)"
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = programs()
    assert found is not None
    with browsing(*found, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(photo())
    return path


SHOWN = "return !document.getElementById('answer').hidden"
LOADED = """
    return ["given", "masked"].map((id) => document.getElementById(id))
      .every((image) => image.complete && image.naturalWidth > 0)
"""


def test_an_image_that_is_chosen_gets_its_class_and_what_the_server_saw(
    start: Start, browser: Browser, image: Path
) -> None:
    beside = start()
    x = decode_image(photo(), preprocessing=IMAGES, shape=(3, 8, 8))
    best = int(beside.network(x).argmax())
    browser.size(WIDE, 900)
    browser.open(f"http://{beside.address}/")
    browser.wait("return !document.getElementById('file').disabled")
    assert "images of 8\u00d78 pixels" in browser.text("#status")
    browser.type("#file", str(image))
    browser.wait(SHOWN)
    browser.wait(LOADED)
    assert browser.text("#status") == f"This is: class {best}."
    assert browser.text("#classes tr:first-child").startswith(f"class {best}")
    assert "s, " in browser.text("#cost") and "kB received" in browser.text("#cost")
    assert browser.run("return document.getElementById('masked').naturalWidth") == 8
    # Nothing was forbidden by the page's policy, and nothing came from elsewhere.
    assert browser.complaints() == []
    loaded = browser.run(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert loaded
    own = (f"http://{beside.address}/", "data:", "blob:")
    assert all(name.startswith(own) for name in loaded), loaded


DROP = """
    const held = new DataTransfer();
    held.items.add(new File([new Uint8Array(%s)], "photo.png", {type: "image/png"}));
    document.getElementById("drop").dispatchEvent(
      new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true}));
"""


def test_an_image_that_is_dropped_is_answered_too(
    start: Start, browser: Browser
) -> None:
    beside = start()
    browser.open(f"http://{beside.address}/")
    browser.wait("return !document.getElementById('file').disabled")
    browser.run(DROP % list(photo()))
    browser.wait(SHOWN)
    assert browser.text("#status").startswith("This is: class ")


def test_what_is_refused_is_said_and_the_next_image_is_answered(
    start: Start, browser: Browser, image: Path, tmp_path: Path
) -> None:
    beside = start()
    browser.open(f"http://{beside.address}/")
    browser.wait("return !document.getElementById('file').disabled")
    wrong = tmp_path / "text.png"
    wrong.write_text("<script>alert(1)</script>")
    browser.type("#file", str(wrong))
    browser.wait("return document.getElementById('status').className == 'refused'")
    assert "DataError: the image is no JPEG or PNG" in browser.text("#status")
    assert not browser.run(SHOWN)
    browser.type("#file", str(image))
    browser.wait(SHOWN)


def test_the_page_says_where_images_cannot_be_sent(
    start: Start, browser: Browser
) -> None:
    beside = start(described=Description())
    browser.open(f"http://{beside.address}/")
    browser.wait("return document.getElementById('status').className == 'refused'")
    assert "only tensors can be sent" in browser.text("#status")
    assert browser.run("return document.getElementById('file').disabled")


def test_the_page_is_used_by_keyboard_and_on_a_narrow_screen(
    start: Start, browser: Browser, image: Path
) -> None:
    beside = start()
    browser.size(320, 600)
    browser.open(f"http://{beside.address}/")
    browser.wait("return !document.getElementById('file').disabled")
    browser.press(TAB)
    assert browser.run("return document.activeElement.id") == "file"
    assert browser.run("return document.activeElement.labels.length") == 1
    browser.type("#file", str(image))
    browser.wait(SHOWN)
    assert browser.run("return innerWidth") == 320
    root = "document.documentElement"
    assert browser.run(f"return {root}.scrollWidth <= {root}.clientWidth")
    unnamed = """
        return [...document.images].filter((image) => !image.alt).length
    """
    assert browser.run(unnamed) == 0
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.text("[role=status]").startswith("This is: ")


def test_the_policy_lets_no_other_script_run(start: Start, browser: Browser) -> None:
    beside = start()
    browser.open(f"http://{beside.address}/")
    browser.wait("return !document.getElementById('file').disabled")
    assert browser.complaints() == []
    browser.run("""
        const added = document.createElement("script");
        added.textContent = "window.injected = 1";
        document.body.append(added);
    """)
    assert browser.run("return window.injected") is None
    assert any("Content Security Policy" in line for line in browser.complaints())
    refused = browser.run("""
        return fetch("http://localhost:1/").then(() => "sent", (error) => error.name)
    """)
    assert refused == "TypeError"
    assert any("connect-src" in line for line in browser.complaints())
