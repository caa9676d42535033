"""Trains the transformer by flow matching, with a guidance input that means something.

As in FLUX.1-dev one forward pass gives the guided velocity. It is learnt without a teacher: for a guidance
g drawn at random, v(x | prompt, g) is fitted so that the mixture

    v(x | prompt, g) / g + (1 - 1 / g) v(x | "", 1)

predicts the velocity noise - data, the second term being held constant. Where that is met, v(x | prompt, g)
is the unguided velocity pushed away from the promptless one by g, which is classifier-free guidance. A share
of the batch has g = 1 (ordinary flow matching), some of it without its prompt.

Shape legend: B batch, L image tokens, T text tokens, C channels of a packed latent.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from lesa.reference.optim import Optimiser, Report, pick

MAX_GUIDANCE = 5.0
UNGUIDED_SHARE = 0.5  # of a batch, trained at g = 1
PROMPT_DROPOUT = 0.25  # of the unguided share
GUIDANCE_FROM = 0.25  # share of the steps after which guided targets are trained at all
MAX_EMA_DECAY = 0.997
WEIGHT_DECAY = 0.01
MATRIX_RATE = 4.0  # learning rate of the blocks' matrices (Muon) relative to everything else's (AdamW)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowData:
    """What the transformer learns from.

    latents: packed and normalised [N, L, C]; text_index: [N], rows of pooled [M, P] and tokens [M, T, P];
    the last row of those two is the empty prompt.
    """

    latents: torch.Tensor
    text_index: torch.Tensor
    pooled: torch.Tensor
    tokens: torch.Tensor


def fit_flow(
    pipeline: FluxPipeline,
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
    _zero_modulation(transformer)
    average = copy.deepcopy(transformer).requires_grad_(False)
    named = list(transformer.named_parameters())
    matrices = {name for name, p in named if p.ndim == 2 and "blocks." in name and ".norm" not in name}
    optimiser = Optimiser(
        [p for name, p in named if name not in matrices],
        learning_rate=learning_rate,
        matrices=[p for name, p in named if name in matrices],
        matrix_learning_rate=MATRIX_RATE * learning_rate,
        num_steps=num_steps,
        weight_decay=WEIGHT_DECAY,
    )
    velocity = Velocity(
        transformer, num_text_tokens=data.tokens.shape[1], side=math.isqrt(data.latents.shape[1])
    )
    pooled, tokens = data.pooled.to(device), data.tokens.to(device)
    empty = len(pooled) - 1
    generator = torch.Generator().manual_seed(seed)
    num_unguided = round(UNGUIDED_SHARE * batch_size)
    num_dropped = round(PROMPT_DROPOUT * num_unguided)
    recent: list[float] = []
    for step in range(num_steps):
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

        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        predicted = velocity(noisy, sigma, guidance, pooled[text], tokens[text])
        mixture = predicted
        if step >= GUIDANCE_FROM * num_steps:
            guided = slice(num_unguided, None)
            rows = torch.full((batch_size - num_unguided,), empty, device=device)
            with torch.no_grad():
                ones = torch.ones_like(guidance[guided])
                promptless = velocity(noisy[guided], sigma[guided], ones, pooled[rows], tokens[rows])
            share = (1 / guidance[guided])[:, None, None]
            mixture = torch.cat(
                [predicted[:num_unguided], share * predicted[guided] + (1 - share) * promptless]
            )
        loss = (mixture - (noise - clean)).square().mean()
        optimiser.step(loss)
        _update_average(average, transformer, decay=min(MAX_EMA_DECAY, (1 + step) / (10 + step)))
        value = float(loss.detach())
        if step >= int(0.9 * num_steps):
            recent.append(value)
        if step % 20 == 0 or step == num_steps - 1:
            report(step, {"flow_loss": value, "learning_rate": optimiser.learning_rate})
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)
    return sum(recent) / len(recent)


class Velocity:
    """The transformer called as FluxPipeline calls it, with the position ids prepared once."""

    def __init__(self, transformer: FluxTransformer2DModel, *, num_text_tokens: int, side: int) -> None:
        self.transformer = transformer
        device, dtype = transformer.device, transformer.dtype
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, dtype)
        self.text_ids = torch.zeros(num_text_tokens, 3, device=device, dtype=dtype)

    def __call__(
        self,
        noisy: torch.Tensor,  # [B, L, C]
        sigma: torch.Tensor,  # [B], noise level in (0, 1]
        guidance: torch.Tensor,  # [B]
        pooled: torch.Tensor,  # [B, P]
        tokens: torch.Tensor,  # [B, T, P]
    ) -> torch.Tensor:
        predicted: torch.Tensor = self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return predicted


def draw_sigmas(
    pipeline: FluxPipeline, count: int, num_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """Noise levels [B], one in each of B equal parts of the distribution of the sampler's steps."""
    config = pipeline.scheduler.config
    mu = calculate_shift(
        num_tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    shift = math.exp(mu)
    uniform = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    uniform = uniform.clamp_min(1e-4)
    return shift * uniform / (1 + (shift - 1) * uniform)


def _zero_modulation(transformer: FluxTransformer2DModel) -> None:
    """Start every block as the identity and the output at zero (adaLN-zero, as DiT is trained)."""
    linears: list[nn.Linear] = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        linears += [block.norm1.linear, block.norm1_context.linear]
    linears += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, *, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
