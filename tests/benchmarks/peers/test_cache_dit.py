"""cache-dit as it is installed, on a tiny pipeline; what it decides is checked against its own description."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.peers import cache_dit_search
from benchmarks.peers.cache_dit import CALIBRATORS, INSTALL, DBCache, cache_dit_method, masked_methods, missing
from benchmarks.peers.cache_dit_search import even_skips, tuned_cache_dit
from lesa.models.flops import ModelFlops
from lesa.models.pipelines import sample
from lesa.models.probe import RunTrace, probe
from lesa.peers.caches import first_block_method
from lesa.peers.method import lesa_method
from lesa.peers.rules import rule_method
from lesa.peers.tuning import Bench
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS, extrapolating
from tests.helpers.evaluation import BUDGETS, pipeline, sigmas

PROMPTS, SEEDS = ["a red house", "the blue dog"], [7, 8]
STEPS = (0, 1, 2, 5, 8)


@pytest.fixture
def cache_dit() -> Any:
    return pytest.importorskip("cache_dit")


def plain() -> torch.Tensor:
    return sample(pipeline(), PROMPTS, SEEDS, CALL, "latent")


def drawn(setting: DBCache) -> tuple[torch.Tensor, RunTrace]:
    pipe, method = pipeline(), cache_dit_method("b", NUM_STEPS, setting)
    with method.using(pipe, sigmas()), probe(pipe, deep=True, held=method.held) as trace:
        return sample(pipe, PROMPTS, SEEDS, CALL, "latent"), trace


def test_with_every_step_computed_it_is_the_plain_run(cache_dit: Any) -> None:
    found, trace = drawn(DBCache(threshold=0.0))
    assert trace.computed == trace.calls == NUM_STEPS
    assert torch.equal(found, plain())


@pytest.mark.parametrize("calibrator", list(CALIBRATORS))
def test_it_comes_off_and_leaves_nothing(cache_dit: Any, calibrator: str) -> None:
    pipe, before = pipeline(), plain()
    modules = [pipe.transformer, *pipe.transformer.modules()]
    attributes = [dict(vars(module)) for module in modules]
    on_class, on_pipe = dict(vars(type(pipe))), set(vars(pipe))
    names = [name for name, _ in pipe.transformer.named_modules()]
    found, trace = drawn(DBCache(calibrator=calibrator, computed_steps=STEPS))
    assert trace.computed == len(STEPS) and torch.isfinite(found).all() and not torch.equal(found, before)
    assert torch.equal(plain(), before)
    assert torch.equal(drawn(DBCache(calibrator=calibrator, computed_steps=STEPS))[0], found)
    assert [name for name, _ in pipe.transformer.named_modules()] == names  # in this order
    for module, kept in zip(modules, attributes, strict=True):
        assert vars(module).keys() == kept.keys()
        assert all(vars(module)[name] is kept[name] for name in kept)
    assert dict(vars(type(pipe))) == on_class and set(vars(pipe)) == on_pipe


def test_it_comes_off_after_an_error(cache_dit: Any) -> None:
    before = plain()
    others = first_block_method("b", NUM_STEPS, 0.3)
    with pytest.raises(KeyError), cache_dit_method("b", NUM_STEPS, DBCache()).using(pipeline(), sigmas()):
        raise KeyError
    assert torch.equal(plain(), before)
    drawn(DBCache())
    with others.using(pipeline(), sigmas()), probe(pipeline()) as trace:
        plain()
    assert 1 <= trace.computed < NUM_STEPS  # diffusers' own cache finds its blocks again


def test_without_a_calibrator_the_newest_residual_is_added(cache_dit: Any) -> None:
    """After a computed step the middle blocks' change of the image tokens is what it was there."""
    after_first: list[torch.Tensor] = []
    first = pipeline().transformer.transformer_blocks[0]
    handle = first.register_forward_hook(lambda module, args, output: after_first.append(output[1]))
    try:
        _, trace = drawn(DBCache(computed_steps=(0, 4)))
    finally:
        handle.remove()
    assert len(after_first) == NUM_STEPS
    middle = [feature - entered for feature, entered in zip(trace.features, after_first, strict=True)]
    for step in range(NUM_STEPS):
        torch.testing.assert_close(middle[step], middle[0 if step < 4 else 4], atol=1e-5, rtol=1e-5)
    assert trace.peak_bytes > 0


def test_a_step_counts_only_where_every_block_ran(cache_dit: Any) -> None:
    """The last block runs at every step, the middle ones do not."""
    _, trace = drawn(DBCache(last_blocks=1, warmup_steps=3, max_skipped=2))
    assert (trace.calls, trace.computed) == (NUM_STEPS, 5)  # 0 1 2 5 8
    method = cache_dit_method("b", NUM_STEPS, DBCache(first_blocks=2, last_blocks=1))
    model = ModelFlops(total=100.0, head=2.0, blocks=(10.0, 20.0, 30.0, 38.0), tokens=4, channels=8)
    assert method.flops(model, 5.5, sigmas()) == 550 + 4.5 * (2 + 10 + 20 + 38)


def test_more_is_held_with_a_longer_memory(cache_dit: Any) -> None:
    held = {name: drawn(DBCache(calibrator=name, computed_steps=STEPS))[1].peak_bytes for name in CALIBRATORS}
    assert 0 < held[""] < held["taylorseer"] < held["dmd"]


def test_fixed_steps_are_rows_at_equal_full_steps() -> None:
    rows = masked_methods("b", Schedule.explicit(NUM_STEPS, STEPS))
    assert [row.name for row in rows] == [f"cache_dit{end}_fixed" for end in ("", "_taylorseer", "_foca", "_dmd")]
    assert all(row.schedule and row.schedule.full_steps == STEPS and row.same_steps for row in rows)


def test_it_is_not_put_on_what_is_hooked(cache_dit: Any) -> None:
    pipe = pipeline()
    ours = rule_method("reuse", "b", BUDGETS["1.67x"])
    with ours.using(pipe, sigmas()), pytest.raises(ValueError, match="hooked to the transformer already"):
        with cache_dit_method("b", NUM_STEPS, DBCache()).using(pipe, sigmas()):
            pass
    with pytest.raises(ValueError, match="4 of 4 blocks"):
        with cache_dit_method("b", NUM_STEPS, DBCache(first_blocks=2, last_blocks=2)).using(pipe, sigmas()):
            pass


def test_rows_are_missing_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert INSTALL in str(missing(pipe, CALL))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert missing(pipe, CALL) is None
    assert "embedded guidance" in str(missing(pipe, dataclasses.replace(CALL, true_cfg_scale=4.0)))


@pytest.mark.parametrize(
    ("warmup", "target", "skips"), [(3, 10, 5), (1, 10, 4), (3, 10.2, 4), (3, 2, None), (1, 50, 0), (2, 49.5, 0)]
)
def test_even_skips_reach_the_target(warmup: int, target: float, skips: int | None) -> None:
    found = even_skips(50, warmup, target)
    assert found == skips

    def count(skipped: int) -> int:
        return warmup + (50 - warmup) // (skipped + 1)

    if found is not None:
        assert count(found) >= target > count(found + 1)


def test_it_is_tuned_like_the_other_caches(cache_dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_dit_search, "CALIBRATORS", {name: CALIBRATORS[name] for name in ("", "taylorseer")})
    monkeypatch.setattr(cache_dit_search, "FIXED_BLOCKS", ((1, 0), (1, 1)))
    monkeypatch.setattr(cache_dit_search, "THRESHOLD_TRIALS", 2)
    monkeypatch.setattr(cache_dit_search, "WARMUPS", (1, 3))
    pipe = pipeline()
    predictor = extrapolating(pipe.transformer.inner_dim, sigmas(), BUDGETS["1.67x"])
    ours = {name: lesa_method(name, predictor, schedule) for name, schedule in BUDGETS.items()}
    bench = Bench.of(pipe, PROMPTS, SEEDS, CALL, 2)
    methods = tuned_cache_dit(bench, ours, repeats=1)
    names = {method.name for method in methods}
    assert {"cache_dit", "cache_dit_taylorseer"} <= names
    for method in methods:
        full = BUDGETS[method.budget].num_full
        if not method.name.endswith("_equal_time"):
            assert method.settings["target_computed_steps"] >= full
            # Our own full steps are among what was tried: nothing that is no better can have won.
            fixed = {row.name: row for row in masked_methods("b", BUDGETS[method.budget])}[f"{method.name}_fixed"]
            assert method.settings["tuning_psnr"] >= bench.trial(fixed).psnr - 1e-3
        assert bench.trial(method).computed == method.settings["tuning_computed_steps"]


