"""Qwen-Image: text of different lengths in the two guidance branches, and editing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lesa
from lesa.sampling.checks import MismatchError
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_qwen_variants import edit, edit_plus, small_references, text_to_image


@pytest.fixture(scope="module")
def call() -> PictureCall:
    return text_to_image()


def test_prompts_of_different_lengths_are_padded_and_predicted(call: PictureCall, tmp_path: Path) -> None:
    """The shorter text is masked, and the negative one is shorter still: its tokens are no stand-in for the others."""
    prompts, seeds = ["a thin seven", "the blue cat and a dog on the left"], (1, 2)
    lesa.enable(call.pipe, call.own_bundle(tmp_path / "bundle"))
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        together = call.run(prompt=prompts, negative_prompt=[" "] * 2, generator=generators)
        assert lesa.summary(call.pipe).finished and lesa.summary(call.pipe).num_full < NUM_STEPS
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            assert torch.allclose(together[index : index + 1], call.run(seed, prompt=prompt), atol=1e-5)
    finally:
        lesa.disable(call.pipe)


def test_branches_that_are_told_the_same_agree_and_others_do_not(call: PictureCall, tmp_path: Path) -> None:
    """With the prompt as its own negative, guidance changes nothing but rounding; states that mixed would show."""
    lesa.enable(call.pipe, call.own_bundle(tmp_path / "bundle"))
    try:
        same = call.run(negative_prompt="a thin seven")
        again = call.run(negative_prompt="a thin seven", true_cfg_scale=2.0)
        assert torch.allclose(same, again, atol=1e-4)
        assert not torch.allclose(same, call.run(negative_prompt="the blue cat"), atol=1e-3)
    finally:
        lesa.disable(call.pipe)


@pytest.mark.parametrize("build", [edit, edit_plus])
def test_editing_predicts_the_picture_s_tokens_alone(
    build: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_references(monkeypatch)
    call = edit() if build is edit else edit_plus()
    widths: list[int] = []
    handle = call.pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    call.run()
    whole = 16 + (64 if build is edit else 2 * 64)
    assert set(widths) == {whole}  # each reference is 32 x 32 pixels, the picture 16 x 16
    widths.clear()
    lesa.enable(call.pipe, call.own_bundle(tmp_path / "bundle"))
    widths.clear()
    call.run()
    handle.remove()
    kinds = [record.kind for record in lesa.summary(call.pipe).steps for _ in call.branches]
    assert widths == [whole if kind == "full" else 16 for kind in kinds]
    assert lesa.summary(call.pipe).peak_bytes <= 2 * 4 * 16 * 32 * 4
    with pytest.raises(MismatchError, match="width: got 32, expected 16"):
        call.run(width=32)
