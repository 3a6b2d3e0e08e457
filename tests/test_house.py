"The house: the scripts that measure notebooks, the first page and what it points to, and files that must agree."
import json
import re
import sys
import tempfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def script(name: str):
    "A script of `.ci/` as a module."
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        loader = SourceFileLoader(f"ci_{name}", str(ROOT / ".ci" / name))
        module = module_from_spec(spec_from_loader(loader.name, loader))
        loader.exec_module(module)
        return module
    finally: sys.path.pop(0)


@pytest.fixture(scope="module")
def house(): return script("house")


@pytest.fixture(scope="module")
def outputs(): return script("outputs")


def cell(house, source: str, kind: str = "code", outputs: list = (), id: str = "c"):
    return house.Cell("a_notebook", id, kind, source, list(outputs))


STREAM = {"output_type": "stream", "name": "stdout", "text": "1\n"}


# ---------------------------------------------------------------------------------------------------------- .ci/house
def test_long_lines_are_counted_but_for_rows_of_tables(house):
    long = "x" * 121
    cells = [cell(house, f"a = 1\n# {long}"), cell(house, f"{long}\n| {long} |", "markdown"), cell(house, "x" * 120)]
    assert [(c.kind, k) for c, k, _ in house.long_lines(cells)] == [("code", 2), ("markdown", 1)]


@pytest.mark.parametrize("source, long", [
    ("\n".join(["def f():"] + ["    pass"] * 30), True),
    ("\n".join(["def f():"] + ["    pass"] * 29), False),
    ("TABLE = {\n" + "    1: 2,\n" * 40 + "}", False),
    ("TABLE = {\n" + "    1: 2,\n" * 40 + "} | {k: k for k in range(3)}", True),
    ("@dataclass\nclass A:\n    'fields'\n" + "    a: int = 1  # px\n" * 40, False),
    ("class A:\n" + "    a: int = 1\n" * 40 + "    def f(self): return 1", True),
])
def test_long_cells_are_counted_but_for_tables_of_data(house, source, long):
    assert bool(house.long_cells([cell(house, source)])) == long


def test_rhythm_asks_for_a_demonstration_within_two_cells(house):
    exported, imports = cell(house, "#| export\ndef f(): return 1"), cell(house, "#| export\nimport re")
    demo, prose = cell(house, "f()"), cell(house, "why", "markdown")
    found = lambda *cells: [len(house.undemonstrated([*cells])[0]), house.undemonstrated([*cells])[1]]
    assert found(exported, demo) == found(exported, prose, demo) == found(exported, exported, demo)[:1] + [1] == [0, 1]
    assert found(exported, prose, prose, demo) == found(exported) == [1, 1]
    assert found(imports) == [0, 0]


def test_words_are_found_inside_names_and_in_prose(house):
    cells = [cell(house, "BigThing = ask_twice  # a film"), cell(house, "Two pictures.", "markdown")]
    names, prose = house.words(cells)
    assert (names["big"], names["thing"], names["ask"], names["film"]) == (1, 1, 1, 0)
    assert prose["film"] == prose["pictures"] == 1


def test_check_names_cell_and_line(house):
    cells = [cell(house, "#" * 121, id="c7"), cell(house, "if a:\n" + "    b\n" * 31, id="c8")]
    assert house.complaints(cells) == ["a_notebook c7: line 1 has 121 columns", "a_notebook c8: 32 lines"]


# -------------------------------------------------------------------------------------------------------- .ci/outputs
@pytest.mark.parametrize("source, shows", [
    ("print(1)", True), ("for k in 'ab': print(k)", True), ("x = 1\nx", True), ("x = 1\n(x, 2)", True),
    ("given()", True), ("silent()", False), ("Markdown('a')", True), ("ipywidgets.VBox([])", False),
    ("def f(): print(1)", False), ("def f(): print(1)\nf()", True), ("if x: print(1)", False),
    ("plt.plot([1])", True), ("plt.plot([1]); plt.close()", False), ("x = 1\nx;", False), ("assert x", False),
    ("with redirect_stdout(io.StringIO()) as out: print(1)", False),
    ("#| export\nprint(1)", False), ("#| eval: false\nprint(1)", False), ("%time x\nprint(x)", False),
])
def test_a_cell_that_shows_keeps_an_output(outputs, house, source, shows):
    library = [cell(house, "#| export\ndef given() -> int: return 1\ndef silent() -> None: pass")]
    one = cell(house, source)
    assert bool(outputs.without_output([one], outputs.giving(library))) == shows
    assert not outputs.without_output([cell(house, source, outputs=[STREAM])], outputs.giving(library))


def test_what_varies_is_no_difference(outputs, house):
    said = lambda text: outputs.text_of(cell(house, "f()", outputs=[STREAM | {"text": text}]))
    box = tempfile.gettempdir()
    assert said(f"12.5 ms on 2026-11-25 in {box}/tmpab1/x") == said(f"1,031 ms on 2027-01-02 in {box}/tmpzz9/y")
    pairs = ("J 76.5", "J 76.4"), ("8 frames", "9 frames"), ("8 × 8", "9 × 8")
    for one, other in pairs: assert said(one) != said(other)
    assert said("4.2 ×") == said("4.3 ×")


def notebook(path: Path, *cells: tuple[str, str]) -> Path:
    "A notebook of code cells, each with the text that it is said to have printed."
    of = lambda k, source, text: {"cell_type": "code", "id": f"c{k}", "metadata": {}, "execution_count": None,
                                  "source": source, "outputs": [STREAM | {"text": text}]}
    name = {"name": "python3", "display_name": "python3", "language": "python"}
    path.write_text(json.dumps({"cells": [of(k, *c) for k, c in enumerate(cells)], "metadata": {"kernelspec": name},
                                "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_rerun_finds_outputs_of_older_code(outputs, tmp_path):
    path = notebook(tmp_path / "a.ipynb", ("print(1 + 1)", "2\n"), ("print(3)", "2\n"), ("print(4)  # varies", "5\n"))
    before = path.read_text()
    assert outputs.rerun(path) == ["a c1: other outputs than those kept\n    -2\n    +3"]
    assert path.read_text() == before
    assert "ZeroDivisionError" in outputs.rerun(notebook(tmp_path / "b.ipynb", ("1 / 0", "")))[0]


def test_cheap_notebooks_are_there(outputs):
    assert outputs.notebooks(outputs.CHEAP)
    with pytest.raises(SystemExit, match="no notebook begins with 99z"): outputs.notebooks(["99z"])


# ----------------------------------------------------------------------------------------------------- the first page
def readme() -> str: return (ROOT / "README.md").read_text()


def test_the_first_page_is_short():
    assert len(readme().split()) <= 1500, f"{len(readme().split())} words, tables and code included"


def test_the_first_page_names_every_notebook():
    missing = [p.name for p in NOTEBOOKS if p.name != "index.ipynb" and f"](nbs/{p.name})" not in readme()]
    assert not missing


def tables(path: Path) -> list[str]:
    "Markdown that a notebook keeps as outputs."
    found = [o.get("data", {}) for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    return ["".join(data["text/markdown"]) for data in found if "text/markdown" in data]


def test_the_first_page_holds_what_index_shows():
    found = tables(ROOT / "nbs" / "index.ipynb")
    assert found
    for table in found: assert re.sub(r"\]\((\d\w+\.ipynb[^)]*)\)", r"](nbs/\1)", table).strip() in readme()


def headings(path: Path) -> set[str]:
    "Headings of a notebook as JupyterLab links to them."
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
    lines = [line for c in cells for line in "".join(c["source"]).splitlines() if line.startswith("#")]
    return {line.lstrip("# ").replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text()) if "://" not in link]
    assert links
    for path, _, anchor in (link.partition("#") for link in links):
        assert (ROOT / path).exists(), f"{name} points to {path}"
        assert not anchor or anchor in headings(ROOT / path), f"{name} points to {anchor} in {path}"


def test_each_stage_is_linked_to_its_results():
    for n in (1, 2, 3): assert f"](nbs/80_results.ipynb#Stage-{n})" in readme()


@pytest.mark.parametrize("name", ["index", "80_results"])
def test_tables_are_as_wide_as_a_page(name):
    lines = [line for text in tables(ROOT / "nbs" / f"{name}.ipynb") for line in text.splitlines()]
    rows = [line for line in lines if line.startswith("|")]
    assert rows
    for row in rows: assert row.count("|") <= 7, row


# --------------------------------------------------------------------------------------------------- files that agree
def test_one_version_everywhere():
    from esam3 import __version__
    said = {name: re.search(r'^version\s*[:=]\s*"?([\d.]+)', (ROOT / name).read_text(), re.M)[1]
            for name in ("pyproject.toml", "settings.ini", "CITATION.cff")}
    assert {*said.values()} == {__version__}, said
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_the_gate_and_hooks_keep_the_library_in_sync():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"run": "bash .ci/run"} in workflow["jobs"]["gate"]["steps"]
    hooks = [h for r in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for h in r["hooks"]]
    assert [h["id"] for h in hooks] == ["nbdev_clean", "nbdev_export", "ruff"]
    assert all(h["language"] == "system" for h in hooks)


def test_no_address_leads_nowhere():
    nowhere = "example" + ".invalid"
    for name in ("settings.ini", "pyproject.toml", "README.md", "CITATION.cff", "CONTRIBUTING.md"):
        assert nowhere not in (ROOT / name).read_text(), name


def test_committed_results_use_the_words_of_the_code():
    for path in sorted((ROOT / "nbs" / "results").glob("*.json*")):
        found = re.search(r'"(lesson\w*|asking|asked)"\s*:', path.read_text())
        assert not found, f"{path.name} holds {found[0]}"
