"""Pages name what is there: modules, files, commands, links, versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lesa.bundle.manifest import READ

ROOT = Path(__file__).parents[1]
NAMES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "infra/README.md",
    "data/workloads/README.md",
)
PAGES = [
    *(ROOT / name for name in NAMES),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks/studies").glob("*.md")),
]
SOURCES = [path for folder in ("lesa", "flows", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
FILE = re.compile(r"(?<![\w./])((?:lesa|flows|benchmarks|tests|examples)/[\w/.-]*[\w/])")
MODULE = re.compile(r"python -m ((?:lesa|flows|benchmarks|tests)(?:\.\w+)*)")
DOTTED = re.compile(r"`((?:lesa|flows|benchmarks)(?:\.[a-z_]\w*)+)")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


def is_module(dotted: str) -> bool:
    """Whether a dotted name is a package or module of ours, or a name inside a module."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return length == len(parts) or parts[length] in path.with_suffix(".py").read_text(encoding="utf-8")
        if (path / "__init__.py").is_file():
            return length == len(parts) or parts[length] in (path / "__init__.py").read_text(encoding="utf-8")
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    absent = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    absent += [name for name in LINK.findall(text) if not (page.parent / name).exists()]
    if page.name not in ("upgrading.md", "CHANGELOG.md"):  # they name what has gone
        absent += [name for name in MODULE.findall(text) + DOTTED.findall(text) if not is_module(name)]
    assert not absent, absent


def test_the_new_names_of_modules_are_there() -> None:
    """Of the table in docs/upgrading.md: the right column, whose names are relative to the first one's package."""
    text = (ROOT / "docs/upgrading.md").read_text(encoding="utf-8").split("## Where modules went")[1]
    cells = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `")]
    assert len(cells) > 30
    for cell in cells:
        package = ""
        for name in re.findall(r"`([\w.]+)`", cell):
            if "." in name:
                package = name if cell.startswith("the same names") else name.rpartition(".")[0]
            dotted = name if "." in name else f"{package}.{name}"
            assert is_module(dotted), (cell, dotted)


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert sorted(re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE)) == sorted(phony.split())


def test_schemas_that_are_read_are_stated() -> None:
    text = (ROOT / "docs/upgrading.md").read_text(encoding="utf-8")
    assert f"schemas {' and '.join(map(str, READ))} are read" in text


def test_the_readme_is_short_and_its_figures_stand_between_the_markers() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    before, _, rest = readme.partition("<!-- begin")
    outside = before + rest.partition("<!-- end -->")[2]
    assert not re.search(r"\d dB|20\d\d-\d\d", outside)


def test_the_distribution_is_named_alike_everywhere() -> None:
    """The name `lesa` is a stranger's on the public index: nothing may recommend to install it."""
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    assert name != "lesa"
    assert f"`{name}`" in (ROOT / "docs/upgrading.md").read_text(encoding="utf-8")
    for path in [*PAGES, *SOURCES]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<!un)install '?lesa\b(?!-)", text), path
        assert 'version("lesa")' not in text, f"{path}: the distribution is {name}"


def test_pages_that_code_names_are_there() -> None:
    pages = re.compile(r"\b((?:docs|benchmarks|infra|data)/[\w/-]+\.md)\b")
    named = {(path, name) for path in SOURCES for name in pages.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 2
    assert not [(path, name) for path, name in named if not (ROOT / name).exists()]
