"""Names that a `.pyi` declares, and which of them a module lacks.

Run as a program, `python declared.py MODULE` reads the names as JSON and prints what is missing:
in a process of its own, since the modules of two TensorRT versions do not fit in one.
"""

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import NamedTuple


class Name(NamedTuple):
    """`IBuilderConfig.set_flag`, what kind of thing it is, and the names of its arguments."""

    path: str
    kind: str  # class, value, settable, property, call
    arguments: list[str] = []  # noqa: RUF012 (never changed)


def declared(stub: Path) -> list[Name]:
    """Everything that a stub names; private classes count for those that inherit from them."""
    tree = ast.parse(stub.read_text("utf-8"))
    bases = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return [name for node in tree.body for name in _names(node, "", bases)]


def _names(node: ast.stmt, owner: str, bases: dict[str, ast.ClassDef]) -> list[Name]:
    match node:
        case ast.ClassDef(name=name) if not name.startswith("_"):
            inherited = [
                bases[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id[0] == "_"
            ]
            bodies = [*node.body, *(part for base in inherited for part in base.body)]
            inner = [entry for part in bodies for entry in _names(part, f"{owner}{name}.", bases)]
            return [Name(owner + name, "class"), *inner]
        case ast.FunctionDef(name="__iter__"):
            return []  # Python finds it through __getitem__
        case ast.FunctionDef(name=name):
            if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
                return [Name(owner + name, "property")]
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            return [Name(owner + name, "call", [a for a in arguments if a != "self"])]
        case ast.AnnAssign(target=ast.Name(id=name)):
            # In a class, a plain annotation is an attribute that we set.
            value = not owner or ast.unparse(node.annotation).startswith("ClassVar")
            return [Name(owner + name, "value" if value else "settable")]
        case ast.Assign(targets=[ast.Name(id=name)]):
            return [Name(owner + name, "value")]
    return []


def missing(module: object, names: list[Name]) -> list[str]:
    """What a module lacks or has in another form, in words."""
    problems = []
    for name in names:
        problem = _problem(module, name)
        if problem:
            problems.append(f"{name.path}{problem}")
    return problems


def _problem(module: object, name: Name) -> str:
    found = module
    for part in name.path.split("."):
        if not hasattr(found, part):
            return " is missing"
        found = getattr(found, part)
    if name.kind == "settable" and isinstance(found, property) and found.fset is None:
        return " cannot be set"
    if name.kind == "property" and callable(found):
        return " is a method"
    dunder = name.path.rpartition(".")[2].startswith("__") and name.path[-8:] != "__init__"
    if name.kind == "call" and not dunder and not _accepts(found, name):
        return f" does not take ({', '.join(name.arguments)}): {found.__doc__}"
    return ""


def _accepts(function: object, name: Name) -> bool:
    """Whether one of the signatures in the docstring has these arguments, and no other needed."""
    for given, optional in _signatures(function.__doc__ or "", name.path.rpartition(".")[2]):
        count = len(name.arguments)
        if given[:count] == name.arguments and all(optional[count:]):
            return True
    return False


def _signatures(doc: str, name: str) -> list[tuple[list[str], list[bool]]]:
    """Argument names of `f(self: T, a: int, b: int = 0) -> None`, and which have a default."""
    signatures = []
    for line in doc.splitlines():
        before, opening, rest = line.partition(f"{name}(")
        if not opening or before.strip().rstrip("0123456789.") or "*args" in rest:
            continue
        arguments = [a for a in _split(rest) if a and a.partition(":")[0] != "self"]
        names = [a.partition(":")[0].partition("=")[0].split()[-1] for a in arguments]
        signatures.append((names, ["=" in a for a in arguments]))
    return signatures


def _split(text: str) -> list[str]:
    """The arguments before the closing bracket, split at commas outside of brackets."""
    parts, depth = [""], 0
    for char in text.replace("->", ""):
        if char in "([<":
            depth += 1
        elif char in ")]>":
            depth -= 1
        if depth < 0:
            break
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


if __name__ == "__main__":
    wanted = [Name(*entry) for entry in json.load(sys.stdin)]
    print(json.dumps(missing(importlib.import_module(sys.argv[1]), wanted)))
