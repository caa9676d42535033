"""Few-step models, each learnt from a base model that was trained here: an entry of `STUDENTS` each.

FLUX.1-schnell and Qwen-Image-Lightning are what their makers distilled from FLUX.1-dev's and Qwen-Image's kind: no
guidance at sampling, 4 and 8 steps, a scheduler of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from lesa.base_models.architectures import architecture_of
from lesa.base_models.data_sets import DATA_SETS, DataSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A few-step model."""

    name: str
    data_set: DataSet  # its teacher's
    num_steps: int
    call: dict[str, Any]  # what differs from the teacher's call besides the number of steps
    make: Callable[[Any], Any]  # from the teacher's pipeline, one that shares its other parts


def _schnell(teacher: Any) -> Any:
    """FLUX without a guidance input: the embedding of the teacher's guidance becomes part of the timestep's."""
    source = teacher.transformer
    config = {name: value for name, value in source.config.items() if not name.startswith("_")}
    student = FluxTransformer2DModel(**config | {"guidance_embeds": False}).to(source.device)
    weights = {k: v for k, v in source.state_dict().items() if "guidance_embedder" not in k}
    student.load_state_dict(weights)
    embedding = source.time_text_embed
    guidance = architecture_of(DATA_SETS["flux-digits"]).guidance * 1000  # as the transformer scales it
    with torch.no_grad():
        constant = embedding.guidance_embedder(embedding.time_proj(torch.tensor([guidance], device=source.device)))
        student.time_text_embed.timestep_embedder.linear_2.bias += constant[0]
    return type(teacher)(
        **teacher.components
        | {
            "transformer": student,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),  # FLUX.1-schnell's
        }
    )


def _lightning(teacher: Any) -> Any:
    """Qwen-Image called once a step, with Lightning's scheduler: its noise levels are moved up by 3 at every size."""
    mu = 1.0986122886681098  # ln 3
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=mu,
        max_shift=mu,
        base_image_seq_len=256,
        max_image_seq_len=8192,
    )
    student = copy.deepcopy(teacher.transformer)
    return type(teacher)(**teacher.components | {"transformer": student, "scheduler": scheduler})


STUDENTS = {
    student.name: student
    for student in (
        Student(
            name="schnell-digits",
            data_set=DATA_SETS["flux-digits"],
            num_steps=4,
            call={"guidance_scale": 0.0},
            make=_schnell,
        ),
        Student(
            name="lightning-digits",
            data_set=DATA_SETS["qwen-digits"],
            num_steps=8,
            call={"true_cfg_scale": 1.0},
            make=_lightning,
        ),
    )
}
