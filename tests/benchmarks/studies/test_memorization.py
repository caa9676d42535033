"""Training images beside held-out ones: the means, their difference, and what is left of it beside a rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies.memorization import CONTROL, compared, first_noises, learned_by_heart, table
from lesa.evaluation.compare import evaluate_methods
from lesa.evaluation.measure import samples
from lesa.models.pipelines import load_pipeline
from lesa.params_file import load_params
from lesa.peers.rules import rule_method
from lesa.recording.dataset import recorded_splits
from lesa.schedule import Schedule
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_repository(tmp_path, prompts={**SPLITS, "test": ["a black cat", "a photo"]}))
    found = load_params()
    return dataclasses.replace(
        found,
        record=dataclasses.replace(found.record, seeds_per_prompt=2),
        evaluate=dataclasses.replace(found.evaluate, bootstrap=200, converged_fraction=0.0),
    )


def test_training_images_stand_beside_held_out_ones_and_a_rule(workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    record(workload, pipe)
    train_set, _ = recorded_splits(workload.recording)
    noises = first_noises(train_set)
    assert sorted(noises) == sorted(SPLITS["train"]) and len(train_set.prompts) == 2 * len(noises)
    for prompt, noise in noises.items():
        own = [seed for p, seed in zip(train_set.prompts, train_set.seeds, strict=True) if p == prompt]
        assert noise == min(own)

    schedule = Schedule.explicit(workload.call.num_inference_steps, (0, 1, 2, 5))
    rules = {CONTROL: "taylor1", "again": "taylor1", "other": "taylor2"}
    methods = [rule_method(rule, "2x", schedule, name=name, label=name) for name, rule in rules.items()]
    settings = {"call": workload.call, "settings": workload.evaluate, "timing": False}
    held_out = evaluate_methods(pipe, methods, *samples(["a black cat", "a photo"], 3, 500), **settings)
    found = learned_by_heart(workload, pipe, methods, train_set, held_out, fresh_seed=900)

    images = evaluate_methods(pipe, methods, list(noises), list(noises.values()), **settings)
    for name in rules:
        mean = images.values("2x", name).mean()
        heart = found[f"2x/{name}"]
        assert heart.images == pytest.approx(mean) and heart.images != heart.prompts
        assert heart.gap.mean == pytest.approx(mean - held_out.values("2x", name).mean())
        assert heart.gap.low < heart.gap.mean < heart.gap.high
    lead = [np.mean(r.values("2x", "other") - r.values("2x", CONTROL)) for r in (images, held_out)]
    assert found["2x/other"].net.mean == pytest.approx(lead[0] - lead[1])
    assert found["2x/again"].net == (0.0, 0.0, 0.0)  # no lead over the rule on either side
    assert found[f"2x/{CONTROL}"].net is None
    text = table(found)
    assert text.count("\n") == 4 and f"{found['2x/other'].gap.mean:+.2f} [" in text

    assert compared(images, images, images)["2x/other"].gap.mean == 0.0
    with pytest.raises(ValueError, match=f"no {CONTROL} at 2x"):
        learned_by_heart(workload, pipe, methods[1:], train_set, held_out, fresh_seed=900)
