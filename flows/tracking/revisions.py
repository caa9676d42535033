"""Which code and which data something was made from: git's and DVC's revisions."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import yaml

from flows.environment import ROOT

MAKING = ("base", "record", "train_stage1", "train_stage2")  # stages whose outputs a predictor is made of


def revisions(root: Path = ROOT, workload: str | None = None) -> dict[str, str]:
    """Revisions as flat strings, fit for tags and for a manifest.

    Args:
        root: repository.
        workload: one that has a pipeline file of its own under data/workloads; None or another name takes the
            root's.

    Returns:
        `git` (commit, or "none"), `git_dirty` ("true" when tracked files differ from it), `dvc` (SHA-256 of
        the locked dependencies, parameters and outputs of the stages that make a predictor, or "none").
    """
    own = root / "data" / "workloads" / str(workload) / "dvc.lock"
    lock = own if workload is not None and own.parent.is_dir() else root / "dvc.lock"
    return {
        "git": _git(root, "rev-parse", "--verify", "--quiet", "HEAD") or "none",
        "git_dirty": str(bool(_git(root, "status", "--porcelain", "--untracked-files=no"))).lower(),
        "dvc": dvc_revision(lock),
    }


def dvc_revision(lock: Path) -> str:
    """Digest of a lock file's making stages: judging or publishing again does not change it."""
    try:
        stages = yaml.safe_load(lock.read_text())["stages"]
        making = {name: stages[name] for name in MAKING if name in stages}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "none"
    text = json.dumps(making, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if making else "none"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
