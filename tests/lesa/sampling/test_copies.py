"""Copies of an enabled pipeline: none runs with the original's weights, and each can be disabled and enabled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch

import lesa
from lesa.bundle import Bundle
from lesa.errors import LesaError
from lesa.sampling.hook import is_lesa_cache_enabled
from tests.helpers.images import NUM_STEPS, PictureCall
from tests.helpers.tiny_flux_variants import text_to_image

COPY = r"copy of a module that LESA is enabled on.*call lesa\.disable\(pipe\)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureCall, Bundle, torch.Tensor]:
    call = text_to_image()
    return call, call.own_bundle(tmp_path_factory.mktemp("bundle") / "tiny"), call.run()


@pytest.fixture
def call(made: tuple[PictureCall, Bundle, torch.Tensor]) -> Iterator[PictureCall]:
    transformer = made[0].pipe.transformer
    lesa.enable(made[0].pipe, made[1])
    yield made[0]
    made[0].pipe.transformer = transformer
    lesa.disable(made[0].pipe)


def zero_blocks(transformer: torch.nn.Module) -> None:
    with torch.no_grad():
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            for parameter in block.parameters():
                parameter.zero_()


@pytest.mark.parametrize("before", ["no run", "a run"])
def test_a_copied_transformer_is_refused_until_it_is_disabled(
    call: PictureCall, made: tuple[PictureCall, Bundle, torch.Tensor], before: str
) -> None:
    _, bundle, plain = made
    expected = call.run() if before == "a run" else None
    twin, original = copy.deepcopy(call.pipe.transformer), call.pipe.transformer
    zero_blocks(twin)
    call.pipe.transformer = twin
    with pytest.raises(LesaError, match=COPY):
        call.run()
    assert not is_lesa_cache_enabled(twin)
    for ask in (lesa.summary, lesa.call_kwargs):
        with pytest.raises(LesaError, match="not enabled on this pipeline"):
            ask(call.pipe)
    call.pipe.maybe_free_model_hooks()
    lesa.disable(call.pipe)
    assert not any("forward" in module.__dict__ for module in twin.modules())
    zeroed = call.run()  # with its own weights now
    assert not torch.allclose(zeroed, plain, atol=1e-3)
    with pytest.raises(LesaError, match="fingerprint of the transformer"):
        lesa.enable(call.pipe, bundle)
    call.pipe.transformer = original
    accelerated = call.run()  # the original is as it was
    assert lesa.summary(call.pipe).finished and (expected is None or torch.equal(accelerated, expected))


def test_a_copied_pipeline_can_be_enabled_without_further_ado(
    call: PictureCall, made: tuple[PictureCall, Bundle, torch.Tensor]
) -> None:
    _, bundle, plain = made
    expected = call.run()
    twin = text_to_image()
    twin.pipe = copy.deepcopy(call.pipe)
    with pytest.raises(LesaError, match=COPY):
        twin.run()
    lesa.enable(twin.pipe, bundle, interval=2)
    twin.run()
    fewer = lesa.summary(call.pipe).num_full
    assert lesa.summary(twin.pipe).num_full == len({0, 1, 2, 3, 5, 7}) > fewer
    assert torch.equal(call.run(), expected)
    lesa.disable(twin.pipe)
    assert torch.allclose(twin.run(), plain, atol=1e-5)  # tensors of a copy lie elsewhere, for other kernels
    assert torch.equal(call.run(), expected) and lesa.summary(call.pipe).num_full < NUM_STEPS


def test_a_copy_made_while_enabled_is_refused_after_the_original_was_disabled(call: PictureCall) -> None:
    twin = copy.deepcopy(call.pipe.transformer)
    lesa.disable(call.pipe)
    call.pipe.transformer = twin
    with pytest.raises(LesaError, match=COPY):
        call.run()
    lesa.disable(call.pipe)
    call.run()


def test_a_block_that_is_a_copy_is_named(call: PictureCall) -> None:
    stacked = call.pipe.transformer.transformer_blocks
    own = stacked[0]
    stacked[0] = copy.deepcopy(own)
    try:
        with pytest.raises(LesaError, match=r"transformer_blocks\.0 \(of the same shape, as a copy\)"):
            call.run()
        width = call.pipe.transformer.inner_dim
        with pytest.raises(LesaError, match=COPY):
            stacked[0](torch.zeros(1, 2, width), torch.zeros(1, 2, width), torch.zeros(1, width))
    finally:
        stacked[0] = own
    call.run()


def test_pickling_is_refused_with_the_remedy(call: PictureCall) -> None:
    for write in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(LesaError, match=r"cannot be pickled: call lesa\.disable\(pipe\) first"):
            write(call.pipe.transformer)
    lesa.disable(call.pipe)
    pickle.loads(pickle.dumps(call.pipe.transformer))  # noqa: S301 - what was written a moment before
