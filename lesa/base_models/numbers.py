"""Two-digit numbers from real handwritten digits (scikit-learn's) as a prompt asks: 16 x 24 RGB images.

A full prompt reads "a thin slanted forty two, white on black"; "a forty two" takes the defaults. An image is
right only where both digits are: a harder text to draw than one digit.

Shape legend: B images, H = HEIGHT, W = WIDTH pixels.
"""

from __future__ import annotations

import torch

from lesa.base_models import digits
from lesa.base_models.prompts import Language

TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = digits.DIGITS[1:]

LANGUAGE = Language(
    form="a {thickness} {slant} {tens} {units}, {polarity}",
    values={
        "tens": TENS,
        "units": UNITS,
        "thickness": digits.THICKNESSES,
        "slant": digits.SLANTS,
        "polarity": digits.POLARITIES,
    },
    defaults={"thickness": "plain", "slant": "upright", "polarity": "white on black"},
    split_sizes={"base": 800, "train": 160, "validation": 48, "test": 288},
)

HEIGHT = 16
WIDTH = 24
APART = 5.4  # pixels from the middle to the centre of either digit


def draw_images(
    bank: digits.DigitBank, prompts: list[str], generator: torch.Generator, jitter: digits.Jitter | None = None
) -> torch.Tensor:
    """One jittered image [B, 3, H, W] in [-1, 1] a prompt, both digits of random originals of their classes."""
    jitter = jitter or digits.Jitter()
    asked = [LANGUAGE.parse(prompt) for prompt in prompts]
    wanted = (
        torch.tensor([TENS.index(a["tens"]) + 2 for a in asked]),
        torch.tensor([UNITS.index(a["units"]) + 1 for a in asked]),
    )
    thickness = torch.tensor([digits.THICKNESSES.index(a["thickness"]) for a in asked])
    shear = torch.tensor([digits.SHEAR[a["slant"]] for a in asked])
    inverted = torch.tensor([a["polarity"] == digits.POLARITIES[1] for a in asked])
    ink_share = torch.zeros(len(asked), 1, HEIGHT, WIDTH)
    for values, x in zip(wanted, (-APART, APART), strict=True):
        originals = digits.choose(bank, values, generator)
        noise = torch.rand(5, len(asked), generator=generator) * 2 - 1
        drawn = digits.strokes(
            bank.masters[thickness, originals],
            size=(HEIGHT, WIDTH),
            glyph_size=digits.GLYPH_SIZE,
            centre=torch.tensor([x, 0.0]) + jitter.shift * noise[:2].T,
            scale=1 + jitter.scale * noise[2],
            angle=jitter.rotation * noise[3],
            shear=shear + jitter.shear * noise[4],
        )
        ink_share = torch.maximum(ink_share, drawn)
    noise = torch.rand(digits.LIGHT_DRAWS, len(asked), generator=generator) * 2 - 1
    paper, ink = digits.light(noise, jitter, (HEIGHT, WIDTH))
    return digits.paint(ink_share, paper=paper, ink=ink, is_inverted=inverted)
