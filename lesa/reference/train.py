"""Trains the default workload's base model and its scorer from nothing, and saves both as folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import FluxPipeline

from lesa.atomic import replace_dir
from lesa.reference.digits import IMAGE_SIZE, draw_images, load_bank
from lesa.reference.fit_flow import FlowData, fit_flow
from lesa.reference.fit_text import embed, fit_text
from lesa.reference.fit_vae import encode, fit_vae, reconstruction_psnr
from lesa.reference.flux import DEFAULT_GUIDANCE, LATENT_CHANNELS, NUM_STEPS, build_pipeline
from lesa.reference.optim import Report, pick
from lesa.reference.prompts import parse_prompt, short_prompt, split_prompts
from lesa.reference.scorer import Scorer, fit_scorer
from lesa.reference.tokenizers import T5_LENGTH

# The smaller parts need a number of steps that does not depend on the transformer's, except in trial runs.
MAX_TEXT_STEPS = 250
MAX_VAE_STEPS = 700
MAX_SCORER_STEPS = 800
MAX_IMAGES = 24_000  # rendered once and encoded once
TYPICAL = 0.15  # share of the real digits, the most typical ones, that the model learns to draw
SHORT_SHARE = 0.1  # of the training texts are in short form
MAX_JUDGED = 120  # validation prompts sampled for the reported agreement


def train_flux_digits(
    *,
    base_dir: Path,  # the pipeline folder to write; replaced when it exists
    scorer_dir: Path,  # the scorer's folder; replaced when it exists
    prompts: list[str],  # the only ones the model is shown
    steps: int,  # of the transformer
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    report: Report,
) -> dict[str, float]:
    """Train autoencoder, text encoders, transformer and scorer, in fp32.

    The same seed and number of threads give the same weights.

    Returns vae_psnr (dB, held-out digits), flow_loss, scorer_accuracy (held-out digits) and agreement: the
    share of full samples of validation prompts that the scorer reads as prompted.
    Raises ValueError naming every argument out of range, before anything is written.
    """
    _check(prompts, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    base_dir, scorer_dir = Path(base_dir), Path(scorer_dir)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        num_images = min(MAX_IMAGES, max(64, steps * batch_size))
        scorer = fit_scorer(
            num_steps=min(MAX_SCORER_STEPS, steps),
            num_images=num_images,
            seed=seed + 1,
            device=device,
            report=report,
        )
        pipeline = build_pipeline()
        fit_text(
            pipeline,
            prompts,
            num_steps=min(MAX_TEXT_STEPS, steps),
            seed=seed + 2,
            device=device,
            report=report,
        )
        generator = torch.Generator().manual_seed(seed + 3)
        bank = load_bank(held_out=False, typical=TYPICAL)
        chosen = pick(len(prompts), num_images, generator)
        images = draw_images(bank, [prompts[i] for i in chosen], generator)
        fit_vae(
            pipeline.vae,
            images,
            num_steps=min(MAX_VAE_STEPS, steps),
            seed=seed + 4,
            device=device,
            report=report,
        )
        validation = split_prompts()["validation"]
        held_out = draw_images(load_bank(held_out=True), validation, generator)
        metrics = {"vae_psnr": reconstruction_psnr(pipeline.vae, held_out)}
        shortened = torch.rand(num_images, generator=generator) < SHORT_SHARE
        metrics["flow_loss"] = fit_flow(
            pipeline,
            _flow_data(pipeline, prompts, images, chosen, shortened),
            num_steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed + 5,
            device=device,
            report=report,
        )
    metrics["scorer_accuracy"] = scorer.accuracy
    metrics["agreement"] = _agreement(pipeline.to(device), scorer, validation[: min(MAX_JUDGED, 4 * steps)])
    pipeline.to("cpu")
    _save(pipeline, scorer, base_dir=base_dir, scorer_dir=scorer_dir)
    return metrics


def _check(prompts: list[str], *, steps: int, batch_size: int, learning_rate: float) -> None:
    problems = []
    if steps < 1:
        problems.append(f"steps is {steps}: at least 1")
    if batch_size < 2:
        problems.append(f"batch_size is {batch_size}: at least 2, half of it trains without guidance")
    if not 0 < learning_rate < 1:
        problems.append(f"learning_rate is {learning_rate}: between 0 and 1")
    if not prompts:
        problems.append("prompts is empty: give at least one")
    for prompt in prompts:
        try:
            parse_prompt(prompt)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("base model cannot be trained: " + "; ".join(problems))


def _flow_data(
    pipeline: FluxPipeline,
    prompts: list[str],
    images: torch.Tensor,
    chosen: torch.Tensor,
    shortened: torch.Tensor,
) -> FlowData:
    """Packed normalised latents of `images` and the embeddings of every text that may go with them."""
    latents = encode(pipeline.vae, images)
    config = pipeline.vae.config
    latents = (latents - config.shift_factor) * config.scaling_factor
    packed = FluxPipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, *latents.shape[2:])
    texts = [*prompts, *(short_prompt(parse_prompt(prompt)) for prompt in prompts), ""]
    pooled, tokens = embed(pipeline, texts)
    text_index = chosen + len(prompts) * shortened
    return FlowData(latents=packed, text_index=text_index, pooled=pooled, tokens=tokens)


def _agreement(pipeline: FluxPipeline, scorer: Scorer, prompts: list[str]) -> float:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=NUM_STEPS,
        guidance_scale=DEFAULT_GUIDANCE,
        max_sequence_length=T5_LENGTH,
        generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
        output_type="pt",
    ).images
    return float(scorer.agreement(images.cpu(), prompts).float().mean())


def _save(pipeline: FluxPipeline, scorer: Scorer, *, base_dir: Path, scorer_dir: Path) -> None:
    """Write both folders beside their places, then put them there."""
    partials = [folder.with_name(folder.name + ".partial") for folder in (base_dir, scorer_dir)]
    for partial in partials:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    pipeline.save_pretrained(partials[0])
    scorer.save(partials[1])
    for partial, folder in zip(partials, (base_dir, scorer_dir), strict=True):
        replace_dir(partial, folder)
