"""dvc.yaml tells the truth: every stage lists the sources that make its result, and keys that exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lesa.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ORDER = ["base", "record", "search", "train_stage1", "train_stage2", "evaluate", "publish"]

# Sources that every stage uses and that do not make results: settings (their values are listed as params),
# files written safely, prompts read (the files are listed), the registry's and the sampler's own surface.
PLUMBING = {
    "__init__",
    "acceleration",
    "atomic",
    "call_check",
    "card",
    "other_steps",
    "params",
    "prompts",
    "pull",
    "run_check",
    "run_statistics",
    "schedules",
    "strict_json",
    "true_size",
}


# Sources that a stage imports but that have no part in its result.
READING = {"store", "store_chunks", "store_format"}  # what is read is held to its digest
ADAPTIVE = {"fallback"}  # of `lesa.enable(adaptive=True)` alone; the hook imports it
NOT_RUN = {
    "base": set(),
    "record": {"store_chunks"},  # what is there already is not read
    # Training of experts: the search trains step weights alone, and keeps no checkpoints of that.
    "search": READING
    | ADAPTIVE
    | {"checkpoint", "clock", "coordinates", "dmd", "expert", "fit_steps", "forecast", "gate", "history", "kan_eval"}
    | {"projection", "step_counts", "trainable_projection", "training", "windows"},
    # The jobs of both training steps are in one file.
    "train_stage1": READING
    | ADAPTIVE
    | {"closed_loop", "clock", "dmd", "families", "forecast", "history", "hook", "hook_registry", "pipelines"}
    | {"tokens"},
    "train_stage2": READING | ADAPTIVE | {"dmd", "forecast"},  # training-free rules
    "evaluate": READING  # training, and the bundles that `lesa compare` reads
    | ADAPTIVE
    | {
        "bundle",
        "checkpoint",
        "closed_loop",
        "coordinates",
        "ends",
        "fit_steps",
        "jobs",
        "loop",
        "losses",
        "manifest",
        "step_counts",
        "trainable_projection",
        "training",
        "trajectories",
        "windows",
    },
    "publish": READING | ADAPTIVE,
}


def imported(module: Path) -> set[str]:
    """Names of the lesa modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lesa":
                names |= {alias.name for alias in node.names if (ROOT / f"lesa/{alias.name}.py").is_file()}
            elif node.module.startswith("lesa."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lesa.")}
    return names


def closure(start: set[str]) -> set[str]:
    """What these modules import, and what that imports, without going through plumbing."""
    found: set[str] = set()
    waiting = set(start)
    while waiting:
        name = waiting.pop()
        if name in found or name in PLUMBING:
            continue
        found.add(name)
        path = ROOT / f"lesa/{name}.py"
        if path.is_file():
            waiting |= imported(path)
    return found


def own_flows(stage: str) -> set[str]:
    return {
        dep.removeprefix("flows/").removesuffix(".py")
        for dep in STAGES[stage]["deps"]
        if dep.startswith("flows/")
    }


def test_the_stages_and_their_commands():
    assert list(STAGES) == ORDER
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m flows.{name} --workload flux-digits"
        assert f"flows/{name}.py" in stage["deps"]


def test_every_source_listed_exists_and_is_listed_once():
    for name, stage in STAGES.items():
        sources = [dep for dep in stage["deps"] if not dep.startswith("data/")]
        missing = [dep for dep in sources if not (ROOT / dep).exists()]
        assert not missing, f"{name}: {missing}"
        assert len(set(stage["deps"])) == len(stage["deps"]), name


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_lists_what_it_runs(stage):
    """A stage that leaves a source out would keep results that the changed source no longer makes."""
    start = set().union(*(imported(ROOT / f"flows/{name}.py") for name in own_flows(stage)))
    listed = {
        dep.split("/")[1].removesuffix(".py") for dep in STAGES[stage]["deps"] if dep.startswith("lesa/")
    }
    upstream = set()
    if stage == "publish":  # what the gate measures with has made the report, which publish depends on
        upstream = {
            dep.split("/")[1].removesuffix(".py")
            for before in ("train_stage1", "train_stage2", "evaluate", "record")
            for dep in STAGES[before]["deps"]
            if dep.startswith("lesa/")
        }
    missing = closure(start) - listed - upstream - NOT_RUN[stage]
    assert not missing, f"add to {stage}.deps: {sorted(f'lesa/{name}.py' for name in missing)}"


def test_every_key_listed_exists():
    settings = load_params(ROOT / "params.yaml")
    assert settings.name == "flux-digits"
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, stage in STAGES.items():
        for key in stage["params"]:
            place = document
            for part in key.split("."):
                assert part in place, f"{name}: {key}"
                place = place[part]


def test_where_and_how_fast_it_runs_is_no_dependency():
    for stage in STAGES.values():
        for key in stage["params"]:
            assert key.rsplit(".", 1)[-1] not in {
                "device",
                "actors",
                "threads_per_actor",
                "timeout_s",
                "record",
            }


@pytest.mark.slow
def test_dvc_reads_the_file():
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ORDER, done.stderr
