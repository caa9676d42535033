"""From a real registry in a temporary database to a verified folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lesa
from lesa.atomic import sha256_file
from lesa.bundle import load_bundle
from lesa.errors import redacted
from lesa.pull import PullError, pull
from tests.helpers.bundles import make_bundle
from tests.helpers.mlflow_server import mlflow_server
from tests.helpers.tiny import tiny_flux


@pytest.fixture(scope="module")
def pipe():
    return tiny_flux()


@pytest.fixture(scope="module")
def registry(pipe, tmp_path_factory) -> tuple[str, Path, str]:
    """Address of a registry with one published bundle, the folder of its files, and its manifest's digest."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    make_bundle(pipe, root / "bundle")
    digest = sha256_file(root / "bundle" / "manifest.json")
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("bundles", artifact_location=(root / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(root / "bundle"), artifact_path="bundle")
    client.create_registered_model("lesa-tiny")
    source = f"{run.info.artifact_uri}/bundle"
    good = client.create_model_version(
        "lesa-tiny", source=source, run_id=run.info.run_id, tags={"manifest_sha256": digest}
    )
    client.set_registered_model_alias("lesa-tiny", "champion", good.version)
    client.create_model_version("lesa-tiny", source=source, run_id=run.info.run_id)
    client.create_model_version(
        "lesa-tiny", source=source, run_id=run.info.run_id, tags={"manifest_sha256": "0" * 64}
    )
    return uri, root / "artifacts" / run.info.run_id / "artifacts" / "bundle", digest


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_champion_is_pulled_into_a_private_folder_named_by_its_digest(registry, tmp_path):
    uri, _, digest = registry
    folder = pull("models:/lesa-tiny@champion", tracking_uri=uri)
    assert folder == tmp_path / "cache" / "bundles" / digest
    assert load_bundle(folder, expected_digest=folder.name).manifest.workload == "tiny"
    assert folder.parent.stat().st_mode & 0o077 == 0
    assert [path.name for path in folder.parent.iterdir()] == [digest]
    assert pull("models:/lesa-tiny/1", tracking_uri=uri) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # no registry came into being here


def test_enable_pulls_from_the_configured_registry(registry, pipe, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry[0])
    lesa.enable(pipe, "models:/lesa-tiny@champion")
    pipe("a thin seven", generator=torch.Generator().manual_seed(0), **lesa.call_kwargs(pipe))
    assert lesa.summary(pipe).num_full == 6
    lesa.disable(pipe)


def test_the_database_beside_is_the_default_and_none_is_ever_made(registry, tmp_path):
    with pytest.raises(PullError, match="no registry: set MLFLOW_TRACKING_URI"):
        pull("models:/lesa-tiny@champion")
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(PullError, match="does not exist; nothing is created here"):
        pull("models:/lesa-tiny@champion")
    with pytest.raises(PullError, match="does not exist; nothing is created here"):
        pull("models:/lesa-tiny@champion", tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]
    assert (tmp_path / "mlflow.db").stat().st_size == 0
    shutil.copyfile(registry[0].removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    assert pull("models:/lesa-tiny@champion").name == registry[2]


@pytest.mark.parametrize(
    "uri",
    [
        "models:/",
        "models:/a",
        "models:/../x@y",
        "models:/a@b@c",
        "models:/a/one",
        "runs:/a/b",
        "models:/a%2fb/1",
        "models:/a\n@b",
    ],
)
def test_addresses_of_another_form_are_refused(uri):
    with pytest.raises(PullError, match="is not of the form"):
        pull(uri)


def test_missing_models_and_unpinned_versions_are_refused(registry):
    uri = registry[0]
    with pytest.raises(PullError, match="lesa-tiny@nobody"):
        pull("models:/lesa-tiny@nobody", tracking_uri=uri)
    with pytest.raises(PullError, match="lesa-none"):
        pull("models:/lesa-none/1", tracking_uri=uri)
    with pytest.raises(PullError, match="no tag manifest_sha256"):
        pull("models:/lesa-tiny/2", tracking_uri=uri)
    with pytest.raises(PullError, match="not the bundle that was registered"):
        pull("models:/lesa-tiny/3", tracking_uri=uri)


def test_a_bundle_changed_in_the_store_is_refused_and_not_kept(registry, tmp_path):
    uri, files, _ = registry
    weights = files / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(
            PullError, match=r"not the bundle that was registered: weights\.safetensors: SHA-256"
        ):
            pull("models:/lesa-tiny@champion", tracking_uri=uri)
    finally:
        weights.write_bytes(data)
    assert list((tmp_path / "cache" / "bundles").iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_spoiled_cache_is_fetched_again(registry, name):
    uri, _, _ = registry
    folder = pull("models:/lesa-tiny@champion", tracking_uri=uri)
    good = (folder / name).read_bytes()
    (folder / name).write_text("{}")
    again = pull("models:/lesa-tiny@champion", tracking_uri=uri)
    assert again == folder and (folder / name).read_bytes() == good


def test_a_cache_that_others_can_write_is_refused(registry, tmp_path):
    folder = tmp_path / "cache" / "bundles"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(PullError, match="can be written by others"):
        pull("models:/lesa-tiny@champion", tracking_uri=registry[0])


@pytest.fixture
def served(registry, tmp_path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A registry over http, and the process that serves it."""
    (tmp_path / "served").mkdir()
    shutil.copyfile(registry[0].removeprefix("sqlite:///"), tmp_path / "served" / "mlflow.db")
    with mlflow_server(tmp_path / "served", "--default-artifact-root", str(tmp_path / "artifacts")) as served:
        yield served


@pytest.mark.slow
def test_a_cached_champion_is_served_while_the_registry_hangs_or_is_gone(served, registry, caplog, monkeypatch):
    monkeypatch.setattr("lesa.pull.ANSWER_SECONDS", 60.0)  # while it is up, on a machine that is busy
    uri, process = served
    champion = "models:/lesa-tiny@champion"
    folder = pull(champion, tracking_uri=uri, cached_days=1)
    assert folder.name == registry[2] and not caplog.records
    os.killpg(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("lesa.pull.ANSWER_SECONDS", 2.0)
    started = time.monotonic()
    assert pull(champion, tracking_uri=uri, cached_days=1) == folder
    assert time.monotonic() - started < 15  # MLflow's own patience with it is a minute
    assert "no answer within 2 s; taken from the cache: the bundle that it named " in caplog.text
    os.killpg(process.pid, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    monkeypatch.setattr("lesa.pull.ANSWER_SECONDS", 60.0)
    caplog.clear()
    assert pull(champion, tracking_uri=uri, cached_days=1) == folder
    assert "taken from the cache" in caplog.text and f" ago, {folder.name}" in caplog.text
    with pytest.raises(PullError, match="from http://127.0.0.1"):  # where the caller does not allow it
        pull(champion, tracking_uri=uri)
    with pytest.raises(PullError, match="it never answered for models:/lesa-tiny/1 on this machine"):
        pull("models:/lesa-tiny/1", tracking_uri=uri, cached_days=1)


class Gone:
    """A client whose registry is down."""

    error: Exception = ConnectionError("connection refused")

    def __init__(self, **_: str) -> None:
        raise self.error


@pytest.fixture
def gone(registry, monkeypatch) -> str:
    """A registry that answered once and is down since."""
    pull("models:/lesa-tiny@champion", tracking_uri=registry[0])
    monkeypatch.setattr("lesa.pull._client_class", lambda: Gone)
    return registry[0]


def test_an_answer_that_is_too_old_or_whose_bundle_is_spoiled_is_not_served(gone, registry, tmp_path):
    def ask(days: float) -> Path:
        return pull("models:/lesa-tiny@champion", tracking_uri=gone, cached_days=days)

    folder = ask(1)
    (noted,) = (tmp_path / "cache" / "answers").iterdir()
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600 and "sqlite" not in noted.read_text()
    answer = json.loads(noted.read_text())
    noted.write_text(json.dumps({**answer, "at": time.time() - 3.1 * 86400}))
    assert ask(4) == folder
    with pytest.raises(PullError, match="connection refused; its last answer is 3 days old, cached_days allows 2"):
        ask(2)
    noted.write_text("{")
    with pytest.raises(PullError, match="it never answered"):
        ask(4)
    noted.write_text(json.dumps(answer))
    (folder / "weights.safetensors").write_bytes(b"")
    with pytest.raises(PullError, match="is not in .* any more"):
        ask(4)
    noted.write_text(json.dumps({**answer, "digest": "../../elsewhere"}))
    with pytest.raises(PullError, match="is not in .* any more"):
        ask(4)


def test_a_registry_that_answers_is_believed(gone, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    monkeypatch.setattr(Gone, "error", MlflowException("no such alias", error_code=RESOURCE_DOES_NOT_EXIST))
    with pytest.raises(PullError, match="no such alias"):
        pull("models:/lesa-tiny@champion", tracking_uri=gone, cached_days=30)


def test_a_registry_that_moved_with_its_files_is_read_and_one_without_them_says_where_it_looked(registry, tmp_path):
    old = Path(registry[0].removeprefix("sqlite:///")).parent
    away = old.with_name("away")
    old.rename(away)
    try:
        new = tmp_path / "new"
        shutil.copytree(away, new)
        uri = f"sqlite:///{new / 'mlflow.db'}"
        assert pull("models:/lesa-tiny@champion", tracking_uri=uri).name == registry[2]
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(new / "artifacts")
        with pytest.raises(PullError) as caught:
            pull("models:/lesa-tiny@champion", tracking_uri=uri)
        message = str(caught.value)
        assert f"in {registry[1]}, which is not here nor beside the database, under {new}" in message
        assert "mlartifacts goes where mlflow.db goes" in message
    finally:
        away.rename(old)


def test_a_database_that_this_user_may_not_read_says_so(registry, monkeypatch):
    database = registry[0].removeprefix("sqlite:///")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != database)
    with pytest.raises(PullError, match="mlflow.db cannot be read by this user: have its mode changed"):
        pull("models:/lesa-tiny@champion", tracking_uri=registry[0])


def test_no_password_reaches_a_message(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(PullError) as caught:
        pull("models:/lesa-tiny@champion", tracking_uri="http://user:canary@127.0.0.1:9")
    assert "canary" not in str(caught.value) and "127.0.0.1:9" in str(caught.value)


def test_a_file_that_is_no_registry_is_left_alone(tmp_path):
    broken, other = tmp_path / "broken.db", tmp_path / "other.db"
    broken.write_bytes(b"no database" * 100)
    with sqlite3.connect(other) as connection:
        connection.execute("create table notes (text)")
    before = sha256_file(other)
    for database in (broken, other):
        with pytest.raises(PullError, match="nothing is created here"):
            pull("models:/lesa-tiny@champion", tracking_uri=f"sqlite:///{database}")
    assert sha256_file(other) == before


def test_without_mlflow_the_remedy_is_named(registry, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(PullError, match="pip install mlflow"):
        pull("models:/lesa-tiny@champion", tracking_uri=registry[0])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/path", "https://***@host/path"),
        ("https://token@host:8080/path", "https://***@host:8080/path"),
        ("failed at postgresql://me:s3cret@db:5432/x now", "failed at postgresql://***@db:5432/x now"),
        ("http://me:s3c@ret@host/x and http://you:too@host", "http://***@host/x and http://***@host"),
        ("http://me:s3c?ret@host/x", "http://***@host/x"),
        ("http://me:s3c#ret@host/x", "http://***@host/x"),
        ("http://host/?token=abc&x=1", "http://host/?***"),
        ("http://host/api?abc", "http://host/api?***"),
        ("http://host/api#access_token=abc", "http://host/api#***"),
        ('{"url": "http://host/?token=abc", "x": 1}', '{"url": "http://host/?***", "x": 1}'),
        ("me:s3cret@proxy:3128", "***@proxy:3128"),
        ("the proxy 'me:s3cret@proxy:3128' refused", "the proxy '***@proxy:3128' refused"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
        ("models:/lesa-tiny@champion: not found?", "models:/lesa-tiny@champion: not found?"),
    ],
)
def test_addresses_are_shown_without_their_secrets(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_redacting_needs_neither_mlflow_nor_torch():
    code = "import sys, lesa.pull; sys.exit(bool({'mlflow', 'torch', 'lesa.bundle'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_long_answer_is_cut_after_its_secrets_are_gone(registry, monkeypatch):
    class Broken:
        def __init__(self, **_):
            raise RuntimeError("x" * 470 + " http://user:canary-canary-canary-canary@host/")

    monkeypatch.setattr("lesa.pull._client_class", lambda: Broken)
    with pytest.raises(PullError) as caught:
        pull("models:/lesa-tiny@champion", tracking_uri=registry[0])
    assert "canary" not in str(caught.value) and str(caught.value).count("x") >= 470
