"""Loading a workload's pipeline, and the one way everybody samples through it.

Shapes: B samples, C latent channels, F frames, H and W pixels, L tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lesa.errors import LesaError
from lesa.models import bill
from lesa.models.families import FAMILIES, Family
from lesa.params import CallParams, ModelParams

# Parts of a pipeline may come from these libraries and from nowhere else: anything else names code to be run.
_LIBRARIES = ("diffusers", "transformers")
_NEGATIVE_PROMPT = " "  # what classifier-free guidance steers away from; Qwen-Image's own default
_MAX_INDEX_BYTES = 1 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PipelineError(LesaError):
    """A pipeline that cannot be loaded or called as asked; the message lists every problem."""


def pick_device(setting: str) -> torch.device:
    """`auto` is CUDA where there is one and the CPU elsewhere; `cuda` without one is refused (ValueError)."""
    if setting not in ("auto", "cpu", "cuda"):
        raise LesaError(f"device: must be auto, cpu or cuda, got {setting!r}")
    if setting == "cuda" and not torch.cuda.is_available():
        raise LesaError("device: cuda is asked for and torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def load_pipeline(model: ModelParams, device: str = "auto") -> Any:
    """A workload's pipeline on a device as `pick_device` takes it, in its dtype, progress bar off.

    Only safetensors weights and only classes of diffusers and transformers: nothing that comes with the model
    is run as code. A local folder is used as it is; a hub id is downloaded at its pinned revision, or taken
    from the cache when HF_HUB_OFFLINE is set.

    Raises:
        PipelineError: what does not fit the family, is missing or names code, all in one message.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # their bars of loading have no setting of their own
        library.utils.logging.disable_progress_bar()
    family = FAMILIES[model.family]
    folder = pipeline_folder(model)
    class_name = _check_index(folder, family)
    pipe = getattr(diffusers, class_name).from_pretrained(
        folder, dtype=_DTYPES[model.dtype], use_safetensors=True, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(pick_device(device))
    bill.watch(pipe.transformer)
    return pipe


def release_memory() -> None:
    """Give back the memory of pipelines that are not referred to any more.

    A pipeline that has sampled stands in reference cycles: without this the next one is loaded beside it.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pipeline_folder(model: ModelParams) -> Path:
    """Where a pipeline lies on this machine; a hub id is downloaded at its commit first."""
    if Path(model.source).is_dir():
        return Path(model.source)
    if model.source.startswith(("data/", "/", "./", "../")):
        raise PipelineError(
            f"model.source: {model.source} is not a folder; put a saved pipeline there, or run the stage that trains "
            "one, python -m flows.base, where the workload has a base section"
        )
    if model.revision is None:
        raise PipelineError("model.revision: required for a hub id, so that its weights cannot change")
    import diffusers

    folder = diffusers.DiffusionPipeline.download(model.source, revision=model.revision, use_safetensors=True)
    return Path(folder)


def _check_index(folder: Path, family: Family) -> str:
    """The pipeline's class name, once model_index.json is known to name only library classes."""
    path = folder / "model_index.json"
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise PipelineError(f"{path}: larger than {_MAX_INDEX_BYTES} bytes")
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist: {folder} is not a folder of a saved pipeline") from None
    except ValueError as error:
        raise PipelineError(f"{path}: not JSON ({error})") from None
    if not isinstance(index, dict):
        raise PipelineError(f"{path}: must be an object")
    problems = []
    class_name = index.get("_class_name")
    if class_name not in family.pipeline_classes:
        known = class_name in family.related_pipelines + family.other_pipelines
        why = "; it is called with images, a workload has prompts alone" if known else ""
        classes = ", ".join(family.pipeline_classes)
        problems.append(f"_class_name: got {class_name!r}, the family has {classes}{why}")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue  # settings of the pipeline; from_pretrained refuses those it does not know
        if len(entry) != 2 or not (entry[0] is None or entry[0] in _LIBRARIES):
            problems.append(f"{name}: {entry!r} is not of {' or '.join(_LIBRARIES)}; other code is never run")
        elif name == "transformer" and entry[1] != family.transformer_class:
            problems.append(f"transformer: got {entry[1]!r}, the family has {family.transformer_class!r}")
    if problems:
        raise PipelineError(f"{path}: " + "; ".join(problems))
    assert isinstance(class_name, str)
    return class_name


def call_arguments(pipe: Any, call: CallParams, num_prompts: int) -> dict[str, Any]:
    """`call` as keyword arguments of the pipeline; None fields are left to the pipeline.

    Classifier-free guidance (true_cfg_scale above 1) brings the negative prompt that switches it on.

    Raises:
        PipelineError: naming every set field that this pipeline does not take.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    settings = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = [name for name in given if name not in accepted]
    if unknown:
        names = ", ".join(f"call.{name} ({given[name]})" for name in unknown)
        raise PipelineError(f"{type(pipe).__name__} does not take {names}; set to null what it does not take")
    if given.get("true_cfg_scale", 0.0) > 1.0:
        given["negative_prompt"] = [_NEGATIVE_PROMPT] * num_prompts
    return given


def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    output_type: str = "pt",  # "pt": images in [0, 1]; "latent": what the decoder would get
    batch_size: int = 32,  # samples a pipeline call
    sigmas: Sequence[float] | None = None,  # instead of the pipeline's own, one a step
) -> torch.Tensor:
    """One sample for every prompt and its seed, in order, through the pipeline's own call, hooks and all.

    A sample's noise depends on its seed alone: one CPU generator each, whatever the batch or the device.

    Returns:
        float32 on the CPU, [B, 3, H, W] for images, [B, F, 3, H, W] for videos, the pipeline's own
        shape for latents.
    """
    if len(prompts) != len(seeds):
        raise LesaError(f"{len(prompts)} prompts and {len(seeds)} seeds: every sample needs one of each")
    if not prompts:
        raise LesaError("prompts: at least one is needed")
    if batch_size < 1:
        raise LesaError(f"batch_size: must be at least 1, got {batch_size}")
    results = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        arguments = call_arguments(pipe, call, len(chunk))
        if sigmas is not None:
            arguments |= {"sigmas": list(sigmas), "num_inference_steps": len(sigmas)}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
        arguments |= {"generator": generators, "output_type": output_type, "return_dict": False}
        output = pipe(prompt=chunk, **arguments)[0]
        results.append(output.detach().float().cpu())
    return torch.cat(results)


def timed_sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: CallParams,
    batch_size: int,
) -> tuple[torch.Tensor, float]:
    """Images in [0, 1] and the seconds they took; the device is waited for on both sides."""
    _wait()
    started = time.perf_counter()
    images = sample(pipe, prompts, seeds, call, batch_size=batch_size)
    _wait()
    return images, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
