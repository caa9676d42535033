"""The first training step, on synthetic trajectories that bend: extrapolation can be improved upon."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesa.models.output_head import OutputHead
from lesa.params import WorkerResources, Workload
from lesa.predictor.alpha import linear_alpha, time_offsets
from lesa.predictor.spec import PROJECTIONS
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule, stage_of_steps
from lesa.training import ground_truth
from lesa.training.design import training_key
from lesa.training.experts import (
    Job,
    Trained,
    assemble,
    ground_truth_jobs,
    new_expert,
    predictor_spec,
    untrained_predictor,
)
from lesa.training.ground_truth import train_expert, true_history_loss
from lesa.training.jobs import expert_design
from lesa.training.targets import Targets
from tests.helpers.training_set import CHANNELS, STEPS, TOKENS, design, head, sigmas, splits, workload

SIGMAS = sigmas()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectories, Trajectories]:
    return splits(tmp_path_factory.mktemp("set") / "s.zarr")


def train_job(
    made: Workload, job: Job, data: tuple[Trajectories, Trajectories], folder: Path, report: Any = lambda *_: None
) -> Trained:
    """`train_expert` with the sections of a workload."""
    return train_expert(
        expert_design(made),
        made.ground_truth,
        job,
        *data,
        head(),
        device=torch.device("cpu"),
        work_dir=folder,
        report=report,
    )


def train(
    data: tuple[Trajectories, Trajectories], folder: Path, job: Job, **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trained = train_job(workload(**changes), job, data, folder)
    assert trained.budget == job.budget and set(trained.experts) == {job.stage} and trained.step_weights == {}
    return trained.experts[job.stage], trained.figures


@pytest.mark.parametrize("loss", ["output", "feature", "normalised_feature"])
@pytest.mark.parametrize("history", ["full_steps", "steps"])
def test_training_beats_the_start(
    data: tuple[Trajectories, Trajectories], tmp_path: Path, loss: str, history: str
) -> None:
    for stage in (0, 1):
        tensors, figures = train(
            data,
            tmp_path,
            Job("2x", stage),
            predictor={"history": history, "projection": "per_channel"},
            ground_truth={"loss": loss, "iterations": 60, "checkpoint_every": 20, "learning_rate": 0.01},
        )
        assert figures["validation_loss"] < 0.9 * figures["validation_loss_start"], (stage, figures)
        assert tensors["projection.scale"].shape == (2, CHANNELS)


@pytest.mark.parametrize(
    ("gate", "projection", "start"),
    list(itertools.product(["kan", "mlp", "table"], PROJECTIONS, ["extrapolation", "random"])),
)
def test_every_form_trains(
    data: tuple[Trajectories, Trajectories], tmp_path: Path, gate: str, projection: str, start: str
) -> None:
    forms = {"gate": gate, "projection": projection, "start": start, "grid": 3, "hidden": 4}
    made = workload(predictor=forms, ground_truth={"iterations": 1})
    before = new_expert(expert_design(made), Job("2x", 1), SIGMAS, CHANNELS).export()
    seen: list[dict[str, float]] = []
    trained = train_job(made, Job("2x", 1), data, tmp_path, report=lambda _, values: seen.append(values))
    tensors = trained.experts[1]
    assert len(seen) == 1 and seen[0]["gradient_norm"] > 0
    assert tensors.keys() == before.keys()
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_both_parts_of_an_expert_learn(data: tuple[Trajectories, Trajectories], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "predictor": {"gate": "kan", "projection": "dense", "grid": 3, "hidden": 4},
        "ground_truth": {"iterations": 20, "learning_rate": 0.01, "gate_learning_rate": 0.01},
    }
    before = new_expert(design(**changes), Job("2x", 1), SIGMAS, CHANNELS).export()
    after, figures = train(data, tmp_path, Job("2x", 1), **changes)
    assert figures["validation_loss"] < figures["validation_loss_start"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before) - {"gate.low", "gate.high", "gate.kan.0.grid", "gate.kan.1.grid"}


def test_jobs_and_what_they_refuse() -> None:
    jobs = ground_truth_jobs(design(), SIGMAS)
    assert [str(job) for job in jobs] == ["2x.stage0", "2x.stage1"]
    made = design(predictor={"boundaries": (0.6, 0.05), "history_sizes": (5, 2, 2)})
    with pytest.raises(ValueError) as caught:
        ground_truth_jobs(made, SIGMAS)
    text = str(caught.value)
    assert "budget 2x: history_size 5 of noise stage 0 needs 5 full steps before step 4" in text
    assert "noise stage 2 has no step: move predictor.boundaries" in text


def test_a_history_of_steps_that_is_too_long_is_refused() -> None:
    made = design(predictor={"history": "steps", "history_sizes": (5, 2)})
    with pytest.raises(ValueError, match="history_size 5 of noise stage 0 needs 5 steps before step 4"):
        ground_truth_jobs(made, SIGMAS)


def test_targets_by_hand() -> None:
    """Full 0 1 2 3 6 9; steps of the second stage are those below 0.6."""
    stages = stage_of_steps(SIGMAS, (0.6,))
    first = stages.index(1)
    schedule = design().schedules["2x"]
    targets = Targets.on(schedule, SIGMAS, stages, 1, 2, "full_steps")
    assert targets.steps == tuple(s for s in (4, 5, 7, 8, 10, 11) if s >= first)
    assert targets.past[-1] == (9, 6)
    assert torch.equal(targets.offsets[-1], SIGMAS[[9, 6]] - SIGMAS[11])
    assert float(targets.weights[-1]) == pytest.approx(float(SIGMAS[11]))
    assert targets.needed == tuple(sorted({*targets.steps, *(p for past in targets.past for p in past)}))
    assert Targets.on(schedule, SIGMAS, stages, 1, 2, "steps").past[-1] == (10, 9)


@pytest.mark.parametrize("history", ["full_steps", "steps"])
def test_targets_are_predicted_as_the_sampler_would(
    data: tuple[Trajectories, Trajectories], history: str
) -> None:
    """On true histories the batched predictions are the bound predictor's rule, step by step."""
    from lesa.predictor.rule import History

    made = design(
        predictor={"history": history, "gate": "kan", "projection": "low_rank", "grid": 3, "hidden": 4}
    )
    experts = {job: new_expert(made, job, SIGMAS, CHANNELS) for job in ground_truth_jobs(made, SIGMAS)}
    parts = [Trained(budget=job.budget, experts={job.stage: expert.export()}) for job, expert in experts.items()]
    predictor = assemble(made, CHANNELS, parts)
    schedule = made.schedules["2x"]
    rule, stages = predictor.bind(schedule, SIGMAS), stage_of_steps(SIGMAS, made.predictor.boundaries)
    assert rule.keeps_predictions == (history == "steps")
    for job, expert in experts.items():
        targets = Targets.on(schedule, SIGMAS, stages, job.stage, 2, history)
        features = data[0].feature_batch([0, 1], targets.needed)
        with torch.no_grad():
            predicted = targets.predict(expert, features)
        assert predicted.shape == (2, len(targets.steps), TOKENS, CHANNELS)
        for index, (step, past) in enumerate(zip(targets.steps, targets.past, strict=True)):
            ring = History(rule.history_size)
            for entry in reversed(past):
                ring.push(entry, data[0].feature_batch([0, 1], [entry])[:, 0])
            torch.testing.assert_close(predicted[:, index], rule(ring, step), rtol=1e-4, atol=1e-4)


def test_the_start_predicts_like_extrapolation_in_sigma() -> None:
    made = design(predictor={"gate": "kan", "projection": "dense"})
    predictor = untrained_predictor(made, SIGMAS, CHANNELS)
    schedule = made.schedules["2x"]
    alphas = predictor.alphas(schedule, SIGMAS)
    for step in schedule.predicted_steps:
        dt = time_offsets(SIGMAS, step, schedule.anchors(step, 2))[None]
        assert float(alphas[step]) == pytest.approx(float(linear_alpha(dt)), abs=1e-3)
    assert predictor.spec == predictor_spec(made, CHANNELS)


@pytest.mark.parametrize(
    "schedule",
    [
        {"budgets": {"2x": {"interval": 1}}},
        {"warmup_steps": 40},
    ],
)
def test_nothing_to_predict_is_nothing_to_train(
    data: tuple[Trajectories, Trajectories], tmp_path: Path, schedule: dict[str, Any]
) -> None:
    from lesa.params import BudgetParams

    changes = dict(schedule)
    if "budgets" in changes:
        changes["budgets"] = {"2x": BudgetParams(interval=1)}
    made = workload(schedule=changes)
    form = expert_design(made)
    parts = [
        train_job(made, job, data, tmp_path, report=lambda *_: pytest.fail("nothing to train"))
        for job in ground_truth_jobs(form, SIGMAS)
    ]
    assert [part.figures for part in parts] == [{}, {}]
    assemble(form, CHANNELS, parts).bind(form.schedules["2x"], SIGMAS)


@pytest.mark.parametrize("gate", ["kan", "mlp", "table"])
def test_a_run_of_one_step_is_legal(gate: str) -> None:
    from lesa.params import BudgetParams, CallParams

    made = design(
        call={"num_inference_steps": 1},
        schedule={"budgets": {"2x": BudgetParams(interval=1)}},
        predictor={"boundaries": (), "history_sizes": (2,), "gate": gate},
    )
    assert isinstance(made.call, CallParams)
    levels = torch.tensor([1.0, 0.0])
    predictor = untrained_predictor(made, levels, CHANNELS)
    rule = predictor.bind(Schedule.uniform(1, 1), levels)
    assert rule.stages == (0,) and predictor.alphas(Schedule.uniform(1, 1), levels).isnan().all()


def test_the_key_is_of_everything_the_result_depends_on() -> None:
    def key(**changes: Any) -> str:
        made = workload(**changes)
        return training_key(expert_design(made), "ground_truth", made.ground_truth, "2x.stage0", "data")

    assert key() == key()
    assert key() == key(resources={"ground_truth": WorkerResources(workers=7, threads_per_worker=3)})
    for changes in (
        {"ground_truth": {"learning_rate": 0.5}},
        {"ground_truth": {"checkpoint_every": 3}},  # it says when the best state is looked for
        {"ground_truth": {"iterations": 7}},
        {"predictor": {"rank": 3}},
        {"schedule": {"warmup_steps": 4}},
        {"call": {"num_inference_steps": 13}},
        {"seed": 5},
    ):
        assert key(**changes) != key(), changes
    made, form = workload(), design()
    others = {
        training_key(form, "ground_truth", made.ground_truth, "2x.stage1", "data"),
        training_key(form, "ground_truth", made.ground_truth, "2x.stage0", "other data"),
        training_key(form, "closed_loop", made.closed_loop, "2x.stage0", "data"),
    }
    assert key() not in others and len(others) == 3


def test_the_same_twice_whatever_the_global_seed(
    data: tuple[Trajectories, Trajectories], tmp_path: Path
) -> None:
    results = []
    for number in (1, 2):
        torch.manual_seed(number)
        changes = {"predictor": {"gate": "kan", "grid": 3, "hidden": 4}}
        results.append(train(data, tmp_path / str(number), Job("2x", 1), **changes))
    (first, figures), (second, again) = results
    assert figures == again and figures["validation_loss"] <= figures["validation_loss_start"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = train(
        data, tmp_path / "3", Job("2x", 1), predictor={"gate": "kan", "grid": 3, "hidden": 4}, seed=8
    )
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_bad_trajectory_stops_training_before_the_update(
    data: tuple[Trajectories, Trajectories], tmp_path: Path
) -> None:
    import dataclasses

    from lesa.training.loop import TrainingError

    train_set, validation = data
    assert train_set.features is not None
    poisoned = train_set.features.clone()
    poisoned[:, STEPS - 1] = float("nan")
    bad = dataclasses.replace(train_set, features=poisoned)
    with pytest.raises(TrainingError, match="recorded features are not finite.*lesa store verify"):
        train((bad, validation), tmp_path, Job("2x", 1))
    assert not list(tmp_path.rglob("state.json"))


@pytest.fixture
def measured_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What experts are whitened on and step weights are fitted to, in turn."""
    asked: list[tuple[str, Any]] = []
    real_whiten, real_weights = ground_truth.whiten, ground_truth.step_weights_of_stage

    def whiten(expert: Any, cases: Any, **given: Any) -> None:
        asked.extend(("whiten", data) for data, _ in cases)
        real_whiten(expert, cases, **given)

    def weights(design: Any, job: Any, expert: Any, data: Any) -> Any:
        asked.append(("step weights", data))
        return real_weights(design, job, expert, data)

    monkeypatch.setattr(ground_truth, "whiten", whiten)
    monkeypatch.setattr(ground_truth, "step_weights_of_stage", weights)
    return asked


def test_validation_trajectories_are_measured_by_and_never_fitted(
    data: tuple[Trajectories, Trajectories], tmp_path: Path, measured_on: list[tuple[str, Any]]
) -> None:
    made = workload(predictor={"kind": "per_step", "step_history": 2}, ground_truth={"iterations": 1})
    train_job(made, Job("2x", 0), data, tmp_path)
    assert [what for what, _ in measured_on] == ["whiten", "step weights"]
    assert all(used is data[0] for _, used in measured_on)


def test_a_prediction_meets_the_conditioning_of_its_own_sample_and_step(
    data: tuple[Trajectories, Trajectories],
) -> None:
    """Of rows out of order the loss is the mean of their own, through a head that scales by the conditioning."""

    class Scale(nn.Module):
        def forward(self, feature: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
            return feature * (1 + temb[:, None])

    scaling: Any = OutputHead(Scale(), head().proj_out)
    expert = new_expert(design(), Job("2x", 1), SIGMAS, CHANNELS)
    targets = Targets.on(design().schedules["2x"], SIGMAS, stage_of_steps(SIGMAS, (0.6,)), 1, 2, "full_steps")
    train, rows = data[0], [5, 2]
    losses = [float(true_history_loss(expert, targets, train, [row], scaling, "output").detach()) for row in rows]
    both = float(true_history_loss(expert, targets, train, rows, scaling, "output").detach())
    assert both == pytest.approx(sum(losses) / 2, rel=1e-5)
    features = train.feature_batch([5], targets.needed)
    predicted = targets.predict(expert, features)
    expected = 0.0
    for place, step in enumerate(targets.steps):
        true = features[:, targets.needed.index(step)]
        off = scaling(predicted[:, place], train.temb[[5], step]) - scaling(true, train.temb[[5], step])
        expected += float(off.detach().abs().mean() * targets.weights[place])
    assert losses[0] == pytest.approx(expected / float(targets.weights.sum()), rel=1e-4)


def test_a_step_weighs_what_it_moves_the_latents_by() -> None:
    levels = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.3, 0.0])
    targets = Targets.on(Schedule.explicit(5, (0, 1)), levels, [0] * 5, 0, 2, "full_steps")
    assert targets.steps == (2, 3, 4) and targets.weights.tolist() == pytest.approx([0.3, 0.1, 0.3])
