"""The plan of the house as a test: layers, no circle, few arrows, line caps (docs/architecture.md has the picture)."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from distil.testing import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"common"}
MODULES = [
    *ROOT.glob("*.py"),
    *ROOT.glob("distil/**/*.py"),
    *ROOT.glob("bench/**/*.py"),
    *ROOT.glob("data/**/*.py"),
]
TOP_ROOMS = ("teachers", "serving")
TESTING = "distil.testing"  # of tests and bench, so it counts with them


def name_of(path: Path) -> str:
    """Return the dotted name of a file; a folder's __init__.py has the folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}
PACKAGES = {name for name, path in NAMES.items() if path.name == "__init__.py"}


def imports_in(path: Path) -> set[str]:
    """Return all names that a file imports, also inside functions and by strings; relative imports are resolved."""
    folder = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def imports_of(path: Path) -> set[str]:
    """Return the modules of this project that a file imports."""
    return {name for name in imports_in(path) if name in NAMES or name.split(".")[0] in ("tests", "conftest")}


def layer(name: str) -> int:
    parts = name.split(".")
    if parts[0] != "distil":
        return 0 if name == "common" else 4 if name in SCRIPTS else 5
    if name == TESTING:
        return 5
    flat = len(parts) == 1 or (len(parts) == 2 and name not in PACKAGES)
    return 1 if flat else 3 if parts[1] in TOP_ROOMS else 2


def room(name: str) -> str:
    """Return common, distil (its flat modules), distil.<folder>, bench, data, or the script itself."""
    parts = name.split(".")
    inner = parts[0] == "distil" and (len(parts) > 2 or name in PACKAGES)
    return ".".join(parts[:2]) if inner else parts[0]


ARROWS = {(name, other) for name, path in NAMES.items() for other in imports_of(path)}
PRODUCT = {name for name in NAMES if layer(name) < 5}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_module_imports_only_what_is_below_it(name):
    for other in sorted(imports_of(NAMES[name])):
        assert other.split(".")[0] not in ("tests", "conftest"), other
        same_room = room(name) == room(other) and layer(name) == layer(other)
        helpers = other == TESTING and room(name) in ("bench", "data")
        assert layer(other) < layer(name) or same_room or helpers, f"{name} imports {other}"


def test_module_graph_has_no_circle():
    graph = {name: {other for one, other in ARROWS if one == name} for name in NAMES}
    assert list(TopologicalSorter(graph).static_order())


def test_rooms_have_at_most_5_levels_and_60_arrows():
    between = {(room(a), room(b)) for a, b in ARROWS if a in PRODUCT and room(a) != room(b)}
    level: dict[str, int] = {}
    for name in TopologicalSorter({r: {b for a, b in between if a == r} for r, _ in between}).static_order():
        level[name] = 1 + max((level[b] for a, b in between if a == name), default=0)
    assert max(level.values()) <= 5
    assert len(between) <= 60, len(between)


@pytest.mark.parametrize("name", sorted(name for name in NAMES if layer(name) < 5 or room(name) == "bench"))
def test_modules_and_functions_keep_their_caps(name):
    """Files of at most 335 lines, common.py 480 (benches are exempt); functions of at most 80."""
    text = NAMES[name].read_text()
    assert room(name) == "bench" or len(text.splitlines()) <= (480 if name == "common" else 335)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, node.name


def test_python_outside_tests_bench_and_data_is_at_most_15990_lines():
    assert sum(len(NAMES[name].read_text().splitlines()) for name in PRODUCT) <= 15990


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.startswith("distil.")))
def test_no_module_below_a_script_takes_parsed_flags(name):
    """Functions of distil take values or a mapping of flags: no argparse.Namespace, no attribute of `args`."""
    path = NAMES[name]
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert "argparse.Namespace" not in imports_in(path)
    attributes = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not {text for text in attributes | names | strings if text.split(".")[-1] == "Namespace"}
    assert not {text for text in attributes if text.startswith("args.")}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_module_writes_into_parsed_flags(name):
    for node in ast.walk(ast.parse(NAMES[name].read_text())):
        assert not (isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and is_args(node.value))
        call = ast.unparse(node) if isinstance(node, ast.Call) else ""
        assert not call.startswith(("setattr(args,", "vars(args).update(")), call


def is_args(node: ast.AST) -> bool:
    """Return whether an expression is named like the result of parse_args."""
    return isinstance(node, ast.Name) and node.id in ("args", "namespace")


@pytest.mark.parametrize("path", [*MODULES, *ROOT.glob("tests/**/*.py")], ids=lambda path: str(path.relative_to(ROOT)))
def test_import_path_is_left_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "site.addsitedir"))
    assert not {"sys.path", "site.addsitedir"} & imports_in(path)
