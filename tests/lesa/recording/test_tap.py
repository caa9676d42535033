"""The tap sees what enters norm_out, and everything else a recording keeps."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from lesa.models.pipelines import sample
from lesa.params import CallParams
from lesa.recording.tap import FeatureTap
from tests.helpers.tiny import CALL, PROMPTS, tiny_flux

STEPS = 4
PLAIN = CallParams(num_inference_steps=STEPS, **CALL)


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return tiny_flux()


def test_the_feature_is_what_enters_norm_out(pipe: FluxPipeline) -> None:
    entering: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = pipe.transformer.norm_out.register_forward_pre_hook(
        lambda module, args: entering.append((args[0].clone(), args[1].clone()))
    )
    with FeatureTap(pipe.transformer, dtype=torch.float32) as tap:
        sample(pipe, PROMPTS[:2], [1, 2], PLAIN)
    handle.remove()
    assert len(tap.features) == len(tap.temb) == len(tap.timesteps) == STEPS and tap.num_branches == 1
    for feature, temb, (hidden, embedding) in zip(tap.features, tap.temb, entering, strict=True):
        assert feature.shape == (2, 16, 32) and torch.equal(feature, hidden)
        assert torch.equal(temb, embedding)
    assert not torch.equal(tap.features[0], tap.features[1])


def test_the_tap_changes_nothing_and_leaves_nothing(pipe: FluxPipeline) -> None:
    before = sample(pipe, PROMPTS[:1], [3], PLAIN)
    with FeatureTap(pipe.transformer):
        during = sample(pipe, PROMPTS[:1], [3], PLAIN)
    assert torch.equal(before, during)
    assert torch.equal(before, sample(pipe, PROMPTS[:1], [3], PLAIN))
    modules = pipe.transformer.modules()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in modules)


def test_hooks_are_removed_after_an_exception(pipe: FluxPipeline) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), FeatureTap(pipe.transformer):
        raise RuntimeError("in the middle")
    assert not pipe.transformer._forward_pre_hooks


def test_features_are_rounded_to_bfloat16_and_owned(pipe: FluxPipeline) -> None:
    with FeatureTap(pipe.transformer) as rounded, FeatureTap(pipe.transformer, dtype=torch.float32) as exact:
        sample(pipe, PROMPTS[:1], [3], PLAIN)
    for half, full in zip(rounded.features, exact.features, strict=True):
        assert torch.equal(half, full.bfloat16())
    pointers = {feature.data_ptr() for feature in rounded.features}
    assert len(pointers) == STEPS


def test_only_chosen_tokens_are_kept(pipe: FluxPipeline) -> None:
    asked = []

    def choose(num_tokens: int) -> torch.Tensor:
        asked.append(num_tokens)
        return torch.tensor([[2, 5, 11], [0, 5, 15]])

    with (
        FeatureTap(pipe.transformer, token_index=choose) as some,
        FeatureTap(pipe.transformer) as every,
    ):
        sample(pipe, PROMPTS[:2], [3, 4], PLAIN)
    assert asked == [16]
    for part, whole in zip(some.features, every.features, strict=True):
        assert torch.equal(part[0], whole[0, [2, 5, 11]]) and torch.equal(part[1], whole[1, [0, 5, 15]])


def test_branches_of_classifier_free_guidance_are_told_apart(pipe: FluxPipeline) -> None:
    guided = CallParams(num_inference_steps=STEPS, true_cfg_scale=2.0, **CALL)
    with FeatureTap(pipe.transformer) as tap:
        sample(pipe, PROMPTS[:1], [3], guided)
    assert tap.num_branches == 2 and len(tap.features) == 2 * STEPS
    first, second = tap.conditioning
    assert not torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
    assert set(first) == set(second) and not {"hidden_states", "timestep"} & set(first)


def test_the_transformer_can_be_called_again_from_what_the_tap_kept(pipe: FluxPipeline) -> None:
    with FeatureTap(pipe.transformer, dtype=torch.float32) as tap:
        sample(pipe, PROMPTS[:1], [3], PLAIN)
    first = tap.features[0]
    with FeatureTap(pipe.transformer, dtype=torch.float32) as again, torch.no_grad():
        pipe.transformer(hidden_states=tap.latents, timestep=tap.timesteps[0], **tap.conditioning[0])
    assert torch.equal(again.features[0], first)
