from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from lesa.pipelines import sample
from lesa.solvers import GridScheduler, even_grid, solver
from tests.bundles import CALL, NUM_STEPS
from tests.evaluation import pipeline


def run(scheduler, velocity, x: torch.Tensor, **kwargs) -> torch.Tensor:
    """Integrate dx/dsigma = velocity(x, sigma) over the scheduler's noise levels."""
    scheduler.set_timesteps(**kwargs)
    for timestep in scheduler.timesteps:
        sigma = timestep / 1000
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
    return x


def grid_scheduler(grid, order, **config) -> GridScheduler:
    scheduler = GridScheduler(**config)
    scheduler.grid, scheduler.solver_order = tuple(grid), order
    return scheduler


def plain_sigmas(num_steps: int) -> list[float]:
    return np.linspace(1.0, 1.0 / num_steps, num_steps).tolist()


def test_order_one_on_every_step_is_the_scheduler_itself() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = grid_scheduler(range(12), 1, shift=3.0)
    settings = {"sigmas": plain_sigmas(12)}
    velocity = lambda x, sigma: torch.sin(x) + sigma  # noqa: E731
    assert torch.equal(run(plain, velocity, x, **settings), run(ours, velocity, x, **settings))


def test_second_order_is_exact_where_the_velocity_is_linear_in_sigma() -> None:
    """After its Euler start; the steps are uneven, so the variable-step weights are what is tested."""
    grid = (0, 1, 2, 5, 6, 11, 17)
    scheduler = grid_scheduler(grid, 2, shift=3.0)
    scheduler.set_timesteps(sigmas=plain_sigmas(20))
    sigmas = scheduler.sigmas.double()
    x = run(
        scheduler, lambda x, sigma: 2 * sigma * torch.ones_like(x), torch.ones(1), sigmas=plain_sigmas(20)
    )
    start_error = (sigmas[1] - sigmas[0]) * 2 * sigmas[0] - (sigmas[1] ** 2 - sigmas[0] ** 2)
    exact = 1.0 + (sigmas[-1] ** 2 - sigmas[0] ** 2)
    assert x.item() == pytest.approx(float(exact + start_error), abs=1e-5)


@pytest.mark.parametrize(("order", "least"), [(1, 0.85), (2, 1.8)])
def test_halving_the_steps_shrinks_the_error_by_the_order(order: int, least: float) -> None:
    def error(count: int) -> float:
        scheduler = grid_scheduler(range(count), order)
        x = run(scheduler, lambda x, sigma: x, torch.ones(1), sigmas=plain_sigmas(count))
        return abs(x.item() - float(np.exp(-1.0)))

    assert np.log2(error(20) / error(40)) > least


def test_levels_are_levels_of_the_plain_run_after_every_shift() -> None:
    config = {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    plain = FlowMatchEulerDiscreteScheduler(**config)
    plain.set_timesteps(sigmas=plain_sigmas(50), mu=0.8)
    ours = grid_scheduler(even_grid(50, 8), 2, **config)
    ours.set_timesteps(sigmas=plain_sigmas(50), mu=0.8)
    steps = [*even_grid(50, 8)]
    assert torch.equal(ours.sigmas, plain.sigmas[[*steps, 50]])
    assert torch.equal(ours.timesteps, plain.timesteps[steps])


def test_even_grids() -> None:
    assert even_grid(50, 10) == tuple(range(0, 50, 5))
    assert even_grid(50, 8) == (0, 6, 12, 19, 25, 31, 38, 44)
    assert even_grid(50, 50) == tuple(range(50))
    with pytest.raises(ValueError, match="from 1 to the 50 steps"):
        even_grid(50, 51)


def test_through_the_pipeline_a_full_grid_of_order_one_is_the_plain_run() -> None:
    pipe = pipeline()
    prompts, seeds = ["a thin seven"], [3]
    plain_scheduler = pipe.scheduler
    plain = sample(pipe, prompts, seeds, CALL, "latent")
    with solver(pipe, range(NUM_STEPS), 1):
        assert torch.equal(sample(pipe, prompts, seeds, CALL, "latent"), plain)
    with solver(pipe, even_grid(NUM_STEPS, 4), 2):
        calls = []
        handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        other = sample(pipe, prompts, seeds, CALL, "latent")
        again = sample(pipe, prompts, seeds, CALL, "latent")
        handle.remove()
    assert len(calls) == 8 and torch.equal(other, again) and not torch.equal(other, plain)
    assert pipe.scheduler is plain_scheduler
    assert torch.equal(sample(pipe, prompts, seeds, CALL, "latent"), plain)


def test_the_scheduler_comes_back_after_an_error() -> None:
    pipe = pipeline()
    before = pipe.scheduler
    with pytest.raises(KeyError), solver(pipe, (0, 1), 2):
        raise KeyError
    assert pipe.scheduler is before


def test_all_that_does_not_fit_is_named() -> None:
    pipe = pipeline()
    with pytest.raises(ValueError, match=r"(?s)grid must increase.*order must be"), solver(pipe, (1, 0), 3):
        pass
    scheduler, pipe.scheduler = pipe.scheduler, DDIMScheduler()
    try:
        with pytest.raises(ValueError, match="DDIMScheduler"), solver(pipe, (0, 1), 2):
            pass
    finally:
        pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="ends at step 10"), solver(pipe, (0, NUM_STEPS), 2):
        sample(pipe, ["a dog"], [0], CALL, "latent")


def test_further_arguments_of_a_step_are_refused() -> None:
    scheduler = grid_scheduler((0, 1), 2)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(
            torch.ones(1), scheduler.timesteps[0], torch.ones(1), per_token_timesteps=torch.ones(1)
        )
