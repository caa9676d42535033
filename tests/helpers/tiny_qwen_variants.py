"""Qwen-Image pipelines that are given pictures, and the calls that go with them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import QwenImageControlNetModel

from lesa.params import CallParams
from tests.helpers.images import NUM_STEPS, PictureCall, mask, picture
from tests.helpers.tiny import save_and_load
from tests.helpers.tiny_qwen import CALL, tiny_qwen

_GUIDED = ("cond", "uncond")
_NEGATIVE = {"negative_prompt": " "}


def _with_class(name: str, pipe: Any, **components: Any) -> Any:
    made = getattr(diffusers, name)(**pipe.components, **components)
    missing = {part: None for part, value in components.items() if value is None}
    return save_and_load(made, None, torch.float32, **missing)


def _call() -> CallParams:
    return CallParams(**CALL, num_inference_steps=NUM_STEPS, true_cfg_scale=4.0)


def text_to_image() -> PictureCall:
    return PictureCall(pipe=tiny_qwen(), images={}, call=_call(), branches=_GUIDED, extra=_NEGATIVE)


def lightning(**settings: Any) -> PictureCall:
    """Few steps and no guidance: one branch."""
    call = CallParams(**CALL, num_inference_steps=NUM_STEPS, true_cfg_scale=1.0)
    return PictureCall(pipe=tiny_qwen(lightning=True, **settings), images={}, call=call)


def image_to_image() -> PictureCall:
    pipe = _with_class("QwenImageImg2ImgPipeline", tiny_qwen())
    images = {"image": picture(), "strength": 0.75}
    first = NUM_STEPS // 4
    return PictureCall(
        pipe=pipe, images=images, call=_call(), first_step=first, branches=_GUIDED, extra=_NEGATIVE
    )


def inpaint() -> PictureCall:
    pipe = _with_class("QwenImageInpaintPipeline", tiny_qwen())
    images = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    return PictureCall(pipe=pipe, images=images, call=_call(), branches=_GUIDED, extra=_NEGATIVE)


def controlnet() -> PictureCall:
    base = tiny_qwen()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = QwenImageControlNetModel.from_transformer(
            base.transformer, num_layers=1, attention_head_dim=16, num_attention_heads=2
        )
        for name, parameter in net.named_parameters():
            if "controlnet" in name:  # made as zeros: they would add nothing
                torch.nn.init.normal_(parameter, std=0.2)
    pipe = _with_class("QwenImageControlNetPipeline", base, controlnet=net)
    images = {"control_image": picture()}
    return PictureCall(pipe=pipe, images=images, call=_call(), branches=_GUIDED, extra=_NEGATIVE)


def edit() -> PictureCall:
    return _edit("QwenImageEditPipeline", picture(32))


def edit_plus() -> PictureCall:
    return _edit("QwenImageEditPlusPipeline", [picture(32), picture(16)])


def _edit(name: str, images: Any) -> PictureCall:
    """Without the processor of prompts with pictures, which needs torchvision: prompts come as embeddings."""
    base = tiny_qwen()
    extra: dict[str, Any] = {"prompt": None}
    with torch.no_grad():
        for prefix, prompt in (("", "a thin seven"), ("negative_", "a")):
            extra[f"{prefix}prompt_embeds"], _ = base.encode_prompt(prompt)
            extra[f"{prefix}prompt_embeds_mask"] = torch.ones(extra[f"{prefix}prompt_embeds"].shape[:2])
    pipe = _with_class(name, base, processor=None)
    return PictureCall(pipe=pipe, images={"image": images}, call=_call(), branches=_GUIDED, extra=extra)


def small_references(patch: pytest.MonkeyPatch) -> None:
    """Editing pipelines scale every reference to a million pixels; to 32 x 32 in tests."""
    for module, size in (("edit", (32, 32, None)), ("edit_plus", (32, 32))):
        patch.setattr(
            importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{module}"),
            "calculate_dimensions",
            lambda area, ratio, size=size: size,
        )


VARIANTS: dict[str, Callable[[], PictureCall]] = {
    "QwenImagePipeline": text_to_image,
    "QwenImagePipeline, unguided": lightning,
    "QwenImageImg2ImgPipeline": image_to_image,
    "QwenImageInpaintPipeline": inpaint,
    "QwenImageControlNetPipeline": controlnet,
    "QwenImageEditPipeline": edit,
    "QwenImageEditPlusPipeline": edit_plus,
}
