"""Images of a model that was trained here, by its pipeline's own call."""

from __future__ import annotations

from typing import Any

import torch

from lesa.base_models.architectures import architecture_of
from lesa.base_models.data_sets import DataSet


def full_call(data_set: DataSet, num_prompts: int) -> dict[str, Any]:
    """Keyword arguments of a full sample, with the negative prompts of a pipeline that guides by two calls."""
    architecture = architecture_of(data_set)
    call = architecture.call(data_set)
    return call if architecture.has_guidance else call | {"negative_prompt": [architecture.promptless] * num_prompts}


def sample_images(pipeline: Any, prompts: list[str], call: dict[str, Any]) -> torch.Tensor:
    """One image or video a prompt, on the CPU, in [0, 1]; the noise of each depends on its place alone."""
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(
        prompt=prompts,
        generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
        output_type="pt",
        return_dict=False,
        **call,
    )[0]
    return images.cpu()
