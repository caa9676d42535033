"""The flow at true size, on a tiny model: a Ray actor, both training steps, a bundle, the pipeline with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.true_size import flow as true_size_flow
from benchmarks.true_size.models import preset_at
from flows.tracking import run as tracking


@pytest.mark.long
def test_the_flow_runs_from_recording_to_an_enabled_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "start_sender", lambda root: None)
    monkeypatch.setattr(tracking, "DRAIN_SECONDS", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out, work = tmp_path / "flow.json", tmp_path / "work"
    command = ["--scale", "small", "--device", "cpu", "--work", str(work), "--out", str(out), "--iterations", "1"]
    assert true_size_flow.main([*command, "--keep"]) == 0
    record = json.loads(out.read_text())
    assert record["recorded"]["recorded"] == record["recording"]["trajectories"] == 4
    assert record["run"] | {"kept_bytes": 0} == {"full": 10, "steps": 50, "kept_bytes": 0}
    assert record["finite"] and record["plain_again_is_the_same"]
    kept = round(16 * record["token_fraction"])
    assert record["store_bytes"] > 4 * 50 * kept * 64 * 2  # features of four trajectories, bfloat16
    # Whole blocks on disk, beside what the files hold.
    assert record["store_bytes"] <= record["store_bytes_estimated"] < 1.5 * record["store_bytes"]
    assert {"record", "train_stage1", "train_stage2", "sample_accelerated"} <= set(record["phases"])
    assert (work / "data/trajectories/true-size.zarr").is_dir()
    with pytest.raises(SystemExit):  # nothing of an earlier run is written over
        true_size_flow.main(command)


def test_the_small_preset_differs_in_size_alone() -> None:
    small, true = preset_at("flux-dev", "small"), preset_at("flux-dev", "true")
    assert (small.scheduler, small.transformer_class, small.num_inference_steps) == (
        true.scheduler,
        true.transformer_class,
        true.num_inference_steps,
    )
