"""Revisions of code and data."""

from __future__ import annotations

import yaml

from flows.tracking.revisions import revisions
from tests.helpers.clone import commit, git


def test_outside_a_repository(tmp_path):
    found = revisions(tmp_path)
    assert found == {"git": "none", "git_dirty": "false", "dvc": "none"}


def test_code_and_data(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    lock = {"stages": {"record": {"outs": [{"md5": "1"}]}, "publish": {"outs": [{"md5": "2"}]}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    commit(tmp_path, "one")
    first = revisions(tmp_path)
    assert first["git"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert first["git_dirty"] == "false"
    assert first["dvc"].startswith("sha256:") and len(first["dvc"]) == 71

    lock["stages"]["publish"]["outs"][0]["md5"] = "3"
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    second = revisions(tmp_path)
    assert second["dvc"] == first["dvc"], "publishing again makes no other predictor"
    assert second["git_dirty"] == "true"

    lock["stages"]["record"]["outs"][0]["md5"] = "4"
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert revisions(tmp_path)["dvc"] != first["dvc"]


def test_a_workload_has_its_own_stages_in_the_shared_file(tmp_path):
    folder = tmp_path / "data/workloads"
    folder.mkdir(parents=True)
    assert revisions(tmp_path, "mine")["dvc"] == "none"
    stages = {"record@mine": {"outs": []}, "record-hub@hubs": {"outs": [1]}, "record@mine-too": {"outs": [2]}}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    found = {name: revisions(tmp_path, name)["dvc"] for name in ("mine", "hubs", "mine-too")}
    assert len(set(found.values())) == 3 and "none" not in found.values()
    assert revisions(tmp_path)["dvc"] == revisions(tmp_path, "other")["dvc"] == "none"
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"record": {"outs": []}}}))
    assert revisions(tmp_path, "other")["dvc"] == revisions(tmp_path)["dvc"] == found["mine"]


def test_a_broken_lock_file_has_no_revision(tmp_path):
    (tmp_path / "dvc.lock").write_text("stages: [")
    assert revisions(tmp_path)["dvc"] == "none"
