"""Pictures and frames to PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def save_pictures(pictures: torch.Tensor, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Write `000-seed<seed>.png` (videos: one file a frame) and return the paths.

    Args:
        pictures: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].
        seeds: the noise seed of each.
        folder: made if it is not there; files of the same name are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (picture, seed) in enumerate(zip(pictures, seeds, strict=True)):
        frames = picture if picture.ndim == 4 else picture[None]
        for number, frame in enumerate(frames):
            suffix = f"-frame{number:04d}" if picture.ndim == 4 else ""
            path = folder / f"{index:03d}-seed{seed}{suffix}.png"
            array = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            Image.fromarray(array).save(path)
            written.append(path)
    return written
