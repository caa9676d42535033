"""Peers that need no cache: fewer evaluations with the same or a better solver, through the real pipeline.

Both integrate the flow `dx/dsigma = v(x, sigma)` from sigma 1 to 0 on a part of the plain run's noise levels:
    Euler               x' = x + h v
    Adams-Bashforth 2   x' = x + h (v + h / (2 h_before) (v - v_before)), Euler on the first step
with h the step in sigma and h_before the one before (variable-step form; Hairer, Norsett, Wanner, Solving
Ordinary Differential Equations I, III.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

MAX_ORDER = 2


class GridScheduler(FlowMatchEulerDiscreteScheduler):
    """The pipeline's own schedule of noise levels, of which only the steps in `grid` are evaluated.

    The levels are picked after every shift and stretch, so that they are exactly levels of the plain run.
    """

    grid: tuple[int, ...] = ()  # increasing steps of the plain run, starting with 0
    solver_order: int = 1
    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        # Spelt out: pipelines look at the signature before they give noise levels.
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        num_steps = len(self.timesteps)
        if self.grid[-1] >= num_steps:
            raise ValueError(f"the grid ends at step {self.grid[-1]}, the run has {num_steps} steps")
        steps = list(self.grid)
        self.timesteps = self.timesteps[steps]
        self.sigmas = torch.cat([self.sigmas[steps], self.sigmas[-1:]])
        self.num_inference_steps = len(steps)
        self._velocity_before: torch.Tensor | None = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One step; anything but the plain deterministic call is refused with `ValueError`."""
        unknown = [name for name, value in kwargs.items() if value is not None and name != "generator"]
        if args or unknown:
            raise ValueError(f"this solver takes no further arguments, got {[*args, *unknown]}")
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        velocity = model_output.float()
        h = self.sigmas[index + 1] - self.sigmas[index]
        slope = velocity
        if self.solver_order == 2 and self._velocity_before is not None:
            h_before = self.sigmas[index] - self.sigmas[index - 1]
            slope = velocity + h / (2 * h_before) * (velocity - self._velocity_before)
        self._velocity_before = velocity
        # As in the scheduler this stands in for: summed in float32, handed on in the model's dtype.
        latents = (sample.float() + h * slope).to(model_output.dtype)
        self._step_index += 1
        if not return_dict:
            return (latents,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=latents)


def even_grid(num_steps: int, num_evaluations: int) -> tuple[int, ...]:
    """`num_evaluations` steps of a run of `num_steps`, as even as integers allow, the first being 0."""
    if not 1 <= num_evaluations <= num_steps:
        raise ValueError(
            f"evaluations must be from 1 to the {num_steps} steps of the run, got {num_evaluations}"
        )
    return tuple(round(i * num_steps / num_evaluations) for i in range(num_evaluations))


@contextmanager
def solver(pipe: Any, grid: Sequence[int], order: int) -> Iterator[None]:
    """The pipeline with its scheduler replaced by a solver of `order` on the steps `grid` of the plain run.

    The pipeline is called as for the plain run; it makes `len(grid)` evaluations.

    Raises:
        ValueError: for a grid that does not increase from 0, an unknown order, or a scheduler whose steps
        are not
            flow-matching Euler steps.
    """
    plain = pipe.scheduler
    problems = []
    if not grid or grid[0] != 0 or any(b <= a for a, b in pairwise(grid)):
        problems.append(f"grid must increase from step 0, got {list(grid)}")
    if not 1 <= order <= MAX_ORDER:
        problems.append(f"order must be from 1 to {MAX_ORDER}, got {order}")
    if not isinstance(plain, FlowMatchEulerDiscreteScheduler):
        problems.append(
            f"{type(plain).__name__} does not integrate a flow: only flow-matching Euler is replaced"
        )
    elif plain.config.stochastic_sampling or plain.config.invert_sigmas:
        problems.append("the scheduler samples stochastically or inverts its noise levels")
    if problems:
        raise ValueError("solver: " + "; ".join(problems))
    replacement = GridScheduler.from_config(plain.config)
    replacement.grid, replacement.solver_order = tuple(grid), order
    pipe.scheduler = replacement
    try:
        yield
    finally:
        pipe.scheduler = plain
