"""Both training steps end to end on a recorded tiny workload, as the flows call them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lesa.errors import LesaError
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.predictor.predictor import Predictor
from lesa.recording import dataset
from lesa.recording.prompts import PromptError
from lesa.recording.store_format import StoreError
from lesa.training import jobs
from lesa.training.experts import Job
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository, write_prompts


def tiny_workload() -> Workload:
    """Two budgets, two stages, KAN gates, a few iterations."""
    workload = load_params()
    return dataclasses.replace(
        workload,
        schedule=dataclasses.replace(
            workload.schedule, budgets={"2x": BudgetParams(interval=3), "1.3x": BudgetParams(interval=2)}
        ),
        predictor=dataclasses.replace(
            workload.predictor,
            boundaries=(0.6,),
            history_sizes=(2, 2),
            hidden=4,
            grid=3,
            projection="low_rank",
            rank=4,
        ),
        ground_truth=dataclasses.replace(
            workload.ground_truth, iterations=8, batch_size=4, checkpoint_every=2, learning_rate=1e-3
        ),
        closed_loop=dataclasses.replace(workload.closed_loop, iterations=2, batch_size=2, checkpoint_every=1),
    )


@dataclasses.dataclass
class Trained:
    """What both steps of `tiny_workload` gave, in a repository that is the working directory."""

    root: Path
    workload: Workload
    first: Predictor
    second: Predictor
    reports: dict[str, list[int]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    before = Path.cwd()
    root = tiny_repository(tmp_path_factory.mktemp("repository"))
    os.chdir(root)
    try:
        workload = tiny_workload()
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        reports: dict[str, list[int]] = {}

        def report_to(name: str) -> jobs.Report:
            return lambda iteration, values: reports.setdefault(name, []).append(iteration)

        experts = {
            str(job): jobs.run_ground_truth_job(workload, job, report_to(str(job)))
            for job in jobs.list_ground_truth_jobs(workload)
        }
        first = jobs.finish(workload, "ground_truth", experts)
        budgets = {
            budget: jobs.run_closed_loop_job(workload, budget, report_to(budget))
            for budget in workload.schedule.budgets
        }
        second = jobs.finish(workload, "closed_loop", budgets)
        yield Trained(root, workload, first, second, reports)
    finally:
        os.chdir(before)


def test_every_expert_of_every_budget_is_a_job(trained: Trained) -> None:
    found = jobs.list_ground_truth_jobs(trained.workload)
    assert [str(job) for job in found] == ["2x.stage0", "2x.stage1", "1.3x.stage0", "1.3x.stage1"]
    assert trained.reports["2x.stage1"] == list(range(1, 9))
    assert trained.reports["2x"] == [1, 2]


def test_results_are_saved_where_the_stages_look(trained: Trained) -> None:
    for folder, predictor in (
        (trained.workload.paths.ground_truth, trained.first),
        (trained.workload.paths.closed_loop, trained.second),
    ):
        assert sorted(p.name for p in folder.iterdir()) == ["predictor.json", "weights.safetensors"]
        loaded = jobs.load_predictor(folder)
        assert loaded.spec == predictor.spec and loaded.tensors.keys() == predictor.tensors.keys()
        assert all(torch.equal(loaded.tensors[name], value) for name, value in predictor.tensors.items())
    assert not list(Path("data/checkpoints/tiny/work").iterdir()), "checkpoints of finished steps are dropped"


def test_both_steps_improve_or_keep_their_validation_loss(trained: Trained) -> None:
    first = jobs.load_figures(trained.workload.paths.ground_truth)
    second = jobs.load_figures(trained.workload.paths.closed_loop)
    assert set(first) == {str(job) for job in jobs.list_ground_truth_jobs(trained.workload)}
    assert set(second) == {"2x", "1.3x"}
    predicting = [f for f in first.values() if f]
    assert all(f["validation_loss"] <= f["validation_loss_start"] for f in [*predicting, *second.values()])
    assert any(f["validation_loss"] < f["validation_loss_start"] for f in predicting)


def test_the_saved_predictor_accelerates_the_pipeline(trained: Trained) -> None:
    from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, cache_state, remove_lesa_cache

    workload, pipe = trained.workload, load_pipeline(trained.workload.model, trained.workload.resources.device)
    plain = sample(pipe, ["a dog on the left"], [3], workload.call)
    schedule = workload.budgets()["2x"]
    sigmas = pipe.scheduler.sigmas.clone()
    rule = jobs.load_predictor(workload.paths.closed_loop).bind(schedule, sigmas)
    apply_lesa_cache(
        pipe.transformer, LesaCacheConfig(schedule=schedule, rule=rule, scheduler=pipe.scheduler)
    )
    fast = sample(pipe, ["a dog on the left"], [3], workload.call)
    statistics = cache_state(pipe.transformer)
    assert statistics.num_full == schedule.num_full and statistics.num_fallbacks == 0
    remove_lesa_cache(pipe.transformer)
    assert 0 < float((fast - plain).abs().mean()) < 0.1
    assert torch.equal(sample(pipe, ["a dog on the left"], [3], workload.call), plain)


def test_a_job_run_again_goes_on_and_ends_the_same(trained: Trained) -> None:
    job = Job("2x", 1)
    seen: list[int] = []
    first, second = (
        jobs.run_ground_truth_job(trained.workload, job, lambda iteration, _: seen.append(iteration)).experts[1]
        for _ in range(2)
    )
    assert seen == list(range(1, 9)), "the second call finds the finished checkpoint"
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, trained.first.tensors[f"2x/1/{name}"])


def test_a_missing_torn_or_altered_result_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"predictor.json does not exist; run the training stages first"):
        jobs.load_predictor(tmp_path / "none")
    folder = tmp_path / "saved"
    jobs.save_predictor(folder, trained.first, {})
    record, weights = (folder / "predictor.json").read_text(), (folder / "weights.safetensors").read_bytes()
    strange = record.replace('"history": "full_steps"', '"history": "everything"')
    for name, data, words in (
        ("weights.safetensors", weights[:-1], "is not what predictor.json describes"),
        (
            "weights.safetensors",
            weights[:-1] + bytes([weights[-1] ^ 1]),
            "is not what predictor.json describes",
        ),
        ("predictor.json", record[:100].encode(), "predictor.json is torn"),
        ("predictor.json", b"[]", "must be an object, got list"),
        ("predictor.json", b"{}", "must have spec, sha256 and figures"),
        ("predictor.json", record.encode() + b"\xff", "not UTF-8"),
        ("predictor.json", record.replace('"figures": {}', '"figures": NaN').encode(), "NaN is not a number"),
        ("predictor.json", strange.encode(), "history 'everything'"),
    ):
        jobs.save_predictor(folder, trained.first, {})
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            jobs.load_predictor(folder)
    jobs.save_predictor(folder, trained.second, {"a": 1.0})  # in the place of the old one
    assert jobs.load_figures(folder) == {"a": 1.0}
    with pytest.raises(LesaError, match=r"predictor.json does not exist; run the training stages first"):
        jobs.load_figures(tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_failed_save_keeps_the_result_before(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    jobs.save_predictor(folder, trained.first, {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lesa.training.jobs.atomic.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        jobs.save_predictor(folder, trained.second, {})
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(
        jobs.load_predictor(folder).tensors["2x/1/projection.scale"],
        trained.first.tensors["2x/1/projection.scale"],
    )


def test_training_on_what_is_judged_is_refused(trained: Trained) -> None:
    from tests.helpers.tiny import SPLITS

    write_prompts(trained.root, SPLITS | {"test": [SPLITS["train"][0]]})
    try:
        with pytest.raises(PromptError, match="1 in both train and test"):
            dataset.recorded_splits(trained.workload.recording)
    finally:
        write_prompts(trained.root, SPLITS)
    train, validation = dataset.recorded_splits(trained.workload.recording)
    assert set(train.prompts) == set(SPLITS["train"]) and set(validation.prompts) == set(SPLITS["validation"])
    assert not set(train.seeds) & set(validation.seeds)


def test_a_store_is_read_once_a_process_while_it_stays_as_it_is(trained: Trained) -> None:
    train, validation = dataset.kept_splits(trained.workload.recording)
    again = dataset.kept_splits(trained.workload.recording)
    assert again[0] is train and again[1] is validation
    assert train.keys == dataset.recorded_splits(trained.workload.recording)[0].keys
    file = trained.workload.paths.trajectories / train.keys[0] / "features/c.0.0.0.0"
    good, times = file.read_bytes(), file.stat()
    file.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    try:
        with pytest.raises(StoreError, match=train.keys[0]):
            dataset.kept_splits(trained.workload.recording)
    finally:
        file.write_bytes(good)
    assert dataset.kept_splits(trained.workload.recording)[0].keys == train.keys


def test_the_second_step_wants_the_first_of_the_same_settings(trained: Trained) -> None:
    other = dataclasses.replace(
        trained.workload, predictor=dataclasses.replace(trained.workload.predictor, projection="per_channel")
    )
    with pytest.raises(ValueError, match="other settings; run train_stage1 first"):
        jobs.run_closed_loop_job(other, "2x", lambda *_: None)
