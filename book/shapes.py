"""What of this library's style griffe does not know: methods that `@patch` gives to a class, and shapes that stand as a
comment behind a field or a parameter (`masks: Tensor  # [N, h, w]`)."""
import ast, io, re, textwrap, tokenize
from collections.abc import Iterator

import griffe


def comments(lines: list[str]) -> dict[int, str]:
    "Comments of some lines of code, by line from 1."
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent("\n".join(lines)) + "\n").readline)
    try: return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    except tokenize.TokenError: return {}


def linked(text: str) -> str:
    "Links to notebooks lead from a page of the API to their chapters."
    return re.sub(r"\]\((\w+)\.ipynb(?=[)#])", r"](../nbs/\1.md", text)


def described(thing: griffe.Object, text: str) -> None:
    "Add to what an object says of itself."
    said = f"{thing.docstring.value}\n\n" if thing.docstring else ""
    thing.docstring = griffe.Docstring(said + text, parent=thing)


def parameters(function: griffe.Function) -> list[str]:
    "A line of a list for each parameter with a comment behind it."
    notes = comments(function.lines)
    node = ast.parse(textwrap.dedent("\n".join(function.lines))).body[0]
    last = {a.end_lineno: a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
    return [f"- `{name}`: {notes[line]}" for line, name in last.items() if line in notes]


def parts(place: griffe.Object) -> Iterator[griffe.Object]:
    "What is defined in a module or class, and in what is defined there."
    for member in [*place.members.values()]:
        if member.is_alias: continue
        yield member
        yield from parts(member)


def patched(module: griffe.Module) -> Iterator[tuple[griffe.Function, str]]:
    "Functions that are methods of a class of the module, and that class's name."
    for f in [*module.functions.values()]:
        if f.is_alias or not any(str(d.value) == "patch" for d in f.decorators): continue
        for name in re.findall(r"\w+", str(f.parameters[0].annotation)): yield f, name


class Notebooks(griffe.Extension):
    "Reads a package as its notebooks mean it."

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        for module in [pkg, *(m for m in parts(pkg) if m.is_module)]:
            for function, owner in patched(module): self._give(module, function, owner)
        for thing in parts(pkg):
            if thing.docstring: thing.docstring.value = linked(thing.docstring.value)
            if thing.is_attribute: self._attribute(thing)
            if thing.is_function and (lines := parameters(thing)): described(thing, "\n".join(lines))

    def _give(self, module: griffe.Module, function: griffe.Function, owner: str) -> None:
        if owner in module.classes: module.classes[owner].set_member(function.name, function)
        if function.name in module.members and owner in module.classes: module.del_member(function.name)

    def _attribute(self, thing: griffe.Attribute) -> None:
        if not thing.docstring and (notes := comments(thing.lines)): described(thing, notes[max(notes)])
