"""Noise stages: which expert is responsible at which noise level (LESA, arXiv 2602.20497, multi-stage experts)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch


def stage_of_steps(sigmas: torch.Tensor, boundaries: Sequence[float]) -> list[int]:
    """Noise stage of every step: 0 is the noisiest.

    Boundaries are noise levels rather than step numbers, so that one set serves any step count and any shift.

    Args:
        sigmas: [S + 1] noise levels of a run, decreasing, the last is 0.
        boundaries: decreasing noise levels strictly inside (0, 1); `len + 1` stages.

    Returns:
        S integers; step i belongs to stage j when exactly j boundaries are above `sigmas[i]`.
    """
    return [sum(float(sigma) < boundary for boundary in boundaries) for sigma in sigmas[:-1]]


def boundary_problems(boundaries: Sequence[float]) -> list[str]:
    """What is wrong with a list of boundaries; empty when nothing is."""
    problems = []
    if any(not 0.0 < boundary < 1.0 for boundary in boundaries):
        problems.append(f"boundaries must be noise levels strictly between 0 and 1, got {list(boundaries)}")
    if any(later >= earlier for earlier, later in pairwise(boundaries)):
        problems.append(f"boundaries must decrease without repeats, got {list(boundaries)}")
    return problems
