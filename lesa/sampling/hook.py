"""Skips a transformer's blocks at predicted steps, on diffusers' own hooks: config, hook, apply, remove.

LESA (arXiv 2602.20497): at a full step the transformer runs as it is and the feature of its last block is
kept; at a predicted step a rule gives that feature and only the model's cheap ends run. A root hook on the
transformer asks the run (`lesa.sampling.run`) for every call, one hook a block obeys (`lesa.sampling.block_hooks`).
The conditioning, ControlNet residuals, `norm_out` and `proj_out` run unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.utils.torch_utils import unwrap_module

from lesa.errors import LesaError
from lesa.models.families import family_of
from lesa.predictor.rule import Rule
from lesa.sampling.adaptive import Fallback, fallback_problems
from lesa.sampling.binding import noise_levels
from lesa.sampling.block_hooks import (
    AGAIN,
    BLOCK_HOOK,
    EMBEDDER_HOOK,
    ROTARY_HOOK,
    Compiled,
    LesaCallState,
    add_block_hooks,
    give_back,
    hook_problems,
    take_compiled,
)
from lesa.sampling.checks import CheckResult, FirstCall, MismatchError, run_problems
from lesa.sampling.clock import Clock, SchedulerClock, TimestepClock
from lesa.sampling.hook_registry import PlacedHook, add_hook, find_hook, forget_children, remove_hook
from lesa.sampling.run import Decision, Run
from lesa.sampling.statistics import CallTimer, RunStatistics
from lesa.schedule import Schedule

ROOT_HOOK = "lesa_cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class LesaCacheConfig:
    """How one transformer is accelerated.

    Exactly one of `scheduler` and `timesteps` says where a call belongs.
    """

    schedule: Schedule
    rule: Rule  # predicts the feature: lesa.peers.rules.RULES or a predictor's `bind`
    scheduler: Any | None = None  # the scheduler that steps, or a function that returns it
    timesteps: Sequence[float] | None = None  # `timestep` of every step, as the transformer receives it
    sigmas: Sequence[float] | None = None  # [S + 1] expected noise levels, checked at every run's first call
    # Schedule and rule for the noise levels [S + 1] of a run with another number of steps; None refuses such runs.
    other_steps: Callable[[torch.Tensor], tuple[Schedule, Rule]] | None = None
    check: Callable[[FirstCall], CheckResult] | None = None  # further problems and facts of a run's first call
    num_branches: int | None = None  # transformer calls a step; None takes what comes
    late_start: bool = False  # let a run begin where the scheduler's `begin_index` says, as from another image
    measure: bool = True  # at full steps, record what the rule would have been off by
    fallback: Fallback | None = None  # what a run with too large errors changes over to; for runs on `schedule` alone
    guard: bool = True  # run in full where the prediction is not finite or jumps in size
    notes: Mapping[str, str] = field(default_factory=dict)  # facts for the summary
    bounds: Mapping[int, float] = field(default_factory=dict)  # errors at full steps of `schedule`, for the summary

    def __post_init__(self) -> None:
        problems = []
        if (self.scheduler is None) == (self.timesteps is None):
            problems.append("give exactly one of scheduler and timesteps")
        if self.timesteps is not None and self.other_steps is not None:
            problems.append("other_steps needs a scheduler: timesteps are of one number of steps")
        if self.timesteps is not None and len(self.timesteps) != self.schedule.num_steps:
            problems.append(f"timesteps: got {len(self.timesteps)}, expected {self.schedule.num_steps}")
        if self.sigmas is not None and len(self.sigmas) != self.schedule.num_steps + 1:
            problems.append(f"sigmas: got {len(self.sigmas)}, expected {self.schedule.num_steps + 1}")
        if self.fallback is not None and not (self.measure and self.other_steps is None):
            problems.append("fallback needs measure and no other_steps")
        if self.num_branches is not None and self.num_branches < 1:
            problems.append(f"num_branches must be at least 1, got {self.num_branches}")
        if problems:
            raise LesaError("LesaCacheConfig: " + "; ".join(problems))


class LesaRootHook(PlacedHook):
    """Translates between diffusers' calls of the transformer and a `Run`."""

    _is_stateful = True

    def __init__(self, config: LesaCacheConfig, call: LesaCallState) -> None:
        super().__init__()
        self.config = config
        # Holds no state: an attribute of this type is where `cache_context` puts the context.
        self.state_manager = StateManager(BaseState)
        self.run = self._new_run(config.schedule, config.rule, config.notes)
        self._call = call
        self._clock: Clock = (
            SchedulerClock(config.scheduler, config.num_branches)
            if config.timesteps is None
            else TimestepClock(config.timesteps, config.num_branches)
        )
        call.root = self

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._call.active:
            raise RuntimeError("the transformer is in a call already: one accelerated run at a time")
        self._call.active = True
        compiled: Compiled = []
        try:
            timer, decision = self._enter(module, args, kwargs)
            if decision.prediction is not None:
                compiled = take_compiled(module)
            output = self.fn_ref.original_forward(*args, **kwargs)
            self._leave(timer, decision)
        except BaseException:
            self.run.break_off()
            self._clock.fail()
            raise
        finally:
            self._call.clear()
            give_back(compiled)
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.run.forget()
        return module

    @torch.compiler.disable
    def _enter(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CallTimer, Decision]:
        """Decide the call that is about to run, and tell the hooks beneath."""
        timer = CallTimer.start(kwargs.get("hidden_states"))
        context = self.state_manager._context  # the property of that name raises where there is none
        timestep = None if self.config.timesteps is None else _argument(module, "timestep", args, kwargs)
        tick = self._clock.tick(None if context is None else context.name, timestep)
        if tick.new_run:
            self._begin_run(module, tick.step, args, kwargs, timer.started)
        decision = self.run.decide(tick.step, tick.branch)
        self._call.prediction, self._call.skip = decision.prediction, decision.prediction is not None
        return timer, decision

    @torch.compiler.disable
    def _leave(self, timer: CallTimer, decision: Decision) -> None:
        """Keep what the call has shown."""
        if decision.prediction is None and self._call.feature is None:
            raise RuntimeError(f"the hook of the last block was not called: {AGAIN}")
        self.run.keep(decision, self._call.feature)
        self.run.statistics.seconds = timer.stop(decision.record) - self.run.started

    def _new_run(self, schedule: Schedule, rule: Rule, notes: Mapping[str, str]) -> Run:
        config = self.config
        return Run(
            schedule,
            rule,
            fallback=config.fallback,
            measure=config.measure,
            guard=config.guard,
            notes=notes,
            bounds=config.bounds if schedule is config.schedule else {},
        )

    def _begin_run(
        self, module: torch.nn.Module, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> None:
        """Check everything that can be before anything is computed, then begin."""
        self.run.forget()
        config, num_steps = self.config, self._clock.num_steps
        scheduler = self._clock.scheduler if isinstance(self._clock, SchedulerClock) else None
        schedule, rule, problems = config.schedule, config.rule, []
        is_own = config.other_steps is None or num_steps == schedule.num_steps
        if config.other_steps is not None and not is_own:
            try:
                schedule, rule = config.other_steps(noise_levels(scheduler))
            except ValueError as error:
                problems.append(str(error))
        call = FirstCall(transformer=module, scheduler=scheduler, args=args, kwargs=kwargs)
        problems += run_problems(
            call,
            first_step=step,
            late_start=config.late_start,
            num_steps=num_steps,
            # The error above already explains a number of steps that cannot be served.
            expected_steps=num_steps if problems else schedule.num_steps,
            expected_sigmas=config.sigmas if is_own else None,
        )
        problems += hook_problems(module)
        if config.fallback is not None:
            problems += fallback_problems(module, step)
        checked = CheckResult() if config.check is None else config.check(call)
        problems += checked.problems
        self.run = self._new_run(schedule, rule, config.notes if checked.notes is None else checked.notes)
        if problems:
            raise MismatchError("this run does not fit the cache that is enabled on the transformer", problems)
        self.run.begin(step, num_tokens=_num_tokens(module, args, kwargs), started=started)


def apply_lesa_cache(transformer: torch.nn.Module, config: LesaCacheConfig) -> None:
    """Accelerate `transformer` until `remove_lesa_cache`.

    Hooks that other tools add (offloading, context parallelism) come first: the last hook registered is the
    outermost, and a block that is skipped then moves no weights either.

    Raises:
        ValueError: for a transformer outside the table of families, or one that has a cache already.
    """
    transformer = unwrap_module(transformer)
    family_of(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise LesaError(
            "the transformer has one of diffusers' caches enabled: call transformer.disable_cache() first"
        )
    if find_hook(transformer, ROOT_HOOK) is not None:
        raise LesaError(
            "LESA is enabled on this transformer already: call lesa.disable(pipe) or "
            "remove_lesa_cache(transformer) first"
        )
    call = LesaCallState()
    root = LesaRootHook(config, call)
    add_block_hooks(transformer, call)
    add_hook(transformer, root, ROOT_HOOK, beneath_offload=True)
    forget_children(transformer)


def remove_lesa_cache(transformer: torch.nn.Module) -> None:
    """Take every hook of ours away; a transformer without them is left as it is."""
    transformer = unwrap_module(transformer)
    for module in transformer.modules():
        for name in (ROOT_HOOK, BLOCK_HOOK, ROTARY_HOOK, EMBEDDER_HOOK):
            remove_hook(module, name)
    forget_children(transformer)


def cache_state(transformer: torch.nn.Module) -> RunStatistics:
    """Statistics of the newest run; `ValueError` where LESA is not enabled."""
    root = find_hook(unwrap_module(transformer), ROOT_HOOK)
    if root is None:
        raise LesaError("LESA is not enabled on this transformer")
    assert isinstance(root, LesaRootHook)
    return root.run.statistics


def is_lesa_cache_enabled(transformer: torch.nn.Module) -> bool:
    """Whether our hooks are on the transformer."""
    return find_hook(unwrap_module(transformer), ROOT_HOOK) is not None


def _num_tokens(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Leading image tokens that the pipeline keeps of an editing model's tokens; None: all, or it cannot be told."""
    grid = family_of(module).grid
    if grid is None or getattr(module, "_parallel_config", None) is not None:  # tokens are spread over devices
        return None
    image = grid(_arguments(module, args, kwargs))
    return None if image is None else image.num_tokens


def _arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All of a call's arguments by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _argument(module: torch.nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return kwargs[name] if name in kwargs else _arguments(module, args, kwargs).get(name)
