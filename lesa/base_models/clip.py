"""The small CLIP text encoder that FLUX and HunyuanVideo take their pooled vector from."""

from __future__ import annotations

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lesa.base_models.data_sets import DataSet
from lesa.base_models.tokenizers import build_clip_tokenizer

TEXT_WIDTH = 64


def build_clip(data_set: DataSet, length: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """An untrained encoder of `length` tokens, and its tokenizer."""
    tokenizer = build_clip_tokenizer(data_set, length)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # where the pooled output is read
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return encoder, tokenizer
