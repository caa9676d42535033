"""What users do with a pipeline call: batches, callbacks, latents, noise levels of their own, bfloat16, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lesa
from lesa.bundle import Bundle
from lesa.sampling.checks import MismatchError
from tests.helpers import tiny, tiny_hunyuan, tiny_qwen, tiny_qwen_variants
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_flux_variants import text_to_image

TEXT: dict[str, Callable[[], PictureCall]] = {
    "flux-dev": text_to_image,
    "flux-schnell": lambda: text_to_image(schnell=True),
    "qwen-image": tiny_qwen_variants.text_to_image,
    "hunyuan-video": tiny_hunyuan.text_to_video,
}


@pytest.fixture(scope="module", params=list(TEXT))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureCall, Bundle]:
    call = TEXT[request.param]()
    return call, call.own_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def call(made: tuple[PictureCall, Bundle]) -> Iterator[PictureCall]:
    lesa.enable(made[0].pipe, made[1])
    yield made[0]
    lesa.disable(made[0].pipe)


def test_batches_and_several_pictures_a_prompt(call: PictureCall) -> None:
    prompts, seeds = ["a thin seven", "the blue cat"], (5, 6)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = {"negative_prompt": [" "] * 2} if len(call.branches) == 2 else {}
    together = call.run(prompt=prompts, generator=generators, **negative)
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert torch.allclose(together[index : index + 1], call.run(seed, prompt=prompt), atol=1e-4)
    many = "num_videos_per_prompt" if call.call.num_frames else "num_images_per_prompt"
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pair = call.run(generator=generators, **{many: 2})
    assert torch.allclose(pair[:1], call.run(5), atol=1e-4) and torch.allclose(pair[1:], call.run(6), atol=1e-4)


def test_latents_and_callbacks(call: PictureCall) -> None:
    steps: list[int] = []

    def seen(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert torch.isfinite(tensors["latents"]).all()
        steps.append(step)
        return tensors

    latents = call.run(output_type="latent", callback_on_step_end=seen)
    assert steps == list(range(NUM_STEPS))
    assert torch.equal(latents, call.run(output_type="latent"))

    def shifted(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] + (step == 1)}  # a callback may change the latents

    assert not torch.equal(latents, call.run(output_type="latent", callback_on_step_end=shifted))
    assert torch.equal(latents, call.run(output_type="latent"))


def test_noise_levels_of_one_s_own_are_checked_against_the_bundle(call: PictureCall) -> None:
    expected = call.run()
    start = 0.0 if call.call.num_frames else 1 / NUM_STEPS  # what the pipelines themselves start from
    usual = np.linspace(1.0, start, NUM_STEPS + (start == 0.0))[:NUM_STEPS].tolist()
    assert torch.equal(call.run(sigmas=usual), expected)
    other = [*usual[:-1], usual[-1] / 2]
    with pytest.raises(MismatchError, match=r"sigmas: got .* at step"):
        call.run(sigmas=other)
    more = np.linspace(1.0, start, NUM_STEPS + 1 + (start == 0.0))[: NUM_STEPS + 1].tolist()
    with pytest.raises(MismatchError, match=f"num_inference_steps: got {NUM_STEPS + 1}, expected {NUM_STEPS}"):
        call.run(sigmas=more, num_inference_steps=NUM_STEPS + 1)
    assert torch.equal(call.run(), expected)


def test_an_exception_in_the_middle_and_a_rerun(call: PictureCall) -> None:
    expected = call.run()
    calls: list[int] = []

    def break_down(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3 * len(call.branches):  # in the last branch of a step
            raise RuntimeError("out of memory")

    handle = next(call.pipe.transformer.transformer_blocks[0].children()).register_forward_hook(break_down)
    with pytest.raises(RuntimeError, match="out of memory"):
        call.run(seed=9)
    handle.remove()
    assert not lesa.summary(call.pipe).finished
    assert torch.equal(call.run(), expected)
    assert lesa.summary(call.pipe).finished


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "hunyuan-video"])
def test_bfloat16_takes_the_bundle_of_float32(name: str, tmp_path: Path) -> None:
    call = TEXT[name]()
    bundle = call.own_bundle(tmp_path / "bundle")
    build = {"flux-dev": tiny.tiny_flux, "qwen-image": tiny_qwen.tiny_qwen, "hunyuan-video": tiny_hunyuan.tiny_hunyuan}
    call.pipe = build[name](dtype=torch.bfloat16)
    lesa.enable(call.pipe, bundle)
    images = call.run()
    assert call.pipe.transformer.dtype == torch.bfloat16
    assert torch.isfinite(images).all()
    statistics = lesa.summary(call.pipe)
    assert statistics.finished and statistics.num_fallbacks == 0 and statistics.num_full < NUM_STEPS


def test_two_pipelines_with_bundles_of_their_own_in_one_process(tmp_path: Path) -> None:
    first, second = text_to_image(), tiny_qwen_variants.text_to_image()
    alone = []
    for index, call in enumerate((first, second)):
        bundle = call.own_bundle(tmp_path / str(index))
        lesa.enable(call.pipe, bundle, interval=2 + index)
        alone.append(call.run())
    turns: list[torch.Tensor] = []

    def other_in_between(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            turns.append(second.run())
        return tensors

    assert torch.equal(first.run(callback_on_step_end=other_in_between), alone[0])
    assert torch.equal(turns[0], alone[1])
    assert lesa.summary(first.pipe).num_full != lesa.summary(second.pipe).num_full
    with pytest.raises(MismatchError, match="pipeline class: got QwenImagePipeline, expected FluxPipeline"):
        lesa.disable(second.pipe)
        lesa.enable(second.pipe, tmp_path / "0")


def test_a_bundle_of_other_weights_is_refused(tmp_path: Path) -> None:
    bundle = text_to_image().own_bundle(tmp_path / "bundle")
    with pytest.raises(MismatchError, match="fingerprint of the transformer"):
        lesa.enable(text_to_image(seed=1).pipe, bundle)
