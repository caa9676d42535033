"""A run with too large errors changes over to a slower schedule: when, with which history, and never otherwise."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxImg2ImgPipeline

import lesa
from lesa.bundle import Bundle, BundleError, load_bundle
from lesa.publishing.calibration import ALARMS, bounds_of
from lesa.sampling.adaptive import Fallback
from lesa.sampling.checks import MismatchError
from lesa.sampling.hook import apply_lesa_cache, cache_state
from lesa.schedule import Schedule
from tests.attacks.hostile import edit
from tests.helpers.bundles import CALL, make_bundle
from tests.helpers.tiny import tiny_flux
from tests.lesa.sampling.test_hook import HandTransformer, Says, hand, hand_config, tokens  # noqa: F401 - fixtures

TIMES = [9.0, 8.0, 6.0, 5.0, 3.0, 1.0]
OWN, SLOWER = Schedule.explicit(6, (0, 2)), Schedule.explicit(6, (0, 1, 3, 5))


class Seen(Says):
    """Keeps the features that it was given, too."""

    def __call__(self, history, step):
        self.features = [*getattr(self, "features", []), [float(f) for f in history.features]]
        return super().__call__(history, step)


def fallback(bounds: dict[int, float], rule: Says | None = None, slower: Schedule = SLOWER) -> Fallback:
    return Fallback(OWN, bounds, slower, rule or Says({}), "slow")


def drive(transformer: HandTransformer, changing: Fallback, own: Says) -> list[str]:
    config = hand_config(rule=own, schedule=OWN, timesteps=TIMES, fallback=changing, num_branches=1)
    apply_lesa_cache(transformer, config)
    for t in TIMES:
        transformer(tokens(1.0), torch.tensor(t))
    return [record.kind for record in cache_state(transformer).steps]


def test_an_error_beyond_its_bound_changes_the_schedule(hand: HandTransformer) -> None:  # noqa: F811
    own, slow = Says({1: 4.5, 2: 5.0, 3: 4.0, 4: 4.0, 5: 4.0}), Seen({3: 4.0, 4: 4.25, 5: 4.0}, history_size=3)
    # A full step's feature is 4; 5 was said of step 2, a quarter off.
    changing = fallback({2: 0.2}, slow)
    assert drive(hand, changing, own) == ["full", "predicted", "full", "full", "predicted", "full"]
    statistics = cache_state(hand)
    assert statistics.change == 3
    assert statistics.num_full == 4 and statistics.num_fallbacks == 0 and statistics.finished
    assert statistics.to_dict()["change"] == 3
    assert "changed over: to slow at step 3: the error at step 2 was beyond its bound" in str(statistics)
    # Step 4 looks back on the slower schedule's steps: 3, 1 (of which there is the prediction alone) and 0.
    assert slow.seen[1] == (3, 1, 0) and slow.features[1] == [4.0, 4.5, 4.0]
    assert all(2 not in past for past in slow.seen)  # no full step of that schedule
    # The next run begins as scheduled.
    own.values[2] = 4.1
    for t in TIMES:
        hand(tokens(1.0), torch.tensor(t))
    assert cache_state(hand).change is None and cache_state(hand).num_full == 2
    assert "changed over" not in str(cache_state(hand))


def test_an_error_within_its_bound_changes_nothing(hand: HandTransformer) -> None:  # noqa: F811
    slow = Says({})
    changing = fallback({2: 0.3}, slow)
    own = Says({1: 4.5, 2: 5.0, 3: 4.0, 4: 4.0, 5: 4.0})
    assert drive(hand, changing, own) == ["full", "predicted", "full", "predicted", "predicted", "predicted"]
    assert cache_state(hand).change is None and slow.seen == []


def test_what_is_kept_for_the_change_is_counted(hand: HandTransformer) -> None:  # noqa: F811
    own = Says({1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0, 5: 4.0})
    drive(hand, fallback({2: 1.0}), own)
    # Two features of four bytes each: of steps 0 and 2 for the own rule, 1 and 3 for the other.
    assert cache_state(hand).peak_bytes == 16


def test_when_a_run_changes_and_how_much_it_may_cost() -> None:
    own, slow = Schedule.explicit(20, (0, 5, 10, 15)), Schedule.explicit(20, (0, 3, 5, 8, 10, 12, 15, 17))
    changing = Fallback(own, {5: 0.1, 10: 0.1, 15: 0.1}, slow, Says({}), "slow")
    assert changing.most == 4 - 1  # from step 8 on: 0 and 5, then 8, 10, 12, 15, 17
    watch = changing.begin()
    watch.observe(5, 0.1)
    assert watch.alarm is None and watch.watches(10)
    watch.observe(10, float("nan"))
    assert (watch.alarm, watch.change) == (10, 12) and not watch.watches(15)
    another = changing.begin()  # of the next run
    assert another.alarm is None and another.change is None and another.watches(5)
    last = Fallback(own, {15: 0.1}, Schedule.explicit(20, (0, 3, 5, 8, 12)), Says({}), "slow")
    assert not last.begin().watches(15) and last.most == 0  # there is nothing to change to


def test_settings_that_do_not_fit_are_all_named() -> None:
    with pytest.raises(ValueError) as caught:
        Fallback(
            OWN, {1: 0.1, 2: math.inf}, Schedule.explicit(5, (0, 1)), Says({}, keeps_predictions=True), "slow"
        )
    expected = ("step 1 is not a full", "inf of step 2", "has 5 steps, the schedule 6", "looks back on predicted")
    for description in expected:
        assert description in str(caught.value)
    with pytest.raises(ValueError, match="fallback needs measure"):
        hand_config(schedule=OWN, timesteps=TIMES, fallback=fallback({2: 0.1}), measure=False)


def test_bounds_are_a_log_normal_s() -> None:
    schedule = Schedule.explicit(10, (0, 3, 8, 9))
    logarithms = torch.linspace(-1, 1, 32) * 0.3 - 2
    errors = {3: logarithms.exp().tolist(), 8: [0.1] * 32, 9: [0.2] * 32}
    bounds = bounds_of(errors, schedule)
    # Step 8 is followed by a full step and 9 by none: only step 3 decides anything.
    assert list(bounds) == [3]
    normal = torch.distributions.Normal(0.0, 1.0)
    z = float(normal.icdf(torch.tensor(1 - ALARMS)))
    expected = math.exp(-2 + z * float(logarithms.std()) * math.sqrt(1 + 1 / 32))
    assert bounds[3] == pytest.approx(expected, rel=1e-4)
    assert bounds_of({3: [0.1, 0.1, float("nan")]}, schedule) == {}
    assert bounds_of({3: [0.1]}, schedule) == {}  # one sample tells nothing of the spread
    assert bounds_of({3: [0.1, 0.1]}, schedule)[3] > 0.1  # two that agree do not make it nothing
    tail = [*errors[3], 0.9]  # one sample far out: what was seen once is no alarm
    assert bounds_of({3: tail}, schedule)[3] == pytest.approx(0.9)
    wide = bounds_of({3: errors[3], 8: errors[8]}, Schedule.explicit(11, (0, 3, 8)))
    assert wide[3] > bounds[3]  # two chances to be beyond a bound: each one wider


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


@pytest.fixture
def pipe(pipeline):
    yield pipeline
    lesa.disable(pipeline)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    return make_bundle(pipeline, tmp_path_factory.mktemp("bundle") / "tiny").path


@pytest.fixture
def bounded(folder: Path, tmp_path: Path) -> Iterator[object]:
    """Makes the bundle with a bound at step 3, 6 or 9 of its budget 1.67x (full steps 0, 1, 2, 3, 6, 9)."""

    def make(bounds: list[float | None]) -> Bundle:
        copy = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        edit(copy, lambda document: document["budgets"]["1.67x"].update(error_bounds=bounds))
        return load_bundle(copy)

    yield make


def picture(pipe) -> torch.Tensor:
    settings = {k: v for k, v in dataclasses.asdict(CALL).items() if v is not None}
    return pipe("a thin seven", output_type="pt", generator=torch.Generator().manual_seed(0), **settings).images


def test_a_run_within_its_bounds_is_the_same_bit_for_bit(pipe, bounded) -> None:
    bundle = bounded([None, None, None, 9.0, 9.0, None])
    lesa.enable(pipe, bundle)
    usual = picture(pipe)
    lesa.disable(pipe)
    lesa.enable(pipe, bundle, adaptive=True)
    assert torch.equal(picture(pipe), usual)
    statistics = lesa.summary(pipe)
    assert statistics.change is None and statistics.num_full == 6
    assert "adaptive: 1.43x where errors are beyond their bounds, at most 1 full steps more" in str(statistics)


def test_a_run_beyond_a_bound_goes_on_with_the_next_slower_budget(pipe, bounded) -> None:
    lesa.enable(pipe, bounded([None, None, None, 1e-9, 9.0, None]), adaptive=True)
    picture(pipe)
    statistics = lesa.summary(pipe)
    # 1.43x has full steps 0, 1, 2 and then every second.
    assert statistics.change == 5 and statistics.schedule.num_full == 6
    assert [r.step for r in statistics.steps if r.kind == "full"] == [0, 1, 2, 3, 5, 7, 9]
    assert "changed over: to 1.43x at step 5" in str(statistics)


def test_the_summary_says_which_errors_are_beyond_their_bounds(pipe, bounded) -> None:
    lesa.enable(pipe, bounded([None, None, None, 9.0, 1e-9, None]))
    picture(pipe)
    statistics = lesa.summary(pipe)
    assert [r.step for r in statistics.steps if statistics.is_beyond(r)] == [6] and statistics.change is None
    assert [s["step"] for s in statistics.to_dict()["steps"] if s["beyond_bound"]] == [6]
    assert "! beyond its bound: the run is not like those" in str(statistics)
    lesa.disable(pipe)
    lesa.enable(pipe, bounded([None, None, None, 9.0, 9.0, None]))
    picture(pipe)
    assert "!" not in str(lesa.summary(pipe))
    lesa.disable(pipe)
    lesa.enable(pipe, bounded([None, None, None, 9.0, 1e-9, None]), interval=5)  # no budget: nothing is known of it
    picture(pipe)
    assert "!" not in str(lesa.summary(pipe))


def test_adaptive_is_refused_where_it_cannot_be(pipe, bounded, folder: Path) -> None:
    bundle = bounded([None, None, None, 9.0, 9.0, None])
    for arguments, description in (
        ({"measure": False}, "needs measure=True"),
        ({"interval": 5}, "interval 5 has no error bounds; choose a budget: "),
        ({"budget": "1.43x"}, "1.43x is the slowest budget of this bundle"),
    ):
        with pytest.raises(ValueError, match=description):
            lesa.enable(pipe, bundle, adaptive=True, **arguments)
    with pytest.raises(ValueError, match="has no error bounds: .*publish the bundle again"):
        lesa.enable(pipe, folder, adaptive=True)
    lesa.enable(pipe, bundle, adaptive=True)
    with pytest.raises(MismatchError, match="error bounds are known for 10 steps"):
        pipe("a thin seven", num_inference_steps=12, height=16, width=16, output_type="latent")
    lesa.disable(pipe)
    from_pictures = FluxImg2ImgPipeline(**pipe.components)
    lesa.enable(from_pictures, bundle, adaptive=True, allow=("pipeline",))
    try:
        with pytest.raises(MismatchError, match="adaptive: not for runs that begin in the middle"):
            from_pictures(
                "a thin seven",
                image=torch.zeros(1, 3, 16, 16),
                strength=0.5,
                num_inference_steps=10,
                height=16,
                width=16,
                max_sequence_length=16,
                output_type="latent",
            )
    finally:
        lesa.disable(from_pictures)


def test_bounds_of_a_bundle_are_checked_and_older_bundles_are_read(folder: Path, bounded, tmp_path: Path) -> None:
    for bad in ([None] * 5, [0.1] * 5 + [0], [0.1] * 5 + ["x"], [0.1] * 5 + [True], [0.1] * 5 + [-1.0], None):
        with pytest.raises(BundleError, match=r"budgets\.1\.67x\.error_bounds(\[5\])?: must be "):
            bounded(bad)

    def older(document):
        document["schema"] = 3
        for budget in document["budgets"].values():
            del budget["error_bounds"]

    shutil.copytree(folder, tmp_path / "older")
    edit(tmp_path / "older", older)
    bundle = load_bundle(tmp_path / "older")
    assert bundle.manifest.budgets["1.67x"].error_bounds == (None,) * 6
    assert json.loads((tmp_path / "older" / "manifest.json").read_text())["schema"] == 3
