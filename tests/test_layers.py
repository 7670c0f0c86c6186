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
    *ROOT.glob("bench/*.py"),
    *ROOT.glob("data/*.py"),
]
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES if path.name != "__init__.py"
}
TOP_ROOMS = ("teachers", "serving")


def imports_of(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name in NAMES or name.split(".")[0] in ("tests", "conftest")}


def layer(name: str) -> int:
    parts = name.split(".")
    if parts[0] != "distil":
        return 0 if name == "common" else 4 if name in SCRIPTS else 5
    if name == TESTING:
        return 4
    return 1 if len(parts) == 2 else 3 if parts[1] in TOP_ROOMS else 2


def room(name: str) -> str:
    """Return common, distil (its flat modules), distil.<folder>, or the script itself."""
    return ".".join(name.split(".")[:2]) if name.count(".") == 2 else name.split(".")[0]


TESTING = "distil.testing"  # of tests and bench, so it counts with them
ARROWS = {(name, other) for name, path in NAMES.items() for other in imports_of(path)}
PRODUCT = {name for name in NAMES if name.split(".")[0] not in ("bench", "data")} - {TESTING}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_module_imports_only_what_is_below_it(name):
    for other in sorted(imports_of(NAMES[name])):
        assert other.split(".")[0] not in ("tests", "conftest"), other
        same_room = room(name) == room(other) and layer(name) in (1, 2, 3, 5) and other not in SCRIPTS
        assert layer(other) < layer(name) or same_room, f"{name} imports {other}"


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


@pytest.mark.parametrize("name", sorted(name for name in NAMES if layer(name) < 5))
def test_modules_and_functions_keep_their_caps(name):
    text = NAMES[name].read_text()
    assert len(text.splitlines()) <= (450 if name == "common" else 330)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, node.name


def test_python_outside_tests_bench_and_data_is_at_most_8500_lines():
    assert sum(len(NAMES[name].read_text().splitlines()) for name in PRODUCT) <= 8500


def test_no_path_is_inserted():
    # Split, so that this line itself does not match.
    needle = "sys.path" + ".insert"
    assert not [path for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts and needle in path.read_text()]
