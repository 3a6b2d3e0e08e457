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
FLOORS = ("runtime", "core", "schedules", "data", "models", "evaluation", "training", "show", "use")
WIDGET = "application/vnd.jupyter.widget-view+json"  # lives in a kernel only: the book has the figure beside it
EXPORTER = MarkdownExporter(raw_template=Path(__file__).with_name("chapter.md.j2").read_text())


# ---- what there is

def notebooks() -> list[Path]:
    "The chapters, in order."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def modules() -> dict[str, Path]:
    "The library's modules by name below `esam3`, floor by floor, without other names of them."
    top = ROOT / "esam3"
    found = [p for floor in FLOORS for p in [*top.glob(f"{floor}.py"), *sorted((top / floor).glob("[!_]*.py"))]]
    return {".".join(p.relative_to(top).with_suffix("").parts): p for p in found}


def shown() -> dict[str, Path]:
    "Files that are shown as they are, by their page."
    beside = {f"{p.parent.name}/{p.name}.md": p for folder in ("data_recipes", "slurm")
              for p in sorted((ROOT / folder).iterdir()) if p.is_file()}
    return beside | {f"files/{name}.md": ROOT / name for name in ("LICENSE", "CITATION.cff")}


def written_in(module: Path) -> str:
    "The notebook that a module is made of."
    return re.search(r"File to edit: \S*/(\S+)\.ipynb", module.read_text())[1]


def title(path: Path) -> str:
    "A notebook's heading."
    return re.match("# (.+)", nbformat.read(path, 4).cells[0].source)[1]


# ---- how it becomes Markdown

def linked(text: str) -> str:
    "Links to notebooks and to files that are shown lead to their pages."
    text = re.sub(r"(\]\((?!\w+:)[^)\s#]*)\.ipynb(?=[)#])", r"\1.md", text)
    text = re.sub(r"(\]\((?:\.\./)*)(LICENSE|CITATION\.cff)\)", r"\1files/\2.md)", text)
    return re.sub(r"(\]\((?:\.\./)*(?:data_recipes|slurm)/[\w.]+\.(?:yaml|sh|sbatch|py))\)", r"\1.md)", text)


def as_page(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "A cell without nbdev's directives and widgets; one that becomes the library says so."
    if cell.cell_type == "markdown":
        cell.source = linked(cell.source)
        return cell
    cell.metadata.kind = "python .library" if re.search(r"^#\|\s*export", cell.source, re.M) else "python"
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    for data in (o.data for o in cell.outputs if "text/markdown" in o.get("data", {})):
        data["text/markdown"] = linked(data["text/markdown"])
    return cell


def origin(path: Path, code: str) -> str:
    "A line that says which notebook a chapter is, and which module is made of it."
    module = re.search(r"^#\| default_exp (\S+)", code, re.M)
    home = f"Module [`esam3.{module[1]}`](../api/{module[1]}.md) · " if module else ""
    return f'<p class="source" markdown>{home}Notebook `nbs/{path.name}`</p>'


def chapter(path: Path) -> dict[str, str | bytes]:
    "A notebook's page and its figures, by where they lie in the book."
    nb = nbformat.read(path, 4)
    line = origin(path, "\n".join(c.source for c in nb.cells))
    nb.cells = [c for c in map(as_page, nb.cells) if c.source.strip()]
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    body, resources = EXPORTER.from_notebook_node(nb, resources)
    head = re.match(r"\s*# .*(?:\n\n>.*(?:\n.+)*)?", body)[0]  # the title, and what it is
    figures = {f"nbs/{name}": data for name, data in resources["outputs"].items()}
    return {f"nbs/{path.stem}.md": f"{head}\n\n{line}\n{body.removeprefix(head)}", **figures}


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
    return f"# {path.name}\n\n``````{kind}\n{path.read_text()}\n``````\n"


# ---- what mkdocs calls

def name_of(page: str) -> str:
    "What a page is called in the navigation."
    where, _, name = page.removesuffix(".md").partition("/")
    if where == "nbs": return f"{name.split('_')[0]} {title(ROOT / 'nbs' / f'{name}.ipynb')}"
    return name.rpartition(".")[2] if where == "api" else name


def filled(nav: Any, pages: list[str], named: set[str]) -> Any:
    "The navigation with pages put in for patterns; not those that are `named` elsewhere."
    if isinstance(nav, dict): return {name: filled(inner, pages, named) for name, inner in nav.items()}
    if isinstance(nav, list): return [filled(part, pages, named) for part in nav]
    return [{name_of(p): p} for p in pages if fnmatch(p, nav) and p not in named] if "*" in nav else nav


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
    made = {"index.md": (ROOT / "README.md").read_text(), "api/index.md": api_index()}
    made |= {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    made |= {f"nbs/images/{p.name}": p.read_bytes() for p in (ROOT / "nbs" / "images").iterdir()}
    for path in notebooks(): made |= chapter(path)
    made |= {f"api/{name}.md": api(name, path) for name, path in modules().items()}
    made |= {page: as_it_is(path) for page, path in shown().items()}
    for name, content in made.items(): files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    "Links lead to pages (a chapter's do already), and the homes of the glossary's terms to the API."
    where = page.file.src_uri
    if where == "nbs/00b_glossary.md":
        return re.sub(r"\| `([\w.]+)` \|$", r"| [`\1`][esam3.\1] |", markdown, flags=re.M)
    return markdown if where.startswith("nbs/") else linked(markdown)


def on_page_content(html: str, **_: Any) -> str:
    "Formulas as MathML, which browsers draw by themselves."
    apart = lambda m: f" {' '.join(m[0])}"  # 2pt is a product, not a length
    formula = lambda tex: convert(re.sub(r"(?<=\d)[a-z]+", apart, unescape(tex)))
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: formula(m[1]), html, flags=re.S)
