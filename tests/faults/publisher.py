"""A publisher of tiny bundles, to be killed: `flows.publish` with all that it writes, down to a SQLite registry.

What takes minutes and writes nothing is given: the bundle's content, and the gate's measurement, which here compares
the quality that two manifests claim.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flows.publish
from flows.publish import publish_bundle
from flows.registry import promotion
from flows.registry.registry import Registry
from flows.tracking.client import connect
from lesa.bundle import Bundle, load_bundle, write_bundle
from lesa.bundle.format import WRITTEN
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.publishing.gate import Decision
from tests.helpers.bundles import make_bundle
from tests.helpers.digests import tree_digest
from tests.helpers.tiny import tiny_flux, tiny_repository

NAME = "lesa-tiny"  # registered model of the workload `tiny`
UNDECIDED = 1.0  # dB; what differs by less is not told apart
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)  # table and column of MLflow's database
WRITES = (  # of an MlflowClient: what changes a registry
    "create_experiment", "create_run", "log_artifacts", "create_registered_model", "create_model_version",
    "set_terminated", "set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag",
    "set_model_version_tag", "log_dict",
)  # fmt: skip


def make_root(root: Path) -> Path:
    """A repository with settings, an empty registry and one bundle that candidates are made of, in `template`."""
    tiny_repository(root)
    pipe = tiny_flux()
    make_bundle(pipe, root / "template")
    connect(root)
    return root


def copy_root(root: Path, folder: Path) -> Path:
    """A copy in `folder` with its registry: MLflow keeps in its database where files are."""
    own = shutil.copytree(root, folder / "repository", symlinks=True)
    with contextlib.closing(sqlite3.connect(own / "mlflow.db")) as database, database:
        for table, column in LOCATIONS:
            database.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(root), str(own)))
    return own


def better(candidate: float, champion: float | None) -> bool | None:
    """The gate's answer by quality in dB; None where it cannot tell."""
    if champion is None:
        return True
    return None if abs(candidate - champion) < UNDECIDED else candidate > champion


def quality(bundle: Bundle) -> float:
    data = bundle.manifest.data
    return float(data["budgets"][data["default_budget"]]["quality"]["psnr_mean"])


def decide(workload: Workload, candidate: Bundle, champion: Bundle | None, log: Any) -> tuple[Decision, dict[str, Any]]:
    answer = better(quality(candidate), None if champion is None else quality(champion))
    reason = {True: "better", False: "worse", None: "undecided"}[answer]
    return Decision(promote=answer is True, reasons=(reason,)), {}


def publish(root: Path, psnr: float) -> dict[str, Any]:
    """Publishes the candidate of this quality from `root`, the working folder; what the stage returns."""

    def build(workload: Workload, log: Any, where: Path) -> Bundle:
        template = load_bundle(root / "template")
        data = {key: value for key, value in template.manifest.data.items() if key not in WRITTEN}
        budgets = {name: {**budget, "quality": {"psnr_mean": psnr}} for name, budget in data["budgets"].items()}
        return write_bundle(workload.paths.bundle, {**data, "budgets": budgets}, template.predictor)

    given: dict[tuple[Any, str], Any] = {
        (flows.publish, "build_bundle"): build,
        (flows.publish, "release_memory"): lambda: None,  # there is none to release, and looking takes seconds
        (promotion, "measure_and_decide"): decide,
    }
    before = {(module, name): getattr(module, name) for module, name in given}
    for (module, name), value in given.items():
        setattr(module, name, value)
    try:
        return publish_bundle(load_params(), logging.getLogger("tests.publisher"), root)
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def die_at(nth: int, act: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL)) -> None:
    """`act` before the n-th write of this process, and never where there are fewer.

    Counted are calls that write to MLflow and calls that commit a file: no machine is too slow for the moment.
    """
    from mlflow import MlflowClient

    left = [nth]

    def counted(true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                act()
            return true(*arguments, **named)

        return call

    for name in WRITES:
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    for name in ("rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def child(root: str, psnr: float, kill_at: int | None, started: Any = None, registry: str = "") -> None:
    """`publish` in a process of its own, which ends itself before its n-th write.

    Args:
        started: an event, set as soon as it is about to work.
        registry: address of another registry than the one of `root`.
    """
    os.chdir(root)
    os.environ["LESA_CACHE"] = str(Path(root) / "cache")
    if registry:
        os.environ["MLFLOW_TRACKING_URI"] = registry
    if kill_at is not None:
        die_at(kill_at)
    if started is not None:
        started.set()
    publish(Path(root), psnr)


def end_state(root: Path) -> dict[str, Any]:
    """All that a publisher leaves, without times, names of runs, and what MLflow itself leaves half sent."""
    registry = Registry(NAME, root)
    client = registry.client
    versions = {}
    for found in client.search_model_versions(f"name = '{NAME}'"):
        run = client.get_run(found.run_id)
        folder = Path(run.info.artifact_uri.removeprefix("file://"))
        versions[str(found.version)] = {
            "tags": _without_reasons(found.tags),
            "status": run.info.status,
            "bundle": tree_digest(folder / "bundle"),
            "files": sorted(
                path.relative_to(folder).as_posix()
                for path in folder.rglob("*")
                if path.is_file() and not path.name.startswith(".artifact.uploading.")
            ),
        }
    bundles = root / "data/bundles"
    return {
        "versions": versions,
        "runs": len(client.search_runs([client.get_experiment_by_name(NAME).experiment_id])),
        "aliases": {name: str(number) for name, number in client.get_registered_model(NAME).aliases.items()},
        "history": [(e.number, e.kind, e.version, e.before, e.is_applied) for e in registry.history.entries()],
        "placed": {path.name: tree_digest(path) for path in bundles.iterdir()},
    }


def _without_reasons(tags: Mapping[str, str]) -> dict[str, str]:
    """Who died after its promotion was recorded and publishes again hears that its bundle is champion already."""
    return {key: value for key, value in tags.items() if key != "gate.reasons"}
