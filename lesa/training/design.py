"""What experts depend on before they are trained, and the identity of a training run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from lesa.params import (
    CallParams,
    ClosedLoopParams,
    GroundTruthParams,
    ModelParams,
    PredictorParams,
    ScheduleParams,
    budget_schedules,
)
from lesa.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ExpertDesign:
    """The settings that fix the form of a workload's experts and what they are asked for."""

    predictor: PredictorParams
    schedule: ScheduleParams
    call: CallParams
    model: ModelParams
    step_counts: tuple[int, ...]  # numbers of steps that are recorded beside the call's own
    seed: int  # of initial values and batches

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedule of every budget; `ValueError` where one is still to be searched."""
        return budget_schedules(self.schedule, self.call.num_inference_steps)


def training_key(
    design: ExpertDesign, step: str, settings: GroundTruthParams | ClosedLoopParams, job: str, data: str
) -> str:
    """Identity of a training run: everything that its result depends on.

    Args:
        step: `ground_truth` or `closed_loop`.
        settings: that step's.
        job: name of the job.
        data: identity of the trajectories (`lesa.training.cases.data_digest`).
    """
    parts: dict[str, Any] = {
        "predictor": design.predictor,
        "schedule": design.schedule,
        "call": design.call,
        "model": design.model,
        step: settings,
    }
    sections = {name: dataclasses.asdict(part) for name, part in parts.items()}
    text = json.dumps([sections, design.seed, step, job, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
