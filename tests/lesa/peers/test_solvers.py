from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from lesa.models.pipelines import sample
from lesa.peers.solvers import SOLVERS, GridScheduler, Integration, even_grid, solver
from tests.helpers.bundles import CALL, NUM_STEPS
from tests.helpers.evaluation import pipeline


def run(scheduler, velocity, x: torch.Tensor, **kwargs) -> torch.Tensor:
    """Integrate dx/dsigma = velocity(x, sigma) over the scheduler's noise levels."""
    scheduler.set_timesteps(**kwargs)
    for timestep in scheduler.timesteps:
        sigma = timestep / 1000
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
    return x


def grid_scheduler(grid, name, **config) -> GridScheduler:
    scheduler = GridScheduler(**config)
    scheduler.grid, scheduler.solver, scheduler.num_evaluations = tuple(grid), SOLVERS[name], len(grid)
    return scheduler


def integrate(name: str, sigmas, velocity, x: torch.Tensor, num_evaluations: int | None = None) -> torch.Tensor:
    """The solver on noise levels [M] (0 is added), without a scheduler."""
    levels = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
    made = Integration(SOLVERS[name], levels, num_evaluations or len(sigmas))
    for level in made.levels:
        x = made.advance(x, velocity(x, levels[level]))
    return x


def plain_sigmas(num_steps: int) -> list[float]:
    return np.linspace(1.0, 1.0 / num_steps, num_steps).tolist()


def test_order_one_on_every_step_is_the_scheduler_itself() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = grid_scheduler(range(12), "euler", shift=3.0)
    settings = {"sigmas": plain_sigmas(12)}
    velocity = lambda x, sigma: torch.sin(x) + sigma  # noqa: E731
    assert torch.equal(run(plain, velocity, x, **settings), run(ours, velocity, x, **settings))


def test_second_order_is_exact_where_the_velocity_is_linear_in_sigma() -> None:
    """After its Euler start; the steps are uneven, so the variable-step weights are what is tested."""
    grid = (0, 1, 2, 5, 6, 11, 17)
    scheduler = grid_scheduler(grid, "adams_bashforth2", shift=3.0)
    scheduler.set_timesteps(sigmas=plain_sigmas(20))
    sigmas = scheduler.sigmas.double()
    x = run(
        scheduler, lambda x, sigma: 2 * sigma * torch.ones_like(x), torch.ones(1), sigmas=plain_sigmas(20)
    )
    start_error = (sigmas[1] - sigmas[0]) * 2 * sigmas[0] - (sigmas[1] ** 2 - sigmas[0] ** 2)
    exact = 1.0 + (sigmas[-1] ** 2 - sigmas[0] ** 2)
    assert x.item() == pytest.approx(float(exact + start_error), abs=1e-5)


@pytest.mark.parametrize(("name", "least"), [("euler", 0.85), ("adams_bashforth2", 1.8)])
def test_halving_the_steps_shrinks_the_error_by_the_order(name: str, least: float) -> None:
    def error(count: int) -> float:
        scheduler = grid_scheduler(range(count), name)
        x = run(scheduler, lambda x, sigma: x, torch.ones(1), sigmas=plain_sigmas(count))
        return abs(x.item() - float(np.exp(-1.0)))

    assert np.log2(error(20) / error(40)) > least


def test_levels_are_levels_of_the_plain_run_after_every_shift() -> None:
    config = {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    plain = FlowMatchEulerDiscreteScheduler(**config)
    plain.set_timesteps(sigmas=plain_sigmas(50), mu=0.8)
    ours = grid_scheduler(even_grid(50, 8), "adams_bashforth2", **config)
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
    with solver(pipe, range(NUM_STEPS), "euler"):
        assert torch.equal(sample(pipe, prompts, seeds, CALL, "latent"), plain)
    with solver(pipe, even_grid(NUM_STEPS, 4), "adams_bashforth2"):
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
    with pytest.raises(KeyError), solver(pipe, (0, 1), "euler"):
        raise KeyError
    assert pipe.scheduler is before


def test_all_that_does_not_fit_is_named() -> None:
    pipe = pipeline()
    with pytest.raises(ValueError, match="grid must increase.*rk4.*is not a solver"), solver(pipe, (1, 0), "rk4"):
        pass
    scheduler, pipe.scheduler = pipe.scheduler, DDIMScheduler()
    try:
        with pytest.raises(ValueError, match="DDIMScheduler"), solver(pipe, (0, 1), "euler"):
            pass
    finally:
        pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="ends at step 10"), solver(pipe, (0, NUM_STEPS), "euler"):
        sample(pipe, ["a dog"], [0], CALL, "latent")


def test_further_arguments_of_a_step_are_refused() -> None:
    scheduler = grid_scheduler((0, 1), "adams_bashforth2")
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(
            torch.ones(1), scheduler.timesteps[0], torch.ones(1), per_token_timesteps=torch.ones(1)
        )


def curved(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + sigma * x


def at_levels_of(scheduler):
    """The curved velocity at the scheduler's own noise level: its timesteps are rounded to integers."""
    return lambda x, timestep: curved(x, scheduler.sigmas[scheduler.step_index or 0])


def test_unipc_is_diffusers_on_the_same_levels() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    sigmas = np.linspace(0.98, 0.1, 9)
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2
    )
    expected = run(theirs, at_levels_of(theirs), x, sigmas=sigmas.copy(), num_inference_steps=len(sigmas))
    assert torch.allclose(integrate("unipc2", sigmas, curved, x), expected, atol=2e-5)
    assert not torch.allclose(integrate("dpm_solver_2m", sigmas, curved, x), expected, atol=1e-3)


def test_dpm_solver_is_diffusers_on_the_same_levels() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
    )
    expected = run(theirs, at_levels_of(theirs), x, num_inference_steps=10)
    ours = integrate("dpm_solver_2m", theirs.sigmas[:-1].tolist(), curved, x)
    assert torch.allclose(ours, expected, atol=2e-5)
    assert not torch.allclose(integrate("unipc2", theirs.sigmas[:-1].tolist(), curved, x), expected, atol=1e-3)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_integrates_the_same_flow(name: str) -> None:
    """Far from the start at sigma = 1 all agree with Euler at very many steps."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double().float()

    def levels(count: int) -> list[float]:
        line = torch.linspace(1, 1 / count, count)
        return (3 * line / (1 + 2 * line)).tolist()

    fine = integrate("euler", levels(4000), curved, x)
    coarse = integrate(name, levels(100), curved, x, 199 if name == "heun" else None)
    assert (coarse - fine).abs().max() < (2e-2 if name == "euler" else 3e-3)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_solvers_keep_a_constant_velocity_exactly(name: str) -> None:
    levels = [1.0, 0.9, 0.6, 0.25]
    count = {"heun": 6}.get(name, 4)
    x = integrate(name, levels, lambda x, sigma: torch.full_like(x, 2.0), torch.ones(3), count)
    assert torch.allclose(x, torch.full((3,), -1.0), atol=1e-5)


def test_heun_counts_every_evaluation() -> None:
    heun = SOLVERS["heun"]
    assert [heun.grid_size(n) for n in (1, 2, 5, 6, 9, 10)] == [1, 2, 3, 4, 5, 6]
    assert heun.levels(3, 5) == [0, 1, 1, 2, 2]
    assert heun.levels(4, 6) == [0, 1, 2, 2, 3, 3]  # an even number: the first step is an Euler step too
    with pytest.raises(ValueError, match="5 evaluations need a grid of 3 steps"):
        heun.levels(4, 5)
    by_hand = torch.tensor(1.0)
    for start, end in ((1.0, 0.8), (0.8, 0.4)):  # dx / dsigma = x
        euler = by_hand + (end - start) * by_hand
        by_hand = by_hand + (end - start) / 2 * (by_hand + euler)
    by_hand = by_hand - 0.4 * by_hand
    assert integrate("heun", [1.0, 0.8, 0.4], lambda x, sigma: x, torch.tensor(1.0), 5) == pytest.approx(
        float(by_hand)
    )


@pytest.mark.parametrize("name", list(SOLVERS))
def test_through_the_pipeline_each_makes_the_evaluations_it_says(name: str) -> None:
    pipe, calls = pipeline(), []
    grid = even_grid(NUM_STEPS, SOLVERS[name].grid_size(6))
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with solver(pipe, grid, name, 6):
        found = sample(pipe, ["a dog"], [0], CALL, "latent")
    handle.remove()
    assert len(calls) == 6 and torch.isfinite(found).all()
