"""Full steps by need: the first feature picks the schedule, and the run is that schedule's to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import lesa
from lesa.bundle import Bundle, load_bundle
from lesa.by_need import ByNeed
from lesa.by_need import Path as Way
from lesa.difficulty import Difficulty
from lesa.fallback import Fallback
from lesa.hook import apply_lesa_cache, cache_state
from lesa.schedule import Schedule
from tests.attacks.hostile import WEIGHTS, edit, reweigh
from tests.bundles import CALL, NUM_STEPS, extrapolating, manifest_for, run_sigmas
from tests.lesa.test_hook import HandTransformer, Says, hand, hand_config, tokens  # noqa: F401
from tests.tiny import tiny_flux

TIMES = [9.0, 8.0, 6.0, 5.0, 3.0, 1.0]
FAST, USUAL, SLOW = (Schedule.explicit(6, steps) for steps in ((0, 4), (0, 2, 4), (0, 1, 2, 4)))
NAMES = ("fast", "usual", "slow")
SLOWEST = Schedule.explicit(6, (0, 1, 2, 3, 4))


class Reuse(Says):
    """Says the newest feature, of however many samples."""

    def __call__(self, history, step):
        return history.features[0]


def by_need(rules: dict[str, Says], level: float, slope: float = 1.0, **changes) -> ByNeed:
    """Expects 10, 20 and 30 dB of the hand transformer's feature 4, and more the larger it is."""
    difficulty = Difficulty(
        center=torch.tensor([4.0, 0.0]),
        scale=torch.ones(2),
        weights=torch.tensor([[slope] * 3, [0.0] * 3]),
        intercept=torch.tensor([10.0, 20.0, 30.0]),
    )
    schedules = dict(zip(NAMES, (FAST, USUAL, SLOW), strict=True))
    paths = {name: Way(schedule=schedules[name], rule=rules[name], **changes.get(name, {})) for name in NAMES}
    return ByNeed(difficulty=difficulty, names=NAMES, paths=paths, level=level, asked="usual")


def says(value: float = 4.0, history_size: int = 2) -> Says:
    return Says(dict.fromkeys(range(6), value), history_size=history_size)


def drive(transformer: HandTransformer, *inputs: float) -> list[int]:
    """Full steps of one run whose samples have these values."""
    batch = torch.cat([tokens(value) for value in inputs])
    for t in TIMES:
        transformer(batch, torch.tensor(t))
    return [record.step for record in cache_state(transformer).steps if record.kind == "full"]


def test_the_first_feature_picks_the_schedule(hand: HandTransformer) -> None:  # noqa: F811
    rules = {"fast": says(), "usual": says(), "slow": says(history_size=3)}
    config = hand_config(
        rule=rules["usual"], schedule=USUAL, timesteps=TIMES, num_branches=1, by_need=by_need(rules, level=18.0)
    )
    apply_lesa_cache(hand, config)
    assert drive(hand, 1.0) == [0, 2, 4]  # a feature of 4: 20 dB are enough, 10 are not
    assert "by need: usual; expected PSNR in dB fast 10.0, usual 20.0, slow 30.0, wanted 18.0" in str(cache_state(hand))
    assert drive(hand, 3.0) == [0, 4]  # a feature of 12: 18 dB from the fast one
    assert cache_state(hand).schedule is FAST and rules["fast"].seen and cache_state(hand).num_fallbacks == 0
    assert drive(hand, 0.25) == [0, 1, 2, 4]  # a feature of 1: 17 from the usual one
    assert rules["slow"].seen[-1] == (4, 2, 1)  # with the history that its own rule looks back on
    assert drive(hand, 1.0) == [0, 2, 4]  # every run chooses anew


def test_the_sample_that_needs_most_decides_for_its_batch(hand: HandTransformer) -> None:  # noqa: F811
    rules = {name: Reuse({}) for name in NAMES}
    config = hand_config(
        rule=rules["usual"], schedule=USUAL, timesteps=TIMES, num_branches=1, by_need=by_need(rules, level=18.0)
    )
    apply_lesa_cache(hand, config)
    assert drive(hand, 3.0, 3.0) == [0, 4]
    assert drive(hand, 3.0, 0.25, 3.0) == [0, 1, 2, 4]


def test_the_alarm_watches_the_schedule_that_was_picked(hand: HandTransformer) -> None:  # noqa: F811
    usual, slow, slower = says(), says(7.0), says()
    rules = {"fast": says(), "usual": usual, "slow": slow}
    changing = Fallback(SLOW, {2: 0.2}, SLOWEST, slower, "slowest")
    choice = by_need(rules, level=25.0, slow={"fallback": changing, "bounds": {2: 0.2}})
    config = hand_config(
        rule=usual,
        schedule=USUAL,
        timesteps=TIMES,
        num_branches=1,
        by_need=choice,
        fallback=Fallback(USUAL, {2: 9.0}, SLOW, says(), "slow"),
    )
    apply_lesa_cache(hand, config)
    # Slow is needed; its rule says 7 of step 2's feature of 4, beyond its bound: from step 3 on the slowest.
    assert drive(hand, 1.0) == [0, 1, 2, 3, 4]
    statistics = cache_state(hand)
    assert statistics.change == 3 and "changed over: to slowest at step 3" in str(statistics)
    assert slower.seen[-1] == (4, 3)
    assert statistics.bounds == {2: 0.2}


def test_it_cannot_be_with_other_numbers_of_steps() -> None:
    rules = {name: says() for name in NAMES}
    with pytest.raises(ValueError, match="by_need needs no other_steps"):
        hand_config(
            rule=says(),
            schedule=USUAL,
            timesteps=None,
            scheduler=object(),
            by_need=by_need(rules, 18.0),
            other_steps=lambda sigmas: (USUAL, says()),
        )


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


@pytest.fixture
def pipe(pipeline):
    yield pipeline
    lesa.disable(pipeline)


@pytest.fixture(scope="module")
def three(pipeline, tmp_path_factory) -> Path:
    """A bundle of three budgets."""
    from lesa.bundle import write_bundle

    sigmas = run_sigmas(pipeline)
    schedules = {name: Schedule.uniform(NUM_STEPS, gap) for name, gap in (("2x", 5), ("1.67x", 3), ("1.43x", 2))}
    manifest = manifest_for(pipeline, sigmas)
    budget = manifest["budgets"]["1.67x"]
    manifest["budgets"] = {
        name: budget | {"full_steps": list(s.full_steps), "interval": None, "error_bounds": [None] * s.num_full}
        for name, s in schedules.items()
    }
    predictor = extrapolating(pipeline.transformer.norm_out.linear.in_features, sigmas, schedules["1.67x"])
    return write_bundle(tmp_path_factory.mktemp("bundle") / "three", manifest, predictor).path


def bent(folder: Path, tmp_path: Path, intercept: list[float], levels: dict[str, float]) -> Bundle:
    """The bundle with a regression that says the same of every sample."""
    import shutil

    copy = tmp_path / f"bent{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / WEIGHTS)
    channels = load_bundle(folder).manifest.channels
    says = {
        "center": torch.zeros(2 * channels),
        "scale": torch.ones(2 * channels),
        "weights": torch.zeros(2 * channels, 3),
        "intercept": torch.tensor(intercept),
    }
    reweigh(copy, save(tensors | {f"difficulty.{name}": value for name, value in says.items()}))
    entry = {"budgets": ["2x", "1.67x", "1.43x"], "levels": levels, "samples": 8, "correlation": [0.0] * 3}
    edit(copy, lambda document: document.update(difficulty=entry))
    return load_bundle(copy)


def picture(pipe) -> torch.Tensor:
    settings = {k: v for k, v in dataclasses.asdict(CALL).items() if v is not None}
    return pipe("a thin seven", output_type="pt", generator=torch.Generator().manual_seed(0), **settings).images


@pytest.mark.parametrize(("level", "budget"), [(35.0, "1.67x"), (25.0, "2x"), (45.0, "1.43x"), (99.0, "1.43x")])
def test_the_run_is_that_of_the_budget_to_the_bit(pipe, three: Path, tmp_path: Path, level, budget) -> None:
    bundle = bent(three, tmp_path, [30.0, 40.0, 50.0], {"1.67x": level})
    lesa.enable(pipe, bundle, budget=budget)
    own = picture(pipe)
    lesa.disable(pipe)
    lesa.enable(pipe, bundle, adaptive=True)  # its default budget is 1.67x
    assert torch.equal(picture(pipe), own)
    statistics = lesa.summary(pipe)
    assert statistics.schedule == bundle.manifest.budgets[budget].schedule
    assert statistics.num_full == bundle.manifest.budgets[budget].schedule.num_full
    assert f"by need: {budget};" in str(statistics)
    assert "adaptive: 2x, 1.67x, 1.43x as the first step asks, 6 full steps in the mean" in str(statistics)


def test_a_budget_without_a_level_is_adaptive_by_its_bounds_alone_or_not(pipe, three: Path, tmp_path: Path) -> None:
    bundle = bent(three, tmp_path, [30.0, 40.0, 50.0], {"1.67x": 35.0})
    with pytest.raises(ValueError, match="budget '2x' of this bundle has no error bounds"):
        lesa.enable(pipe, bundle, budget="2x", adaptive=True)
    with pytest.raises(ValueError, match="1.43x is the slowest"):
        lesa.enable(pipe, bundle, budget="1.43x", adaptive=True)
