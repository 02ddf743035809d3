"""The web page: the cast of a session, the examples, and the page in a real browser."""

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from PIL import Image

from idavlm.data import DataError
from idavlm.data.photos import PhotoLoader
from idavlm.inference.web_page import add_to_cast, drawn_examples
from tests.small_models import draw_images, small_model, small_processor


@pytest.fixture
def photos(tmp_path):
    draw_images(tmp_path, ["kate.png", "tom.png", "scene.png"])
    return tmp_path


def test_photos_are_added_to_a_cast(photos):
    cast = add_to_cast({}, "  Kate ", [str(photos / "kate.png")])
    cast = add_to_cast(cast, "Tom", [str(photos / "tom.png")])
    cast = add_to_cast(cast, "Kate", [str(photos / "tom.png")])
    assert {name: len(of) for name, of in cast.items()} == {"Kate": 2, "Tom": 1}
    with pytest.raises(ValueError, match="The name is empty"):
        add_to_cast({}, " ", [str(photos / "kate.png")])
    with pytest.raises(ValueError, match="There is no photo of Kate"):
        add_to_cast({}, "Kate", [])
    (photos / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        add_to_cast({}, "Kate", [str(photos / "text.png")])
    with pytest.raises(DataError, match="more than max_pixels=10"):
        add_to_cast({}, "Kate", [str(photos / "kate.png")], PhotoLoader(max_pixels=10))


def test_examples_are_drawn_and_reproducible():
    first, second = drawn_examples(size=64), drawn_examples(size=64)
    assert [example.question for example in first] == ["Where is Kate?", "What is Tom doing?", "What is Alice doing?"]
    for one, other in zip(first, second, strict=True):
        assert one.scene.tobytes() == other.scene.tobytes()
        assert {len(photos) for photos in one.cast.values()} == {2}
        assert set(one.cast) >= {"Tom", "Alice"}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a small model, served by the command in a process of its own."""
    pytest.importorskip("gradio", reason="the web page needs gradio")
    folder = tmp_path_factory.mktemp("model")
    processor = small_processor()
    small_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    command = [sys.executable, "-m", "idavlm.cli.main", "web", "--model", str(folder), "--port", "17860"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        url = "http://127.0.0.1:17860"
        try:
            for _ in range(240):
                time.sleep(0.5)
                assert process.poll() is None, process.stdout.read()
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    continue
            seconds = sum(psutil.Process(process.pid).cpu_times()[:2])
            assert seconds < 10, "seconds of a processor, which other work on the machine does not change"
            yield url
        finally:
            process.terminate()


def test_a_visitor_uploads_a_cast_and_asks(address, photos):
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        page.set_default_timeout(60_000)
        page.goto(address)
        upload(page, "#photos input[type=file]", photos / "kate.png")
        page.fill("#name textarea, #name input", "Kate")
        page.click("#add")
        page.wait_for_selector("#cast img")
        upload(page, "#scene input[type=file]", photos / "scene.png")
        page.wait_for_selector("#scene img")
        page.fill("#question textarea, #question input", "Where is Kate?")
        page.click("#ask")
        page.wait_for_selector("#boxes img")
        page.wait_for_selector("#map img")

        # Without an image the page says what is missing, and stays usable.
        page.reload()
        page.fill("#question textarea, #question input", "Where is Kate?")
        page.click("#ask")
        page.get_by_text("There is no image; upload one.").wait_for()
        page.click("#example-0")
        page.wait_for_selector("#scene img")
        page.click("#ask")
        page.wait_for_selector("#map img")
        browser.close()


def upload(page, selector: str, file: Path) -> None:
    with Image.open(file) as image:
        assert image.size
    page.set_input_files(selector, str(file))
