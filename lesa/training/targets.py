"""What an expert learns to predict: its steps on a schedule, and the whitening of its inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesa.predictor.alpha import history_steps, time_offsets
from lesa.predictor.step_weights import differences, to_feature_weights
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule
from lesa.training.expert import Expert
from lesa.training.loop import TrainingError
from lesa.training.step_weights import LeastSquares


@dataclass(frozen=True, kw_only=True)
class Targets:
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
    ) -> Targets:
        """Those of one noise stage on a schedule."""
        histories = {
            step: history_steps(schedule, step, size, history)
            for step in schedule.predicted_steps
            if stages[step] == stage
        }
        steps = tuple(step for step, entries in histories.items() if len(entries) == size)
        past = tuple(histories[step] for step in steps)
        return cls(
            steps=steps,
            past=past,
            offsets=torch.stack([time_offsets(sigmas, s, p) for s, p in zip(steps, past, strict=True)])
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


SAMPLES = 64  # trajectories of each case: directions and sizes need no more


@torch.no_grad()
def whiten(
    expert: Expert, cases: Sequence[tuple[Trajectories, Targets]], *, ridge: float, batch_size: int
) -> None:
    """Let the expert's projection learn in uncorrelated inputs and in units of what its predictions lack.

    Args:
        cases: trajectories and the steps that are predicted on them; each counts alike, however far off it is.
        ridge: relative to the regressors' energy; keeps what hardly varies from weighing without bound.
        batch_size: trajectories read at a time.

    Raises:
        TrainingError: a recorded feature is not finite.
    """
    cases = [(data, targets) for data, targets in cases if targets.steps]
    if not cases:
        return
    size = len(expert.low)
    channels, device = expert.projection.start_of("bias").numel(), expert.low.device
    sums = LeastSquares(len(cases), size + 1, channels, device)
    counts = torch.zeros(len(cases), dtype=torch.float64, device=device)
    for place, (data, targets) in enumerate(cases):
        chosen = torch.linspace(0, len(data) - 1, min(SAMPLES, len(data))).round().long()
        for batch in chosen.split(batch_size):
            features = data.feature_batch(batch.tolist(), targets.needed).to(device)
            predicted = targets.predict(expert, features)  # [B, n, L, C]
            alphas = expert.alpha(targets.offsets.to(device), targets.steps)
            at = {step: index for index, step in enumerate(targets.needed)}
            for index, (step, past) in enumerate(zip(targets.steps, targets.past, strict=True)):
                history = [features[:, at[earlier]] for earlier in past]
                newest = history[0]
                regressors = torch.stack([newest, *differences(history, size), torch.ones_like(newest)])
                lacking = features[:, at[step]] - predicted[:, index]
                sums.add([place], alphas[index] * regressors, lacking[None])
                counts[place] += newest[..., 0].numel()
    if not sums.power.isfinite().all():
        raise TrainingError("recorded features are not finite: look for a bad trajectory with `lesa store verify`")
    shares = torch.where(sums.power.sum(dim=1) > 0, 1.0 / sums.power.sum(dim=1), 0.0)
    if not shares.any():
        return  # every prediction is exact
    pooled, count = sums.pooled(shares), (shares * counts).sum()
    inputs = (pooled.basis(ridge)[0] * count.sqrt()).permute(1, 0, 2)  # [R, C, R], the first of differences
    inputs = torch.cat([to_feature_weights(inputs[:-1]), inputs[-1:]]).permute(1, 0, 2)
    expert.projection.whiten(inputs.float(), (pooled.power[0] / count).sqrt().float())
