"""The demo page in a browser. Without Gradio (the extra [demo]) there is no page to try.

A screenshot is left in `runs/screenshots`."""
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from browser import CHROMIUM, SHOTS, free_port

pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    "A page with the shipped student, in a process of its own."
    port = free_port()
    there = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    code = "from esam3.use.command_line import main; main(['demo'])"
    server = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=there)
    try:
        for _ in range(240):
            try: urlopen(f"http://127.0.0.1:{port}", timeout=1).read(); break
            except OSError: time.sleep(0.5)
        else: raise AssertionError("the page did not come up in two minutes")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def test_a_phrase_and_a_click(address):
    "An example is chosen, a phrase found, an object clicked on; a word that the model does not know is said."
    with playwright.sync_playwright() as p:
        page = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page(
            viewport={"width": 1280, "height": 900})
        page.set_default_timeout(40_000)
        page.goto(address)
        page.get_by_text("an exercise, not a finding").first.wait_for()
        page.locator(".gallery button, button.gallery-item").first.click()
        page.locator("button img, .image-frame img").first.wait_for()
        page.get_by_label("phrase").fill("a green star")
        page.get_by_role("button", name="find").click()
        page.get_by_text("2 found").first.wait_for()
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "demo.png", full_page=True)
        page.get_by_label("phrase").fill("a zebra")
        page.get_by_role("button", name="find").click()
        page.get_by_text("knows no word of it").first.wait_for()
        page.get_by_label("phrase").fill("")
        page.locator(".image-frame img, button img").first.click(position={"x": 130, "y": 170})
        page.get_by_text("1 found").first.wait_for()
        page.screenshot(path=SHOTS / "demo-click.png", full_page=True)
