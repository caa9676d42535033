"""enable, disable, summary, call_kwargs on a real pipeline with a real bundle."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline

import lesa
from lesa.bundle import Bundle
from lesa.bundle.budgets import choose_schedule
from lesa.peers.rules import RULES
from lesa.predictor.rule import WithoutStages
from lesa.sampling.checks import MismatchError
from lesa.sampling.hook import LesaCacheConfig
from lesa.schedule import Schedule
from tests.attacks.hostile import edit
from tests.helpers.bundles import CALL, make_bundle
from tests.helpers.tiny import tiny_flux


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


@pytest.fixture(scope="module")
def bundle(pipeline, tmp_path_factory) -> Bundle:
    return make_bundle(pipeline, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def pipe(pipeline):
    yield pipeline
    lesa.disable(pipeline)


def run(pipe, seed: int = 0, **kwargs) -> torch.Tensor:
    settings = {
        "height": CALL.height,
        "width": CALL.width,
        "num_inference_steps": CALL.num_inference_steps,
        "guidance_scale": CALL.guidance_scale,
        "max_sequence_length": CALL.max_sequence_length,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe("a thin seven", **(settings | kwargs)).images


def test_the_readme_in_four_lines(pipe, bundle):
    plain = run(pipe)
    lesa.enable(pipe, bundle.path)
    picture = pipe("a thin seven", **lesa.call_kwargs(pipe)).images[0]
    assert picture.size == (16, 16)
    statistics = lesa.summary(pipe)
    assert statistics.num_full == 6 and statistics.finished
    text = str(statistics)
    assert "6 full of 10: 1.67x" in text and f"bundle: tiny ({bundle.digest[:12]})" in text
    assert {record.stage for record in statistics.steps} == {0, 1}
    # Step 2 is the first full step with the two features that this predictor looks back on.
    errors = [record.error for record in statistics.steps]
    assert errors[:2] == [None, None] and all(e is not None and e < 1 for e in (errors[2], errors[3]))
    lesa.disable(pipe)
    assert torch.equal(run(pipe), plain)


def test_call_kwargs_are_the_manifest_s_and_what_the_pipeline_takes(pipe, bundle):
    lesa.enable(pipe, bundle)
    assert lesa.call_kwargs(pipe) == {
        "height": 16,
        "width": 16,
        "num_inference_steps": 10,
        "guidance_scale": 3.5,
        "max_sequence_length": 16,
    }
    lesa.disable(pipe)
    for function in (lesa.call_kwargs, lesa.summary):
        with pytest.raises(ValueError, match="not enabled on this pipeline"):
            function(pipe)


def test_the_bundle_predicts_like_the_rule_it_was_started_from(pipe, bundle):
    """Extrapolation in sigma, written out by hand, through the same hook."""

    class Line(WithoutStages):
        name, history_size, keeps_predictions = "line", 2, False

        def __call__(self, history, step):
            (new, old), sigmas = history.features, bundle.manifest.sigmas
            at_new, at_old = (sigmas[index] for index in history.steps)
            return new + (new - old) * (at_new - sigmas[step]) / (at_old - at_new)

    schedule = bundle.manifest.budgets["1.67x"].schedule
    config = LesaCacheConfig(schedule=schedule, rule=Line(), scheduler=pipe.scheduler, measure=False)
    lesa.apply_lesa_cache(pipe.transformer, config)
    by_hand = run(pipe)
    lesa.remove_lesa_cache(pipe.transformer)
    lesa.enable(pipe, bundle)
    assert torch.allclose(run(pipe), by_hand, atol=1e-5)


def test_schedules_are_chosen_by_budget_interval_or_list(pipe, bundle):
    plain = run(pipe)
    for choice, full in (
        ({}, 6),
        ({"budget": "1.43x"}, 7),
        ({"interval": 2}, 7),
        ({"interval": 1}, 10),
        ({"full_steps": [0, 1, 2, 5, 7]}, 5),
    ):
        lesa.enable(pipe, bundle, **choice)
        images = run(pipe)
        assert lesa.summary(pipe).num_full == full
        if choice == {"interval": 1}:
            assert torch.equal(images, plain)
        lesa.disable(pipe)


@pytest.mark.parametrize(
    ("choice", "description"),
    [
        ({"budget": "9x"}, "'9x' is not one of 1.43x, 1.67x"),
        ({"budget": "1.67x", "interval": 3}, "give one of"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"budget": "1.67x", "min_psnr": 20.0}, "give one of"),
        ({"min_psnr": 99.0}, "no budget measured 99.00 dB"),
        ({"max_loss_db": -1.0}, "max_loss_db: must be at least 0 dB"),
        ({"full_steps": [1, 2]}, "must contain step 0"),
        ({"full_steps": [0, 5]}, "needs 2 full steps before step 1"),
        ({"full_steps": [0, 1, 40]}, "outside 0..9"),
        ({"allow": "lora"}, "allow: a collection"),
        ({"allow": ("everything",)}, "everything"),
    ],
)
def test_choices_that_cannot_be_served_are_refused(pipe, bundle, choice, description):
    with pytest.raises(ValueError) as caught:
        lesa.enable(pipe, bundle, **choice)
    assert description in str(caught.value)
    assert not any(
        getattr(m, "_diffusers_hook", None) and m._diffusers_hook.hooks for m in pipe.transformer.modules()
    )


def test_an_interval_of_the_bundle_keeps_the_bundle_s_warm_up(bundle):
    schedule, name = choose_schedule(bundle.manifest, interval=3)
    assert schedule == bundle.manifest.budgets["1.67x"].schedule and name == "1.67x"
    schedule, name = choose_schedule(bundle.manifest, interval=4)
    assert schedule == Schedule.uniform(10, 4) and name == "interval 4"


def test_the_fastest_budget_that_is_good_enough_is_chosen(bundle):
    """1.67x measured 30 dB, 1.43x 31 dB."""
    for choice, name in (
        ({"min_psnr": 30.0}, "1.67x"),
        ({"min_psnr": 30.5}, "1.43x"),
        ({"max_loss_db": 1.0}, "1.67x"),
        ({"max_loss_db": 0.5}, "1.43x"),
    ):
        schedule, chosen = choose_schedule(bundle.manifest, **choice)
        assert chosen == name and schedule == bundle.manifest.budgets[name].schedule


def test_another_model_is_refused_with_every_difference(bundle):
    other = tiny_flux(seed=1)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    plain = run(other)
    with pytest.raises(MismatchError) as caught:
        lesa.enable(other, bundle)
    problems = caught.value.problems
    assert len(problems) == 3
    assert problems[0] == "scheduler shift: got 1.0, expected 3.0"
    assert problems[1] == "scheduler use_dynamic_shifting: got False, expected True"
    assert problems[2].startswith("fingerprint of the transformer: got sha256:")
    assert torch.equal(run(other), plain)


def test_another_pipeline_class_is_refused(pipe, bundle):
    other = FluxImg2ImgPipeline(**pipe.components)
    with pytest.raises(MismatchError, match="pipeline class: got FluxImg2ImgPipeline, expected FluxPipeline"):
        lesa.enable(other, bundle)


def test_a_call_that_the_bundle_was_not_made_for_is_refused_before_anything_is_computed(pipe, bundle):
    computed = []
    handle = pipe.transformer.x_embedder.register_forward_hook(lambda *_: computed.append(1))
    lesa.enable(pipe, bundle)
    with pytest.raises(MismatchError) as caught:
        run(pipe, height=24, guidance_scale=2.0, max_sequence_length=12, num_inference_steps=12)
    assert caught.value.problems == [
        "num_inference_steps: got 12, expected 10",
        "sigmas: got 13 noise levels, expected 11",
        "height: got 24, expected 16",
        "guidance_scale: got 2, expected 3.5",
        "max_sequence_length: got 12, expected 16",
    ]
    with pytest.raises(ValueError, match="guidance branches"):
        run(pipe, negative_prompt="a dog", true_cfg_scale=3.0)
    handle.remove()
    # The second branch is refused when it is called: the first one of that step had run.
    assert len(computed) == 1
    run(pipe)
    assert lesa.summary(pipe).finished


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_a_warm_up_run_is_full_and_leaves_the_next_one_alone(pipe, bundle, num_steps):
    other = {"num_inference_steps": num_steps, "height": 24, "guidance_scale": 2.0}
    plain = run(pipe, **other)
    lesa.enable(pipe, bundle)
    expected = run(pipe)
    with pytest.warns(UserWarning, match=f"not accelerated: the run has {num_steps} step"):
        assert torch.equal(run(pipe, **other), plain)
    statistics = lesa.summary(pipe)
    assert statistics.num_full == num_steps == len(statistics.steps) and statistics.finished
    assert statistics.notes["in full"] == f"{num_steps} step(s), and nothing is predicted in runs of fewer than 10"
    with pytest.warns(UserWarning, match="not accelerated"):  # servers leave guidance out, or put it in
        run(pipe, num_inference_steps=2, negative_prompt="a dog", true_cfg_scale=3.0)
    assert lesa.summary(pipe).num_branches == 2
    assert torch.equal(run(pipe), expected) and lesa.summary(pipe).num_full == 6
    with pytest.raises(ValueError, match="guidance branches"):
        run(pipe, negative_prompt="a dog", true_cfg_scale=3.0)


def test_with_a_training_free_rule_runs_that_would_predict_nothing_are_full(pipe):
    schedule = Schedule.explicit(10, (0, 1, 2, 6))
    config = LesaCacheConfig(schedule=schedule, rule=RULES["taylor1"](schedule, None), scheduler=pipe.scheduler)
    plain = run(pipe, num_inference_steps=3)
    lesa.apply_lesa_cache(pipe.transformer, config)
    with pytest.warns(UserWarning, match="in runs of fewer than 4"):
        assert torch.equal(run(pipe, num_inference_steps=3), plain)
    with pytest.raises(MismatchError, match="num_inference_steps: got 4, expected 10"):
        run(pipe, num_inference_steps=4)
    run(pipe)
    assert lesa.summary(pipe).num_full == 4


def test_the_summary_of_a_refused_run_has_no_figures_of_the_one_before(pipe, bundle):
    lesa.enable(pipe, bundle)
    run(pipe)
    wrong_calls = ({"num_inference_steps": 12}, "num_inference_steps: got 12"), ({"height": 24}, "height: got 24")
    for wrong, why in wrong_calls:
        with pytest.raises(MismatchError, match=why):
            run(pipe, **wrong)
        statistics = lesa.summary(pipe)
        assert statistics.steps == [] and not statistics.finished and why in statistics.notes["refused"]
        assert "the newest run was refused" in str(statistics) and "full of 10" not in str(statistics).split("\n")[-1]
    run(pipe)
    assert "refused" not in lesa.summary(pipe).notes and lesa.summary(pipe).num_full == 6


def test_another_scheduler_after_enabling_is_noticed(pipe, bundle):
    lesa.enable(pipe, bundle)
    kept = pipe.scheduler
    try:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(kept.config, max_shift=2.0)
        with pytest.raises(MismatchError, match=r"scheduler max_shift: got 2.0, expected 1.15"):
            run(pipe)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(kept.config)
        run(pipe)
    finally:
        pipe.scheduler = kept


def test_settings_that_an_older_diffusers_did_not_write_are_its_defaults(pipe, bundle, tmp_path):
    import shutil

    shutil.copytree(bundle.path, tmp_path / "older")
    edit(tmp_path / "older", lambda document: document["scheduler"]["config"].pop("stochastic_sampling"))
    lesa.enable(pipe, tmp_path / "older")
    run(pipe)


def test_adapters_and_quantised_weights_need_to_be_allowed(pipe, bundle):
    pipe.transformer.peft_config = {"style": object()}
    try:
        with pytest.raises(MismatchError, match=r"adapters: got style.*allow=\('lora',\)"):
            lesa.enable(pipe, bundle)
        lesa.enable(pipe, bundle, allow=("lora",))
        run(pipe)
        assert lesa.summary(pipe).notes["not measured with"] == "adapters style"
    finally:
        del pipe.transformer.peft_config
    lesa.disable(pipe)
    lesa.enable(pipe, bundle)
    pipe.transformer.peft_config = {"late": object()}
    try:
        with pytest.raises(MismatchError, match="adapters: got late"):
            run(pipe)
    finally:
        del pipe.transformer.peft_config
    lesa.disable(pipe)
    pipe.transformer.hf_quantizer = object()
    try:
        with pytest.raises(MismatchError, match="quantised"):
            lesa.enable(pipe, bundle)
        lesa.enable(pipe, bundle, allow=["quantized"])
        assert "not compared" in str(lesa.summary(pipe))
    finally:
        del pipe.transformer.hf_quantizer


def test_enabling_twice_is_refused_with_the_remedy(pipe, bundle):
    lesa.enable(pipe, bundle)
    with pytest.raises(ValueError, match=r"call lesa\.disable\(pipe\) first"):
        lesa.enable(pipe, bundle)
    lesa.disable(pipe)
    lesa.disable(pipe)
    with pytest.raises(ValueError, match="has no transformer"):
        lesa.enable(object(), bundle)


def test_bfloat16_is_followed(bundle, tmp_path):
    pipe = tiny_flux(dtype=torch.bfloat16)
    lesa.enable(pipe, bundle)  # the fingerprint of the float32 pipeline holds here too
    images = run(pipe)
    assert torch.isfinite(images).all()
    assert lesa.summary(pipe).num_fallbacks == 0


def test_a_broken_run_does_not_reach_the_next(pipe, bundle):
    lesa.enable(pipe, bundle)
    expected = run(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 4:
            raise RuntimeError("stop")
        return kwargs

    with pytest.raises(RuntimeError, match="stop"):
        run(pipe, callback_on_step_end=stop)
    assert torch.equal(run(pipe), expected)


def test_an_enabled_pipeline_can_be_forgotten(bundle):
    pipe = tiny_flux()
    lesa.enable(pipe, bundle)
    run(pipe)
    alive = weakref.ref(pipe)
    transformer = pipe.transformer
    del pipe
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match="is gone"):
        transformer(hidden_states=torch.zeros(1))


def test_peers_run_through_the_same_hook(pipe):
    schedule = Schedule.uniform(10, 3)
    for name, factory in RULES.items():
        rule = factory(schedule, torch.linspace(1, 0, 11))
        lesa.apply_lesa_cache(
            pipe.transformer, LesaCacheConfig(schedule=schedule, rule=rule, scheduler=pipe.scheduler)
        )
        run(pipe)
        statistics = lesa.summary(pipe)
        assert statistics.rule == name and statistics.num_full == 6
        lesa.disable(pipe)
