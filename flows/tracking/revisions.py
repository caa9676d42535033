"""Which code and which data something was made from: git's and DVC's revisions."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from flows.environment import ROOT

MAKING = ("base", "distil", "record", "train_stage1", "train_stage2")  # stages whose outputs a predictor is made of


def revisions(root: Path = ROOT, workload: str | None = None) -> dict[str, str]:
    """Revisions as flat strings, fit for tags and for a manifest.

    Args:
        root: repository.
        workload: one of data/workloads/dvc.yaml; None or another name takes the root's stages.

    Returns:
        `git` (commit, or "none"), `git_dirty` ("true" when tracked files differ from it), `dvc` (SHA-256 of
        the locked dependencies, parameters and outputs of the stages that make a predictor, or "none").
    """
    return {
        "git": _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or "none",
        "git_dirty": str(bool(_git(root, "status", "--porcelain", "--untracked-files=no"))).lower(),
        "dvc": dvc_revision(root, workload),
    }


def dvc_revision(root: Path, workload: str | None = None) -> str:
    """Digest of the locked stages that make a predictor: judging or publishing again does not change it."""
    of_workload = _locked_stages(root / "data/workloads/dvc.lock", rf"(\w+)(?:-hub)?@{re.escape(str(workload))}")
    stages = of_workload or _locked_stages(root / "dvc.lock", r"(\w+)")
    making = {name: stages[name] for name in MAKING if name in stages}
    text = json.dumps(making, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if making else "none"


def _locked_stages(lock: Path, pattern: str) -> dict[str, Any]:
    """The stages of a lock file whose names match, by the pattern's group; none of a file that cannot be read."""
    try:
        stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
        return {match[1]: stages[name] for name in stages if (match := re.fullmatch(pattern, name))}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
