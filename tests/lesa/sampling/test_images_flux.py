"""FLUX from pictures: image to image, inpainting, ControlNet, Kontext, Fill, Control; none sets a cache context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline

import lesa
from lesa.bundle import Bundle
from lesa.models.pipelines import PipelineError, load_pipeline
from lesa.peers.rules import RULES
from lesa.recording.tap import FeatureTap
from lesa.sampling.checks import MismatchError
from lesa.sampling.hook import LesaCacheConfig, apply_lesa_cache, remove_lesa_cache
from lesa.schedule import Schedule
from tests.helpers.bundles import make_bundle
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.model_kinds import tiny_workload
from tests.helpers.tiny_flux_variants import controlnet, image_to_image, kontext

# --- image to image: runs that begin in the middle -------------------------------------------------------


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureCall, Bundle]:
    """Image to image with a bundle of text to image: the same weights, the same tokens."""
    call = image_to_image()
    text = FluxPipeline.from_pipe(call.pipe)
    return call, make_bundle(text, tmp_path_factory.mktemp("bundle") / "tiny", call.call)


def test_a_bundle_of_text_to_image_serves_image_to_image_when_asked(middle: tuple[PictureCall, Bundle]) -> None:
    call, bundle = middle
    with pytest.raises(MismatchError, match=r"got FluxImg2ImgPipeline, expected FluxPipeline; pass allow=\('pipeline"):
        lesa.enable(call.pipe, bundle)
    plain = call.run()
    lesa.enable(call.pipe, bundle, allow=("pipeline",))
    try:
        call.run()
        # Full steps of the schedule: 0 1 2 3 6; begun at step 2, the two newest full ones are there from step 4 on.
        statistics = lesa.summary(call.pipe)
        assert [(r.step, r.kind) for r in statistics.steps] == [
            (2, "full"),
            (3, "full"),
            (4, "predicted"),
            (5, "predicted"),
            (6, "full"),
            (7, "predicted"),
        ]
        assert statistics.notes["not measured with"] == "FluxImg2ImgPipeline"
        call.run(strength=0.5)  # from step 4: the two full steps before step 7 are 3 and 6, and 3 is not in the run
        assert [r.kind for r in lesa.summary(call.pipe).steps] == ["full"] * 4
        assert lesa.summary(call.pipe).num_fallbacks == 0
        assert lesa.summary(call.pipe).notes["begins at"].startswith("step 4")
        call.run(strength=1.0)
        assert lesa.summary(call.pipe).num_full == 5 and "begins at" not in lesa.summary(call.pipe).notes
    finally:
        lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)


def test_late_starts_predict_what_the_rule_says_of_the_run_s_own_features(middle: tuple[PictureCall, Bundle]) -> None:
    """By hand: a step is predicted from the two full steps before it, and only where both are in the run."""
    call, _ = middle
    schedule = Schedule.explicit(NUM_STEPS, (0, 3, 4, 6))
    rule = RULES["taylor1"](schedule, None)
    config = LesaCacheConfig(schedule=schedule, rule=rule, scheduler=lambda: call.pipe.scheduler, late_start=True)
    apply_lesa_cache(call.pipe.transformer, config)
    with FeatureTap(call.pipe.transformer, dtype=torch.float32) as tap:
        call.run()
    features = dict(enumerate(tap.features, start=2))
    assert [r.kind for r in lesa.summary(call.pipe).steps] == ["full", "full", "full", "predicted", "full", "predicted"]
    remove_lesa_cache(call.pipe.transformer)
    assert torch.allclose(features[5], 2 * features[4] - features[3], atol=1e-5)
    assert torch.allclose(features[7], features[6] + (features[6] - features[4]) / 2, atol=1e-5)


def test_a_late_start_on_a_text_pipeline_s_cache_is_refused(middle: tuple[PictureCall, Bundle]) -> None:
    """LESA on the one pipeline, the run on another that shares its transformer: nobody asked for that."""
    call, bundle = middle
    text = FluxPipeline.from_pipe(call.pipe)
    lesa.enable(text, bundle)
    try:
        with pytest.raises(MismatchError, match=r"first step: got 2, expected 0 \(a run from the middle"):
            call.run()
    finally:
        lesa.disable(text)


def test_classes_with_other_tokens_or_weights_are_refused_whatever_is_allowed(
    middle: tuple[PictureCall, Bundle],
) -> None:
    other = FluxKontextPipeline.from_pipe(middle[0].pipe)
    with pytest.raises(MismatchError) as caught:
        lesa.enable(other, middle[1], allow=("pipeline",))
    assert caught.value.problems == ["pipeline class: got FluxKontextPipeline, expected FluxPipeline"]


def test_a_workload_is_called_with_prompts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workload = tiny_workload("flux-dev")
    image_to_image().pipe.save_pretrained(workload.model.source)
    with pytest.raises(PipelineError, match=r"got 'FluxImg2ImgPipeline'.*has FluxPipeline; it is called with images"):
        load_pipeline(workload.model, workload.resources.device)


# --- ControlNet and Kontext ------------------------------------------------------------------------------


def test_controlnet_s_residual_of_the_step_is_added_to_the_prediction() -> None:
    call = controlnet()
    schedule = Schedule.explicit(NUM_STEPS, (0,))
    entering, residuals = [], []
    handles = [
        call.pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: entering.append(args[0].clone())),
        call.pipe.controlnet.register_forward_hook(lambda _, args, output: residuals.append(output[1][-1])),
    ]
    apply_lesa_cache(
        call.pipe.transformer,
        LesaCacheConfig(schedule=schedule, rule=RULES["reuse"](schedule, None), scheduler=call.pipe.scheduler),
    )
    with FeatureTap(call.pipe.transformer, dtype=torch.float32) as tap:
        call.run()
    for handle in handles:
        handle.remove()
    assert len(entering) == len(residuals) == NUM_STEPS
    for step in range(NUM_STEPS):
        assert torch.equal(tap.features[step], tap.features[0])  # the tap is before the residual
        assert torch.allclose(entering[step], tap.features[0] + residuals[step], atol=1e-6)
    assert not torch.allclose(residuals[0], residuals[-1], atol=1e-3)


def test_controlnet_on_a_text_pipeline_s_cache_is_refused(tmp_path: Path) -> None:
    """Begun at step 0 and with the same tokens: only the residuals tell that another pipeline is called."""
    call = controlnet()
    parts = {name: part for name, part in call.pipe.components.items() if name != "controlnet"}
    text = FluxPipeline(**parts)
    bundle = make_bundle(text, tmp_path / "bundle", call.call)
    lesa.enable(text, bundle)
    with pytest.raises(MismatchError, match="ControlNet: got its residuals, expected none from FluxPipeline"):
        call.run()
    lesa.disable(text)
    lesa.enable(call.pipe, bundle, allow=("pipeline",))
    call.run()
    assert lesa.summary(call.pipe).num_full < NUM_STEPS


def test_kontext_predicts_the_picture_s_tokens_and_not_the_reference_s() -> None:
    call = kontext()
    schedule = Schedule.uniform(NUM_STEPS, 3)
    widths: list[int] = []
    handle = call.pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    with FeatureTap(call.pipe.transformer) as tap:
        plain = call.run()
    assert widths == [16 + 64] * NUM_STEPS  # a reference of 32 x 32 pixels beside a picture of 16 x 16
    assert {feature.shape[1] for feature in tap.features} == {16}
    widths.clear()
    apply_lesa_cache(
        call.pipe.transformer,
        LesaCacheConfig(schedule=schedule, rule=RULES["taylor1"](schedule, None), scheduler=call.pipe.scheduler),
    )
    images = call.run()
    handle.remove()
    assert widths == [80 if schedule.is_full(step) else 16 for step in range(NUM_STEPS)]
    assert lesa.summary(call.pipe).peak_bytes == 3 * 16 * 32 * 4  # two features and their difference, float32
    assert images.shape == plain.shape and (images - plain).abs().mean() < 0.05


def test_kontext_s_size_is_the_picture_s(tmp_path: Path) -> None:
    call = kontext()
    lesa.enable(call.pipe, call.own_bundle(tmp_path / "bundle"))
    call.run()
    with pytest.raises(MismatchError, match="height: got 32, expected 16"):
        call.run(height=32, max_area=2 * 16 * 16)
