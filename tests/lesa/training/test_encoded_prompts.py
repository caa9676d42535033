"""What a loop asks for again and again is encoded once, and the encoders are where they were afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesa.models.pipelines import sample
from lesa.params import CallParams
from lesa.training.encoded_prompts import prompts_encoded_once
from tests.helpers.model_kinds import KINDS

PROMPTS = ["a cat on the right", "the white dog"]


@pytest.fixture(params=["flux-dev", "qwen-image", "hunyuan-video"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, CallParams]:
    row = KINDS[request.param]
    pipe = row.build(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe, CallParams(**row.call)


def count_calls(pipe: Any) -> list[str]:
    """Names of the text encoders, each time one runs."""
    seen: list[str] = []
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            part.register_forward_pre_hook(lambda *_, name=name: seen.append(name), with_kwargs=False)
    return seen


def test_samples_are_the_same_and_each_prompt_is_encoded_once(kind: tuple[Any, CallParams]) -> None:
    pipe, call = kind
    seen = count_calls(pipe)
    plain = [sample(pipe, [prompt], [seed], call) for seed, prompt in enumerate(PROMPTS)]
    a_prompt = len(seen) // 2  # with the negative one, where there is one
    seen.clear()
    with prompts_encoded_once(pipe):
        for _ in range(3):
            again = [sample(pipe, [prompt], [seed], call) for seed, prompt in enumerate(PROMPTS)]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert 0 < len(seen) <= 2 * a_prompt and len(set(seen)) == len({n for n in pipe.components if "text_encoder" in n})
    seen.clear()
    assert torch.equal(sample(pipe, PROMPTS[:1], [0], call), plain[0]) and len(seen) == a_prompt


def test_a_batch_is_its_prompts(kind: tuple[Any, CallParams]) -> None:
    pipe, call = kind
    plain = sample(pipe, PROMPTS, [0, 1], call)
    with prompts_encoded_once(pipe):
        torch.testing.assert_close(sample(pipe, PROMPTS, [0, 1], call), plain, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sample(pipe, PROMPTS[::-1], [1, 0], call).flip(0), plain, rtol=1e-3, atol=1e-3)


def test_only_the_transformer_is_left_alone_and_all_is_put_back(kind: tuple[Any, CallParams]) -> None:
    pipe, call = kind
    own = type(pipe).encode_prompt
    others = [p for n, p in pipe.components.items() if isinstance(p, nn.Module) and n != "transformer"]
    with pytest.raises(KeyError, match="in the middle"), prompts_encoded_once(pipe):
        assert all(hasattr(part, "_hf_hook") for part in others) and not hasattr(pipe.transformer, "_hf_hook")
        sample(pipe, PROMPTS[:1], [0], call)
        raise KeyError("in the middle")
    assert not any(hasattr(part, "_hf_hook") for part in others)
    assert "encode_prompt" not in vars(pipe) and type(pipe).encode_prompt is own
    assert {parameter.device for part in others for parameter in part.parameters()} == {pipe.transformer.device}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_encoders_leave_the_gpu(kind: tuple[Any, CallParams]) -> None:
    pipe, call = kind
    pipe.to("cuda")
    plain = sample(pipe, PROMPTS[:1], [0], call)
    with prompts_encoded_once(pipe):
        assert torch.equal(sample(pipe, PROMPTS[:1], [0], call), plain)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != "vae":  # which the sample has just used
                device = "cuda:0" if name == "transformer" else "cpu"
                assert {str(parameter.device) for parameter in part.parameters()} == {device}, name
