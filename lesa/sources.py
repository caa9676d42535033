"""Where the pipeline of a bundle comes from, in the form `load_pipeline` takes."""

from __future__ import annotations

from typing import Literal, cast

from lesa.manifest import Manifest
from lesa.params import ModelParams, RecordParams, ScheduleParams, Workload


def source_of(
    manifest: Manifest, base: str | None = None, revision: str | None = None, device: str = "auto"
) -> Workload:
    """A workload with the bundle's model and call.

    Args:
        manifest: of the bundle.
        base: pipeline folder or hub id; None takes what the bundle was made from.
        revision: commit of a hub id; None takes the bundle's, where the model is the bundle's too.
        device: auto, cpu or cuda.

    Raises:
        ValueError: the bundle does not say where its model is.
    """
    model = manifest.data["model"]
    source = base or model["source"]
    if source is None:
        raise ValueError("the bundle does not say where its model is: give the pipeline folder or hub id")
    if revision is None and source == model["source"]:
        revision = model["revision"]
    dtype = "bfloat16" if model["dtype"] == "bfloat16" else "float32"
    return Workload(
        name=manifest.workload,
        model=ModelParams(
            family=manifest.family,
            source=source,
            revision=revision,
            dtype=cast(Literal["float32", "bfloat16"], dtype),
        ),
        call=manifest.call,
        prompts=manifest.workload,
        schedule=ScheduleParams(budgets={}, default_budget=manifest.default_budget),
        record=RecordParams(train_prompts=1, validation_prompts=1),
        device=cast(Literal["auto", "cpu", "cuda"], device),
    )
