"""Pages of the book that are no files of this folder; mkdocs calls these hooks while it builds.

The home page is README.md, a chapter is a notebook with the outputs that it keeps, a page of the API is a module. No
notebook is run, no module is imported. All of them become Markdown, so that mkdocs itself checks their links."""
import ast, re
from fnmatch import fnmatch
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("core", "schedules", "data", "models", "evaluation", "training", "show")
WIDGET = "application/vnd.jupyter.widget-view+json"  # lives in a kernel only: the book has the figure beside it
FENCE = "`" * 6
TEMPLATE = f"""{{%- extends 'markdown/index.md.j2' -%}}
{{%- macro fenced(text, kind) %}}
{FENCE}{{{{ '{{' }}}}.{{{{ kind }}}}{{{{ '}}' }}}}
{{{{ text | strip_ansi }}}}
{FENCE}
{{% endmacro -%}}
{{%- block input %}}{{{{ fenced(cell.source, cell.metadata.kind) }}}}{{%- endblock -%}}
{{%- block stream %}}{{% if output.name == 'stdout' %}}{{{{ fenced(output.text, 'text .output') }}}}{{% endif %}}{{%- endblock -%}}
{{%- block data_text scoped %}}{{{{ fenced(output.data['text/plain'], 'text .output') }}}}{{%- endblock -%}}
"""
EXPORTER = MarkdownExporter(raw_template=TEMPLATE)


# ---- what there is

def notebooks() -> list[Path]:
    "The chapters, in order."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def modules() -> dict[str, Path]:
    "The library's modules by name below `esam3`, floor by floor, without other names of them."
    found = {".".join(p.relative_to(ROOT / "esam3").with_suffix("").parts): p for floor in FLOORS
             for p in [*(ROOT / "esam3").glob(f"{floor}.py"), *sorted((ROOT / "esam3" / floor).glob("[!_]*.py"))]}
    return found


def shown() -> dict[str, Path]:
    "Files that are shown as they are, by their page."
    beside = {f"{p.parent.name}/{p.name}.md": p for folder in ("data_recipes", "slurm")
              for p in sorted((ROOT / folder).iterdir()) if p.is_file()}
    return beside | {f"files/{name}.md": ROOT / name for name in ("LICENSE", "CITATION.cff")}


def written_in(module: Path) -> str:
    "The notebook that a module is made of."
    return re.search(r"File to edit: \S*/(\S+)\.ipynb", module.read_text())[1]


def first_line(path: Path, pattern: str) -> str:
    "The first match in a notebook's first cell."
    return re.search(pattern, nbformat.read(path, 4).cells[0].source, re.M)[1]


# ---- how it becomes Markdown

def linked(text: str) -> str:
    "Links to notebooks and to files that are shown lead to their pages."
    text = re.sub(r"(\]\((?!\w+:)[^)\s#]*)\.ipynb(?=[)#])", r"\1.md", text)
    text = re.sub(r"(\]\((?:\.\./)*)(LICENSE|CITATION\.cff)\)", r"\1files/\2.md)", text)
    return re.sub(r"(\]\((?:\.\./)*(?:data_recipes|slurm)/[\w.]+\.(?:yaml|sh|sbatch|py))\)", r"\1.md)", text)


def printable(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The same notebook without nbdev's directives and widgets; a cell that becomes the library says so."
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        cell.metadata.kind = "python .library" if re.search(r"^#\|\s*export", cell.source, re.M) else "python"
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    nb.cells = [c for c in nb.cells if c.source.strip()]
    return nb


def chapter(path: Path) -> dict[str, str | bytes]:
    "A notebook's page and its figures, by where they lie in the book."
    nb = nbformat.read(path, 4)
    module = re.search(r"^#\| default_exp (\S+)", "\n".join(c.source for c in nb.cells), re.M)
    home = f"Module [`esam3.{module[1]}`](../api/{module[1]}.md) · " if module else ""
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    body, resources = EXPORTER.from_notebook_node(printable(nb), resources)
    line = f'\n\n<p class="source" markdown>{home}Notebook `nbs/{path.name}`</p>\n'
    body = re.sub(r"\A(\s*# .*(?:\n\n>.*(?:\n.+)*)?)", lambda m: m[1] + line, body)
    return {f"nbs/{path.stem}.md": linked(body),
            **{f"nbs/{name}": data for name, data in resources["outputs"].items()}}


def api(name: str, path: Path) -> str:
    "The page of a module."
    notebook = written_in(path)
    return f"# esam3.{name}\n\nWritten in chapter [{notebook}](../nbs/{notebook}.md).\n\n::: esam3.{name}\n"


def api_index() -> str:
    "A table of all modules, by floor."
    line = lambda path: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    rows = [f"| [{name}]({name}.md) | {line(path)} |" for name, path in modules().items()]
    return "\n".join(["# API", "", "Modules in the order of their floors: each imports from its own and those above it "
                      "in this table. Shapes are in brackets: `[N, h, w]`.", "", "| module | what it holds |",
                      "| --- | --- |", *rows])


def as_it_is(path: Path) -> str:
    "A page that shows a file."
    kind = {".yaml": "yaml", ".cff": "yaml", ".py": "python", ".sh": "bash", ".sbatch": "bash"}.get(path.suffix, "text")
    return f"# {path.name}\n\n{FENCE}{kind}\n{path.read_text()}\n{FENCE}\n"


# ---- what mkdocs calls

def name_of(page: str) -> str:
    "What a page is called in the navigation."
    where, _, name = page.removesuffix(".md").partition("/")
    if where == "nbs": return f"{name.split('_')[0]} {first_line(ROOT / 'nbs' / f'{name}.ipynb', r'^# (.+)')}"
    return name.rpartition(".")[2] if where == "api" else name


def filled(nav: Any, pages: list[str], named: set[str]) -> Any:
    "The navigation with pages put in for patterns."
    if isinstance(nav, list): return [entry for part in nav for entry in _entries(part, pages, named)]
    return [{name_of(p): p} for p in pages if fnmatch(p, nav) and p not in named] if "*" in nav else nav


def _entries(part: str | dict, pages: list[str], named: set[str]) -> list:
    if isinstance(part, dict): return [{title: filled(inner, pages, named) for title, inner in part.items()}]
    return filled(part, pages, named) if "*" in part else [part]


def leaves(nav: Any) -> list[str]:
    "All pages and patterns of a navigation."
    if isinstance(nav, str): return [nav]
    return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(part)]


def on_config(config: MkDocsConfig) -> None:
    "Fill the navigation."
    pages = [*(f"nbs/{p.stem}.md" for p in notebooks()), *(f"api/{name}.md" for name in modules()), *shown()]
    config.nav = filled(config.nav, pages, set(leaves(config.nav)))


def on_files(files: Files, config: MkDocsConfig) -> None:
    "Add the pages and their figures."
    made = {"index.md": linked((ROOT / "README.md").read_text()), "api/index.md": api_index()}
    made |= {name: linked((ROOT / name).read_text()) for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    made |= {f"nbs/images/{p.name}": p.read_bytes() for p in (ROOT / "nbs" / "images").iterdir()}
    for path in notebooks(): made |= chapter(path)
    made |= {f"api/{name}.md": api(name, path) for name, path in modules().items()}
    made |= {page: as_it_is(path) for page, path in shown().items()}
    for name, content in made.items(): files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    "Homes of the glossary's terms are links to the API."
    if page.file.src_uri != "nbs/00b_glossary.md": return markdown
    return re.sub(r"\| `([\w.]+)` \|$", r"| [`\1`][esam3.\1] |", markdown, flags=re.M)


def on_page_content(html: str, **_: Any) -> str:
    "Formulas as MathML, which browsers draw by themselves."
    formula = lambda tex: convert(re.sub(r"(?<=\d)(?=[a-z])", " ", unescape(tex)))  # 2pt is a product, not a length
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: formula(m[1]), html, flags=re.S)
