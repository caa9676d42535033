"""Faults in any order: whatever happens to a registry, its champion is the recorded one and was rightly promoted.

How many sequences of rules are tried: as in `test_stateful`, fewer where nothing is said, since each rule is a
publisher's whole work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flows import champion as command
from flows.environment import ROOT
from flows.registry.history import Entry
from flows.registry.registry import CANDIDATE, CHAMPION, Registry, fingerprint_alias
from lesa.bundle import load_bundle
from lesa.errors import LesaError
from lesa.pull import PullError, pull
from tests.faults import publisher
from tests.faults.test_stateful import EXAMPLES, SETTINGS

CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = 240  # far more than any publisher needs
QUALITIES = (20.0, 20.5, 24.0, 24.5, 26.0, 28.0)  # dB of candidates
FIRST = (20.0, 24.0)  # those that a registry that is not empty begins with
FILES = ("manifest.json", "weights.safetensors", "README.md")


@dataclasses.dataclass
class Model:
    """What the registry should hold."""

    quality: dict[str, float] = dataclasses.field(default_factory=dict)  # version -> dB
    history: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)  # kind, version, before
    barred: set[str] = dataclasses.field(default_factory=set)
    damaged: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)  # version -> file -> as it was
    alias: str = "settled"  # "moved": by hand, publishing refuses; "loose": the next publisher sets it

    @property
    def champion(self) -> str:
        return next((version for kind, version, _ in reversed(self.history) if kind != "lifted"), "")

    def may_promote(self, version: str) -> bool:
        """Whether a publisher of this version makes it champion."""
        champion = self.champion
        if self.alias == "moved" or version in self.barred or version == champion or champion in self.damaged:
            return False
        return publisher.better(self.quality[version], self.quality.get(champion)) is True


class Publishing(RuleBasedStateMachine):
    """One workload's registry: published to, killed, raced, rolled back, damaged and pulled from."""

    empty: Path
    begun: Path

    def __init__(self) -> None:
        super().__init__()
        self.before, self.folder = Path.cwd(), Path(tempfile.mkdtemp(prefix="lesa-stateful-"))
        self.patch = pytest.MonkeyPatch()
        self.model = Model()
        self.caches = 0

    def teardown(self) -> None:
        os.chdir(self.before)
        self.patch.undo()
        shutil.rmtree(self.folder)

    @initialize(is_empty=st.sampled_from((False, False, True)))
    def begin(self, is_empty: bool) -> None:
        self.root = publisher.copy_root(self.empty if is_empty else self.begun, self.folder)
        os.chdir(self.root)
        if not is_empty:
            self.model.quality = {"1": FIRST[0], "2": FIRST[1]}
            self.model.history = [("promoted", "1", ""), ("promoted", "2", "1")]
        self.registry = Registry(publisher.NAME, self.root)
        self.patch.setattr("flows.registry.registry._LOOK_SECONDS", 0.01)
        self.patch.setattr(command, "ROOT", self.root)
        self.patch.setattr(command, "read_workload", lambda name: name)
        self.patch.setattr(command, "experiment_name", lambda workload: publisher.NAME)

    def no_cache(self) -> None:
        """What was pulled before is pulled again: the cache hides damage, and other tests are about it."""
        self.caches += 1
        self.patch.setenv("LESA_CACHE", str(self.folder / f"cache-{self.caches}"))

    def entries(self) -> list[Entry]:
        return self.registry.history.entries()

    def last_decision(self) -> Entry:
        return [entry for entry in self.entries() if entry.kind != "lifted"][-1]

    def numbers(self) -> list[str]:
        return sorted(self.model.quality, key=int)

    def catch_up(self, candidates: set[float], most: int) -> None:
        """Takes over what publishers of these candidates did before they were killed, if they might do it."""
        found = self.registry.client.search_model_versions(f"name = '{publisher.NAME}'")
        for version in sorted(found, key=lambda version: int(version.version)):
            number, quality = str(version.version), float(version.tags["psnr.1.67x"])
            if number not in self.model.quality:
                assert quality in candidates - set(self.model.quality.values()), "each bundle is registered once"
                assert number == str(len(self.model.quality) + 1)
                self.model.quality[number] = quality
            assert self.model.quality[number] == quality
        assert len(found) == len(self.model.quality)
        new = self.entries()[len(self.model.history) :]
        assert len(new) <= most
        for entry in new:
            assert entry.kind == "promoted" and entry.before == self.model.champion
            assert self.model.quality[entry.version] in candidates and self.model.may_promote(entry.version), entry
            self.model.history.append((entry.kind, entry.version, entry.before))

    # What happens.

    @rule(data=st.data())
    def published_better(self, data: st.DataObject) -> None:
        self._publish(data, lambda quality, champion: publisher.better(quality, champion) is True)

    @rule(data=st.data())
    def published_worse_or_undecided(self, data: st.DataObject) -> None:
        self._publish(data, lambda quality, champion: publisher.better(quality, champion) is not True)

    @rule(data=st.data())
    def published_again(self, data: st.DataObject) -> None:
        """What is registered: the champion, one that was kept out, or one that a person took back."""
        barred = {self.model.quality[number] for number in self.model.barred}
        known = set(self.model.quality.values())
        self._publish(data, lambda quality, champion: quality in (barred or known))

    def _publish(self, data: st.DataObject, wanted: Callable[[float, float | None], bool]) -> None:
        met = self.model.quality.get(self.model.champion)
        quality = data.draw(st.sampled_from([each for each in QUALITIES if wanted(each, met)] or QUALITIES))
        self.no_cache()
        champion, told = self.model.champion, ""
        try:
            outcome: dict[str, Any] = publisher.publish(self.root, quality)
        except LesaError as error:
            told = str(error)
        length = len(self.model.history)
        self.catch_up({quality}, most=1)
        (number,) = [number for number, known in self.model.quality.items() if known == quality]
        promoted = len(self.model.history) > length
        assert self.registry.alias(CANDIDATE) is None
        if self.model.alias == "moved":
            assert "settle it with" in told and not promoted
            return
        self.model.alias = "settled"
        if number != champion and number not in self.model.barred and champion in self.model.damaged:
            assert "could not be compared" in told and not promoted
            return
        assert not told
        is_better = publisher.better(quality, self.model.quality.get(champion)) is True
        expected = is_better and number != champion and number not in self.model.barred
        assert promoted == expected == outcome["promote"]
        assert (outcome["candidate"], outcome["champion"]) == (number, self.model.champion or None)
        if number in self.model.barred and number != champion:
            assert "was rolled back" in outcome["reasons"][0]

    @rule(quality=st.sampled_from(QUALITIES), nth=st.integers(1, 24))
    def killed(self, quality: float, nth: int) -> None:
        self.no_cache()
        process = CONTEXT.Process(target=publisher.child, args=(str(self.root), quality, nth))
        process.start()
        process.join(SECONDS)
        refuses = self.model.alias == "moved" or self.model.champion in self.model.damaged
        assert process.exitcode in ((0, 1, -signal.SIGKILL) if refuses else (0, -signal.SIGKILL))
        self.catch_up({quality}, most=1)
        if self.model.alias != "moved":
            self.model.alias = "loose"

    @rule(first=st.sampled_from(QUALITIES), second=st.sampled_from(QUALITIES))
    def raced(self, first: float, second: float) -> None:
        """From two folders, as on two machines with one registry, so that no lock holds them apart."""
        self.no_cache()
        other = self.folder / f"other-{self.caches}"
        shutil.copytree(self.root, other, symlinks=True, ignore=shutil.ignore_patterns(".lesa", "mlartifacts"))
        registry = f"sqlite:///{self.root / 'mlflow.db'}"
        racers = [
            CONTEXT.Process(target=publisher.child, args=(str(root), quality, None, None, registry))
            for root, quality in ((self.root, first), (other, second))
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(SECONDS)
            assert racer.exitcode in (0, 1)
        met = {self.model.champion}
        self.catch_up({first, second}, most=2)
        if self.model.alias != "moved":
            met.add(self.model.champion)
            assert [racer.exitcode for racer in racers] == [0, 0] or met & set(self.model.damaged)
            self.model.alias = "settled"
        for number, quality in self.model.quality.items():
            if quality in (first, second):
                assert not self.model.may_promote(number), "who was to win has won"

    @precondition(lambda self: self.model.champion)
    @rule(data=st.data())
    def made_champion(self, data: st.DataObject) -> None:
        """By a person: an older one is a rollback, a newer one goes forward, and either settles the alias."""
        number, before = data.draw(st.sampled_from(self.numbers())), self.model.champion
        assert command.main(["--make", number, "--reason", "seen"]) == 0
        is_back = int(number) < int(before)
        self.model.history.append(("rolled back" if is_back else "promoted", number, before))
        self.model.barred |= {before} if is_back else set()
        self.model.alias = "settled"

    @precondition(lambda self: self.model.quality)
    @rule(data=st.data())
    def lifted(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.barred) or self.numbers()))
        is_barred = number in self.model.barred
        assert command.main(["--lift", number, "--reason", "mended"]) == (0 if is_barred else 2)
        if is_barred:
            self.model.barred.discard(number)
            self.model.history.append(("lifted", number, ""))

    @precondition(lambda self: self.model.champion and self.registry.alias(CHAMPION))
    @rule()
    def alias_deleted(self) -> None:
        self.registry.client.delete_registered_model_alias(publisher.NAME, CHAMPION)
        self.model.alias = "loose"

    @precondition(lambda self: self.model.champion)
    @rule(data=st.data())
    def alias_moved(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.numbers()))
        self.registry.client.set_registered_model_alias(publisher.NAME, CHAMPION, number)
        is_applied = self.last_decision().is_applied
        if number == self.model.champion:
            self.model.alias = "loose"
        else:
            self.model.alias = "moved" if is_applied else "loose"
            if data.draw(st.booleans()):  # before a person settles it
                self._publish(data, lambda quality, champion: True)

    @precondition(lambda self: set(self.model.quality) - set(self.model.damaged))
    @rule(data=st.data(), name=st.sampled_from(FILES), how=st.sampled_from(("flip", "cut", "delete")))
    def damaged(self, data: st.DataObject, name: str, how: str) -> None:
        whole = [number for number in self.numbers() if number not in self.model.damaged]
        is_first = self.model.champion in whole and data.draw(st.booleans())
        number = self.model.champion if is_first else data.draw(st.sampled_from(whole))
        path = self.stored(number) / name
        content = path.read_bytes()
        self.model.damaged[number] = {name: content}
        if how == "delete":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        if name == "README.md" and how != "delete":
            self.model.damaged.pop(number)  # it is for people: no digest covers it
        if is_first and data.draw(st.booleans()):  # before anybody restores it
            self._publish(data, lambda quality, champion: publisher.better(quality, champion) is True)

    @precondition(lambda self: self.model.damaged)
    @rule(data=st.data())
    def restored(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.damaged)))
        for name, content in self.model.damaged.pop(number).items():
            (self.stored(number) / name).write_bytes(content)

    def stored(self, number: str) -> Path:
        uri = self.registry.client.get_model_version_download_uri(publisher.NAME, number)
        return Path(uri.removeprefix("file://"))

    @rule()
    def pulled(self) -> None:
        """The bundle that the alias names, to the last byte, or a refusal."""
        self.no_cache()
        alias = self.registry.alias(CHAMPION)
        try:
            folder = pull(f"models:/{publisher.NAME}@{CHAMPION}", f"sqlite:///{self.root / 'mlflow.db'}")
        except PullError as error:
            assert alias is None or alias.number in self.model.damaged, error
            assert publisher.NAME in str(error) or "not the bundle that was registered" in str(error)
            return
        assert alias is not None and alias.number not in self.model.damaged
        if self.model.alias == "settled":
            assert alias.number == self.model.champion
        bundle = load_bundle(folder, expected_digest=alias.digest)
        assert publisher.quality(bundle) == self.model.quality[alias.number]

    # What holds after every step.

    @invariant()
    def the_history_only_grows(self) -> None:
        entries = self.entries()
        assert [(entry.kind, entry.version, entry.before) for entry in entries] == self.model.history
        prefix = f"{publisher.NAME}.promotion-"
        models = [model.name for model in self.registry.client.search_registered_models()]
        numbers = sorted(int(name.removeprefix(prefix)) for name in models if name.startswith(prefix))
        assert numbers == list(range(1, len(self.model.history) + 1))

    @invariant()
    def there_is_one_champion_and_the_aliases_follow(self) -> None:
        champion = self.registry.champion(self.entries())
        if self.model.history:
            assert champion is not None and champion.number == self.model.champion
        else:
            assert champion is None
        if self.model.alias == "settled" and champion is not None:
            assert self.registry.alias(CHAMPION) == self.registry.alias(fingerprint_alias(champion.fingerprint))
            assert self.registry.alias(CHAMPION) == champion
            assert self.last_decision().is_applied


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """An empty registry, and one with two promotions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    empty = publisher.make_root(tmp_path_factory.mktemp("empty") / "repository")
    begun = publisher.copy_root(empty, tmp_path_factory.mktemp("begun"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # the server preloads before it takes over sys.path
        patch.setenv("LESA_CACHE", str(begun / "cache"))
        CONTEXT.set_forkserver_preload(["mlflow", "tests.faults.publisher"])
        with contextlib.chdir(begun):
            for quality in FIRST:
                assert publisher.publish(begun, quality)["promote"]
        yield empty, begun
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_registry_under_faults_in_any_order(roots: tuple[Path, Path]) -> None:
    machine = type("Publishing", (Publishing,), {"empty": roots[0], "begun": roots[1]})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=int(EXAMPLES or 3)))
