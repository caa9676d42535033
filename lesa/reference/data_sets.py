"""The data sets that a base model can be trained on, one entry of `DATA_SETS` each.

All code that trains, saves and judges is the same for every entry. To add one, write its prompt language and
its pictures (digits.py and photos.py are the examples) and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lesa.reference import digits, photos
from lesa.reference.prompts import Language

# What pictures are drawn for: the model's training, the scorer's training, or judging either.
Part = Literal["model", "scorer", "held_out"]
# One picture a prompt, [B, 3, H, W] in [-1, 1], jittered by the generator.
Draw = Callable[[list[str], torch.Generator], torch.Tensor]

TYPICAL = 0.15  # share of the real digits, the most typical ones, that the model learns to draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a scorer tells from a picture: one class, put together from some of the prompt's attributes."""

    kind: str  # of the scorer's folder
    attributes: tuple[str, ...]
    is_grey: bool  # it sees brightness alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Autoencoder:
    """Size and training of the autoencoder: what colour and fine detail need more of than strokes do."""

    latent_channels: int
    norm_groups: int  # of its 16 channels; a group normalised on its own forgets the level of a flat picture
    num_steps: int
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Prompts, the RGB pictures they ask for, and the sizes of a model that fits them."""

    name: str
    language: Language
    image_size: int  # pixels a side, a multiple of 4: halved by the autoencoder, halved again by packing
    autoencoder: Autoencoder
    load: Callable[[Part], Draw]
    reading: Reading | None  # None: no scorer is trained, and nothing it would measure is reported

    @property
    def t5_length(self) -> int:
        """Text tokens that the transformer sees (max_sequence_length): words, commas, end."""
        return self.language.num_words + 1

    @property
    def clip_length(self) -> int:
        """Tokens that CLIP reads: start, words, commas, end, padding to a multiple of 8."""
        return -(-(self.language.num_words + 2) // 8) * 8


def _load_digits(part: Part) -> Draw:
    if part == "model":
        bank = digits.load_bank(held_out=False, typical=TYPICAL)
    else:
        bank = digits.load_bank(held_out=part == "held_out")
    return partial(digits.draw_images, bank)


def _load_photos(part: Part) -> Draw:
    # One pair of photographs for every part: what is held out is the prompts and the frames' jitter.
    return partial(photos.draw_images, photos.load_bank())


DATA_SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            name="flux-digits",
            language=digits.LANGUAGE,
            image_size=digits.IMAGE_SIZE,
            autoencoder=Autoencoder(latent_channels=4, norm_groups=8, num_steps=700, batch_size=64),
            load=_load_digits,
            reading=Reading(kind="digit-reader", attributes=("digit",), is_grey=True),
        ),
        DataSet(
            name="flux-photos",
            language=photos.LANGUAGE,
            image_size=photos.IMAGE_SIZE,
            autoencoder=Autoencoder(latent_channels=4, norm_groups=2, num_steps=3000, batch_size=16),
            load=_load_photos,
            reading=Reading(kind="place-reader", attributes=("photo", "row", "column"), is_grey=False),
        ),
    )
}
