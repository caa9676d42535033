"""The pipeline file of flux-photos is the repository's, with that workload's name and places."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
FILE = ROOT / "data/workloads/flux-photos/dvc.yaml"


def test_it_has_the_default_workloads_stages() -> None:
    """What tests/flows/test_pipeline_file.py shows of dvc.yaml holds here because the stages are the same."""
    expected = yaml.safe_load((ROOT / "dvc.yaml").read_text().replace("flux-digits", "flux-photos"))
    for stage in expected["stages"].values():
        stage["wdir"] = "../../.."  # the repository's root
    expected["metrics"] = [f"../../../{path}" for path in expected["metrics"]]
    expected["plots"] = [{f"../../../{k}": v for k, v in plot.items()} for plot in expected["plots"]]
    written: dict[str, Any] = yaml.safe_load(FILE.read_text())
    assert list(written["stages"]) == list(expected["stages"])
    for name, stage in expected["stages"].items():
        assert written["stages"][name] == stage, f"{name}: copy the change of dvc.yaml"
    assert written == expected


def test_every_key_listed_exists() -> None:
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, stage in yaml.safe_load(FILE.read_text())["stages"].items():
        for key in stage["params"]:
            place = document
            for part in key.split("."):
                assert part in place, f"{name}: {key}"
                place = place[part]
