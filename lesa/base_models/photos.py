"""Crops of two photographs (scikit-learn's sample images, 427 x 640 pixels) as a prompt asks: 24 x 24 RGB.

A full prompt reads "a close view of the temple, second row, far left, mirrored, warm". Row and column name the
place in the photograph itself; a mirrored view shows what is there turned left to right.

Shape legend: B crops, H = W = IMAGE_SIZE pixels, P pixels of a reduced photograph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lesa.base_models.prompts import Language

PHOTOS = ("temple", "flower")  # china.jpg, flower.jpg
ZOOMS = ("wide", "medium", "close")
ROWS = ("top row", "second row", "third row", "bottom row")
COLUMNS = ("far left", "left", "centre left", "centre right", "right", "far right")
MIRRORS = ("unmirrored", "mirrored")
TONES = ("natural", "warm", "cold", "dim", "green", "violet", "rose", "teal")

LANGUAGE = Language(
    form="a {zoom} view of the {photo}, {row}, {column}, {mirror}, {tone}",
    values={
        "photo": PHOTOS,
        "zoom": ZOOMS,
        "row": ROWS,
        "column": COLUMNS,
        "mirror": MIRRORS,
        "tone": TONES,
    },
    defaults={"zoom": "medium", "mirror": "unmirrored", "tone": "natural"},
    split_sizes={"base": 1184, "train": 800, "validation": 64, "test": 256},
)

IMAGE_SIZE = 24  # pixels a side
FILES = {"temple": "china.jpg", "flower": "flower.jpg"}
SIDE = {"wide": 180.0, "medium": 107.0, "close": 64.0}  # of the frame, in pixels of the photograph
GAIN = {  # of red, green and blue
    "natural": (1.0, 1.0, 1.0),
    "warm": (1.12, 0.96, 0.66),
    "cold": (0.68, 0.94, 1.16),
    "dim": (0.5, 0.5, 0.5),
    "green": (0.7, 1.12, 0.76),
    "violet": (1.0, 0.68, 1.1),
    "rose": (1.14, 0.76, 0.84),
    "teal": (0.58, 1.06, 1.0),
}
_SUPERSAMPLE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoBank:
    """Both photographs, reduced for each zoom so that a frame spans IMAGE_SIZE * _SUPERSAMPLE pixels.

    reduced: by photograph and zoom, [3, P, P'] in [0, 1]; height, width: of the originals, in pixels.
    """

    reduced: dict[tuple[str, str], torch.Tensor]
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """Half-widths of the uniform perturbations that make the crops a continuum."""

    shift: float = 0.1  # of the frame's side, on each axis
    scale: float = 0.08  # relative
    gain: float = 0.05  # relative, each colour channel


def load_bank() -> PhotoBank:
    """scikit-learn's two sample photographs; they come with the package.

    Raises ModuleNotFoundError when scikit-learn is absent: it comes with the `pipeline` extra.
    """
    from sklearn.datasets import load_sample_image

    reduced = {}
    for photo in PHOTOS:
        pixels = torch.from_numpy(load_sample_image(FILES[photo]).copy()).permute(2, 0, 1)[None].float() / 255
        height, width = pixels.shape[2:]
        for zoom in ZOOMS:
            factor = IMAGE_SIZE * _SUPERSAMPLE / SIDE[zoom]
            size = (round(height * factor), round(width * factor))
            reduced[photo, zoom] = F.interpolate(
                pixels, size=size, mode="bilinear", antialias=True, align_corners=False
            )[0]
    return PhotoBank(reduced=reduced, height=height, width=width)


def render(
    bank: PhotoBank,
    prompts: list[str],
    *,
    generator: torch.Generator | None = None,
    jitter: Jitter | None = None,
) -> torch.Tensor:
    """Crops [B, 3, H, W] in [-1, 1] as `prompts` describe them.

    Without `jitter` the result is a function of its arguments alone; with it, `generator` draws the noise.
    """
    assert (jitter is None) == (generator is None), "jitter needs a generator, and only jitter does"
    asked = [LANGUAGE.parse(prompt) for prompt in prompts]
    num_images = len(asked)
    side = torch.tensor([SIDE[a["zoom"]] for a in asked])
    across = torch.tensor([(COLUMNS.index(a["column"]) + 0.5) / len(COLUMNS) for a in asked])
    down = torch.tensor([(ROWS.index(a["row"]) + 0.5) / len(ROWS) for a in asked])
    flip = torch.tensor([-1.0 if a["mirror"] == MIRRORS[1] else 1.0 for a in asked])
    gain = torch.tensor([GAIN[a["tone"]] for a in asked]).reshape(num_images, 3)
    # Evenly spaced frames that all lie within the photograph.
    x = side / 2 + across * (bank.width - side)
    y = side / 2 + down * (bank.height - side)
    if jitter is not None:
        noise = torch.rand(6, num_images, generator=generator) * 2 - 1
        x = x + jitter.shift * side * noise[0]
        y = y + jitter.shift * side * noise[1]
        side = side * (1 + jitter.scale * noise[2])
        gain = gain * (1 + jitter.gain * noise[3:6].T)
    count = IMAGE_SIZE * _SUPERSAMPLE
    axis = ((torch.arange(count) + 0.5) / count - 0.5) * side[:, None]  # photograph pixels from the middle
    columns = (x[:, None] + flip[:, None] * axis) * (2 / bank.width) - 1
    rows = (y[:, None] + axis) * (2 / bank.height) - 1
    assert all(float(place.abs().max()) <= 1 for place in (columns, rows)), "a frame leaves its photograph"
    crops = torch.empty(num_images, 3, IMAGE_SIZE, IMAGE_SIZE)
    for (photo, zoom), pixels in bank.reduced.items():
        alike = [i for i, a in enumerate(asked) if (a["photo"], a["zoom"]) == (photo, zoom)]
        if alike:
            crops[alike] = _sample(pixels, columns[alike], rows[alike])
    return (crops * gain[:, :, None, None]).clamp(0, 1) * 2 - 1


def draw_images(
    bank: PhotoBank, prompts: list[str], generator: torch.Generator, jitter: Jitter | None = None
) -> torch.Tensor:
    """One jittered crop [B, 3, H, W] in [-1, 1] a prompt."""
    return render(bank, prompts, generator=generator, jitter=jitter or Jitter())


def _sample(pixels: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Crops [B, 3, H, W] of one photograph [3, P, P'] at places [B, 2 W] and [B, 2 H] in [-1, 1]."""
    num_images, count = columns.shape
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
    # As one tall image: the photograph is not copied for every crop.
    tall = grid.reshape(1, num_images * count, count, 2)
    sampled = F.grid_sample(pixels[None], tall, mode="bilinear", padding_mode="border", align_corners=False)
    crops = sampled.reshape(3, num_images, count, count).transpose(0, 1)
    return F.avg_pool2d(crops, _SUPERSAMPLE)
