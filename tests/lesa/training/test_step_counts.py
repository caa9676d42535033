"""Experts for other numbers of steps: both training steps, the bundle, and runs of trained and untrained lengths."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lesa
from lesa.bundle import Bundle, BundleError, load_bundle
from lesa.cli import main
from lesa.models.flops import predictor_flops
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import BudgetParams, Workload
from lesa.params_file import load_params
from lesa.predictor.alpha import linear_alpha, time_offsets
from lesa.predictor.predictor import Predictor
from lesa.predictor.rule import History
from lesa.predictor.spec import MIXED, MIXED_VARIANT, PredictorSpec
from lesa.publishing.bounds import bounds_by_budget
from lesa.publishing.build import make_bundle
from lesa.recording import dataset
from lesa.recording.dataset import Splits, noise_levels
from lesa.sampling.checks import MismatchError
from lesa.sampling.hook import LesaCacheConfig
from lesa.schedule import Schedule, stage_of_steps
from lesa.training import jobs
from lesa.training.cases import carried_schedules, interpolated, served_offsets, training_cases
from lesa.training.checkpoint import save_checkpoint
from lesa.training.closed_loop import restore
from lesa.training.experts import Job, new_expert, untrained_predictor
from lesa.training.ground_truth import train_expert
from lesa.training.jobs import expert_design
from lesa.training.loop import TrainingError
from lesa.training.losses import log_latents_loss
from lesa.training.rollout import ExpertRule, accelerated_latents
from lesa.training.targets import Targets
from tests.attacks.hostile import edit
from tests.helpers import training_set
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository

OWN, COUNTS = 10, (6, 16)


@dataclasses.dataclass
class Place:
    """A tiny workload with a bundle for 6 to 16 steps; its repository is the working directory."""

    workload: Workload
    pipe: Any
    train: Splits
    others: dict[int, Splits]
    first: Predictor
    second: Predictor
    figures: dict[str, Any]
    bundle: Bundle


def settings() -> Workload:
    """Weights of each step, two noise stages; only the mixed experts are trained for more than a step."""
    workload = load_params()
    sections = {
        "schedule": {
            "budgets": {
                "2x": BudgetParams(full_steps=(0, 2, 4, 6, 8)),
                "2.5x": BudgetParams(full_steps=(0, 1, 4, 7)),
            }
        },
        "predictor": {
            "kind": "per_step",
            "boundaries": (0.6,),
            "history_sizes": (2, 2),
            "hidden": 4,
            "grid": 3,
            "projection": "low_rank",
            "rank": 4,
        },
        "ground_truth": {"iterations": 4, "batch_size": 2, "checkpoint_every": 2, "learning_rate": 1e-3},
        "closed_loop": {"iterations": 4, "batch_size": 2, "checkpoint_every": 2, "learning_rate": 1e-4},
    }
    changed = {name: dataclasses.replace(getattr(workload, name), **values) for name, values in sections.items()}
    return dataclasses.replace(workload, **changed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    before = Path.cwd()
    counts = {"step_counts": list(COUNTS), "step_count_prompts": 2}
    os.chdir(tiny_repository(tmp_path_factory.mktemp("repository"), num_inference_steps=OWN, **counts))
    try:
        workload = settings()
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        experts = {
            str(job): jobs.run_ground_truth_job(workload, job, lambda *_: None)
            for job in jobs.list_ground_truth_jobs(workload)
        }
        first = jobs.finish(workload, "ground_truth", experts)
        budgets = {
            budget: jobs.run_closed_loop_job(workload, budget, lambda *_: None)
            for budget in jobs.closed_loop_budgets(workload)
        }
        second = jobs.finish(workload, "closed_loop", budgets)
        figures = {name: part.figures for name, part in {**experts, **budgets}.items()}
        splits, others = dataset.recorded_splits(workload.recording), dataset.recorded_elsewhere(workload.recording)
        bundle = make_bundle(
            workload.paths.bundle,
            workload,
            pipe,
            second,
            *splits,
            quality={"2x": {"psnr_mean": 30.0}, "2.5x": {"psnr_mean": 28.0}},
            error_bounds=bounds_by_budget(pipe, workload, second, *splits),
            evaluation={},
            created_from={},
            others=others,
        )
        yield Place(workload, pipe, splits, others, first, second, figures, bundle)
    finally:
        os.chdir(before)


@pytest.fixture
def pipe(place: Place) -> Iterator[Any]:
    yield place.pipe
    lesa.disable(place.pipe)


def run(place: Place, num_steps: int, seed: int = 3) -> torch.Tensor:
    call = dataclasses.replace(place.workload.call, num_inference_steps=num_steps)
    return sample(place.pipe, ["a white dog"], [seed], call)


def test_cases_are_every_schedule_at_every_number_of_steps_once(place: Place) -> None:
    design = expert_design(place.workload)
    cases = training_cases(design, MIXED, *place.train, place.others)
    # At six steps both budgets have four full ones, as many as the faster one has, in the same places.
    sizes = [(case.schedule.num_steps, case.schedule.num_full) for case in cases]
    assert sizes == [(6, 4), (10, 5), (10, 4), (16, 8), (16, 6)]
    assert len({case.schedule for case in cases}) == len(cases)
    for case in cases:
        assert len(case.train.sigmas) == case.schedule.num_steps + 1 and case.judged == 2
        assert case.schedule.full_steps[:2] == (0, 1)
    own = training_cases(design, "2x", *place.train, {})
    assert [case.schedule for case in own] == [place.workload.budgets()["2x"]]
    with pytest.raises(ValueError, match=r"need the trajectories of \[6, 16\] steps too"):
        training_cases(design, MIXED, *place.train, {})


def test_both_training_steps_have_a_job_for_other_numbers_of_steps(place: Place) -> None:
    names = [str(job) for job in jobs.list_ground_truth_jobs(place.workload)]
    assert names[-2:] == ["mixed.stage0", "mixed.stage1"] and len(names) == 6
    assert jobs.closed_loop_budgets(place.workload) == ["mixed", "2x", "2.5x"]
    for name in ("mixed.stage0", "mixed.stage1"):
        assert place.figures[name]["validation_loss"] < place.figures[name]["validation_loss_start"], name
    assert place.figures["mixed"]["validation_loss"] <= place.figures["mixed"]["validation_loss_start"]
    assert place.figures["mixed.stage1"]["validation_loss_start"] == pytest.approx(1.0)  # in units of the start
    mixed = {name for name in place.second.tensors if name.startswith("mixed/")}
    assert "mixed/0/projection.up" in mixed and "mixed/1/gate.kan.0.coef" in mixed
    assert not any(name.startswith("mixed/steps/") for name in mixed)
    assert place.second.spec.step_counts == (6, 10, 16) and place.second.spec.step_range == (6, 16)


def test_no_other_numbers_of_steps_no_variant_and_no_tensors(place: Place) -> None:
    plain = dataclasses.replace(place.workload, record=dataclasses.replace(place.workload.record, step_counts=()))
    sigmas = place.train[0].sigmas
    predictor = untrained_predictor(expert_design(plain), sigmas, place.train[0].channels)
    assert predictor.spec.step_counts == () and predictor.spec.step_range == (OWN, OWN)
    assert not any(name.startswith("mixed/") for name in predictor.tensors)
    assert jobs.closed_loop_budgets(plain) == ["2x", "2.5x"]
    # What is there for the budgets does not change with what is there for other numbers of steps.
    design = expert_design(place.workload)
    both = untrained_predictor(design, sigmas, place.train[0].channels, noise_levels(place.others))
    assert all(torch.equal(both.tensors[name], value) for name, value in predictor.tensors.items())
    with pytest.raises(ValueError, match=r"need the noise levels of \[6, 16\] steps too"):
        untrained_predictor(design, sigmas, place.train[0].channels)


@pytest.mark.parametrize("step", ["ground_truth", "closed_loop"])
def test_killed_training_goes_on_to_the_same_weights(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def again(report: Any) -> dict[str, torch.Tensor]:
        if step == "ground_truth":
            trained = jobs.run_ground_truth_job(place.workload, Job(MIXED, 1), report)
        else:
            trained = jobs.run_closed_loop_job(place.workload, MIXED, report)
        assert trained.budget == MIXED and trained.step_weights == {}
        return {
            f"mixed/{stage}/{name}": value for stage, part in trained.experts.items() for name, value in part.items()
        }

    saved = 0

    def save_and_stop(*args: Any, **kwargs: Any) -> None:
        nonlocal saved
        save_checkpoint(*args, **kwargs)
        saved += 1
        raise KeyboardInterrupt

    monkeypatch.setattr("lesa.training.loop.save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        again(lambda *_: None)
    monkeypatch.undo()
    seen: list[int] = []
    resumed = again(lambda iteration, _: seen.append(iteration))
    assert saved == 1 and seen == [3, 4]
    reference = place.first if step == "ground_truth" else place.second
    assert all(torch.equal(value, reference.tensors[name]) for name, value in resumed.items())


@pytest.mark.parametrize("num_steps", [6, 16])
def test_the_gradient_through_a_run_of_another_length_is_the_slope(place: Place, num_steps: int) -> None:
    """The loop's gradient with respect to a shared expert, against finite differences along it."""
    train = place.others[num_steps][0]
    levels, workload = noise_levels(place.others), place.workload
    design = expert_design(workload)
    experts = {s: new_expert(design, Job(MIXED, s), place.train[0].sigmas, train.channels, levels) for s in (0, 1)}
    for stage, expert in experts.items():
        restore(expert, place.first, MIXED_VARIANT, stage)
    rule = ExpertRule(
        experts=experts,
        schedule=workload.budgets()["2x"].carried(num_steps, 4),
        sigmas=train.sigmas,
        boundaries=workload.predictor.boundaries,
        sizes=(2, 2),
        history="full_steps",
    )
    for part in place.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)

    def loss() -> torch.Tensor:
        latents = accelerated_latents(place.pipe, workload.call, rule.schedule, rule, train, [0, 1])
        return log_latents_loss(latents, train.latents[[0, 1]])

    loss().backward()
    for value in (experts[1].projection.moved["up"], experts[1].gate.act_fun[1].coef):  # type: ignore[union-attr, index]
        assert value.grad is not None
        slope, width = float(value.grad.norm()), 1e-3
        with torch.no_grad():
            value += width * value.grad / slope
            above = float(loss())
            value -= 2 * width * value.grad / slope
            below = float(loss())
            value += width * value.grad / slope
        assert slope > 1e-2 and slope == pytest.approx((above - below) / (2 * width), rel=0.02)


def test_drifted_states_train_too(place: Place) -> None:
    loop = dataclasses.replace(place.workload.closed_loop, gradient="drifted_states", iterations=1)
    workload = dataclasses.replace(place.workload, closed_loop=loop)
    seen: list[dict[str, float]] = []
    jobs.run_closed_loop_job(workload, MIXED, lambda _, values: seen.append(values))
    assert len(seen) == 1 and all(values["gradient_norm"] > 0 for values in seen)


def test_the_start_is_extrapolation_in_sigma_at_any_number_of_steps(place: Place) -> None:
    start = untrained_predictor(
        expert_design(place.workload), place.train[0].sigmas, place.train[0].channels, noise_levels(place.others)
    )
    for num_steps in (6, 9, 13, 16):
        sigmas = interpolated(place.others[16][0].sigmas, num_steps)
        schedule = place.workload.budgets()["2x"].carried(num_steps, 4)
        alphas = start.alphas(schedule, sigmas)
        for step in schedule.predicted_steps:
            dt = time_offsets(sigmas, step, schedule.anchors(step, 2))[None]
            assert float(alphas[step]) == pytest.approx(float(linear_alpha(dt)), rel=0.02)
    line = torch.randn(2, 4, place.train[0].channels, generator=torch.Generator().manual_seed(0))
    rule, history = start.bind(schedule, sigmas), History(2)
    for step in range(num_steps):  # exact for features linear in sigma
        true = line[0] + line[1] * sigmas[step]
        if schedule.is_full(step):
            history.push(step, true)
        else:
            torch.testing.assert_close(rule(history, step), true, rtol=0.05, atol=0.05)


def test_trained_experts_predict_as_the_bound_rule_does(place: Place) -> None:
    """Training's own batched prediction, and alpha = KAN(dt) dt_0 / (dt_1 - dt_0) from the exported tensors."""
    splits, schedule = place.others[16], place.workload.budgets()["2.5x"].carried(16, 4)
    sigmas, channels = splits[0].sigmas, splits[0].channels
    stages = stage_of_steps(sigmas, place.workload.predictor.boundaries)
    rule = place.second.bind(schedule, sigmas)
    assert rule.name == "lesa[mixed]" and rule.sizes == (2, 2) and not rule.by_step
    for stage in (0, 1):
        levels = noise_levels(place.others)
        expert = new_expert(
            expert_design(place.workload), Job(MIXED, stage), place.train[0].sigmas, channels, levels
        )
        expert.load_export(*(place.second.expert(MIXED_VARIANT, stage, part) for part in ("projection", "gate")))
        targets = Targets.on(schedule, sigmas, stages, stage, 2, "full_steps")
        features = splits[0].feature_batch([0, 1], targets.needed)
        with torch.no_grad():
            predicted = targets.predict(expert, features)
        for index, (step, past) in enumerate(zip(targets.steps, targets.past, strict=True)):
            history = History(2)
            for entry in reversed(past):
                history.push(entry, splits[0].feature_batch([0, 1], [entry])[:, 0])
            torch.testing.assert_close(predicted[:, index], rule(history, step), rtol=1e-4, atol=1e-4)


def test_every_number_of_steps_between_is_served() -> None:
    """Offsets between the trained numbers of steps lie in the gates' range, at FLUX's shifted noise levels."""
    design = training_set.design(
        call={"num_inference_steps": 50},
        schedule={"budgets": {"3x": BudgetParams(interval=3), "8x": BudgetParams(full_steps=(0, 4, 11, 20, 30, 40))}},
        record={"step_counts": (20, 100)},
        predictor={"gate": "kan", "hidden": 2, "grid": 3, "kind": "per_step"}
        | {"boundaries": (0.8, 0.4), "history_sizes": (2, 2, 2)},
    )
    levels = {count: training_set.sigmas(count) for count in (20, 100)}
    predictor = untrained_predictor(design, training_set.sigmas(50), training_set.CHANNELS, levels)
    for num_steps in (20, 23, 29, 47, 60, 99, 100):
        for schedule in carried_schedules(design, num_steps):
            predictor.bind(schedule, training_set.sigmas(num_steps))
    for num_steps in (19, 101):
        with pytest.raises(ValueError, match=f"num_inference_steps: got {num_steps}, the predictor serves 20 to 100"):
            predictor.bind(design.schedules["8x"].carried(num_steps), training_set.sigmas(num_steps))
    with pytest.raises(ValueError, match="outside the range the experts 'mixed' were trained on"):
        predictor.bind(Schedule.explicit(50, (0, 1)), training_set.sigmas(50))
    few = served_offsets(design, 1, levels | {50: training_set.sigmas(50)})
    assert few.shape[1] == 2 and len(few) <= 515 and (few[2:, 1] > few[2:, 0]).all()


def test_untrained_schedules_of_the_own_number_of_steps_are_served(place: Place, pipe: Any) -> None:
    """Weights of each step serve their own full steps only; other intervals go to the experts for any length."""
    spec = place.second.spec
    assert spec.variant_for(place.workload.budgets()["2x"]).name == "2x"
    assert spec.variant_for(Schedule.uniform(OWN, 3)) == MIXED_VARIANT
    lesa.enable(pipe, place.bundle, interval=3)
    run(place, OWN)
    assert lesa.summary(pipe).rule == "lesa[mixed]" and lesa.summary(pipe).num_full == 6
    lesa.disable(pipe)
    with pytest.raises(ValueError, match="needs 2 full steps before step 1"):
        lesa.enable(pipe, place.bundle, full_steps=[0, 3, 6])
    flops = [
        predictor_flops(spec, schedule, place.train[0].sigmas, tokens=16)
        for schedule in (place.workload.budgets()["2x"], place.workload.budgets()["2x"].carried(OWN))
    ]
    assert flops[0] != flops[1] and all(value > 0 for value in flops)


@pytest.mark.parametrize("num_steps", [6, 9, 16])
def test_a_run_of_another_length_is_the_carried_schedule_bound_by_hand(place: Place, pipe: Any, num_steps: int) -> None:
    plain = run(place, num_steps)
    schedule = place.bundle.manifest.budgets["2x"].schedule.carried(num_steps, 4)  # as many as the fastest has
    rule = place.second.bind(schedule, pipe.scheduler.sigmas.clone())
    lesa.apply_lesa_cache(
        pipe.transformer, LesaCacheConfig(schedule=schedule, rule=rule, scheduler=pipe.scheduler, measure=False)
    )
    by_hand = run(place, num_steps)
    lesa.remove_lesa_cache(pipe.transformer)
    lesa.enable(pipe, place.bundle.path, budget="2x")
    fast = run(place, num_steps)
    assert torch.equal(fast, by_hand) and not torch.equal(fast, plain)
    assert float((fast - plain).abs().mean()) < 0.05
    statistics = lesa.summary(pipe)
    assert statistics.schedule == schedule and statistics.num_full == schedule.num_full and statistics.finished
    assert f"{schedule.num_full} full of {num_steps}" in str(statistics) and "lesa[mixed]" in str(statistics)
    lesa.disable(pipe)
    assert torch.equal(run(place, num_steps), plain)


def test_a_short_run_keeps_the_full_steps_of_the_fastest_budget(place: Place, pipe: Any) -> None:
    assert min(budget.schedule.num_full for budget in place.bundle.manifest.budgets.values()) == 4
    lesa.enable(pipe, place.bundle, budget="2.5x")
    run(place, 6)
    assert lesa.summary(pipe).num_full == 4  # by its ratio it would be 2 or 3
    run(place, 16)
    assert lesa.summary(pipe).num_full == 6


def test_runs_of_different_lengths_follow_each_other(place: Place, pipe: Any) -> None:
    lesa.enable(pipe, place.bundle)
    assert lesa.call_kwargs(pipe)["num_inference_steps"] == OWN
    assert "5 full of 10" in str(lesa.summary(pipe))  # before any run: the bundle's own
    alone = {}
    for num_steps in (OWN, 6, 16):
        alone[num_steps] = run(place, num_steps)
        lesa.disable(pipe)
        lesa.enable(pipe, place.bundle)
    for num_steps in (16, OWN, 6, 6, OWN, 16):
        assert torch.equal(run(place, num_steps), alone[num_steps]), num_steps
        assert lesa.summary(pipe).schedule.num_steps == num_steps
        assert lesa.summary(pipe).rule == ("lesa[2x]" if num_steps == OWN else "lesa[mixed]")


def test_runs_of_fewer_steps_than_the_range_are_full(place: Place, pipe: Any) -> None:
    plain = run(place, 5)
    lesa.enable(pipe, place.bundle)
    with pytest.warns(UserWarning, match=r"the run has 5 step\(s\), and nothing is predicted in runs of fewer than 6"):
        assert torch.equal(run(place, 5), plain)
    assert lesa.summary(pipe).num_full == 5 and "in full" in lesa.summary(pipe).notes


def test_above_the_range_is_refused_before_anything_is_computed(place: Place, pipe: Any) -> None:
    num_steps = 17
    lesa.enable(pipe, place.bundle)
    expected = run(place, OWN)
    computed: list[int] = []
    handle = pipe.transformer.x_embedder.register_forward_hook(lambda *_: computed.append(1))
    try:
        with pytest.raises(MismatchError) as caught:
            run(place, num_steps)
    finally:
        handle.remove()
    assert caught.value.problems == [f"num_inference_steps: got {num_steps}, expected 6 to 16, as it was trained"]
    assert computed == [] and not lesa.summary(pipe).finished
    assert torch.equal(run(place, OWN), expected)


def test_intervals_go_to_any_length_and_lists_to_their_own(place: Place, pipe: Any) -> None:
    lesa.enable(pipe, place.bundle, interval=3)
    run(place, 12)
    assert lesa.summary(pipe).schedule == Schedule.uniform(12, 3)
    lesa.disable(pipe)
    plain = run(place, 12)
    lesa.enable(pipe, place.bundle, interval=1)
    assert torch.equal(run(place, 12), plain)
    lesa.disable(pipe)
    lesa.enable(pipe, place.bundle, full_steps=[0, 1, 4, 7])
    run(place, OWN)
    with pytest.raises(MismatchError, match="full_steps: they are for 10 steps, the run has 12"):
        run(place, 12)


def test_other_noise_levels_and_calls_are_refused_together(place: Place, pipe: Any) -> None:
    lesa.enable(pipe, place.bundle)
    call = dataclasses.replace(place.workload.call, num_inference_steps=12, guidance_scale=1.0)
    levels = [0.9 - 0.05 * step for step in range(12)]
    with pytest.raises(MismatchError) as caught:
        sample(pipe, ["a white dog"], [3], call, sigmas=levels)
    first, second = caught.value.problems
    assert first.startswith("sigmas: got 0.9") and "at the start, expected 1" in first
    assert second == "guidance_scale: got 1, expected 3.5"


def test_the_command_line_samples_at_another_number_of_steps(place: Place, tmp_path: Path, capsys: Any) -> None:
    arguments = ["sample", "a white dog", "--bundle", str(place.bundle.path), "--device", "cpu", "--json"]
    assert main([*arguments, "--steps", "6", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["num_full"] == 4
    assert main([*arguments, "--steps", "17", "--out", str(tmp_path / "none")]) == 2
    assert "--steps: got 17, the bundle serves 6 to 16" in capsys.readouterr().err


def test_the_manifest_says_the_range_and_the_card_shows_it(place: Place, tmp_path: Path) -> None:
    manifest = place.bundle.manifest
    assert manifest.step_range == (6, 16) and manifest.data["step_range"] == [6, 16] and manifest.data["schema"] == 4
    card = (place.bundle.path / "README.md").read_text()
    assert "6 to 16 steps (trained at 6, 10, 16; the figures below are at 10)" in card
    assert manifest.data["training"]["num_trajectories"] == 4 + 2 + 2
    assert manifest.data["training"]["num_validation_trajectories"] == 2 + 2 + 2
    import shutil

    for change, words in (
        ({"step_range": [6, 20]}, "step_range: got [6, 20], the predictor was trained on [6, 16]"),
        ({"step_range": [16, 6]}, "step_range: must be two numbers of steps, the lowest first"),
        ({"schema": 2}, "schema: got 2, this version reads 3 and 4: make the bundle again"),
    ):
        folder = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        shutil.copytree(place.bundle.path, folder)
        edit(folder, lambda document, change=change: document.update(change))
        with pytest.raises(BundleError) as caught:
            load_bundle(folder)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_counts": [16, 10]}, "step_counts must increase without repeats"),
        ({"step_counts": [6, 16]}, r"step_counts \[6, 16\] must contain num_steps 10"),
        ({"step_counts": [0, 10]}, "step_counts must be integers from 1 to 10000"),
        ({"step_counts": [True, 10]}, r"predictor\.step_counts\[0\]: must be int, got bool True"),
        ({"step_counts": 5}, r"predictor\.step_counts: must be a list, got int 5"),
        ({"gate": "table"}, "a table gate serves one number of steps"),
        ({"variants": [{"name": "mixed", "full_steps": [0]}]}, "variant name 'mixed' is that of the experts"),
    ],
)
def test_a_bad_spec_is_refused(place: Place, change: dict[str, Any], words: str) -> None:
    data = place.second.spec.to_dict()
    assert PredictorSpec.from_dict(data) == place.second.spec
    with pytest.raises(ValueError, match=words):
        PredictorSpec.from_dict(data | change)


def test_a_number_that_is_not_finite_stops_the_mixed_experts_too(place: Place, tmp_path: Path) -> None:
    train, validation = place.others[16]
    assert train.features is not None
    poisoned = dataclasses.replace(train, features=torch.full_like(train.features, float("nan")))
    others = {6: (poisoned, validation), 16: (poisoned, validation)} | {6: place.others[6]}
    settings = dataclasses.replace(place.workload.ground_truth, iterations=40)
    from lesa.models.output_head import output_head_of

    with pytest.raises(TrainingError, match="not finite"):
        train_expert(
            expert_design(place.workload),
            settings,
            Job(MIXED, 1),
            *place.train,
            output_head_of(place.pipe.transformer),
            device=torch.device("cpu"),
            others=others,
            work_dir=tmp_path,
            report=lambda *_: None,
        )
