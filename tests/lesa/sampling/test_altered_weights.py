"""Weights that a bundle was not measured with: LoRA adapters before and after enabling, float8 and int8 storage."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lesa
from lesa.bundle import Bundle
from lesa.models.fingerprint import fingerprint
from lesa.sampling.checks import MismatchError
from tests.helpers import tiny_hunyuan, tiny_qwen_variants
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_flux_variants import text_to_image

TEXT: dict[str, Callable[[], PictureCall]] = {
    "flux": text_to_image,
    "qwen-image": tiny_qwen_variants.text_to_image,
    "hunyuan-video": tiny_hunyuan.text_to_video,
}


@pytest.fixture(params=list(TEXT))
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PictureCall, Bundle]:
    call = TEXT[request.param]()
    return call, call.own_bundle(tmp_path / "bundle")


def save_adapter(call: PictureCall, folder: Path) -> None:
    """A LoRA of random weights, written as its makers would; the pipeline is as it was afterwards."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's; the dev extra has it")
    transformer = call.pipe.transformer
    settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer.add_adapter(settings, adapter_name="style")
    layers = peft.get_peft_model_state_dict(transformer, adapter_name="style")
    type(call.pipe).save_lora_weights(folder, transformer_lora_layers=layers)
    transformer.delete_adapters("style")
    call.pipe.unload_lora_weights()


def test_an_adapter_loaded_before_or_after(made: tuple[PictureCall, Bundle], tmp_path: Path) -> None:
    call, bundle = made
    plain, name = call.run(), fingerprint(call.pipe.transformer)
    save_adapter(call, tmp_path / "lora")
    assert torch.equal(call.run(), plain)

    call.pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    styled = call.run()
    assert not torch.allclose(styled, plain, atol=1e-4)
    assert fingerprint(call.pipe.transformer) == name  # the base model is the same
    with pytest.raises(MismatchError, match=r"adapters: got style, expected none.*allow=\('lora',\)"):
        lesa.enable(call.pipe, bundle)
    lesa.enable(call.pipe, bundle, allow=("lora",), interval=1)
    assert torch.equal(call.run(), styled)
    lesa.disable(call.pipe)
    lesa.enable(call.pipe, bundle, allow=("lora",))
    before = call.run()
    assert lesa.summary(call.pipe).notes["not measured with"] == "adapters style"
    lesa.disable(call.pipe)
    call.pipe.unload_lora_weights()
    assert torch.equal(call.run(), plain)

    lesa.enable(call.pipe, bundle)
    call.pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    with pytest.raises(MismatchError, match="adapters: got style"):
        call.run()
    lesa.disable(call.pipe)
    call.pipe.unload_lora_weights()
    lesa.enable(call.pipe, bundle, allow=("lora",))
    call.pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    assert torch.equal(call.run(), before)
    assert lesa.summary(call.pipe).notes["not measured with"] == "adapters style"
    call.pipe.unload_lora_weights()
    call.run()
    assert "not measured with" not in lesa.summary(call.pipe).notes
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)


def fuse(call: PictureCall, folder: Path) -> None:
    """A LoRA fused into the weights, of which nothing else tells afterwards."""
    call.pipe.load_lora_weights(folder, adapter_name="style")
    call.pipe.fuse_lora()
    call.pipe.unload_lora_weights()


def test_a_lora_fused_before_or_after(made: tuple[PictureCall, Bundle], tmp_path: Path) -> None:
    call, bundle = made
    save_adapter(call, tmp_path / "lora")
    base = {name: value.clone() for name, value in call.pipe.transformer.state_dict().items()}
    call.pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    lesa.enable(call.pipe, bundle, allow=("lora",))
    beside = call.run()
    lesa.disable(call.pipe)
    call.pipe.unload_lora_weights()

    lesa.enable(call.pipe, bundle)
    call.run()
    fuse(call, tmp_path / "lora")
    with pytest.raises(MismatchError) as caught:
        call.run()
    [problem] = caught.value.problems
    assert re.match(r"weights: \d+ parameter\(s\) changed since LESA was enabled, \S+ first", problem)
    assert "allow=('lora',)" in problem and lesa.summary(call.pipe).steps == []
    lesa.disable(call.pipe)
    call.pipe.transformer.load_state_dict(base)

    lesa.enable(call.pipe, bundle, allow=("lora",))
    call.run()
    assert "not measured with" not in lesa.summary(call.pipe).notes
    fuse(call, tmp_path / "lora")
    assert torch.allclose(call.run(), beside, atol=1e-4)
    marked = "weights that are not the bundle's, taken for those of a fused LoRA"
    assert lesa.summary(call.pipe).notes["not measured with"] == marked
    lesa.disable(call.pipe)
    # The same when it was fused before: no hash can tell a fused LoRA from another fine-tune, and the message says so.
    with pytest.raises(MismatchError, match="either this is another fine-tune, or a LoRA was fused into the weights"):
        lesa.enable(call.pipe, bundle)
    lesa.enable(call.pipe, bundle, allow=("lora",))
    assert torch.allclose(call.run(), beside, atol=1e-4)
    assert lesa.summary(call.pipe).notes["not measured with"] == marked


def test_weights_loaded_over_those_that_lesa_was_enabled_on_are_noticed(tmp_path: Path) -> None:
    call = text_to_image()
    lesa.enable(call.pipe, call.own_bundle(tmp_path / "bundle"))
    expected = call.run()
    base = {name: value.clone() for name, value in call.pipe.transformer.state_dict().items()}
    call.pipe.transformer.load_state_dict(text_to_image(seed=1).pipe.transformer.state_dict())
    with pytest.raises(MismatchError, match="changed since LESA was enabled"):
        call.run()
    call.pipe.transformer.load_state_dict(base)
    assert torch.equal(call.run(), expected)
    with torch.no_grad():
        call.pipe.transformer.proj_out.bias.add_(0.1)
    with pytest.raises(MismatchError, match=r"weights: 1 parameter\(s\) changed .* proj_out\.bias first"):
        call.run()


def test_a_control_lora_that_replaces_a_layer_is_named_as_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters are PEFT's; the dev extra has it")
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    wide, width = 2 * call.pipe.transformer.config.in_channels, call.pipe.transformer.inner_dim
    layers = {"lora_A": torch.randn(4, wide), "lora_B": torch.randn(width, 4)}
    call.pipe.load_lora_weights({f"transformer.x_embedder.{name}.weight": value for name, value in layers.items()})
    with pytest.raises(MismatchError) as caught:
        call.run()
    [problem] = caught.value.problems
    assert problem.startswith("modules were replaced after LESA was enabled, x_embedder (an adapter wraps another")
    assert "silenced" not in problem and "disable LESA and enable it again" in problem
    lesa.disable(call.pipe)
    call.pipe.unload_lora_weights(reset_to_overwritten_params=True)
    lesa.enable(call.pipe, bundle)
    assert torch.equal(call.run(), expected)


def test_a_lora_on_a_layer_that_predicted_steps_skip(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters are PEFT's; the dev extra has it")
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    plain = call.run()
    lesa.enable(call.pipe, bundle, allow=("lora",))
    settings = peft.LoraConfig(r=2, target_modules=["x_embedder"], init_lora_weights=False)
    call.pipe.transformer.add_adapter(settings, adapter_name="style")
    with pytest.raises(MismatchError, match=r"x_embedder \(an adapter wraps it\)"):
        call.run()
    lesa.disable(call.pipe)
    lesa.enable(call.pipe, bundle, allow=("lora",))
    call.run()
    assert lesa.summary(call.pipe).num_full < NUM_STEPS
    call.pipe.unload_lora_weights()
    with pytest.raises(MismatchError, match=r"x_embedder \(an adapter was taken off it\)"):
        call.run()
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)


def load_ip_adapter(transformer: torch.nn.Module) -> None:
    """An IP-Adapter of random weights, by the loader that `pipe.load_ip_adapter` calls."""
    config = transformer.config
    text, width = config.joint_attention_dim, config.num_attention_heads * config.attention_head_dim
    projection = {
        "proj.weight": torch.randn(4 * text, 8),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    layers = {}
    for index in range(config.num_layers):
        for name in ("k", "v"):
            layers[f"{index}.to_{name}_ip.weight"] = torch.randn(width, text)
            layers[f"{index}.to_{name}_ip.bias"] = torch.zeros(width)
    state = {"image_proj": projection, "ip_adapter": layers}
    transformer._load_ip_adapter_weights([state], low_cpu_mem_usage=False)


def test_an_ip_adapter_loaded_before_or_after_is_refused(tmp_path: Path) -> None:
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    load_ip_adapter(call.pipe.transformer)
    with pytest.raises(MismatchError, match="IP-Adapter: got one, expected none"):
        call.run(joint_attention_kwargs={"ip_adapter_image_embeds": [torch.randn(1, 1, 8)]})
    lesa.disable(call.pipe)
    with pytest.raises(MismatchError, match="IP-Adapter: got one, expected none"):
        lesa.enable(call.pipe, bundle, allow=("lora",))
    call.pipe.unload_ip_adapter()
    lesa.enable(call.pipe, bundle)
    assert torch.allclose(call.run(), expected, atol=1e-6)


def float8(call: PictureCall) -> None:
    """diffusers' own: weights rest as float8 and are cast back layer by layer."""
    call.pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def int8(call: PictureCall) -> None:
    """torch's own: linear layers with packed int8 weights and integer kernels."""
    from torch.ao.quantization import quantize_dynamic

    call.pipe.transformer = quantize_dynamic(call.pipe.transformer, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("quantise", [float8, int8])
def test_quantised_weights(made: tuple[PictureCall, Bundle], quantise: Callable[[PictureCall], None]) -> None:
    call, bundle = made
    plain = call.run()
    quantise(call)
    rounded = call.run()
    assert not torch.equal(rounded, plain) and torch.allclose(rounded, plain, atol=0.2)
    with pytest.raises(MismatchError) as caught:
        lesa.enable(call.pipe, bundle)
    assert len(caught.value.problems) == 1 and "got quantised ones, expected plain ones" in caught.value.problems[0]
    lesa.enable(call.pipe, bundle, allow=("quantized",), interval=1)
    assert torch.equal(call.run(), rounded)
    lesa.disable(call.pipe)
    lesa.enable(call.pipe, bundle, allow=("quantized",))
    images = call.run()
    statistics = lesa.summary(call.pipe)
    assert torch.isfinite(images).all() and statistics.finished and statistics.num_fallbacks == 0
    assert statistics.num_full < NUM_STEPS
    assert statistics.notes["weights"] == "quantised; the fingerprint was not compared"
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), rounded)


def test_weights_that_are_quantised_after_enabling_are_noticed(tmp_path: Path) -> None:
    call = text_to_image()
    lesa.enable(call.pipe, call.own_bundle(tmp_path / "bundle"))
    float8(call)
    with pytest.raises(MismatchError, match="got quantised ones"):
        call.run()
