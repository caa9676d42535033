"""Registry -> bundle folder: the only module that knows MLflow, and only inside its functions."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lesa.errors import LesaError
from lesa.redaction import redacted

if TYPE_CHECKING:
    from lesa.bundle import Bundle

DIGEST_TAG = "manifest_sha256"  # pins the bundle from outside the bundle
REGISTRY_PREFIX = "models:/"
_URI = re.compile(
    r"models:/([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,127})|/([0-9]{1,9}))"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


class PullError(LesaError):
    """A bundle that could not be had from the registry, and what to do about it."""


def bundle_from(source: str | Path, expected_digest: str | None = None) -> Bundle:
    """A bundle out of a folder, or out of the registry where the source is an address `models:/...`.

    Args:
        expected_digest: SHA-256 that its manifest must have; of a registered bundle None takes the registry's.

    Raises:
        BundleError: it is not what its digests say.
        PullError: as `pull`.
    """
    from lesa.bundle import load_bundle

    if not str(source).startswith(REGISTRY_PREFIX):
        return load_bundle(source, expected_digest=expected_digest)
    folder = pull(str(source))
    return load_bundle(folder, expected_digest=expected_digest or folder.name)


def pull(uri: str, tracking_uri: str | None = None) -> Path:
    """A local folder with the bundle of a registered version, named by the SHA-256 of its manifest.

    The folder lies in a private cache (`LESA_CACHE`, else `~/.cache/lesa`); a version whose bundle is there
    is not downloaded again. `load_bundle(folder, expected_digest=folder.name)` holds it to the registry's
    word.

    Args:
        uri: `models:/name@alias` or `models:/name/version`.
        tracking_uri: where the registry is; None takes MLFLOW_TRACKING_URI, else ./mlflow.db if it exists.

    Raises:
        PullError: naming what is missing; a database is never created.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise PullError(f"{uri!r} is not of the form models:/name@alias or models:/name/version")
    name, alias, number = parts.groups()
    registry = _registry(tracking_uri)
    client_class = _client_class()
    try:
        client = client_class(tracking_uri=registry, registry_uri=registry)
        version = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, number)
        )
        digest = str(dict(version.tags).get(DIGEST_TAG, ""))
        if not _DIGEST.fullmatch(digest):
            raise PullError(
                f"{uri} (version {version.version}) has no tag {DIGEST_TAG}: it was not published by lesa, "
                "and nothing says which bytes it should have"
            )
        folder = _cache() / digest
        if not folder.is_dir() or _problem(folder, digest) is not None:
            # Not by its models:/ address: MLflow would look that up in its default registry, and make one.
            source = client.get_model_version_download_uri(name, version.version)
            _download(source, registry, folder, digest)
    except PullError:
        raise
    except Exception as error:  # MLflow's errors, and those of the store behind it
        text = " ".join(redacted(str(error)).split())[:500]
        raise PullError(f"{uri} from {redacted(registry)}: {text}") from None
    return folder


def _registry(tracking_uri: str | None) -> str:
    given = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if given is None:
        local = Path("mlflow.db").resolve()
        if not local.is_file():
            raise PullError(
                f"no registry: set MLFLOW_TRACKING_URI, or run where mlflow.db is ({local.parent} has none), "
                "or give the folder of a bundle"
            )
        given = f"sqlite:///{local}"
    if given.startswith("sqlite:///"):
        # MLflow would create what is missing, and an empty registry would look like a missing model.
        database = Path(given.removeprefix("sqlite:///"))
        if not database.is_file() or not _is_registry(database):
            raise PullError(f"the registry's database {database} does not exist; nothing is created here")
    return given


def _is_registry(database: Path) -> bool:
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
            found = connection.execute("select 1 from sqlite_master where name = 'model_versions'")
            return found.fetchone() is not None
    except sqlite3.DatabaseError:
        return False


def _client_class() -> Any:
    for name, value in (
        ("DO_NOT_TRACK", "true"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),  # the default keeps a caller waiting for minutes
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ):
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise PullError(
            "pulling from a registry needs mlflow: pip install mlflow, or give the folder of a bundle"
        ) from None
    return MlflowClient


def _download(source: str, registry: str, folder: Path, digest: str) -> None:
    from mlflow.artifacts import download_artifacts

    scratch = Path(tempfile.mkdtemp(prefix="pull.", dir=folder.parent))  # private, beside its target
    try:
        made = Path(download_artifacts(artifact_uri=source, dst_path=str(scratch), tracking_uri=registry))
        problem = _problem(made, digest)
        if problem is not None:
            raise PullError(
                f"{redacted(source)}: not the bundle that was registered: {problem}; register it again or "
                "move the alias back"
            )
        if folder.exists():
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            if _problem(folder, digest) is not None:  # else another process was quicker
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _problem(folder: Path, digest: str) -> str | None:
    """Why the folder is not the bundle with this digest; None if it is, to the last byte."""
    from lesa.bundle import BundleError, load_bundle

    try:
        load_bundle(folder, expected_digest=digest)
    except BundleError as error:
        return "; ".join(error.problems)
    return None


def _cache() -> Path:
    base = os.environ.get("LESA_CACHE") or str(Path.home() / ".cache" / "lesa")
    folder = Path(base).expanduser() / "bundles"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PullError(
            f"{folder} can be written by others: chmod 700 it, or set LESA_CACHE to a private folder"
        )
    return folder
