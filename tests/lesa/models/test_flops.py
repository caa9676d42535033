from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from lesa.models.flops import CallShapes, count_transformer, predictor_bytes, predictor_flops, taylor_flops
from lesa.models.published import PRESETS, at_true_width, default_spec, family_flops, preset_sigmas
from lesa.params import BudgetParams
from lesa.params_file import load_params
from lesa.predictor.spec import PredictorSpec, Variant
from lesa.schedule import Schedule
from lesa.training.experts import predictor_spec
from lesa.training.jobs import expert_design
from tests.helpers.bundles import CALL
from tests.helpers.evaluation import pipeline
from tests.helpers.tiny import tiny_flux

ROOT = Path(__file__).parents[3]


def counted(pipe, batch: int = 1):
    shapes = CallShapes()
    handle = pipe.transformer.register_forward_pre_hook(shapes, with_kwargs=True)
    arguments = {"height": CALL.height, "width": CALL.width, "max_sequence_length": CALL.max_sequence_length}
    pipe(["a dog"] * batch, num_inference_steps=1, output_type="latent", **arguments)
    handle.remove()
    assert shapes.call is not None
    assert all(t.is_meta for t in shapes.call[1].values() if isinstance(t, torch.Tensor))
    return count_transformer(pipe.transformer, *shapes.call)


def test_a_double_block_counts_what_a_person_counts() -> None:
    model = counted(pipeline())
    width, image, text, heads = 32, 16, 16, 2
    tokens = image + text
    assert (model.tokens, model.channels) == (image, width)
    projections = 2 * tokens * width * width * 4  # query, key, value, output of each stream
    attention = 2 * 2 * tokens * tokens * (width // heads) * heads
    feed_forward = 2 * tokens * width * 4 * width * 2
    modulation = 2 * 2 * width * 6 * width
    assert model.blocks[0] == projections + attention + feed_forward + modulation


def test_ends_do_not_grow_with_blocks_and_samples_are_counted_one_by_one() -> None:
    small, large = counted(pipeline()), counted(tiny_flux(num_layers=3))
    assert large.head == small.head
    assert large.total == pytest.approx(small.total + small.blocks[0])
    batched = counted(pipeline(), batch=3)
    assert batched.total == pytest.approx(small.total)
    assert batched.head == pytest.approx(small.head)


def spec(projection: str, history: str = "full_steps") -> PredictorSpec:
    return PredictorSpec(
        channels=10,
        num_steps=8,
        boundaries=(0.5,),
        history_sizes=(2, 3),
        variants=(Variant(name="a", full_steps=tuple(range(4))),),
        projection=projection,
        rank=4,
        history=history,
    )


def test_the_predictor_projects_once_an_anchor_and_stage() -> None:
    schedule = Schedule.explicit(8, (0, 1, 2, 5))  # predicted: 3 4 | 6 7
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0])
    # Anchor 2 serves step 3 in stage 0 (history 2) and 4 in stage 1 (history 3); anchor 5 serves 6 and 7.
    dense = 2 * (20 * 10) + 2 * (30 * 10) + 2 * (30 * 10)
    per_channel = 2 * (20 + 30 + 30)
    low_rank = per_channel + 2 * 4 * ((20 + 10) + 2 * (30 + 10))
    additions = 4 * 2 * 10
    for kind, products in (("dense", dense), ("per_channel", per_channel), ("low_rank", low_rank)):
        assert predictor_flops(spec(kind), schedule, sigmas, tokens=7) == 7 * (products + additions)
    # With its own predictions in the history every step has a projection of its own.
    stepwise = 2 * (20 * 10) + 3 * 2 * (30 * 10)
    assert predictor_flops(spec("dense", "steps"), schedule, sigmas, tokens=7) == 7 * (stepwise + additions)


@pytest.mark.parametrize("projection", ["per_channel", "low_rank", "dense"])
def test_weights_of_each_step_cost_a_few_additions(projection: str) -> None:
    schedule = Schedule.explicit(8, (0, 1, 2, 5))
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0])
    own = dataclasses.replace(spec(projection), kind="per_step", step_history=3)
    products = {"per_channel": 0, "low_rank": 2 * 4 * ((20 + 10) + 2 * (30 + 10)), "dense": 2 * (20 + 60) * 10}
    differences = 2 * 10 * 2  # two of them, once at anchors 2 and 5
    terms = (6 + 1 + (projection != "per_channel") * 2) * 10 * 4
    assert predictor_flops(own, schedule, sigmas, tokens=7) == 7 * (products[projection] + differences + terms)


def test_bytes_kept_are_what_a_run_holds() -> None:
    own = dataclasses.replace(spec("low_rank"), kind="per_step", step_history=3)
    held = predictor_bytes(own, tokens=7)
    assert held["features"] == 3 * 7 * 10 * 2 and held["derived"] == 3 * 7 * 10 * 2  # two differences and z
    assert held["weights"] == 2 * (8 * 4 * 10 + 4 * 10 * (2 + 1) + 4 * 10 * (3 + 1))
    plain = predictor_bytes(spec("dense"), tokens=7)
    assert plain["derived"] == 7 * 10 * 2 and plain["weights"] == 2 * ((2 + 3) * 100 + (3 + 4) * 10)


def test_taylor_costs_differences_once_and_additions_every_step() -> None:
    schedule = Schedule.explicit(8, (0, 1, 2, 5))
    assert taylor_flops(1, schedule, tokens=7, channels=10) == 2 * 70 * (2 + 4)
    assert taylor_flops(2, schedule, tokens=7, channels=10) == 2 * taylor_flops(
        1, schedule, tokens=7, channels=10
    )


@pytest.mark.parametrize(
    ("name", "call", "image"),
    [("flux-dev", 74.38, 3719.2), ("qwen-image", 131.7, 13168.2), ("hunyuan-video", 595.4, 29771.4)],
)
def test_true_sizes_are_the_published_ones(name: str, call: float, image: float) -> None:
    found = family_flops(name)
    assert found.model.total / 1e12 == pytest.approx(call, abs=0.05)
    assert found.plain / 1e12 == pytest.approx(image, rel=1e-4)
    assert found.model.channels == 3072
    assert found.schedule.ratio == 5.0
    assert 4.9 < found.ratio < 5.0  # the predictor and the ends are paid for, and are little
    assert "5.00x" in str(found) and found.to_dict()["flops_ratio"] == found.ratio


def test_distilled_presets_and_other_predictors() -> None:
    schnell = family_flops("flux-schnell")
    assert schnell.schedule.full_steps == (0, 3) and schnell.ratio == pytest.approx(1.99, abs=0.02)
    schedule = Schedule.uniform(4, 3, warmup_steps=0)
    lightning = family_flops("qwen-image-lightning")
    assert lightning.schedule.full_steps == (0, 1, 2, 5) and lightning.ratio == pytest.approx(2.0, abs=0.02)
    narrow = default_spec(64, 4)
    widened = family_flops("flux-schnell", schedule, narrow)
    assert widened.to_dict() == family_flops("flux-schnell", schedule, at_true_width(narrow, 3072, 4)).to_dict()
    assert at_true_width(narrow, 3072, 4).rank == 768  # a quarter of the width, as it was
    with pytest.raises(ValueError, match="flux-dev, flux-schnell"):
        family_flops("flux-3")


@pytest.mark.parametrize(("interval", "num_full", "least"), [(7, 10, 4.95), (10, 8, 6.15)])
@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "hunyuan-video"])
def test_the_default_form_costs_next_to_nothing(name: str, interval: int, num_full: int, least: float) -> None:
    found = family_flops(name, Schedule.uniform(50, interval))
    assert found.schedule.num_full == num_full
    assert found.ratio >= least
    assert found.to_dict()["predictor_full_calls"] <= 0.1
    if name == "flux-dev":
        assert sum(found.bytes_kept.values()) <= 0.30e9


def test_the_default_form_is_the_default_workloads() -> None:
    workload = load_params(ROOT / "params.yaml", "flux-digits")
    searched = {name: BudgetParams(interval=7) for name in workload.schedule.budgets}
    workload = dataclasses.replace(workload, schedule=dataclasses.replace(workload.schedule, budgets=searched))
    # The experts for other numbers of steps are beside the form that is counted.
    trained = dataclasses.replace(predictor_spec(expert_design(workload), 128), step_counts=())
    assert dataclasses.replace(default_spec(128, 50), variants=trained.variants) == trained


def test_parts_are_counted_right() -> None:
    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        )
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        llama = LlamaModel(
            LlamaConfig(vocab_size=128_320, hidden_size=4096, intermediate_size=14_336, num_key_value_heads=8)
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        autoencoders = AutoencoderKLQwenImage(), AutoencoderKLHunyuanVideo()
    flux, hunyuan = PRESETS["flux-dev"].parts, PRESETS["hunyuan-video"].parts
    assert (flux["text_encoder_2"], flux["text_encoder"], flux["vae"]) == (size(t5), size(clip), size(vae))
    assert (hunyuan["text_encoder"], hunyuan["vae"]) == (size(llama), size(autoencoders[1]))
    assert PRESETS["qwen-image"].parts["vae"] == size(autoencoders[0])


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_noise_levels_are_the_pipelines() -> None:
    for preset in PRESETS.values():
        sigmas = preset_sigmas(preset, preset.num_inference_steps)
        assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
        assert (sigmas[:-1] > sigmas[1:]).all()
    assert preset_sigmas(PRESETS["qwen-image"], 50)[-2] == pytest.approx(0.02, abs=1e-6)
