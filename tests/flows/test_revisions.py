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


def test_a_workload_with_its_own_pipeline_file(tmp_path):
    own = tmp_path / "data/workloads/mine"
    own.mkdir(parents=True)
    assert revisions(tmp_path, "mine")["dvc"] == "none"
    (own / "dvc.lock").write_text(yaml.safe_dump({"stages": {"record": {"outs": []}}}))
    assert revisions(tmp_path, "mine")["dvc"] != "none"
    assert revisions(tmp_path)["dvc"] == "none"


def test_a_broken_lock_file_has_no_revision(tmp_path):
    (tmp_path / "dvc.lock").write_text("stages: [")
    assert revisions(tmp_path)["dvc"] == "none"
