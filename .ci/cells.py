"Cells of the notebooks, as `.ci/house` and `.ci/outputs` look at them."
import ast, json, re
from dataclasses import dataclass, field
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"


@dataclass(frozen=True)
class Cell:
    "One cell: where it is, what it says, and what it left."
    notebook: str  # file name without its ending
    id: str
    kind: str      # code or markdown
    source: str
    outputs: list[dict] = field(default_factory=list, compare=False)

    @property
    def exported(self) -> bool: return bool(re.search(r"^#\|\s*exports?\b", self.source, re.M))

    @property
    def lines(self) -> list[str]: return self.source.splitlines()

    @property
    def tree(self) -> ast.Module:
        "Its syntax, without lines that only a notebook understands (`%magic`, `!command`)."
        return ast.parse(re.sub(r"^\s*[%!].*$", "pass", self.source, flags=re.M))


def cells_of(path: Path) -> list[Cell]:
    "All cells of a notebook, in order."
    cells = json.loads(path.read_text())["cells"]
    return [Cell(path.stem, c.get("id", str(k)), c["cell_type"], "".join(c["source"]), c.get("outputs", []))
            for k, c in enumerate(cells)]


def notebooks(names: list[str], folder: Path = NBS) -> dict[str, list[Cell]]:
    "Cells of the notebooks named by file or by the start of it (`01a`); of all where none is named."
    found = {p.stem: p for p in sorted(folder.glob("[!_.]*.ipynb"))}
    wanted = [Path(n).stem for n in names]
    for n in wanted:
        if not any(stem.startswith(n) for stem in found): raise SystemExit(f"no notebook begins with {n}")
    return {stem: cells_of(p) for stem, p in found.items() if not wanted or stem.startswith(tuple(wanted))}
