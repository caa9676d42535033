"""Each word of a prompt shapes the picture."""

import torch

from lesa.base_models.digits import (
    DIGITS,
    LANGUAGE,
    DigitBank,
    Jitter,
    choose_originals,
    draw_images,
    load_bank,
    render,
)

BANK = load_bank(held_out=False)
BASE = LANGUAGE.parse("a three")


def ink(bank: DigitBank = BANK, **changes: str) -> torch.Tensor:
    """Ink [N, 16, 16] in [0, 1] of 40 threes drawn without jitter; black on white is turned back."""
    attributes = BASE | changes
    originals = (bank.labels == DIGITS.index(attributes["digit"])).nonzero()[:40, 0]
    images = render(bank, [LANGUAGE.format(attributes)] * len(originals), originals)
    assert images.shape == (len(originals), 3, 16, 16) and images.min() >= -1 and images.max() <= 1
    brightness = (images.mean(dim=1) + 1) / 2
    return 1 - brightness if attributes["polarity"] == "black on white" else brightness


def centroid(strokes: torch.Tensor) -> tuple[float, float]:
    axis = torch.arange(16.0) - 7.5
    mass = strokes.sum(dim=(1, 2))
    return float(((strokes.sum(1) * axis).sum(1) / mass).mean()), float(
        ((strokes.sum(2) * axis).sum(1) / mass).mean()
    )


def test_thickness_changes_the_amount_of_ink() -> None:
    thin, plain, bold = (float(ink(thickness=t).sum()) for t in ("thin", "plain", "bold"))
    assert thin < 0.85 * plain and plain < 0.9 * bold


def test_slant_moves_the_top_against_the_bottom() -> None:
    def lean(slant: str) -> float:
        strokes = ink(slant=slant)
        return _x(strokes[:, 3:8]) - _x(strokes[:, 8:13])

    assert lean("slanted") > lean("upright") + 1 > lean("backslanted") + 2


def _x(rows: torch.Tensor) -> float:
    axis = torch.arange(16.0) - 7.5
    return float((rows.sum(dim=(0, 1)) * axis).sum() / rows.sum())


def test_position_moves_the_digit() -> None:
    x, y = centroid(ink(position="centre"))
    assert abs(x) < 0.7 and abs(y) < 0.7
    for position, (right, down) in {
        "top left": (-1, -1),
        "top right": (1, -1),
        "bottom left": (-1, 1),
        "bottom right": (1, 1),
        "top": (0, -1),
        "bottom": (0, 1),
        "left": (-1, 0),
        "right": (1, 0),
    }.items():
        for place, side in zip(centroid(ink(position=position)), (right, down), strict=True):
            assert 1.5 < place * side < 3.5 if side else abs(place) < 0.7


def test_polarity_exchanges_black_and_white() -> None:
    assert torch.allclose(ink(), ink(polarity="black on white"), atol=1e-6)


def test_the_digit_is_of_the_class_prompted() -> None:
    prompts = [f"a {digit}" for digit in DIGITS for _ in range(20)]
    originals = choose_originals(BANK, prompts, torch.Generator().manual_seed(0))
    asked = torch.tensor([DIGITS.index(LANGUAGE.parse(prompt)["digit"]) for prompt in prompts])
    assert torch.equal(BANK.labels[originals], asked)
    assert len(set(originals.tolist())) > 100


def test_jitter_varies_pictures_and_follows_its_seed() -> None:
    prompts = ["a bold five, top left"] * 8
    first = draw_images(BANK, prompts, torch.Generator().manual_seed(1))
    again = draw_images(BANK, prompts, torch.Generator().manual_seed(1))
    other = draw_images(BANK, prompts, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.02
    assert first[:, 0].ne(first[:, 1]).any(), "paper and ink have colours"
    still = Jitter(shift=0, scale=0, rotation=0, shear=0, tint=0, shade=0)
    originals = choose_originals(BANK, prompts, torch.Generator().manual_seed(3))
    jittered = render(BANK, prompts, originals, generator=torch.Generator().manual_seed(3), jitter=still)
    assert torch.allclose(jittered, render(BANK, prompts, originals), atol=1e-6)


def test_held_out_digits_are_a_fifth_and_others() -> None:
    held_out = load_bank(held_out=True)
    assert len(held_out.labels) == 359 and len(BANK.labels) == 1438
    seen = {tuple(image.tolist()) for image in BANK.masters[1].flatten(1)}
    assert not any(tuple(image.tolist()) in seen for image in held_out.masters[1].flatten(1))
