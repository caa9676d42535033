"""Faults in any order: whatever happens to a store or a registry, what holds of them holds after every step.

LESA_STATEFUL_EXAMPLES says how many sequences of rules are tried: ten where it is not set, always the same ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lesa import locks
from lesa.bundle import load_bundle
from lesa.errors import LesaError
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.publishing.build import make_bundle
from lesa.recording.dataset import Trajectories, recorded_splits
from lesa.recording.ledger import ledger_of
from lesa.recording.store import TrajectoryStore
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design, finish, list_ground_truth_jobs, load_predictor, run_ground_truth_job
from tests.helpers.digests import tree_digest
from tests.helpers.recording import record
from tests.helpers.tiny import tiny_repository

EXAMPLES = os.environ.get("LESA_STATEFUL_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 10),
    stateful_step_count=30 if EXAMPLES else 12,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    phases=tuple(Phase) if EXAMPLES else (Phase.explicit, Phase.generate),  # making a failure small takes minutes
    suppress_health_check=list(HealthCheck),
)
PLANS = (1, 2, 3)  # training prompts
NAME = "[0-9a-f]" * 32
MOMENTS = (  # what a recording is about to open or make when it is killed
    f"*/{NAME}.*.partial",
    f"*/{NAME}.*.partial/context/c.0*",
    f"*/{NAME}.*.partial/features/c.0.0.0.0*",
    "*/tiny.zarr.ledger.*.partial",
    "*/tiny.json.*.partial",
    "*/tiny.zarr.pruned*",
)


class World:
    """A repository with a loaded pipeline, and for each plan the store that nobody disturbed."""

    def __init__(self, root: Path) -> None:
        self.root = tiny_repository(root, num_inference_steps=4)
        document = yaml.safe_load((root / "params.yaml").read_text())
        section = document["workloads"]["tiny"]
        section["predictor"] = {"kind": "per_step", "boundaries": [0.5], "history_sizes": [2, 2], "gate": "table"}
        section["schedule"] = {"budgets": {"2x": {"full_steps": [0, 1]}}, "default_budget": "2x"}
        section["ground_truth"] = {"iterations": 1, "batch_size": 2, "checkpoint_every": 1}
        self.workloads: dict[int, Workload] = {}
        self.digests: dict[int, str] = {}
        self.features: dict[str, torch.Tensor] = {}
        with contextlib.chdir(root):
            for count in PLANS:
                section["record"]["train_prompts"] = count
                Path("params.yaml").write_text(yaml.safe_dump(document))
                self.workloads[count] = load_params()
            model = self.workloads[1].model
            self.pipe = load_pipeline(model, "cpu")
            for count, workload in self.workloads.items():
                store = TrajectoryStore.create(f"undisturbed-{count}.zarr")
                record(workload, self.pipe, store)
                self.digests[count] = tree_digest(store.path)
                self.features |= {key: store.features(key) for key in store.keys()}


def die_at(pattern: str, nth: int) -> None:
    """SIGKILL from within at the nth path that matches."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in {"open", "os.mkdir"} and fnmatch(str(arguments[0]), pattern):
            seen += 1
            if seen >= nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


class Recording(RuleBasedStateMachine):
    """One workload's store, recorded, killed, damaged and trained on."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.before, self.folder = Path.cwd(), Path(tempfile.mkdtemp(prefix="lesa-stateful-"))
        shutil.copytree(self.world.root / "data/prompts", self.folder / "data/prompts")
        (self.folder / "data/base").symlink_to(self.world.root / "data/base")
        os.chdir(self.folder)
        self.damaged: set[str] = set()  # keys whose files were spoiled since they were recorded
        self.read: set[str] = set()  # keys that the ledger knows as good
        self.altered: set[str] = set()  # of those, keys whose record says other noise levels
        self.complete = False  # nothing happened since the last whole recording

    def teardown(self) -> None:
        os.chdir(self.before)
        shutil.rmtree(self.folder)

    @initialize(plan=st.sampled_from(PLANS))
    def begin(self, plan: int) -> None:
        self.plan = plan
        self.store = TrajectoryStore.create(self.workload.paths.trajectories)

    @property
    def workload(self) -> Workload:
        return self.world.workloads[self.plan]

    def listed(self) -> list[str]:
        return self.store.keys()

    def forget(self, *keys: str) -> None:
        for known in (self.damaged, self.altered):
            known.difference_update(keys)

    # What happens.

    @rule(plan=st.sampled_from(PLANS))
    def other_prompts(self, plan: int) -> None:
        self.complete &= plan == self.plan
        self.plan = plan

    @rule()
    def recorded(self) -> None:
        """Resumes, repairs, prunes; and the store is the undisturbed one."""
        outcome = record(self.workload, self.world.pipe, self.store)
        assert tree_digest(self.store.path) == self.world.digests[self.plan]
        assert outcome["planned"] == self.plan + 2 == len(self.listed())
        present = set(self.listed())
        self.damaged -= present
        self.altered -= present
        self.read = present
        self.complete = True

    @rule(moment=st.sampled_from(MOMENTS), nth=st.integers(1, 4))
    def killed(self, moment: str, nth: int) -> None:
        """In a process of its own, by SIGKILL, at the moment or never."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                die_at(moment, nth)
                record(self.workload, self.world.pipe, self.store)
                code = 0
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        present = set(self.listed())  # some of what was damaged may be repaired, or set aside with what is not planned
        self.damaged = {key for key in self.damaged if key not in present or self.store.problems(key)}
        self.complete = False

    @precondition(lambda self: self.listed())
    @rule(data=st.data(), how=st.sampled_from(("flip", "cut", "delete", "grow")))
    def corrupted(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(self.listed()))
        name = data.draw(st.sampled_from(("zarr.json", "context/c.0", "features/c.0.0.0.0")))
        path = self.store.path / key / name
        if not path.is_file() or (how, name) == ("flip", "zarr.json"):
            return
        content = bytearray(path.read_bytes())
        if how == "delete":
            path.unlink()
        elif how == "flip" and content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(content)
        elif how == "cut" and content:
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            path.write_bytes(content + b"x")
        self.damaged.add(key)
        if not self.store.problems(key):  # flipped back, or cut off what had been added
            self.damaged.discard(key)
        self.complete = False

    @precondition(lambda self: self.complete and self.read)
    @rule(data=st.data())
    def altered_in_its_noise_levels(self, data: st.DataObject) -> None:
        """What no digest covers; whoever read it whole before knows it."""
        key = data.draw(st.sampled_from(sorted(self.read)))
        path = self.store.path / key / "zarr.json"
        document = json.loads(path.read_text())
        document["attributes"]["sigmas"][1] *= 1.5
        path.write_text(json.dumps(document))
        self.altered.add(key)
        self.complete = False

    @precondition(lambda self: self.listed())
    @rule(data=st.data())
    def deleted(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.listed()))
        shutil.rmtree(self.store.path / key)
        self.forget(key)
        self.complete = False

    @precondition(lambda self: not self.altered)
    @rule()
    def without_its_ledger(self) -> None:
        """Costs one reading of the store and nothing else."""
        ledger_of(self.store.path).unlink(missing_ok=True)
        self.read.clear()

    @rule()
    def raced(self) -> None:
        """Another process is at work on the store: the second recorder is told who, and changes nothing."""
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            with self.store.writer_lock():
                os.write(told, b"!")
                signal.pause()
        assert os.read(ready, 1) == b"!"
        before = tree_digest(self.store.path)
        try:
            with pytest.raises(locks.Locked, match=f"process {pid}"):
                record(self.workload, self.world.pipe, self.store)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ready)
            os.close(told)
        assert tree_digest(self.store.path) == before

    @precondition(lambda self: self.complete)
    @rule()
    def trained_and_bundled(self) -> None:
        """A step of training on what is whole, and the bundle of it as a reader gets it."""
        workload = self.workload
        jobs = {str(job): job for job in list_ground_truth_jobs(workload)}
        finish(workload, "ground_truth", {
            name: run_ground_truth_job(workload, job, lambda step, values: None) for name, job in jobs.items()
        })  # fmt: skip
        train, validation = recorded_splits(workload.recording)
        predictor = load_predictor(workload.paths.ground_truth)
        assert predictor.spec == untrained_predictor(expert_design(workload), train.sigmas, train.channels).spec
        made = make_bundle(
            workload.paths.bundle, workload, self.world.pipe, predictor, train, validation,
            quality={}, evaluation={}, created_from={}, error_bounds={"2x": [None, None]},
        )  # fmt: skip
        assert load_bundle(workload.paths.bundle, expected_digest=made.digest).digest == made.digest

    # What holds after every step.

    @invariant()
    def what_is_listed_is_whole_or_named(self) -> None:
        named = self.store.verify()
        for key in self.listed():
            problems = [line for line in named if key in line]
            assert bool(problems) == (key in self.damaged), (key, problems)
        assert not [line for line in named if not any(key in line for key in self.damaged)]

    @invariant()
    def nothing_damaged_is_read(self) -> None:
        try:
            splits = recorded_splits(self.workload.recording)
        except LesaError:
            assert not self.complete
            return
        for data in splits:
            self._are_as_recorded(data)

    def _are_as_recorded(self, data: Trajectories) -> None:
        assert not self.damaged & set(data.keys)
        assert data.features is not None
        for row, key in enumerate(data.keys):
            expected = self.world.features[key][:, data.branch[row]]
            assert torch.equal(data.features[row].view(torch.uint16), expected.view(torch.uint16))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_store_under_faults_in_any_order(world: World) -> None:
    run_state_machine_as_test(type("Recording", (Recording,), {"world": world}), settings=SETTINGS)
