"""Bundles in the registry: once each, found by digest, promoted only by judgement, under a lock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.registry.registry import CANDIDATE, CHAMPION, Registry, fingerprint_alias
from flows.tracking.client import connect
from lesa.atomic import sha256_file

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


def test_promotion_follows_the_judge(registry, tmp_path):
    one, two = register(registry, tmp_path, "one"), register(registry, tmp_path, "two")
    assert registry.promote(one, lambda champion: False) == (False, None)
    assert registry.alias(CHAMPION) is None
    assert registry.promote(one, lambda champion: champion is None) == (True, None)
    met = []
    assert registry.promote(two, lambda champion: met.append(champion)) == (False, one)
    assert met == [one] and registry.alias(CHAMPION) == one
    assert registry.promote(two, lambda champion: True) == (True, one)
    assert registry.alias(CHAMPION) == two


def test_a_champion_is_not_judged_against_itself(registry, tmp_path):
    one = register(registry, tmp_path, "one")
    registry.promote(one, lambda champion: True)

    def never(champion):
        raise AssertionError("judged")

    assert registry.promote(one, never) == (True, one)


def test_a_champion_of_another_transformer_keeps_its_own_alias(registry, tmp_path):
    old = register(registry, tmp_path, "old", BASE_A)
    registry.promote(old, lambda champion: True)
    new = register(registry, tmp_path, "new", BASE_B)
    registry.promote(new, lambda champion: True)
    assert registry.alias(CHAMPION) == new
    assert registry.alias(fingerprint_alias(BASE_A)) == old
    assert registry.alias(fingerprint_alias(BASE_B)) == new
    assert fingerprint_alias(BASE_A) == "champion-aaaaaaaa"


def test_a_champion_that_moves_while_judging_is_judged_again(registry, tmp_path):
    one, two, three = (register(registry, tmp_path, name) for name in ("one", "two", "three"))
    registry.promote(one, lambda champion: True)
    met = []

    def judge(champion):
        met.append(champion.number)
        if len(met) == 1:
            registry.set_alias(CHAMPION, three)  # another publisher was faster
        return champion == one

    assert registry.promote(two, judge) == (False, three)
    assert met == [one.number, three.number]
    assert registry.alias(CHAMPION) == three


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
