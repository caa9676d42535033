"""Pipelines of diffusers' real classes, small enough for a test: random seeded weights, saved and loaded.

Nothing here is trained, so pictures mean nothing; features are smooth in the step, which is all that the
machinery around the transformer needs. Every builder leaves the global random state as it was.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WORDS = (
    "a the , and on in of zero one two three four five six seven eight nine thin plain bold heavy "
    "upright slanted back leaning top bottom centre left right white black red blue cat dog house photo"
).split()
PROMPTS = ("a thin seven", "a bold two, top left", "a red house on the left", "the blue cat and a dog")
SPLITS = {
    "train": ["a thin seven", "a bold two, top left", "a red house on the left", "the blue cat"],
    "validation": ["a dog on the left", "the white dog"],
    "test": ["a black cat"],
}
TEXT_LENGTH = 16  # tokens both text encoders read
TEXT_WIDTH = 16
SIZE = 16  # pixels; 16 image tokens for FLUX
CALL = {"height": SIZE, "width": SIZE, "guidance_scale": 3.5, "max_sequence_length": TEXT_LENGTH}


def tiny_flux(
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    width: int = 32,
    num_layers: int = 2,
    num_single_layers: int = 2,
    in_channels: int = 16,  # 2 x 2 latents of 4 channels packed into a token, and what is given beside them
    guidance_embeds: bool = True,
    dynamic_shifting: bool = True,
    dtype: torch.dtype = torch.float32,
) -> FluxPipeline:
    """A FluxPipeline loaded from `folder` (written first; None: a temporary one), progress bar off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, clip_tokenizer = tiny_clip()
        t5, t5_tokenizer = _t5()
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
            vae=_vae(),
            text_encoder=clip,
            tokenizer=clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            transformer=FluxTransformer2DModel(
                in_channels=in_channels,
                out_channels=None if in_channels == 16 else 16,
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=16,
                num_attention_heads=width // 16,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    loaded = save_and_load(pipe, folder, dtype)
    assert isinstance(loaded, FluxPipeline)
    return loaded


def tiny_repository(
    root: Path,
    *,
    num_inference_steps: int = 8,
    prompts: dict[str, list[str]] | None = None,  # split -> lines; None: SPLITS
    actors: int = 2,
    timeout_s: int = 60,  # of a call that records
    **record: Any,  # settings of the record section
) -> Path:
    """A folder like a repository: params.yaml with the workload `tiny`, its pipeline and its prompts."""
    splits = prompts or SPLITS
    tiny_flux(root / "data/base/tiny")
    write_prompts(root, splits)
    settings = {
        "resources": {"device": "cpu", "record": {"actors": actors, "timeout_s": timeout_s}},
        "prompts": "tiny",
        "model": {"family": "flux", "source": "data/base/tiny"},
        "call": {**CALL, "num_inference_steps": num_inference_steps},
        "schedule": {"default_budget": "2x", "budgets": {"2x": {"interval": 3}}},
        "record": {
            "train_prompts": len(splits["train"]),
            "validation_prompts": len(splits["validation"]),
            **record,
        },
    }
    document = {"default_workload": "tiny", "workloads": {"tiny": settings}}
    (root / "params.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return root


def write_prompts(root: Path, splits: dict[str, list[str]]) -> None:
    """The prompt set `tiny` of a repository."""
    folder = root / "data/prompts/tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_and_load(pipe: Any, folder: str | Path | None, dtype: torch.dtype, **parts: Any) -> Any:
    """The round trip every real model takes: no test sees a pipeline that could not have been saved."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(folder) if folder is not None else Path(scratch) / "pipeline"
        pipe.save_pretrained(target, safe_serialization=True)
        loaded = type(pipe).from_pretrained(target, dtype=dtype, local_files_only=True, **parts)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def tiny_clip(length: int = TEXT_LENGTH) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A text encoder that reads `length` tokens, and its tokenizer; called under a seed."""
    merges = byte_pair_merges([[*word[:-1], word[-1] + "</w>"] for word in WORDS])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [","]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), tokenizer


def byte_pair_merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word, given as its symbols, one token: the commonest pair first, ties in order
    of spelling.

    Not by the library's trainer, which breaks ties by hash and so differs from one process to the next.
    """
    spellings = [list(word) for word in words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        first, second = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append((first, second))
        for spelling in spellings:
            at = 0
            while at + 1 < len(spelling):
                if (spelling[at], spelling[at + 1]) == (first, second):
                    spelling[at : at + 2] = [first + second]
                at += 1
    return merges


def _t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("," if word == "," else f"▁{word}", -1.0) for word in WORDS]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config), tokenizer


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
