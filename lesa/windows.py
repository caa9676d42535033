"""The steps that an expert predicts on a schedule, and the recorded features that this takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesa import gate as gates
from lesa.expert import Expert
from lesa.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What an expert predicts on one schedule: its steps that have its history."""

    steps: tuple[int, ...]
    past: tuple[tuple[int, ...], ...]  # history steps of each, newest first
    offsets: torch.Tensor  # [n, K]
    weights: torch.Tensor  # [n] |sigma_{s+1} - sigma_s|
    needed: tuple[int, ...]  # every step whose feature is read, sorted

    @classmethod
    def on(
        cls,
        schedule: Schedule,
        sigmas: torch.Tensor,  # [S + 1]
        stages: Sequence[int],  # noise stage of each step
        stage: int,  # the expert's
        size: int,  # its K
        history: str,  # full_steps or steps
    ) -> Windows:
        """Those of one noise stage on a schedule."""
        of_stage = {
            step: gates.history_steps(schedule, step, size, history)
            for step in schedule.predicted_steps
            if stages[step] == stage
        }
        steps = tuple(step for step, entries in of_stage.items() if len(entries) == size)
        past = tuple(of_stage[step] for step in steps)
        return cls(
            steps=steps,
            past=past,
            offsets=torch.stack([gates.offsets(sigmas, s, p) for s, p in zip(steps, past, strict=True)])
            if steps
            else torch.zeros(0, size),
            weights=torch.tensor([abs(float(sigmas[s + 1] - sigmas[s])) for s in steps]),
            needed=tuple(sorted(set(steps).union(*past))) if steps else (),
        )

    def predict(self, expert: Expert, features: torch.Tensor) -> torch.Tensor:
        """[B, n, L, C] predictions from features [B, len(needed), L, C]; z is shared where the history is."""
        place = {step: index for index, step in enumerate(self.needed)}
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, past in enumerate(self.past):
            groups[past].append(index)
        alphas = expert.alpha(self.offsets.to(features.device), self.steps)
        columns: list[torch.Tensor] = [torch.empty(0)] * len(self.steps)
        with expert.projection.held():
            for past, members in groups.items():
                history = [features[:, place[step]] for step in past]
                z = expert.project(history)
                for index in members:
                    columns[index] = history[0] + alphas[index] * z
        return torch.stack(columns, dim=1)
