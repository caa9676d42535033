"""The pipeline files of the published models are that of flux-photos, without the stage that trains a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa.models.published import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PATTERN = "flux-photos"


def stages(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"data/workloads/{name}/dvc.yaml").read_text())


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_pipeline_file_follows_the_pattern(name: str) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())["workloads"][name]
    expected = stages(PATTERN)
    del expected["stages"]["base"]
    is_local = settings["model"]["source"].startswith("data/")
    for stage in expected["stages"].values():
        given = {f"data/scorers/{PATTERN}"} | (set() if is_local else {f"data/base/{PATTERN}"})
        stage["deps"] = [dep for dep in stage["deps"] if dep not in given]
    text = yaml.safe_dump(expected).replace(f"data/prompts/{PATTERN}", f"data/prompts/{settings['prompts']}")
    assert stages(name) == yaml.safe_load(text.replace(PATTERN, name))


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_key_listed_is_set(name: str) -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage, fields in stages(name)["stages"].items():
        for key in fields["params"]:
            place = document
            for part in key.split("."):
                assert part in place, f"{stage}: {key}"
                place = place[part]
