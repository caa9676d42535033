"""`torch.compile` of the repeated blocks: the same pictures, no graph break, and no compilation for skipped calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lesa
from lesa.errors import LesaError
from tests.helpers import tiny_hunyuan, tiny_qwen_variants
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_flux_variants import text_to_image


@pytest.mark.parametrize(
    ("build", "most"),
    [
        # A double block, a single one that reads another memory layout than the next, the tail.
        (lambda: text_to_image(num_layers=1, num_single_layers=3), 4),
        (tiny_hunyuan.text_to_video, 6),  # its token embedders are compiled too
    ],
    ids=["flux", "hunyuan-video"],
)
def test_repeated_blocks_compile_whole_and_only_for_full_steps(
    build: Callable[[], PictureCall], most: int, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    call = build()
    bundle = call.own_bundle(tmp_path / "bundle")
    plain = call.run()
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    graphs = CompileCounterWithBackend("eager")
    call.pipe.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    assert torch.allclose(call.run(), expected, atol=1e-5)
    compiled = graphs.frame_count
    assert 0 < compiled <= most
    assert torch.allclose(call.run(), expected, atol=1e-5)
    assert graphs.frame_count == compiled  # nothing is compiled in a second run
    statistics = lesa.summary(call.pipe)
    assert statistics.finished and statistics.num_full < NUM_STEPS
    lesa.disable(call.pipe)
    assert torch.allclose(call.run(), plain, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_to_machine_code_before_lesa_is_enabled(tmp_path: Path) -> None:
    torch._dynamo.reset()
    call = tiny_qwen_variants.lightning(num_layers=1)
    bundle = call.own_bundle(tmp_path / "bundle")
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    lesa.disable(call.pipe)
    call.pipe.transformer.compile_repeated_blocks(fullgraph=True)
    lesa.enable(call.pipe, bundle)
    assert torch.allclose(call.run(), expected, atol=1e-4)
    assert lesa.summary(call.pipe).num_full < NUM_STEPS
    torch._dynamo.reset()


def test_a_transformer_compiled_as_a_whole(tmp_path: Path) -> None:
    torch._dynamo.reset()
    call = text_to_image(num_layers=1, num_single_layers=1)
    bundle, transformer = call.own_bundle(tmp_path / "bundle"), call.pipe.transformer
    lesa.enable(call.pipe, bundle)
    expected = call.run()
    call.pipe.transformer = torch.compile(transformer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile_repeated_blocks"):  # dynamo's own, with the reason in it
        call.run()
    lesa.disable(call.pipe)
    with pytest.raises(LesaError, match=r"^LESA decides between .* call .*compile_repeated_blocks\(fullgraph"):
        lesa.enable(call.pipe, bundle)
    call.pipe.transformer = transformer
    lesa.enable(call.pipe, bundle)
    call.pipe.transformer = torch.compile(transformer, backend="eager")  # with graph breaks: it gains little and works
    assert torch.allclose(call.run(), expected, atol=1e-5)
    assert lesa.summary(call.pipe).finished and lesa.summary(call.pipe).num_full < NUM_STEPS
    torch._dynamo.reset()
