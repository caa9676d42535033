"""Teaches the small text encoders to read: what the transformer is given must tell the prompt's attributes.

FLUX gives text tokens no positions, so "white on black" and "black on white" differ only by what the
encoders make of the order of words; random encoders hardly do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lesa.base_models.architectures import Architecture, Conditioning
from lesa.base_models.data_sets import DataSet
from lesa.base_models.optim import Optimiser, Report, pick

LEARNING_RATE = 2e-3
BATCH_SIZE = 64


def fit_text(
    architecture: Architecture,
    pipeline: Any,
    data_set: DataSet,
    prompts: list[str],
    *,
    num_steps: int,
    seed: int,
    device: str,
    report: Report,
) -> None:
    """Train the encoders in place on `prompts` and their short forms, then freeze them."""
    language = data_set.language
    texts = sorted({*prompts, *(language.shorten(prompt) for prompt in prompts)})
    targets = torch.tensor([language.indices(text) for text in texts]).to(device)
    encoders = nn.ModuleList(architecture.text_encoders(pipeline)).to(device).train()
    with torch.no_grad():
        widths = [s.shape[1] for s in _summaries(architecture.read(pipeline, data_set, texts[:1]))]
    sizes = [len(values) for values in language.values.values()]
    heads = nn.ModuleList([nn.Linear(width, sum(sizes)) for width in widths]).to(device)
    optimiser = Optimiser(
        [*encoders.parameters(), *heads.parameters()], learning_rate=LEARNING_RATE, num_steps=num_steps
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        index = pick(len(texts), BATCH_SIZE, generator)
        read = architecture.read(pipeline, data_set, [texts[i] for i in index])
        wanted = targets[index.to(device)]
        loss = torch.zeros((), device=device)
        for head, summary in zip(heads, _summaries(read), strict=True):
            for part, target in zip(head(summary).split(sizes, dim=1), wanted.T, strict=True):
                loss = loss + F.cross_entropy(part, target)
        optimiser.step(loss)
        if step % 50 == 0 or step == num_steps - 1:
            report(step, {"text_loss": float(loss.detach())})
    encoders.eval().requires_grad_(False)


def _summaries(read: Conditioning) -> list[torch.Tensor]:
    """One vector a text, [B, P], of each output: pooled vectors as they are, tokens in the mean."""
    masks = [value for name, value in read.items() if name.endswith("_mask")]
    summaries = []
    for name, value in read.items():
        if value.ndim == 3 and masks:
            weights = masks[0].to(value.dtype)[..., None]
            summaries.append((value * weights).sum(dim=1) / weights.sum(dim=1))
        elif value.ndim == 3:
            summaries.append(value.mean(dim=1))
        elif not name.endswith("_mask"):
            summaries.append(value)
    return summaries
