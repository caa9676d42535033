"""Peers that need no cache: fewer evaluations with the same or a better solver, through the real pipeline.

All integrate the flow `dx/dsigma = v(x, sigma)` from sigma 1 to 0 on a part of the plain run's noise levels. With h
the step in sigma and h_before the one before:
    Euler               x' = x + h v
    Adams-Bashforth 2   x' = x + h (v + h / (2 h_before) (v - v_before)), Euler on the first step
                        (variable-step form; Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.5)
    Heun                x' = x + h (v + v'') / 2 with v'' at the Euler step's end: two evaluations a step; Euler on the
                        last step, since there is nothing to evaluate at sigma 0
DPM-Solver++ 2M (arXiv 2211.01095) and UniPC of order 2 (arXiv 2302.04867; predictor and corrector, B(h) = e^h - 1)
integrate the prediction of the data `x_0 = x - sigma v` in `lambda = log((1 - sigma) / sigma)`; both go down to first
order on the last step, where lambda has no end, and as good as on the second, which comes from sigma = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from lesa.errors import LesaError
from lesa.peers.method import Method


def euler_method(budget: str, num_evaluations: int) -> Method:
    """The pipeline's own scheduler with fewer steps."""
    return Method(
        name="euler",
        label="fewer Euler steps",
        budget=budget,
        kind="solver",
        using=lambda pipe, sigmas: _as_it_is(),
        num_steps=num_evaluations,
        settings={"num_inference_steps": num_evaluations},
    )


def solver_method(
    solver_name: str,
    budget: str,
    num_steps: int,
    num_evaluations: int,
    *,
    grid: Sequence[int] | None = None,
    name: str | None = None,
    label: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Method:
    """A solver of `SOLVERS` on even steps of the plain run's `num_steps`, or on a grid that is given."""
    if solver_name not in SOLVERS:
        raise LesaError(f"{solver_name!r} is not a solver; known: {', '.join(SOLVERS)}")
    row = SOLVERS[solver_name]
    steps = tuple(grid) if grid is not None else even_grid(num_steps, row.grid_size(num_evaluations))
    return Method(
        name=name or solver_name,
        label=label or row.label,
        budget=budget,
        kind="solver",
        using=lambda pipe, sigmas: solver(pipe, steps, solver_name, num_evaluations),
        num_steps=num_evaluations,
        settings={"grid": list(steps), "solver": solver_name, **(notes or {})},
    )


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


_KEPT = 3  # evaluations a solver may look back at, the newest included
_HIGHEST = 1.0 - 1e-6  # sigma that stands for 1 in lambda, where it would be infinite (as diffusers' UniPC)


@dataclass(slots=True)
class Evaluation:
    """One call of the transformer in a run."""

    level: int  # of the grid, 0 the noisiest
    sample: torch.Tensor  # float32 latents the run goes on from; a corrector may have replaced them
    velocity: torch.Tensor  # float32, what the transformer said
    data: torch.Tensor  # float32, the data it predicts: sample as evaluated - sigma velocity


Step = Callable[[torch.Tensor, list[Evaluation], int], torch.Tensor]


@dataclass(frozen=True)
class Solver:
    """`step(sigmas [M + 1] of the grid and 0, evaluations so far, level to go to)` gives the latents there."""

    label: str
    step: Step
    per_step: int = 1  # evaluations a step of the grid

    def grid_size(self, num_evaluations: int) -> int:
        """Steps of the grid that this many evaluations are enough for."""
        return num_evaluations if self.per_step == 1 else num_evaluations // 2 + 1

    def levels(self, grid_size: int, num_evaluations: int) -> list[int]:
        """The grid's level of each evaluation.

        With two evaluations a step the last step has one; where the number is even the first step has one too.
        """
        if self.grid_size(num_evaluations) != grid_size:
            raise LesaError(
                f"{self.label}: {num_evaluations} evaluations need a grid of {self.grid_size(num_evaluations)} steps, "
                f"got {grid_size}"
            )
        if self.per_step == 1:
            return list(range(grid_size))
        corrected = range(2 - num_evaluations % 2, grid_size)
        return sorted([*range(grid_size), *corrected])


def euler(sigmas: torch.Tensor, past: list[Evaluation], target: int) -> torch.Tensor:
    now = past[-1]
    return now.sample + (sigmas[target] - sigmas[now.level]) * now.velocity


def adams_bashforth2(sigmas: torch.Tensor, past: list[Evaluation], target: int) -> torch.Tensor:
    if len(past) == 1:
        return euler(sigmas, past, target)
    before, now = past[-2:]
    h = sigmas[target] - sigmas[now.level]
    h_before = sigmas[now.level] - sigmas[before.level]
    return now.sample + h * (now.velocity + h / (2 * h_before) * (now.velocity - before.velocity))


def heun(sigmas: torch.Tensor, past: list[Evaluation], target: int) -> torch.Tensor:
    now = past[-1]
    if now.level != target:
        return euler(sigmas, past, target)
    before = past[-2]  # the newest evaluation is at the end of its Euler step
    h = sigmas[target] - sigmas[before.level]
    return before.sample + h / 2 * (before.velocity + now.velocity)


def dpm_solver_2m(sigmas: torch.Tensor, past: list[Evaluation], target: int) -> torch.Tensor:
    now = past[-1]
    slope = None
    if len(past) > 1 and target < len(sigmas) - 1:
        before = past[-2]
        ratio = _lambda_step(sigmas, before.level, now.level) / _lambda_step(sigmas, now.level, target)
        slope = (now.data - before.data) / (2 * ratio)
    return _data_step(sigmas, now.level, target, now.sample, now.data, slope)


def unipc2(sigmas: torch.Tensor, past: list[Evaluation], target: int) -> torch.Tensor:
    """The corrector needs no evaluation of its own: it redoes the step before with what was found at its end."""
    if len(past) > 1:
        past[-1].sample = _unipc_corrected(sigmas, past)
    return dpm_solver_2m(sigmas, past, target)  # UniP-2 is the same predictor


def _unipc_corrected(sigmas: torch.Tensor, past: list[Evaluation]) -> torch.Tensor:
    """UniC of order min(2, evaluations before): `past[-1].sample` redone from `past[-2].sample`."""
    before, now = past[-2:]
    h = _lambda_step(sigmas, before.level, now.level)
    change = now.data - before.data
    if len(past) == 2:
        return _data_step(sigmas, before.level, now.level, before.sample, before.data, change / 2)
    oldest = past[-3]
    ratio = -_lambda_step(sigmas, oldest.level, before.level) / h
    base = math.expm1(-h)
    phi2 = base / -h - 1
    phi3 = phi2 / -h - 0.5
    # [1 1; ratio 1] weights = [phi2, 2 phi3] / base, by hand
    first, second = phi2 / base, 2 * phi3 / base
    older = (first - second) / (1 - ratio)
    slope = older * (oldest.data - before.data) / ratio + (first - older) * change
    return _data_step(sigmas, before.level, now.level, before.sample, before.data, slope)


def _data_step(
    sigmas: torch.Tensor,
    level: int,
    target: int,
    sample: torch.Tensor,
    data: torch.Tensor,
    slope: torch.Tensor | None,
) -> torch.Tensor:
    """Exact for a data prediction that does not change, plus a slope; `alpha = 1 - sigma` as flow matching has it."""
    now, end = float(sigmas[level]), float(sigmas[target])
    if end == 0.0:
        return data
    now = min(now, _HIGHEST)
    base = math.expm1(-_lambda_step(sigmas, level, target))
    change = data if slope is None else data + slope
    return end / now * sample - (1 - end) * base * change


def _lambda_step(sigmas: torch.Tensor, level: int, target: int) -> float:
    def at(level: int) -> float:
        sigma = min(float(sigmas[level]), _HIGHEST)
        return math.log((1 - sigma) / sigma)

    return at(target) - at(level)


SOLVERS: dict[str, Solver] = {
    "euler": Solver("Euler", euler),
    "adams_bashforth2": Solver("Adams-Bashforth, order 2", adams_bashforth2),
    "dpm_solver_2m": Solver("DPM-Solver++ 2M", dpm_solver_2m),
    "unipc2": Solver("UniPC, order 2", unipc2),
    "heun": Solver("Heun", heun, per_step=2),
}


class Integration:
    """The state of one run: what was evaluated, and where the next evaluation lies."""

    def __init__(self, solver: Solver, sigmas: torch.Tensor, num_evaluations: int) -> None:
        self.solver, self.sigmas = solver, sigmas
        self.levels = solver.levels(len(sigmas) - 1, num_evaluations)
        self.past: list[Evaluation] = []
        self.index = 0  # of the next evaluation

    def advance(self, sample: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """The latents of the next evaluation, or the last ones, from those just evaluated and their velocity."""
        level = self.levels[self.index]
        self.index += 1
        target = self.levels[self.index] if self.index < len(self.levels) else len(self.sigmas) - 1
        data = sample - self.sigmas[level] * velocity
        self.past = [*self.past, Evaluation(level, sample, velocity, data)][-_KEPT:]
        return self.solver.step(self.sigmas, self.past, target)


class GridScheduler(FlowMatchEulerDiscreteScheduler):
    """The pipeline's own schedule of noise levels, of which only the steps in `grid` are evaluated.

    The levels are picked after every shift and stretch, so that they are exactly levels of the plain run.
    """

    grid: tuple[int, ...] = ()  # increasing steps of the plain run, starting with 0
    solver: Solver = SOLVERS["euler"]
    num_evaluations: int = 0  # of the transformer in a run
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
            raise LesaError(f"the grid ends at step {self.grid[-1]}, the run has {num_steps} steps")
        steps = list(self.grid)
        self.sigmas = torch.cat([self.sigmas[steps], self.sigmas[-1:]])
        self._run = Integration(self.solver, self.sigmas, self.num_evaluations)
        self.timesteps = self.timesteps[[steps[level] for level in self._run.levels]]
        self.num_inference_steps = len(self.timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One evaluation's step; anything but the plain deterministic call is refused with `ValueError`."""
        unknown = [name for name, value in kwargs.items() if value is not None and name != "generator"]
        if args or unknown:
            raise LesaError(f"this solver takes no further arguments, got {[*args, *unknown]}")
        if self.step_index is None:
            self._init_step_index(timestep)
        self._step_index += 1
        # As in the scheduler this stands in for: summed in float32, handed on in the model's dtype.
        latents = self._run.advance(sample.float(), model_output.float()).to(model_output.dtype)
        if not return_dict:
            return (latents,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=latents)


def even_grid(num_steps: int, num_evaluations: int) -> tuple[int, ...]:
    """`num_evaluations` steps of a run of `num_steps`, as even as integers allow, the first being 0."""
    if not 1 <= num_evaluations <= num_steps:
        raise LesaError(
            f"evaluations must be from 1 to the {num_steps} steps of the run, got {num_evaluations}"
        )
    return tuple(round(i * num_steps / num_evaluations) for i in range(num_evaluations))


@contextmanager
def solver(pipe: Any, grid: Sequence[int], name: str, num_evaluations: int | None = None) -> Iterator[None]:
    """The pipeline with its scheduler replaced by a solver of `SOLVERS` on the steps `grid` of the plain run.

    The pipeline is called as for the plain run; it makes `num_evaluations` evaluations, None for one a step of the
    grid.

    Raises:
        ValueError: for a grid that does not increase from 0 or does not fit the evaluations, an unknown solver, or a
            scheduler whose steps are not flow-matching Euler steps.
    """
    plain = pipe.scheduler
    count = len(grid) if num_evaluations is None else num_evaluations
    problems = []
    if not grid or grid[0] != 0 or any(b <= a for a, b in pairwise(grid)):
        problems.append(f"grid must increase from step 0, got {list(grid)}")
    if name not in SOLVERS:
        problems.append(f"{name!r} is not a solver; known: {', '.join(SOLVERS)}")
    elif grid and SOLVERS[name].grid_size(count) != len(grid):
        problems.append(f"{count} evaluations need a grid of {SOLVERS[name].grid_size(count)} steps, got {len(grid)}")
    if not isinstance(plain, FlowMatchEulerDiscreteScheduler):
        problems.append(
            f"{type(plain).__name__} does not integrate a flow: only flow-matching Euler is replaced"
        )
    elif plain.config.stochastic_sampling or plain.config.invert_sigmas:
        problems.append("the scheduler samples stochastically or inverts its noise levels")
    if problems:
        raise LesaError("solver: " + "; ".join(problems))
    replacement = GridScheduler.from_config(plain.config)
    replacement.grid, replacement.solver, replacement.num_evaluations = tuple(grid), SOLVERS[name], count
    pipe.scheduler = replacement
    try:
        yield
    finally:
        pipe.scheduler = plain
