"""The modules of flows import each other in one direction, whether at their top or inside a function."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from flows.environment import ROOT


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of flows that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def test_no_circle_and_the_environment_below_all():
    files = {module_name(path): path for path in (ROOT / "flows").rglob("*.py")}
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    graph = {name: imported(path, set(files) - packages) for name, path in files.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(files)  # CycleError names a circle
    assert graph["flows.environment"] == set()
    assert all(graph[package] <= {"flows.environment"} for package in packages)
