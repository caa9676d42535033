"""A workload with some of its settings replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lesa.params import Workload

Changes = Mapping[str, Mapping[str, Any]]  # section -> setting -> value


def changed(workload: Workload, changes: Changes) -> Workload:
    """The workload with some settings of some sections replaced."""
    sections = {name: dataclasses.replace(getattr(workload, name), **values) for name, values in changes.items()}
    return dataclasses.replace(workload, **sections)
