"""The hook: what runs at which step, what it costs nothing to, and that it leaves without a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext

from lesa.models.families import FAMILIES, BlockList, Family
from lesa.peers.rules import RULES
from lesa.predictor.rule import History, WithoutStages
from lesa.sampling.block_hooks import LesaCallState
from lesa.sampling.checks import CheckResult, FirstCall, MismatchError
from lesa.sampling.hook import (
    ROOT_HOOK,
    LesaCacheConfig,
    LesaRootHook,
    apply_lesa_cache,
    cache_state,
    is_lesa_cache_enabled,
    remove_lesa_cache,
)
from lesa.sampling.hook_registry import find_hook
from lesa.schedule import Schedule
from tests.helpers.tiny import CALL, tiny_flux

STEPS = 8
SCHEDULE = Schedule.explicit(STEPS, (0, 1, 4))


# --- a transformer to compute by hand: every block doubles, the head adds one -------------------------------


class Doubler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: int):
        self.calls += 1
        return 2 * hidden_states, encoder_hidden_states + 1


class HandTransformer(torch.nn.Module):
    """hidden -> 4 hidden + 1; blocks are called with positional arguments, as HunyuanVideo's are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Doubler(), Doubler()])
        self.text: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        encoder = torch.zeros(1)
        for block in self.blocks:
            hidden_states, encoder = block(hidden_states, encoder, 0)
        self.text = encoder
        return hidden_states + 1


@pytest.fixture
def hand() -> Iterator[HandTransformer]:
    FAMILIES["hand"] = Family(
        name="hand",
        transformer_class="HandTransformer",
        pipeline_classes=(),
        block_lists=(BlockList(attribute="blocks", hidden_index=0, encoder_index=1),),
    )
    yield HandTransformer()
    del FAMILIES["hand"]


def tokens(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1), value)


def hand_config(rule: object = "taylor1", **changes) -> LesaCacheConfig:
    settings = {
        "schedule": Schedule.explicit(4, (0, 1)),
        "rule": RULES[rule](None, None) if isinstance(rule, str) else rule,
        "timesteps": [9.0, 6.0, 3.0, 1.0],
    }
    return LesaCacheConfig(**(settings | changes))


def test_full_and_predicted_steps_by_hand(hand):
    apply_lesa_cache(hand, hand_config())
    out = [
        float(hand(tokens(value), torch.tensor(t)))
        for value, t in ((1.0, 9.0), (3.0, 6.0), (100.0, 3.0), (0.0, 1.0))
    ]
    # Features 4 and 12; the line through them says 20 and 28, whatever the input; the head adds one.
    assert out == [5.0, 13.0, 21.0, 29.0]
    assert [block.calls for block in hand.blocks] == [2, 2]
    assert float(hand.text) == 0.0  # a skipped block passes the text through, in its own place
    statistics = cache_state(hand)
    assert [record.kind for record in statistics.steps] == ["full", "full", "predicted", "predicted"]
    assert statistics.finished and statistics.num_full == 2 and statistics.ratio == 2.0
    assert statistics.peak_bytes == 12  # two features and their difference, four bytes each


def test_the_error_meter_by_hand(hand):
    schedule = Schedule.explicit(4, (0, 1, 3))
    apply_lesa_cache(hand, hand_config(schedule=schedule))
    for value, t in ((1.0, 9.0), (3.0, 6.0), (0.0, 3.0), (10.0, 1.0)):
        hand(tokens(value), torch.tensor(t))
    errors = [record.error for record in cache_state(hand).steps]
    # Step 1: 4 said for 12. Step 3: 28 said for 40.
    assert errors == [None, pytest.approx(8 / 12), None, pytest.approx(12 / 40)]
    remove_lesa_cache(hand)
    apply_lesa_cache(hand, hand_config(schedule=schedule, measure=False))
    for value, t in ((1.0, 9.0), (3.0, 6.0), (0.0, 3.0), (10.0, 1.0)):
        hand(tokens(value), torch.tensor(t))
    assert [record.error for record in cache_state(hand).steps] == [None] * 4


@dataclasses.dataclass
class Says(WithoutStages):
    """A rule that says what it is told to, and keeps what it was given."""

    values: dict[int, float]
    name: str = "says"
    history_size: int = 2
    keeps_predictions: bool = False
    seen: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def __call__(self, history: History, step: int) -> torch.Tensor:
        self.seen.append(history.steps)
        return tokens(self.values[step])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_an_unusable_prediction_becomes_a_full_step_and_is_counted(hand, bad):
    rule = Says({2: bad, 3: 7.0})
    apply_lesa_cache(hand, hand_config(rule=rule, measure=False, num_branches=1))
    out = [
        float(hand(tokens(value), torch.tensor(t)))
        for value, t in ((1.0, 9.0), (1.0, 6.0), (2.0, 3.0), (0.0, 1.0))
    ]
    assert out == [5.0, 5.0, 9.0, 8.0]
    statistics = cache_state(hand)
    assert [record.kind for record in statistics.steps] == ["full", "full", "full", "predicted"]
    assert statistics.num_fallbacks == 1
    assert "2  full*" in str(statistics) and "unusable" in str(statistics)
    assert rule.seen[-1] == (1, 0)  # the extra full step does not shift the schedule's anchors


def test_without_the_guard_predictions_are_taken_as_they_are(hand):
    apply_lesa_cache(hand, hand_config(rule=Says({2: float("nan"), 3: 7.0}), guard=False, measure=False))
    out = [float(hand(tokens(1.0), torch.tensor(t))) for t in (9.0, 6.0, 3.0, 1.0)]
    assert out[2] != out[2] and out[3] == 8.0


def test_the_guard_is_off_where_devices_would_decide_apart_and_says_so(hand):
    for parallel, guarded in ((object(), False), (None, True)):
        hand._parallel_config = SimpleNamespace(context_parallel_config=parallel)  # None: tensor parallelism
        apply_lesa_cache(hand, hand_config(rule=Says({2: float("nan"), 3: 7.0}), measure=False))
        assert ("guard" in cache_state(hand).notes) != guarded
        for t in (9.0, 6.0, 3.0, 1.0):
            hand(tokens(1.0), torch.tensor(t))
        statistics = cache_state(hand)
        assert statistics.num_fallbacks == guarded and statistics.finished
        assert statistics.notes.get("guard", "none").startswith("none" if guarded else "off: with context parallelism")
        remove_lesa_cache(hand)


def test_a_rule_may_keep_its_predictions_in_the_history(hand):
    rule = Says({1: 4.0, 2: 4.0, 3: 4.0}, keeps_predictions=True)
    apply_lesa_cache(hand, hand_config(rule=rule, measure=False))
    for t in (9.0, 6.0, 3.0, 1.0):
        hand(tokens(1.0), torch.tensor(t))
    assert rule.seen == [(1, 0), (2, 1)]


def test_two_branches_keep_apart(hand):
    apply_lesa_cache(hand, hand_config(num_branches=2))
    out = [
        float(hand(tokens(value), torch.tensor(t)))
        for t, pair in ((9.0, (1.0, 2.0)), (6.0, (2.0, 4.0)), (3.0, (0.0, 0.0)), (1.0, (0.0, 0.0)))
        for value in pair
    ]
    assert out == [5.0, 9.0, 9.0, 17.0, 13.0, 25.0, 17.0, 33.0]
    assert cache_state(hand).num_branches == 2


def test_a_branch_that_first_comes_at_a_predicted_step_is_full(hand):
    apply_lesa_cache(hand, hand_config())
    registry = HookRegistry.check_if_exists_or_initialize(hand)
    manager = registry.get_hook("lesa_cache").state_manager
    manager.set_context(CacheContext("cond"))
    for t in (9.0, 6.0, 3.0):
        hand(tokens(1.0), torch.tensor(t))
    manager.set_context(CacheContext("uncond"))
    assert float(hand(tokens(2.0), torch.tensor(3.0))) == 9.0  # computed
    assert cache_state(hand).steps[-1].kind == "full" and "missing at step 2" in cache_state(hand).notes["history"]


def test_the_configuration_is_checked():
    with pytest.raises(ValueError, match="exactly one of scheduler and timesteps"):
        hand_config(timesteps=None)
    with pytest.raises(ValueError, match="exactly one of scheduler and timesteps"):
        hand_config(scheduler=object())
    with pytest.raises(ValueError, match=r"timesteps: got 1.*sigmas: got 2.*num_branches"):
        hand_config(timesteps=[1.0], sigmas=[1.0, 0.0], num_branches=0)


# --- on a pipeline --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


@pytest.fixture
def pipe(pipeline):
    yield pipeline
    remove_lesa_cache(pipeline.transformer)
    assert hooks_on(pipeline.transformer) == []


def hooks_on(transformer: torch.nn.Module) -> list[str]:
    found = []
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        found += list(registry.hooks) if registry is not None else []
        found += ["forward"] if "forward" in module.__dict__ else []
    return found


def run(pipe, *, num_steps: int = STEPS, seed: int = 0, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    settings = CALL | {"num_inference_steps": num_steps, "output_type": "pt", "generator": generator} | kwargs
    return pipe(**({"prompt": "a thin seven"} | settings)).images


def enable(pipe, schedule: Schedule = SCHEDULE, rule: str = "taylor1", **changes) -> None:
    settings = {"schedule": schedule, "rule": RULES[rule](schedule, None), "scheduler": pipe.scheduler}
    apply_lesa_cache(pipe.transformer, LesaCacheConfig(**(settings | changes)))


def test_interval_one_is_plain_sampling_bit_for_bit(pipe):
    plain = run(pipe)
    enable(pipe, Schedule.uniform(STEPS, 1))
    assert torch.equal(run(pipe), plain)
    assert cache_state(pipe.transformer).num_full == STEPS


def test_removal_gives_back_the_same_bits_and_leaves_no_hook(pipe):
    plain = run(pipe)
    enable(pipe)
    assert is_lesa_cache_enabled(pipe.transformer)
    accelerated = run(pipe)
    assert not torch.equal(accelerated, plain)
    remove_lesa_cache(pipe.transformer)
    assert hooks_on(pipe.transformer) == []
    assert torch.equal(run(pipe), plain)
    remove_lesa_cache(pipe.transformer)  # a second time does nothing
    with pytest.raises(ValueError, match="not enabled"):
        cache_state(pipe.transformer)


def test_blocks_run_at_full_steps_only_and_the_prediction_reaches_norm_out(pipe):
    calls, entering = [], []
    handles = [
        pipe.transformer.transformer_blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1)),
        pipe.transformer.norm_out.register_forward_pre_hook(lambda _, args: entering.append(args[0].clone())),
    ]
    enable(pipe, rule="reuse")
    run(pipe)
    for handle in handles:
        handle.remove()
    assert len(calls) == SCHEDULE.num_full
    assert len(entering) == STEPS
    for step in range(STEPS):
        anchor = max(full for full in SCHEDULE.full_steps if full <= step)
        assert torch.equal(entering[step], entering[anchor])


def test_rotary_embeddings_are_made_at_full_steps_only(pipe):
    frequencies, made = pipe.transformer.pos_embed.forward, []

    def counting(ids):
        made.append(1)
        return frequencies(ids)

    pipe.transformer.pos_embed.forward = counting  # beneath our hook
    enable(pipe)
    run(pipe)
    run(pipe, height=32)  # another size in the next run
    assert len(made) == 2 * SCHEDULE.num_full
    remove_lesa_cache(pipe.transformer)
    del pipe.transformer.pos_embed.__dict__["forward"]


def test_runs_do_not_see_each_other(pipe):
    enable(pipe)
    first = run(pipe, seed=1)
    run(pipe, seed=2, prompt="a red house on the left")
    assert torch.equal(run(pipe, seed=1), first)


def test_state_is_reset_after_an_exception(pipe):
    enable(pipe)
    expected = run(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        run(pipe, seed=5, callback_on_step_end=stop)
    assert not cache_state(pipe.transformer).finished
    assert torch.equal(run(pipe), expected)

    block = pipe.transformer.transformer_blocks[1]
    count = []

    def break_down(*_):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("out of memory")

    handle = block.norm1.register_forward_hook(break_down)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(pipe, seed=6)
    handle.remove()
    assert torch.equal(run(pipe), expected)


def test_guidance_branches_are_predicted_from_their_own_features(pipe):
    enable(pipe, Schedule.uniform(STEPS, 1))
    guided = {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    plain = run(pipe, **guided)
    assert cache_state(pipe.transformer).num_branches == 2
    remove_lesa_cache(pipe.transformer)
    assert torch.equal(run(pipe, **guided), plain)

    entering = []
    handle = pipe.transformer.norm_out.register_forward_pre_hook(lambda _, a: entering.append(a[0].clone()))
    enable(pipe, rule="reuse")
    run(pipe, **guided)
    handle.remove()
    cond, uncond = entering[0::2], entering[1::2]
    assert torch.equal(cond[2], cond[1]) and torch.equal(uncond[2], uncond[1])
    assert not torch.equal(cond[2], uncond[2])


def test_without_a_cache_context_branches_are_derived(pipe):
    """Most FLUX pipelines never set one; the pictures must be the same with and without."""
    guided = {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    enable(pipe)
    expected = run(pipe, **guided)
    pipe.transformer.cache_context = lambda *args, **kwargs: nullcontext()
    try:
        assert torch.equal(run(pipe, **guided), expected)
        assert torch.equal(run(pipe, **guided), expected)
    finally:
        del pipe.transformer.cache_context


def test_hooks_added_after_a_first_run_get_their_context(pipe):
    """diffusers caches the list of hooked children at the first run."""
    run(pipe)
    enable(pipe)
    assert cache_state(pipe.transformer).steps == []
    run(pipe)
    assert cache_state(pipe.transformer).num_branches == 1


def test_bfloat16_with_equal_timesteps():
    pipe = tiny_flux(dtype=torch.bfloat16)
    schedule = Schedule.uniform(200, 7)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    enable(pipe, schedule)
    run(pipe, num_steps=200)
    handle.remove()
    assert len(set(seen)) < 200
    statistics = cache_state(pipe.transformer)
    assert [r.step for r in statistics.steps if r.kind == "full"] == list(schedule.full_steps)
    assert statistics.num_branches == 1


def test_a_transformer_without_a_pipeline_is_given_timesteps(pipe):
    captured = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(dict(kwargs)), with_kwargs=True
    )
    enable(pipe)
    run(pipe)
    handle.remove()
    with torch.no_grad():
        remove_lesa_cache(pipe.transformer)
        timesteps = [float(kwargs["timestep"][0]) for kwargs in captured]
        apply_lesa_cache(
            pipe.transformer,
            LesaCacheConfig(schedule=SCHEDULE, rule=RULES["reuse"](SCHEDULE, None), timesteps=timesteps),
        )
        outputs = [pipe.transformer(**kwargs)[0] for kwargs in captured]
    assert len(outputs) == STEPS
    assert [r.kind == "full" for r in cache_state(pipe.transformer).steps] == [
        SCHEDULE.is_full(step) for step in range(STEPS)
    ]
    remove_lesa_cache(pipe.transformer)
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**captured[4])[0], outputs[4])


def test_a_run_that_does_not_fit_is_refused_before_anything_is_computed(pipe):
    computed = []
    handle = pipe.transformer.x_embedder.register_forward_hook(lambda *_: computed.append(1))
    sigmas = [1.0 - step / 10 for step in range(9)]

    def check(call: FirstCall) -> CheckResult:
        assert call.scheduler is pipe.scheduler and "hidden_states" in call.kwargs
        return CheckResult(problems=["prompt: too short"])

    plain = run(pipe)
    computed.clear()
    enable(pipe, sigmas=sigmas, check=check)
    with pytest.raises(MismatchError) as caught:
        run(pipe, num_steps=6)
    assert computed == []
    assert len(caught.value.problems) == 3
    for description in ("num_inference_steps: got 6, expected 8", "sigmas: got 7", "prompt: too short"):
        assert description in str(caught.value)
    with pytest.raises(MismatchError, match=r"sigmas: got .* at step"):
        run(pipe)
    handle.remove()
    remove_lesa_cache(pipe.transformer)
    assert torch.equal(run(pipe), plain)


def test_a_check_gives_the_facts_of_its_run_in_place_of_the_configuration_s(pipe):
    facts = iter([{"run": "first"}, None])
    enable(pipe, notes={"run": "none yet"}, check=lambda call: CheckResult(notes=next(facts)))
    assert cache_state(pipe.transformer).notes == {"run": "none yet"}
    run(pipe)
    assert cache_state(pipe.transformer).notes == {"run": "first"}
    run(pipe)
    assert cache_state(pipe.transformer).notes == {"run": "none yet"}


def test_a_run_that_starts_late_is_refused(pipe):
    enable(pipe)
    pipe.scheduler.set_timesteps(STEPS, mu=0.5)
    pipe.scheduler.set_begin_index(3)
    with pytest.raises(MismatchError, match="first step: got 3, expected 0"):
        pipe.transformer(hidden_states=torch.zeros(1, 1, 1))


def test_enabling_twice_or_over_another_cache_is_refused(pipe):
    enable(pipe)
    with pytest.raises(ValueError, match="enabled on this transformer already"):
        enable(pipe)
    remove_lesa_cache(pipe.transformer)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ValueError, match="disable_cache"):
            enable(pipe)
    finally:
        pipe.transformer.disable_cache()
    enable(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(MismatchError, match="another cache is enabled"):
            run(pipe)
    finally:
        pipe.transformer.disable_cache()
    remove_lesa_cache(pipe.transformer)
    for module in pipe.transformer.modules():  # what diffusers' own removal leaves on the instance
        module.__dict__.pop("forward", None)


def test_an_unknown_transformer_is_refused():
    with pytest.raises(ValueError, match="not in the table of model families"):
        apply_lesa_cache(torch.nn.Linear(1, 1), hand_config())


class Scaling(ModelHook):
    """An outer hook that replaces the forward, as offloading and other caches do."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        type(self).calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def test_an_outer_hook_survives_our_removal(pipe):
    block = pipe.transformer.transformer_blocks[0]
    enable(pipe)
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Scaling(), "outer")
    Scaling.calls = 0
    run(pipe)
    assert Scaling.calls == STEPS
    remove_lesa_cache(pipe.transformer)
    run(pipe)
    assert Scaling.calls == 2 * STEPS
    block._diffusers_hook.remove_hook("outer")
    block.__dict__.pop("forward", None)


def test_our_hook_silenced_by_another_removal_is_noticed(pipe):
    block = pipe.transformer.transformer_blocks[0]
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(Scaling(), "inner")
    enable(pipe)
    run(pipe)
    registry.remove_hook("inner")  # hands the plain forward to our hook in place of its own
    with pytest.raises(MismatchError, match=r"transformer_blocks\.0 .*silenced"):
        run(pipe)
    remove_lesa_cache(pipe.transformer)
    block.__dict__.pop("forward", None)


def test_our_root_hook_silenced_is_noticed_and_a_block_may_be_called_alone(pipe):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(Scaling(), "inner")
    enable(pipe)
    run(pipe)
    registry.remove_hook("inner", recurse=False)
    with pytest.raises(RuntimeError, match="the hook of the transformer was silenced"):
        run(pipe)
    remove_lesa_cache(pipe.transformer)
    pipe.transformer.__dict__.pop("forward", None)
    enable(pipe)
    block = pipe.transformer.single_transformer_blocks[0]
    width = pipe.transformer.inner_dim
    with torch.no_grad():
        outputs = block(torch.zeros(1, 2, width), torch.zeros(1, 2, width), torch.zeros(1, width))
    assert len(outputs) == 2


def test_parallelism_that_is_set_up_after_lesa_is_refused_with_the_reason(pipe):
    enable(pipe)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    try:
        with pytest.raises(MismatchError) as caught:
            run(pipe, height=32)
    finally:
        del pipe.transformer._parallel_config
    [problem] = caught.value.problems
    assert problem.startswith("parallelism was set up after LESA, which must come last: disable LESA and enable it")
    run(pipe)


def test_a_run_inside_a_run_is_refused(pipe):
    enable(pipe)

    def nested(*_):
        pipe.transformer(hidden_states=torch.zeros(1))

    handle = pipe.transformer.x_embedder.register_forward_hook(nested)
    with pytest.raises(RuntimeError, match="one accelerated run at a time"):
        run(pipe)
    handle.remove()
    run(pipe)


def test_peak_bytes_count_what_is_kept(pipe):
    enable(pipe, rule="reuse")
    run(pipe)
    tokens_, channels = 16, pipe.transformer.inner_dim
    assert (
        cache_state(pipe.transformer).peak_bytes == 4 * tokens_ * channels
    )  # one feature, no text beside it


def test_statistics_as_plain_values_and_as_a_table(pipe):
    enable(pipe, notes={"bundle": "tiny"})
    assert "no run yet" in str(cache_state(pipe.transformer))
    run(pipe)
    statistics = cache_state(pipe.transformer)
    plain = statistics.to_dict()
    assert [step["kind"] for step in plain["steps"]] == [
        "full" if SCHEDULE.is_full(step) else "predicted" for step in range(STEPS)
    ]
    assert plain["num_full"] == 3 and plain["num_fallbacks"] == 0 and plain["finished"]
    assert plain["seconds"] > 0 and plain["notes"] == {"bundle": "tiny"}
    table = str(statistics)
    assert "bundle: tiny" in table and "3 full of 8: 2.67x" in table
    assert len(table.splitlines()) == 2 + 1 + STEPS + 1


def test_what_an_interrupted_run_kept_is_gone_before_the_next_one_is_checked(hand):
    """A pipeline that is interrupted stops calling, without an error: the next run's first call finds features."""
    held = []

    def check(call: FirstCall) -> CheckResult:
        root = find_hook(hand, ROOT_HOOK)
        held.append(len(list(root.run.held_tensors())))
        return CheckResult()

    apply_lesa_cache(hand, hand_config(check=check))
    for _ in range(2):
        for timestep in (9.0, 6.0, 3.0):
            hand(tokens(1.0), torch.tensor([timestep]))
        assert list(find_hook(hand, ROOT_HOOK).run.held_tensors())
    assert held == [0, 0]


def test_a_run_after_a_call_that_failed_begins_at_the_front(hand):
    """Where the first two steps have one timestep, its value alone would not tell."""
    apply_lesa_cache(hand, hand_config(timesteps=[9.0, 9.0, 3.0, 1.0]))
    handle = hand.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hand(tokens(1.0), torch.tensor([9.0]))
    handle.remove()
    for timestep in (9.0, 9.0, 3.0, 1.0):
        hand(tokens(1.0), torch.tensor([timestep]))
    assert [record.step for record in cache_state(hand).steps] == [0, 1, 2, 3] and cache_state(hand).finished


def test_bounds_are_of_the_configured_schedule_alone():
    """A run of another number of steps has errors that nobody calibrated."""
    schedule, other = Schedule.explicit(4, (0, 1)), Schedule.explicit(3, (0, 1))
    config = hand_config(schedule=schedule, bounds={1: 0.1})
    root = LesaRootHook(config, LesaCallState(), torch.nn.Module())
    assert root._new_run(schedule, config.rule, {}).statistics.bounds == {1: 0.1}
    assert root._new_run(other, config.rule, {}).statistics.bounds == {}


def test_every_run_has_a_record_of_its_own(hand):
    apply_lesa_cache(hand, hand_config())
    records = []
    for _ in range(2):
        for timestep in (9.0, 6.0, 3.0, 1.0):
            hand(tokens(1.0), torch.tensor([timestep]))
        records.append(cache_state(hand))
        assert [record.kind for record in records[-1].steps] == ["full", "full", "predicted", "predicted"]
    assert records[0] is not records[1] and len(records[0].steps) == 4
