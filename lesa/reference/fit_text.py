"""Teaches the two small text encoders to read: their outputs must tell the prompt's attributes.

FLUX gives text tokens no positions, so "white on black" and "black on white" differ only by what the
encoders make of the order of words; random encoders hardly do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn

from lesa.reference.optim import Optimiser, Report, pick
from lesa.reference.prompts import Language

LEARNING_RATE = 2e-3
BATCH_SIZE = 64


def fit_text(
    pipeline: FluxPipeline,
    language: Language,
    prompts: list[str],
    *,
    num_steps: int,
    seed: int,
    device: str,
    report: Report,
) -> None:
    """Train both encoders in place on `prompts` and their short forms, then freeze them."""
    texts = sorted({*prompts, *(language.shorten(prompt) for prompt in prompts)})
    targets = torch.tensor([language.indices(text) for text in texts]).to(device)
    clip_ids, t5_ids = tokenize(pipeline, texts)
    width = pipeline.text_encoder.config.hidden_size
    sizes = [len(values) for values in language.values.values()]
    heads = nn.ModuleList([nn.Linear(width, sum(sizes)) for _ in range(2)]).to(device)
    encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2]).to(device).train()
    optimiser = Optimiser(
        [*encoders.parameters(), *heads.parameters()], learning_rate=LEARNING_RATE, num_steps=num_steps
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        index = pick(len(texts), BATCH_SIZE, generator)
        pooled, tokens = _encode(pipeline, clip_ids[index].to(device), t5_ids[index].to(device))
        wanted = targets[index.to(device)]
        loss = torch.zeros((), device=device)
        for logits in (heads[0](pooled), heads[1](tokens.mean(dim=1))):
            for part, target in zip(logits.split(sizes, dim=1), wanted.T, strict=True):
                loss = loss + F.cross_entropy(part, target)
        optimiser.step(loss)
        if step % 50 == 0 or step == num_steps - 1:
            report(step, {"text_loss": float(loss.detach())})
    encoders.eval().requires_grad_(False)


def tokenize(pipeline: FluxPipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of CLIP and of T5, both [B, T] padded to its tokenizer's length, as FluxPipeline pads them."""
    clip, t5 = (
        tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    return clip.input_ids, t5.input_ids


@torch.no_grad()
def embed(pipeline: FluxPipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer is given for each text: pooled [B, C] and tokens [B, T, C]."""
    clip_ids, t5_ids = tokenize(pipeline, texts)
    device = pipeline.text_encoder.device
    return _encode(pipeline, clip_ids.to(device), t5_ids.to(device))


def _encode(
    pipeline: FluxPipeline, clip_ids: torch.Tensor, t5_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Without attention masks, as FluxPipeline calls them.
    return pipeline.text_encoder(clip_ids).pooler_output, pipeline.text_encoder_2(t5_ids)[0]
