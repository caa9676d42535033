"""Trains a data set's base model and its scorer from nothing, and saves both as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lesa.base_models.architectures import Architecture, architecture_of
from lesa.base_models.data_sets import DataSet
from lesa.base_models.fit_flow import FlowData, fit_flow
from lesa.base_models.fit_text import fit_text
from lesa.base_models.fit_vae import encode, fit_vae, reconstruction_psnr
from lesa.base_models.optim import Report, pick
from lesa.base_models.sampling import full_call, sample_images
from lesa.base_models.saving import save_folders
from lesa.base_models.scorer import JUDGED_A_STEP, Scorer, fit_scorer
from lesa.errors import LesaError

# The smaller parts need a number of steps that does not depend on the transformer's, except in trial runs.
MAX_TEXT_STEPS = 250
MAX_SCORER_STEPS = 800
VAE_IMAGES = 64  # in trial runs the autoencoder sees at most this many a step of the transformer
MAX_FRAMES = 72_000  # of all videos together
MAX_IMAGES = 24_000  # drawn once and encoded once
SHORT_SHARE = 0.1  # of the training texts are in short form
MAX_JUDGED = 120  # unseen prompts sampled for the reported agreement; those of the test are left alone


def train_base(
    data_set: DataSet,
    *,
    base_dir: Path,  # the pipeline folder to write; replaced when it exists
    scorer_dir: Path,  # the scorer's folder; replaced when it exists, not touched where there is no scorer
    prompts: list[str],  # the only ones the model is shown
    steps: int,  # of the transformer
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    report: Report,
) -> dict[str, float]:
    """Train autoencoder, text encoders, transformer and, where the data set has a reading, scorer, in fp32.

    The same seed and number of threads give the same weights.

    Returns vae_psnr (dB, held-out images), flow_loss and, with a scorer, scorer_accuracy (held-out images)
    and agreement: the share of full samples of unseen prompts that the scorer reads as prompted.
    Raises ValueError naming every argument out of range, before anything is written.
    """
    check_training(data_set, prompts, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    run: dict[str, Any] = {"device": device, "report": report}
    architecture = architecture_of(data_set)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        most = MAX_IMAGES if data_set.num_frames is None else MAX_FRAMES // data_set.num_frames
        num_images = min(most, max(64, steps * batch_size))
        scorer = None
        if data_set.reading is not None:
            few = min(MAX_SCORER_STEPS, steps)
            scorer = fit_scorer(data_set, num_steps=few, num_images=num_images, seed=seed + 1, **run)
        pipeline = architecture.build(data_set)
        few = min(MAX_TEXT_STEPS, steps)
        fit_text(architecture, pipeline, data_set, prompts, num_steps=few, seed=seed + 2, **run)
        generator = torch.Generator().manual_seed(seed + 3)
        chosen = pick(len(prompts), num_images, generator)
        images = data_set.load("model")([prompts[i] for i in chosen], generator)
        _fit_vae(architecture, pipeline, data_set, images, steps, seed=seed + 4, **run)
        splits = data_set.language.split_prompts()
        unseen = [*splits["train"], *splits["validation"]]
        held_out = data_set.load("held_out")(unseen[: JUDGED_A_STEP * steps], generator)
        metrics = {"vae_psnr": reconstruction_psnr(architecture, pipeline.vae, held_out)}
        shortened = torch.rand(num_images, generator=generator) < SHORT_SHARE
        data = _flow_data(architecture, pipeline, data_set, prompts, images, chosen, shortened)
        rates: dict[str, Any] = {"batch_size": batch_size, "learning_rate": learning_rate}
        loss = fit_flow(architecture, pipeline, data_set, data, num_steps=steps, seed=seed + 5, **rates, **run)
        metrics["flow_loss"] = loss
    if scorer is not None:
        metrics |= _judge(data_set, pipeline.to(device), scorer, unseen[: min(MAX_JUDGED, 4 * steps)])
    pipeline.to("cpu")
    folders: dict[Path, Callable[[Path], object]] = {Path(base_dir): pipeline.save_pretrained}
    if scorer is not None:
        folders[Path(scorer_dir)] = scorer.save
    save_folders(folders)
    return metrics


def _fit_vae(
    architecture: Architecture,
    pipeline: Any,
    data_set: DataSet,
    images: torch.Tensor,
    steps: int,  # of the transformer
    **run: Any,
) -> None:
    """The autoencoder's own number of steps, or fewer in trial runs."""
    settings = data_set.autoencoder
    num_steps = min(settings.num_steps, steps * VAE_IMAGES // settings.batch_size)
    fit_vae(architecture, pipeline.vae, images, num_steps=num_steps, batch_size=settings.batch_size, **run)


def _judge(data_set: DataSet, pipeline: Any, scorer: Scorer, prompts: list[str]) -> dict[str, float]:
    images = sample_images(pipeline, prompts, full_call(data_set, len(prompts)))
    agreement = float(scorer.agreement(images, prompts).float().mean())
    return {"scorer_accuracy": scorer.accuracy, "agreement": agreement}


def check_training(data_set: DataSet, prompts: list[str], *, steps: int, batch_size: int, learning_rate: float) -> None:
    """Raises ValueError naming every argument out of range."""
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
            data_set.language.parse(prompt)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise LesaError("base model cannot be trained: " + "; ".join(problems))


def _flow_data(
    architecture: Architecture,
    pipeline: Any,
    data_set: DataSet,
    prompts: list[str],
    images: torch.Tensor,
    chosen: torch.Tensor,
    shortened: torch.Tensor,
) -> FlowData:
    """Normalised latents of `images` and what the transformer is told of every text that may go with them."""
    latents = architecture.to_transformer(pipeline, encode(architecture, pipeline.vae, images))
    texts = [*prompts, *(data_set.language.shorten(prompt) for prompt in prompts), architecture.promptless]
    with torch.no_grad():
        conditioning = architecture.read(pipeline, data_set, texts)
    return FlowData(latents=latents, text_index=chosen + len(prompts) * shortened, conditioning=conditioning)
