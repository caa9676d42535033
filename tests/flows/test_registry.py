"""Bundles in the registry: once each, found by digest, promoted by a judgement or a person, recorded and held to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.registry.history import Entry, PromotionHistory
from flows.registry.registry import (
    CANDIDATE,
    CHAMPION,
    PUBLISHED_FROM,
    Registry,
    RolledBack,
    Version,
    fingerprint_alias,
)
from flows.tracking.client import connect
from lesa.atomic import sha256_file
from lesa.errors import LesaError

BASE_A, BASE_B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    connect(folder)
    return folder


@pytest.fixture
def registry(root, request) -> Registry:
    return Registry(f"lesa-{request.node.name[:60]}", root)


def bundle(folder: Path, content: str) -> Path:
    folder = folder / content
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"content": content}))
    (folder / "weights.safetensors").write_bytes(content.encode())
    (folder / "README.md").write_text("card")
    return folder


def register(registry: Registry, folder: Path, content: str, fingerprint: str = BASE_A):
    return registry.register(
        bundle(folder, content), tags={"fingerprint": fingerprint}, run_tags={"stage": "publish"}
    )


def test_a_bundle_becomes_a_version_of_plain_files(registry, tmp_path, root):
    import mlflow

    version = register(registry, tmp_path, "one")
    assert version.number == "1"
    assert version.digest == sha256_file(tmp_path / "one" / "manifest.json")
    source = registry.client.get_model_version_download_uri(registry.name, "1")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    local = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path / "pulled")))
    assert sorted(file.name for file in local.iterdir()) == [
        "README.md",
        "manifest.json",
        "weights.safetensors",
    ]
    assert (root / "mlartifacts").is_dir()


def test_the_same_bundle_is_registered_once(registry, tmp_path):
    first = register(registry, tmp_path, "one")
    again = registry.register(tmp_path / "one", tags={"fingerprint": BASE_A}, run_tags={})
    assert again == first
    assert register(registry, tmp_path, "two").number == "2"
    assert registry.find(first.digest) == first
    assert registry.find("0" * 64) is None


def test_aliases(registry, tmp_path):
    assert registry.alias(CHAMPION) is None
    version = register(registry, tmp_path, "one")
    assert registry.alias(CHAMPION) is None
    registry.set_alias(CANDIDATE, version)
    assert registry.alias(CANDIDATE) == version
    registry.drop_alias(CANDIDATE, version)
    assert registry.alias(CANDIDATE) is None


def promote(registry: Registry, version: Version) -> None:
    assert registry.promote(version, lambda champion: version)[0] == version


def test_promotion_follows_the_judge(registry, tmp_path):
    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    assert registry.promote(one, lambda champion: None) == (None, None)
    assert registry.alias(CHAMPION) is None and registry.history.entries() == []
    assert registry.promote(one, lambda champion: one if champion is None else None) == (one, None)
    met = []
    assert registry.promote(two, lambda champion: met.append(champion)) == (None, one)
    assert met == [one] and registry.alias(CHAMPION) == one
    assert registry.promote(two, lambda champion: two) == (two, one)
    assert registry.alias(CHAMPION) == two
    entries = registry.history.entries()
    assert [(e.number, e.kind, e.version, e.before, e.is_applied) for e in entries] == [
        (1, "promoted", "1", "", True),
        (2, "promoted", "2", "1", True),
    ]


def test_a_champion_is_not_judged_against_itself(registry, tmp_path):
    one = register(registry, tmp_path, "one")
    promote(registry, one)

    def never(champion):
        raise AssertionError("judged")

    assert registry.promote(one, never) == (one, one)


def test_a_champion_with_fewer_budgets_than_what_was_judged_is_it_too(registry, tmp_path):
    one, fewer = register(registry, tmp_path, "one"), register(registry, tmp_path, "fewer")
    registry.tag(fewer, {PUBLISHED_FROM: one.digest})
    fewer = registry.version(fewer.number)
    assert registry.promote(one, lambda champion: fewer) == (fewer, None)
    assert registry.promote(one, lambda champion: None) == (fewer, fewer)


def test_a_champion_of_another_transformer_keeps_its_own_alias(registry, tmp_path):
    old = register(registry, tmp_path, "old", BASE_A)
    promote(registry, old)
    new = register(registry, tmp_path, "new", BASE_B)
    promote(registry, new)
    assert registry.alias(CHAMPION) == new
    assert registry.alias(fingerprint_alias(BASE_A)) == old
    assert registry.alias(fingerprint_alias(BASE_B)) == new
    assert fingerprint_alias(BASE_A) == "champion-aaaaaaaa"


def test_a_champion_that_moves_while_judging_is_judged_again(registry, tmp_path):
    one, two, three = (register(registry, tmp_path, name) for name in ("one", "two", "three"))
    promote(registry, one)
    met = []

    def judge(champion):
        met.append(champion.number)
        if len(met) == 1:
            promote(Registry(registry.name, registry.root), three)  # another publisher was faster
        return two if champion == one else None

    assert registry.promote(two, judge) == (None, three)
    assert met == [one.number, three.number]
    assert registry.alias(CHAMPION) == three


def test_of_two_that_judged_against_the_same_champion_one_is_promoted(registry, tmp_path):
    """No lock holds them apart: they may be on two machines."""
    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    entries = [Entry(number=1, kind="promoted", version=version.number, before="") for version in (one, two)]
    assert registry.history.append(entries[0])
    assert not PromotionHistory(registry.client, registry.name).append(entries[1])
    assert registry.history.append(entries[0]), "said again after a lost answer: it is there"
    assert [entry.version for entry in registry.history.entries()] == ["1"]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_publisher_that_died_between_record_and_aliases_is_made_good(registry, tmp_path, done, monkeypatch):
    old, new = register(registry, tmp_path, "old", BASE_A), register(registry, tmp_path, "new", BASE_B)
    promote(registry, old)
    real, calls = registry.set_alias, []

    def set_alias(alias, version):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(alias)
        real(alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", set_alias)
        with pytest.raises(KeyboardInterrupt):
            registry.promote(new, lambda champion: new)
    assert not registry.history.entries()[-1].is_applied
    assert registry.promote(new, lambda champion: None) == (new, new), "recorded, so it is champion"
    wanted = {CHAMPION: new, fingerprint_alias(BASE_A): old, fingerprint_alias(BASE_B): new}
    assert {name: registry.alias(name) for name in wanted} == wanted
    assert registry.history.entries()[-1].is_applied


def test_two_that_note_at_once_that_the_aliases_follow_are_both_content(registry, tmp_path, monkeypatch):
    """The database lets one of them through: it is noted, whoever did it."""
    from mlflow.exceptions import MlflowException

    one = register(registry, tmp_path, "one")
    real = registry.client.set_registered_model_tag

    def late(*arguments):
        real(*arguments)
        raise MlflowException("UNIQUE constraint failed")

    monkeypatch.setattr(registry.client, "set_registered_model_tag", late)
    assert registry.promote(one, lambda champion: one) == (one, None)
    assert registry.history.entries()[-1].is_applied

    def refused(*arguments):
        raise MlflowException("server error")

    monkeypatch.setattr(registry.client, "set_registered_model_tag", refused)
    two = register(registry, tmp_path, "two")
    with pytest.raises(MlflowException, match="server error"):
        registry.promote(two, lambda champion: two)


def test_who_comes_late_puts_the_alias_right(registry, tmp_path, monkeypatch):
    """It recorded its promotion, slept, and set the alias when another was champion already."""
    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    other, real, slept = Registry(registry.name, registry.root), registry.set_alias, []

    def set_alias(alias, version):
        if not slept:
            slept.append(alias)
            promote(other, two)
        real(alias, version)

    monkeypatch.setattr(registry, "set_alias", set_alias)
    assert registry.promote(one, lambda champion: one) == (one, None)
    assert registry.alias(CHAMPION) == two == registry.champion(registry.history.entries())


def test_an_alias_moved_by_hand_stops_promotions_until_it_is_settled(registry, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.registry.registry._LOOK_SECONDS", 0.01)
    one, two, three = (register(registry, tmp_path, name) for name in ("one", "two", "three"))
    promote(registry, one)
    promote(registry, two)
    registry.client.set_registered_model_alias(registry.name, CHAMPION, one.number)
    with pytest.raises(LesaError, match=r"points at version 1, .* made 2 champion: settle it .* --make 1 or --make 2"):
        registry.promote(three, lambda champion: three)
    registry.make_champion(one, "blurs hands")
    assert registry.alias(CHAMPION) == one
    assert registry.promote(three, lambda champion: three) == (three, one)


def test_what_was_rolled_back_stays_out_until_it_is_lifted(registry, tmp_path):
    one, two, fewer = (register(registry, tmp_path, name) for name in ("one", "two", "fewer"))
    registry.tag(fewer, {PUBLISHED_FROM: two.digest})
    promote(registry, one)
    promote(registry, two)
    registry.make_champion(one, "blurs hands")
    with pytest.raises(RolledBack, match=r"version 2 was rolled back \(blurs hands\).* --lift 2"):
        registry.promote(two, lambda champion: two)
    with pytest.raises(RolledBack):
        registry.promote(registry.version(fewer.number), lambda champion: fewer)
    with pytest.raises(LesaError, match="version 1 was not rolled back"):
        registry.lift(one, "")
    registry.lift(two, "hands are fine")
    assert registry.alias(CHAMPION) == one
    assert registry.promote(two, lambda champion: two) == (two, one)


def test_a_registry_from_before_the_history_goes_on_from_its_alias(registry, tmp_path):
    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    registry.client.set_registered_model_alias(registry.name, CHAMPION, one.number)
    assert registry.promote(one, lambda champion: None) == (one, one)
    assert registry.promote(two, lambda champion: two) == (two, one)
    assert registry.history.entries()[0].before == "1"


def test_a_deleted_champion_is_none_and_a_deleted_entry_is_told(registry, tmp_path):
    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    promote(registry, one)
    registry.client.delete_model_version(registry.name, one.number)
    assert registry.promote(two, lambda champion: two) == (two, None)
    registry.client.delete_registered_model(f"{registry.name}.promotion-000001")
    with pytest.raises(LesaError, match="have gaps"):
        registry.promote(two, lambda champion: two)


def test_the_command_shows_and_moves(registry, tmp_path, root, monkeypatch, capsys):
    from flows import champion as command

    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    promote(registry, one)
    promote(registry, two)
    monkeypatch.setattr(command, "ROOT", root)
    monkeypatch.setattr(command, "read_workload", lambda name: name)
    monkeypatch.setattr(command, "experiment_name", lambda workload: registry.name)
    assert command.main(["--make", "1", "--reason", "blurs"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == [
        "   3  rolled back  version 1, before 2  (blurs)",
        f"champion: {registry.name} version 1",
        "rolled back: version 2",
    ]
    assert command.main(["--lift", "2"]) == 0 and "rolled back: " not in capsys.readouterr().out
    assert command.main(["--make", "9"]) == 2 and "no version '9'" in capsys.readouterr().err


def test_a_tag_that_mlflow_would_cut_is_refused(registry, tmp_path):
    folder = bundle(tmp_path, "one")
    with pytest.raises(ValueError, match="longer than 5000 characters: huge"):
        registry.register(folder, tags={"huge": "x" * 5001}, run_tags={})
    assert registry.find(sha256_file(folder / "manifest.json")) is None


def test_the_decision_lies_beside_the_bundle(registry, tmp_path):
    one = register(registry, tmp_path, "one")
    registry.attach(one, {"promote": False, "reasons": ["worse"]})
    registry.tag(one, {"gate": "kept out", "gate.reasons": "r" * 9000})
    found = registry.client.get_model_version(registry.name, one.number)
    assert found.tags["gate"] == "kept out" and len(found.tags["gate.reasons"]) == 5000
    files = registry.client.list_artifacts(found.run_id, "gate")
    assert [file.path for file in files] == ["gate/decision.json"]
