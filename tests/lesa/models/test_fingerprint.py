"""A fingerprint follows the weights and the architecture, and nothing else."""

from __future__ import annotations

import time

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel

from lesa.models.fingerprint import adapters, base_parameters, fingerprint, is_quantized


def model(seed: int = 0, **changes) -> FluxTransformer2DModel:
    settings = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    } | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxTransformer2DModel(**settings)


@pytest.fixture(scope="module")
def expected() -> str:
    return fingerprint(model())


def test_it_is_a_digest_and_repeats(expected):
    assert expected.startswith("sha256:") and len(expected) == 7 + 64
    assert fingerprint(model()) == expected


def test_weights_and_architecture_change_it(expected):
    assert fingerprint(model(seed=1)) != expected
    assert fingerprint(model(guidance_embeds=True)) != expected
    tuned = model()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.02)
    assert fingerprint(tuned) != expected
    # Same shapes and weights, another setting.
    assert fingerprint(model(axes_dims_rope=(8, 4, 4))) != expected


def test_loads_in_two_precisions_have_one_fingerprint(tmp_path, expected):
    model().save_pretrained(tmp_path)
    single = FluxTransformer2DModel.from_pretrained(tmp_path)
    half = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert fingerprint(single) == fingerprint(half) == expected


def test_compiled_and_offloaded_models_have_the_same(expected):
    assert fingerprint(torch.compile(model())) == expected
    blockwise = model()
    blockwise.transformer_blocks[0] = torch.compile(blockwise.transformer_blocks[0])
    assert fingerprint(blockwise) == expected
    offloaded = cpu_offload(model(), execution_device=torch.device("cpu"))
    assert offloaded.proj_out.weight.device.type == "meta"
    assert fingerprint(offloaded) == expected


def test_weights_out_of_reach_are_an_error():
    with torch.device("meta"):
        empty = FluxTransformer2DModel(**{**model().config, "num_layers": 1})
    with pytest.raises(ValueError, match="on the meta device"):
        fingerprint(empty)


def test_adapters_are_named():
    adapted = model()
    assert adapters(adapted) == []
    adapted.peft_config = {"style": object(), "hands": object()}  # where PEFT keeps them
    assert adapters(adapted) == ["hands", "style"]
    assert adapters(torch.compile(adapted)) == ["hands", "style"]


def test_adapter_names_are_taken_off_parameter_names():
    """PEFT wraps a layer: its weight is then called base_layer.weight, beside lora_A and lora_B."""
    plain = model()
    wrapped = model()
    layer = wrapped.proj_out
    wrapper = torch.nn.Module()
    wrapper.base_layer = layer
    wrapper.lora_A = torch.nn.Linear(2, 2)
    wrapped.proj_out = wrapper
    assert sorted(n for n, _ in base_parameters(wrapped)) == sorted(n for n, _ in base_parameters(plain))
    assert fingerprint(wrapped) == fingerprint(plain)


def test_quantised_weights_are_noticed():
    plain = model()
    assert not is_quantized(plain)
    assert not is_quantized(plain.to(torch.bfloat16))
    small = model()
    weight = small.proj_out.weight
    small.proj_out.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert is_quantized(small)
    marked = model()
    marked.hf_quantizer = object()
    assert is_quantized(marked)


def test_a_large_tensor_is_sampled_not_read():
    large = torch.nn.Module()
    large.weight = torch.nn.Parameter(torch.zeros(40_000_000), requires_grad=False)
    start = time.perf_counter()
    fingerprint(large)
    assert time.perf_counter() - start < 0.5
