"""Loading is strict about what it loads, sampling about noise and arguments."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from lesa.models.pipelines import (
    PipelineError,
    call_arguments,
    load_pipeline,
    pick_device,
    release_memory,
    sample,
)
from lesa.params import CallParams, Workload
from lesa.params_file import load_params
from tests.helpers.tiny import CALL, PROMPTS, tiny_flux, tiny_repository

PLAIN = CallParams(num_inference_steps=3, **CALL)


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return tiny_flux()


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.chdir(tiny_repository(tmp_path))
    return load_params()


def test_a_pipeline_nobody_uses_any_more_is_given_back(workload: Workload, capfd) -> None:
    loaded = load_pipeline(workload.model, workload.resources.device)
    sample(loaded, PROMPTS[:1], [1], PLAIN)
    watched = weakref.ref(loaded.transformer)
    del loaded
    release_memory()
    assert watched() is None
    assert "Loading" not in capfd.readouterr().err


def test_device_is_one_setting() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="auto, cpu or cuda"):
        pick_device("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU"):
        pick_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_noise_is_the_same_on_a_gpu(workload: Workload) -> None:
    cpu, gpu = load_pipeline(workload.model, "cpu"), load_pipeline(workload.model, "cuda")
    difference = sample(cpu, PROMPTS[:1], [1], PLAIN) - sample(gpu, PROMPTS[:1], [1], PLAIN)
    assert difference.abs().max() < 1e-2


def test_a_workload_loads_like_any_pipeline(workload: Workload) -> None:
    pipe = load_pipeline(workload.model, workload.resources.device)
    assert type(pipe).__name__ == "FluxPipeline"
    assert pipe.transformer.dtype == torch.float32 and pipe.device.type == "cpu"
    other = FluxPipeline.from_pretrained(workload.model.source)
    assert torch.equal(sample(pipe, PROMPTS, [1] * 4, PLAIN), sample(other, PROMPTS, [1] * 4, PLAIN))


def test_a_missing_folder_names_the_remedy(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "data/base/tiny").rename(tmp_path / "gone")
    with pytest.raises(PipelineError, match=r"data/base/tiny is not a folder"):
        load_pipeline(workload.model, workload.resources.device)
    (tmp_path / "data/base/tiny").mkdir()
    with pytest.raises(PipelineError, match=r"model_index.json does not exist"):
        load_pipeline(workload.model, workload.resources.device)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "_class_name",
            "StableDiffusionPipeline",
            "got 'StableDiffusionPipeline', the family has FluxPipeline",
        ),
        ("_class_name", ["pipeline", "Mine"], "the family has FluxPipeline"),
        ("vae", ["my_module", "AutoencoderKL"], "other code is never run"),
        ("text_encoder", ["os", "system"], "other code is never run"),
        ("transformer", ["diffusers", "SD3Transformer2DModel"], "the family has 'FluxTransformer2DModel'"),
    ],
)
def test_an_index_that_names_other_code_is_refused(
    workload: Workload, name: str, value: object, message: str
) -> None:
    path = Path(workload.model.source) / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(PipelineError, match=message):
        load_pipeline(workload.model, workload.resources.device)


def test_code_beside_the_weights_is_never_run(workload: Workload, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for folder in (Path(workload.model.source), Path(workload.model.source) / "transformer"):
        (folder / "pipeline.py").write_text(f"open({str(canary)!r}, 'w')")
    load_pipeline(workload.model, workload.resources.device)
    assert not canary.exists()


def test_weights_as_pickle_are_refused(workload: Workload) -> None:
    folder = Path(workload.model.source) / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(workload.model, workload.resources.device)


def test_a_sample_depends_on_its_seed_and_not_on_its_place(pipe: FluxPipeline) -> None:
    together = sample(pipe, PROMPTS, [5, 6, 7, 8], PLAIN, batch_size=4)
    assert together.shape == (4, 3, 16, 16) and together.dtype == torch.float32
    assert 0 <= together.min() and together.max() <= 1
    split = sample(pipe, PROMPTS, [5, 6, 7, 8], PLAIN, batch_size=3)
    assert torch.allclose(together, split, atol=1e-5)
    backwards = sample(pipe, PROMPTS[::-1], [8, 7, 6, 5], PLAIN, batch_size=4)
    assert torch.allclose(together, backwards.flip(0), atol=1e-5)
    assert not torch.allclose(together[:1], sample(pipe, PROMPTS[:1], [6], PLAIN), atol=1e-3)


def test_sampling_leaves_the_global_random_state_alone(pipe: FluxPipeline) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sample(pipe, PROMPTS[:1], [1], PLAIN)
    assert torch.equal(torch.rand(1), expected)


def test_latents_can_be_asked_for(pipe: FluxPipeline) -> None:
    latents = sample(pipe, PROMPTS[:2], [1, 2], PLAIN, output_type="latent")
    assert latents.shape == (2, 16, 16) and latents.dtype == torch.float32


def test_sigmas_replace_the_grid(pipe: FluxPipeline) -> None:
    sample(pipe, PROMPTS[:1], [1], PLAIN, sigmas=[1.0, 0.6, 0.3, 0.1, 0.05])
    assert len(pipe.scheduler.timesteps) == 5


def test_misuse_of_sample_is_refused(pipe: FluxPipeline) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample(pipe, PROMPTS[:2], [1], PLAIN)
    with pytest.raises(ValueError, match="at least one"):
        sample(pipe, [], [], PLAIN)
    with pytest.raises(ValueError, match="batch_size"):
        sample(pipe, PROMPTS[:1], [1], PLAIN, batch_size=0)


def test_arguments_a_pipeline_does_not_take_are_refused_and_none_is_left_out(pipe: FluxPipeline) -> None:
    arguments = call_arguments(pipe, CallParams(height=16, width=16, num_inference_steps=3), 1)
    assert arguments == {"height": 16, "width": 16, "num_inference_steps": 3}
    video = CallParams(height=16, width=16, num_inference_steps=3, num_frames=5)
    with pytest.raises(PipelineError, match=r"FluxPipeline does not take call.num_frames \(5\)"):
        call_arguments(pipe, video, 1)
    guided = CallParams(height=16, width=16, num_inference_steps=3, true_cfg_scale=4.0)
    assert len(call_arguments(pipe, guided, 3)["negative_prompt"]) == 3
