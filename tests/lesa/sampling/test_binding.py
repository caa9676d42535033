"""A binding serves the noise levels that it was made for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lesa.sampling.binding import StepCountBinding
from lesa.schedule import Schedule


def test_other_noise_levels_of_as_many_steps_are_bound_anew() -> None:
    bound: list[torch.Tensor] = []

    def bind(predictor: Any, schedule: Schedule, sigmas: torch.Tensor) -> Any:
        bound.append(sigmas)
        return len(bound)

    predictor: Any = SimpleNamespace(spec=SimpleNamespace(step_range=(2, 4)))
    binding = StepCountBinding(predictor, (1.0, 0.0), lambda steps: Schedule.uniform(steps, 2), bind)
    even, shifted = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.8, 0.0])
    assert [binding(levels)[1] for levels in (even, even.clone(), shifted, even)] == [1, 1, 2, 3]
    assert torch.equal(bound[1], shifted) and binding(torch.tensor([1.0, 0.6, 0.3, 0.0]))[0].num_steps == 3
    with pytest.raises(ValueError, match="got 5, expected 2 to 4"):
        binding(torch.linspace(1, 0, 6))
