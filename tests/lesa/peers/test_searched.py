from __future__ import annotations

import json
from pathlib import Path

import pytest

from lesa.peers.lineup import Searched, SearchedPeers, load_searched, save_searched
from lesa.recording.prompts import PromptError, prompt_digests

FOUND = SearchedPeers(
    workload="tiny",
    fingerprint="sha256:abc",
    prompt_digests=tuple(prompt_digests(["a thin seven"])),
    tuning_samples=1,
    peers=(
        Searched(
            method="hicache",
            num_steps=10,
            evaluations=3,
            steps=(0, 4, 7),
            psnr=30.5,
            runs=12,
            options={"contraction": 0.6},
        ),
    ),
)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "peers" / "tiny.json"
    save_searched(path, FOUND)
    assert load_searched(path) == FOUND


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    with pytest.raises(ValueError, match="benchmarks.peers.search_peers"):
        load_searched(path)
    save_searched(path, FOUND)
    record = json.loads(path.read_text())
    for broken in ("{", json.dumps({**record, "schema": "other"}), json.dumps({**record, "more": 1}), "[]"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="not a file of searched peers"):
            load_searched(path)


def test_it_is_refused_for_other_transformers_and_for_what_it_saw() -> None:
    FOUND.refuse(["a bold two"], "sha256:abc")
    with pytest.raises(ValueError, match="search_peers again"):
        FOUND.refuse(["a bold two"], "sha256:other")
    with pytest.raises(PromptError, match="1 of 2 prompts"):
        FOUND.refuse(["a bold two", "a thin seven"], "sha256:abc")
