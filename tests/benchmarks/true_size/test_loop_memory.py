"""The memory of the closed loop's gradient: what it grows with, counted on shapes alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.true_size import loop_memory
from benchmarks.true_size.loop_memory import LiveBytes, Loop
from benchmarks.true_size.models import build_transformer, preset_at
from lesa.models.flops import call_inputs
from lesa.params_file import load_params
from lesa.schedule import Schedule

NUM_STEPS, FEW, MANY = 8, (0, 1, 4), (0, 1, 2, 4, 5, 6)


def peaks(name: str, full_steps: tuple[int, ...], branches: int = 1) -> tuple[int, int, int]:
    """Recomputed, kept, and the bytes of a feature."""
    preset, workload = preset_at(name, "small"), load_params(workload=name)
    preset = dataclasses.replace(preset, call=dataclasses.replace(preset.call, height=512, width=512))  # many tokens
    transformer = build_transformer(preset, torch.device("meta"), torch.bfloat16)
    loop = Loop(
        transformer=transformer,
        inputs=call_inputs(transformer, preset.grid, preset.text_tokens, dtype=torch.bfloat16),
        workload=workload,
        schedule=Schedule.explicit(NUM_STEPS, full_steps),
        branches=branches,
    )
    frames, rows, columns = preset.grid
    return loop.peak(True), loop.peak(False), frames * rows * columns * 64 * 2


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image"])
def test_recomputing_keeps_features_and_predictions_of_a_step_and_nothing_of_its_blocks(name: str) -> None:
    few, few_kept, feature = peaks(name, FEW)
    many, many_kept, _ = peaks(name, MANY)
    further = len(MANY) - len(FEW)
    # A full step more is a prediction less: it keeps latents and a feature, once as a part of its call's output.
    assert many - few <= 2 * further * feature
    assert many_kept - few_kept > 20 * further * feature


def test_guidance_branches_are_gone_through_one_after_the_other() -> None:
    one, one_kept, feature = peaks("qwen-image", MANY)
    two, two_kept, _ = peaks("qwen-image", MANY, branches=2)
    assert two - one <= 3 * NUM_STEPS * feature
    assert two_kept - one_kept > 20 * len(MANY) * feature


def test_storages_count_once_and_only_as_long_as_they_are_held() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100, device="meta")
        other = kept.view(10, 10).T + 1.0
        assert (live.now, live.peak) == (800, 800)
        del other
        assert (live.now, live.peak) == (400, 800)
        kept = kept[:50].clone()
    assert (live.now, live.peak) == (200, 800)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_memory, "even", lambda *_: Schedule.explicit(NUM_STEPS, FEW))
    out = tmp_path / "memory.json"
    command = ["--scale", "small", "--family", "flux-dev", "--full", "3", "--kept"]
    assert loop_memory.main([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["model"] == "flux-dev" and min(row["recomputed"], row["kept"]) > row["weights"]
    assert out.with_suffix(".md").read_text().splitlines()[-1].split("|")[:7] == (
        capsys.readouterr().out.splitlines()[-1].split("|")[:7]
    )
    monkeypatch.setattr(loop_memory, "measure", lambda *_: pytest.fail("a row that is there is not counted again"))
    assert loop_memory.main([*command, "--out", str(out)]) == 0


def test_even_steps_are_as_many_as_asked_for() -> None:
    for count in (3, 5, 10, 16):
        schedule = loop_memory.even(50, count)
        assert schedule.num_full == count and schedule.full_steps[:2] == (0, 1)
