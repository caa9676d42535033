"""An independent judge of the images: a small classifier that reads part of the prompt from them.

It is trained on real images only (renderings of digits, crops of photographs), never on generated ones. On
disk it is a folder of scorer.json (what it reads, how well) and weights.safetensors.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lesa.base_models.data_sets import DATA_SETS, DataSet, Reading
from lesa.base_models.optim import Optimiser, Report, pick
from lesa.errors import LesaError

LEARNING_RATE = 3e-3
BATCH_SIZE = 64
JUDGED_A_STEP = 40  # held-out images a training step at most: a trial run needs no exact accuracy


class Scorer:
    """Reads one class from an image; `accuracy` is its share of right answers on held-out real images.

    A class is what the prompt says of the reading's attributes: "seven", or "temple, second row, far left".
    """

    def __init__(self, data_set: DataSet, network: nn.Module, accuracy: float) -> None:
        self.data_set = data_set
        self.network = network.eval().requires_grad_(False)
        self.accuracy = accuracy

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> torch.Tensor:
        """The class [B] int64, an index of `classes`, seen in each of `images` in [0, 1], a video's by all its frames.

        Raises ValueError on images that are not [B, 3, H, W], videos that are not [B, F, 3, H, W], of the data set's
        size.
        """
        data_set = self.data_set
        frames = () if data_set.num_frames is None else (data_set.num_frames,)
        wanted = (*frames, 3, data_set.height, data_set.width)
        if tuple(images.shape[1:]) != wanted:
            raise LesaError(
                f"images have shape {tuple(images.shape)}; "
                f"the {_reading(data_set).kind} scorer reads [B, {', '.join(map(str, wanted))}]"
            )
        device = next(self.network.parameters()).device
        parts = images.flatten(0, -4).to(device, torch.float32).split(256)
        logits = torch.cat([self.network(part) for part in parts])
        return logits.log_softmax(dim=1).unflatten(0, (len(images), -1)).mean(dim=1).argmax(dim=1).cpu()

    def agreement(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Bool [B]: whether the class seen in each image or video, in [0, 1], is the one prompted."""
        if len(images) != len(prompts):
            raise LesaError(f"{len(images)} images but {len(prompts)} prompts: give one prompt an image")
        return self.read(images) == targets(self.data_set, prompts)

    def save(self, folder: Path) -> None:
        """Write the two files into `folder`, which must exist."""
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()},
            folder / "weights.safetensors",
        )
        card = {**_card(self.data_set), "accuracy": self.accuracy}
        (folder / "scorer.json").write_text(json.dumps(card, indent=2) + "\n")


def load_scorer(folder: Path) -> Scorer:
    """The scorer saved in `folder`. Raises ValueError if the folder holds no scorer of a known kind."""
    folder = Path(folder)
    missing = [name for name in ("scorer.json", "weights.safetensors") if not (folder / name).is_file()]
    if missing:
        raise LesaError(f"scorer folder {folder} lacks {' and '.join(missing)}: run the base stage")
    card = json.loads((folder / "scorer.json").read_text())
    known = {d.reading.kind: d for d in DATA_SETS.values() if d.reading is not None}
    data_set = known.get(card.get("kind"))
    if data_set is None:
        raise LesaError(
            f"{folder / 'scorer.json'}: kind is {card.get('kind')!r}, not one of {', '.join(known)}: run the base stage"
        )
    wrong = [
        f"{key} is {card.get(key)!r}, not {value!r}" for key, value in _card(data_set).items() if card.get(key) != value
    ]
    if wrong:
        raise LesaError(f"{folder / 'scorer.json'}: " + "; ".join(wrong))
    network = _Reader(data_set)
    try:
        network.load_state_dict(load_file(folder / "weights.safetensors"))
    except RuntimeError as error:
        raise LesaError(f"{folder / 'weights.safetensors'} does not fit the {card['kind']} scorer: {error}") from error
    return Scorer(data_set, network, float(card["accuracy"]))


def fit_scorer(data_set: DataSet, *, num_steps: int, num_images: int, seed: int, device: str, report: Report) -> Scorer:
    """Train on `num_images` real images of the scorer's part; judge on the held-out part.

    `data_set` must have a reading.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = data_set.language.all_prompts()
    texts = [prompts[i] for i in pick(len(prompts), num_images, generator)]
    images = _one_frame((data_set.load("scorer")(texts, generator) + 1) / 2, generator)
    wanted = targets(data_set, texts)
    network = _Reader(data_set).to(device).train()
    optimiser = Optimiser(network.parameters(), learning_rate=LEARNING_RATE, num_steps=num_steps, weight_decay=0.02)
    for step in range(num_steps):
        index = pick(num_images, BATCH_SIZE, generator)
        logits = network(images[index].to(device))
        loss = F.cross_entropy(logits, wanted[index].to(device), label_smoothing=0.05)
        optimiser.step(loss)
        if step % 50 == 0 or step == num_steps - 1:
            report(step, {"scorer_loss": float(loss.detach())})
    judged = torch.randperm(len(prompts), generator=generator)[: JUDGED_A_STEP * num_steps]
    texts = [prompts[i] for i in judged]
    images = (data_set.load("held_out")(texts, generator) + 1) / 2
    scorer = Scorer(data_set, network, accuracy=float("nan"))
    scorer.accuracy = float(scorer.agreement(images, texts).float().mean())
    return scorer


def _one_frame(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B, 3, H, W]: images as they are, a random frame of each video."""
    if images.ndim == 4:
        return images
    return images[torch.arange(len(images)), pick(images.shape[1], len(images), generator)]


def classes(data_set: DataSet) -> list[str]:
    """What the data set's scorer can see, the attributes' values joined by commas, in the order of its indices."""
    values = data_set.language.values
    return [", ".join(chosen) for chosen in product(*(values[a] for a in _reading(data_set).attributes))]


def targets(data_set: DataSet, prompts: list[str]) -> torch.Tensor:
    """The class [B] int64 that each prompt asks for."""
    index = {name: position for position, name in enumerate(classes(data_set))}
    asked = [data_set.language.parse(prompt) for prompt in prompts]
    return torch.tensor([index[", ".join(a[n] for n in _reading(data_set).attributes)] for a in asked])


def _reading(data_set: DataSet) -> Reading:
    assert data_set.reading is not None, f"{data_set.name} has no scorer"
    return data_set.reading


def _card(data_set: DataSet) -> dict[str, object]:
    return {
        "kind": _reading(data_set).kind,
        "size": [data_set.height, data_set.width],
        "classes": classes(data_set),
    }


class _Reader(nn.Module):
    """[B, 3, H, W] in [0, 1] to logits [B, classes]."""

    def __init__(self, data_set: DataSet) -> None:
        super().__init__()
        self.is_grey = _reading(data_set).is_grey

        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

        num_places = (data_set.height // 4) * (data_set.width // 4)
        self.layers = nn.Sequential(
            *block(1 if self.is_grey else 3, 24), *block(24, 24), nn.MaxPool2d(2),
            *block(24, 48), *block(48, 48), nn.MaxPool2d(2),
            *block(48, 96), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(96 * num_places, len(classes(data_set))),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = images.mean(dim=1, keepdim=True) if self.is_grey else images
        logits: torch.Tensor = self.layers(seen * 2 - 1)
        return logits
