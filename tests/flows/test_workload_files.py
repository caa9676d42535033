"""data/workloads/dvc.yaml: the root's stages for every other workload, and every workload in its lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa.models.families import FAMILIES
from lesa.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]
HEAD = yaml.safe_load((ROOT / "dvc.yaml").read_text())
FILE = yaml.safe_load((ROOT / "data/workloads/dvc.yaml").read_text())
LISTS: dict[str, dict[str, dict[str, str]]] = {name: rows for entry in FILE["vars"] for name, rows in entry.items()}
DOCUMENT = yaml.safe_load((ROOT / "params.yaml").read_text())
OTHERS = [name for name in DOCUMENT["workloads"] if name != DOCUMENT["default_workload"]]


def written(stage: dict[str, Any], key: str, item: dict[str, str]) -> dict[str, Any]:
    """A templated stage with one workload's values, as DVC fills it in."""
    text = yaml.safe_dump(stage).replace("${key}", key)
    for name, value in item.items():
        text = text.replace(f"${{item.{name}}}", value)
    assert "${" not in text, text
    return yaml.safe_load(text)


def stages_of(workload: str) -> dict[str, dict[str, Any]]:
    """The stages of a workload, by the name of their flow."""
    found = {}
    for name, stage in FILE["stages"].items():
        rows = LISTS[stage["foreach"].strip("${}")]
        if workload in rows:
            base = name.split("-")[0] if name != "distil" else "base"
            assert base not in found, f"{workload} has {base} twice"
            found[base] = written(stage["do"], workload, rows[workload])
    return found


def test_every_workload_of_the_settings_has_stages_and_no_other() -> None:
    assert sorted(LISTS["every"]) == sorted(OTHERS)
    assert LISTS["every"] == LISTS["scored"] | LISTS["given"] | LISTS["hub"]
    assert LISTS["local"] == LISTS["scored"] | LISTS["given"]
    trained = [name for name in OTHERS if "base" in DOCUMENT["workloads"][name]]
    assert sorted([*LISTS["trained"], *LISTS["distilled"]]) == sorted(trained)


@pytest.mark.parametrize("name", OTHERS)
def test_the_lists_say_what_the_settings_say(name: str) -> None:
    workload, row = load_params(ROOT / "params.yaml", name), LISTS["every"][name]
    assert row["family"] == workload.model.family and row["prompts"] == workload.prompts
    assert row.get("scorer") == (workload.scorer and Path(workload.scorer).name)
    if "model" in row:
        assert workload.model.source == f"data/base/{row['model']}"
    else:
        assert workload.model.revision is not None
    if name in LISTS["distilled"]:
        assert workload.base is not None
        assert workload.base.teacher == f"data/base/{LISTS['distilled'][name]['teacher']}"


@pytest.mark.parametrize("name", OTHERS)
def test_a_workload_has_the_roots_stages_with_its_own_places(name: str) -> None:
    """What test_pipeline_file.py shows of dvc.yaml holds here because the stages are the same."""
    row, found = LISTS["every"][name], stages_of(name)
    model, scorer = f"data/base/{row.get('model')}", f"data/scorers/{row.get('scorer')}"
    expected = yaml.safe_load(
        yaml.safe_dump(HEAD["stages"], sort_keys=False)
        .replace("data/base/${workload}", model)
        .replace("data/scorers/${workload}", scorer)
        .replace("${workload}", name)
        .replace("${prompts}", row["prompts"])
        .replace("${family}", row["family"])
    )
    base = expected.pop("base")
    own = found.pop("base", None)
    assert list(found) == list(expected)
    for stage, fields in expected.items():
        gone = {path for path, key in ((model, "model"), (scorer, "scorer")) if key not in row}
        fields["deps"] = [dep for dep in fields["deps"] if dep not in gone]
        assert found[stage] == {**fields, "wdir": "../.."}, f"{stage}: copy the change of dvc.yaml"
    if own is not None:
        teacher = LISTS["distilled"].get(name, {}).get("teacher")
        added = [f"data/base/{teacher}", f"data/scorers/{teacher}"] if teacher else []
        assert sorted(own["deps"]) == sorted([*base["deps"], *added])
        assert own["outs"] == [f"data/base/{name}"] + ([] if teacher else [f"data/scorers/{name}"])
        assert own["cmd"] == f"python -m flows.base --workload {name}" and own["metrics"] == base["metrics"]


@pytest.mark.parametrize("name", OTHERS)
def test_every_key_listed_is_set(name: str) -> None:
    for stage, fields in stages_of(name).items():
        for key in fields["params"]:
            if isinstance(key, dict):
                assert key == {"lesa/recipes.yaml": [LISTS["every"][name]["family"]]}
                continue
            place = DOCUMENT
            for part in key.split("."):
                assert part in place, f"{stage}: {key}"
                place = place[part]


def test_numbers_and_curves_of_every_workload_are_known_to_dvc() -> None:
    assert sorted(FILE["metrics"]) == sorted(f"../reports/{name}/metrics.json" for name in OTHERS)
    drawn = {path: options for plot in FILE["plots"] for path, options in plot.items()}
    of_root = {path: options for plot in HEAD["plots"] for path, options in plot.items()}
    assert drawn == {
        path.replace("data", "..").replace("${workload}", name): options
        for path, options in of_root.items()
        for name in OTHERS
    }


def test_every_family_has_a_recipe() -> None:
    recipes = yaml.safe_load((ROOT / "lesa/recipes.yaml").read_text())
    assert recipes.keys() == FAMILIES.keys()
    assert all(isinstance(version, int) and version >= 1 for version in recipes.values())
