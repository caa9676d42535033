"""The searches and the comparison, end to end on a tiny workload with recorded trajectories."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import compare
from benchmarks.peers import cache_dit_search, rule_tuning, search_peers
from benchmarks.peers.cache_dit import INSTALL
from benchmarks.peers.learned import learned_peers
from benchmarks.peers.rule_tuning import RULE_OPTIONS
from lesa.models.pipelines import load_pipeline
from lesa.params import Workload
from lesa.params_file import load_params
from lesa.peers.lineup import load_searched, save_searched
from lesa.publishing.bounds import bounds_by_budget
from lesa.publishing.build import make_bundle
from lesa.recording.dataset import recorded_splits
from lesa.recording.prompts import PromptError
from lesa.training.experts import untrained_predictor
from lesa.training.jobs import expert_design
from tests.helpers.recording import record
from tests.helpers.tiny import SPLITS, tiny_repository

EVALUATE = {
    "batch_size": 2,
    "bootstrap": 100,
    "converged_fraction": 0.5,
    "converged_steps": 20,
    "wall_clock_repeats": 1,
}
PEERS = Path("data/peers/tiny.json")
SMALL = ["--samples", "2", "--quick-samples", "1", "--quick-runs", "14", "--runs", "3"]


@dataclasses.dataclass
class Place:
    """A tiny workload with trajectories and a bundle; the working folder is its repository."""

    workload: Workload
    pipe: Any
    bundle: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    before = Path.cwd()
    root = tiny_repository(tmp_path_factory.mktemp("repository"), prompts={**SPLITS, "test": ["a cat", "a photo"]})
    settings = yaml.safe_load((root / "params.yaml").read_text())
    settings["workloads"]["tiny"]["evaluate"] = EVALUATE
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    os.chdir(root)
    try:
        workload = load_params()
        workload = dataclasses.replace(
            workload, predictor=dataclasses.replace(workload.predictor, gate="table", history_sizes=(2, 2, 2))
        )
        pipe = load_pipeline(workload.model, workload.resources.device)
        record(workload, pipe)
        train, validation = recorded_splits(workload.recording)
        predictor = untrained_predictor(expert_design(workload), train.sigmas, train.channels)
        make_bundle(
            workload.paths.bundle,
            workload,
            pipe,
            predictor,
            train,
            validation,
            quality={"2x": {"psnr_mean": 31.5, "psnr_p5": 27.0}},
            error_bounds=bounds_by_budget(pipe, workload, predictor, train, validation),
            evaluation={"samples": 4},
            created_from={"git": "0" * 40},
        )
        yield Place(workload, pipe, workload.paths.bundle)
    finally:
        os.chdir(before)


def test_searches_are_kept_and_gone_on_with(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "adams_bashforth2", "taylor1", "heun"]
    assert search_peers.main(["--evaluations", "4", *methods, *SMALL]) == 0
    first = load_searched(PEERS)
    assert [peer.method for peer in first.peers] == ["adams_bashforth2", "heun", "taylor1"]
    assert first.tuning_samples == 2 and first.workload == "tiny"
    capsys.readouterr()
    assert search_peers.main(["--evaluations", "4", "5", *methods, *SMALL]) == 0
    assert "at 4:" not in capsys.readouterr().out  # what is known is not searched again
    both = load_searched(PEERS)
    assert all(peer in both.peers for peer in first.peers)
    for peer in both.peers:
        assert peer.steps[0] == 0 and list(peer.steps) == sorted(set(peer.steps)) and peer.steps[-1] < 8
        assert 1 <= peer.runs and peer.psnr > 0
    by_key = {(peer.method, peer.evaluations): peer for peer in both.peers}
    for method in ("adams_bashforth2", "taylor1"):
        assert by_key[method, 5].psnr >= by_key[method, 4].psnr - 1.0  # the search that fails is repeated


def test_what_is_worse_with_more_is_searched_again_whichever_came_first(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path("data/peers/order.json")
    arguments = ["--methods", "taylor1", "--out", str(out), *SMALL]
    assert search_peers.main(["--evaluations", "4", "5", *arguments]) == 0
    found = load_searched(out)
    fewer, more = found.peers
    failed = dataclasses.replace(more, steps=(0, 1, 2, 3, 4), psnr=fewer.psnr - 5.0, runs=1)
    save_searched(out, dataclasses.replace(found, peers=(fewer, failed)))
    capsys.readouterr()
    assert search_peers.main(["--evaluations", "4", "5", *arguments]) == 0  # both are known: nothing is missing
    printed = capsys.readouterr()
    again = load_searched(out).peers[1]
    assert "taylor1 at 5:" in printed.out and "taylor1 at 4:" not in printed.out
    assert again.psnr > failed.psnr and again.runs > failed.runs
    told = "warning: taylor1 at 5 is worse than with fewer evaluations" in printed.err
    assert told == (again.psnr < fewer.psnr)


def test_the_comparison_has_every_peer_and_their_steps(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule_tuning, "RULE_OPTIONS", {name: each[:2] for name, each in RULE_OPTIONS.items()})
    monkeypatch.setattr(cache_dit_search, "CALIBRATORS", {"": "DBCache"})
    monkeypatch.setattr(cache_dit_search, "FIXED_BLOCKS", ((1, 0),))
    monkeypatch.setattr(cache_dit_search, "THRESHOLD_TRIALS", 1)
    if not PEERS.exists():
        assert search_peers.main(["--evaluations", "5", "--methods", "taylor1", "heun", *SMALL]) == 0
    found = load_searched(PEERS)
    capsys.readouterr()
    arguments = [str(place.bundle), "--prompts", "2", "--seeds", "1", "--peers", str(PEERS), "--no-linca", "--json"]
    assert compare.main([*arguments, "--out", "kept/found.json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    rows = {row["method"]: row for row in document["rows"]}
    assert json.loads(Path("kept/found.json").read_text()) == document
    lines = Path("kept/found.md").read_text().splitlines()
    assert lines[0].startswith("2 samples of 2 held-out prompts") and len(lines) == 4 + len(rows)
    assert all(any(line.startswith(f"| {row['label']} |") for line in lines) for row in rows.values())
    assert document["warnings"] == []  # one budget: nothing to do worse with
    expected = {"lesa", "taylor1", "unipc2", "spectrum_blend", "hicache_tuned", "spectrum_tuned", "l2p"}
    expected |= {"l2p_full_steps", "teacache", "first_block_cache", "mag_cache", "taylor1_searched", "heun_searched"}
    assert expected <= rows.keys()
    is_installed = importlib.util.find_spec("cache_dit") is not None
    assert is_installed == ({"cache_dit", "cache_dit_dmd_fixed"} <= rows.keys()) == (INSTALL not in printed.err)
    steps = {peer.method: list(peer.steps) for peer in found.peers if peer.evaluations == 5}
    assert rows["taylor1_searched"]["full_steps"] == steps["taylor1"]
    assert rows["heun_searched"]["settings"]["grid"] == steps["heun"]
    for name in expected - {"teacache", "first_block_cache", "mag_cache"}:
        assert rows[name]["computed_steps"] == 5, name


def test_peers_that_saw_the_prompts_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from lesa.recording.prompts import prompt_digests

    if not PEERS.exists():
        assert search_peers.main(["--evaluations", "5", "--methods", "heun", *SMALL]) == 0
    cheat = Path("data/peers/cheat.json")
    save_searched(cheat, dataclasses.replace(load_searched(PEERS), prompt_digests=tuple(prompt_digests(["a cat"]))))
    assert compare.main([str(place.bundle), "--prompts", "2", "--peers", str(cheat)]) == 2
    assert "the peers' search saw 1 of 2 prompts" in capsys.readouterr().err
    other = Path("data/peers/other.json")
    save_searched(other, dataclasses.replace(load_searched(PEERS), fingerprint="sha256:other"))
    assert compare.main([str(place.bundle), "--prompts", "2", "--peers", str(other)]) == 2
    assert "search_peers again" in capsys.readouterr().err


def test_learned_peers_are_not_trained_on_what_is_judged(place: Place) -> None:
    with pytest.raises(PromptError, match="judged and trained on"):
        learned_peers(
            place.workload,
            place.pipe,
            place.workload.budgets(),
            prompts=SPLITS["train"][:1],
            seeds=[1],
            judged=["A thin  seven"],
        )
