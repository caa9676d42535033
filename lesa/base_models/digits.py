"""Real handwritten digits (scikit-learn's, 8 x 8 pixels) drawn as a prompt asks: 16 x 16 RGB images.

A full prompt reads "a thin slanted seven, top left, white on black"; "a thin seven" takes the defaults.

Shape legend: N underlying digits, B images, H = W = IMAGE_SIZE pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lesa.base_models.prompts import Language

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THICKNESSES = ("thin", "plain", "bold")
SLANTS = ("upright", "slanted", "backslanted")
POSITIONS = ("centre", "top left", "top right", "bottom left", "bottom right", "top", "bottom", "left", "right")
POLARITIES = ("white on black", "black on white")

LANGUAGE = Language(
    form="a {thickness} {slant} {digit}, {position}, {polarity}",
    values={
        "digit": DIGITS,
        "thickness": THICKNESSES,
        "slant": SLANTS,
        "position": POSITIONS,
        "polarity": POLARITIES,
    },
    defaults={
        "thickness": "plain",
        "slant": "upright",
        "position": "centre",
        "polarity": "white on black",
    },
    split_sizes={"base": 900, "train": 400, "validation": 64, "test": 256},
)

IMAGE_SIZE = 16  # pixels a side
GLYPH_SIZE = 11.0  # pixels a side of the 8 x 8 original once drawn
CORNER_OFFSET = 2.2  # pixels from the centre to a corner's or a side's place, on each axis
SHEAR = {"upright": 0.0, "slanted": 0.36, "backslanted": -0.36}  # horizontal shift per unit of height
STROKE_RADIUS = {"thin": -1, "plain": 0, "bold": 1}  # erosion or dilation, in 32 x 32 master pixels
_MASTER = 32  # the digits are kept at this size while their strokes and outline change
_SUPERSAMPLE = 2
LIGHT_DRAWS = 8  # random numbers an image that `light` takes
HELD_OUT_EVERY = 5  # every fifth underlying digit is never seen by a model or a scorer in training


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitBank:
    """Underlying digits as enlarged masters, values in [0, 1], ink = 1.

    masters: [thickness, N, 1, 32, 32], one version a stroke width; labels: [N] int64.
    """

    masters: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """Half-widths of the uniform perturbations that make the training images a continuum."""

    shift: float = 0.35  # pixels
    scale: float = 0.04  # relative
    rotation: float = 0.04  # radians
    shear: float = 0.04
    tint: float = 0.12  # how far paper and ink may be from pure black and white, each colour channel
    shade: float = 0.15  # how much a corner of the paper may be lighter or darker than its middle


def load_bank(*, held_out: bool, typical: float = 1.0) -> DigitBank:
    """The training part (4/5) of scikit-learn's 1797 digits, or the held-out part.

    `typical` keeps that share of every class, those nearest to the mean image of their class.

    Raises ModuleNotFoundError when scikit-learn is absent: it comes with the `pipeline` extra.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    is_held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = is_held_out if held_out else ~is_held_out
    images, labels = images[chosen], labels[chosen]
    keep = _most_typical(images.flatten(1), labels, typical)
    images, labels = images[keep], labels[keep]
    plain = F.interpolate(images, size=_MASTER, mode="bicubic", align_corners=False).clamp(0, 1)
    versions = []
    for thickness in THICKNESSES:
        radius = STROKE_RADIUS[thickness]
        window = 2 * abs(radius) + 1
        if radius < 0:
            versions.append(-F.max_pool2d(-plain, window, stride=1, padding=-radius))
        elif radius > 0:
            dilated = F.max_pool2d(plain, window, stride=1, padding=radius)
            versions.append(torch.lerp(plain, dilated, 0.7))  # wholly dilated, loops would close
        else:
            versions.append(plain)
    # Thin strokes of blurred originals turn grey when eroded, bold ones keep soft edges: restore contrast.
    gains = {"thin": 1.25, "plain": 1.15, "bold": 1.1}
    masters = [(v * gains[t]).clamp(0, 1) for t, v in zip(THICKNESSES, versions, strict=True)]
    return DigitBank(masters=torch.stack(masters), labels=labels)


def _most_typical(pixels: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """Indices, in order, of the `share` of each class nearest to its mean."""
    kept = []
    for digit in range(len(DIGITS)):
        members = (labels == digit).nonzero()[:, 0]
        distance = (pixels[members] - pixels[members].mean(dim=0)).norm(dim=1)
        kept.append(members[distance.argsort(stable=True)[: math.ceil(share * len(members))]])
    return torch.cat(kept).sort().values


def choose_originals(bank: DigitBank, prompts: list[str], generator: torch.Generator) -> torch.Tensor:
    """For each prompt, the index [B] of a random underlying digit of the right class."""
    return choose(bank, torch.tensor([DIGITS.index(LANGUAGE.parse(p)["digit"]) for p in prompts]), generator)


def choose(bank: DigitBank, wanted: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The index [B] of a random underlying digit of each wanted value [B], 0 to 9."""
    by_class = [(bank.labels == digit).nonzero()[:, 0] for digit in range(len(DIGITS))]
    sizes = torch.tensor([len(members) for members in by_class])
    draws = (torch.rand(len(wanted), generator=generator, dtype=torch.float64) * sizes[wanted]).long()
    table = torch.zeros(len(DIGITS), int(sizes.max()), dtype=torch.long)
    for digit, members in enumerate(by_class):
        table[digit, : len(members)] = members
    return table[wanted, draws]


def render(
    bank: DigitBank,
    prompts: list[str],
    originals: torch.Tensor,
    *,
    generator: torch.Generator | None = None,
    jitter: Jitter | None = None,
) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] of the underlying digits `originals` [B] as `prompts` describe them.

    Without `jitter` the result is a function of its arguments alone; with it, `generator` draws the noise.
    """
    assert len(prompts) == len(originals), "one underlying digit a prompt"
    assert (jitter is None) == (generator is None), "jitter needs a generator, and only jitter does"
    asked = [LANGUAGE.parse(prompt) for prompt in prompts]
    num_images = len(asked)
    thickness = torch.tensor([THICKNESSES.index(a["thickness"]) for a in asked])
    shear = torch.tensor([SHEAR[a["slant"]] for a in asked])
    centre = torch.tensor([_offset(a["position"]) for a in asked]).reshape(num_images, 2)
    inverted = torch.tensor([a["polarity"] == POLARITIES[1] for a in asked])
    scale, angle = torch.ones(num_images), torch.zeros(num_images)
    paper = ink = torch.zeros(num_images, 3, 1, 1)
    if jitter is not None:
        noise = torch.rand(5 + LIGHT_DRAWS, num_images, generator=generator) * 2 - 1
        centre = centre + jitter.shift * noise[:2].T
        scale = 1 + jitter.scale * noise[2]
        angle = jitter.rotation * noise[3]
        shear = shear + jitter.shear * noise[4]
        paper, ink = light(noise[5:], jitter, (IMAGE_SIZE, IMAGE_SIZE))
    ink_share = strokes(
        bank.masters[thickness, originals],
        size=(IMAGE_SIZE, IMAGE_SIZE),
        glyph_size=GLYPH_SIZE,
        centre=centre,
        scale=scale,
        angle=angle,
        shear=shear,
    )
    return paint(ink_share, paper=paper, ink=ink, is_inverted=inverted)


def draw_images(
    bank: DigitBank, prompts: list[str], generator: torch.Generator, jitter: Jitter | None = None
) -> torch.Tensor:
    """One jittered image [B, 3, H, W] in [-1, 1] a prompt, of a random underlying digit of its class."""
    originals = choose_originals(bank, prompts, generator)
    return render(bank, prompts, originals, generator=generator, jitter=jitter or Jitter())


def _offset(position: str) -> tuple[float, float]:
    assert position in POSITIONS
    x = CORNER_OFFSET * (position.endswith("right") - position.endswith("left"))
    y = CORNER_OFFSET * (position.startswith("bottom") - position.startswith("top"))
    return x, y


def strokes(
    masters: torch.Tensor,  # [B, 1, 32, 32]
    *,
    size: tuple[int, int],  # H, W of the image, in pixels
    glyph_size: float,  # pixels a side of a digit at scale 1
    centre: torch.Tensor,  # [B, 2], x and y in pixels from the image's middle
    scale: torch.Tensor,  # [B]
    angle: torch.Tensor,  # [B], radians
    shear: torch.Tensor,  # [B], horizontal shift per unit of height
) -> torch.Tensor:
    """How much of each pixel is ink, [B, 1, H, W] in [0, 1], for one digit an image."""
    grid = _sampling_grid(size=size, glyph_size=glyph_size, centre=centre, scale=scale, angle=angle, shear=shear)
    drawn = F.grid_sample(masters, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(drawn, _SUPERSAMPLE)


def light(
    noise: torch.Tensor,  # [LIGHT_DRAWS, B] in [-1, 1]
    jitter: Jitter,
    size: tuple[int, int],  # H, W
) -> tuple[torch.Tensor, torch.Tensor]:
    """Departure from black and white: of the paper [B, 3, H, W], darker to one side, and of the ink [B, 3, 1, 1]."""
    num_images = noise.shape[1]
    colours = jitter.tint * (noise[:6].T.reshape(num_images, 6, 1, 1) + 1) / 2
    down_axis, across_axis = (torch.linspace(-0.5, 0.5, n) for n in size)
    across, down = (n[:, None, None, None] for n in noise[6:8])
    shade = jitter.shade * (across * across_axis + down * down_axis[:, None])
    return colours[:, :3] + shade, colours[:, 3:]


def paint(
    ink_share: torch.Tensor,  # [B, 1, H, W]
    *,
    paper: torch.Tensor,  # lightness of the black, broadcast to [B, 3, H, W]
    ink: torch.Tensor,  # darkness of the white, [B, 3, 1, 1]
    is_inverted: torch.Tensor,  # [B] bool: black on white
) -> torch.Tensor:
    """RGB [B, 3, H, W] in [-1, 1] of ink on paper."""
    brightness = torch.lerp(paper.clamp(0, 1), 1 - ink, ink_share)
    brightness = torch.where(is_inverted[:, None, None, None], 1 - brightness, brightness)
    return brightness * 2 - 1


def _sampling_grid(
    *,
    size: tuple[int, int],
    glyph_size: float,
    centre: torch.Tensor,
    scale: torch.Tensor,
    angle: torch.Tensor,
    shear: torch.Tensor,
) -> torch.Tensor:
    """Where an output pixel looks in the master: undoes scale, then shear, then rotation, then shift."""
    # Pixel centres, in pixels of the final image from its middle.
    down, across = ((torch.arange(n * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - n / 2 for n in size)
    y, x = torch.meshgrid(down, across, indexing="ij")
    x = x[None] - centre[:, 0, None, None]
    y = y[None] - centre[:, 1, None, None]
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
    x = x + shear[:, None, None] * y  # the top (negative y) of a slanted digit lies to the right
    half = scale[:, None, None] * glyph_size / 2
    return torch.stack([x / half, y / half], dim=-1)
