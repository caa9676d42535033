"""Whether a run fits the cache on its transformer: asked at the first call, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_SIGMA_TOLERANCE = 1e-5  # float32 schedules of one configuration differ by less between machines


class MismatchError(ValueError):
    """A run or a pipeline does not fit; `problems` names every difference."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(f"{what}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCall:
    """The first transformer call of a run, as a check of one's own sees it."""

    transformer: torch.nn.Module
    scheduler: Any | None  # None where the cache was given timesteps instead
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def run_problems(
    call: FirstCall,
    *,
    first_step: int,
    late_start: bool,  # whether a run may begin after step 0, where the scheduler says so
    num_steps: int,  # of the run
    expected_steps: int,
    expected_sigmas: Sequence[float] | None,
) -> list[str]:
    """What every cache needs of a run, whatever predicts."""
    problems = []
    if first_step and not (late_start and first_step == getattr(call.scheduler, "begin_index", None)):
        problems.append(
            f"first step: got {first_step}, expected 0 (a run from the middle of the schedule, as from another "
            "picture, needs LESA to be enabled on the pipeline that does so)"
        )
    if getattr(call.transformer, "is_cache_enabled", False):
        problems.append("another cache is enabled on the transformer: call transformer.disable_cache()")
    if num_steps != expected_steps:
        problems.append(f"num_inference_steps: got {num_steps}, expected {expected_steps}")
    if call.scheduler is not None and expected_sigmas is not None:
        problems += _sigma_problems(getattr(call.scheduler, "sigmas", None), expected_sigmas)
    return problems


def _sigma_problems(sigmas: torch.Tensor | None, expected: Sequence[float]) -> list[str]:
    if sigmas is None:
        return ["sigmas: the scheduler has none"]
    if len(sigmas) != len(expected):
        return [f"sigmas: got {len(sigmas)} noise levels, expected {len(expected)}"]
    off = (sigmas.detach().cpu().double() - torch.tensor(list(expected), dtype=torch.float64)).abs()
    step = int(off.argmax())
    if float(off[step]) <= _SIGMA_TOLERANCE:
        return []
    return [f"sigmas: got {float(sigmas[step]):.6g} at step {step}, expected {float(expected[step]):.6g}"]
