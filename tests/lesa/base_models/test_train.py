"""A few steps of a base model's training, for each data set: the folders it leaves are a pipeline and a scorer."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from lesa import params_file as params
from lesa.base_models.architectures import architecture_of
from lesa.base_models.data_sets import DATA_SETS, DataSet
from lesa.base_models.fit_flow import draw_sigmas
from lesa.base_models.fit_vae import encode
from lesa.base_models.scorer import load_scorer
from lesa.base_models.students import STUDENTS
from lesa.base_models.train import train_base
from lesa.models.families import FAMILIES
from lesa.params import BaseParams
from lesa.params_file import load_params

ROOT = Path(__file__).parents[3]
PLAIN = {
    "flux-digits": "a thin seven",
    "flux-photos": "a view of the temple, top row, left",
    "qwen-digits": "a thin seventy two",
    "hunyuan-moving-digits": "a thin seven, turning",
}
# Prompts that the encoders must tell apart.
CLOSE = {
    "flux-digits": ["a two", "a three", "a two, black on white", "a two, white on black"],
    "flux-photos": [
        "a view of the temple, top row, left",
        "a view of the flower, top row, left",
        "a view of the temple, top row, far left",
        "a view of the temple, top row, left, mirrored",
    ],
    "qwen-digits": ["a twenty three", "a thirty two", "a twenty three, black on white", "a bold twenty three"],
    "hunyuan-moving-digits": [
        "a two, moving left",
        "a two, moving right",
        "a two, black on white",
        "a two, white on black, moving up",
    ],
}
WEIGHTS = (
    "base/transformer/diffusion_pytorch_model",
    "base/vae/diffusion_pytorch_model",
    "scorer/weights",
)


def train(
    data_set: DataSet, folder: Path, steps: int = 3
) -> tuple[dict[str, float], list[tuple[int, dict[str, float]]]]:
    reports: list[tuple[int, dict[str, float]]] = []
    metrics = train_base(
        data_set,
        base_dir=folder / "base",
        scorer_dir=folder / "scorer",
        prompts=data_set.language.split_prompts()["base"][:40],
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        seed=7,
        device="cpu",
        report=lambda step, values: reports.append((step, values)),
    )
    return metrics, reports


@pytest.fixture(scope="module", params=DATA_SETS.values(), ids=DATA_SETS)
def data_set(request: pytest.FixtureRequest) -> DataSet:
    return request.param


@pytest.fixture(scope="module")
def trained(data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "base").mkdir()
    (folder / "base" / "left over").write_text("replaced with the folder")
    metrics, reports = train(data_set, folder)
    assert set(metrics) == {"vae_psnr", "flow_loss", "scorer_accuracy", "agreement"}
    assert 0 <= metrics["agreement"] <= 1 and metrics["flow_loss"] > 0
    assert {key for _, values in reports for key in values} >= {
        "flow_loss",
        "vae_loss",
        "scorer_loss",
        "text_loss",
    }
    return folder


def test_the_folder_is_a_pipeline_of_the_family(data_set: DataSet, trained: Path) -> None:
    architecture = architecture_of(data_set)
    pipeline = architecture.load(trained / "base")
    assert type(pipeline).__name__ in FAMILIES[data_set.family].pipeline_classes
    pipeline.set_progress_bar_config(disable=True)
    call = architecture.call(data_set) | {"num_inference_steps": 4}
    images = pipeline(
        prompt=[PLAIN[data_set.name], data_set.language.all_prompts()[0]],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
        **call,
    )[0]
    assert images.shape == (2, *picture_shape(data_set)) and torch.isfinite(images).all()
    assert sorted(p.name for p in trained.iterdir()) == ["base", "scorer"]
    assert not (trained / "base" / "left over").exists()


def test_latents_are_normalised_as_the_pipeline_undoes_it(data_set: DataSet, trained: Path) -> None:
    """What the transformer learns to make, decoded by the pipeline's own call, is the picture it was made from."""
    architecture = architecture_of(data_set)
    pipeline = architecture.load(trained / "base")
    pipeline.set_progress_bar_config(disable=True)
    images = data_set.load("model")([PLAIN[data_set.name]] * 2, torch.Generator().manual_seed(3))
    latents = encode(architecture, pipeline.vae, images)
    clean = architecture.to_transformer(pipeline, latents)
    assert clean.shape[1:] == architecture.latent_shape(data_set)
    assert 0.2 < float(clean.std()) < 5 and clean.mean().abs() < 1

    class Stops(torch.nn.Module):
        """A transformer whose one step leads from the noise to the given latents."""

        def __init__(self, real: torch.nn.Module) -> None:
            super().__init__()
            self.real, self.config, self.dtype, self.device = real, real.config, real.dtype, real.device
            self.cache_context = real.cache_context

        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
            return (hidden_states - clean,)

    pipeline.transformer = Stops(pipeline.transformer)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    call = architecture.call(data_set) | {"num_inference_steps": 1}
    call |= {"true_cfg_scale": 1.0} if "true_cfg_scale" in call else {}
    made = pipeline(prompt=[PLAIN[data_set.name]] * 2, output_type="pt", return_dict=False, **call)[0]
    with torch.no_grad():
        decoded = architecture.from_autoencoder(pipeline.vae.decode(latents).sample)
    assert torch.allclose(made, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_the_velocity_is_the_pipelines_call(data_set: DataSet, trained: Path) -> None:
    """The transformer is trained with the arguments that its pipeline gives it."""
    architecture = architecture_of(data_set)
    pipeline = architecture.load(trained / "base")
    pipeline.set_progress_bar_config(disable=True)
    prompts = CLOSE[data_set.name]
    calls: list[dict[str, torch.Tensor]] = []
    outputs: list[torch.Tensor] = []

    def keep(module: object, args: object, kwargs: dict[str, torch.Tensor], output: tuple[torch.Tensor]) -> None:
        calls.append(kwargs)
        outputs.append(output[0])

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    call = architecture.call(data_set) | {"num_inference_steps": 3}
    call |= {"true_cfg_scale": 1.0} if "true_cfg_scale" in call else {}
    pipeline(prompt=prompts, output_type="latent", return_dict=False, **call)
    hook.remove()
    with torch.no_grad():
        conditioning = architecture.read(pipeline, data_set, prompts)
        for given, expected, sigma in zip(calls, outputs, pipeline.scheduler.sigmas, strict=False):
            ours = architecture.velocity(
                pipeline,
                data_set,
                given["hidden_states"],
                sigma.expand(4),
                torch.full((4,), architecture.guidance),
                conditioning,
            )
            assert torch.allclose(ours, expected, atol=1e-5)


def test_noise_levels_are_drawn_as_the_sampler_steps(data_set: DataSet, trained: Path) -> None:
    architecture = architecture_of(data_set)
    pipeline = architecture.load(trained / "base")
    pipeline.set_progress_bar_config(disable=True)
    call = architecture.call(data_set) | {"num_inference_steps": 50}
    pipeline(prompt=[PLAIN[data_set.name]], output_type="latent", return_dict=False, **call)
    stepped = pipeline.scheduler.sigmas[:-1]
    num_tokens = architecture.latent_shape(data_set)[0]
    drawn = draw_sigmas(pipeline, 50, num_tokens, torch.Generator().manual_seed(0)).sort(descending=True).values
    # One draw in each fiftieth, the sampler's steps at its upper end; Qwen-Image's levels are stretched to end at 0.02.
    slack = 0.021 if data_set.family == "qwen-image" else 1e-4
    assert (drawn <= stepped + slack).all() and (drawn[:-1] >= stepped[1:] - slack).all()


def test_text_reaches_every_output_of_the_encoders(data_set: DataSet, trained: Path) -> None:
    architecture = architecture_of(data_set)
    pipeline = architecture.load(trained / "base")
    with torch.no_grad():
        read = architecture.read(pipeline, data_set, CLOSE[data_set.name])
    width = pipeline.transformer.config.get("joint_attention_dim") or pipeline.transformer.config.text_embed_dim
    assert read["encoder_hidden_states"].shape[2] == width
    for name, value in read.items():
        for first in range(4):
            for second in range(first):
                assert name.endswith("_mask") or (value[first] - value[second]).abs().max() > 1e-2, name


def test_training_is_deterministic(data_set: DataSet, trained: Path, tmp_path: Path) -> None:
    train(data_set, tmp_path)
    for part in WEIGHTS:
        first, second = (load_file(root / f"{part}.safetensors") for root in (trained, tmp_path))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part


@pytest.mark.parametrize("data_set", [DATA_SETS["flux-digits"]], indirect=True, ids=["flux-digits"])
def test_without_a_reading_there_is_no_scorer(data_set: DataSet, trained: Path, tmp_path: Path) -> None:
    """No folder of it, and nothing reported that it would measure."""
    metrics, reports = train(dataclasses.replace(data_set, reading=None), tmp_path)
    assert set(metrics) == {"vae_psnr", "flow_loss"}
    assert not any("scorer_loss" in values for _, values in reports)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    architecture_of(data_set).load(tmp_path / "base")


def test_the_scorer_judges_only_what_it_reads(data_set: DataSet, trained: Path) -> None:
    scorer = load_scorer(trained / "scorer")
    shape, prompts = picture_shape(data_set), CLOSE[data_set.name][:3]
    assert scorer.data_set is data_set
    agreed = scorer.agreement(torch.rand(3, *shape), prompts)
    assert agreed.shape == (3,) and agreed.dtype == torch.bool
    with pytest.raises(ValueError, match=rf"reads \[B, {', '.join(map(str, shape))}\]"):
        scorer.agreement(torch.rand(1, 3, 32, 32), prompts[:1])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        scorer.agreement(torch.rand(2, *shape), prompts[:1])


def test_a_damaged_scorer_is_refused(data_set: DataSet, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks scorer.json and weights.safetensors"):
        load_scorer(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((trained / "scorer" / "weights.safetensors").read_bytes())
    card = json.loads((trained / "scorer" / "scorer.json").read_text())
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"kind": "cat-finder"}))
    with pytest.raises(ValueError, match=r"kind is 'cat-finder', not one of digit-reader, place-reader"):
        load_scorer(tmp_path)
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"size": [32, 32], "classes": ["cat"]}))
    with pytest.raises(ValueError, match=r"size is \[32, 32\].*classes is \['cat'\]"):
        load_scorer(tmp_path)
    other = "number-reader" if data_set.name != "qwen-digits" else "digit-reader"
    (tmp_path / "scorer.json").write_text(json.dumps(card | {"kind": other}))
    with pytest.raises(ValueError, match=r"size is .*classes is "):  # another data set's
        load_scorer(tmp_path)


def test_bad_arguments_are_refused_before_anything_is_written(data_set: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        train_base(
            data_set,
            base_dir=tmp_path / "base",
            scorer_dir=tmp_path / "scorer",
            prompts=["a purple seven"],
            steps=0,
            batch_size=1,
            learning_rate=-1.0,
            seed=0,
            device="cpu",
            report=lambda step, values: None,
        )
    for problem in ("steps is 0", "batch_size is 1", "learning_rate is -1.0", "'purple'"):
        assert problem in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_workload_calls_its_model_as_it_was_trained(data_set: DataSet) -> None:
    workload = load_params(ROOT / "params.yaml", data_set.name)
    assert workload.base is not None and workload.base.trainer == data_set.name
    assert workload.prompts == data_set.name and workload.model.family == data_set.family
    call = architecture_of(data_set).call(data_set)
    given = {name: value for name, value in dataclasses.asdict(workload.call).items() if value is not None}
    assert given == call


def test_the_settings_name_every_trainer() -> None:
    assert get_args(get_type_hints(BaseParams)["trainer"]) == (*DATA_SETS, *STUDENTS)
    assert params.STUDENTS == tuple(STUDENTS)


def picture_shape(data_set: DataSet) -> tuple[int, ...]:
    frames = () if data_set.num_frames is None else (data_set.num_frames,)
    return (*frames, 3, data_set.height, data_set.width)
