"""What every stage does around its work: read the settings, stand in the root, log one MLflow run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.revisions import revisions
from flows.runtime import ROOT
from flows.tracking import Tracker, flatten, tracked_run
from lesa.atomic import write_bytes
from lesa.params import Workload, load_params
from lesa.schedules import with_schedules


def read_workload(name: str | None, *, searched: bool = False) -> Workload:
    """The settings of a workload, all checked, before anything starts; paths are relative to the root.

    Args:
        name: section of params.yaml; None takes its default.
        searched: also read what the search stage found; `ValueError` where it has not run.
    """
    os.chdir(ROOT)
    workload = load_params("params.yaml", name)
    return with_schedules(workload) if searched else workload


@contextlib.contextmanager
def stage_run(stage: str, workload: Workload, sections: Sequence[str]) -> Iterator[Tracker]:
    """The MLflow run of a stage: the named sections of the settings as params, the revisions as tags."""
    settings = dataclasses.asdict(workload)
    tags = {"stage": stage, "workload": workload.name, **revisions(workload=workload.name)}
    with tracked_run(
        f"{stage} {workload.name}",
        experiment=experiment_name(workload),
        params=flatten({key: settings[key] for key in sections}),
        tags=tags,
    ) as run:
        yield run


def metrics_folder(workload: Workload) -> Path:
    """Where a stage leaves numbers of its own: DVC allows none inside another stage's folder."""
    folder = Path("data/metrics") / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_curves(path: Path, points: Sequence[tuple[str, int, float]]) -> None:
    """A loss curve as DVC plots it: one line a point."""
    lines = ["part,step,loss", *(f"{part},{step},{value!r}" for part, step, value in points)]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What `write_curves` wrote, by part; nothing where there is no file."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if path.is_file():
        for line in path.read_text().splitlines()[1:]:
            part, step, loss = line.rsplit(",", 2)
            curves.setdefault(part, []).append((int(step), float(loss)))
    return curves


def experiment_name(workload: Workload) -> str:
    """Experiment and registered model carry the same name."""
    return f"lesa-{workload.name}"


def final_values(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result, as the last point of a run."""
    return {
        k: float(v)
        for k, v in flatten(values).items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }
