"""Each word of a prompt shapes the crop."""

import torch

from lesa.base_models.photos import (
    COLUMNS,
    GAIN,
    IMAGE_SIZE,
    LANGUAGE,
    PHOTOS,
    ROWS,
    SIDE,
    ZOOMS,
    Jitter,
    draw_images,
    load_bank,
    render,
)

BANK = load_bank()
BASE = LANGUAGE.parse("a view of the temple, third row, left")


def crop(**changes: str) -> torch.Tensor:
    """One crop [3, H, W] in [0, 1] without jitter."""
    images = render(BANK, [LANGUAGE.format(BASE | changes)])
    assert images.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE) and images.min() >= -1 and images.max() <= 1
    return (images[0] + 1) / 2


def original(photo: str) -> torch.Tensor:
    """The whole photograph [3, height, width] in [0, 1]."""
    from sklearn.datasets import load_sample_image

    name = {"temple": "china.jpg", "flower": "flower.jpg"}[photo]
    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255


def test_a_crop_is_that_part_of_the_photograph() -> None:
    """Its colour is the mean over the frame, worked out from the photograph itself."""
    for photo in PHOTOS:
        pixels = original(photo)
        height, width = pixels.shape[1:]
        for zoom in ZOOMS:
            side = SIDE[zoom]
            for row in range(4):
                for column in range(6):
                    top = (row + 0.5) / 4 * (height - side)
                    left = (column + 0.5) / 6 * (width - side)
                    part = pixels[:, round(top) : round(top + side), round(left) : round(left + side)]
                    shown = crop(photo=photo, zoom=zoom, row=ROWS[row], column=COLUMNS[column])
                    assert torch.allclose(shown.mean(dim=(1, 2)), part.mean(dim=(1, 2)), atol=0.01)


def test_rows_go_down_and_columns_to_the_right() -> None:
    """The bottom right of the temple's photograph is dark trees, the top right is bright sky."""
    corner = crop(photo="temple", zoom="wide", row="bottom row", column="far right")
    sky = crop(photo="temple", zoom="wide", row="top row", column="far right")
    assert sky.mean() > 0.8 > 0.6 > corner.mean()


def test_a_mirrored_crop_is_the_same_place_turned() -> None:
    assert torch.allclose(crop(mirror="mirrored"), crop().flip(-1), atol=1e-5)
    assert (crop(mirror="mirrored") - crop()).abs().mean() > 0.02


def test_a_tone_scales_the_colours() -> None:
    natural = crop()
    for tone, gain in GAIN.items():
        expected = (natural * torch.tensor(gain)[:, None, None]).clamp(0, 1)
        assert torch.allclose(crop(tone=tone), expected, atol=1e-6)


def test_a_closer_view_shows_less_in_as_many_pixels() -> None:
    """Neighbouring pixels of a close view are more alike than those of a wide one."""
    for photo in PHOTOS:
        rough = []
        for zoom in ZOOMS:
            prompts = [f"a {zoom} view of the {photo}, {row}, {column}" for row in ROWS for column in COLUMNS]
            images = render(BANK, prompts)
            rough.append(float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()))
        assert rough == sorted(rough, reverse=True)


def test_jitter_varies_crops_and_follows_its_seed() -> None:
    prompts = ["a close view of the flower, third row, centre right, cold"] * 8
    first = draw_images(BANK, prompts, torch.Generator().manual_seed(1))
    again = draw_images(BANK, prompts, torch.Generator().manual_seed(1))
    other = draw_images(BANK, prompts, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.02
    still = Jitter(shift=0, scale=0, gain=0)
    jittered = render(BANK, prompts, generator=torch.Generator().manual_seed(3), jitter=still)
    assert torch.allclose(jittered, render(BANK, prompts), atol=1e-6)


def test_no_frame_leaves_its_photograph() -> None:
    """With the most extreme jitter that can be drawn, at the edges."""
    jitter = Jitter()
    for side in SIDE.values():
        reach = side * (0.5 * (1 + jitter.scale) + jitter.shift)
        for extent, count in ((BANK.height, len(ROWS)), (BANK.width, len(COLUMNS))):
            first = side / 2 + 0.5 / count * (extent - side)
            assert reach <= first


def test_prompts_differ_in_what_they_show() -> None:
    """No two places of one zoom look alike, not even the plain sky."""
    prompts = LANGUAGE.all_prompts()
    images = render(BANK, prompts).flatten(1)
    distance = torch.cdist(images, images) / images.shape[1] ** 0.5
    distance.fill_diagonal_(1)
    assert distance.min() > 1e-3
