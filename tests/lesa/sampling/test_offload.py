"""Offloading: predicted steps move no weights of blocks, and LESA outlives hooks that pipelines renew after every run.

On the CPU: weights travel between two places that happen to be one, through the same hooks as to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, CpuOffload, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

import lesa
from lesa.errors import LesaError
from lesa.models.families import blocks, family_of
from lesa.sampling.checks import MismatchError
from lesa.sampling.hook import is_lesa_cache_enabled
from tests.helpers import tiny_hunyuan, tiny_qwen_variants
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_flux_variants import text_to_image

TEXT: dict[str, Callable[[], PictureCall]] = {
    "flux": text_to_image,
    "qwen-image": tiny_qwen_variants.text_to_image,
    "hunyuan-video": tiny_hunyuan.text_to_video,
}


def group_blocks(transformer: torch.nn.Module) -> None:
    apply_group_offloading(transformer, torch.device("cpu"), num_blocks_per_group=1)


def group_leaves(transformer: torch.nn.Module) -> None:
    apply_group_offloading(transformer, torch.device("cpu"), offload_type="leaf_level")


def sequential(transformer: torch.nn.Module) -> None:
    cpu_offload(transformer, execution_device=torch.device("cpu"))


OFFLOADS = [group_blocks, group_leaves, sequential]


class Moves:
    """Which modules' weights were fetched, with the kind of step that it was for."""

    def __init__(self, call: PictureCall) -> None:
        self._call = call
        transformer = call.pipe.transformer
        family = family_of(transformer)
        skipped = [block for _, block, _ in blocks(transformer, family)]
        skipped += [getattr(transformer, name) for name in family.embedders]
        self._skipped = {id(module) for part in skipped for module in part.modules()}
        self.of_skipped = {"full": 0, "predicted": 0}  # weights that predicted steps do without
        self.all = 0

    def note(self, modules: list[torch.nn.Module]) -> None:
        steps = lesa.summary(self._call.pipe).steps
        self.all += 1
        if steps and any(id(module) in self._skipped for module in modules):
            self.of_skipped[steps[-1].kind] += 1


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def watch(call: PictureCall, patch: pytest.MonkeyPatch) -> Moves:
    moves = Moves(call)
    onload, fetch = ModuleGroup.onload_, AlignDevicesHook.pre_forward

    def noted_onload(self: ModuleGroup) -> None:
        if self.onload_leader is not call.pipe.transformer:  # that group holds the ends, which every step needs
            moves.note(self.modules)
        onload(self)

    def noted_fetch(self: AlignDevicesHook, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.offload and next(module.parameters(recurse=False), None) is not None:
            moves.note([module])
        return fetch(self, module, *args, **kwargs)

    patch.setattr(ModuleGroup, "onload_", noted_onload)
    patch.setattr(AlignDevicesHook, "pre_forward", noted_fetch)
    return moves


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", list(TEXT))
def test_predicted_steps_move_no_weights(
    name: str, offload: Callable[[torch.nn.Module], None], tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    call = TEXT[name]()
    bundle = call.own_bundle(tmp_path / "bundle")
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    lesa.disable(call.pipe)
    offload(call.pipe.transformer)
    lesa.enable(call.pipe, bundle)
    moves = watch(call, patch)
    assert torch.equal(call.run(), expected)
    num_full = lesa.summary(call.pipe).num_full
    assert moves.of_skipped["predicted"] == 0
    assert moves.of_skipped["full"] >= num_full * len(blocks(call.pipe.transformer, family_of(call.pipe.transformer)))
    assert torch.equal(call.run(), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_that_comes_after_lesa_is_refused_before_anything_is_computed(
    offload: Callable[[torch.nn.Module], None], tmp_path: Path
) -> None:
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    plain = call.run()
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    offload(call.pipe.transformer)
    with pytest.raises(MismatchError, match=r"offloading was set up after LESA.*disable LESA and enable it again"):
        call.run()
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)  # still offloaded
    lesa.enable(call.pipe, bundle)
    assert torch.equal(call.run(), expected)


def test_lesa_leaves_hooks_of_others_around_offloading_as_they_were(tmp_path: Path) -> None:
    """float8 storage beneath, accelerate's wrapper above it, LESA on top: each goes when it is told to."""
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    call.pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    sequential(call.pipe.transformer)
    plain = call.run()
    lesa.enable(call.pipe, bundle, allow=("quantized",))
    call.run()
    assert lesa.summary(call.pipe).num_full == 5
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)
    lesa.enable(call.pipe, bundle, allow=("quantized",), interval=1)
    assert torch.equal(call.run(), plain)


@pytest.mark.parametrize("first", ["offload", "lesa"])
def test_lesa_outlives_whole_model_offloading_which_is_renewed_after_every_run(
    first: str, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    call.pipe.enable_model_cpu_offload(device="cpu")
    plain = call.run()
    call.pipe.remove_all_hooks()
    fetched: list[torch.nn.Module] = []
    move = CpuOffload.pre_forward

    def noted(self: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        fetched.append(module)
        return move(self, module, *args, **kwargs)

    patch.setattr(CpuOffload, "pre_forward", noted)
    if first == "offload":
        call.pipe.enable_model_cpu_offload(device="cpu")
        lesa.enable(call.pipe, bundle)
    else:
        lesa.enable(call.pipe, bundle)
        call.pipe.enable_model_cpu_offload(device="cpu")
    images = []
    for _ in range(3):
        lesa.summary(call.pipe).steps.clear()
        images.append(call.run())
        assert lesa.summary(call.pipe).num_full == 5
    assert all(torch.equal(picture, images[0]) for picture in images)
    lesa.disable(call.pipe)
    fetched.clear()
    assert torch.equal(call.run(), plain)
    assert call.pipe.transformer in fetched  # the offloading is still there
    lesa.enable(call.pipe, bundle)
    assert torch.equal(call.run(), images[0])
    call.pipe.remove_all_hooks()
    call.run()
    assert lesa.summary(call.pipe).num_full == 5
    lesa.disable(call.pipe)
    assert torch.allclose(call.run(), plain, atol=1e-6)
    assert is_lesa_cache_enabled(call.pipe.transformer) is False


@pytest.mark.parametrize("again", [False, True])
def test_offloading_beneath_lesa_that_is_taken_off(again: bool, tmp_path: Path) -> None:
    """accelerate puts back the forwards that it had wrapped, and with them goes what LESA had put above."""
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    plain = call.run()
    sequential(call.pipe.transformer)
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    remove_hook_from_module(call.pipe.transformer, recurse=True)
    if again:
        sequential(call.pipe.transformer)
        with pytest.raises(MismatchError, match=r"offloading was set up after LESA.*disable LESA and enable it again"):
            call.run()
    else:
        assert torch.equal(call.run(), expected)
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)
    lesa.enable(call.pipe, bundle)
    assert torch.equal(call.run(), expected)
    lesa.disable(call.pipe)
    remove_hook_from_module(call.pipe.transformer, recurse=True)
    assert torch.equal(call.run(), plain)


def onloads(call: PictureCall, patch: pytest.MonkeyPatch) -> dict[torch.nn.Module, int]:
    """How often each block's weights are fetched in the runs from now on."""
    counts = {block: 0 for _, block, _ in blocks(call.pipe.transformer, family_of(call.pipe.transformer))}
    onload = ModuleGroup.onload_

    def noted(self: ModuleGroup) -> None:
        for module in self.modules:
            if module in counts:
                counts[module] += 1
        onload(self)

    patch.setattr(ModuleGroup, "onload_", noted)
    return counts


def test_offloading_that_a_lora_renews_beneath_lesa_is_refused_and_disabling_restores_its_order(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """diffusers takes group offloading off and puts it on again around a LoRA, which silences every hook above it."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's; the dev extra has it")
    call = text_to_image()
    bundle = call.own_bundle(tmp_path / "bundle")
    plain = call.run()
    transformer = call.pipe.transformer
    settings = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    transformer.add_adapter(settings, adapter_name="style")
    layers = peft.get_peft_model_state_dict(transformer, adapter_name="style")
    type(call.pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    call.pipe.unload_lora_weights()
    group_blocks(transformer)
    lesa.enable(call.pipe, bundle, allow=("lora",))
    expected = call.run()
    call.pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    for _ in range(2):
        with pytest.raises(LesaError, match="the hook of the transformer was silenced .*: disable LESA and enable it"):
            call.run()
        with pytest.raises(LesaError, match="nothing to say of the newest run: the hook .* was silenced"):
            lesa.summary(call.pipe)
    lesa.disable(call.pipe)
    fetched = onloads(call, patch)
    styled = call.run()
    assert set(fetched.values()) == {NUM_STEPS} and not torch.allclose(styled, plain, atol=1e-4)
    lesa.enable(call.pipe, bundle, allow=("lora",))
    fetched.update(dict.fromkeys(fetched, 0))
    call.run()
    assert lesa.summary(call.pipe).notes["not measured with"] == "adapters style"
    assert set(fetched.values()) == {lesa.summary(call.pipe).num_full}
    lesa.disable(call.pipe)
    call.pipe.unload_lora_weights()
    assert torch.equal(call.run(), plain)
    lesa.enable(call.pipe, bundle)
    assert torch.equal(call.run(), expected)


def test_weights_are_watched_wherever_offloading_keeps_them(tmp_path: Path) -> None:
    for offload in OFFLOADS:
        call = text_to_image()
        bundle = call.own_bundle(tmp_path / offload.__name__)
        offload(call.pipe.transformer)
        lesa.enable(call.pipe, bundle)
        call.run()
        call.run()
        hook = getattr(call.pipe.transformer.transformer_blocks[1].attn.to_q, "_hf_hook", None)
        weights = call.pipe.transformer.transformer_blocks[1].attn.to_q.weight
        (weights if hook is None else hook.weights_map["weight"]).data.mul_(2)
        with pytest.raises(MismatchError, match=r"1 parameter\(s\) changed .*, transformer_blocks\.1\.attn\.to_q\.w"):
            call.run()
