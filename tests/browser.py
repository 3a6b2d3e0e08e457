"""JupyterLab in a real browser: notebooks are run from a fresh kernel, clicked, and looked at."""
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "runs" / "screenshots"  # not committed: kept by CI as artefacts
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
HARMLESS = ("No handler for the 'capture_scroll'", "favicon", "ResizeObserver", "Failed to load resource")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter(folder: Path) -> Iterator[str]:
    "A JupyterLab server on a folder; its address."
    port = free_port()
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--allow-root",
               "--ServerApp.ip=127.0.0.1", "--ServerApp.log_level=ERROR"]
    there = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {
        "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces")}
    quiet = folder / ".settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=there, stdout=log,
                                  stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                try: urlopen(f"http://127.0.0.1:{port}/api", timeout=1).read(); break
                except OSError: time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


class Lab:
    "A notebook in a browser window of 1280 × 900 px."

    def __init__(self, page, address: str):
        self.page, self.address, self.errors, self.times = page, address, [], {}
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("console", lambda m: m.type == "error" and not any(h in m.text for h in HARMLESS)
                and self.errors.append(m.text))

    def run_all(self, name: str) -> None:
        "Open a notebook and run all its cells; returns at once."
        self.page.goto(f"{self.address}/lab/tree/{name}?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.page.get_by_text("Python 3 (ipykernel) | Idle").or_(self.page.get_by_text("python3 | Idle")).wait_for(
            timeout=90_000)
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        self.start = time.perf_counter()

    def wait(self, condition: str, *args: object, seconds: float = 60) -> None:
        "Until a JavaScript function of `args` is true."
        self.page.wait_for_function(condition, arg=list(args), timeout=1000 * seconds)

    def done(self, seconds: float = 300) -> None:
        "Until every cell has been run; `AssertionError` when one raised, since the rest is left out then."
        self.wait("""() => { const cells = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
            return cells.length && cells.every(c => !c.textContent.includes('*')) }""", seconds=seconds)
        assert not self.failures()
        left = self.page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[ ]").count()
        assert not left, f"{left} cells were not run"

    def failures(self) -> list[str]:
        "Errors that cells show, and those of the browser's console."
        shown = self.page.locator(".jp-OutputArea-output[data-mime-type*=stderr], .jp-RenderedText "
                                  ".ansi-red-fg").all_inner_texts()
        return [*(text[:300] for text in shown if text.strip()), *self.errors]

    def at(self, name: str):
        "The control of a name (`_named` of 60 and 61)."
        return self.page.locator(f".esam3-{name}").first

    def field(self, name: str):
        "Where a control is written into."
        return self.at(name).locator("input").first

    def write(self, name: str, text: str) -> None:
        "Write into a control, as a keyboard does."
        self.field(name).fill(text)
        self.field(name).press("Enter")

    def table(self, name: str) -> dict[str, list[float]]:
        "The full numbers of a table that shows them rounded: row → numbers."
        rows = self.at(name).locator("tr").evaluate_all(
            "rows => rows.map(r => [r.cells[0].innerText, [...r.querySelectorAll('td[title]')].map(c => c.title)])")
        return {row: [float(v) for v in values] for row, values in rows if values}

    def says(self) -> str:
        "The line that tells what happened."
        return self.at("says").inner_text()

    def until(self, what: str, condition: str, *args: object) -> float:
        "Wait for a condition; keep and return how many seconds that took."
        start = time.perf_counter()
        self.wait(condition, *args)
        self.times[what] = round(time.perf_counter() - start, 2)
        return self.times[what]

    def drawn(self, what: str, area: dict[str, float], before: bytes) -> None:
        "Wait until a part of the window looks another way than `before`; keep how many seconds that took."
        start = time.perf_counter()
        while self.page.screenshot(clip=area) == before:
            assert time.perf_counter() - start < 30, f"{what}: the picture does not change"
            time.sleep(0.02)
        self.times[what] = round(time.perf_counter() - start, 2)

    def shot(self, name: str) -> bytes:
        "A screenshot, kept."
        SHOTS.mkdir(parents=True, exist_ok=True)
        return self.page.screenshot(path=SHOTS / f"{name}.png")
