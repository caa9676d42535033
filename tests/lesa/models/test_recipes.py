"""A change of a family's row that changes results raises its number in lesa/recipes.yaml, which the stages track.

lesa/models/families.py itself is no dependency of any stage (.dvcignore), so that a new family reruns nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from pathlib import Path

import pytest
import yaml

from lesa.models import families
from lesa.models.families import FAMILIES, Family

ROOT = Path(__file__).parents[3]
# Version and digest of each row as they were when somebody last looked at them together.
KNOWN = {
    "flux": (1, "1aba6830409d9a47"),
    "qwen-image": (1, "09976ff4e2eef642"),
    "hunyuan-video": (1, "87441f868f466b29"),
}


def digest(row: Family) -> str:
    """Of a row's values, and of the code that it names and that every row goes through."""
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "grid"}
    code = [inspect.getsource(function) for function in (families.blocks, row.grid) if function is not None]
    return hashlib.sha256("\n".join([repr(values), *code]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_row_and_its_recipe_change_together(name: str) -> None:
    version = yaml.safe_load((ROOT / "lesa/recipes.yaml").read_text())[name]
    assert KNOWN.get(name) == (version, digest(FAMILIES[name])), (
        f"the row of {name} or its recipe has changed: raise {name} in lesa/recipes.yaml if recordings, training or "
        f"images change by it, then write ({version}, {digest(FAMILIES[name])!r}) here"
    )


def test_a_changed_row_has_another_digest() -> None:
    row = FAMILIES["flux"]
    assert digest(dataclasses.replace(row, timestep_factor=1.0)) != digest(row)
    assert digest(dataclasses.replace(row, grid=families.by_shapes)) != digest(row)
