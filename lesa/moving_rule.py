"""A predictor on one schedule that follows the features to their device and precision."""

from __future__ import annotations

import torch

from lesa.history import History
from lesa.predictor import BoundPredictor, Predictor
from lesa.schedule import Schedule


class MovingRule:
    """`Predictor.bind`, done again wherever the features have moved: a `lesa.forecast.Rule`."""

    def __init__(self, predictor: Predictor, schedule: Schedule, sigmas: torch.Tensor) -> None:
        self._predictor, self._schedule, self._sigmas = predictor, schedule, sigmas
        self._place = (torch.device("cpu"), torch.float32)
        self._bound: BoundPredictor = predictor.bind(schedule, sigmas)
        self.name = self._bound.name
        self.history_size = self._bound.history_size
        self.keeps_predictions = self._bound.keeps_predictions
        self.stages, self.sizes = self._bound.stages, self._bound.sizes

    def __call__(self, history: History, step: int) -> torch.Tensor:
        newest = history.features[0]
        place = (newest.device, newest.dtype)
        if place != self._place:
            self._bound = self._predictor.bind(
                self._schedule, self._sigmas, device=newest.device, dtype=newest.dtype
            )
            self._place = place
        return self._bound(history, step)
