"""The search cut into jobs: the cheapest paths of all budgets first, then each budget by itself.

Ray pickles the functions of this module by name: a job's work stays importable from here. This is also where a workload
is taken apart: the rest of the package takes the sections it reads.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass

from lesa.errors import LesaError
from lesa.models.output_head import load_output_head
from lesa.models.pipelines import load_pipeline
from lesa.params import Report, Workload, searched_budgets
from lesa.predictor.spec import leading_steps
from lesa.recording.dataset import kept_splits, recorded_splits
from lesa.schedule import Schedule
from lesa.search.descent import SearchSettings, refine, serves
from lesa.search.path import cheapest_schedules
from lesa.search.schedules_file import read_schedules
from lesa.training.experts import Figures
from lesa.training.jobs import transformer_folder, work_dir


@dataclass(frozen=True)
class SearchJob:
    """One budget to search, and the schedules to start from."""

    budget: str
    starts: tuple[Schedule, ...]


def search_settings(workload: Workload) -> SearchSettings:
    """What the workload's searches depend on beside trajectories and starts."""
    return SearchSettings(
        call=workload.call,
        model=workload.model,
        predictor=workload.predictor,
        search=workload.search,
        closed_loop=workload.closed_loop,
        seed=workload.seed,
    )


def with_schedules(workload: Workload) -> Workload:
    """The workload with what its search stage found; `ValueError` as in `read_schedules`."""
    schedule = read_schedules(workload.paths.schedules, workload.schedule, workload.call.num_inference_steps)
    return dataclasses.replace(workload, schedule=schedule)


def cheapest_starts(workload: Workload, nothing: None, report: Report) -> list[SearchJob]:
    """A job for every budget that is to be searched, started from the cheapest path and from even steps."""
    wanted = searched_budgets(workload.schedule)
    if not wanted:
        return []
    train, _ = recorded_splits(workload.recording)
    head = load_output_head(transformer_folder(workload))
    leading = leading_steps(workload.predictor.kind)
    counts = sorted({*wanted.values()})
    paths = cheapest_schedules(train, head, counts, max_gap=workload.search.max_gap, leading=leading)
    jobs, impossible = [], []
    for budget, count in wanted.items():
        even = even_schedule(len(train.sigmas) - 1, count, leading)
        starts = [schedule for schedule in (paths[count], even) if serves(workload.predictor, schedule, train.sigmas)]
        if not starts:
            impossible.append(f"{budget}: {list(paths[count].full_steps)}")
        jobs.append(SearchJob(budget, tuple(starts)))
    if impossible:
        raise LesaError(
            f"search: the cheapest paths ({'; '.join(impossible)}) have fewer full steps first than "
            f"predictor.history_sizes {list(workload.predictor.history_sizes)} need: lower the first of them to 2"
        )
    return jobs


def even_schedule(num_steps: int, count: int, leading: int) -> Schedule:
    """`leading` full steps in a row, the others spread evenly over the rest."""
    rest = count - leading
    spread = (leading - 1 + round(i * (num_steps - leading + 1) / (rest + 1)) for i in range(1, rest + 1))
    return Schedule.explicit(num_steps, sorted({*range(leading), *spread}))


def run_search_job(workload: Workload, job: SearchJob, report: Report) -> tuple[Schedule, Figures]:
    """Search one budget; a search that was killed goes on from its journal."""
    train, _ = kept_splits(workload.recording)
    return refine(
        load_pipeline(workload.model, workload.resources.device),
        search_settings(workload),
        train,
        job.starts,
        seed=workload.seed,
        journal=work_dir(workload) / "search" / f"{job.budget}.json",
        report=report,
    )


def clear_searches(workload: Workload) -> None:
    """Drop the journals of searches that are done."""
    shutil.rmtree(work_dir(workload) / "search", ignore_errors=True)
