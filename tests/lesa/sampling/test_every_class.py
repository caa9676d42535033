"""Every class of pipeline in the table: accelerated, plain at interval 1, and as it was once LESA is off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lesa
from lesa.bundle import Bundle
from lesa.models.families import FAMILIES
from tests.helpers import tiny_flux_variants, tiny_hunyuan, tiny_qwen_variants
from tests.helpers.images import NUM_STEPS, PictureCall

VARIANTS = tiny_flux_variants.VARIANTS | tiny_qwen_variants.VARIANTS | tiny_hunyuan.VARIANTS


@pytest.fixture(scope="module", params=list(VARIANTS))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PictureCall, Bundle]]:
    with pytest.MonkeyPatch.context() as patch:
        tiny_qwen_variants.small_references(patch)
        call = VARIANTS[request.param]()
        yield call, call.own_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def computed(made: tuple[PictureCall, Bundle]) -> Iterator[list[int]]:
    """One entry every time that the first block computes."""
    calls: list[int] = []
    handle = next(made[0].pipe.transformer.transformer_blocks[0].children()).register_forward_hook(
        lambda *_: calls.append(1)
    )
    yield calls
    handle.remove()
    lesa.disable(made[0].pipe)


def test_accelerated_and_left_as_it_was(made: tuple[PictureCall, Bundle], computed: list[int]) -> None:
    call, bundle = made
    num_branches, num_steps = len(call.branches), NUM_STEPS - call.first_step
    plain = call.run()
    assert len(computed) == num_steps * num_branches
    lesa.enable(call.pipe, bundle, interval=1)
    assert torch.equal(call.run(), plain)
    lesa.disable(call.pipe)
    lesa.enable(call.pipe, bundle)
    computed.clear()
    images = call.run()
    statistics = lesa.summary(call.pipe)
    assert statistics.finished and statistics.num_branches == num_branches and statistics.num_fallbacks == 0
    assert len(computed) == statistics.num_full * num_branches < num_steps * num_branches
    assert torch.isfinite(images).all() and not torch.equal(images, plain)
    assert torch.equal(call.run(), images)  # a second run starts afresh
    lesa.disable(call.pipe)
    assert torch.equal(call.run(), plain)


def test_the_table_lists_what_is_tried_here() -> None:
    listed = {
        name
        for row in FAMILIES.values()
        for name in (*row.pipeline_classes, *row.related_pipelines, *row.other_pipelines)
    }
    assert listed == {name.split(",")[0] for name in VARIANTS}
