"""The second training step through a real, tiny pipeline: gradients, hooks, drifted states."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from lesa.models.families import blocks, family_of
from lesa.models.output_head import output_head_of
from lesa.models.pipelines import load_pipeline, sample
from lesa.params import BudgetParams, CallParams, ClosedLoopParams, Workload
from lesa.params_file import load_params
from lesa.peers.rules import RULES
from lesa.predictor.predictor import Predictor
from lesa.predictor.rule import History
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, is_lesa_cache_enabled, remove_lesa_cache
from lesa.schedule import Schedule
from lesa.training import closed_loop, losses, rollout
from lesa.training.closed_loop import drifted_loss, predictor_digest, restore, train_budget
from lesa.training.expert import Expert
from lesa.training.experts import Job, Trained, assemble, new_expert, untrained_predictor
from lesa.training.ground_truth import train_expert
from lesa.training.jobs import expert_design
from lesa.training.rollout import ExpertRule, accelerated_latents, in_loop
from lesa.training.targets import Targets
from tests.helpers import training_set
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository


@dataclasses.dataclass
class Place:
    """A recorded tiny workload."""

    workload: Workload
    pipe: Any
    train: Trajectories
    validation: Trajectories
    start: Predictor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    before = Path.cwd()
    os.chdir(tiny_repository(tmp_path_factory.mktemp("repository")))
    try:
        workload = small(load_params())
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        train_set, validation = recorded_splits(workload.recording)
        start = untrained_predictor(expert_design(workload), train_set.sigmas, train_set.channels)
        yield Place(workload, pipe, train_set, validation, start)
    finally:
        os.chdir(before)


def small(workload: Workload, **changes: Any) -> Workload:
    """A table gate, two stages; `predictor`, `closed_loop`, ... are dicts of changed settings."""
    settings: dict[str, dict[str, Any]] = {
        "predictor": {
            "boundaries": (0.6,),
            "history_sizes": (2, 3),
            "gate": "table",
            "projection": "per_channel",
        },
        "closed_loop": {"iterations": 3, "batch_size": 2, "checkpoint_every": 1, "learning_rate": 1e-3},
    }
    for name, values in changes.items():
        settings[name] = settings.get(name, {}) | values
    parts = {
        name: dataclasses.replace(getattr(workload, name), **values) for name, values in settings.items()
    }
    return dataclasses.replace(workload, **parts)


def train(workload: Workload, *given: Any, **more: Any) -> Trained:
    """`train_budget` with the sections of a workload."""
    settings, loss = workload.closed_loop, workload.ground_truth.loss
    return train_budget(expert_design(workload), settings, *given, feature_loss=loss, **more)


def train_at(place: Place, workload: Workload, work_dir: Path) -> Trained:
    """The place's budget trained from its start, as the workload says."""
    return train(
        workload,
        "2x",
        place.start,
        place.pipe,
        place.train,
        place.validation,
        work_dir=work_dir,
        report=lambda *_: None,
    )


def rule_of(place: Place, workload: Workload | None = None) -> ExpertRule:
    workload = workload or place.workload
    stages = range(len(workload.predictor.history_sizes))
    return ExpertRule(
        experts={
            s: new_expert(expert_design(workload), Job("2x", s), place.train.sigmas, place.train.channels)
            for s in stages
        },
        schedule=workload.budgets()["2x"],
        sigmas=place.train.sigmas,
        boundaries=workload.predictor.boundaries,
        sizes=workload.predictor.history_sizes,
        history=workload.predictor.history,
    )


def loss_of(place: Place, rule: ExpertRule, checkpointing: bool = False) -> torch.Tensor:
    call = place.workload.call
    latents = accelerated_latents(place.pipe, call, rule.schedule, rule, place.train, [0, 2], checkpointing)
    return losses.log_latents_loss(latents, place.train.latents[[0, 2]])


def freeze_all(pipe: Any) -> None:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)


def test_recorded_latents_are_what_the_loop_compares_with(place: Place) -> None:
    """With every step full, the loop's latents are the recorded ones."""
    rule = dataclasses.replace(
        rule_of(place),
        schedule=dataclasses.replace(place.workload.budgets()["2x"], full_steps=tuple(range(8))),
    )
    with torch.no_grad():
        latents = accelerated_latents(place.pipe, place.workload.call, rule.schedule, rule, place.train, [1, 3])
    reference = place.train.latents[[1, 3]]
    assert latents.shape == reference.shape
    torch.testing.assert_close(latents, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "step", [4, 7]
)  # before a full step, which the gradient passes through, and after the last
def test_the_gradient_through_the_sampler_is_the_slope(place: Place, step: int) -> None:
    freeze_all(place.pipe)
    rule = rule_of(place)
    table: torch.Tensor = rule.experts[rule.stages[step]].gate.values  # type: ignore[assignment, union-attr]
    loss_of(place, rule).backward()
    assert table.grad is not None
    slope = float(table.grad[step])
    width = 0.02
    with torch.no_grad():
        table[step] += width
        above = float(loss_of(place, rule))
        table[step] -= 2 * width
        below = float(loss_of(place, rule))
        table[step] += width
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((above - below) / (2 * width), rel=0.03)


def test_recomputing_activations_changes_no_gradient(place: Place) -> None:
    freeze_all(place.pipe)
    gradients = []
    for checkpointing in (False, True):
        rule = rule_of(place)
        loss_of(place, rule, checkpointing).backward()
        gradients.append([p.grad for s in (0, 1) for p in rule.experts[s].parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients[0])
    assert not any("forward" in block.__dict__ for _, block, _ in rows(place))


def rows(place: Place) -> list[Any]:
    return blocks(place.pipe.transformer, family_of(place.pipe.transformer))


@pytest.mark.parametrize("gradient", ["through_sampler", "drifted_states"])
@pytest.mark.parametrize("history", ["full_steps", "steps"])
def test_never_worse_than_the_start_and_the_pipeline_as_it_was(
    place: Place, tmp_path: Path, gradient: str, history: str
) -> None:
    workload = small(
        place.workload,
        closed_loop={"gradient": gradient, "gradient_checkpointing": history == "steps"},
        predictor={"history": history},
    )
    start = untrained_predictor(expert_design(workload), place.train.sigmas, place.train.channels)
    before = sample(place.pipe, ["a thin seven"], [5], workload.call)
    seen: list[int] = []
    trained = train(
        workload,
        "2x",
        start,
        place.pipe,
        place.train,
        place.validation,
        work_dir=tmp_path,
        report=lambda iteration, _: seen.append(iteration),
    )
    assert seen == [1, 2, 3]
    assert trained.figures["validation_loss"] <= trained.figures["validation_loss_start"]
    assert trained.budget == "2x" and set(trained.experts) == {0, 1} and trained.step_weights == {}
    assert not is_lesa_cache_enabled(place.pipe.transformer)
    assert not any("forward" in block.__dict__ for _, block, _ in rows(place))
    assert torch.equal(sample(place.pipe, ["a thin seven"], [5], workload.call), before)


def test_training_through_the_sampler_improves_it(place: Place, tmp_path: Path) -> None:
    workload = small(place.workload, closed_loop={"iterations": 12, "learning_rate": 5e-3, "batch_size": 4})
    trained = train_at(place, workload, tmp_path)
    assert trained.figures["validation_loss"] < trained.figures["validation_loss_start"] - 0.02
    changed = [
        name
        for name, value in trained.experts[1].items()
        if not torch.equal(value, place.start.tensors[f"2x/1/{name}"])
    ]
    assert "projection.scale" in changed and "gate.table" in changed


def test_weights_of_each_step_are_trained_and_sample_as_they_were_trained(place: Place, tmp_path: Path) -> None:
    """From the closed form, on a schedule whose first predicted steps have one feature behind them."""
    workload = small(
        place.workload,
        predictor={"kind": "per_step", "history_sizes": (2, 2), "projection": "low_rank", "rank": 4},
        closed_loop={"iterations": 8, "step_learning_rate": 0.05, "batch_size": 4},
        ground_truth={"iterations": 2, "batch_size": 2},
        schedule={"budgets": {"2x": BudgetParams(full_steps=(0, 2, 4, 6))}, "default_budget": "2x"},
    )
    head, arguments = output_head_of(place.pipe.transformer), (place.train, place.validation)
    design = expert_design(workload)
    parts = [
        train_expert(
            design,
            workload.ground_truth,
            Job("2x", stage),
            *arguments,
            head,
            device=place.pipe.device,
            work_dir=tmp_path,
            report=lambda *_: None,
        )
        for stage in range(2)
    ]
    for part in parts:  # each job's share is of its own noise stage's steps alone, a budget's weights are their sum
        assert 0 < part.step_weights["weight"].abs().amax(dim=(1, 2)).count_nonzero() < 7
    start = assemble(design, place.train.channels, parts)
    shares = [part.step_weights["weight"] for part in parts]
    assert torch.equal(start.tensors["2x/steps/weight"], shares[0] + shares[1])
    assert not (shares[0].abs().amax(dim=(1, 2)) * shares[1].abs().amax(dim=(1, 2))).any()
    assert start.tensors["2x/steps/weight"][[1, 3, 5, 7]].abs().amax(dim=(1, 2)).min() > 0
    assert start.tensors["2x/steps/weight"][0].eq(0).all()
    tuned = train(
        workload, "2x", start, place.pipe, *arguments, work_dir=tmp_path / "loop", report=lambda *_: None
    )
    assert tuned.figures["validation_loss"] < tuned.figures["validation_loss_start"] - 0.02
    trained = assemble(design, place.train.channels, [tuned])
    assert torch.equal(trained.tensors["2x/steps/weight"], tuned.step_weights["weight"])
    assert not torch.equal(trained.tensors["2x/steps/weight"], start.tensors["2x/steps/weight"])
    schedule = workload.budgets()["2x"]
    with torch.no_grad():
        sampled = accelerated_latents(
            place.pipe, workload.call, schedule, trained.bind(schedule, place.train.sigmas), place.validation, [0, 1]
        )
    loss = losses.log_latents_loss(sampled, place.validation.latents[[0, 1]])
    assert float(loss) == pytest.approx(tuned.figures["validation_loss"], abs=1e-3)


def test_drifted_states_lower_their_own_loss(place: Place) -> None:
    rule = rule_of(place)
    head = output_head_of(place.pipe.transformer)
    parameters = [p for expert in rule.experts.values() for p in expert.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    curve = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = drifted_loss(place.pipe, place.workload.call, rule, place.train, [0, 1], head, "output")
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert curve[-1] < 0.95 * curve[0], curve
    assert rule.captured is None


def test_drifted_histories_are_the_accelerated_runs_own(place: Place) -> None:
    """Before the first prediction nothing has drifted; after it, the full step differs from the recorded one."""
    rule = rule_of(place)
    rule.captured = {}
    with torch.no_grad():
        accelerated_latents(place.pipe, place.workload.call, rule.schedule, rule, place.train, [0, 1])
    captured = rule.captured
    assert {branch for branch, _ in captured} == {0}
    assert {step for _, step in captured} <= set(place.workload.budgets()["2x"].full_steps)
    recorded = place.train.feature_batch([0, 1], [3, 6])
    torch.testing.assert_close(captured[0, 3], recorded[:, 0], rtol=0.02, atol=0.02)  # bfloat16 apart
    drift = (captured[0, 6] - recorded[:, 1]).abs().mean() / recorded[:, 1].abs().mean()
    assert float(drift) > float((captured[0, 3] - recorded[:, 0]).abs().mean() / recorded[:, 0].abs().mean())


def test_branches_of_a_step_are_kept_apart(place: Place) -> None:
    rule = rule_of(place)
    rule.captured = {}
    rings = [History(3, branch=0), History(3, branch=1)]
    for branch, ring in enumerate(rings):
        for step in (0, 1, 2, 3):
            ring.push(step, torch.full((1, 2, place.train.channels), float(10 * branch + step)))
    for step in (4, 5):
        for ring in rings:
            rule(ring, step)
    size = max(rule.sizes[rule.stages[step]] for step in (4, 5))
    expected = {(branch, step): float(10 * branch + step) for branch in (0, 1) for step in range(4 - size, 4)}
    assert {at: float(value.mean()) for at, value in rule.captured.items()} == expected


def test_hooks_go_when_the_run_breaks(place: Place) -> None:
    class Broken(ExpertRule):
        def __call__(self, history: Any, step: int) -> torch.Tensor:
            raise RuntimeError("broken rule")

    rule = Broken(
        **{f.name: getattr(rule_of(place), f.name) for f in dataclasses.fields(ExpertRule) if f.init}
    )
    before = sample(place.pipe, ["a thin seven"], [5], place.workload.call)
    for checkpointing in (False, True):
        with pytest.raises(RuntimeError, match="broken rule"), torch.no_grad():
            accelerated_latents(place.pipe, place.workload.call, rule.schedule, rule, place.train, [0], checkpointing)
        assert not is_lesa_cache_enabled(place.pipe.transformer)
        assert not any("forward" in block.__dict__ for _, block, _ in rows(place))
    assert torch.equal(sample(place.pipe, ["a thin seven"], [5], place.workload.call), before)


def test_a_pipeline_in_use_is_left_alone(place: Place) -> None:
    schedule, transformer = place.workload.budgets()["2x"], place.pipe.transformer
    reuse = RULES["reuse"](schedule, place.train.sigmas)
    apply_lesa_cache(
        transformer, LesaCacheConfig(schedule=schedule, rule=reuse, scheduler=place.pipe.scheduler)
    )
    try:
        forwards = [block.forward for _, block, _ in rows(place)]
        with pytest.raises(ValueError, match=r"call lesa.disable\(pipe\) before training"):
            with in_loop(place.pipe, rule_of(place).schedule, rule_of(place), gradient_checkpointing=True):
                pytest.fail("the loop must not start")
        assert is_lesa_cache_enabled(transformer)
        assert [block.forward for _, block, _ in rows(place)] == forwards
    finally:
        remove_lesa_cache(transformer)


def test_another_tools_forward_survives_recomputing(place: Place) -> None:
    _, block, _ = rows(place)[0]
    original = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    block.forward = wrapped
    try:
        with in_loop(place.pipe, rule_of(place).schedule, rule_of(place), gradient_checkpointing=True):
            assert block.forward is not wrapped
        assert block.forward is wrapped
    finally:
        del block.forward


@pytest.mark.parametrize("gradient", ["through_sampler", "drifted_states"])
def test_a_bfloat16_pipeline_trains_float32_experts(place: Place, tmp_path: Path, gradient: str) -> None:
    workload = small(
        place.workload,
        model={"dtype": "bfloat16"},
        closed_loop={"gradient": gradient, "iterations": 1},
        predictor={"projection": "dense"},
    )
    pipe = load_pipeline(workload.model, workload.resources.device)
    start = untrained_predictor(expert_design(workload), place.train.sigmas, place.train.channels)
    seen: list[dict[str, float]] = []
    trained = train(
        workload,
        "2x",
        start,
        pipe,
        place.train,
        place.validation,
        work_dir=tmp_path,
        report=lambda _, values: seen.append(values),
    )
    assert seen[0]["gradient_norm"] > 0
    assert {value.dtype for part in trained.experts.values() for value in part.values()} == {torch.float32}
    assert pipe.transformer.norm_out.linear.weight.dtype == torch.bfloat16


def test_no_step_to_predict_is_nothing_to_train(place: Place, tmp_path: Path) -> None:
    workload = small(place.workload, schedule={"budgets": {"2x": BudgetParams(interval=1)}})
    start = untrained_predictor(expert_design(workload), place.train.sigmas, place.train.channels)
    trained = train(
        workload,
        "2x",
        start,
        place.pipe,
        place.train,
        place.validation,
        work_dir=tmp_path,
        report=lambda *_: pytest.fail("nothing to train"),
    )
    assert trained.figures == {} and trained.step_weights == {}
    assert assemble(expert_design(workload), place.train.channels, [trained]).tensors.keys() == start.tensors.keys()
    for stage, part in trained.experts.items():
        for name, value in part.items():
            assert torch.equal(value, start.tensors[f"2x/{stage}/{name}"])


def test_a_first_step_of_other_settings_is_refused(place: Place, tmp_path: Path) -> None:
    workload = small(place.workload, predictor={"projection": "dense"})
    with pytest.raises(ValueError, match="has other settings; run train_stage1"):
        train_at(place, workload, tmp_path)


def test_what_was_judged_is_what_is_trained_further(place: Place) -> None:
    variant = place.start.spec.variants[0]
    for stage in (0, 1):
        expert: Expert = new_expert(
            expert_design(dataclasses.replace(place.workload, seed=9)),
            Job("2x", stage),
            place.train.sigmas,
            place.train.channels,
        )
        restore(expert, place.start, variant, stage)
        for name, value in expert.export().items():
            assert torch.equal(value, place.start.tensors[f"2x/{stage}/{name}"]), name
    changed = dict(place.start.tensors)
    changed["2x/0/projection.bias"] = changed["2x/0/projection.bias"] + 1e-7
    assert predictor_digest(Predictor(place.start.spec, changed)) != predictor_digest(place.start)
    assert predictor_digest(Predictor(place.start.spec, dict(place.start.tensors))) == predictor_digest(
        place.start
    )
    assert set(SPLITS) == {"train", "validation", "test"}


def test_a_rollout_is_compared_with_its_own_recorded_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows out of order, and not from the first on: what equals the recorded run has no error."""
    data: Any = SimpleNamespace(latents=torch.arange(12.0).reshape(4, 3))
    asked: list[list[int]] = []

    def latents(pipe: Any, call: Any, schedule: Any, rule: Any, data: Any, rows: list[int], *_: Any) -> torch.Tensor:
        asked.append(rows)
        return data.latents[rows]

    monkeypatch.setattr(closed_loop, "accelerated_latents", latents)
    case: Any = SimpleNamespace(schedule=None, rule=None)
    objective = closed_loop._through_sampler(None, None, ClosedLoopParams(loss="latents"))  # type: ignore[arg-type]
    assert float(objective.loss(case, data, [3, 1], None)) == 0.0 and asked == [[3, 1]]


class Remembers:
    """A pipeline that runs nothing and remembers what it was asked for."""

    components: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def __call__(self, **given: Any) -> None: ...

    def run(self, **given: Any) -> tuple[torch.Tensor]:
        self.asked = given
        return (torch.zeros(1),)


Remembers.__call__.__wrapped__ = Remembers.run  # type: ignore[attr-defined]


def test_a_rollout_has_the_rows_own_prompts_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "in_loop", lambda *_: nullcontext())
    monkeypatch.setattr(rollout, "call_arguments", lambda pipe, call, size: {"steps": call.num_inference_steps})
    data: Any = SimpleNamespace(prompts=("a", "b", "c", "d"), seeds=(10, 11, 12, 13))
    call = CallParams(height=16, width=16, num_inference_steps=8)
    pipe = Remembers()
    accelerated_latents(pipe, call, Schedule.uniform(5, 2), None, data, [3, 1])  # type: ignore[arg-type]
    assert pipe.asked["prompt"] == ["d", "b"] and pipe.asked["steps"] == 5
    assert [generator.initial_seed() for generator in pipe.asked["generator"]] == [13, 11]


def test_the_loop_is_whitened_and_fitted_on_training_trajectories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the second step's training left out, what it is prepared with is what is looked at."""
    data, judged = training_set.splits(tmp_path / "s.zarr")
    design = training_set.design(predictor={"kind": "per_step", "step_history": 2})
    start = untrained_predictor(design, data.sigmas, data.channels)
    asked: list[tuple[str, Any]] = []
    real = closed_loop.start_step_weights

    def weights(design: Any, budget: Any, start: Any, experts: Any, given: Any) -> Any:
        asked.append(("step weights", given))
        return real(design, budget, start, experts, given)

    monkeypatch.setattr(closed_loop, "whiten", lambda expert, cases, **_: asked.extend(("whiten", d) for d, _ in cases))
    monkeypatch.setattr(closed_loop, "start_step_weights", weights)
    monkeypatch.setattr(closed_loop, "fit", lambda *_, **__: {})
    pipe: Any = SimpleNamespace(components={}, device="cpu")
    train_budget(
        design, ClosedLoopParams(), "2x", start, pipe, data, judged,
        feature_loss="output", work_dir=tmp_path, report=lambda *_: None,
    )  # fmt: skip
    assert [what for what, _ in asked] == ["step weights", "whiten", "whiten"]
    assert all(given is data for _, given in asked)


def test_drifted_predictions_meet_the_conditioning_of_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches of a run: the head is asked with the rows' own temb, and histories are of the rows' branches."""
    schedule, levels = Schedule.explicit(4, (0, 1)), torch.linspace(1, 0, 5)
    features = torch.randn(4, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    temb = torch.arange(4.0)[:, None, None].expand(4, 4, 2)
    data: Any = SimpleNamespace(
        branch=(0, 1, 0, 1), temb=temb, feature_batch=lambda rows, steps: features[list(rows)][:, list(steps)]
    )
    captured = {(branch, step): torch.full((2, 3, 2), 10.0 * branch + step) for branch in (0, 1) for step in (0, 1)}
    predictions: list[torch.Tensor] = []
    targets = Targets.on(schedule, levels, [0] * 4, 0, 2, "full_steps")

    def predict(self: Targets, expert: Any, given: torch.Tensor) -> torch.Tensor:
        predictions.append(given)
        return given[:, [self.needed.index(step) for step in self.steps]]

    asked: list[torch.Tensor] = []

    def loss(predicted: Any, target: Any, temb: torch.Tensor, weights: Any, head: Any) -> torch.Tensor:
        asked.append(temb)
        return (predicted - target).abs().mean()

    def rolled(pipe: Any, call: Any, schedule: Any, rule: Any, *_: Any) -> None:
        rule.captured = captured

    monkeypatch.setattr(Targets, "predict", predict)
    monkeypatch.setitem(closed_loop.GROUND_TRUTH, "feature", loss)
    monkeypatch.setattr(closed_loop, "accelerated_latents", rolled)
    expert = SimpleNamespace(low=torch.zeros(2))
    rule: Any = SimpleNamespace(experts={0: expert}, schedule=schedule, targets=lambda stage: targets, captured=None)
    assert float(drifted_loss(None, None, rule, data, [3, 2], None, "feature")) == 0.0  # type: ignore[arg-type]
    assert asked[0][:, 0, 0].tolist() == [3.0, 2.0]
    place = targets.needed.index(1)
    assert predictions[0][:, place, 0, 0].tolist() == [11.0, 1.0], "row 3 is of the second branch, row 2 of the first"
