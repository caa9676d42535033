"""Pictures to give to pipelines, and a pipeline together with the call that its tests make."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lesa.bundle import Bundle
from lesa.params import CallParams
from tests.helpers.bundles import make_bundle
from tests.helpers.tiny import SIZE

NUM_STEPS = 8


@dataclass(kw_only=True)
class PictureCall:
    """A pipeline with what it is called with beside the prompt."""

    pipe: Any
    images: dict[str, Any]  # arguments that CallParams has no place for
    call: CallParams
    first_step: int = 0
    branches: tuple[str, ...] = ("denoise",)
    extra: dict[str, Any] = field(default_factory=dict)

    def run(self, seed: int = 0, **changes: Any) -> torch.Tensor:
        """Pictures [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1]."""
        given = {name: value for name, value in dataclasses.asdict(self.call).items() if value is not None}
        settings = {
            "prompt": "a thin seven",
            "output_type": "pt",
            "return_dict": False,
            "generator": torch.Generator().manual_seed(seed),
        }
        return self.pipe(**(settings | given | self.images | self.extra | changes))[0]

    def own_bundle(self, folder: Path) -> Bundle:
        """A bundle made for this very class of pipeline, in `folder`."""
        self.run(output_type="latent")
        return make_bundle(
            self.pipe, folder, self.call, sigmas=self.pipe.scheduler.sigmas.clone(), branches=self.branches
        )


def picture(size: int = SIZE) -> Image.Image:
    """Noise, the same every time."""
    values = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(7))
    return Image.fromarray((values * 255).byte().numpy())


def mask(size: int = SIZE) -> Image.Image:
    """The left half is kept, the right half made anew."""
    half = torch.zeros(size, size)
    half[:, size // 2 :] = 255
    return Image.fromarray(half.byte().numpy())
