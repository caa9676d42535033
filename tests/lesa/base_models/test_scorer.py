"""What a scorer reads: classes put together from the prompt's attributes, from grey or coloured pictures."""

import pytest
import torch
from torch import nn

from lesa.base_models.data_sets import DATA_SETS
from lesa.base_models.optim import Report
from lesa.base_models.scorer import Scorer, classes, fit_scorer, targets

QUIET: Report = lambda step, values: None  # noqa: E731


def test_classes_are_every_combination_of_what_is_read() -> None:
    assert classes(DATA_SETS["flux-digits"])[:3] == ["zero", "one", "two"]
    places = classes(DATA_SETS["flux-photos"])
    assert len(places) == len(set(places)) == 2 * 4 * 6
    assert places[0] == "temple, top row, far left" and places[-1] == "flower, bottom row, far right"


def test_targets_are_what_prompts_say_whatever_the_order() -> None:
    digits, photos = DATA_SETS["flux-digits"], DATA_SETS["flux-photos"]
    assert targets(digits, ["a nine", "a bold zero, top left"]).tolist() == [9, 0]
    asked = targets(photos, ["a view of the flower, far right, bottom row, cold", "a temple, far left, top row"])
    assert asked.tolist() == [47, 0]


def test_agreement_compares_what_is_seen_with_what_is_asked() -> None:
    """A network that sees one class always agrees with that prompt alone."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.eye(10)[7])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(images), -1)

    scorer = Scorer(DATA_SETS["flux-digits"], Fixed(), accuracy=0.1)
    seen = scorer.agreement(torch.rand(3, 3, 16, 16), ["a seven", "a bold seven, top left", "a six"])
    assert seen.tolist() == [True, True, False]


def test_a_video_is_read_by_all_its_frames() -> None:
    """Two frames that say seven, seven that say six faintly: the surer ones win."""

    class ByBrightness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            is_bright = images.mean(dim=(1, 2, 3)) > 0.5
            return torch.where(is_bright[:, None], 20 * torch.eye(10)[7], 1 * torch.eye(10)[6])

    data_set = DATA_SETS["hunyuan-moving-digits"]
    scorer = Scorer(data_set, ByBrightness(), accuracy=0.1)
    videos = torch.zeros(2, 9, 3, 16, 16)
    videos[0, 3:5] = 1.0
    assert scorer.agreement(videos, ["a seven", "a six"]).tolist() == [True, True]
    with pytest.raises(ValueError, match=r"moving-digit-reader scorer reads \[B, 9, 3, 16, 16\]"):
        scorer.agreement(videos[:, 0], ["a seven", "a six"])


def test_fifty_steps_read_places_far_better_than_chance() -> None:
    scorer = fit_scorer(DATA_SETS["flux-photos"], num_steps=50, num_images=1000, seed=0, device="cpu", report=QUIET)
    assert scorer.accuracy > 10 / 48
