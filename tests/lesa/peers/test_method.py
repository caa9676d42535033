from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.peers.caches import diffusers_cache_method, first_block_method, mag_cache_method
from lesa.peers.lineup import fixed_peers
from lesa.peers.method import Method, lesa_method
from lesa.peers.rules import rule_method
from lesa.peers.solvers import euler_method, solver_method
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS, extrapolating
from tests.helpers.evaluation import pipeline, sigmas

SCHEDULE = Schedule.uniform(NUM_STEPS, 3)  # 0 1 2 3 6 9


NAMES = (
    "lesa",
    "reuse",
    "taylor1",
    "taylor2",
    "taylor1_sigma",
    "taylor2_sigma",
    "hicache",
    "hicache_07",
    "spectrum",
    "spectrum_blend",
    "dmd",
    "taylor1_own",
    "taylor2_own",
    "euler",
    "adams_bashforth2",
    "dpm_solver_2m",
    "unipc2",
    "heun",
    "first_block_cache",
    "mag_cache",
)


@cache
def everything() -> dict[str, Method]:
    pipe = pipeline()
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas(), SCHEDULE)
    methods = [
        lesa_method("b", predictor, SCHEDULE),
        *fixed_peers("b", SCHEDULE, everything=True),
        first_block_method("b", NUM_STEPS, 10.0),
        mag_cache_method(
            "b", NUM_STEPS, [1.0] * NUM_STEPS, threshold=0.5, retention_steps=2, max_skip_steps=2
        ),
    ]
    return {method.name: method for method in methods}


@cache
def untouched() -> torch.Tensor:
    return drawn()[0]


def drawn(
    method: Method | None = None, prompts=("a thin seven", "the blue cat")
) -> tuple[torch.Tensor, float]:
    """Latents, and how many steps were computed."""
    pipe, seeds = pipeline(), list(range(len(prompts)))
    if method is None:
        with probe(pipe) as trace:
            return sample(pipe, prompts, seeds, CALL, "latent"), trace.computed
    with method.using(pipe, sigmas()), probe(pipe) as trace:
        return sample(pipe, prompts, seeds, method.call(CALL), "latent"), trace.computed


@pytest.mark.parametrize("name", NAMES)
def test_each_method_goes_on_and_comes_off_without_a_trace(name: str) -> None:
    method = everything()[name]
    plain = untouched()
    first, computed = drawn(method)
    if method.kind != "cache":
        assert computed == SCHEDULE.num_full
    else:
        assert 1 <= computed < NUM_STEPS
    assert not torch.equal(first, plain)
    assert torch.equal(drawn()[0], plain)
    assert method.num_steps == (NUM_STEPS if method.same_steps else SCHEDULE.num_full)


@pytest.mark.parametrize("name", ["lesa", "spectrum", "heun", "mag_cache"])
def test_each_method_comes_off_after_an_error(name: str) -> None:
    pipe, method = pipeline(), everything()[name]
    with pytest.raises(KeyError), method.using(pipe, sigmas()):
        raise KeyError
    assert torch.equal(drawn()[0], untouched())


@pytest.mark.parametrize("rule", ["reuse", "taylor1", "taylor2"])
def test_with_every_step_full_a_rule_is_the_plain_run(rule: str) -> None:
    found, computed = drawn(rule_method(rule, "b", Schedule.uniform(NUM_STEPS, 1)))
    assert computed == NUM_STEPS
    assert torch.equal(found, untouched())


def test_methods_say_what_they_cost() -> None:
    from lesa.models.flops import ModelFlops

    model = ModelFlops(total=100.0, head=1.0, blocks=(10.0, 20.0, 30.0), tokens=4, channels=8)
    levels = torch.linspace(1, 0, NUM_STEPS + 1)
    by_name = everything()
    assert tuple(by_name) == NAMES
    assert by_name["reuse"].flops(model, 6, levels) == 6 * 100 + 4 * 1
    assert by_name["euler"].flops(model, 6, levels) == 600
    assert by_name["first_block_cache"].flops(model, 5.5, levels) == 550 + 4.5 * 11
    assert by_name["mag_cache"].flops(model, 5.5, levels) == 550 + 4.5
    assert by_name["taylor1"].flops(model, 6, levels) == 604 + 2 * 32 * (2 + 4)
    assert by_name["hicache"].flops(model, 6, levels) == by_name["taylor2"].flops(model, 6, levels)
    # Spectrum weighs every full step there is: 4 before steps 4 and 5, 5 before 7 and 8.
    assert by_name["spectrum"].flops(model, 6, levels) == 604 + 2 * 32 * (4 + 4 + 5 + 5)
    assert by_name["heun"].flops(model, 6, levels) == 600
    assert by_name["lesa"].flops(model, 6, levels) > by_name["reuse"].flops(model, 6, levels)


def test_solvers_call_the_pipeline_their_own_way() -> None:
    assert euler_method("b", 6).call(CALL).num_inference_steps == 6
    assert solver_method("adams_bashforth2", "b", NUM_STEPS, 6).call(CALL) is CALL
    assert solver_method("unipc2", "b", NUM_STEPS, 2, grid=(0, 4)).settings["grid"] == [0, 4]
    assert solver_method("heun", "b", NUM_STEPS, 7).settings["grid"] == [0, 2, 5, 8]
    assert solver_method("heun", "b", NUM_STEPS, 7).num_steps == 7
    with pytest.raises(ValueError, match="euler, adams_bashforth2"):
        solver_method("rk4", "b", NUM_STEPS, 6)
    with pytest.raises(ValueError, match="reuse, taylor1"):
        rule_method("taylor9", "b", SCHEDULE)


def test_a_rules_options_are_used_and_shown() -> None:
    damped = rule_method("hicache", "b", SCHEDULE, options={"order": 1, "contraction": 0.5**0.5})
    assert damped.settings["contraction"] == 0.5**0.5
    assert torch.allclose(drawn(damped)[0], drawn(everything()["taylor1"])[0], atol=1e-5)
    assert not torch.allclose(drawn(damped)[0], drawn(everything()["hicache"])[0], atol=1e-4)


def test_any_cache_of_diffusers_can_be_a_method() -> None:
    method = diffusers_cache_method(
        "b",
        NUM_STEPS,
        lambda: TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True),
        name="taylorseer_lite",
        label="TaylorSeer lite",
        settings={"cache_interval": 3},
    )
    found, computed = drawn(method)
    assert torch.isfinite(found).all() and computed == 5  # 0 1 2 4 7
    after, computed = drawn()
    assert computed == NUM_STEPS and torch.equal(after, untouched())


def test_the_probe_sees_features_bytes_and_shapes() -> None:
    pipe = pipeline()
    method = rule_method("taylor1", "b", SCHEDULE)
    with method.using(pipe, sigmas()), probe(pipe, deep=True) as trace:
        sample(pipe, ["a dog", "a cat"], [0, 1], CALL, "latent")
    assert (trace.calls, trace.computed) == (NUM_STEPS, 6)
    assert trace.computed_share == 0.6
    assert len(trace.features) == NUM_STEPS and trace.features[0].shape == (2, 16, 32)
    feature = 2 * 16 * 32 * 4
    assert 0 <= trace.peak_bytes - 3 * feature < 16  # two features, their difference, and a norm
    assert trace.shapes.call is not None and trace.shapes.call[1]["hidden_states"].shape == (2, 16, 16)
    assert not pipe.transformer.norm_out._forward_pre_hooks
