"""Real handwritten digits (scikit-learn's) that move as a prompt asks: videos of 9 frames, 16 x 16 RGB.

A full prompt reads "a thin slanted seven, moving left, white on black"; "a seven" takes the defaults. A motion is
even and passes the middle of the image in the middle of the video.

Shape legend: B videos, F = NUM_FRAMES, H = W = digits.IMAGE_SIZE pixels.
"""

from __future__ import annotations

import torch

from lesa.base_models import digits
from lesa.base_models.prompts import Language

# Pixels to the right, pixels down and radians clockwise from the first frame to the last.
MOTIONS = {
    "moving right": (5.0, 0.0, 0.0),
    "moving left": (-5.0, 0.0, 0.0),
    "moving up": (0.0, -5.0, 0.0),
    "moving down": (0.0, 5.0, 0.0),
    "turning": (0.0, 0.0, 1.0),
}

LANGUAGE = Language(
    form="a {thickness} {slant} {digit}, {motion}, {polarity}",
    values={
        "digit": digits.DIGITS,
        "thickness": digits.THICKNESSES,
        "slant": digits.SLANTS,
        "motion": tuple(MOTIONS),
        "polarity": digits.POLARITIES,
    },
    defaults={
        "thickness": "plain",
        "slant": "upright",
        "motion": "moving right",
        "polarity": "white on black",
    },
    split_sizes={"base": 540, "train": 128, "validation": 32, "test": 200},
)

NUM_FRAMES = 9
GLYPH_SIZE = 9.5  # pixels a side of a digit: smaller than in a still image, so that it has somewhere to go


def draw_videos(
    bank: digits.DigitBank, prompts: list[str], generator: torch.Generator, jitter: digits.Jitter | None = None
) -> torch.Tensor:
    """One jittered video [B, F, 3, H, W] in [-1, 1] a prompt, of a random original of its digit's class."""
    jitter = jitter or digits.Jitter()
    asked = [LANGUAGE.parse(prompt) for prompt in prompts]
    wanted = torch.tensor([digits.DIGITS.index(a["digit"]) for a in asked])
    thickness = torch.tensor([digits.THICKNESSES.index(a["thickness"]) for a in asked])
    shear = torch.tensor([digits.SHEAR[a["slant"]] for a in asked])
    inverted = torch.tensor([a["polarity"] == digits.POLARITIES[1] for a in asked])
    motion = torch.tensor([MOTIONS[a["motion"]] for a in asked])
    masters = bank.masters[thickness, digits.choose(bank, wanted, generator)]
    noise = torch.rand(6 + digits.LIGHT_DRAWS, len(asked), generator=generator) * 2 - 1
    # How far the motion goes varies as the rest does.
    motion = motion * (1 + 2 * jitter.scale * noise[5])[:, None]
    size = (digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    paper, ink = digits.light(noise[6:], jitter, size)
    frames = []
    for time in torch.linspace(-0.5, 0.5, NUM_FRAMES).tolist():
        ink_share = digits.strokes(
            masters,
            size=size,
            glyph_size=GLYPH_SIZE,
            centre=jitter.shift * noise[:2].T + time * motion[:, :2],
            scale=1 + jitter.scale * noise[2],
            angle=jitter.rotation * noise[3] + time * motion[:, 2],
            shear=shear + jitter.shear * noise[4],
        )
        frames.append(digits.paint(ink_share, paper=paper, ink=ink, is_inverted=inverted))
    return torch.stack(frames, dim=1)
