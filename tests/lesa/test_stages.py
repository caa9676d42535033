"""Noise stages: which expert is responsible at which noise level."""

from __future__ import annotations

import torch

from lesa.schedule import boundary_problems, stage_of_steps


def test_a_step_is_in_the_stage_of_its_noise_level() -> None:
    sigmas = torch.tensor([1.0, 0.85, 0.6, 0.45, 0.3, 0.1, 0.0])
    assert stage_of_steps(sigmas, (0.8, 0.4)) == [0, 0, 1, 1, 2, 2]
    assert stage_of_steps(sigmas, ()) == [0] * 6
    assert stage_of_steps(sigmas, (0.5, 0.2, 0.15)) == [0, 0, 0, 1, 1, 3]


def test_a_boundary_belongs_to_the_noisier_stage() -> None:
    assert stage_of_steps(torch.tensor([0.5, 0.25, 0.0]), (0.5, 0.25)) == [0, 1]


def test_boundaries_do_not_depend_on_the_step_count() -> None:
    for steps in (4, 28, 50, 100):
        levels = torch.linspace(1, 0, steps + 1)
        stages = stage_of_steps(levels, (0.8, 0.4))
        for level, stage in zip(levels[:-1].tolist(), stages, strict=True):
            assert stage == (level < 0.8) + (level < 0.4)
        assert stages == sorted(stages)


def test_every_problem_of_boundaries_is_told() -> None:
    assert boundary_problems(()) == [] and boundary_problems((0.8, 0.4)) == []
    for wrong in ((0.0,), (1.0,), (-0.1,), (float("nan"),), (float("inf"),)):
        assert "strictly between 0 and 1" in boundary_problems(wrong)[0]
    for wrong in ((0.4, 0.8), (0.5, 0.5)):
        assert "decrease without repeats" in boundary_problems(wrong)[0]
    assert len(boundary_problems((0.5, 1.5))) == 2
