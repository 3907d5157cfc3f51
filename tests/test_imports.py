"""The import rule: what may know of what, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "export", "serving", "benchmarks")
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "vitrine.py",
        *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")),
    )
]
FORBIDDEN = {
    "engine": {"export", "serving", "benchmarks", "vitrine"},
    "export": {"serving", "benchmarks", "vitrine"},
    "serving": {"export", "benchmarks", "vitrine"},
    "benchmarks": {"vitrine"},
}
TORCH = {"torch", "torchvision", "diffusers", "transformers", "peft", "safetensors", "accelerate"}
TORCH_PLACES = (
    "engine/networks/",
    "engine/training/",
    "engine/backends/torch.py",
    "export/",
    "benchmarks/class_consistency.py",  # trains its judge
    "benchmarks/selection.py",  # torch is what it compares with
)
RUNTIMES = {"onnxruntime", "openvino", "tensorrt", "tritonclient", "pytriton"}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def source(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text("utf-8"), file)


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Top-level names of the packages that any of the nodes imports."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def when_imported(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, no TYPE_CHECKING."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    children = node.orelse if typing_only else ast.iter_child_nodes(node)
    for child in children:
        yield from when_imported(child)


def test_there_are_files_to_read() -> None:
    assert {"vitrine.py", "engine/pipeline.py", "export/onnx.py", "serving/client.py"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_packages_know_only_of_what_is_below_them(file: str) -> None:
    forbidden = FORBIDDEN.get(file.partition("/")[0], set())
    assert not imports(ast.walk(source(file))) & forbidden


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith(TORCH_PLACES)])
def test_torch_is_imported_by_networks_training_and_export_only(file: str) -> None:
    assert not imports(when_imported(source(file))) & TORCH


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("engine/backends/")])
def test_a_runtime_is_imported_only_where_it_is_used(file: str) -> None:
    assert not imports(when_imported(source(file))) & RUNTIMES


@pytest.mark.parametrize("file", FILES)
def test_nothing_unpickles(file: str) -> None:
    nodes = list(ast.walk(source(file)))
    assert not imports(iter(nodes)) & PICKLERS
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.jit.load", "torch.package.PackageImporter"}
    arguments = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    assert "allow_pickle" not in arguments
