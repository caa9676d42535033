"""The pipeline files of the other reference workloads are the repository's, with their names and places."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
TEACHERS = {"schnell-digits": "flux-digits", "lightning-digits": "qwen-digits"}
PAPER = "flux-digits-paper"  # other settings on the model of flux-digits
WORKLOADS = ("flux-photos", "qwen-digits", "hunyuan-moving-digits", *TEACHERS, PAPER)


def written(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"data/workloads/{name}/dvc.yaml").read_text())


@pytest.mark.parametrize("name", WORKLOADS)
def test_it_has_the_default_workloads_stages(name: str) -> None:
    """What tests/flows/test_pipeline_file.py shows of dvc.yaml holds here because the stages are the same."""
    text = (ROOT / "dvc.yaml").read_text().replace("flux-digits", name)
    if teacher := TEACHERS.get(name):  # prompts and scorer are the teacher's
        for kind in ("prompts", "scorers"):
            text = text.replace(f"data/{kind}/{name}", f"data/{kind}/{teacher}")
    if name == PAPER:
        for kind in ("base", "prompts", "scorers"):
            text = text.replace(f"data/{kind}/{name}", f"data/{kind}/flux-digits")
    expected = yaml.safe_load(text)
    if name == PAPER:
        del expected["stages"]["base"]
    for stage in expected["stages"].values():
        stage["wdir"] = "../../.."  # the repository's root
    if teacher:
        base = expected["stages"]["base"]
        base["outs"].remove(f"data/scorers/{teacher}")
        at = base["deps"].index("lesa/reference") + 1
        base["deps"][at:at] = [f"data/base/{teacher}", f"data/scorers/{teacher}"]
    expected["metrics"] = [f"../../../{path}" for path in expected["metrics"]]
    expected["plots"] = [{f"../../../{k}": v for k, v in plot.items()} for plot in expected["plots"]]
    found = written(name)
    assert list(found["stages"]) == list(expected["stages"])
    for key, stage in expected["stages"].items():
        assert found["stages"][key] == stage, f"{key}: copy the change of dvc.yaml"
    assert found == expected


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_key_listed_exists(name: str) -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage, fields in written(name)["stages"].items():
        for key in fields["params"]:
            place = document
            for part in key.split("."):
                assert part in place, f"{stage}: {key}"
                place = place[part]
