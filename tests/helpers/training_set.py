"""Synthetic trajectories for the training tests: features that bend, so that extrapolation can be improved upon."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesa.models.output_head import OutputHead, freeze
from lesa.params import (
    BudgetParams,
    CallParams,
    ClosedLoopParams,
    EvaluateParams,
    GroundTruthParams,
    ModelParams,
    PredictorParams,
    RecordParams,
    ResourcesParams,
    ScheduleParams,
    Workload,
)
from lesa.recording.dataset import Trajectories, load_trajectories
from lesa.recording.store import Trajectory, TrajectoryStore
from lesa.training.design import ExpertDesign
from lesa.training.jobs import expert_design

STEPS, TOKENS, CHANNELS, OUTPUTS = 12, 3, 4, 2


def sigmas(num_steps: int = STEPS, shift: float = 3.0) -> torch.Tensor:
    """[S + 1] noise levels of a shifted flow-matching schedule."""
    line = torch.linspace(1, 1 / num_steps, num_steps)
    return torch.cat([shift * line / (1 + (shift - 1) * line), torch.zeros(1)])


def make_store(path: Path, prompts: dict[str, int], *, branches: int = 1, seeds: int = 1) -> TrajectoryStore:
    """A store with `seeds` trajectories of every prompt (name -> number that makes it different)."""
    store = TrajectoryStore.create(path)
    levels = sigmas()
    for prompt, number in prompts.items():
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(1000 * number + seed)
            start, slope, bend = torch.randn(3, branches, TOKENS, CHANNELS, generator=generator)
            at = levels[:-1, None, None, None]
            features = start + slope * at + (2.0 + 0.1 * bend) * at**2
            store.commit(
                Trajectory(
                    identity={"prompt": prompt, "seed": seed, "tap": "the tap", "number": number},
                    prompt=prompt,
                    seed=seed,
                    features=features.bfloat16(),
                    sigmas=levels,
                    timesteps=levels[:-1] * 1000,
                    context={
                        "temb": torch.randn(STEPS, branches, CHANNELS, generator=generator),
                        "latents_final": torch.randn(1, TOKENS, OUTPUTS, generator=generator),
                    },
                )
            )
    return store


def splits(path: Path) -> tuple[Trajectories, Trajectories]:
    """Eight training and three validation trajectories."""
    train = {f"train {i}": i for i in range(8)}
    validation = {f"validation {i}": 100 + i for i in range(3)}
    make_store(path, train | validation)
    return load_trajectories(path, list(train)), load_trajectories(path, list(validation))


class _Shift(nn.Module):
    def forward(self, feature: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return feature + temb[:, None]


def head() -> OutputHead:
    """norm_out adds temb, proj_out is a fixed matrix."""
    proj_out = nn.Linear(CHANNELS, OUTPUTS)
    with torch.no_grad():
        proj_out.weight.copy_(torch.tensor([[1.0, -1.0, 0.5, 2.0], [0.0, 1.0, 1.0, -1.0]]))
        proj_out.bias.zero_()
    made = freeze(OutputHead(_Shift(), proj_out))
    assert isinstance(made, OutputHead)
    return made


def workload(**changes: Any) -> Workload:
    """A workload over the synthetic set; `predictor`, `ground_truth`, ... are dicts of changed settings."""
    sections: dict[str, Any] = {
        "call": CallParams(height=16, width=16, num_inference_steps=STEPS),
        "schedule": ScheduleParams(budgets={"2x": BudgetParams(interval=3)}, default_budget="2x"),
        "record": RecordParams(train_prompts=8, validation_prompts=3),
        "predictor": PredictorParams(boundaries=(0.6,), history_sizes=(2, 2), gate="table", rank=2),
        "ground_truth": GroundTruthParams(iterations=6, batch_size=4, checkpoint_every=2),
        "closed_loop": ClosedLoopParams(iterations=4, batch_size=2, checkpoint_every=2),
        "evaluate": EvaluateParams(),
        "resources": ResourcesParams(device="cpu"),
    }
    for name, values in changes.items():
        sections[name] = dataclasses.replace(sections[name], **values) if name in sections else values
    return Workload(
        **(
            {
                "name": "toy",
                "model": ModelParams(family="flux", source="data/base/toy"),
                "prompts": "toy",
            }
            | sections
        )
    )


def design(**changes: Any) -> ExpertDesign:
    """What the experts of such a workload depend on."""
    return expert_design(workload(**changes))
