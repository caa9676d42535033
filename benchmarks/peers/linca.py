"""LinCa (arXiv 2608.17973): a learned invertible map splits a feature into parts that move at different orders.

`z = g(h)`, `z = (z0, z1, z2)`; at a predicted step z0 stays, z1 goes on at first and z2 at second order (finite
differences over the newest full steps, Hermite basis, contraction 0.71), and `h_hat = g^-1(z_hat)`. One map for each
third of the steps. The loss is the squared error of `h_hat` plus 0.1 times those of the three parts, divided by the
distance to the newest full step, on true features.

The paper's text could not be read, so these are choices:
    the map      L blocks, each an invertible C x C matrix and two additive couplings whose networks have three layers,
                 C/2 -> hidden -> hidden -> C/2. The released networks have exactly as many parameters as that
                 (33.4 M at C = 3072, three blocks, hidden 256; 78.6 M with six blocks, hidden 512).
    its start    the identity: matrices the identity, the couplings' last layers zero.
    its size     two blocks, hidden 128, parts in the proportion 4 : 1 : 1 (the settings reported as best).
    training     on the schedule it is sampled with, AdamW at 1e-3 falling to a hundredth (published: 1e-4 for far
                 larger networks and longer), batches of whole trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lesa.models.flops import ModelFlops
from lesa.peers.method import Method
from lesa.peers.rules import Taylor, hooked_method, taylor_difference
from lesa.predictor.rule import History, WithoutStages
from lesa.recording.dataset import Trajectories, draw
from lesa.schedule import Schedule

BLOCKS, HIDDEN, STAGES = 2, 128, 3
PART_WEIGHT = 0.1
CONTRACTION = 0.71
HISTORY = 3  # full steps, for second order
BATCH, LEARNING_RATE = 16, 1e-3
BASIS = Taylor(order=2, name="hermite", history_size=HISTORY, contraction=CONTRACTION).basis


class Coupling(nn.Module):
    """An invertible matrix, then each half of the channels moved by a network of the other half."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = channels // 2
        self.matrix = nn.Parameter(torch.eye(channels))
        self.up = _network(self.first, hidden, channels - self.first)
        self.down = _network(channels - self.first, hidden, self.first)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        a, b = (h @ self.matrix).split([self.first, h.shape[-1] - self.first], dim=-1)
        b = b + self.up(a)
        return torch.cat([a + self.down(b), b], dim=-1)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        a, b = z.split([self.first, z.shape[-1] - self.first], dim=-1)
        a = a - self.down(b)
        joined = torch.cat([a, b - self.up(a)], dim=-1)
        return joined @ torch.linalg.inv(self.matrix)


class Decomposition(nn.Module):
    """Feature [..., C] -> parts of the orders 0, 1 and 2, and back."""

    def __init__(self, channels: int, blocks: int = BLOCKS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(channels, hidden) for _ in range(blocks))
        sixth = max(channels // 6, 1)
        self.widths = (channels - 2 * sixth, sixth, sixth)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in self.blocks:
            h = block(h)
        return h.split(self.widths, dim=-1)

    def inverse(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        h = torch.cat(list(parts), dim=-1)
        for block in reversed(self.blocks):
            h = block.inverse(h)
        return h


def forecast(parts: Sequence[tuple[torch.Tensor, ...]], places: tuple[int, ...], step: int) -> list[torch.Tensor]:
    """Each part at `step`, from those of the newest full steps `places` (newest first), at its own order."""
    predicted = []
    for order in range(3):
        past = tuple(each[order] for each in parts)
        value = past[0]
        for k in range(1, min(order, len(past) - 1) + 1):
            value = value + BASIS(k, step - places[0]) * taylor_difference(past, places, k)
        predicted.append(value)
    return predicted


@dataclass(frozen=True)
class LinCa(WithoutStages):
    """The trained maps as a `lesa.predictor.rule.Rule`."""

    maps: Sequence[Decomposition] = field(repr=False)
    num_steps: int
    name: str = "linca"
    history_size: int = HISTORY
    keeps_predictions: bool = False

    @torch.no_grad()
    def __call__(self, history: History, step: int) -> torch.Tensor:
        stage = stage_of(step, self.num_steps)
        newest = history.features[0]
        parts = []
        for age, feature in enumerate(history.features):
            if ("linca part", stage, age, 0) not in history.memo:
                for order, part in enumerate(self.maps[stage](feature.float())):
                    history.memo["linca part", stage, age, order] = part
            parts.append(tuple(history.memo["linca part", stage, age, order] for order in range(3)))
        return self.maps[stage].inverse(forecast(parts, history.steps, step)).to(newest.dtype)


def stage_of(step: int, num_steps: int) -> int:
    """Which third of the run."""
    return step * STAGES // num_steps


def train_linca(
    data: Trajectories,
    schedule: Schedule,
    *,
    iterations: int = 300,
    seed: int = 0,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> LinCa:
    """Fit the maps of all stages to true features, one stage after the other."""
    maps = []
    for stage in range(STAGES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + stage)
            maps.append(Decomposition(data.channels))
        steps = [s for s in schedule.predicted_steps if stage_of(s, schedule.num_steps) == stage]
        if steps:
            _fit(maps[-1], data, schedule, steps, iterations, seed + stage, report)
    return LinCa([each.requires_grad_(False).eval() for each in maps], schedule.num_steps)


@torch.enable_grad()
def _fit(
    net: Decomposition,
    data: Trajectories,
    schedule: Schedule,
    steps: Sequence[int],
    iterations: int,
    seed: int,
    report: Callable[[int, dict[str, float]], None] | None,
) -> None:
    past = {step: schedule.anchors(step, HISTORY) for step in steps}
    needed = sorted({*steps, *(full for full_steps in past.values() for full in full_steps)})
    row = {step: index for index, step in enumerate(needed)}
    targets = [row[step] for step in steps]
    distances = torch.tensor([step - past[step][0] for step in steps], dtype=torch.float32)
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-5)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: 0.01 + 0.99 * (1 + math.cos(math.pi * done / max(iterations, 1))) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    for iteration in range(iterations):
        true = data.feature_batch(draw(generator, len(data), BATCH), needed)
        parts = net(true)
        each = []
        for step in steps:
            history = [tuple(part[:, row[full]] for part in parts) for full in past[step]]
            each.append(forecast(history, past[step], step))
        predicted = [torch.stack(order, dim=1) for order in zip(*each, strict=True)]
        errors = (net.inverse(predicted) - true[:, targets]).square().mean(dim=(0, 2, 3))
        for order, part in enumerate(parts):
            errors = errors + PART_WEIGHT * (predicted[order] - part[:, targets]).square().mean(dim=(0, 2, 3))
        loss = (errors / distances).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        cosine.step()
        if report is not None and (iteration + 1) % 100 == 0:
            report(iteration + 1, {"linca_loss": float(loss.detach())})


def linca_method(budget: str, schedule: Schedule, rule: LinCa) -> Method:
    """A trained LinCa through our hook."""
    return hooked_method(
        "linca",
        "LinCa (our choices)",
        budget,
        schedule,
        lambda schedule, sigmas: rule,
        settings={"blocks": BLOCKS, "hidden": HIDDEN, "stages": STAGES, "contraction": CONTRACTION},
        own_flops=lambda model, sigmas: linca_flops(schedule, model),
    )


def linca_flops(schedule: Schedule, model: ModelFlops, blocks: int = BLOCKS, hidden: int = HIDDEN) -> float:
    """Every full step is split once for each stage that reads it, every predicted one put together once."""
    channels = float(model.channels)
    network = channels / 2 * hidden * 2 + hidden**2
    once = 2.0 * blocks * (channels**2 + 2 * network) * model.tokens
    splits = {
        (full, stage_of(step, schedule.num_steps))
        for step in schedule.predicted_steps
        for full in schedule.anchors(step, HISTORY)
    }
    return once * (len(splits) + len(schedule.predicted_steps))


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
