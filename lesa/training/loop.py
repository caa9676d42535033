"""What both training steps share: batches, validation, and a loop that is resumable and refuses what is not finite."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from lesa.params import ClosedLoopParams, GroundTruthParams, Report
from lesa.recording.dataset import Trajectories, draw
from lesa.training.cases import Case, draw_case
from lesa.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from lesa.training.expert import Expert
from lesa.training.step_weights import StepWeights

FINAL_LEARNING_RATE = 0.02  # of the first, at the end of the cosine
WARMUP_FRACTION = 0.05


class TrainingError(RuntimeError):
    """Training stopped before an update that would have spoilt the experts; the last checkpoint is intact."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and how fast."""

    iterations: int
    learning_rate: float
    gate_learning_rate: float
    step_learning_rate: float
    weight_decay: float
    gradient_clip: float  # 0: off
    checkpoint_every: int
    seed: int

    @classmethod
    def of(cls, params: GroundTruthParams | ClosedLoopParams, seed: int) -> LoopSettings:
        """What both sections of the parameters say of the loop."""
        shared = [f.name for f in dataclasses.fields(cls) if f.name not in ("seed", "step_learning_rate")]
        values = {name: getattr(params, name) for name in shared}
        # On true histories the step weights are fitted in closed form.
        step_rate = params.step_learning_rate if isinstance(params, ClosedLoopParams) else 0.0
        return cls(seed=seed, step_learning_rate=step_rate, **values)


C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Objective(Generic[C]):
    """A loss of a case, and the trajectories it may be asked of."""

    # Of some rows of one of the case's sets; a generator to draw from where it is learned from, None where it judges.
    loss: Callable[[C, Trajectories, list[int], torch.Generator | None], torch.Tensor]
    rows: Callable[[Trajectories], Sequence[int]]  # of a set, those that count


def fit(
    modules: nn.ModuleDict,
    cases: Sequence[C],
    objective: Objective[C],
    settings: LoopSettings,
    key: str,
    *,
    judge: Objective[C] | None = None,
    relative: bool = False,
    batch_size: int,
    folder: Path,
    report: Report,
) -> dict[str, float]:
    """Train modules on cases in place, each optimiser step on a batch of one case, both drawn; keep the best state.

    Args:
        modules, settings, key, folder, report: as `optimise` takes them.
        cases: each counts alike in validation.
        objective: what is learned.
        judge: what validation measures; None: the objective.
        relative: whether, of several cases, each one's loss counts in units of what it is before training, so that
            none outweighs the others.
        batch_size: trajectories of an optimiser step, and at a time in validation.

    Returns:
        `validation_loss_start` and `validation_loss`, the lowest.
    """
    judge = judge or objective

    @torch.no_grad()
    def judged(case: C) -> float:
        rows = [row for row in judge.rows(case.validation) if row < case.judged]
        chunks = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        return sum(float(judge.loss(case, case.validation, chunk, None)) * len(chunk) for chunk in chunks) / len(rows)

    starts = [judged(case) for case in cases]
    units = starts if relative and len(cases) > 1 else [1.0] * len(cases)

    def mean(losses: Sequence[float]) -> float:
        return sum(loss / unit for loss, unit in zip(losses, units, strict=True)) / len(cases)

    def batch_loss(batch: torch.Generator) -> torch.Tensor:
        place = draw_case(batch, len(cases))
        case = cases[place]
        rows = objective.rows(case.train)
        chosen = [rows[index] for index in draw(batch, len(rows), batch_size)]
        return objective.loss(case, case.train, chosen, batch) / units[place]

    best = optimise(
        modules,
        batch_loss,
        lambda: mean([judged(case) for case in cases]),
        settings=settings,
        folder=folder,
        key=key,
        report=report,
        start_loss=mean(starts),
    )
    return {"validation_loss_start": mean(starts), "validation_loss": best}


def optimise(
    experts: nn.ModuleDict,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    validation_loss: Callable[[], float],
    *,
    settings: LoopSettings,
    folder: Path,
    key: str,
    report: Report,
    start_loss: float | None = None,
) -> float:
    """Train in place and leave the experts at their lowest validation loss, the start included.

    Args:
        experts: modules of type `lesa.training.expert.Expert` or `lesa.training.step_weights.StepWeights`.
        loss_of: one batch's loss; draws whatever it draws from the generator given.
        validation_loss: loss on the validation trajectories, without gradients.
        folder: of this run's checkpoints.
        key: identity of the run.
        report: called after every iteration with loss, learning rate and iterations a second.
        start_loss: the validation loss before the first iteration, where it is known.

    Returns:
        The lowest validation loss.

    Raises:
        TrainingError: a loss or gradient that is not finite, naming the iteration.
    """
    groups = [group for module in experts.values() for group in _parameter_groups(module, settings)]
    for group in groups:
        group.setdefault("weight_decay", settings.weight_decay)
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups)
    state = load_checkpoint(folder, key, experts, optimizer)
    if state is None:
        known = validation_loss() if start_loss is None else start_loss
        state = _note_best(TrainingState(0, None, {}), experts, known)
    while state.iteration < settings.iterations:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * _rate(state.iteration, settings.iterations)
        values = _step(optimizer, loss_of, settings, state.iteration)
        state.iteration += 1
        values["learning_rate"] = optimizer.param_groups[0]["lr"]
        values["iterations_per_second"] = 1.0 / max(time.perf_counter() - started, 1e-9)
        if state.iteration % settings.checkpoint_every == 0 or state.iteration == settings.iterations:
            values["validation_loss"] = checked = validation_loss()
            state = _note_best(state, experts, checked)
            save_checkpoint(folder, key, experts, optimizer, state)
        report(state.iteration, values)
    experts.load_state_dict(state.best)
    assert state.best_loss is not None
    return state.best_loss


def _step(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    settings: LoopSettings,
    iteration: int,
) -> dict[str, float]:
    """One optimiser step, refused before the update where loss or gradient is not finite."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(batch_generator(settings.seed, iteration))
    _refuse_not_finite(loss, "loss", iteration)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip or math.inf)
    _refuse_not_finite(norm, "gradient", iteration)
    optimizer.step()
    return {"loss": loss.item(), "gradient_norm": float(norm)}


def _parameter_groups(module: nn.Module, settings: LoopSettings) -> list[dict[str, Any]]:
    if isinstance(module, StepWeights):
        return module.parameter_groups(settings.step_learning_rate)
    assert isinstance(module, Expert), type(module)
    return module.parameter_groups(settings.learning_rate, settings.gate_learning_rate)


def batch_generator(seed: int, iteration: int) -> torch.Generator:
    """The generator of one iteration's batch: a killed run draws the same batches when it goes on."""
    return torch.Generator().manual_seed((seed * 1_000_003 + iteration) % 2**63)


def _rate(iteration: int, iterations: int) -> float:
    """Linear warm-up, then a cosine down to `FINAL_LEARNING_RATE`."""
    warmup = max(1, round(WARMUP_FRACTION * iterations))
    if iteration < warmup:
        return (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, iterations - warmup)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def _note_best(state: TrainingState, experts: nn.Module, loss: float) -> TrainingState:
    _refuse_not_finite(torch.tensor(loss), "validation loss", state.iteration)
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss = loss
        state.best = {name: tensor.detach().clone() for name, tensor in experts.state_dict().items()}
    return state


def _refuse_not_finite(value: torch.Tensor, what: str, iteration: int) -> None:
    if not torch.isfinite(value).all():
        raise TrainingError(
            f"the {what} at iteration {iteration} is not finite ({float(value.detach())}); "
            "the last checkpoint is intact. "
            "Lower the learning rate, or look for a bad trajectory with `lesa store verify`"
        )
