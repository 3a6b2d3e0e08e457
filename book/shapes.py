"""What of this library's style griffe does not know: methods that `@patch` gives to a class, and shapes that stand as a
comment behind a field or a parameter (`masks: Tensor  # [N, h, w]`)."""
import ast, io, re, textwrap, tokenize
from collections.abc import Iterator

import griffe


def comments(lines: list[str]) -> dict[int, str]:
    "Comments of some lines of code as Markdown, by line from 1."
    found, code = {}, textwrap.dedent("\n".join(lines)) + "\n"
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT: found[token.start[0]] = as_markdown(token.string.lstrip("# "))
    return found


def as_markdown(text: str) -> str:
    "The same words, none of them read as emphasis, link or tag; code between backticks stays."
    words = re.split(r"(`[^`]*`)", text)
    return "".join(w if w.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", w) for w in words)


def linked(text: str) -> str:
    "Links to notebooks lead from a page of the API to their chapters."
    return re.sub(r"\]\((\w+)\.ipynb(?=[)#])", r"](../nbs/\1.md", text)


def described(thing: griffe.Object, text: str) -> None:
    "Add to what an object says of itself."
    said = f"{thing.docstring.value}\n\n" if thing.docstring else ""
    thing.docstring = griffe.Docstring(said + text, parent=thing)


def parameters(function: griffe.Function) -> list[str]:
    "A line of a list for each parameter with a comment behind it, and for what is returned."
    notes = comments(function.lines)
    node = ast.parse(textwrap.dedent("\n".join(function.lines))).body[0]
    names = {a.end_lineno: f"`{a.arg}`" for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
    if node.returns: names[node.returns.end_lineno] = "returns"
    return [f"- {name}: {notes[line]}" for line, name in names.items() if line in notes]


def field(thing: griffe.Attribute) -> str:
    "A line of a list: a field with its type, its default and the comment behind it."
    default = f" = {thing.value}" if thing.value is not None else ""
    note = comments(thing.lines)
    return f"- `{thing.name}: {thing.annotation}{default}`" + (f": {note[max(note)]}" if note else "")


def fields(owner: griffe.Class) -> list[griffe.Attribute]:
    "Annotated attributes of a class's body."
    return [a for a in own(owner, griffe.Kind.ATTRIBUTE) if a.annotation is not None and not in_method(owner, a)]


def in_method(owner: griffe.Class, thing: griffe.Attribute) -> bool:
    "Whether an attribute is set by a method (`self.x = …`)."
    return any(f.lineno <= thing.lineno <= f.endlineno for f in own(owner, griffe.Kind.FUNCTION))


def own(place: griffe.Object, kind: griffe.Kind) -> list[griffe.Object]:
    "What of a kind is defined in a module or class itself."
    return [m for m in place.members.values() if not m.is_alias and m.kind is kind]


def parts(place: griffe.Object) -> Iterator[griffe.Object]:
    "What is defined in a module or class, and in what is defined there."
    for member in [m for m in place.members.values() if not m.is_alias]:
        yield member
        yield from parts(member)


def give_methods(module: griffe.Module) -> None:
    "A function that is patched belongs to the classes that its `self` names."
    for f in own(module, griffe.Kind.FUNCTION):
        if not any(str(d.value) == "patch" for d in f.decorators): continue
        module.del_member(f.name)
        for name in re.findall(r"\w+", str(f.parameters[0].annotation)):
            if name in module.members: module[name].set_member(f.name, f)


def list_fields(owner: griffe.Class) -> None:
    "Fields become a list in the class's docstring; what its methods keep for themselves is left out."
    found = fields(owner)
    if found: described(owner, "\n".join(map(field, found)))
    for a in own(owner, griffe.Kind.ATTRIBUTE):
        if a in found or in_method(owner, a): owner.del_member(a.name)


class Notebooks(griffe.Extension):
    "Reads a package as its notebooks mean it."

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        for module in [pkg, *(m for m in parts(pkg) if m.is_module)]: give_methods(module)
        for thing in [*parts(pkg)]:
            if thing.docstring: thing.docstring.value = linked(thing.docstring.value)
            if thing.is_class: list_fields(thing)
            if thing.is_function and (lines := parameters(thing)): described(thing, "\n".join(lines))
            if thing.is_attribute and (notes := comments(thing.lines)): described(thing, notes[max(notes)])
