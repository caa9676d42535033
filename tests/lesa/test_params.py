"""params.yaml: one message with every problem, before anything starts."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa.params import searched_budgets
from lesa.params_file import ParamsError, load_params

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "default_workload": "toy",
    "workloads": {
        "toy": {
            "seed": 1,
            "resources": {"device": "cpu", "record": {"actors": 2}},
            "prompts": "toy",
            "model": {"family": "flux", "source": "data/base/toy"},
            "call": {"height": 16, "width": 16, "num_inference_steps": 50, "guidance_scale": 2},
            "schedule": {
                "default_budget": "5x",
                "budgets": {"5x": {"interval": 7}, "searched": {"full_steps": [0, 1, 2, 5, 30]}},
            },
            "record": {"train_prompts": 8, "validation_prompts": 2},
            "predictor": {"boundaries": [0.8, 0.4], "history_sizes": [3, 3, 3]},
        }
    },
}


def load(tmp_path: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Any:
    document = copy.deepcopy(GOOD)
    if change is not None:
        change(document["workloads"]["toy"])
    return load_text(tmp_path, yaml.safe_dump(document, sort_keys=False))


def load_text(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return load_params(path)


def problems(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, change)
    assert isinstance(caught.value, ValueError)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(workload: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            workload = workload.setdefault(name, {})
        workload[last] = value

    return change


def test_the_repositorys_file_loads() -> None:
    workload = load_params(ROOT / "params.yaml")
    assert workload.name == "flux-digits" and workload.base is not None
    assert searched_budgets(workload.schedule) == {"3x": 16, "5x": 10, "6.25x": 8, "8x": 6}
    with pytest.raises(ValueError, match="3x, 5x, 6.25x, 8x are still to be searched: run the search stage"):
        workload.budgets()
    assert workload.paths.trajectories == Path("data/trajectories/flux-digits.zarr")


def test_what_is_written_is_what_comes_out(tmp_path: Path) -> None:
    workload = load(tmp_path)
    assert workload.call.guidance_scale == 2.0 and isinstance(workload.call.guidance_scale, float)
    assert workload.budgets()["searched"].full_steps == (0, 1, 2, 5, 30)
    assert workload.record.seeds_per_prompt == 1  # a default
    assert workload.predictor.history_sizes == (3, 3, 3)
    assert workload.paths.closed_loop == Path("data/checkpoints/toy/closed_loop")
    with pytest.raises(dataclasses.FrozenInstanceError):
        workload.seed = 3


def test_only_students_have_a_teacher(tmp_path: Path) -> None:
    base = {"trainer": "schnell-digits", "steps": 5}
    assert problems(tmp_path, put("base", base)) == [
        "workloads.toy.base.teacher: required, the folder of the pipeline that schnell-digits learns from"
    ]
    load(tmp_path, put("base", base | {"teacher": "data/base/flux-digits"}))
    base |= {"trainer": "qwen-digits", "teacher": "data/base/flux-digits"}
    assert problems(tmp_path, put("base", base)) == [
        "workloads.toy.base.teacher: qwen-digits is trained without one; leave it out"
    ]


HUB = {"family": "flux", "source": "someone/model"}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("resources.record.actorz", 2, "resources.record.actorz: unknown key; did you mean actors?"),
        ("whatever", 2, "whatever: unknown key; known:"),
        ("call.height", "16", "call.height: must be int, got str '16'"),
        ("call.height", 16.0, "call.height: must be int, got float 16.0"),
        ("call.height", True, "call.height: must be int, got bool True"),
        ("call.height", None, "call.height: must be int, got nothing"),
        ("call.height", 4, "call.height: must be at least 8, got 4"),
        ("call.num_inference_steps", 0, "call.num_inference_steps: must be at least 1"),
        ("call.num_inference_steps", 10**9, "call.num_inference_steps: must be at most 10000"),
        ("call.guidance_scale", "much", "call.guidance_scale: must be float, got str 'much'"),
        ("call.guidance_scale", True, "call.guidance_scale: must be float, got bool True"),
        ("call.guidance_scale", float("nan"), "call.guidance_scale: must be finite"),
        ("call.guidance_scale", float("inf"), "call.guidance_scale: must be finite"),
        ("call.guidance_scale", 10**400, "call.guidance_scale: must be float"),
        ("call", None, "call: must be a mapping, got nothing"),
        ("call", [1], "call: must be a mapping, got list"),
        ("resources.device", "tpu", "resources.device: 'tpu' is not one of auto, cpu, cuda"),
        ("resources.device", False, "resources.device: False is not one of"),
        ("model.dtype", "float16", "model.dtype: 'float16' is not one of float32, bfloat16"),
        ("predictor.gate", "spline", "predictor.gate: 'spline' is not one of kan, mlp, table"),
        ("predictor.history_sizes", 3, "predictor.history_sizes: must be a list, got int 3"),
        ("predictor.history_sizes", [3, "3", 3], "predictor.history_sizes[1]: must be int, got str '3'"),
        ("predictor.hidden", 5000, "predictor.hidden: must be at most 4096"),
        ("predictor.grid", 65, "predictor.grid: must be at most 64"),
        ("ground_truth.iterations", -1, "ground_truth.iterations: must be at least 0"),
        ("record.token_fraction", 0, "record.token_fraction: must be at least 0.001"),
        ("record.token_fraction", 1.5, "record.token_fraction: must be at most 1.0"),
        ("record.seed_offset", 2**70, "record.seed_offset: must be at most"),
        ("schedule.budgets", {}, "schedule.budgets: must be a mapping with at least one entry"),
        ("schedule.budgets.5x", {"interval": 0}, "schedule.budgets.5x.interval: must be at least 1, got 0"),
        ("schedule.budgets.5x", 7, "schedule.budgets.5x: must be a mapping, got int 7"),
        ("name", "other", "name: unknown key; the name is the section's"),
    ],
)
def test_one_wrong_value(tmp_path: Path, path: str, value: Any, words: str) -> None:
    (problem,) = problems(tmp_path, put(path, value))
    assert problem.startswith(f"workloads.toy.{words}"), problem


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.family", "sdxl", "model.family: 'sdxl' is not one of"),
        ("model.source", "someone/model", "model.revision: required for a hub id"),
        ("model", {**HUB, "revision": "main"}, "model.revision: 'main' is not a commit (40 hex"),
        ("model", {**HUB, "revision": "FILL IN"}, "model.revision: 'FILL IN' is not a commit"),
        ("prompts", "../secrets", "prompts: '../secrets' is not a name"),
        ("schedule.default_budget", "4x", "schedule.default_budget: '4x' is not one of"),
        ("schedule.budgets.5x", {}, "schedule.budgets.5x: give one of interval, full_steps and num_full"),
        (
            "schedule.budgets.5x",
            {"interval": 7, "full_steps": [0, 1, 2]},
            "schedule.budgets.5x: give one of interval, full_steps and num_full",
        ),
        ("schedule.budgets.5x", {"interval": 50}, "schedule.budgets.5x.interval: 50 must be below"),
        ("schedule.budgets.A B", {"interval": 7}, "schedule.budgets.A B: not a name"),
        ("schedule.budgets.5x-", {"interval": 7}, "schedule.budgets.5x-: not a name"),
        (
            "schedule.budgets.searched",
            {"full_steps": [0, 1, 2, 99]},
            "schedule.budgets.searched.full_steps: schedule: full_steps [99] lie outside",
        ),
        ("schedule.budgets.searched", {"full_steps": [1, 2, 3]}, "schedule.budgets.searched.full_steps"),
        ("predictor.boundaries", [0.4, 0.8], "predictor.boundaries must decrease"),
        ("predictor.boundaries", [1.5, 0.8], "predictor.boundaries must be noise levels"),
        ("predictor.boundaries", [0.5], "predictor.history_sizes: 1 boundaries make 2 stages, got 3"),
        ("predictor.history_sizes", [17, 3, 3], "predictor.history_sizes: each must be from 1 to 16"),
        ("predictor.history_sizes", [1, 3, 3], "predictor.start: extrapolation needs history_sizes"),
        (
            "predictor.history_sizes",
            [6, 5, 6],
            "schedule.budgets.5x: history_size 5 needs 5 full steps before step 4",
        ),
        ("evaluate.seed_offset", 10_005, "record.seed_offset 10000 and evaluate.seed_offset 10005"),
        ("publish.gate_seed_offset", 20_000, "evaluate.seed_offset 20000 and publish.gate_seed_offset 20000"),
    ],
)
def test_one_impossible_combination(tmp_path: Path, path: str, value: Any, words: str) -> None:
    found = problems(tmp_path, put(path, value))
    assert any(problem.startswith(f"workloads.toy.{words}") for problem in found), found


def test_drifted_states_need_every_token(tmp_path: Path) -> None:
    def change(workload: dict[str, Any]) -> None:
        workload["closed_loop"] = {"gradient": "drifted_states"}
        workload["record"]["token_fraction"] = 0.5

    (problem,) = problems(tmp_path, change)
    assert problem.startswith("workloads.toy.closed_loop.gradient: drifted_states needs every token")


def test_the_search_runs_other_prompts_than_it_fits(tmp_path: Path) -> None:
    def change(samples: int) -> Callable[[dict[str, Any]], None]:
        def apply(workload: dict[str, Any]) -> None:
            workload["schedule"]["budgets"] = {"5x": {"num_full": 10}}
            workload["schedule"]["default_budget"] = "5x"
            workload["record"] |= {"train_prompts": 9, "seeds_per_prompt": 2}
            workload["search"] = {"samples": samples}

        return apply

    (problem,) = problems(tmp_path, change(17))
    assert problem.startswith("workloads.toy.search.samples: 17 must be at most 16") and "9 of them with 2" in problem
    assert load(tmp_path, change(16)).search.samples == 16


@pytest.mark.parametrize(("kind", "enough"), [("per_step", 5), ("lesa", 6)])  # two full steps lead the latter's run
def test_gaps_that_no_schedule_can_bridge_are_refused(tmp_path: Path, kind: str, enough: int) -> None:
    def change(max_gap: int) -> Callable[[dict[str, Any]], None]:
        def apply(workload: dict[str, Any]) -> None:
            workload["schedule"] = {"budgets": {"5x": {"num_full": 10}}, "default_budget": "5x"}
            workload["predictor"]["kind"] = kind
            workload["search"] = {"max_gap": max_gap, "samples": 1}

        return apply

    (problem,) = problems(tmp_path, change(enough - 1))
    assert problem.startswith(f"workloads.toy.search.max_gap: {enough - 1} leaves steps out of reach of budget 5x")
    assert load(tmp_path, change(enough)).search.max_gap == enough


def test_batches_are_refused_where_prompts_are_padded_to_the_longest(tmp_path: Path) -> None:
    def change(workload: dict[str, Any]) -> None:
        workload["model"]["family"] = "qwen-image"
        workload["call"].pop("guidance_scale", None)
        workload["record"]["batch_size"] = 4

    found = problems(tmp_path, change)
    assert any(p.startswith("workloads.toy.record.batch_size: 4 would make a trajectory depend") for p in found), found
    assert load(tmp_path, put("record.batch_size", 4)).record.batch_size == 4


@pytest.mark.parametrize("loop", [{"iterations": 0}, {"gradient": "drifted_states"}])
def test_what_is_not_trained_through_the_sampler_has_no_finalists(tmp_path: Path, loop: dict[str, Any]) -> None:
    def change(workload: dict[str, Any]) -> None:
        workload["search"] = {"finalists": 3}
        workload["closed_loop"] = loop

    (problem,) = problems(tmp_path, change)
    assert "search.finalists: 3 would be trained through the sampler" in problem and "use 1" in problem
    assert load(tmp_path, put("search", {"finalists": 3})).search.finalists == 3


def test_what_has_no_finalists_screens_none(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, put("search", {"screened": 8}))
    assert "search.screened: 8 would be screened for 1 finalist" in problem
    load(tmp_path, put("search", {"screened": 8, "finalists": 2}))


def test_training_seeds_are_even_numbers_and_reach_twice_as_far(tmp_path: Path) -> None:
    """Trajectory n of train.txt has seed offset + 2 n: 6000 of them reach beyond 20000."""
    (problem,) = problems(tmp_path, put("record.train_prompts", 6000))
    assert "record.seed_offset 10000 and evaluate.seed_offset 20000: their noise seeds overlap" in problem
    load(tmp_path, put("record.train_prompts", 5000))


def test_a_history_of_own_predictions_needs_that_many_steps(tmp_path: Path) -> None:
    def change(workload: dict[str, Any]) -> None:
        workload["predictor"] |= {"history": "steps", "history_sizes": [5, 5, 5]}

    found = problems(tmp_path, change)
    assert any("history_size 5 needs 5 steps before step 4" in problem for problem in found), found
    load(tmp_path, put("predictor.history", "steps"))


def test_plain_sampling_is_legal(tmp_path: Path) -> None:
    def change(workload: dict[str, Any]) -> None:
        workload["call"]["num_inference_steps"] = 1
        workload["schedule"]["budgets"] = {"5x": {"interval": 1}}

    assert load(tmp_path, change).budgets()["5x"].predicted_steps == ()
    assert load(tmp_path, put("schedule.budgets.5x", {"interval": 1})).budgets()["5x"].num_full == 50


def with_counts(**record: Any) -> Callable[[dict[str, Any]], None]:
    def change(workload: dict[str, Any]) -> None:
        workload["record"] |= {"train_prompts": 32, "validation_prompts": 8, "step_counts": [20, 100]} | record

    return change


def test_further_numbers_of_steps(tmp_path: Path) -> None:
    assert load(tmp_path).recording.step_counts == (50,) and load(tmp_path).record.step_counts == ()
    workload = load(tmp_path, with_counts())
    assert workload.recording.step_counts == (50, 20, 100)
    assert workload.recording.num_recorded(50) == {"train": 32, "validation": 8}
    assert workload.recording.num_recorded(20) == {"train": 32, "validation": 8}
    few = load(tmp_path, with_counts(step_count_prompts=4))
    assert few.recording.num_recorded(100) == {"train": 4, "validation": 2}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"step_counts": [3]}, "record.step_counts: each must be from 4 to 10000, got [3]"),
        ({"step_counts": [20, 10**5]}, "each must be from 4 to 10000, got [100000]"),
        ({"step_counts": [20, 20]}, "[20, 20] has a number twice"),
        ({"step_counts": [20, 50]}, "50 is call.num_inference_steps: list the others only"),
        ({"step_counts": ["20"]}, "record.step_counts[0]: must be int"),
        ({"train_prompts": 31}, "record.step_count_prompts: 32 makes 32 of record.train_prompts, which is 31"),
        ({"validation_prompts": 7}, "record.step_count_prompts: 32 makes 8 of record.validation_prompts, which is 7"),
        ({"step_count_prompts": 0}, "record.step_count_prompts: must be at least 1"),
    ],
)
def test_further_numbers_of_steps_that_make_no_sense(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in problems(tmp_path, with_counts(**record)))


def test_what_cannot_serve_other_numbers_of_steps_is_refused(tmp_path: Path) -> None:
    def change(workload: dict[str, Any]) -> None:
        with_counts()(workload)
        workload["predictor"]["gate"] = "table"
        workload["schedule"]["budgets"]["mixed"] = {"interval": 4}

    found = "\n".join(problems(tmp_path, change))
    assert "record.step_counts: predictor.gate table knows no other number of steps" in found
    assert "schedule.budgets.mixed: the name is that of the experts for record.step_counts" in found


def test_all_problems_come_together(tmp_path: Path) -> None:
    """Wrong keys, types, ranges and combinations of sound sections, each by its dotted path."""

    def change(workload: dict[str, Any]) -> None:
        workload["call"]["height"] = "16"
        workload["record"]["actorz"] = 1
        workload["predictor"]["boundaries"] = [0.4, 0.8]
        workload["schedule"]["default_budget"] = "4x"
        workload["schedule"]["budgets"]["searched"]["full_steps"] = [1]
        workload["evaluate"] = {"seed_offset": 30_000, "prompts": 1}
        workload["publish"] = {"tail_tolerance_db": -1.0}
        workload["model"]["family"] = "sdxl"
        workload["nonsense"] = {}

    found = "\n".join(problems(tmp_path, change))
    for path in (
        "call.height",
        "record.actorz",
        "predictor.boundaries",
        "schedule.default_budget",
        "evaluate.prompts",
        "publish.tail_tolerance_db",
        "model.family",
        "nonsense",
    ):
        assert f"workloads.toy.{path}" in found, found


def test_combinations_do_not_hide_each_other(tmp_path: Path) -> None:
    def change(workload: dict[str, Any]) -> None:
        workload["schedule"]["budgets"]["searched"]["full_steps"] = [1]
        workload["evaluate"] = {"seed_offset": 10_000}

    found = "\n".join(problems(tmp_path, change))
    assert "schedule.budgets.searched.full_steps" in found and "noise seeds overlap" in found


def test_problems_of_other_workloads_count(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["workloads"]["Second"] = document["workloads"]["toy"]
    document["workloads"]["third"] = None
    document["extra"] = 1
    with pytest.raises(ParamsError) as caught:
        load_text(tmp_path, yaml.dump(document, Dumper=_NoAliases))
    text = "\n".join(caught.value.problems)
    assert "extra: unknown section" in text
    assert "workloads.Second: a name is lower-case" in text
    assert "workloads.third: must be a mapping, got nothing" in text


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def test_missing_sections_and_workloads(tmp_path: Path) -> None:
    found = problems(
        tmp_path, lambda workload: (workload.pop("call"), workload["record"].pop("train_prompts"))
    )
    assert {p.split(": ")[0] for p in found} >= {"workloads.toy.call", "workloads.toy.record.train_prompts"}
    load(tmp_path)
    with pytest.raises(ParamsError, match="workload 'else' is not in the file"):
        load_params(tmp_path / "params.yaml", "else")
    for text, words in (
        ("a: 1", "workloads: must be a mapping"),
        ("workloads: [{toy: 1}]", "workloads: must be a mapping"),
        ("workloads: toy", "workloads: must be a mapping"),
        ("[]", "must be a mapping"),
        ("", "must be a mapping"),
        ("workloads: {toy: {}}", "workload None is not in the file"),
    ):
        with pytest.raises(ParamsError, match=re.escape(words)):
            load_text(tmp_path, text)
    with pytest.raises(ParamsError, match="does not exist; run from the repository root"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "params.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ParamsError, match="not UTF-8"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "duplicate key 'a', line 2"),
        ("workloads: {toy: {seed: 1, seed: 2}}", "duplicate key 'seed'"),
        ("a: !!python/object/apply:os.system ['touch canary']", "tags are refused"),
        ("a: !!python/name:os.system", "tags are refused"),
        ("a: !!binary aGVsbG8=", "tags are refused"),
        ("a: !!int ''", "tags are refused"),
        ("a: &x [1]\nb: *x", "aliases are refused, line 2"),
        ("a: &a {b: 1}\nc: {<<: [*a, *a]}", "aliases are refused, line 2"),
        ("? [1, 2]\n: 3", "keys must be text"),
        ("1: 2", "keys must be text"),
        ("a: 2024-13-45", "not YAML that can be read"),
        ("a: [1", "not YAML that can be read"),
        ("a: " + "[" * 5000, "not YAML that can be read"),
        ("a: 1\x00", "not YAML that can be read"),
    ],
)
def test_hostile_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=re.escape(words)) as caught:
        load_text(tmp_path, text)
    assert len(caught.value.problems) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml"]  # no canary


def test_a_section_takes_a_preset_and_writes_what_it_sets_itself(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD, sort_keys=False).replace("default_workload: toy\n", "")
    head = "default_workload: toy\npresets:\n  small:\n    search: &s {samples: 5, descents: 3}\n"
    text = head + text.replace("    predictor:", "    search: {<<: *s, samples: 7}\n    predictor:")
    workload = load_text(tmp_path, text)
    assert (workload.search.samples, workload.search.descents) == (7, 3)
    for change, problem in (
        (("samples: 5", "sample: 5"), "presets.small.search.sample: unknown key; did you mean samples"),
        (("samples: 5", "samples: 0"), "presets.small.search.samples: must be at least 1"),
        (("    search: &s", "    serach: &s"), "presets.small.serach: not a section of a workload"),
    ):
        with pytest.raises(ParamsError) as caught:
            load_text(tmp_path, text.replace(*change))
        assert any(line.startswith(problem) for line in caught.value.problems), caught.value.problems


def test_a_whole_workload_is_not_taken_by_a_merge(tmp_path: Path) -> None:
    """DVC would lose what `dvc exp run -S` sets in a section of it."""
    text = yaml.safe_dump(GOOD, sort_keys=False).replace("  toy:\n", "  toy: &toy\n")
    with pytest.raises(ParamsError, match="workloads.mine takes a whole workload by `<<`, line"):
        load_text(tmp_path, text + "  mine: {<<: *toy}\n")


def test_an_alias_bomb_is_refused_at_its_first_alias(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ParamsError, match="aliases are refused, line 2"):
        load_text(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    ("written", "got"), [("1e-3", "str '1e-3'"), ("0o17", "str '0o17'"), ("no", "bool False")]
)
def test_surprises_of_yaml(tmp_path: Path, written: str, got: str) -> None:
    text = yaml.safe_dump(GOOD).replace("guidance_scale: 2", f"guidance_scale: {written}")
    with pytest.raises(ParamsError) as caught:
        load_text(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.startswith(f"workloads.toy.call.guidance_scale: must be float, got {got}")
    if written == "1e-3":
        assert "write 1.0e-3" in problem
