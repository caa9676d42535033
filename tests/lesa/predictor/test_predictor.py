"""Experts with their routing, as a sampler uses them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from lesa.predictor.alpha import linear_alpha, time_offsets
from lesa.predictor.predictor import Predictor
from lesa.predictor.projection import fold
from lesa.predictor.rule import History
from lesa.predictor.spec import PROJECTIONS, PredictorSpec, Variant
from lesa.schedule import Schedule, stage_of_steps
from tests.helpers.training_set import sigmas

S, C = 12, 4
SIGMAS = sigmas(S)
SCHEDULE = Schedule.uniform(S, 3)  # full 0 1 2 3 6 9
SPEC = PredictorSpec(
    channels=C,
    num_steps=S,
    boundaries=(0.6,),
    history_sizes=(2, 3),
    variants=(Variant(name="2x", full_steps=tuple(range(6))), Variant(name="3x", full_steps=tuple(range(4)))),
    projection="dense",
    rank=2,
    gate="table",
    hidden=3,
    grid=3,
)


def spec(**changes: Any) -> PredictorSpec:
    return dataclasses.replace(SPEC, **changes)


def tensors_of(spec: PredictorSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in Predictor.tensor_shapes(spec).items():
        tensors[name] = torch.randn(shape, generator=generator)
        if name.endswith("gate.low"):
            tensors[name] = torch.zeros(shape)
        elif name.endswith("gate.high"):
            tensors[name] = torch.ones(shape)
        elif name.endswith(".grid"):
            tensors[name] = torch.linspace(-3, 3, shape[1]).expand(shape).clone()
    return tensors


def run_history(seed: int = 0, dtype: torch.dtype = torch.float32, upto: int = 7) -> History:
    history = History(3)
    generator = torch.Generator().manual_seed(seed)
    for step in SCHEDULE.full_steps:
        if step < upto:
            history.push(step, torch.randn(2, 5, C, generator=generator).to(dtype))
    return history


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("gate", ["kan", "mlp", "table"])
def test_a_bound_predictor_is_the_formula(projection: str, gate: str) -> None:
    """h_t + alpha z with the stage's own projection, alpha from the stage's own gate."""
    predictor = Predictor(
        spec(projection=projection, gate=gate), tensors_of(spec(projection=projection, gate=gate))
    )
    rule = predictor.bind(SCHEDULE, SIGMAS)
    alphas = predictor.alphas(SCHEDULE, SIGMAS)
    stages = stage_of_steps(SIGMAS, (0.6,))
    assert (rule.stages, rule.sizes, rule.history_size) == (tuple(stages), (2, 3), 3)
    assert rule.name == "lesa[2x]" and not rule.keeps_predictions
    for step, upto in ((4, 4), (8, 8), (11, 11)):
        history = run_history(upto=upto)
        stage, size = stages[step], SPEC.history_sizes[stages[step]]
        part = {
            n.removeprefix(f"2x/{stage}/projection."): t
            for n, t in predictor.tensors.items()
            if n.startswith(f"2x/{stage}/projection.")
        }
        z = sum(part["scale"][k] * history.features[k] for k in range(size)) + part["bias"]
        both = torch.cat(history.features[:size], dim=-1)
        if projection == "dense":
            z = z + both @ part["weight"].T
        elif projection == "low_rank":
            z = z + both @ part["down"].T @ part["up"].T
        expected = history.features[0] + float(alphas[step]) * z
        torch.testing.assert_close(rule(history, step), expected, rtol=1e-4, atol=1e-4)
        if gate == "table":
            assert float(alphas[step]) == float(predictor.tensors[f"2x/{stage}/gate.table"][step])


def test_z_is_computed_once_an_anchor_and_the_history_is_left_alone() -> None:
    rule = Predictor(SPEC, tensors_of(SPEC)).bind(SCHEDULE, SIGMAS)
    history = run_history(upto=10)
    before = [feature.clone() for feature in history.features]
    first = rule(history, 10)
    (z,) = history.memo.values()
    second = rule(history, 11)
    assert next(iter(history.memo.values())) is z
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, history.features, strict=True))
    history.push(11, torch.zeros(2, 5, C))
    assert history.memo == {}


def test_one_z_is_kept_where_noise_stages_change_between_full_steps() -> None:
    rule = Predictor(SPEC, tensors_of(SPEC)).bind(SCHEDULE, SIGMAS)
    history = run_history()
    rule(history, 7)
    assert list(history.memo) == [("lesa z", 0)]
    rule(history, 8)
    assert list(history.memo) == [("lesa z", 1)]


def test_dense_weights_are_folded_once_and_cast() -> None:
    predictor = Predictor(SPEC, tensors_of(SPEC))
    rule = predictor.bind(SCHEDULE, SIGMAS, dtype=torch.bfloat16)
    assert set(rule.experts[0]) == {"folded", "bias"}
    assert rule(run_history(dtype=torch.bfloat16), 7).dtype == torch.bfloat16
    folded = fold(predictor.expert(SPEC.variants[0], 0, "projection"))
    assert torch.equal(rule.experts[0]["folded"], folded["folded"].bfloat16())
    assert rule.nbytes == 2 * (2 * C * C + C + 3 * C * C + C)
    assert predictor.nbytes == 4 * sum(t.numel() for t in predictor.tensors.values())


def test_extrapolation_tables_are_exact_for_features_linear_in_sigma() -> None:
    tensors = {name: torch.zeros_like(t) for name, t in tensors_of(SPEC).items()}
    for variant in SPEC.variants:
        for stage in (0, 1):
            tensors[f"{variant.name}/{stage}/gate.high"] += 1
            tensors[f"{variant.name}/{stage}/projection.scale"][0] = 1
            tensors[f"{variant.name}/{stage}/projection.scale"][1] = -1
            for step in SCHEDULE.predicted_steps:
                dt = time_offsets(SIGMAS, step, SCHEDULE.anchors(step, 2))[None]
                tensors[f"{variant.name}/{stage}/gate.table"][step] = linear_alpha(dt)[0]
    rule = Predictor(SPEC, tensors).bind(SCHEDULE, SIGMAS)
    start, slope = torch.randn(2, 5, C), torch.randn(2, 5, C)
    history = History(3)
    for step in range(S):
        true = start + slope * SIGMAS[step]
        if SCHEDULE.is_full(step):
            history.push(step, true)
        else:
            torch.testing.assert_close(rule(history, step), true, rtol=1e-4, atol=1e-4)


def test_alphas_are_nan_only_where_the_history_is_too_short() -> None:
    alphas = Predictor(SPEC, tensors_of(SPEC)).alphas(SCHEDULE, SIGMAS)
    assert alphas.isnan().tolist() == [True, True] + [False] * (S - 2)


def test_a_schedule_gets_the_nearest_variant() -> None:
    predictor = Predictor(SPEC, tensors_of(SPEC))
    assert predictor.spec.variant_for(SCHEDULE).name == "2x"
    assert predictor.spec.variant_for(Schedule.uniform(S, 9)).name == "3x"


def test_experts_for_other_numbers_of_steps_leave_the_budgets_theirs() -> None:
    mixed = spec(gate="kan", step_counts=(8, S))
    trained = Schedule.explicit(S, mixed.variants[1].full_steps)
    assert mixed.variant_for(trained) == mixed.variants[1] and not mixed.variant_for(trained).is_relative
    assert mixed.variant_for(Schedule.uniform(8, 3)).is_relative and mixed.variant_for(SCHEDULE).is_relative


def refusal(predictor: Predictor, schedule: Schedule, levels: torch.Tensor = SIGMAS) -> str:
    with pytest.raises(ValueError) as caught:
        predictor.bind(schedule, levels)
    return str(caught.value)


def test_a_history_that_is_too_short_is_refused() -> None:
    predictor = Predictor(SPEC, tensors_of(SPEC))
    early = Schedule.explicit(S, (0, 5, 9))
    text = refusal(predictor, early)
    assert "history_size 2 of noise stage 0 needs 2 full steps before step 1" in text
    assert "history_size 3 of noise stage 1 needs 3 full steps before step" in text
    steps = spec(history="steps")
    assert "needs 2 steps before step 1" in refusal(Predictor(steps, tensors_of(steps)), early)


def test_offsets_that_were_never_trained_on_are_refused() -> None:
    kan = spec(gate="kan")
    tensors = tensors_of(kan)
    for name in tensors:
        if name.endswith("gate.high"):
            tensors[name] = torch.full_like(tensors[name], 0.3)
    text = refusal(Predictor(kan, tensors), Schedule.explicit(S, (0, 1, 2, 3)))
    assert "outside the range the experts '3x' were trained on" in text and "noise stage" in text


def test_a_table_serves_its_own_number_of_steps() -> None:
    predictor = Predictor(SPEC, tensors_of(SPEC))
    text = refusal(predictor, Schedule.uniform(S + 1, 3), sigmas(S + 1))
    assert "a table of 12 steps and serves no other number" in text
    kan = spec(gate="kan")
    Predictor(kan, tensors_of(kan)).bind(Schedule.uniform(S + 1, 3), sigmas(S + 1))
    assert "needs 13 noise levels, got [14]" in refusal(predictor, SCHEDULE, sigmas(S + 1))


def test_a_gate_that_gives_no_number_is_refused() -> None:
    kan = spec(gate="kan")
    tensors = tensors_of(kan)
    tensors["2x/0/gate.kan.0.grid"] = torch.zeros_like(tensors["2x/0/gate.kan.0.grid"])  # finite, degenerate
    assert "alpha of noise stage 0 is not finite at steps" in refusal(Predictor(kan, tensors), SCHEDULE)


def test_tensors_are_strict() -> None:
    good = tensors_of(SPEC)
    bad = dict(good)
    del bad["2x/0/projection.bias"]
    bad["2x/9/projection.bias"] = torch.zeros(C)
    bad["2x/1/projection.scale"] = torch.zeros(2, C)
    bad["3x/0/gate.table"] = torch.zeros(S, dtype=torch.int64)
    bad["3x/1/gate.low"] = torch.tensor([0.0, float("nan"), 0.0])
    with pytest.raises(ValueError) as caught:
        Predictor(SPEC, bad)
    text = str(caught.value)
    for words in (
        "missing tensor 2x/0/projection.bias",
        "unknown tensor 2x/9/projection.bias",
        "2x/1/projection.scale has shape (2, 4), needs (3, 4)",
        "3x/0/gate.table has dtype torch.int64",
        "3x/1/gate.low has values that are not finite",
    ):
        assert words in text, words


def test_a_spec_survives_json() -> None:
    assert PredictorSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "pickle"}, "kind 'pickle' is not one of lesa"),
        ({"history": "all"}, "history 'all'"),
        ({"projection": "conv"}, "projection 'conv'"),
        ({"gate": "lstm"}, "gate 'lstm'"),
        ({"channels": 0}, "channels must be an integer from 1 to 65536, got 0"),
        ({"channels": True}, r"predictor\.channels: must be int, got bool True"),
        ({"channels": 4.0}, r"predictor\.channels: must be int, got float 4\.0"),
        ({"num_steps": 10**6}, "num_steps must be an integer from 1 to 10000"),
        ({"grid": 65}, "grid must be an integer from 1 to 64"),
        ({"history_sizes": [2]}, "1 boundaries need 2 history sizes"),
        ({"history_sizes": [2, 17]}, r"history_sizes\[1\] must be an integer from 1 to 16"),
        ({"boundaries": [1.5]}, "boundaries must be noise levels"),
        ({"boundaries": ["0.5"]}, r"predictor\.boundaries\[0\]: must be float, got str '0.5'"),
        ({"boundaries": [10**400]}, r"predictor\.boundaries\[0\]: must be float, got int 10000"),
        ({"boundaries": None}, r"predictor\.boundaries: must be a list, got nothing"),
        ({"variants": []}, "number of variants must be an integer from 1 to 32"),
        ({"variants": [{"name": "a"}]}, r"predictor\.variants\[0\]\.full_steps: missing"),
        (
            {"variants": [{"name": "a", "full_steps": [0], "path": "os.system"}]},
            r"predictor\.variants\[0\]\.path: unknown key",
        ),
        ({"variants": [{"name": "a", "full_steps": "3"}]}, r"full_steps: must be a list, got str '3'"),
        ({"variants": [{"name": "a", "full_steps": ["0"]}]}, r"\[0\]\.full_steps\[0\]: must be int, got str '0'"),
        ({"variants": [{"name": "a", "full_steps": [1, 2]}]}, "variant 'a': schedule: full_steps must contain step 0"),
        ({"variants": [{"name": "../a", "full_steps": [0]}]}, r"variant name '../a' must match"),
        ({"variants": [{"name": 5, "full_steps": [0]}]}, r"predictor\.variants\[0\]\.name: must be str, got int 5"),
        ({"variants": [{"name": "a", "full_steps": [0]}] * 2}, "must have different names"),
        ({"kind": "dense"}, "kind 'dense' is not one of lesa, per_step"),
        ({"kind": "per_step", "history": "steps"}, "kind per_step looks back on full_steps"),
    ],
)
def test_a_bad_spec_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PredictorSpec.from_dict(SPEC.to_dict() | change)


def test_keys_of_a_spec_are_strict() -> None:
    data = SPEC.to_dict() | {"class_path": "os.system"}
    del data["rank"]
    with pytest.raises(ValueError, match=r"missing keys \['rank'\], unknown keys \['class_path'\]"):
        PredictorSpec.from_dict(data)
