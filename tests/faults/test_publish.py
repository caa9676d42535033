"""Publishers that race, die half way, or lose the answer to what they did."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.environment import ROOT
from flows.registry.registry import CHAMPION, Registry
from flows.tracking.client import connect
from lesa.atomic import sha256_file
from tests.helpers.mlflow_server import mlflow_server

pytestmark = pytest.mark.slow
FINGERPRINT = "sha256:" + "a" * 64
NUM_CANDIDATES = 24
ROUNDS = int(os.environ.get("LESA_FAULT_ROUNDS", "3"))  # of two racers each; `make faults` asks for more

# Promotes candidates in a random order, for ever; better means a higher score.
RACER = """
import random, sys
from pathlib import Path
from flows.registry.registry import Registry
name, root, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
registry = Registry(name, root)
score = lambda version: int(version.tags["score"])
versions = [registry._version(v) for v in registry.client.search_model_versions(f"name = '{name}'")]
order = random.Random(seed)
print("ready", flush=True)
while True:
    order.shuffle(versions)
    for candidate in versions:
        is_better = lambda champion: champion is None or score(candidate) > score(champion)
        registry.promote(candidate, lambda champion: candidate if is_better(champion) else None)
        print(candidate.tags["score"], flush=True)
"""

# Registers one bundle again and again, as long as it lives.
REGISTRAR = """
import sys
from pathlib import Path
from flows.registry.registry import Registry
registry = Registry(sys.argv[1], Path(sys.argv[2]))
print("ready", flush=True)
for folder in sys.argv[3:]:
    registry.register(Path(folder), tags={"fingerprint": "x"}, run_tags={})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("publish")
    connect(folder)
    return folder


def bundle(folder: Path, content: str) -> Path:
    folder = folder / content
    folder.mkdir()
    for name in ("manifest.json", "weights.safetensors", "README.md"):
        (folder / name).write_text(json.dumps({"content": content}))
    return folder


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("where", ["one database", "a server and two machines"])
def test_racing_publishers_that_get_killed_leave_the_best_as_champion(where, tmp_path, monkeypatch):
    """The champion's score never falls, whoever dies where, and the best candidate ends on top.

    Behind a server, publishers share neither database nor folder, as on two machines.
    """
    with contextlib.ExitStack() as stack:
        roots = [tmp_path / "root"] * 2
        if where != "one database":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.enter_context(mlflow_server(tmp_path / "server"))[0])
            roots = [tmp_path / "root", tmp_path / "other"]
        for root in set(roots):
            root.mkdir()
            connect(root)
        registry = Registry("lesa-race", roots[0])
        for score in range(NUM_CANDIDATES):
            tags = {"fingerprint": FINGERPRINT, "score": str(score)}
            registry.register(bundle(tmp_path, f"b{score}"), tags=tags, run_tags={})
        race(registry, roots)


def race(registry: Registry, roots: list[Path]) -> None:
    """Rounds of two racers, killed at random, and one that ends its work."""
    seen, dice = [-1], random.Random(0)

    def look() -> None:
        champion = registry.champion(registry.history.entries())
        seen.append(int(champion.tags["score"]) if champion else -1)
        assert seen[-1] >= seen[-2], f"the champion got worse: {seen}"

    for number in range(ROUNDS):
        racers = [start(RACER, registry.name, root, 2 * number + side) for side, root in enumerate(roots)]
        for racer in racers:
            for _ in range(8):
                time.sleep(dice.uniform(0, 0.05))
                look()
            racer.send_signal(signal.SIGKILL)
            racer.wait()
    survivor = start(RACER, registry.name, roots[1], 99)
    assert survivor.stdout is not None
    rounds = [survivor.stdout.readline() for _ in range(NUM_CANDIDATES)]
    survivor.kill()
    survivor.wait()
    assert len({*rounds}) == NUM_CANDIDATES
    look()
    assert seen[-1] == NUM_CANDIDATES - 1
    champion = registry.champion(registry.settled())
    assert champion is not None and registry.alias(CHAMPION) == champion, "the alias follows"
    promoted = [entry.version for entry in registry.history.entries()]
    scores = [int(registry.version(version).tags["score"]) for version in promoted]
    assert scores == sorted(set(scores)), "every promotion was of a better one"


def test_a_publisher_killed_while_registering_leaves_no_second_version(root, tmp_path):
    folders = [bundle(tmp_path, f"b{index}") for index in range(6)]
    registry = Registry("lesa-killed", root)
    dice = random.Random(1)
    for _ in range(3):
        publisher = start(REGISTRAR, registry.name, root, *folders)
        time.sleep(dice.uniform(0.01, 0.3))
        publisher.kill()
        publisher.wait()
    versions = [registry.register(folder, tags={"fingerprint": "x"}, run_tags={}) for folder in folders]
    found = registry.client.search_model_versions(f"name = '{registry.name}'")
    assert len(found) == len(folders)
    assert registry.alias(CHAMPION) is None, "registering moves nothing"
    for folder, version in zip(folders, versions, strict=True):
        assert version.digest == sha256_file(folder / "manifest.json")
        run_id = registry.client.get_model_version(registry.name, version.number).run_id
        names = sorted(Path(file.path).name for file in registry.client.list_artifacts(run_id, "bundle"))
        assert names == ["README.md", "manifest.json", "weights.safetensors"]


def test_a_lost_answer_is_not_a_lost_race(root, tmp_path, monkeypatch):
    """The alias was set but the answer was cut off: what is read back counts."""
    from mlflow.exceptions import MlflowException

    registry = Registry("lesa-lost", root)
    tags = {"fingerprint": FINGERPRINT, "score": "1"}
    version = registry.register(bundle(tmp_path, "b"), tags=tags, run_tags={})
    real = registry.client.set_registered_model_alias

    def cut_off(*arguments: object) -> None:
        real(*arguments)
        raise MlflowException("connection reset by peer")

    monkeypatch.setattr(registry.client, "set_registered_model_alias", cut_off)
    assert registry.promote(version, lambda champion: version) == (version, None)
    assert registry.alias(CHAMPION) == version

    def refused(*arguments: object) -> None:
        raise MlflowException("server error")

    monkeypatch.setattr(registry.client, "set_registered_model_alias", refused)
    other = registry.register(bundle(tmp_path, "c"), tags=tags, run_tags={})
    with pytest.raises(MlflowException, match="server error"):
        registry.promote(other, lambda champion: other)
    assert registry.alias(CHAMPION) == version
    monkeypatch.undo()
    assert registry.promote(other, lambda champion: None) == (other, other), "recorded before the alias was refused"
    assert registry.alias(CHAMPION) == other


def test_publishing_without_a_registry_fails_clearly_and_in_time(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    folder = bundle(tmp_path, "b")
    begin = time.monotonic()
    with pytest.raises(Exception, match=str(port)):
        Registry("lesa-x", tmp_path).register(folder, tags={}, run_tags={})
    assert time.monotonic() - begin < 30
    assert not (tmp_path / "mlflow.db").exists()
    assert os.path.isdir(folder)
