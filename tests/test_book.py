"The book: what is in it, how its pages are made, and that the check of its links notices a broken one."
import json
import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def script(path: str) -> ModuleType:
    "A file of the checkout as a module."
    loader = SourceFileLoader(f"book_{Path(path).stem}", str(ROOT / path))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the book's packages are missing: pip install -e '.[docs]'")
    return script("book/pages.py")


@pytest.fixture(scope="module")
def config(pages):
    from mkdocs.config import load_config
    return load_config(str(ROOT / "mkdocs.yml"))


def test_every_chapter_is_in_the_navigation(config, pages):
    pages.on_config(config)
    found = pages.leaves(config.nav)
    assert len(found) == len(set(found)), "a page stands twice"
    assert {f"nbs/{p.stem}.md" for p in NOTEBOOKS} | {f"api/{name}.md" for name in pages.modules()} <= set(found)
    assert {f"howto/{p.name}" for p in (ROOT / "book" / "howto").iterdir()} <= set(found)


def test_nothing_is_loaded_from_elsewhere(config):
    "Fonts, scripts and the frame in which search runs are the site's own."
    assert config.theme["font"] is False and "offline" in str([*config.plugins])
    assert config.extra["polyfills"] == ["iframe-worker.js"]


def test_a_chapter_keeps_outputs_and_figures(pages, tmp_path):
    figure = {"image/jpeg": "AAAA", "text/plain": "<Figure size 1x1 with 1 Axes>"}
    widget = {pages.WIDGET: {"model_id": "x"}, "text/plain": "VBox(children=())"}
    cells = [("markdown", "# A title\n\n> What it is.", []), ("code", "#| default_exp models.tracker", []),
             ("markdown", "See [stage 1](10_stage1.ipynb#A-batch).", []),
             ("code", "#| export\nx = 1", []), ("code", "show('[x](y.ipynb)')", [figure, widget])]
    made = lambda outputs: [{"output_type": "display_data", "data": data, "metadata": {}} for data in outputs]
    code = lambda outputs: {"outputs": made(outputs), "execution_count": None}
    nb = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": kind, "id": f"c{k}", "metadata": {}, "source": text, **(code(out) if kind == "code" else {})}
        for k, (kind, text, out) in enumerate(cells)]}
    path = tmp_path / "99_made.ipynb"
    path.write_text(json.dumps(nb))
    files = pages.chapter(path)
    page = files.pop("nbs/99_made.md")
    assert [*files.values()] == [b"\x00\x00\x00"] and [*files][0].removeprefix("nbs/") in page
    assert "(10_stage1.md#A-batch)" in page and "(../api/models.tracker.md)" in page
    assert "{.python .library}\nx = 1\n" in page and "{.python}\nshow('[x](y.ipynb)')\n" in page
    assert "#|" not in page and "VBox" not in page and "<Figure" not in page


def test_formulas_are_drawn_by_the_browser(pages):
    html = pages.on_page_content(r'<p><span class="arithmatex">\(\frac{2pt}{p &lt; t}\)</span></p>')
    assert "<math" in html and "<mfrac>" in html and "arithmatex" not in html and "<mi>p</mi><mi>t</mi>" in html


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_lists_begin_after_an_empty_line(path):
    "Jupyter draws a list that does not; Python-Markdown, which the book is made with, runs it into the paragraph."
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "markdown": continue
        text = re.sub(r"```.*?```", "", "".join(cell["source"]), flags=re.DOTALL)
        lines = text.splitlines()
        item = re.compile(r"\s*(?:[-*]|\d+\.) ")
        for before, line in zip(lines, lines[1:]):
            begins = item.match(line) and before.strip() and not item.match(before) and not before.startswith("  ")
            assert not begins, f"{cell['id']}: {line}"


SHAPED = '''
"""A module."""
from typing import NamedTuple

class Stream(NamedTuple):
    "What is read."
    cells: Tensor                # [B*W, L, dim]
    circle: int = 1

class Reader:
    "Reads."
    def __init__(self, dim: int): self.dim = dim

def read(x: Tensor,              # [N, h, w]
         k: int = 2) -> Tensor:  # [N, k]
    "Reads x as in [stage 1](10_stage1.ipynb)."

@patch
def forward(self: Reader, x: Tensor) -> Tensor:
    "[N, dim]."
'''


def test_shapes_of_comments_and_patched_methods_are_in_the_api(tmp_path):
    griffe = pytest.importorskip("griffe", reason="the book's packages are missing: pip install -e '.[docs]'")
    (tmp_path / "shaped.py").write_text(SHAPED)
    extension = script("book/shapes.py").Notebooks()
    module = griffe.load("shaped", search_paths=[tmp_path], extensions=griffe.Extensions(extension))
    assert r"- `cells: Tensor`: \[B\*W, L, dim\]" in module["Stream"].docstring.value
    assert "- `circle: int = 1`" in module["Stream"].docstring.value and "cells" not in module["Stream"].members
    said = module["read"].docstring.value
    assert r"- `x`: \[N, h, w\]" in said and r"- returns: \[N, k\]" in said and "(../nbs/10_stage1.md)" in said
    assert "dim" not in module["Reader"].members and "forward" not in module.members
    assert module["Reader.forward"].docstring.value == "[N, dim]."


SITE = {"index.html": '<a href="a/b.html#there">x</a><img src="i.png"><a href="https://example.org/">x</a>',
        "a/b.html": '<h2 id="there">x</h2><a href="../index.html">x</a><a href="#there">x</a>'}


@pytest.mark.parametrize("page, more, wrong", [
    ("index.html", '<a href="a/c.html">x</a>', "index.html: a/c.html: no such file"),
    ("index.html", '<img src="j.png">', "index.html: j.png: no such file"),
    ("index.html", '<a href="a/b.html#here">x</a>', "index.html: a/b.html#here: no such anchor"),
    ("a/b.html", '<a href="#here">x</a>', "a/b.html: #here: no such anchor"),
    ("index.html", '<script src="https://example.org/x.js"></script>',
     "index.html: https://example.org/x.js: loaded from elsewhere")])
def test_the_check_of_links_notices(tmp_path, page, more, wrong):
    book = script(".ci/book")
    for name, text in SITE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "i.png").write_bytes(b"")
    assert [*book.complaints(tmp_path)] == []
    with open(tmp_path / page, "a") as f: f.write(more)
    assert [*book.complaints(tmp_path)] == [wrong]
