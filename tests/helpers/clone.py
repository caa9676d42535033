"""A clone of this working tree with a tiny workload of its own, to run the whole pipeline in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.tiny import tiny_repository

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = {
    "train": ["a thin seven", "a bold two, top left", "a red house on the left", "the blue cat"],
    "validation": ["a dog on the left", "the white dog"],
    "test": ["a black cat", "a bold nine", "the red dog", "a thin house"],
}
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "schedule": {"budgets": {"2x": {"num_full": 4}}, "default_budget": "2x"},
    "search": {"evaluations": 4, "samples": 1, "max_gap": 6},
    "predictor": {"kind": "per_step", "boundaries": [0.5], "history_sizes": [2, 2], "grid": 3, "hidden": 3},
    "ground_truth": {"iterations": 3, "batch_size": 2, "checkpoint_every": 2},
    "closed_loop": {
        "iterations": 2, "batch_size": 2, "checkpoint_every": 1, "gradient_clip": 1.0, "step_learning_rate": 0.01
    },
    "evaluate": {
        "prompts": 4,
        "seeds_per_prompt": 1,
        "converged_fraction": 0.0,
        "batch_size": 2,
        "bootstrap": 100,
        "wall_clock_repeats": 1,
    },
    "publish": {"gate_prompts": 4, "gate_max_samples": 8},
    "resources": {
        "device": "cpu",
        "record": {"actors": 1, "timeout_s": 60},
        "search": {"workers": 1},
        "ground_truth": {"workers": 1},
        "closed_loop": {"workers": 1},
        "evaluate": {"workers": 2},
    },
}


def clone(folder: Path) -> Path:
    """A git repository in `folder` with the code as it lies here, one tiny workload and its pipeline file."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if name.startswith(("tests/", "data/", "benchmarks/")) or not (ROOT / name).is_file():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    tiny_repository(folder, prompts=PROMPTS, actors=1, seed_offset=10_000)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["workloads"]["tiny"] |= SETTINGS
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.yaml").write_text(tiny_pipeline())
    commit(folder, "Start")
    return folder


def tiny_pipeline() -> str:
    """The repository's own pipeline file for the tiny workload; its model is given, so nothing trains one."""
    document = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    document["vars"] = [{"workload": "tiny", "prompts": "tiny", "family": "flux"}]
    del document["stages"]["base"]
    document["stages"]["evaluate"]["deps"].remove("data/scorers/${workload}")
    return yaml.safe_dump(document, sort_keys=False)


def commit(folder: Path, message: str) -> None:
    if not (folder / ".git").is_dir():
        git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(
        folder,
        "-c",
        "user.name=tests",
        "-c",
        "user.email=tests@localhost",
        "commit",
        "--quiet",
        "-m",
        message,
    )


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def environment(**more: str) -> dict[str, str]:
    """The environment for commands in a clone: its own state, this Python first on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RAY_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run(folder: Path, *arguments: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m <arguments>` in a clone."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
