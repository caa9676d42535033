"""The local search through a real, tiny pipeline, and the file between the search and the rest."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lesa.params import BudgetParams, ScheduleParams, SearchParams, Workload
from lesa.schedule import Schedule
from lesa.search import descent, finalists, trials
from lesa.search.descent import DECIBELS, judged_apart, moves, refine
from lesa.search.jobs import cheapest_starts, run_search_job, search_settings, with_schedules
from lesa.search.local_search import moved
from lesa.search.schedules_file import write_schedules
from lesa.training.losses import log_latents_loss
from lesa.training.rollout import accelerated_latents
from lesa.training.step_weights import StepFits
from tests.lesa.training.test_closed_loop import Place, place, small  # noqa: F401 - fixtures


def searched(workload: Workload, count: int = 4, **changes: int) -> Workload:
    budgets = {"2x": BudgetParams(num_full=count)}
    settings = {"descents": 1, "evaluations": 6, "samples": 1, "max_gap": 6} | changes
    return dataclasses.replace(
        workload,
        schedule=ScheduleParams(budgets=budgets, default_budget="2x"),
        search=SearchParams(**settings),
        predictor=dataclasses.replace(workload.predictor, history_sizes=(2, 2)),
    )


def test_moves_are_of_one_full_step_or_all_that_follow_near_ones_first() -> None:
    steps = (0, 1, 5, 9)
    around = [candidate for _, candidate in moved(steps, moves(steps, torch.Generator().manual_seed(0)), 12)]
    assert len(set(around)) == len(around) > 10
    distances = []
    for candidate in around:
        shifts = [b - a for a, b in zip(steps, candidate, strict=True)]
        nonzero = [shift for shift in shifts if shift]
        assert shifts[0] == 0 and len(set(nonzero)) == 1
        assert len(nonzero) == 1 or shifts[-len(nonzero) :] == nonzero
        distances.append(abs(nonzero[0]))
    assert distances == sorted(distances) and set(distances) == {1, 2}
    drawn = [moves(steps, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == sorted(drawn[2])


def test_no_prompt_is_both_run_and_fitted_and_a_run_is_made_once() -> None:
    def apart(rows: str, samples: int, branches: int = 1) -> tuple[list[int], list[int]]:
        prompts = [letter for letter in rows for _ in range(branches)]
        branch = [number for _ in rows for number in range(branches)]
        return judged_apart(SimpleNamespace(prompts=prompts, branch=branch), samples)  # type: ignore[arg-type]

    assert apart("abcdef", 2) == ([4, 5], [0, 1, 2, 3])
    assert apart("abcdef", 5) == ([1, 2, 3, 4, 5], [0])
    assert apart("aabbcc", 2) == ([2, 4], [0, 1])  # two prompts rather than two noises of one
    assert apart("aabbcc", 3) == ([2, 4, 5], [0, 1])  # a second noise only where prompts do not suffice
    assert apart("aabbcc", 4) == ([2, 3, 4, 5], [0, 1])
    assert apart("abcd", 2, branches=2) == ([4, 6], [0, 1, 2, 3])  # of both branches' latents one
    for rows, samples in (("abcd", 4), ("aabb", 3), ("aaaa", 1)):
        with pytest.raises(ValueError, match=f"search.samples: {samples} leaves none of"):
            apart(rows, samples)


def test_the_search_is_not_worse_than_its_start_and_counts_its_runs(place: Place, tmp_path: Path) -> None:  # noqa: F811
    workload = searched(place.workload)
    start = Schedule.explicit(8, (0, 1, 2, 3))
    steps: list[int] = []
    best, figures = refine(
        place.pipe, search_settings(workload), place.train, [start], seed=0, journal=tmp_path / "j.json",
        report=lambda step, values: steps.append(step),
    )  # fmt: skip
    assert figures["error_db"] < figures["start_error_db"] and best.num_full == 4
    assert "trained_error_db" not in figures  # none was trained
    assert steps == list(range(1, int(figures["evaluations"]) + 1)) and len(steps) <= 6
    fits = StepFits(place.train, range(len(place.train) - 1), 3, workload.predictor.ridge, place.pipe.device)
    judged = [len(place.train) - 1]
    with torch.no_grad():
        latents = accelerated_latents(place.pipe, workload.call, best, fits.rule(best), place.train, judged)
    again = float(log_latents_loss(latents, place.train.latents[judged])) * DECIBELS
    assert again == pytest.approx(figures["error_db"], abs=1e-4)


def test_a_killed_search_ends_where_an_undisturbed_one_does(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    settings = search_settings(searched(place.workload))
    start = [Schedule.explicit(8, (0, 1, 2, 3))]

    class Killed(Exception):
        pass

    def kill_at_three(step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    whole = refine(
        place.pipe, settings, place.train, start, seed=0, journal=tmp_path / "a.json", report=lambda *_: None
    )
    with pytest.raises(Killed):
        refine(place.pipe, settings, place.train, start, seed=0, journal=tmp_path / "b.json", report=kill_at_three)
    runs = 0
    real = descent.accelerated_latents

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(descent, "accelerated_latents", counted)
    resumed = refine(
        place.pipe, settings, place.train, start, seed=0, journal=tmp_path / "b.json", report=lambda *_: None
    )
    assert resumed == whole and runs == int(whole[1]["evaluations"]) - 3


def test_a_second_descent_makes_only_runs_that_the_first_did_not(place: Place, tmp_path: Path) -> None:  # noqa: F811
    start = [Schedule.explicit(8, (0, 1, 2, 3))]
    results, made = [], []
    for descents in (1, 2):
        settings = search_settings(searched(place.workload, evaluations=10, descents=descents))
        journal = tmp_path / f"{descents}.json"
        results.append(
            refine(place.pipe, settings, place.train, start, seed=0, journal=journal, report=lambda *_: None)
        )
        made.append([steps for _, steps, _, _ in json.loads(journal.read_text())["runs"]])
    one, two = made
    assert two[: len(one)] == one and len(one) < len(two) <= 20
    assert len({*map(tuple, two)}) == len(two)
    assert results[1][1]["error_db"] <= results[0][1]["error_db"]


def test_what_one_incumbent_eliminated_is_run_again_against_a_worse_one(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """An eliminated trial's error is an estimate: before a later descent takes it for its best, it is run in full."""
    monkeypatch.setattr(trials, "STRIDE", 2)
    monkeypatch.setattr(trials, "BEHIND", 0.0)  # who is behind after two is eliminated
    monkeypatch.setattr(descent, "HOPELESS", math.inf)
    workload = searched(place.workload, evaluations=20, samples=3, descents=4)
    bests: list[tuple[int, ...]] = []
    real = descent.moves

    def noted(steps: tuple[int, ...], *given: object) -> object:
        bests.append(steps)
        return real(steps, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(descent, "moves", noted)
    start = [Schedule.explicit(8, (0, 1, 2, 3)), Schedule.explicit(8, (0, 2, 4, 6))]
    journal = tmp_path / "j.json"
    settings = search_settings(workload)
    best, _ = refine(place.pipe, settings, place.train, start, seed=0, journal=journal, report=lambda *_: None)
    runs = [(tuple(steps), len(errors)) for _, steps, _, errors in json.loads(journal.read_text())["runs"]]
    in_full = [steps for steps, number in runs if number == 3]
    assert {*bests, best.full_steps} <= {*in_full}
    assert len({*in_full}) == len(in_full)
    assert any(number < 3 and (steps, 3) in runs[place:] for place, (steps, number) in enumerate(runs))


@pytest.mark.parametrize("hopeless, begins", [(math.inf, True), (0.1, False)])
def test_no_descent_begins_far_behind_the_best_start(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hopeless: float, begins: bool  # noqa: F811
) -> None:
    monkeypatch.setattr(descent, "HOPELESS", hopeless)
    visited: list[tuple[int, ...]] = []
    monkeypatch.setattr(descent, "moves", lambda steps, *_: visited.append(steps) or [])
    bad, good = Schedule.explicit(8, (0, 1, 2, 3)), Schedule.explicit(8, (0, 2, 4, 6))
    best, _ = refine(
        place.pipe, search_settings(searched(place.workload, descents=2)), place.train, [bad, good], seed=0,
        journal=tmp_path / "j.json", report=lambda *_: None,
    )  # fmt: skip
    assert best == good and visited == [good.full_steps, bad.full_steps if begins else good.full_steps]


def test_the_last_word_has_a_training_through_the_sampler(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """The leaders of the closed form are trained, and the one that then has the lowest error is returned."""
    workload = searched(place.workload, evaluations=12, samples=2, finalists=3, finalist_iterations=12)
    start = [Schedule.explicit(8, (0, 1, 2, 3))]
    trained: dict[tuple[int, ...], float] = {}
    real = descent.error_after_training

    def noted(*given: object, **more: object) -> float:
        error = real(*given, **more)  # type: ignore[arg-type]
        trained[given[3].full_steps] = error  # type: ignore[attr-defined]
        return error

    monkeypatch.setattr(descent, "error_after_training", noted)
    monkeypatch.setattr(finalists, "APART", 1)  # in eight steps there is no room for more
    told: list[dict[str, float]] = []
    journal = tmp_path / "j.json"
    settings = search_settings(workload)
    best, figures = refine(
        place.pipe, settings, place.train, start, seed=0, journal=journal, report=lambda _, values: told.append(values)
    )
    assert len(trained) == 3 and best.full_steps == min(trained, key=trained.__getitem__)
    assert figures["trained_error_db"] == pytest.approx(min(trained.values()) * DECIBELS)
    assert figures["trained_error_db"] < figures["error_db"]
    assert [set(values) for values in told[-3:]] == [{"trained_error_db", "best_trained_error_db"}] * 3
    trained.clear()
    again = refine(place.pipe, settings, place.train, start, seed=0, journal=journal, report=lambda *_: None)
    assert again == (best, figures) and not trained, "what the journal has is not trained again"


def test_a_very_short_training_screens_the_leaders(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    workload = searched(
        place.workload, evaluations=12, samples=2, screened=5, screen_iterations=2, finalists=2, finalist_iterations=9
    )
    trained: dict[int, dict[tuple[int, ...], float]] = {2: {}, 9: {}}
    real = descent.error_after_training

    def noted(*given: object, iterations: int, **more: object) -> float:
        error = real(*given, iterations=iterations, **more)  # type: ignore[arg-type]
        trained[iterations][given[3].full_steps] = error  # type: ignore[attr-defined]
        return error

    monkeypatch.setattr(descent, "error_after_training", noted)
    monkeypatch.setattr(finalists, "APART", 1)
    start = [Schedule.explicit(8, (0, 1, 2, 3))]
    journal = tmp_path / "j.json"
    best, figures = refine(
        place.pipe, search_settings(workload), place.train, start, seed=0, journal=journal, report=lambda *_: None
    )
    assert len(trained[2]) == 5
    assert set(trained[9]) == set(sorted(trained[2], key=trained[2].__getitem__)[:2])
    assert best.full_steps == min(trained[9], key=trained[9].__getitem__)
    assert figures["trained_error_db"] == pytest.approx(trained[9][best.full_steps] * DECIBELS)


def test_search_jobs_and_their_file(place: Place) -> None:  # noqa: F811
    workload = searched(place.workload)
    with pytest.raises(ValueError, match="2x are still to be searched"):
        workload.budgets()
    with pytest.raises(ValueError, match="does not exist: run the search stage"):
        with_schedules(workload)
    (job,) = cheapest_starts(workload, None, lambda *_: None)
    schedule, figures = run_search_job(workload, job, lambda *_: None)
    write_schedules(workload.paths.schedules, 8, {job.budget: (schedule, figures)})
    assert with_schedules(workload).budgets() == {"2x": schedule}
    with pytest.raises(ValueError, match="2x: 5 full steps wanted, found"):
        with_schedules(searched(place.workload, count=5))
    record = json.loads(workload.paths.schedules.read_text())
    workload.paths.schedules.write_text(json.dumps(record | {"num_steps": 9}))
    with pytest.raises(ValueError, match="searched for 9 steps, the call has 8"):
        with_schedules(workload)
    workload.paths.schedules.write_text("[]")
    with pytest.raises(ValueError, match="not a file of searched schedules"):
        with_schedules(workload)
    assert with_schedules(small(place.workload)) == small(place.workload)


def test_of_several_descents_the_best_end_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {(0, 1): 3.0, (0, 2): 1.0, (0, 3): 2.0}
    done = SimpleNamespace(error=errors.__getitem__, count=3)
    monkeypatch.setattr(descent, "local_search", lambda *_, **__: (list(errors), done))
    monkeypatch.setattr(descent.Judge, "of", lambda *_: SimpleNamespace(num_steps=4, judged=[0], trial=None))
    settings = SimpleNamespace(search=SearchParams(descents=3, evaluations=1, samples=1, finalists=1))
    best, figures = refine(
        None, settings, None, [Schedule.explicit(4, (0, 1))], seed=0,  # type: ignore[arg-type]
        journal=tmp_path / "j.json", report=lambda *_: None,
    )  # fmt: skip
    assert best.full_steps == (0, 2) and figures == {"start_error_db": 3.0, "error_db": 1.0, "evaluations": 3.0}


def test_weights_are_never_fitted_on_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search's judge: rows that are run against their own latents, with weights of the other prompts' rows."""
    fitted: list[list[int]] = []
    monkeypatch.setattr(descent, "StepFits", lambda data, rows, *_: fitted.append(rows))
    monkeypatch.setattr(descent, "search_key", lambda *_: "key")
    data = SimpleNamespace(
        prompts=tuple("aabbcc"), branch=(0,) * 6, latents=torch.arange(6.0)[:, None], sigmas=torch.zeros(9)
    )
    settings = SimpleNamespace(
        predictor=SimpleNamespace(step_history=2, ridge=0.1), search=SearchParams(samples=3), call=None
    )
    judge = descent.Judge.of(
        SimpleNamespace(device="cpu"), settings, data, tmp_path / "j.json", lambda *_: None  # type: ignore[arg-type]
    )
    assert judge.judged == [2, 4, 5] and fitted == [judge.fitted] == [[0, 1]]
    monkeypatch.setattr(descent, "accelerated_latents", lambda *given: data.latents[given[-1]] + 0.1)
    errors = judge._errors(Schedule.uniform(8, 2), None, [4, 2])  # type: ignore[arg-type]
    assert errors == pytest.approx([-20.0, -20.0], abs=1e-3)
