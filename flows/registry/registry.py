"""The model registry: bundles as plain files, never as an MLflow flavour (loading a flavour runs code).

A version is known by the digest of its bundle's manifest, so registering twice adds nothing. Who is champion is what
the `PromotionHistory` says; aliases follow it:
`champion` what samplers pull, `candidate` what is being judged, `champion-<8>` the last champion made for the
transformer whose fingerprint starts with these eight digits, `champion-schema<n>` the last one in an older format.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.environment import ROOT, state_folder
from flows.registry.history import Entry, Kind, PromotionHistory, barred, last_promotion
from flows.tracking.client import connect, experiment_id, find_or_create_run, made_once
from lesa.atomic import sha256_file
from lesa.bundle.manifest import READ
from lesa.errors import LesaError
from lesa.locks import file_lock

CHAMPION = "champion"
CANDIDATE = "candidate"
PUBLISHED_FROM = "published_from"  # tag: digest of the judged bundle that this one has fewer budgets than
_LOOKS, _LOOK_SECONDS = 5, 0.3  # at an alias that nothing recorded explains
MAX_TAG = 5000  # characters; MLflow cuts longer values without a word


class RolledBack(LesaError):
    """A version that a person took back and nobody allowed again."""


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
    def origins(self) -> set[str]:
        """Digests of this bundle and of the one it was published from with fewer budgets."""
        return {self.digest, self.tags.get(PUBLISHED_FROM, self.digest)}

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
        self.history = PromotionHistory(self.client, name)

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
            self.client.set_terminated(run_id)  # the version comes last: what is found by it is whole

            def make() -> Version:
                return self._version(
                    self.client.create_model_version(self.name, source=source, run_id=run_id, tags=tags)
                )

            return made_once(lambda: self.find(digest), make)

    def find(self, digest: str) -> Version | None:
        """The version whose manifest has this SHA-256, the oldest if there are several."""

        def ask() -> list[Any]:
            return list(self.client.search_model_versions(f"name = '{self.name}'"))

        versions = map(self._version, ask() or ask())  # an answer that was cut off in its head looks like none found
        same = sorted((v for v in versions if v.digest == digest), key=lambda v: int(v.number))
        return same[0] if same else None

    def alias(self, alias: str) -> Version | None:
        """The version an alias points to; None when the model or the alias does not exist."""
        return self._found(self.client.get_model_version_by_alias, alias)

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
        self, candidate: Version, judge: Callable[[Version | None], Version | None], *, attempts: int = 20
    ) -> tuple[Version | None, Version | None]:
        """Makes the version that `judge(champion)` names the champion, judged against the champion of that moment.

        Judging takes minutes. If the champion has moved meanwhile, on whatever machine, the new one is judged against:
        `PromotionHistory` lets one of several publishers through.

        Args:
            candidate: what is judged; a version that was rolled back is not promoted until that is lifted.
            judge: the version to promote, None for none; it may name another than the candidate, such as one with
                fewer budgets.

        Returns:
            the version that is champion now by this judgement, or None, and the champion it was judged against.

        Raises:
            RolledBack: the candidate, or what `judge` named, was rolled back.
            LesaError: an alias that was moved by hand.
        """
        for _ in range(attempts):
            entries = self.settled()
            champion = self.champion(entries)
            if champion is not None and candidate.digest in champion.origins:
                return champion, champion
            self._refuse_barred(candidate, entries)
            chosen = judge(champion)
            if chosen is None:
                return None, champion
            self._refuse_barred(chosen, entries)
            before = "" if champion is None else champion.number
            entry = Entry(number=len(entries) + 1, kind="promoted", version=chosen.number, before=before)
            if self.history.append(entry):
                self.settled()
                return chosen, champion
        raise RuntimeError(f"the champion of {self.name} moved {attempts} times while {candidate.number} waited")

    def champion(self, entries: Sequence[Entry]) -> Version | None:
        """The champion by the history; by the alias where nothing was recorded yet."""
        last = last_promotion(list(entries))
        return self.alias(CHAMPION) if last is None else self.version(last.version)

    def settled(self) -> list[Entry]:
        """The history, once the aliases follow it: they are set anew where a publisher died before it did so.

        Raises:
            LesaError: the alias was moved by hand since.
        """
        from mlflow.exceptions import MlflowException

        set_here: set[str] = set()  # who waited here while others promoted has set an alias that is theirs to set
        looks = 0
        while True:
            entries = self.history.entries()
            last = last_promotion(entries)
            alias = self.alias(CHAMPION)
            champion = None if last is None else self.version(last.version)
            if last is None or champion is None:  # a version that was deleted took its aliases with it
                return entries
            if last.is_applied and alias is not None and alias.number == champion.number:
                return entries
            if last.is_applied and alias is not None and alias.number not in set_here:
                looks += 1
                if looks > _LOOKS:  # another publisher that was late puts it right within moments
                    raise LesaError(
                        f"{self.name}: the alias {CHAMPION} points at version {alias.number}, the last recorded "
                        f"decision made {champion.number} champion: settle it with python -m flows.champion "
                        f"--make {alias.number} or --make {champion.number}"
                    )
                time.sleep(_LOOK_SECONDS)
                continue
            before = self.version(last.before) if last.before else None
            try:
                for name, version in _aliases(champion, before):
                    self.set_alias(name, version)
            except MlflowException:
                newer = last_promotion(self.history.entries())
                if newer is None or newer.number == last.number:
                    raise
                continue  # what was read back after a lost answer was set by who promoted since
            set_here.add(champion.number)
            self.history.mark_applied(last)

    def make_champion(self, version: Version, reason: str) -> None:
        """A person's decision: recorded, and held to. A newer champion that it replaces is barred until lifted.

        It also settles an alias that was moved by hand.
        """
        entries = self.history.entries()
        champion = self.champion(entries)
        before = "" if champion is None else champion.number
        is_back = bool(before) and int(version.number) < int(before)
        kind: Kind = "rolled back" if is_back else "promoted"
        self._record(Entry(number=len(entries) + 1, kind=kind, version=version.number, before=before, reason=reason))
        self.settled()

    def lift(self, version: Version, reason: str) -> None:
        """Lets a version that was rolled back become champion again, if the gate says so."""
        entries = self.history.entries()
        if version.number not in barred(entries):
            raise LesaError(f"{self.name}: version {version.number} was not rolled back")
        self._record(Entry(number=len(entries) + 1, kind="lifted", version=version.number, before="", reason=reason))

    def _record(self, entry: Entry) -> None:
        """A person's decision, which was made looking at the entries before it."""
        if not self.history.append(entry):
            raise LesaError(f"{self.name}: somebody else moved the champion just now; look again")

    def version(self, number: str) -> Version | None:
        """A version by number; None when it does not exist."""
        return self._found(self.client.get_model_version, number)

    def _found(self, get: Callable[[str, str], Any], which: str) -> Version | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._version(get(self.name, which))
        except MlflowException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise

    def _refuse_barred(self, version: Version, entries: list[Entry]) -> None:
        for number, reason in barred(entries).items():
            known = self.version(number)
            if known is not None and version.origins & known.origins:
                raise RolledBack(
                    f"version {number} was rolled back{f' ({reason})' if reason else ''} and stays so until "
                    f"python -m flows.champion --lift {number}"
                )

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _version(self, found: Any) -> Version:
        # MLflow's client takes an empty answer for a version without name, number and tags.
        if str(found.name) != self.name or not str(found.version).isdecimal():
            raise LesaError(
                f"asked for a version of {self.name}, the registry named {found.name!r} {found.version!r}: is it "
                "MLflow that answers there, and is nothing in between?"
            )
        return Version(name=self.name, number=str(found.version), tags=dict(found.tags))

    def _lock(self, what: str) -> Any:
        return file_lock(state_folder(self.root) / f"{self.name}.{what}.lock", timeout=120.0)


def _aliases(champion: Version, before: Version | None) -> list[tuple[str, Version]]:
    """Aliases of a promotion: the one before keeps a name of its own where the two serve different users."""
    aliases = [(CHAMPION, champion), (fingerprint_alias(champion.fingerprint), champion)]
    if before is not None and before.is_of_an_older_schema:
        aliases.insert(0, (f"{CHAMPION}-schema{before.tags['schema']}", before))
    elif before is not None and before.fingerprint not in ("", champion.fingerprint):
        aliases.insert(0, (fingerprint_alias(before.fingerprint), before))
    return aliases


def fingerprint_alias(fingerprint: str) -> str:
    """`champion-<8>`: the alias that keeps the champion of one transformer when another one's takes over."""
    return f"{CHAMPION}-{fingerprint.removeprefix('sha256:')[:8]}"
