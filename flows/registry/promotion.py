"""A judgement about the champion of the moment: its bundle fetched, the gate's jobs run, what may be published made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.ray_jobs import run_jobs
from flows.registry.registry import PUBLISHED_FROM, Registry, Version
from flows.registry.tags import registry_tags
from flows.tracking.run import Reporter
from lesa.bundle import Bundle, load_bundle
from lesa.errors import LesaError
from lesa.params import Workload
from lesa.publishing.build import with_budgets
from lesa.publishing.gate import Decision
from lesa.publishing.judgement import judge_candidate, same_call
from lesa.pull import pull


def measure_and_decide(
    workload: Workload, candidate: Bundle, champion: Bundle | None, log: Any
) -> tuple[Decision, dict[str, Any]]:
    """`judge_candidate` with jobs side by side."""
    share = workload.resources.publish
    reporter = Reporter(path=Path(os.devnull), name=f"publish {workload.name}")

    def run(work: Callable[..., Any], settings: Workload, jobs: Mapping[str, Any]) -> dict[str, Any]:
        return run_jobs(work, settings, jobs, share=share, reporter=reporter)

    return judge_candidate(workload, candidate, champion, run, lambda line: log.info("gate: %s", line))


class Judgement:
    """Judges a candidate against whatever champion it meets; remembers the last decision."""

    def __init__(
        self, workload: Workload, candidate: Bundle, version: Version, registry: Registry, tracking: str, log: Any
    ) -> None:
        self.workload, self.candidate, self.version = workload, candidate, version
        self.registry, self.tracking, self.log = registry, tracking, log
        self.decision = Decision(promote=False, reasons=("nothing to judge: it is the champion already",))
        self.measured_on: dict[str, Any] = {}
        self.obstacle = ""  # why nothing could be measured

    def __call__(self, champion: Version | None) -> Version | None:
        """The version to promote: the candidate, or one without the budgets that failed."""
        try:
            bundle = self._champion_bundle(champion)
        except LesaError as error:  # no reason to replace it unseen
            self.obstacle = str(error)
            self.decision = Decision(promote=False, reasons=(f"not measured: {error}",))
            return None
        self.decision, self.measured_on = measure_and_decide(self.workload, self.candidate, bundle, self.log)
        if not self.decision.promote:
            return None
        if not self.decision.left_out:
            return self.version
        for budget, reasons in self.decision.left_out.items():
            self.log.warning("gate: budget %s is left out: %s", budget, "; ".join(reasons))
        with tempfile.TemporaryDirectory() as folder:
            published = with_budgets(
                self.candidate, self.decision.budgets, self.decision.left_out, Path(folder) / self.workload.name
            )
            tags = registry_tags(published.manifest.data) | {PUBLISHED_FROM: self.candidate.digest}
            return self.registry.register(published.path, tags=tags, run_tags={"stage": "publish"})

    def _champion_bundle(self, champion: Version | None) -> Bundle | None:
        """What the candidate is compared with; None where the peers decide alone, and why in the log.

        Raises:
            LesaError: the champion's files are gone or altered.
        """
        if champion is None:
            return None
        if champion.fingerprint != self.candidate.manifest.fingerprint:
            self.log.info("champion %s was made for another transformer: the peers decide", champion.number)
            return None
        if champion.is_of_an_older_schema:
            self.log.info("champion %s is of a format not read any more: the peers decide", champion.number)
            return None
        folder = pull(f"models:/{champion.name}/{champion.number}", tracking_uri=self.tracking)
        bundle = load_bundle(folder, expected_digest=champion.digest)
        if not same_call(self.candidate, bundle):
            self.log.warning(
                "champion %s was made for another call (%s): the peers decide", champion.number, bundle.manifest.call
            )
            return None
        return bundle

    def outcome(self, made: Version | None, before: Version | None) -> dict[str, Any]:
        """What is recorded: decision.json and the files of the registered version's run.

        Args:
            made: the version that is champion by this judgement, None where it is another's.
            before: the champion it was judged against.
        """
        after = before if made is None else made
        return {
            **self.decision.to_dict(),
            "promote": made is not None and (before is None or before.number != made.number),
            "candidate": self.version.number,
            "manifest_sha256": self.version.digest,
            "champion_before": before.number if before else None,
            "champion": after.number if after else None,
            "measured_on": self.measured_on,
        }
