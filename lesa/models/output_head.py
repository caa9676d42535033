"""The output head of a transformer, `norm_out` and `proj_out`: what a predicted feature still goes through.

Every family of the table ends alike: `proj_out(norm_out(feature, temb))`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesa.errors import LesaError
from lesa.models.families import FAMILIES


class OutputHead(nn.Module):
    """Feature [B, L, C] and temb [B, D] -> the transformer's output tokens [B, L, O]."""

    def __init__(self, norm_out: nn.Module, proj_out: nn.Module) -> None:
        super().__init__()
        self.norm_out, self.proj_out = norm_out, proj_out

    def forward(self, feature: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.norm_out(feature, temb))


def output_head_of(transformer: nn.Module) -> OutputHead:
    """The output head of a loaded transformer; modules are shared, not copied."""
    return OutputHead(transformer.norm_out, transformer.proj_out)


def load_output_head(folder: Path, dtype: torch.dtype = torch.float32) -> OutputHead:
    """Read the output head alone from a saved transformer: megabytes of a model of gigabytes.

    Args:
        folder: a `transformer` folder of a diffusers pipeline (config.json and safetensors, sharded or not).

    Raises:
        ValueError: a transformer outside the table of families, or a weight of the head that is not in the files.
    """
    import diffusers
    from accelerate import init_empty_weights
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    if config.get("_class_name") not in {row.transformer_class for row in FAMILIES.values()}:
        raise LesaError(f"{folder}: _class_name {config.get('_class_name')!r} is not in the table of model families")
    with init_empty_weights():
        transformer = getattr(diffusers, config["_class_name"]).from_config(config)
    head = output_head_of(transformer)
    wanted = set(head.state_dict())
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name).to(dtype) for name in file.keys() if name in wanted}
    if missing := wanted - set(weights):
        raise LesaError(f"{folder}: weights {sorted(missing)} are missing; is it a saved transformer?")
    head.load_state_dict(weights, assign=True)
    return freeze(head)


def freeze(module: Any) -> Any:
    """Turn off gradients of a module's parameters; the module is returned."""
    return module.requires_grad_(False).eval()
