"""Stage `base`: refused before anything is trained where the model has no prompts of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.base import base
from lesa.recording.prompts import PromptError
from tests.helpers.tiny import tiny_repository


def test_a_model_without_prompts_of_its_own_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny_repository(tmp_path)
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["workloads"]["tiny"] |= {
        "scorer": "data/scorers/tiny",
        "base": {"trainer": "flux-digits", "steps": 1, "batch_size": 2, "learning_rate": 0.001},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    before = (root / "data/base/tiny/model_index.json").read_bytes()
    monkeypatch.chdir(root)
    monkeypatch.setattr("flows.stage.ROOT", root)
    with pytest.raises(PromptError, match=r"data/prompts/tiny/base\.txt does not exist; .* no predictor is trained on"):
        base.fn("tiny")
    assert (root / "data/base/tiny/model_index.json").read_bytes() == before
    assert not (root / "data/metrics").exists()
