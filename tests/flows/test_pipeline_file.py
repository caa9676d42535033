"""dvc.yaml tells the truth: every stage lists the packages that make its result, and keys that exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lesa.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DOCUMENT["stages"]
ORDER = ["base", "record", "search", "train_stage1", "train_stage2", "evaluate", "publish"]

# Code that every stage uses and that makes no result: settings (their values are listed as params), files written and
# read safely, errors, locks, the registry's client.
PLUMBING = {"atomic", "errors", "locks", "params", "params_file", "pull", "strict_json", "validation"}
# What a stage reads is held to its digest: the store to its catalogue, a bundle to its manifest.
READING = {"recording"}
# Packages that a stage's code imports and that have no part in its result, by stage.
NO_PART = {
    # The trainers build their own pipelines; prompts are listed; metrics measure what was made.
    "base": {"models", "recording", "metrics", "predictor", "schedule"},
    "record": {"schedule", "predictor"},  # limits of settings
    "search": READING | {"bundle"},  # the hook's module for adaptive runs knows bundles
    "train_stage1": READING | {"bundle", "models", "sampling"},  # both steps' jobs are in one package
    "train_stage2": READING | {"bundle"},
    "evaluate": READING | {"bundle", "search", "training"},  # checkpoints are read
    "publish": READING | {"training"},
}


def packages_imported(path: Path) -> set[str]:
    """Packages of lesa (or files of its root) that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lesa":
            parts = node.module.split(".")
            names |= {alias.name for alias in node.names} if len(parts) == 1 else {parts[1]}
    return names


def files_of(package: str) -> list[Path]:
    folder = ROOT / "lesa" / package
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def closure(start: set[str]) -> set[str]:
    """These packages, what they import, and what that imports, without going through plumbing."""
    reached: set[str] = set()
    waiting = set(start)
    while waiting:
        name = waiting.pop()
        if name not in reached | PLUMBING:
            reached.add(name)
            waiting |= set().union(*(packages_imported(path) for path in files_of(name)))
    return reached


def listed(stage: str) -> set[str]:
    return {dep.split("/")[1].removesuffix(".py") for dep in STAGES[stage]["deps"] if dep.startswith("lesa/")}


def own_files(stage: str) -> list[Path]:
    """The stage's own files of flows."""
    paths = [ROOT / dep for dep in STAGES[stage]["deps"] if dep.startswith("flows/")]
    return [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]


def test_the_stages_and_their_commands() -> None:
    assert list(STAGES) == ORDER
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m flows.{name} --workload ${{workload}}"
        assert f"flows/{name}.py" in stage["deps"]


def test_every_source_listed_exists_and_is_listed_once() -> None:
    for name, stage in STAGES.items():
        sources = [dep for dep in stage["deps"] if not dep.startswith("data/")]
        missing = [dep for dep in sources if not (ROOT / dep).exists()]
        assert not missing, f"{name}: {missing}"
        assert len(set(stage["deps"])) == len(stage["deps"]), name


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_lists_what_it_runs(stage: str) -> None:
    """A stage that leaves a package out would keep results that the changed package no longer makes."""
    reached = closure(set().union(*(packages_imported(path) for path in own_files(stage))))
    upstream = listed("train_stage2") | listed("evaluate") if stage == "publish" else set()  # by way of the report
    missing = reached - listed(stage) - upstream - NO_PART[stage]
    assert not missing, f"add to {stage}.deps: {sorted(f'lesa/{name}' for name in missing)}"
    assert not NO_PART[stage] & listed(stage), "listed and excepted"


def test_tables_of_rows_are_no_dependency() -> None:
    """A new family or model reruns nothing; what a row says of a workload's own family is a version it tracks."""
    ignored = (ROOT / ".dvcignore").read_text().splitlines()
    assert {"lesa/models/families.py", "lesa/models/published.py"} <= set(ignored)
    for name, stage in STAGES.items():
        tracked = {"lesa/recipes.yaml": ["${family}"]} in stage["params"]
        assert tracked == ("lesa/models" in stage["deps"]), name


def test_every_key_listed_exists() -> None:
    workload = load_params(ROOT / "params.yaml")
    (values,) = DOCUMENT["vars"]
    assert values == {"workload": workload.name, "prompts": workload.prompts, "family": workload.model.family}
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, stage in STAGES.items():
        for key in stage["params"]:
            if isinstance(key, dict):
                continue
            place = document
            for part in key.replace("${workload}", workload.name).split("."):
                assert part in place, f"{name}: {key}"
                place = place[part]


def test_what_the_machine_gives_is_no_dependency() -> None:
    for name, stage in STAGES.items():
        assert not [key for key in stage["params"] if "resources" in str(key)], name
        assert "workloads.${workload}" not in stage["params"], name


def test_later_stages_look_at_the_catalogue_and_not_at_the_store() -> None:
    for name, stage in STAGES.items():
        assert not [dep for dep in stage["deps"] if dep.endswith(".zarr")], name
    readers = {name for name, stage in STAGES.items() if "data/trajectories/${workload}.json" in stage["deps"]}
    assert readers == {"search", "train_stage1", "train_stage2", "publish"}


@pytest.mark.slow
def test_dvc_reads_the_files() -> None:
    def names(*target: str) -> list[str]:
        command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only", *target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert names() == ORDER
    others = names("data/workloads/dvc.yaml")
    assert "data/workloads/dvc.yaml:publish@flux-photos" in others
    assert "data/workloads/dvc.yaml:publish-hub@flux-dev" in others
