"""Where the picture's own tokens lie, from the arguments of a call."""

from __future__ import annotations

import torch

from lesa.models.families import Grid, by_ids, by_latents, by_shapes


def ids(number: int, rows: int, columns: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, number), row, column], dim=-1).reshape(-1, 3).float()


def test_ids_of_the_picture_come_before_those_of_a_larger_reference() -> None:
    both = torch.cat([ids(0, 2, 3), ids(1, 5, 7)])
    assert by_ids({"img_ids": both}) == Grid(1, 2, 3, 2, 6)
    assert by_ids({"img_ids": both[None]}) == Grid(1, 2, 3, 2, 6)  # with a batch dimension, as older pipelines do
    assert by_ids({}) is None


def test_shapes_of_a_call_and_as_they_are_recorded() -> None:
    assert by_shapes({"img_shapes": [[(1, 2, 3), (1, 5, 7)]] * 2}) == Grid(1, 2, 3, 2, 6)
    assert by_shapes({"img_shapes": [[[1, 2, 3]]]}) == Grid(1, 2, 3, 2, 6)
    assert by_shapes({"img_shapes": None}) is None


def test_latents_are_counted_each_and_all_of_them_are_predicted() -> None:
    assert by_latents({"hidden_states": torch.zeros(1, 4, 2, 6, 8)}) == Grid(2, 6, 8, 1, None)
    assert by_latents({"hidden_states": torch.zeros(1, 4, 2)}) is None
