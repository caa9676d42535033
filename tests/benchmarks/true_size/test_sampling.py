"""The benchmarks at the published models' true size, on tiny models of the same classes; counting needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import flops
from benchmarks.true_size import sampling as true_size
from benchmarks.true_size.models import build_pipeline, call_arguments, preset_at
from lesa.models.published import PRESETS


def test_flops_are_written_as_counted(tmp_path: Path) -> None:
    assert flops.main(["--family", "flux-dev", "--out", str(tmp_path / "flops")]) == 0
    record = json.loads((tmp_path / "flops.json").read_text())
    assert [len(row["schedule"]["full_steps"]) for row in record["rows"]] == [10, 8]
    kept = json.loads(Path("benchmarks/results/flops.json").read_text())
    of_flux = [row for row in kept["rows"] if row["family"] == "flux-dev"]
    assert record["rows"] == of_flux  # what is in the repository is what the code counts
    assert "4.992x" in (tmp_path / "flops.md").read_text()


def test_a_small_run_measures_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "true_size.json"
    command = ["--scale", "small", "--device", "cpu", "--family", "flux-dev", "--rounds", "1", "--out", str(out)]
    assert true_size.main(command) == 0
    record = json.loads(out.read_text())
    assert record["command"].endswith(" ".join(command)) and record["date"] and record["chip"]
    (model,) = record["models"]
    assert model["plain"]["computed_calls"] == model["plain"]["calls"] == 50
    rows = {row["method"]: row for row in model["methods"]}
    assert {"lesa", "diffusers_taylorseer1", "diffusers_taylorseer_lite1"} <= set(rows)
    for name in ("lesa", "diffusers_taylorseer_lite1"):
        assert rows[name]["computed_calls"] == 10 and rows[name]["finite"]
    feature = 16 * 64 * 2  # tokens, channels, bytes
    assert 6 * feature <= rows["lesa"]["bytes_kept"] < 6.1 * feature  # three features, two differences, z
    assert rows["lesa"]["ratio"] == pytest.approx(
        model["plain"]["seconds"]["median"] / rows["lesa"]["seconds"]["median"]
    )
    assert set(model["predictor_alone_seconds"]["10"]) == {"first_after_full", "later", "weights_bytes"}


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video"])
def test_the_other_pipelines_run_from_embeddings(name: str) -> None:
    torch.manual_seed(0)
    preset = preset_at(name, "small")
    pipe = build_pipeline(preset, torch.device("cpu"), torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    latents = true_size.run(pipe, call_arguments(preset, pipe) | {"num_inference_steps": 2})
    assert torch.isfinite(latents).all()
    assert preset_at(name, "true") is PRESETS[name]


def test_a_method_that_fails_is_a_row_that_says_so() -> None:
    class Broken:
        def using(self, pipe: object, sigmas: object) -> object:
            raise torch.OutOfMemoryError("no room\nand more")

    found = true_size.take_turns(None, {}, torch.zeros(1), {"broken": Broken()}, torch.device("cpu"), 2)  # type: ignore[dict-item]
    assert found == {"broken": {"error": "OutOfMemoryError: no room"}}


def test_true_size_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        true_size.main(["--scale", "true"])
    assert "--scale small runs the same code here" in capsys.readouterr().err
