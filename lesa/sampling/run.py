"""One sampler run: what is predicted, what is kept for later steps, when a slower schedule takes over.

Tensors in, decisions out: nothing here knows of hooks, pipelines or transformers. A run is begun at the first call of
the transformer; each call is decided before its blocks run and kept afterwards.
Shapes: B samples, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lesa.predictor.rule import History, Rule, WithoutStages
from lesa.sampling.adaptive import Fallback, FallbackWatch
from lesa.sampling.statistics import RunStatistics, StepRecord
from lesa.schedule import Schedule

_MISSING = "something reset the hooks in mid-run, or a guidance branch began late: full until it was there again"
_NORM_JUMP = 10.0  # a prediction this many times larger than the feature it starts from is no prediction


@dataclass(frozen=True, slots=True)
class Decision:
    """What one call of the transformer does."""

    step: int
    branch: str
    prediction: torch.Tensor | None  # [B, L, C] in place of what the last block gives; None: the blocks run
    record: StepRecord


@dataclass(slots=True)
class BranchState:
    """What one guidance branch of a run remembers."""

    history: History
    norm: torch.Tensor | None = None  # of the newest feature
    slower: History | None = None  # features at the full steps of the schedule that may take over
    is_done: bool = False  # whether its last step has run

    def push(self, step: int, feature: torch.Tensor) -> None:
        self.history.push(step, feature)
        self.norm = None

    def reset(self) -> None:
        self.history.reset()
        self.norm = self.slower = None

    def held_tensors(self) -> Iterator[torch.Tensor]:
        yield from self.history.held_tensors()
        if self.norm is not None:
            yield self.norm
        if self.slower is not None:
            yield from self.slower.held_tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of the histories; features that stand in both count once."""
        own = {id(feature) for feature in self.history.features}
        others = () if self.slower is None else self.slower.features
        return self.history.nbytes + sum(feature.nbytes for feature in others if id(feature) not in own)


class AllFull(WithoutStages):
    """The rule of a run that predicts nothing."""

    name, history_size, keeps_predictions = "none: every step is full", 1, False

    def __call__(self, history: History, step: int) -> torch.Tensor:
        raise AssertionError(f"step {step} of a full run is predicted")


class Run:
    """One run of the sampler.

    Args:
        schedule: the full steps that the run begins with.
        rule: predicts the other steps.
        fallback: the slower schedule that takes over where errors are too large.
        measure: at full steps, record what the rule would have been off by.
        guard: run in full where a prediction is not finite or jumps in size.
        notes: facts for the summary.
        bounds: largest error that a full step's worst sample should have, for the summary.
    """

    def __init__(
        self,
        schedule: Schedule,
        rule: Rule,
        *,
        fallback: Fallback | None = None,
        measure: bool = True,
        guard: bool = True,
        notes: Mapping[str, str] | None = None,
        bounds: Mapping[int, float] | None = None,
    ) -> None:
        self.schedule, self.rule = schedule, rule  # those in force: a fallback changes them in mid-run
        self.started = 0.0  # host clock at the first call
        self.statistics = RunStatistics(
            rule=rule.name, schedule=schedule, notes=dict(notes or {}), bounds=bounds or {}
        )
        self._watch: FallbackWatch | None = None if fallback is None else fallback.begin()
        self._measures, self._guards = measure, guard
        self._first_step = 0
        self._is_begun = False
        self._num_tokens: int | None = None
        self._branches: dict[str, BranchState] = {}  # in the order of their first calls

    def begin(self, first_step: int = 0, *, num_tokens: int | None = None, started: float = 0.0) -> None:
        """The first call of the transformer is under way.

        Args:
            first_step: where the run begins; after step 0 for one that starts from another image.
            num_tokens: leading tokens of a feature that are predicted; None: all.
            started: host clock at that call.
        """
        self._first_step, self._num_tokens, self.started = first_step, num_tokens, started
        self._is_begun = True
        if first_step:
            self._note("begins at", f"step {first_step}; full until the predictor has the history it was made for")

    def decide(self, step: int, branch: str) -> Decision:
        """Whether the call of `branch` at `step` is predicted, and what the prediction is."""
        state = self._state(branch)
        if self._watch is not None and step == self._watch.change:
            self._change_over(self._watch, state)
        is_full = self.schedule.is_full(step) or self._is_before_its_history(step)
        prediction = None if is_full else self._predict(step, state)
        record = self.statistics.record(
            step,
            planned="full" if is_full else "predicted",
            kind="full" if prediction is None else "predicted",
            stage=None if self.rule.stages is None else int(self.rule.stages[step]),
        )
        return Decision(step, branch, prediction, record)

    def keep(self, decision: Decision, feature: torch.Tensor | None = None) -> None:
        """Keep what later steps look back on.

        Args:
            decision: of the call that has run.
            feature: [B, L', C] what the last block gave, where the blocks ran; tokens beyond `num_tokens` are dropped.
        """
        step, state, newest = decision.step, self._state(decision.branch), decision.prediction
        if newest is not None:
            if self.rule.keeps_predictions:
                state.push(step, newest)
        else:
            assert feature is not None
            newest = feature[:, : self._num_tokens]
            self._measure(decision, state, newest)
            if self.schedule.is_full(step) or self.rule.keeps_predictions:
                # Other full steps stay out: a bound rule counts on the schedule's own anchors.
                newest = _alone(newest)
                state.push(step, newest)
        self._keep_for_fallback(step, state, newest)
        held = sum(each.nbytes for each in self._branches.values())
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, held)
        if step == self.schedule.num_steps - 1:
            state.reset()  # nothing is predicted after the last step
            state.is_done = True
            self.statistics.finished = all(each.is_done for each in self._branches.values())

    def forget(self) -> None:
        """Drop all features; a run that goes on is full until it has what its predictions look back on."""
        for state in self._branches.values():
            state.reset()

    def break_off(self) -> None:
        """The run ended with an error: its features are of no use to any other."""
        self.forget()
        self._is_begun = self.statistics.finished = False

    @property
    def is_under_way(self) -> bool:
        """Whether calls of the transformer belong to it: begun, and neither over nor broken off."""
        return self._is_begun and not self.statistics.finished

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Everything kept from step to step."""
        for state in self._branches.values():
            yield from state.held_tensors()

    def _state(self, branch: str) -> BranchState:
        if branch not in self._branches:
            self._branches[branch] = BranchState(_new_history(self.rule, len(self._branches)))
            self.statistics.num_branches = len(self._branches)
        return self._branches[branch]

    def _note(self, name: str, fact: str) -> None:
        self.statistics.notes = {**self.statistics.notes, name: fact}

    def _change_over(self, watch: FallbackWatch, state: BranchState) -> None:
        """Go on with the slower schedule, whose full step this is; the first branch changes it for all."""
        if self.schedule is not watch.fallback.slower:
            self.schedule, self.rule = watch.fallback.slower, watch.fallback.rule
            self.statistics.change = watch.change
            self._note("changed over", watch.description)
        state.history = state.slower or _new_history(self.rule, state.history.branch)
        state.slower = None

    def _is_before_its_history(self, step: int) -> bool:
        """Whether a run that began in the middle has not had every step that a prediction at `step` looks back on."""
        return self._first_step > 0 and min(self._needed(step)) < self._first_step

    def _needed(self, step: int) -> tuple[int, ...]:
        """The steps that a prediction at `step` looks back on by the schedule."""
        size = max(self.rule.history_size, 1)
        if self.rule.keeps_predictions:
            return tuple(range(max(step - size, 0), step))
        return self.schedule.anchors(step, size)

    def _has_its_history(self, step: int, history: History) -> bool:
        needed = self._needed(step)
        return bool(needed) and set(needed) <= set(history.steps)

    def _predict(self, step: int, state: BranchState) -> torch.Tensor | None:
        """The prediction; None where there is nothing to predict from, or where it is unusable."""
        if not self._has_its_history(step, state.history):
            if "history" not in self.statistics.notes:
                self._note("history", f"missing at step {step}; {_MISSING}")
            return None
        prediction = self.rule(state.history, step)
        return None if self._guards and not _is_plausible(prediction, state) else prediction

    def _measure(self, decision: Decision, state: BranchState, feature: torch.Tensor) -> None:
        """Record what the rule would have been off by at a full step."""
        step, rule = decision.step, self.rule
        needed = 1 if rule.sizes is None or rule.stages is None else int(rule.sizes[rule.stages[step]])
        enough = len(state.history.features) >= needed
        if not (self._measures and enough and self._has_its_history(step, state.history)):
            return
        errors = _relative_l1(rule(state.history, step), feature)
        decision.record.add_errors(errors)
        if self._watch is not None and self._watch.watches(step):
            self._watch.observe(step, float(errors.max()))

    def _keep_for_fallback(self, step: int, state: BranchState, feature: torch.Tensor) -> None:
        """Keep the feature of a full step of the slower schedule, predicted where it was not computed."""
        fallback = None if self._watch is None else self._watch.fallback
        if fallback is None or self.schedule is fallback.slower or not fallback.slower.is_full(step):
            return
        if state.slower is None:
            state.slower = _new_history(fallback.rule, state.history.branch)
        state.slower.push(step, _alone(feature))


def _new_history(rule: Rule, branch: int) -> History:
    return History(max(rule.history_size, 1), branch=branch)


def _is_plausible(prediction: torch.Tensor, state: BranchState) -> bool:
    """One reduction tells NaN, infinity and a jump in size; it costs the device one synchronisation."""
    if state.norm is None:
        state.norm = _norm(state.history.features[0])
    return bool(_norm(prediction) <= _NORM_JUMP * state.norm)  # False with NaN on either side


def _alone(feature: torch.Tensor) -> torch.Tensor:
    """The feature in storage of its own: a last block that splits text from image returns a view of both."""
    own = feature.contiguous()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own


def _norm(value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.linalg.vector_norm(value, dtype=torch.float32)


def _relative_l1(predicted: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """[B] float32 `mean |h_hat - h| / mean |h|` of two features [B, L, C], on their device.

    `lesa.metrics.relative_l1` is for figures that are kept; this one runs inside the sampler, with no float64 copy.
    A mean of zero counts as the smallest float32: predicted as zero it has error 0, as anything else an error beyond
    every bound.
    """
    with torch.no_grad():
        scale = feature.abs().mean(dim=(1, 2), dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
        return (predicted - feature).abs().mean(dim=(1, 2), dtype=torch.float32) / scale
