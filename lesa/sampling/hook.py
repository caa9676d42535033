"""Skips a transformer's blocks at predicted steps, on diffusers' own hooks: config, hook, apply, remove.

LESA (arXiv 2602.20497): at a full step the transformer runs as it is and the feature of its last block is
kept; at a predicted step a rule gives that feature and only the model's cheap ends run. A root hook on the
transformer asks the run (`lesa.sampling.run`) for every call, one hook a block obeys (`lesa.sampling.block_hooks`).
The conditioning, ControlNet residuals, `norm_out` and `proj_out` run unchanged.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.utils.torch_utils import unwrap_module

from lesa.errors import LesaError
from lesa.models.families import family_of
from lesa.predictor.rule import Rule
from lesa.sampling.adaptive import Fallback, fallback_problems, is_context_parallel
from lesa.sampling.binding import noise_levels
from lesa.sampling.block_hooks import (
    BLOCK_HOOK,
    EMBEDDER_HOOK,
    ROTARY_HOOK,
    SILENCED,
    Compiled,
    LesaCallState,
    add_block_hooks,
    give_back,
    hook_problems,
    take_compiled,
)
from lesa.sampling.checks import CheckResult, FirstCall, MismatchError, cache_problems, run_problems
from lesa.sampling.clock import Clock, ForeignCallError, SchedulerClock, TimestepClock
from lesa.sampling.hook_registry import (
    AGAIN,
    HookError,
    PlacedHook,
    add_hook,
    find_hook,
    forget_children,
    is_alive,
    remove_hook,
)
from lesa.sampling.run import AllFull, Decision, Run
from lesa.sampling.statistics import CallTimer, RunStatistics
from lesa.schedule import Schedule

ROOT_HOOK = "lesa_cache"
WHOLE = (
    "LESA decides between the blocks of every call, so the transformer cannot be compiled as a whole: leave it as it "
    "is and call pipe.transformer.compile_repeated_blocks(fullgraph=True)"
)


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
    # Runs of fewer steps, as servers make them to warm up, are full and taken as they are; None: runs that end before
    # the schedule predicts anything.
    least_steps: int | None = None
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

    def __init__(self, config: LesaCacheConfig, call: LesaCallState, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.config = config
        # Holds no state: an attribute of this type is where `cache_context` puts the context.
        self.state_manager = StateManager(BaseState)
        self.hooked: Mapping[str, torch.nn.Module] = {}  # modules beneath with a hook of ours
        self._parallel = getattr(transformer, "_parallel_config", None)
        self.run = self._new_run(config.schedule, config.rule, config.notes)
        self._call = call
        self._clock: Clock = (
            SchedulerClock(config.scheduler, config.num_branches, family_of(transformer).timestep_factor)
            if config.timesteps is None
            else TimestepClock(config.timesteps, config.num_branches)
        )
        call.root = self

    @property
    def is_predicting(self) -> bool:
        return self._call.skip

    @torch.compiler.disable(reason=WHOLE)
    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.refuse_copies(module)
        if not is_alive(self):
            raise HookError(self._refuse(SILENCED))
        return args, kwargs

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._call.active:
            raise HookError("the transformer is in a call already: one accelerated run at a time")
        self._call.active = True
        compiled: Compiled = []
        try:
            timer, decision = self._enter(module, args, kwargs)
            if decision.prediction is not None:
                compiled = take_compiled(module)
            output = self.fn_ref.original_forward(*args, **kwargs)
            self._leave(timer, decision)
        except ForeignCallError:
            raise  # the run under way is none of that call's
        except BaseException:
            self.run.break_off()
            self._clock.fail()
            raise
        finally:
            self._call.clear()
            give_back(compiled)
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        if self.module is not None:  # a copy has no run
            self.run.forget()
        return module

    @torch.compiler.disable(reason=WHOLE)
    def _enter(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CallTimer, Decision]:
        """Decide the call that is about to run, and tell the hooks beneath."""
        timer = CallTimer.start(kwargs.get("hidden_states"))
        context = self.state_manager._context  # the property of that name raises where there is none
        timestep = _argument(module, "timestep", args, kwargs)
        try:
            tick = self._clock.tick(None if context is None else context.name, timestep)
        except ForeignCallError as error:
            if not self.run.is_under_way:
                self._refuse(str(error))
            raise
        except Exception as error:
            self._refuse(str(error))
            raise
        if tick.new_run:
            self._begin_run(module, tick.step, args, kwargs, timer.started)
        decision = self.run.decide(tick.step, tick.branch)
        self._call.prediction, self._call.skip = decision.prediction, decision.prediction is not None
        return timer, decision

    @torch.compiler.disable
    def _leave(self, timer: CallTimer, decision: Decision) -> None:
        """Keep what the call has shown."""
        if decision.prediction is None and self._call.feature is None:
            raise HookError(f"the hook of the last block was not called: {AGAIN}")
        self.run.keep(decision, self._call.feature)
        self.run.statistics.seconds = timer.stop(decision.record) - self.run.started

    def _new_run(self, schedule: Schedule, rule: Rule, notes: Mapping[str, str]) -> Run:
        config, guard = self.config, self.config.guard
        if guard and is_context_parallel(self._parallel):
            guard = False
            notes = {**notes, "guard": "off: with context parallelism every device would decide for itself"}
        return Run(
            schedule,
            rule,
            fallback=config.fallback,
            measure=config.measure,
            guard=guard,
            notes=notes,
            bounds=config.bounds if schedule is config.schedule else {},
        )

    def _refuse(self, why: str) -> str:
        """The newest run is one that was refused: figures of those before are none of its own."""
        self.run = self._new_run(self.config.schedule, self.config.rule, {**self.config.notes, "refused": why})
        return why

    def _begin_run(
        self, module: torch.nn.Module, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], started: float
    ) -> None:
        """Check everything that can be before anything is computed, then begin."""
        self.run = self._new_run(self.config.schedule, self.config.rule, self.config.notes)  # whatever comes of it
        scheduler = self._clock.scheduler if isinstance(self._clock, SchedulerClock) else None
        call = FirstCall(transformer=module, scheduler=scheduler, args=args, kwargs=kwargs)
        # What is wrong with the hooks alone: differences of the call may come of it.
        problems = hook_problems(module, self.hooked)
        if getattr(module, "_parallel_config", None) is not self._parallel:
            problems.append(f"parallelism was set up after LESA, which must come last: {AGAIN}")
        if not problems:
            least = self.config.least_steps or _first_with_predictions(self.config.schedule)
            is_short = self._clock.num_steps < least
            self.run, problems = self._short_run(call, least) if is_short else self._planned_run(call, step)
        if problems:
            error = MismatchError("this run does not fit the cache that is enabled on the transformer", problems)
            self._refuse("; ".join(problems))
            raise error
        self.run.begin(step, num_tokens=_num_tokens(module, args, kwargs), started=started)

    def _short_run(self, call: FirstCall, least: int) -> tuple[Run, list[str]]:
        """A run of fewer steps than are predicted from: full at all of them, whatever the call."""
        num_steps = self._clock.num_steps
        fact = f"{num_steps} step(s), and nothing is predicted in runs of fewer than {least}"
        warnings.warn(f"not accelerated: the run has {fact}", stacklevel=2)
        self._clock.allow_branches()
        run = Run(
            Schedule.uniform(num_steps, 1), AllFull(), measure=False, notes={**self.config.notes, "in full": fact}
        )
        return run, cache_problems(call.transformer)

    def _planned_run(self, call: FirstCall, step: int) -> tuple[Run, list[str]]:
        """A run that the rule is for, and what it does not fit."""
        config, num_steps = self.config, self._clock.num_steps
        schedule, rule, problems = config.schedule, config.rule, []
        is_own = config.other_steps is None or num_steps == schedule.num_steps
        if config.other_steps is not None and not is_own:
            try:
                schedule, rule = config.other_steps(noise_levels(call.scheduler))
            except ValueError as error:
                problems.append(str(error))
        problems += run_problems(
            call,
            first_step=step,
            late_start=config.late_start,
            num_steps=num_steps,
            # The error above already explains a number of steps that cannot be served.
            expected_steps=num_steps if problems else schedule.num_steps,
            expected_sigmas=config.sigmas if is_own else None,
        )
        if config.fallback is not None:
            problems += fallback_problems(call.transformer, step)
        checked = CheckResult() if config.check is None else config.check(call)
        problems += checked.problems
        return self._new_run(schedule, rule, config.notes if checked.notes is None else checked.notes), problems


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
    if is_lesa_cache_enabled(transformer):
        raise LesaError(
            "LESA is enabled on this transformer already: call lesa.disable(pipe) or "
            "remove_lesa_cache(transformer) first"
        )
    remove_lesa_cache(transformer)  # what a copy brought along
    call = LesaCallState()
    root = LesaRootHook(config, call, transformer)
    root.hooked = add_block_hooks(transformer, call)
    add_hook(transformer, root, ROOT_HOOK, beneath_offload=True)
    forget_children(transformer)


def remove_lesa_cache(transformer: torch.nn.Module) -> None:
    """Take every hook of ours away; a transformer without them is left as it is."""
    transformer = unwrap_module(transformer)
    root = _root_hook(transformer)
    for module in [*transformer.modules(), *(() if root is None else root.hooked.values())]:
        for name in (ROOT_HOOK, BLOCK_HOOK, ROTARY_HOOK, EMBEDDER_HOOK):
            remove_hook(module, name)
    forget_children(transformer)


def cache_state(transformer: torch.nn.Module) -> RunStatistics:
    """Statistics of the newest run; `LesaError` where LESA is not enabled, or has not seen the newest run."""
    root = _root_hook(transformer)
    if root is None:
        raise LesaError("LESA is not enabled on this transformer")
    if not is_alive(root):
        raise HookError(f"there is nothing to say of the newest run: {SILENCED}")
    return root.run.statistics


def is_lesa_cache_enabled(transformer: torch.nn.Module) -> bool:
    """Whether our hooks were put on the transformer; those that a copy brought along do not count."""
    return _root_hook(transformer) is not None


def is_predicting(transformer: torch.nn.Module) -> bool:
    """Whether the call that the transformer is in has its blocks skipped."""
    root = _root_hook(transformer)
    return root is not None and root.is_predicting


def _root_hook(transformer: torch.nn.Module) -> LesaRootHook | None:
    own = unwrap_module(transformer)
    root = find_hook(own, ROOT_HOOK)
    return root if isinstance(root, LesaRootHook) and root.module is own else None


def _first_with_predictions(schedule: Schedule) -> int:
    """The shortest run, in steps, that the schedule predicts anything of; its own length where it predicts nothing."""
    return schedule.predicted_steps[0] + 1 if schedule.predicted_steps else schedule.num_steps


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
