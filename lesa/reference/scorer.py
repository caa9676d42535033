"""An independent judge of the pictures: a small classifier that reads which digit is drawn.

It is trained on renderings of real digits only, never on generated images. On disk it is a folder of
scorer.json (what it reads, how well) and weights.safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lesa.reference.digits import IMAGE_SIZE, draw_images, load_bank
from lesa.reference.optim import Optimiser, Report, pick
from lesa.reference.prompts import DIGITS, all_prompts, parse_prompt

KIND = "digit-reader"
LEARNING_RATE = 3e-3
BATCH_SIZE = 64


class Scorer:
    """Reads digits; `accuracy` is its share of right answers on renderings of held-out real digits."""

    def __init__(self, network: nn.Module, accuracy: float) -> None:
        self.network = network.eval().requires_grad_(False)
        self.accuracy = accuracy

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> torch.Tensor:
        """The digit [B] int64 seen in each of `images` [B, 3, H, W], floats in [0, 1].

        Raises ValueError on images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; "
                f"the {KIND} scorer reads [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}]"
            )
        device = next(self.network.parameters()).device
        parts = images.to(device, torch.float32).split(256)
        return torch.cat([self.network(part).argmax(dim=1) for part in parts]).cpu()

    def agreement(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Bool [B]: whether the digit seen in each image [B, 3, H, W], in [0, 1], is the one prompted."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts: give one prompt an image")
        asked = torch.tensor([DIGITS.index(parse_prompt(prompt).digit) for prompt in prompts])
        return self.read(images) == asked

    def save(self, folder: Path) -> None:
        """Write the two files into `folder`, which must exist."""
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()},
            folder / "weights.safetensors",
        )
        card = {"kind": KIND, "image_size": IMAGE_SIZE, "classes": DIGITS, "accuracy": self.accuracy}
        (folder / "scorer.json").write_text(json.dumps(card, indent=2) + "\n")


def load_scorer(folder: Path) -> Scorer:
    """The scorer saved in `folder`. Raises ValueError if the folder holds no scorer of this kind."""
    folder = Path(folder)
    missing = [name for name in ("scorer.json", "weights.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"scorer folder {folder} lacks {' and '.join(missing)}: run the base stage")
    card = json.loads((folder / "scorer.json").read_text())
    expected = {"kind": KIND, "image_size": IMAGE_SIZE, "classes": list(DIGITS)}
    wrong = [
        f"{key} is {card.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if card.get(key) != value
    ]
    if wrong:
        raise ValueError(f"{folder / 'scorer.json'}: " + "; ".join(wrong))
    network = _Reader()
    try:
        network.load_state_dict(load_file(folder / "weights.safetensors"))
    except RuntimeError as error:
        raise ValueError(
            f"{folder / 'weights.safetensors'} does not fit the {KIND} scorer: {error}"
        ) from error
    return Scorer(network, float(card["accuracy"]))


def fit_scorer(*, num_steps: int, num_images: int, seed: int, device: str, report: Report) -> Scorer:
    """Train on `num_images` renderings of the training digits; judge on the held-out ones."""
    generator = torch.Generator().manual_seed(seed)
    prompts = all_prompts()
    bank = load_bank(held_out=False)
    texts = [prompts[i] for i in pick(len(prompts), num_images, generator)]
    images = (draw_images(bank, texts, generator) + 1) / 2
    targets = torch.tensor([DIGITS.index(parse_prompt(text).digit) for text in texts])
    network = _Reader().to(device).train()
    optimiser = Optimiser(
        network.parameters(), learning_rate=LEARNING_RATE, num_steps=num_steps, weight_decay=0.02
    )
    for step in range(num_steps):
        index = pick(num_images, BATCH_SIZE, generator)
        logits = network(images[index].to(device))
        loss = F.cross_entropy(logits, targets[index].to(device), label_smoothing=0.05)
        optimiser.step(loss)
        if step % 50 == 0 or step == num_steps - 1:
            report(step, {"scorer_loss": float(loss.detach())})
    held_out = load_bank(held_out=True)
    texts = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)]
    images = (draw_images(held_out, texts, generator) + 1) / 2
    scorer = Scorer(network, accuracy=float("nan"))
    scorer.accuracy = float(scorer.agreement(images, texts).float().mean())
    return scorer


class _Reader(nn.Module):
    """[B, 3, 16, 16] in [0, 1] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

        self.layers = nn.Sequential(
            *block(1, 24), *block(24, 24), nn.MaxPool2d(2),
            *block(24, 48), *block(48, 48), nn.MaxPool2d(2),
            *block(48, 96), nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, len(DIGITS)),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(images.mean(dim=1, keepdim=True) * 2 - 1)
        return logits
