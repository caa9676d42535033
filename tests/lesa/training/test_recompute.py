"""Gradients through the sampler at less memory, and at less cost: what is recomputed, what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lesa.models.families import blocks, family_of
from lesa.schedule import Schedule
from lesa.training import closed_loop
from lesa.training.recompute import constant_steps
from lesa.training.rollout import ExpertRule, accelerated_latents
from tests.lesa.training.test_closed_loop import Place, freeze_all, place, rule_of, small, train_at  # noqa: F401 - fixture


def latents_of(place: Place, rule: ExpertRule, recomputed: bool, constants: frozenset[int]) -> torch.Tensor:  # noqa: F811
    call = place.workload.call
    return accelerated_latents(place.pipe, call, rule.schedule, rule, place.train, [0, 2], recomputed, constants)


@pytest.mark.parametrize("history", ["full_steps", "steps"])
@pytest.mark.parametrize("projection", ["low_rank", "dense"])
def test_recomputing_changes_no_gradient_of_any_projection(place: Place, history: str, projection: str) -> None:  # noqa: F811
    freeze_all(place.pipe)
    workload = small(place.workload, predictor={"projection": projection, "rank": 4, "history": history})
    gradients = []
    for recomputed in (False, True):
        rule = rule_of(place, workload)
        latents_of(place, rule, recomputed, frozenset()).square().sum().backward()
        gradients.append({n: p.grad for s in (0, 1) for n, p in rule.experts[s].named_parameters(str(s))})
    assert sum(value is not None and bool(value.abs().max() > 0) for value in gradients[0].values()) >= 4
    for name, plain in gradients[0].items():
        again = gradients[1][name]
        assert (plain is None) == (again is None), name
        if plain is not None:
            torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("recomputed", [False, True])
def test_constant_steps_have_no_gradient_and_the_same_values(place: Place, recomputed: bool) -> None:  # noqa: F811
    freeze_all(place.pipe)
    rule = rule_of(place)
    full = rule.schedule.full_steps
    (_, first, _), *_ = blocks(place.pipe.transformer, family_of(place.pipe.transformer))
    recording: list[bool] = []
    handle = first.norm1.register_forward_pre_hook(  # not called where the block is skipped
        lambda *_: recording.append(torch.is_grad_enabled())
    )
    try:
        whole = latents_of(place, rule, recomputed, frozenset())
        assert recording == [True] * len(full)
        recording.clear()
        part = latents_of(place, rule, recomputed, frozenset(full[1:]))
        assert recording == [True] + [False] * (len(full) - 1)
    finally:
        handle.remove()
    assert torch.equal(whole, part) and part.requires_grad
    slopes = []
    for latents in (whole, part):
        table: torch.Tensor = rule.experts[1].gate.values  # type: ignore[assignment, union-attr]
        table.grad = None
        latents.square().sum().backward()
        assert table.grad is not None and float(table.grad.abs().max()) > 0
        slopes.append(table.grad.clone())
    assert not torch.allclose(*slopes)
    last = rule.schedule.num_steps - 1  # nothing is computed in full after it: its own slope owes the model nothing
    assert last in rule.schedule.predicted_steps
    assert float(slopes[0][last]) == pytest.approx(float(slopes[1][last]), rel=1e-4)


def test_constant_steps_are_drawn_anew_and_in_proportion() -> None:
    schedule = Schedule.uniform(50, 5, 3)
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    assert constant_steps(schedule, 1.0, generator) == frozenset() and torch.equal(generator.get_state(), state)
    assert constant_steps(schedule, 0.0, generator) == frozenset(schedule.full_steps)
    drawn = [constant_steps(schedule, 0.25, generator) for _ in range(200)]
    assert len(set(drawn)) > 100 and all(steps <= set(schedule.full_steps) for steps in drawn)
    left_out = sum(map(len, drawn)) / (200 * schedule.num_full)
    assert left_out == pytest.approx(0.75, abs=0.03)


def test_training_without_the_models_gradient_improves_the_sampler_too(place: Place, tmp_path: Path) -> None:  # noqa: F811
    loop = {"iterations": 12, "learning_rate": 5e-3, "batch_size": 4, "model_gradient": 0.0}
    trained = train_at(place, small(place.workload, closed_loop=loop), tmp_path)
    assert trained.figures["validation_loss"] < trained.figures["validation_loss_start"] - 0.01


def test_the_loop_takes_the_share_of_its_settings(
    place: Place,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[float, bool]] = []

    def drawn(schedule: Schedule, share: float, batch: torch.Generator) -> frozenset[int]:
        asked.append((share, torch.is_grad_enabled()))
        return constant_steps(schedule, share, batch)

    monkeypatch.setattr(closed_loop, "constant_steps", drawn)
    workload = small(place.workload, closed_loop={"iterations": 2, "model_gradient": 0.5})
    train_at(place, workload, tmp_path)
    assert asked == [(0.5, True)] * 2, "once an optimiser step, and validation has every step"
