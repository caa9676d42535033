"""Registry -> bundle folder: the only module that knows MLflow, and only inside its functions."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from lesa import atomic, strict_json
from lesa.errors import LesaError, redacted

if TYPE_CHECKING:
    from lesa.bundle import Bundle

DIGEST_TAG = "manifest_sha256"  # pins the bundle from outside the bundle
REGISTRY_PREFIX = "models:/"
_URI = re.compile(
    r"models:/([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,127})|/([0-9]{1,9}))"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
ANSWER_SECONDS = 5.0  # that a registry has where a cached bundle would do
# What a registry that is up says of a request; anything else is a fault on the way to it.
_ANSWERS = {
    "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED", "UNAUTHENTICATED",
    "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "NOT_FOUND",
}  # fmt: skip
_LOG = logging.getLogger("lesa.pull")
_Answer = TypeVar("_Answer")


class PullError(LesaError):
    """A bundle that could not be had from the registry, and what to do about it."""


def bundle_from(source: str | Path, expected_digest: str | None = None, *, cached_days: float = 0.0) -> Bundle:
    """A bundle out of a folder, or out of the registry where the source is an address `models:/...`.

    Args:
        expected_digest: SHA-256 that its manifest must have; of a registered bundle None takes the registry's.
        cached_days: as `pull`.

    Raises:
        BundleError: it is not what its digests say.
        PullError: as `pull`.
    """
    from lesa.bundle import load_bundle

    if not str(source).startswith(REGISTRY_PREFIX):
        return load_bundle(source, expected_digest=expected_digest)
    folder = pull(str(source), cached_days=cached_days)
    return load_bundle(folder, expected_digest=expected_digest or folder.name)


def pull(uri: str, tracking_uri: str | None = None, *, cached_days: float = 0.0) -> Path:
    """A local folder with the bundle of a registered version, named by the SHA-256 of its manifest.

    The folder lies in a private cache (`LESA_CACHE`, else `~/.cache/lesa`); a version whose bundle is there
    is not downloaded again. `load_bundle(folder, expected_digest=folder.name)` holds it to the registry's
    word.

    Args:
        uri: `models:/name@alias` or `models:/name/version`.
        tracking_uri: where the registry is; None takes MLFLOW_TRACKING_URI, else ./mlflow.db if it exists.
        cached_days: where the registry does not answer within seconds, the bundle that it named for this address
            at most so many days ago is taken from the cache, and a warning says how old that answer is. 0: never.

    Raises:
        PullError: naming what is missing; a database is never created.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise PullError(f"{uri!r} is not of the form models:/name@alias or models:/name/version")
    name, alias, number = parts.groups()
    registry, cache = _registry(tracking_uri), _private("bundles")
    client_class = _client_class()

    def ask() -> tuple[Any, Any]:
        client = client_class(tracking_uri=registry, registry_uri=registry)
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        if str(version.name) != name:  # what MLflow's client makes of an empty answer
            raise ConnectionError("what answers there is not the registry: the answer names no version of the model")
        return client, version

    try:
        is_remote = registry.startswith(("http:", "https:"))
        client, version = _within(ANSWER_SECONDS, ask) if cached_days > 0 and is_remote else ask()
        digest = _digest_of(uri, version)
        if not (cache / digest).is_dir() or _problem(cache / digest, digest) is not None:
            # Not by its models:/ address: MLflow would look that up in its default registry, and make one.
            source = client.get_model_version_download_uri(name, version.version)
            _download(_present(source, registry), registry, cache / digest, digest)
    except PullError:
        raise
    except Exception as error:  # MLflow's errors, and those of the store behind it
        text = " ".join(redacted(str(error)).split())[:500]
        problem = PullError(f"{uri} from {redacted(registry)}: {text}")
        if cached_days <= 0 or getattr(error, "error_code", None) in _ANSWERS:
            raise problem from None
        return _last_answer(uri, registry, cache, cached_days, problem)
    _note_answer(uri, registry, digest)
    return cache / digest


def _digest_of(uri: str, version: Any) -> str:
    digest = str(dict(version.tags).get(DIGEST_TAG, ""))
    if not _DIGEST.fullmatch(digest):
        raise PullError(
            f"{uri} (version {version.version}) has no tag {DIGEST_TAG}: it was not published by lesa, "
            "and nothing says which bytes it should have"
        )
    return digest


def _within(seconds: float, act: Callable[[], _Answer]) -> _Answer:
    """What `act` returns or raises; TimeoutError where it takes longer: MLflow's own time-outs add up to a minute."""
    done: list[_Answer] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(act())
        except BaseException as error:  # raised in the caller's thread below
            failed.append(error)

    worker = threading.Thread(target=run, daemon=True)  # a request that hangs does not keep the process
    worker.start()
    worker.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]


def _answer_file(uri: str, registry: str) -> Path:
    """Where the registry's last answer for an address is noted, without the registry's own, which may hold a secret."""
    return _private("answers") / f"{atomic.sha256_bytes(f'{registry} {uri}'.encode())}.json"


def _note_answer(uri: str, registry: str, digest: str) -> None:
    try:
        answer = {"at": time.time(), "digest": digest, "uri": uri}
        atomic.write_json(_answer_file(uri, registry), answer, mode=0o600)
    except OSError as error:  # a full or read-only cache: the bundle was pulled all the same
        _LOG.warning("the registry's answer could not be noted for when it is down: %s", error)


def _last_answer(uri: str, registry: str, cache: Path, days: float, error: PullError) -> Path:
    """The cached bundle of the registry's last answer, verified; PullError where there is none that is new enough."""
    try:
        noted = strict_json.parse(_answer_file(uri, registry).read_bytes(), max_bytes=4096)
        at, digest = float(noted["at"]), str(noted["digest"])
    except (OSError, LesaError, KeyError, TypeError, ValueError):
        raise PullError(f"{error}; it never answered for {uri} on this machine, so nothing is cached") from None
    age = max(0.0, time.time() - at)
    if not _DIGEST.fullmatch(digest) or _problem(cache / digest, digest) is not None:
        raise PullError(f"{error}; the bundle that it named {_spoken(age)} ago is not in {cache} any more") from None
    if age > days * 86400:
        raise PullError(f"{error}; its last answer is {_spoken(age)} old, cached_days allows {days:g}") from None
    _LOG.warning("%s; taken from the cache: the bundle that it named %s ago, %s", error, _spoken(age), digest)
    return cache / digest


def _spoken(seconds: float) -> str:
    """An age for people: `40 s`, `12 min`, `5 h`, `3 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _present(source: str, registry: str) -> str:
    """Where a version's files are: as registered, or where they lie now if they moved together with the database.

    Raises:
        PullError: a folder that is not on this machine; it says where was looked.
    """
    if not source.startswith(("file:", "/")):
        return source
    registered = Path(unquote(urlsplit(source).path))
    if registered.is_dir():
        return source
    beside = Path(registry.removeprefix("sqlite:///")).resolve().parent if registry.startswith("sqlite:///") else None
    for start in range(1, len(registered.parts) - 1 if beside is not None else 0):
        moved = Path(beside or "", *registered.parts[start:])
        if (moved / "manifest.json").is_file():  # its digest is the registry's, wherever it lies
            return moved.as_uri()
    also = f" nor beside the database, under {beside}" if beside is not None else ""
    raise PullError(
        f"the registry has this bundle's files in {registered}, which is not here{also}: the registry was "
        "moved without them, or they are on another host. Bring the folder back (mlartifacts goes where mlflow.db "
        "goes), have the registry served over http, or give the folder of a bundle"
    )


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
    """Whether a file is MLflow's database; PullError where this user cannot read it."""
    if not os.access(database, os.R_OK):
        raise PullError(f"the registry's database {database} cannot be read by this user: have its mode changed")
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
        ("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false"),  # an answer 429 or 503 may ask for hours of patience
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


def _private(name: str) -> Path:
    """A folder of the cache that nobody else can write to."""
    base = os.environ.get("LESA_CACHE") or str(Path.home() / ".cache" / "lesa")
    folder = Path(base).expanduser() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PullError(
            f"{folder} can be written by others: chmod 700 it, or set LESA_CACHE to a private folder"
        )
    return folder
