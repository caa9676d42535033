"""An MLflow server behind a network that is down, slow, drops or lies: nothing is lost, doubled, torn or promoted."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import publish
from flows.environment import quiet_environment, state_folder
from flows.registry.registry import CHAMPION, Registry, Version
from flows.tracking import run as tracking
from flows.tracking import sender
from flows.tracking.client import connect
from flows.tracking.run import Tracker
from lesa.bundle import load_bundle
from lesa.errors import LesaError
from lesa.pull import PullError, pull
from tests.helpers import mlflow_server as servers
from tests.helpers.bundles import make_bundle, placeholder_bundle
from tests.helpers.tcp_proxy import DROPPED, HANGING, HTML, LOST, Fault, Proxy, answer, lying
from tests.helpers.tiny import tiny_flux

pytestmark = pytest.mark.slow
CANARY = "canary-5d1e7c"
CANDIDATES = 3 + int(os.environ.get("LESA_FAULT_ROUNDS", "3"))  # of a race; `make faults` asks for more
UNAVAILABLE = answer("503 Service Unavailable", b"<h1>come back later</h1>", Retry_After="600")
TOO_MANY = answer("429 Too Many Requests", b"", Retry_After="600")
EMPTY = answer("200 OK", b"{}", Content_Type="application/json")
LIES = {
    "dropped": DROPPED,
    "500": lying(answer("500 Internal Server Error", b"broken")),
    "503": lying(UNAVAILABLE),
    "429": lying(TOO_MANY),
    "HTML": lying(HTML),
    "garbage": lying(bytes(range(256))),
    "half an answer": Fault(keeps_body=1),
    "reset in the answer": Fault(keeps_body=1, resets=True),
    "hanging": HANGING,
}
# Every write of a registration and a promotion.
WRITES = (
    "POST mlflow/experiments/create",
    "POST mlflow/runs/create",
    "PUT mlflow-artifacts/artifacts",
    "POST mlflow/registered-models/create",
    "POST mlflow/model-versions/create",
    "POST mlflow/runs/update",
    "POST mlflow/registered-models/alias",
    "POST mlflow/registered-models/set-tag",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    quiet_environment()
    with servers.mlflow_server(tmp_path_factory.mktemp("mlflow") / "server") as (url, _):
        yield url


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(server) as between:
        address = between.url.replace("://", f"://someone:{CANARY}@")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine's server is no fault
        yield between


def register(registry: Registry, folder: Path, content: str, score: int) -> Version:
    tags = {"fingerprint": "sha256:" + "a" * 64, "score": str(score)}
    return registry.register(placeholder_bundle(folder, content), tags=tags, run_tags={})


def test_a_run_arrives_once_whatever_happened_to_the_answers(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sender meets each fault once, at each kind of request; then the network is well."""
    monkeypatch.setattr(tracking, "start_sender", lambda root: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # as the sender has it
    run = Tracker("stage x", experiment="lesa-outage", params={"a": 1}, tags={"git": "abc"}, root=tmp_path)
    passes = [[("GET mlflow/experiments/get-by-name", DROPPED)]]
    passes += [[("POST mlflow/experiments/create", LOST), ("POST mlflow/runs/create", LOST)]]  # found by name and tag
    passes += [[("POST mlflow/runs/log-batch", fault)] for fault in (LOST, *LIES.values())]
    reported = 0
    for faults in passes:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if faults[0][1] is HANGING else "60")
        for _ in range(3):
            run.report(reported, {"loss": float(reported)})
            reported += 1
        before = proxy.met
        for request, fault in faults:
            proxy.on(request, fault)
        assert sender.send_all(tmp_path) == 1, "the run is still open"
        assert proxy.met == before + len(faults), faults
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    proxy.down()
    run.close("FINISHED", drain_seconds=0)
    assert sender.send_all(tmp_path) == 1
    proxy.up()
    run.reporter.path.with_suffix(".sent").unlink()  # the whole spool once more, and its run seems not to be there
    proxy.on("POST mlflow/runs/search", Fault(keeps=100))
    proxy.on("POST mlflow/runs/update", LOST)
    assert sender.send_all(tmp_path) == 1, "nobody heard that it has ended: kept"
    assert sender.send_all(tmp_path) == 0

    client = connect(tmp_path)
    experiment = client.get_experiment_by_name("lesa-outage").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED" and found.data.params == {"a": "1"} and found.data.tags["git"] == "abc"
    points = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(i, float(i)) for i in range(reported)]
    assert CANARY not in capsys.readouterr().err


def test_after_an_outage_a_run_arrives_by_itself(tmp_path: Path, proxy: Proxy) -> None:
    """With the sender's own process, which meets the outage while the training goes on."""
    proxy.set(DROPPED)
    run = Tracker("stage x", experiment="lesa-itself", params={}, tags={}, root=tmp_path)
    deadline, took = time.monotonic() + 120, 0.0
    for step in range(10**6):
        begin = time.perf_counter()
        run.report(step, {"loss": float(step)})
        took = max(took, time.perf_counter() - begin)
        if proxy.met >= 2 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert proxy.met >= 2, "the sender has met the outage"
    proxy.clear()
    run.report(step + 1, {"loss": 0.0})
    assert run.close("FINISHED", drain_seconds=60), "taken without anybody's doing"
    assert took < 1.0, "reporting does not wait for the network"
    client = connect(tmp_path)
    (found,) = client.search_runs([client.get_experiment_by_name("lesa-itself").experiment_id])
    assert len(client.get_metric_history(found.info.run_id, "loss")) == step + 2
    assert CANARY not in (state_folder(tmp_path) / "sender.log").read_text()


@pytest.mark.parametrize("how", ["lost", "said to have failed"])
def test_what_was_done_without_an_answer_is_not_done_twice(tmp_path: Path, proxy: Proxy, how: str) -> None:
    """Of every write the first answer does not come, on a slow network."""
    fault = LOST if how == "lost" else lying(UNAVAILABLE, is_carried_out=True)
    registry = Registry(f"lesa-{how.replace(' ', '-')}", tmp_path)
    proxy.set(Fault(wait=0.05))
    for request in WRITES:
        proxy.on(request, fault)
    version = register(registry, tmp_path, "b", 1)
    proxy.on("POST mlflow/registered-models/create", fault)  # the model, then the entry of the history
    assert registry.promote(version, lambda champion: version) == (version, None)
    proxy.on("GET mlflow/model-versions/search", Fault(keeps=100))  # which looks as if there were none
    before = proxy.count("GET mlflow/model-versions/search")
    assert registry.register(tmp_path / "b", tags={}, run_tags={}) == version
    assert proxy.count("GET mlflow/model-versions/search") == before + 2, "asked again"
    missed = [request for request in WRITES if proxy.count(request) == 0]
    assert missed == [], "every write was made, and its first answer lost"
    proxy.clear()
    assert [v.version for v in registry.client.search_model_versions(f"name = '{registry.name}'")] == [version.number]
    (experiment,) = registry.client.search_experiments(filter_string=f"name = '{registry.name}'")
    (run,) = registry.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [entry.version for entry in registry.history.entries()] == [version.number]
    assert registry.alias(CHAMPION) == version
    names = sorted(Path(file.path).name for file in registry.client.list_artifacts(run.info.run_id, "bundle"))
    assert names == ["README.md", "manifest.json", "weights.safetensors"]


def test_two_publishers_of_whom_one_never_hears_an_answer(
    tmp_path: Path, proxy: Proxy, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion only gets better; who is told that it promoted has promoted, and nobody else."""
    roots = [tmp_path / "here", tmp_path / "there"]
    for root in roots:
        root.mkdir()
    deaf = Registry("lesa-deaf", roots[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    registry = Registry("lesa-deaf", roots[1])
    versions = [register(registry, tmp_path, f"b{score}", score) for score in range(CANDIDATES)]
    for request in ("registered-models/create", "registered-models/alias", "registered-models/set-tag"):
        proxy.on(f"POST mlflow/{request}", LOST, times=10**6)
    told: list[str] = []
    failed: list[BaseException] = []

    def publish_all(of: Registry, seed: int) -> None:
        order = random.Random(seed).sample(versions, len(versions))
        try:
            for candidate in [*order, versions[-1]]:
                made, before = of.promote(candidate, lambda champion, c=candidate: better(c, champion))
                if made is not None and (before is None or before.number != made.number):
                    told.append(made.number)
        except BaseException as error:  # shown below
            failed.append(error)

    publishers = [threading.Thread(target=publish_all, args=pair) for pair in ((deaf, 0), (registry, 1))]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join(240)
    assert failed == []
    promoted = [entry.version for entry in registry.history.entries()]
    scores = [int(versions[int(number) - 1].tags["score"]) for number in promoted]
    assert scores == sorted(set(scores)) and scores[-1] == CANDIDATES - 1
    assert sorted(told) == sorted(promoted)
    assert registry.alias(CHAMPION) == versions[-1]
    assert proxy.met > 0


def better(candidate: Version, champion: Version | None) -> Version | None:
    is_better = champion is None or int(candidate.tags["score"]) > int(champion.tags["score"])
    return candidate if is_better else None


@pytest.mark.parametrize("fault", ["down", *LIES])
def test_a_registry_that_does_not_answer_is_named_before_any_work(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if fault == "hanging" else "60")
    monkeypatch.setattr(publish, "build_bundle", lambda *_: pytest.fail("hours of work, for nothing"))
    if fault == "down":
        proxy.down()
    else:
        proxy.set(LIES[fault])
    workload: Any = SimpleNamespace(name=f"named-{fault}".replace(" ", "-"))
    begin = time.monotonic()
    with pytest.raises(LesaError) as caught:
        publish.publish_bundle(workload, None, tmp_path)
    assert time.monotonic() - begin < 30, "also where the answer asks for ten minutes of patience"
    said = str(caught.value)
    assert f"127.0.0.1:{proxy.port}" in said and "Start it or correct MLFLOW_TRACKING_URI" in said
    assert CANARY not in said and "\n" not in said
    assert fault == "down" or proxy.met == proxy.count("GET ") > 0, "asked, and nothing written"


@pytest.mark.parametrize("lie", ["nothing", "another model"])
def test_an_answer_about_something_else_promotes_nobody(tmp_path: Path, proxy: Proxy, lie: str) -> None:
    """Taken for a version without a name, the champion would be of no transformer, and any candidate better."""
    registry = Registry(f"lesa-lie-{lie.split()[0]}", tmp_path)
    good, worse = register(registry, tmp_path, "good", 2), register(registry, tmp_path, "worse", 1)
    assert registry.promote(good, lambda champion: good) == (good, None)
    other = json.dumps({"model_version": {"name": "lesa-other", "version": "1"}}).encode()
    says = EMPTY if lie == "nothing" else answer("200 OK", other, Content_Type="application/json")
    for request in ("GET mlflow/model-versions/get", "GET mlflow/registered-models/alias"):
        proxy.on(request, lying(says))
        with pytest.raises(LesaError, match="is it MLflow that answers there"):
            registry.promote(worse, lambda champion: worse)
        proxy.clear()
    assert registry.alias(CHAMPION) == good and len(registry.history.entries()) == 1


@pytest.fixture(scope="module")
def published(server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a real bundle, champion of lesa-pulled."""
    folder = tmp_path_factory.mktemp("published")
    make_bundle(tiny_flux(), folder / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        registry = Registry("lesa-pulled", folder)
        version = registry.register(folder / "bundle", tags={"fingerprint": "x"}, run_tags={})
        registry.promote(version, lambda champion: version)
    return version.digest


def test_a_pulled_bundle_is_whole_or_not_there(
    tmp_path: Path, proxy: Proxy, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    bundles = tmp_path / "cache" / "bundles"
    download = "GET mlflow-artifacts/artifacts/"
    short = answer("200 OK", b"{", Content_Type="application/json")
    at_download = {**LIES, "another file": lying(short), "cut in its head": Fault(keeps=100)}
    for name, fault in at_download.items():
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if fault is HANGING else "60")
        proxy.on(download, fault, times=10**6)
        with pytest.raises(PullError) as caught:
            pull("models:/lesa-pulled@champion")
        said = str(caught.value)
        assert "models:/lesa-pulled@champion from http" in said or "not the bundle that was registered" in said, name
        assert CANARY not in said
        assert list(bundles.iterdir()) == [], f"{name}: nothing half pulled is left"
        proxy.clear()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    proxy.on(download, DROPPED)  # once: asked again, and nobody hears of it
    folder = pull("models:/lesa-pulled@champion")
    assert folder == bundles / published
    assert load_bundle(folder, expected_digest=published).manifest.workload == "tiny"


def test_a_cached_champion_is_served_whatever_the_network_says(
    tmp_path: Path, proxy: Proxy, published: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr("lesa.pull.ANSWER_SECONDS", 60.0)  # while it is well, on a machine that is busy
    folder = pull("models:/lesa-pulled@champion", cached_days=1)
    for name, fault in {**LIES, "nothing": lying(EMPTY)}.items():
        monkeypatch.setattr("lesa.pull.ANSWER_SECONDS", 1.0 if fault is HANGING else 60.0)
        proxy.set(fault)
        caplog.clear()
        assert pull("models:/lesa-pulled@champion", cached_days=1) == folder, name
        assert "taken from the cache" in caplog.text and CANARY not in caplog.text, name
    proxy.set(lying(EMPTY))
    with pytest.raises(PullError, match="what answers there is not the registry"):
        pull("models:/lesa-pulled@champion")
