"""From a real registry in a temporary database to a verified folder."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lesa
from lesa.atomic import sha256_file
from lesa.bundle import load_bundle
from lesa.pull import PullError, pull, redacted
from tests.helpers.bundles import make_bundle
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
