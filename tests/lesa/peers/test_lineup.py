from __future__ import annotations

import pytest
import torch

from lesa.models.pipelines import sample
from lesa.models.probe import probe
from lesa.peers.lineup import Searched, fixed_peers, searched_method, searched_peers, taylorseer_schedule
from lesa.schedule import Schedule
from tests.helpers.bundles import CALL, NUM_STEPS
from tests.helpers.evaluation import pipeline, sigmas

SCHEDULE = Schedule.uniform(NUM_STEPS, 3)  # 0 1 2 3 6 9
FOUND = (
    Searched(method="taylor1", num_steps=NUM_STEPS, evaluations=6, steps=(0, 2, 3, 5, 7, 8), psnr=30.0, runs=9),
    Searched(
        method="hicache",
        num_steps=NUM_STEPS,
        evaluations=6,
        steps=(0, 1, 3, 5, 7, 8),
        psnr=31.0,
        runs=9,
        options={"order": 1, "contraction": 0.6},
    ),
    Searched(method="unipc2", num_steps=NUM_STEPS, evaluations=6, steps=(0, 1, 3, 5, 7, 8), psnr=31.0, runs=9),
    Searched(method="heun", num_steps=NUM_STEPS, evaluations=6, steps=(0, 4, 6, 8), psnr=29.0, runs=9),
    Searched(method="taylor1", num_steps=NUM_STEPS, evaluations=5, steps=(0, 2, 4, 6, 8), psnr=28.0, runs=9),
    Searched(method="taylor1", num_steps=20, evaluations=6, steps=(0, 2, 4, 6, 8, 15), psnr=28.0, runs=9),
)


def test_taylorseers_own_rule() -> None:
    ten = taylorseer_schedule(50, 10)
    eight = taylorseer_schedule(50, 8)
    assert ten is not None and ten.full_steps == (0, 1, 2, 8, 14, 20, 26, 32, 38, 44)
    assert eight is not None and eight.full_steps == (0, 1, 2, 10, 18, 26, 34, 42)
    assert taylorseer_schedule(50, 24) is None  # N = 2 has 26, N = 3 has 18
    own = [
        method.schedule for method in fixed_peers("b", Schedule.uniform(50, 7)) if method.name.endswith("_own")
    ]
    assert own == [ten, ten]


def test_searched_rows_are_those_of_as_many_evaluations() -> None:
    names = [method.name for method in searched_peers("b", SCHEDULE, FOUND)]
    assert names == ["taylor1_searched", "hicache_searched", "unipc2_searched", "heun_searched"]
    everything = [method.name for method in fixed_peers("b", SCHEDULE, FOUND)]
    assert everything[-4:] == names and len(set(everything)) == len(everything)


@pytest.mark.parametrize("found", FOUND[:4], ids=lambda found: found.method)
def test_a_searched_peer_runs_on_its_steps_and_says_so(found: Searched) -> None:
    pipe, method = pipeline(), searched_method("b", found)
    arguments = (pipe, ["a thin seven"], [3], method.call(CALL), "latent")
    with method.using(pipe, sigmas()), probe(pipe) as trace:
        drawn = sample(*arguments)
    assert trace.computed == 6 and torch.isfinite(drawn).all()
    shown = method.settings.get("grid", method.settings.get("full_steps"))
    assert shown == list(found.steps)
    assert method.settings["tuning_psnr"] == found.psnr and method.settings["search_runs"] == 9
    assert "order 2" not in method.label or found.method == "unipc2"  # settings that were found, not the table's
    for name, value in found.options.items():
        assert method.settings[name] == value
