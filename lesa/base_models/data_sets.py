"""The data sets that a base model can be trained on, one entry of `DATA_SETS` each.

All code that trains, saves and judges is the same for every entry. To add one, write its prompt language and
its images (digits.py, photos.py, numbers.py and moving.py are the examples) and a row here; what differs between
model families is in architectures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lesa.base_models import digits, moving, numbers, photos
from lesa.base_models.prompts import Language

# What images are drawn for: the model's training, the scorer's training, or judging either.
Part = Literal["model", "scorer", "held_out"]
# One image a prompt, [B, 3, H, W], or one video, [B, F, 3, H, W], in [-1, 1], jittered by the generator.
Draw = Callable[[list[str], torch.Generator], torch.Tensor]

TYPICAL = 0.15  # share of the real digits, the most typical ones, that the model learns to draw
# Text tokens that a transformer sees besides the words of a prompt: T5's end; the turn's end and the answer's
# beginning in Qwen-Image's template; a line break and the turn's end in HunyuanVideo's.
_FURTHER_TOKENS = {"flux": 1, "qwen-image": 5, "hunyuan-video": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a scorer tells from an image: one class, put together from some of the prompt's attributes."""

    kind: str  # of the scorer's folder
    attributes: tuple[str, ...]
    is_grey: bool  # it sees brightness alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoder:
    """Size and training of the autoencoder: what colour and fine detail need more of than strokes do."""

    latent_channels: int
    norm_groups: int | None  # of its 16 channels; a group normalised on its own forgets the level of a flat image
    num_steps: int
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Prompts, the RGB images they ask for, and the sizes of a model that fits them."""

    name: str
    family: str  # row of lesa.models.families, and of lesa.base_models.architectures
    language: Language
    height: int  # pixels, a multiple of 4: halved by the autoencoder, halved again by packing
    width: int  # pixels, likewise
    num_frames: int | None = None  # of a video
    autoencoder: Autoencoder
    load: Callable[[Part], Draw]
    reading: Reading | None  # None: no scorer is trained, and nothing it would measure is reported

    @property
    def text_length(self) -> int:
        """Text tokens that the transformer sees at most (max_sequence_length)."""
        return self.language.num_words + _FURTHER_TOKENS[self.family]

    @property
    def clip_length(self) -> int:
        """Tokens that FLUX's CLIP reads: start, words, commas, end, padding to a multiple of 8."""
        return -(-(self.language.num_words + 2) // 8) * 8


def _load_digits(draw: Callable[..., torch.Tensor], part: Part) -> Draw:
    if part == "model":
        bank = digits.load_bank(held_out=False, typical=TYPICAL)
    else:
        bank = digits.load_bank(held_out=part == "held_out")
    return partial(draw, bank)


def _load_photos(part: Part) -> Draw:
    # One pair of photographs for every part: what is held out is the prompts and the frames' jitter.
    return partial(photos.draw_images, photos.load_bank())


DATA_SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            name="flux-digits",
            family="flux",
            language=digits.LANGUAGE,
            height=digits.IMAGE_SIZE,
            width=digits.IMAGE_SIZE,
            autoencoder=Autoencoder(latent_channels=4, norm_groups=8, num_steps=700, batch_size=64),
            load=partial(_load_digits, digits.draw_images),
            reading=Reading(kind="digit-reader", attributes=("digit",), is_grey=True),
        ),
        DataSet(
            name="flux-photos",
            family="flux",
            language=photos.LANGUAGE,
            height=photos.IMAGE_SIZE,
            width=photos.IMAGE_SIZE,
            autoencoder=Autoencoder(latent_channels=4, norm_groups=2, num_steps=3000, batch_size=16),
            load=_load_photos,
            reading=Reading(kind="place-reader", attributes=("photo", "row", "column"), is_grey=False),
        ),
        DataSet(
            name="qwen-digits",
            family="qwen-image",
            language=numbers.LANGUAGE,
            height=numbers.HEIGHT,
            width=numbers.WIDTH,
            autoencoder=Autoencoder(latent_channels=4, norm_groups=None, num_steps=450, batch_size=32),
            load=partial(_load_digits, numbers.draw_images),
            reading=Reading(kind="number-reader", attributes=("tens", "units"), is_grey=True),
        ),
        DataSet(
            name="hunyuan-moving-digits",
            family="hunyuan-video",
            language=moving.LANGUAGE,
            height=digits.IMAGE_SIZE,
            width=digits.IMAGE_SIZE,
            num_frames=moving.NUM_FRAMES,
            autoencoder=Autoencoder(latent_channels=8, norm_groups=4, num_steps=750, batch_size=8),
            load=partial(_load_digits, moving.draw_videos),
            reading=Reading(kind="moving-digit-reader", attributes=("digit",), is_grey=True),
        ),
    )
}
