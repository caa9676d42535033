"""Skips a transformer's blocks at predicted steps, on diffusers' own hooks: config, state, hook, apply.

LESA (arXiv 2602.20497): at a full step the transformer runs as it is and the feature of its last block is
kept; at a predicted step a rule says that feature and only the model's cheap ends run. A root hook on the
transformer decides, one hook a block obeys: pass the inputs through, and at the last block (the tail)
return the prediction. The conditioning, ControlNet residuals, `norm_out` and `proj_out` run unchanged; what
nothing but the blocks reads (token embedders, rotary embeddings) does not run.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from diffusers.utils.torch_utils import unwrap_module

from lesa.errors import LesaError
from lesa.models.families import blocks, family_of
from lesa.predictor.rule import History, Rule
from lesa.sampling.adaptive import Fallback
from lesa.sampling.block_hooks import AGAIN, LesaBlockHook, LesaCallState, LesaEmbedderHook, LesaRotaryHook
from lesa.sampling.checks import FirstCall, MismatchError, run_problems
from lesa.sampling.clock import Clock, SchedulerClock, Tick, TimestepClock
from lesa.sampling.hook_registry import add_hook, find_hook, forget_children, is_above_offload, is_alive, remove_hook
from lesa.sampling.statistics import RunStatistics
from lesa.schedule import Schedule

_ROOT_HOOK = "lesa_cache"
_BLOCK_HOOK = "lesa_cache_block"
_ROTARY_HOOK = "lesa_cache_rotary"
_EMBEDDER_HOOK = "lesa_cache_embedder"
_ROTARY = ("pos_embed", "rope")  # diffusers' names for what makes rotary embeddings
_NORM_JUMP = 10.0  # a prediction this many times larger than the feature it starts from is no prediction


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
    check: Callable[[FirstCall], Sequence[str]] | None = None  # further problems of a run's first call
    num_branches: int | None = None  # transformer calls a step; None takes what comes
    late_start: bool = False  # let a run begin where the scheduler's `begin_index` says, as from another picture
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


class LesaBranchState(BaseState):
    """What one branch of a run remembers."""

    def __init__(self, history_size: int) -> None:
        self.history = History(history_size)
        self.norm: torch.Tensor | None = None  # of the newest feature
        self.other: History | None = None  # features at the full steps of a schedule that may be changed over to

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.history.reset()
        self.norm = self.other = None

    @property
    def nbytes(self) -> int:
        own = {id(feature) for feature in self.history.features}
        others = () if self.other is None else self.other.features
        return self.history.nbytes + sum(feature.nbytes for feature in others if id(feature) not in own)


class LesaRootHook(ModelHook):
    """Decides each call of the transformer, keeps the features and the statistics."""

    _is_stateful = True

    def __init__(self, config: LesaCacheConfig, call: LesaCallState) -> None:
        super().__init__()
        self.config = config
        # An attribute, so that `cache_context` finds it and sets the context.
        self.state_manager = StateManager(LesaBranchState)
        self._follow(config.schedule, config.rule)
        self._call = call
        self._clock: Clock = (
            SchedulerClock(config.scheduler, config.num_branches)
            if config.timesteps is None
            else TimestepClock(config.timesteps, config.num_branches)
        )
        self._first_step = 0  # of the run
        self._num_tokens: int | None = None  # leading image tokens that are predicted; None: all
        self._compiled: list[tuple[dict[str, Any], Any]] = []  # blocks' attributes and what was taken from them
        self._started = 0.0  # host clock at the run's first call
        self._event: torch.cuda.Event | None = None  # device clock at this call's start
        call.root = self

    def _follow(self, schedule: Schedule, rule: Rule) -> None:
        """Take up what the run that begins does; no branch of another run is left then."""
        self._keep_to(schedule, rule)
        self.state_manager._init_args = (max(rule.history_size, 1),)
        bounds = self.config.bounds if schedule is self.config.schedule else {}
        self.statistics = RunStatistics(
            rule=rule.name, schedule=schedule, notes=dict(self.config.notes), bounds=bounds
        )

    def _keep_to(self, schedule: Schedule, rule: Rule) -> None:
        self.schedule, self.rule = schedule, rule
        self._full_steps = frozenset(schedule.full_steps)
        self._stages: Sequence[int] | None = getattr(rule, "stages", None)

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._call.active:
            raise RuntimeError("the transformer is in a call already: one accelerated run at a time")
        self._call.active = True
        try:
            tick, state, entered = self._begin(module, args, kwargs)
            output = self.fn_ref.original_forward(*args, **kwargs)
            self._end(tick, state, entered)
        except BaseException:
            # The features of a broken run are of no use to any other.
            self.reset_state(module)
            self._clock.fail()
            self.statistics.finished = False
            raise
        finally:
            self._call.clear()
            self._end_skipping()
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        context = self.state_manager._context
        self.state_manager.reset()
        self.state_manager.set_context(context)
        return module

    @torch.compiler.disable
    def _begin(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tick, LesaBranchState, float]:
        """Decide the call that is about to run."""
        entered = time.perf_counter()
        self._event = _device_event(kwargs.get("hidden_states"))
        context = self.state_manager._context
        timestep = None if self.config.timesteps is None else _argument(module, "timestep", args, kwargs)
        tick = self._clock.tick(None if context is None else context.name, timestep)
        if tick.new_run:
            self._start_run(module, tick, args, kwargs)
            self._started = entered
        state = self._branch(tick.branch)
        if (fallback := self.config.fallback) is not None and tick.step == fallback.change:
            self._change_over(fallback, state)
        is_full = tick.step in self._full_steps or not self._has_its_history(tick.step)
        planned = "full" if is_full else "predicted"
        if planned == "predicted":
            self._predict(tick, state)
        kind = "predicted" if self._call.skip else "full"
        if self._call.skip:
            self._take_compiled(module)
        stage = None if self._stages is None else int(self._stages[tick.step])
        self.statistics.record(tick.step, planned, kind, stage)
        return tick, state, entered

    def _change_over(self, fallback: Fallback, state: LesaBranchState) -> None:
        """Go on with the slower schedule, whose full step this is; the first branch changes it for all."""
        if self.schedule is not fallback.slower:
            self._keep_to(fallback.slower, fallback.rule)
            self.statistics.change = fallback.change
            self.statistics.notes = {**self.statistics.notes, "changed over": fallback.description}
        assert state.other is not None
        state.history, state.other = state.other, None

    def _take_compiled(self, module: torch.nn.Module) -> None:
        """Keep skipped calls out of compiled modules: each kind would be compiled once more to do nothing.

        `torch.compile` counts such variants of all hooked modules together and gives up at eight.
        """
        for _, hooked, _ in _hooked_modules(module):
            held = hooked.__dict__
            if held.get("_compiled_call_impl") is not None:
                self._compiled.append((held, held["_compiled_call_impl"]))
                held["_compiled_call_impl"] = None

    @torch.compiler.disable
    def _end_skipping(self) -> None:
        for held, compiled in self._compiled:
            held["_compiled_call_impl"] = compiled
        self._compiled = []

    def _branch(self, name: str) -> LesaBranchState:
        context = self.state_manager._context
        self.state_manager.set_context(CacheContext(name=name))
        state = self.state_manager.get_state()
        self.state_manager.set_context(context)
        self.statistics.num_branches = len(self.state_manager._state_cache)
        return state

    def _start_run(
        self, module: torch.nn.Module, tick: Tick, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.reset_state(module)
        clock, config = self._clock, self.config
        scheduler = clock.scheduler if isinstance(clock, SchedulerClock) else None
        schedule, rule, expected_sigmas, problems = config.schedule, config.rule, config.sigmas, []
        if config.other_steps is not None and clock.num_steps != schedule.num_steps:
            expected_sigmas = None
            try:
                schedule, rule = config.other_steps(_noise_levels(scheduler))
            except ValueError as error:
                problems.append(str(error))
        self._follow(schedule, rule)
        call = FirstCall(transformer=module, scheduler=scheduler, args=args, kwargs=kwargs)
        problems += run_problems(
            call,
            first_step=tick.step,
            late_start=config.late_start,
            num_steps=clock.num_steps,
            expected_steps=clock.num_steps if problems else schedule.num_steps,  # said already
            expected_sigmas=expected_sigmas,
        )
        problems += _hook_problems(module)
        if config.fallback is not None:
            config.fallback.begin()
            problems += _fallback_problems(module, tick.step)
        if config.check is not None:
            problems += config.check(call)
        if problems:
            raise MismatchError(
                "this run does not fit the cache that is enabled on the transformer", problems
            )
        self._first_step = tick.step
        self.statistics.notes = dict(config.notes)  # the check may have renewed them
        if tick.step:
            self.statistics.notes = {
                **self.statistics.notes,
                "begins at": f"step {tick.step}; full until the predictor has the history it was made for",
            }
        grid = family_of(module).grid
        if getattr(module, "_parallel_config", None) is not None:
            grid = None  # tokens are spread over devices: which of them are the picture's is not known here
        place = None if grid is None else grid(_arguments(module, args, kwargs))
        self._num_tokens = None if place is None else place.num_tokens

    def _has_its_history(self, step: int) -> bool:
        """Whether the run has had every step that a prediction at `step` looks back on by the schedule.

        Not so soon after the start of a run that begins in the middle: it runs in full until it has.
        """
        if self._first_step == 0:
            return True
        size, rule = max(self.rule.history_size, 1), self.rule
        oldest = step - size if rule.keeps_predictions else min(self.schedule.anchors(step, size))
        return oldest >= self._first_step

    def _predict(self, tick: Tick, state: LesaBranchState) -> None:
        if not state.history.features:
            raise LesaError(
                f"branch {tick.branch!r} is first called at step {tick.step}, where the schedule "
                f"({self.schedule}) predicts: it has no feature to predict from"
            )
        prediction = self.rule(state.history, tick.step)
        if self.config.guard and not self._plausible(prediction, state):
            return
        self._call.prediction = prediction
        self._call.skip = True

    def _plausible(self, prediction: torch.Tensor, state: LesaBranchState) -> bool:
        """One reduction tells NaN, infinity and a jump in size; it costs the device one synchronisation."""
        if state.norm is None:
            state.norm = _norm(state.history.features[0])
        return bool(_norm(prediction) <= _NORM_JUMP * state.norm)  # False with NaN on either side

    def _history_needed(self, step: int) -> int:
        """Features the rule must have; a rule without noise stages takes what there is."""
        sizes = getattr(self.rule, "sizes", None)
        return 1 if sizes is None or self._stages is None else int(sizes[self._stages[step]])

    @torch.compiler.disable
    def _end(self, tick: Tick, state: LesaBranchState, entered: float) -> None:
        """Keep what the call has shown."""
        record = self.statistics.steps[-1]
        history, rule = state.history, self.rule
        if self._call.skip:
            newest = self._call.prediction
            assert newest is not None
            if rule.keeps_predictions:
                history.push(tick.step, newest)
                state.norm = None
        else:
            feature = self._call.feature
            if feature is None:
                raise RuntimeError(f"the hook of the last block was not called: {AGAIN}")
            feature = feature[:, : self._num_tokens]  # what the pipeline keeps of an editing model's tokens
            enough = len(history.features) >= self._history_needed(tick.step)
            if self.config.measure and enough and self._has_its_history(tick.step):
                errors = _relative_l1(rule(history, tick.step), feature)
                record._errors.append(errors)
                if self.config.fallback is not None and self.config.fallback.watches(tick.step):
                    self.config.fallback.observe(tick.step, float(errors.max()))
            if tick.step in self._full_steps or rule.keeps_predictions:
                # Other full steps stay out: a bound rule counts on the schedule's own anchors.
                feature = _alone(feature)
                history.push(tick.step, feature)
                state.norm = None
            newest = feature
        self._keep_for_fallback(tick.step, state, newest)
        held = sum(branch.nbytes for branch in self.state_manager._state_cache.values())
        self.statistics.peak_bytes = max(self.statistics.peak_bytes, held)
        if tick.step == self.schedule.num_steps - 1:
            state.reset()  # nothing is predicted after the last step
            states = self.state_manager._state_cache.values()
            self.statistics.finished = not any(branch.history.steps for branch in states)
        if self._event is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            record._events.append((self._event, end))
        now = time.perf_counter()
        record.seconds += now - entered
        self.statistics.seconds = now - self._started

    def _keep_for_fallback(self, step: int, state: LesaBranchState, feature: torch.Tensor) -> None:
        """Keep the feature of a full step of the slower schedule, predicted where it was not computed."""
        fallback = self.config.fallback
        if fallback is None or self.schedule is fallback.slower or not fallback.slower.is_full(step):
            return
        if state.other is None:
            state.other = History(max(fallback.rule.history_size, 1))
        state.other.push(step, _alone(feature))


def apply_lesa_cache(transformer: torch.nn.Module, config: LesaCacheConfig) -> None:
    """Accelerate `transformer` until `remove_lesa_cache`.

    Hooks that other tools add (offloading, context parallelism) come first: the last hook registered is the
    outermost, and a block that is skipped then moves no weights either.

    Raises:
        ValueError: for a transformer outside the table of families, or one that has a cache already.
    """
    transformer = unwrap_module(transformer)
    family = family_of(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        raise LesaError(
            "the transformer has one of diffusers' caches enabled: call transformer.disable_cache() first"
        )
    if find_hook(transformer, _ROOT_HOOK) is not None:
        raise LesaError(
            "LESA is enabled on this transformer already: call lesa.disable(pipe) or "
            "remove_lesa_cache(transformer) first"
        )
    call = LesaCallState()
    root = LesaRootHook(config, call)
    rows = blocks(transformer, family)
    if not rows:
        raise LesaError(f"{type(transformer).__name__} has no blocks to skip")
    for index, (_, block, row) in enumerate(rows):
        hook = LesaBlockHook(call, block, row, is_tail=index == len(rows) - 1)
        add_hook(unwrap_module(block), hook, _BLOCK_HOOK)
    for names, kind, hook_name in (
        (_ROTARY, LesaRotaryHook, _ROTARY_HOOK),
        (family.embedders, LesaEmbedderHook, _EMBEDDER_HOOK),
    ):
        for name in names:
            module = getattr(transformer, name, None)
            if isinstance(module, torch.nn.Module):
                add_hook(unwrap_module(module), kind(call), hook_name)
    add_hook(transformer, root, _ROOT_HOOK, beneath_offload=True)
    forget_children(transformer)


def remove_lesa_cache(transformer: torch.nn.Module) -> None:
    """Take every hook of ours away; a transformer without them is left as it is."""
    transformer = unwrap_module(transformer)
    for module in transformer.modules():
        remove_hook(module, _ROOT_HOOK)
        remove_hook(module, _BLOCK_HOOK)
        remove_hook(module, _ROTARY_HOOK)
        remove_hook(module, _EMBEDDER_HOOK)
    forget_children(transformer)


def cache_state(transformer: torch.nn.Module) -> RunStatistics:
    """Statistics of the newest run; `ValueError` where LESA is not enabled."""
    root = find_hook(unwrap_module(transformer), _ROOT_HOOK)
    if root is None:
        raise LesaError("LESA is not enabled on this transformer")
    assert isinstance(root, LesaRootHook)
    return root.statistics


def is_lesa_cache_enabled(transformer: torch.nn.Module) -> bool:
    """Whether our hooks are on the transformer."""
    return find_hook(unwrap_module(transformer), _ROOT_HOOK) is not None


def _hook_problems(transformer: torch.nn.Module) -> list[str]:
    """Modules whose hook was silenced by somebody's removal of an inner one, or offloaded above it."""
    silenced, late = [], []
    for name, module, hook_name in _hooked_modules(transformer):
        if not is_alive(find_hook(module, hook_name)):
            silenced.append(name)
        elif not is_above_offload(module, hook_name):
            late.append(name)
    problems = []
    if silenced:
        problems.append(f"the hooks of {', '.join(silenced)} were silenced by another tool: {AGAIN}")
    if late:
        problems.append(
            f"offloading was set up after LESA on {', '.join(late)}, so predicted steps would move weights: {AGAIN}"
        )
    return problems


def _fallback_problems(transformer: torch.nn.Module, first_step: int) -> list[str]:
    problems = []
    if getattr(transformer, "_parallel_config", None) is not None:
        problems.append("adaptive: not with context parallelism, where every device would decide for itself")
    if first_step:
        problems.append("adaptive: not for runs that begin in the middle of the schedule")
    return problems


def _hooked_modules(transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    """Name, module and hook of everything that predicted steps skip and that has weights."""
    family = family_of(transformer)
    hooked = [(name, block, _BLOCK_HOOK) for name, block, _ in blocks(transformer, family)]
    hooked += [(name, getattr(transformer, name), _EMBEDDER_HOOK) for name in family.embedders]
    return [(name, unwrap_module(module), hook_name) for name, module, hook_name in hooked]


def _arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All of a call's arguments by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _argument(module: torch.nn.Module, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return kwargs[name] if name in kwargs else _arguments(module, args, kwargs).get(name)


def _noise_levels(scheduler: Any) -> torch.Tensor:
    """[S + 1] of the run that begins, float32 on the CPU."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, torch.Tensor):
        raise LesaError("sigmas: the scheduler has none")
    return sigmas.detach().to("cpu", torch.float32, copy=True)


def _device_event(tensor: Any) -> torch.cuda.Event | None:
    if not (isinstance(tensor, torch.Tensor) and tensor.is_cuda):
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _alone(feature: torch.Tensor) -> torch.Tensor:
    """The feature in storage of its own: a tail that splits text from image returns a view of both."""
    own = feature.contiguous()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own


def _norm(value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.linalg.vector_norm(value, dtype=torch.float32)


def _relative_l1(said: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """[B] of two features [B, L, C]."""
    with torch.no_grad():
        scale = true.abs().mean(dim=(1, 2), dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
        return (said - true).abs().mean(dim=(1, 2), dtype=torch.float32) / scale
