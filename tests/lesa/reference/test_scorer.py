"""What a scorer reads: classes put together from the prompt's attributes, from grey or coloured pictures."""

import torch
from torch import nn

from lesa.reference import DATA_SETS, Scorer
from lesa.reference.optim import Report
from lesa.reference.scorer import classes, fit_scorer, targets

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


def test_fifty_steps_read_places_far_better_than_chance() -> None:
    scorer = fit_scorer(
        DATA_SETS["flux-photos"], num_steps=50, num_images=1000, seed=0, device="cpu", report=QUIET
    )
    assert scorer.accuracy > 10 / 48
