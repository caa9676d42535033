"""`lesa migrate`: older settings files are rewritten, and nothing else about them changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesa.doctor.migration import migrate_params
from lesa.errors import LesaError
from lesa.params_file import ParamsError, load_params

OLDER = """\
# of somebody
default_workload: mine

workloads:
  mine:
    seed: 1
    device: cpu
    prompts: mine  # a set
    model: {family: flux, source: data/base/mine, dtype: float32}
    call: {height: 16, width: 16, num_inference_steps: 50}
    schedule: {default_budget: 5x, budgets: {5x: {interval: 7}}}
    record:
      train_prompts: 8
      validation_prompts: 2
      actors: 3
      timeout_s: 60
    closed_loop: {iterations: 7, workers: 1, threads_per_worker: 4}
"""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(OLDER)
    return path


def test_an_older_file_is_refused_with_the_command_that_rewrites_it(older: Path) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(older)
    assert "workloads.mine.record.actors: stands in workloads.mine.resources.record.actors now" in caught.value.problems
    assert f"workloads.mine: `lesa migrate {older}` moves them" in caught.value.problems


def test_keys_move_and_everything_else_stays(older: Path) -> None:
    moves = migrate_params(older)
    assert len(moves) == 5
    assert "workloads.mine.record.timeout_s -> workloads.mine.resources.record.timeout_s" in moves
    workload = load_params(older)
    assert workload.resources.device == "cpu"
    assert (workload.resources.record.actors, workload.resources.record.timeout_s) == (3, 60)
    assert (workload.resources.closed_loop.workers, workload.resources.closed_loop.threads_per_worker) == (1, 4)
    assert workload.resources.search.workers == 2 and workload.closed_loop.iterations == 7
    text = older.read_text()
    moved = ("device", "actors", "timeout", "workers")
    kept = [line for line in OLDER.splitlines() if not any(key in line for key in moved)]
    assert [line for line in kept if line not in text.splitlines()] == []
    assert migrate_params(older) == [] and older.read_text() == text


def test_a_dry_run_and_a_file_that_stays_wrong_change_nothing(older: Path) -> None:
    assert len(migrate_params(older, write=False)) == 5
    assert older.read_text() == OLDER
    wrong = OLDER.replace("train_prompts: 8", "train_prompts: none")
    older.write_text(wrong)
    with pytest.raises(ParamsError, match="train_prompts: must be int"):
        migrate_params(older)
    assert older.read_text() == wrong and list(older.parent.iterdir()) == [older]


@pytest.mark.parametrize("text", [None, "a: [", "workloads: 3\n"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LesaError, match="params.yaml"):
        migrate_params(path)
