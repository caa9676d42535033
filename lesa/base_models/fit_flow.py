"""Trains the transformer by flow matching, with a guidance input that means something where it has one.

As in FLUX.1-dev one forward pass then gives the guided velocity. It is learnt without a teacher: for a guidance
g drawn at random, v(x | prompt, g) is fitted so that the mixture

    v(x | prompt, g) / g + (1 - 1 / g) v(x | "", 1)

predicts the velocity noise - data, the second term being held constant. Where that is met, v(x | prompt, g)
is the unguided velocity pushed away from the promptless one by g, which is classifier-free guidance. A share
of the batch has g = 1 (ordinary flow matching), some of it without its prompt. A transformer without a guidance
input, which is guided by two calls a step, learns by ordinary flow matching alone.

Shape legend: B batch; latents are of the shape that the transformer takes.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from lesa.base_models.architectures import Architecture, Conditioning
from lesa.base_models.data_sets import DataSet
from lesa.base_models.optim import Optimiser, Report, pick

MAX_GUIDANCE = 5.0
UNGUIDED_SHARE = 0.5  # of a batch, trained at g = 1
PROMPT_DROPOUT = 0.25  # of the unguided share
GUIDANCE_FROM = 0.25  # share of the steps after which guided targets are trained at all
MAX_EMA_DECAY = 0.997
WEIGHT_DECAY = 0.01
MATRIX_RATE = 4.0  # learning rate of the blocks' matrices (Muon) relative to everything else's (AdamW)
_MODULATION = re.compile(
    r"blocks\.\d+\.((norm|norm1|norm1_context)\.linear|(img|txt)_mod\.1)$|^norm_out\.linear$|^proj_out$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowData:
    """What the transformer learns from.

    latents: normalised, [N, ...] as the transformer takes them; text_index: [N], rows of the conditioning, whose last
    row is the prompt that guidance steers away from.
    """

    latents: torch.Tensor
    text_index: torch.Tensor
    conditioning: Conditioning


def fit_flow(
    architecture: Architecture,
    pipeline: Any,
    data_set: DataSet,
    data: FlowData,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    report: Report,
) -> float:
    """Train `pipeline.transformer` in place, leaving the moving average of its weights there.

    Returns the mean loss of the last tenth of the steps.
    """
    transformer = pipeline.transformer.to(device).train()
    _zero_modulations(transformer)
    conditioning = {name: value.to(device) for name, value in data.conditioning.items()}
    empty = len(next(iter(conditioning.values()))) - 1

    def velocity(noisy: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        chosen = {name: value[text] for name, value in conditioning.items()}
        return architecture.velocity(pipeline, data_set, noisy, sigma, guidance, chosen)

    generator = torch.Generator().manual_seed(seed)
    num_unguided = round(UNGUIDED_SHARE * batch_size) if architecture.has_guidance else batch_size
    num_dropped = round(PROMPT_DROPOUT * num_unguided)

    def loss_at(step: int) -> torch.Tensor:
        index = pick(len(data.latents), batch_size, generator)
        clean = data.latents[index].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = draw_sigmas(pipeline, batch_size, clean.shape[1], generator).to(device)
        guidance = 1 + (MAX_GUIDANCE - 1) * torch.rand(batch_size, generator=generator)
        guidance[:num_unguided] = 1
        if step < GUIDANCE_FROM * num_steps:
            guidance[:] = 1
        text = data.text_index[index]
        text[:num_dropped] = empty
        guidance, text = guidance.to(device), text.to(device)

        noisy = torch.lerp(clean, noise, sigma.reshape(-1, *[1] * (clean.ndim - 1)))
        predicted = velocity(noisy, sigma, guidance, text)
        mixture = predicted
        if step >= GUIDANCE_FROM * num_steps and num_unguided < batch_size:
            guided = slice(num_unguided, None)
            rows = torch.full((batch_size - num_unguided,), empty, device=device)
            with torch.no_grad():
                ones = torch.ones_like(guidance[guided])
                promptless = velocity(noisy[guided], sigma[guided], ones, rows)
            share = (1 / guidance[guided]).reshape(-1, *[1] * (clean.ndim - 1))
            mixture = torch.cat([predicted[:num_unguided], share * predicted[guided] + (1 - share) * promptless])
        return (mixture - (noise - clean)).square().mean()

    return train_transformer(
        transformer, loss_at, name="flow_loss", num_steps=num_steps, learning_rate=learning_rate, report=report
    )


def train_transformer(
    transformer: nn.Module,
    loss_at: Callable[[int], torch.Tensor],  # of a step
    *,
    name: str,  # of the loss, in reports
    num_steps: int,
    learning_rate: float,
    report: Report,
) -> float:
    """Minimise a loss over all weights in place, leaving their moving average there, frozen.

    Returns the mean loss of the last tenth of the steps.
    """
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimiser = _optimiser(transformer, learning_rate=learning_rate, num_steps=num_steps)
    recent: list[float] = []
    for step in range(num_steps):
        loss = loss_at(step)
        optimiser.step(loss)
        _update_average(average, transformer, step)
        value = float(loss.detach())
        if step >= int(0.9 * num_steps):
            recent.append(value)
        if step % 20 == 0 or step == num_steps - 1:
            report(step, {name: value, "learning_rate": optimiser.learning_rate})
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)
    return sum(recent) / len(recent)


def draw_sigmas(pipeline: Any, count: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [B], one in each of B equal parts of the distribution of the sampler's steps."""
    shift = time_shift(pipeline.scheduler, num_tokens)
    uniform = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    uniform = uniform.clamp_min(1e-4)
    return shift * uniform / (1 + (shift - 1) * uniform)


def time_shift(scheduler: Any, num_tokens: int) -> float:
    """How far the sampler's noise levels are moved up: s in sigma = s u / (1 + (s - 1) u), u even."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    lengths = config.base_image_seq_len, config.max_image_seq_len
    return math.exp(calculate_shift(num_tokens, *lengths, config.base_shift, config.max_shift))


def _optimiser(transformer: nn.Module, *, learning_rate: float, num_steps: int) -> Optimiser:
    """Muon for the blocks' matrices, AdamW for everything else."""
    modulation = {f"{name}.weight" for name in _modulations(transformer)}
    named = list(transformer.named_parameters())
    matrices = {name for name, p in named if p.ndim == 2 and "blocks." in name} - modulation
    return Optimiser(
        [p for name, p in named if name not in matrices],
        learning_rate=learning_rate,
        matrices=[p for name, p in named if name in matrices],
        matrix_learning_rate=MATRIX_RATE * learning_rate,
        num_steps=num_steps,
        weight_decay=WEIGHT_DECAY,
    )


def _zero_modulations(transformer: nn.Module) -> None:
    """Make every block the identity and the output zero (adaLN-zero, as DiT is trained)."""
    for linear in _modulations(transformer).values():
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _modulations(transformer: nn.Module) -> dict[str, nn.Linear]:
    """By name, what turns the timestep into scales, shifts and gates, and the output layer."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if _MODULATION.search(name) and isinstance(module, nn.Linear)
    }


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(MAX_EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
