"""The model registry: bundles as plain files, never as an MLflow flavour (loading a flavour runs code).

A version is known by the digest of its bundle's manifest, so registering twice adds nothing. Aliases:
`champion` what samplers pull, `candidate` what is being judged, `champion-<8>` the last champion made for the
transformer whose fingerprint starts with these eight digits, `champion-schema<n>` the last one in an older format.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.environment import ROOT, state_folder
from flows.tracking.client import connect, experiment_id, find_or_create_run
from lesa.atomic import sha256_file
from lesa.bundle.manifest import READ
from lesa.errors import LesaError
from lesa.locks import file_lock

CHAMPION = "champion"
CANDIDATE = "candidate"
MAX_TAG = 5000  # characters; MLflow cuts longer values without a word


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """One registered bundle."""

    name: str  # registered model
    number: str  # MLflow's version
    tags: dict[str, str]

    @property
    def digest(self) -> str:
        return self.tags.get("manifest_sha256", "")

    @property
    def fingerprint(self) -> str:
        return self.tags.get("fingerprint", "")

    @property
    def is_of_an_older_schema(self) -> bool:
        """Whether this version of lesa cannot read it any more, and never will."""
        schema = self.tags.get("schema", "")
        return schema.isdecimal() and int(schema) < min(READ)


class Registry:
    """The registered model of one workload.

    Args:
        name: registered model, `lesa-<workload>`.
        root: repository; its default database is used unless MLFLOW_TRACKING_URI names another.
    """

    def __init__(self, name: str, root: Path = ROOT) -> None:
        self.name, self.root = name, root
        self.client = connect(root)

    def register(self, bundle: Path, *, tags: Mapping[str, str], run_tags: Mapping[str, str]) -> Version:
        """Uploads a bundle folder and makes it a version, unless this very bundle is one already."""
        digest = sha256_file(bundle / "manifest.json")
        tags = {**tags, "manifest_sha256": digest}
        long = [key for key, value in tags.items() if len(value) > MAX_TAG]
        if long:
            raise LesaError(f"registry tags longer than {MAX_TAG} characters: {', '.join(sorted(long))}")
        with self._lock("register"):
            known = self.find(digest)
            if known is not None:
                return known
            self._ensure_model()
            experiment = experiment_id(self.client, self.name, self.root)
            run_id = find_or_create_run(
                self.client, experiment, "lesa.bundle", digest,
                name=f"bundle {digest[:8]}", tags=dict(run_tags), start_ms=int(time.time() * 1000),
            )  # fmt: skip
            self.client.log_artifacts(run_id, str(bundle), artifact_path="bundle")
            source = f"{self.client.get_run(run_id).info.artifact_uri}/bundle"
            made = self.client.create_model_version(self.name, source=source, run_id=run_id, tags=tags)
            self.client.set_terminated(run_id)
            return self._version(made)

    def find(self, digest: str) -> Version | None:
        """The version whose manifest has this SHA-256, the oldest if there are several."""
        versions = [self._version(v) for v in self.client.search_model_versions(f"name = '{self.name}'")]
        same = sorted((v for v in versions if v.digest == digest), key=lambda v: int(v.number))
        return same[0] if same else None

    def alias(self, alias: str) -> Version | None:
        """The version an alias points to; None when the model or the alias does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            return self._version(self.client.get_model_version_by_alias(self.name, alias))
        except MlflowException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise

    def set_alias(self, alias: str, version: Version) -> None:
        """Points an alias at a version; a lost answer does no harm: what counts is what is read back."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.set_registered_model_alias(self.name, alias, version.number)
        except MlflowException:
            found = self.alias(alias)
            if found is None or found.number != version.number:
                raise

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version.number, key, value[:MAX_TAG])

    def drop_alias(self, alias: str, version: Version) -> None:
        """Removes an alias if it still points at this version."""
        found = self.alias(alias)
        if found is not None and found.number == version.number:
            self.client.delete_registered_model_alias(self.name, alias)

    def attach(self, version: Version, decision: Mapping[str, Any]) -> None:
        """Keeps the gate's whole decision beside the bundle, in the files of the version's run."""
        run_id = self.client.get_model_version(self.name, version.number).run_id
        self.client.log_dict(run_id, dict(decision), "gate/decision.json")

    def promote(
        self, candidate: Version, judge: Callable[[Version | None], bool], *, attempts: int = 20
    ) -> tuple[bool, Version | None]:
        """Makes `candidate` the champion if `judge(champion)` says so of the champion of that moment.

        Judging takes minutes, so it happens outside the lock; inside it the alias is read again, and if it
        has moved meanwhile the new champion is judged against. MLflow itself lets the last writer win:
        publishers of one registry on several machines share this folder or run one at a time.

        Returns whether the candidate is champion now, and the champion it was judged against.
        """
        for _ in range(attempts):
            champion = self.alias(CHAMPION)
            if champion is not None and champion.number == candidate.number:
                return True, champion
            if not judge(champion):
                return False, champion
            with self._lock("promote"):
                now = self.alias(CHAMPION)
                if (now and now.number) != (champion and champion.number):
                    continue
                if champion is not None and champion.is_of_an_older_schema:
                    self.set_alias(f"{CHAMPION}-schema{champion.tags['schema']}", champion)
                elif champion is not None and champion.fingerprint:
                    self.set_alias(fingerprint_alias(champion.fingerprint), champion)
                self.set_alias(CHAMPION, candidate)
                self.set_alias(fingerprint_alias(candidate.fingerprint), candidate)
                return True, champion
        raise RuntimeError(
            f"the champion of {self.name} moved {attempts} times while {candidate.number} waited"
        )

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _version(self, found: Any) -> Version:
        return Version(name=self.name, number=str(found.version), tags=dict(found.tags))

    def _lock(self, what: str) -> Any:
        return file_lock(state_folder(self.root) / f"{self.name}.{what}.lock", timeout=120.0)


def fingerprint_alias(fingerprint: str) -> str:
    """`champion-<8>`: the alias that keeps the champion of one transformer when another one's takes over."""
    return f"{CHAMPION}-{fingerprint.removeprefix('sha256:')[:8]}"
