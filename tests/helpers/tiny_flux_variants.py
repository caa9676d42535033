"""FLUX pipelines that are given pictures, and the calls that go with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FluxControlNetModel

from lesa.params import CallParams
from tests.helpers.images import NUM_STEPS, PictureCall, mask, picture
from tests.helpers.tiny import CALL, SIZE, save_and_load, tiny_flux


def _with_class(name: str, pipe: Any, **components: Any) -> Any:
    made = getattr(diffusers, name).from_pipe(pipe, **components)
    return save_and_load(made, None, torch.float32)


def _call(**changes: Any) -> CallParams:
    return CallParams(**(CALL | {"num_inference_steps": NUM_STEPS} | changes))


def text_to_image(schnell: bool = False, **settings: Any) -> PictureCall:
    """FLUX.1-dev, or schnell with no distilled guidance and no shift by size."""
    pipe = tiny_flux(guidance_embeds=not schnell, dynamic_shifting=not schnell, **settings)
    return PictureCall(pipe=pipe, images={}, call=_call(guidance_scale=None) if schnell else _call())


def image_to_image() -> PictureCall:
    pipe = _with_class("FluxImg2ImgPipeline", tiny_flux())
    return PictureCall(
        pipe=pipe, images={"image": picture(), "strength": 0.75}, call=_call(), first_step=NUM_STEPS // 4
    )


def inpaint() -> PictureCall:
    pipe = _with_class("FluxInpaintPipeline", tiny_flux())
    images = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    return PictureCall(pipe=pipe, images=images, call=_call())


def controlnet(true_cfg: bool = False, name: str = "FluxControlNetPipeline", **images: Any) -> PictureCall:
    base = tiny_flux()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = FluxControlNetModel.from_transformer(
            base.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        )
        for part, parameter in net.named_parameters():
            if "controlnet" in part:  # made as zeros: they would add nothing
                torch.nn.init.normal_(parameter, std=0.2)
    pipe = _with_class(name, base, controlnet=net)
    guided = {"negative_prompt": "a dog"} if true_cfg else {}
    return PictureCall(
        pipe=pipe,
        images={"control_image": picture(), "controlnet_conditioning_scale": 1.0, **images},
        call=_call(true_cfg_scale=3.0) if true_cfg else _call(),
        branches=("cond", "uncond") if true_cfg else ("denoise",),
        extra=guided,
    )


def controlnet_image_to_image() -> PictureCall:
    made = controlnet(name="FluxControlNetImg2ImgPipeline", image=picture(), strength=0.75)
    made.first_step = NUM_STEPS // 4
    return made


def controlnet_inpaint() -> PictureCall:
    return controlnet(name="FluxControlNetInpaintPipeline", image=picture(), mask_image=mask(), strength=1.0)


def kontext() -> PictureCall:
    pipe = _with_class("FluxKontextPipeline", tiny_flux())
    images = {"image": picture(32), "_auto_resize": False, "max_area": SIZE * SIZE}
    return PictureCall(pipe=pipe, images=images, call=_call())


def fill() -> PictureCall:
    pipe = _with_class("FluxFillPipeline", tiny_flux(in_channels=48))  # latents, masked picture, mask
    return PictureCall(pipe=pipe, images={"image": picture(), "mask_image": mask()}, call=_call())


def control() -> PictureCall:
    pipe = _with_class("FluxControlPipeline", tiny_flux(in_channels=32))  # latents beside the control picture's
    return PictureCall(pipe=pipe, images={"control_image": picture()}, call=_call())


VARIANTS: dict[str, Callable[[], PictureCall]] = {
    "FluxPipeline": text_to_image,
    "FluxImg2ImgPipeline": image_to_image,
    "FluxInpaintPipeline": inpaint,
    "FluxControlNetPipeline": controlnet,
    "FluxControlNetPipeline, guided": lambda: controlnet(true_cfg=True),
    "FluxControlNetImg2ImgPipeline": controlnet_image_to_image,
    "FluxControlNetInpaintPipeline": controlnet_inpaint,
    "FluxKontextPipeline": kontext,
    "FluxFillPipeline": fill,
    "FluxControlPipeline": control,
}
