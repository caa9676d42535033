"""Guesses at a peer's error from recorded trajectories alone: milliseconds, where a run of the model takes seconds.

The velocities along the recorded path are known at every step, `v_s = head(feature_s, temb_s)`. What a solver makes of
those at its grid, or a rule of the features at its full steps, is compared with the recorded path. What is left out is
that a run that has drifted sees other velocities; the order of candidates survives that well enough to say which ones
to run.
Shapes: B trajectories, S steps, L tokens, C channels, O output channels; drifts are of latents in token form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lesa.models.output_head import OutputHead
from lesa.peers.solvers import SOLVERS, Integration
from lesa.predictor.rule import History, RuleFactory
from lesa.recording.dataset import Trajectories
from lesa.schedule import Schedule
from lesa.search.path import MAX_GAP, Costs


@dataclass(frozen=True, kw_only=True)
class RecordedPath:
    """Some recorded trajectories, with all that a guess needs of them."""

    sigmas: torch.Tensor  # [S + 1]
    features: torch.Tensor  # [B, S, L, C]
    temb: torch.Tensor  # [B, S, D]
    velocities: torch.Tensor  # [S, B, L, O]
    latents: torch.Tensor  # [S + 1, B, L, O] up to a constant: the last is zero
    head: OutputHead

    @classmethod
    @torch.no_grad()
    def of(cls, data: Trajectories, head: OutputHead, indices: Sequence[int]) -> RecordedPath:
        """The trajectories `indices` of `data`; guidance branches count as trajectories of their own."""
        num_steps = len(data.sigmas) - 1
        chosen = list(indices)
        features = data.feature_batch(chosen, range(num_steps))
        temb = data.temb[chosen]
        velocities = torch.stack([head(features[:, s], temb[:, s]) for s in range(num_steps)])
        moves = data.sigmas.diff().view(-1, 1, 1, 1) * velocities
        # Backwards from the final latents: x_s = x_S - sum of the moves from s on.
        ahead = torch.flip(torch.cumsum(torch.flip(moves, (0,)), dim=0), (0,))
        latents = torch.cat([-ahead, torch.zeros_like(moves[:1])])
        return cls(
            sigmas=data.sigmas, features=features, temb=temb, velocities=velocities, latents=latents, head=head
        )

    @property
    def num_steps(self) -> int:
        return len(self.velocities)

    @torch.no_grad()
    def solver_drift(self, solver: str, grid: Sequence[int], num_evaluations: int) -> float:
        """Final drift of a solver that meets the recorded velocities at its grid, in dB (mean over trajectories)."""
        steps = list(grid)
        run = Integration(SOLVERS[solver], torch.cat([self.sigmas[steps], self.sigmas[-1:]]), num_evaluations)
        latents = self.latents[0]
        for level in run.levels:
            latents = run.advance(latents, self.velocities[steps[level]])
        return decibels(latents - self.latents[-1])

    @torch.no_grad()
    def rule_drift(self, factory: RuleFactory, full_steps: Sequence[int]) -> float:
        """Drift of a rule that meets the recorded features at its full steps, in dB (mean over trajectories).

        The mean of two: of all predicted steps together, where runs of errors may cancel, and of the runs between full
        steps one by one, where they may not.
        """
        schedule = Schedule.explicit(self.num_steps, full_steps)
        rule = factory(schedule, self.sigmas)
        history = History(max(rule.history_size, 1))
        total, apart = torch.zeros_like(self.velocities[0]), torch.zeros(self.velocities.shape[1])
        since = torch.zeros_like(total)
        for step in range(self.num_steps):
            if schedule.is_full(step):
                apart = apart + since.square().mean(dim=(1, 2))
                since = torch.zeros_like(total)
                history.push(step, self.features[:, step])
                continue
            prediction = rule(history, step)
            if rule.keeps_predictions:
                history.push(step, prediction)
            error = self.head(prediction, self.temb[:, step]) - self.velocities[step]
            move = (self.sigmas[step + 1] - self.sigmas[step]) * error
            total, since = total + move, since + move
        apart = apart + since.square().mean(dim=(1, 2))
        return (decibels(total) + float((10 * apart.clamp_min(1e-12).log10()).mean())) / 2

    @torch.no_grad()
    def segment_costs(self, factory: RuleFactory, max_gap: int = MAX_GAP) -> Costs:
        """`costs[b, c][k]`: mean squared drift after predicting steps c+1 .. c+k from full steps b and c.

        The form of the cost is DPCache's (CVPR 2026), here after the transformer's output head. Rules that look back
        further than two full steps are given two.
        """
        costs: Costs = {}
        for c in range(1, self.num_steps):
            ahead = range(c + 1, min(self.num_steps, c + max_gap))
            for b in range(max(0, c - max_gap), c):
                costs[b, c] = [0.0]
                if not ahead:
                    continue
                rule = factory(Schedule.explicit(self.num_steps, sorted({0, b, c})), self.sigmas)
                history = History(2)
                history.push(b, self.features[:, b])
                history.push(c, self.features[:, c])
                predicted = self.head(
                    torch.cat([rule(history, s) for s in ahead]), torch.cat([self.temb[:, s] for s in ahead])
                ).unflatten(0, (len(ahead), -1))
                errors = predicted - self.velocities[ahead.start : ahead.stop]
                widths = self.sigmas.diff()[ahead.start : ahead.stop].view(-1, 1, 1, 1)
                drifts = torch.cumsum(widths * errors, dim=0)
                costs[b, c] += drifts.square().mean(dim=(1, 2, 3)).tolist()
        return costs


def decibels(drift: torch.Tensor) -> float:
    """Mean over trajectories of 10 log10 of the mean squared drift [B, ...]."""
    return float((10 * drift.square().flatten(1).mean(dim=1).clamp_min(1e-12).log10()).mean())
