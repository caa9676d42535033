"""Trains a few-step model on its teacher's own trajectories.

From noise at sigma_0 the teacher's guided flow passes x_0, x_1, ... at the student's few noise levels sigma_0 > sigma_1
> ... > 0. At x_i the student learns the one velocity that leads to x_{i+1}, the chord

    v(x_i, sigma_i | prompt) = (x_{i+1} - x_i) / (sigma_{i+1} - sigma_i)

so that as many Euler steps as there are levels follow the teacher. Noise and text determine x_0, x_1, ..., so the
chords are a function of what the student is given: progressive distillation (Salimans and Ho, arXiv 2202.00512) in one
round.

Shape legend: N trajectories, K student steps, B batch; "..." is a latent as the transformer takes it.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lesa import metrics
from lesa.base_models.architectures import Conditioning, architecture_of
from lesa.base_models.fit_flow import train_transformer
from lesa.base_models.optim import Report, pick
from lesa.base_models.sampling import full_call, sample_images
from lesa.base_models.saving import save_folders
from lesa.base_models.scorer import Scorer, load_scorer
from lesa.base_models.students import Student
from lesa.base_models.train import check_training
from lesa.errors import LesaError
from lesa.models.families import FAMILIES

MAX_TRAJECTORIES = 2048
SUBSTEPS = {4: 4, 8: 2}  # of the teacher between two of the student's levels, two calls each
SAMPLE_BATCH = 128
MAX_JUDGED = 120  # validation prompts sampled for the reported figures


def distil(
    student: Student,
    *,
    teacher_dir: Path,  # the teacher's pipeline folder
    scorer_dir: Path,  # the teacher's scorer
    base_dir: Path,  # the pipeline folder to write; replaced when it exists
    prompts: list[str],  # the only ones the model is shown
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    report: Report,
) -> dict[str, float]:
    """Make the student of a trained teacher, in fp32. The same seed and number of threads give the same weights.

    Returns chord_loss (the mean of the last tenth of the steps), agreement (the share of the student's samples of
    validation prompts that the scorer reads as prompted), teacher_agreement and teacher_psnr (dB, between the student's
    images and the teacher's from the same noise).
    Raises ValueError naming every argument out of range, and FileNotFoundError or ValueError where there is no teacher
    or no scorer, before anything is written.
    """
    check_training(student.data_set, prompts, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    scorer = load_scorer(scorer_dir)
    if scorer.data_set is not student.data_set:
        raise LesaError(f"{scorer_dir} reads {scorer.data_set.name}, {student.name} draws {student.data_set.name}")
    _check_teacher(student, Path(teacher_dir))
    architecture = architecture_of(student.data_set)
    teacher = architecture.load(teacher_dir).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = student.make(teacher)
        generator = torch.Generator().manual_seed(seed + 1)
        chosen = pick(len(prompts), min(MAX_TRAJECTORIES, max(16, steps * batch_size // 4)), generator)
        sigmas = _sigmas(student, pipeline, prompts[0]).to(device)
        with torch.no_grad():
            texts = [*prompts, architecture.promptless]
            conditioning = architecture.read(teacher, student.data_set, texts)
        states = _trajectories(student, teacher, conditioning, chosen, sigmas, generator, report)
        loss = _fit(
            student,
            pipeline,
            conditioning,
            chosen,
            states,
            sigmas,
            num_steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            generator=generator,
            report=report,
        )
    judgement = _judge(student, pipeline, teacher, scorer, num_prompts=min(MAX_JUDGED, steps))
    pipeline.to("cpu")
    save_folders({base_dir: pipeline.save_pretrained})
    return {"chord_loss": loss, **judgement}


def _judge(student: Student, pipeline: Any, teacher: Any, scorer: Scorer, num_prompts: int) -> dict[str, float]:
    """Student and teacher on prompts that neither was shown, from the same noise."""
    splits = student.data_set.language.split_prompts()
    judged = [*splits["train"], *splits["validation"]][:num_prompts]
    ours = sample_images(pipeline, judged, _call(student))
    theirs = sample_images(teacher, judged, full_call(student.data_set, len(judged)))
    return {
        "agreement": float(scorer.agreement(ours, judged).float().mean()),
        "teacher_agreement": float(scorer.agreement(theirs, judged).float().mean()),
        "teacher_psnr": float(metrics.psnr(ours, theirs).mean()),
    }


def _check_teacher(student: Student, folder: Path) -> None:
    try:
        class_name = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no pipeline folder: run the base stage of the teacher") from None
    known = FAMILIES[student.data_set.family].pipeline_classes
    if class_name not in known:
        raise LesaError(f"{folder} is a {class_name}, {student.name} learns from {' or '.join(known)}")


def _call(student: Student) -> dict[str, Any]:
    call = architecture_of(student.data_set).call(student.data_set)
    return {**call, "num_inference_steps": student.num_steps, **student.call}


def _sigmas(student: Student, pipeline: Any, prompt: str) -> torch.Tensor:
    """[K + 1], the noise levels that the student's own call steps through, zero at the end."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline(prompt=[prompt], output_type="latent", return_dict=False, **_call(student))
    sigmas: torch.Tensor = pipeline.scheduler.sigmas.float()
    assert len(sigmas) == student.num_steps + 1
    return sigmas


@torch.no_grad()
def _trajectories(
    student: Student,
    teacher: Any,
    conditioning: Conditioning,  # a row a prompt, the last without one
    chosen: torch.Tensor,  # [N], rows
    sigmas: torch.Tensor,  # [K + 1]
    generator: torch.Generator,
    report: Report,
) -> torch.Tensor:
    """[N, K + 1, ...]: where the teacher's guided flow passes, by the midpoint rule."""
    architecture = architecture_of(student.data_set)
    device = sigmas.device
    shape = architecture.latent_shape(student.data_set)
    guided = partial(architecture.guided, teacher, student.data_set)
    trajectories = []
    for start in range(0, len(chosen), SAMPLE_BATCH):
        rows = chosen[start : start + SAMPLE_BATCH]
        given = {name: value[rows] for name, value in conditioning.items()}
        without = {name: value[-1:].expand(len(rows), *value.shape[1:]) for name, value in conditioning.items()}

        x = torch.randn(len(rows), *shape, generator=generator).to(device)
        states = [x]
        for high, low in pairwise(sigmas):
            levels = torch.lerp(high, low, torch.linspace(0, 1, SUBSTEPS[student.num_steps] + 1, device=device))
            for upper, lower in pairwise(levels):
                middle = (upper + lower) / 2
                halfway = x + (middle - upper) * guided(x, upper.expand(len(x)), given, without)
                x = x + (lower - upper) * guided(halfway, middle.expand(len(x)), given, without)
            states.append(x)
        trajectories.append(torch.stack(states, dim=1))
        report(start, {"teacher_trajectories": float(start + len(rows))})
    return torch.cat(trajectories)


def _fit(
    student: Student,
    pipeline: Any,
    conditioning: Conditioning,
    chosen: torch.Tensor,
    states: torch.Tensor,  # [N, K + 1, ...]
    sigmas: torch.Tensor,  # [K + 1]
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    report: Report,
) -> float:
    """Train the student's transformer in place, leaving the moving average of its weights there."""
    architecture = architecture_of(student.data_set)

    def loss_at(step: int) -> torch.Tensor:
        index = pick(len(states), batch_size, generator)
        # Every level as often as any other in a batch.
        level = torch.arange(batch_size) % student.num_steps
        here, there = states[index, level], states[index, level + 1]
        sigma, lower = sigmas[level], sigmas[level + 1]
        chord = (there - here) / (lower - sigma).reshape(-1, *[1] * (here.ndim - 1))
        given = {name: value[chosen[index]] for name, value in conditioning.items()}
        predicted = architecture.velocity(pipeline, student.data_set, here, sigma, sigma, given)
        return (predicted - chord).square().mean()

    return train_transformer(
        pipeline.transformer.train().requires_grad_(True),
        loss_at,
        name="chord_loss",
        num_steps=num_steps,
        learning_rate=learning_rate,
        report=report,
    )
