"""The study of the closed loop's gradient: what a row trains, what it costs, how it is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies.model_gradient import ROWS, bill, rows_of, settings_of, table
from lesa.params_file import load_params

ROOT = Path(__file__).parents[3]


def test_rows_differ_in_share_and_length_alone_and_are_billed_for_it() -> None:
    workload = load_params(ROOT / "params.yaml", "flux-digits")
    whole = settings_of(workload, "whole", 3)
    assert (whole.seed, whole.closed_loop) == (3, workload.closed_loop)
    bills = {name: bill(settings_of(workload, name, 0), 10) for name in ROWS}
    a_step = 10 * workload.closed_loop.batch_size * workload.closed_loop.iterations
    assert bills["none"] == a_step and bills["whole"] == 3 * a_step and bills["a half"] == 2 * a_step
    assert bills["none, same bill"] == bills["whole"] == bills["a half, same bill"] and bills["no closed loop"] == 0


def test_differences_are_of_the_same_samples_and_the_gain_is_what_the_loop_brings() -> None:
    found = {
        "whole": [{"psnr": [60.0, 50.0], "bill": 30.0}, {"psnr": [62.0, 52.0], "bill": 30.0}],
        "none": [{"psnr": [59.0, 49.0], "bill": 10.0}, {"psnr": [61.0, 51.0], "bill": 10.0}],
        "no closed loop": [{"psnr": [56.0, 46.0], "bill": 0.0}, {"psnr": [58.0, 48.0], "bill": 0.0}],
    }
    rows = rows_of(found, ["a", "b"])
    assert rows["whole"]["psnr_mean"] == 56.0 and rows["whole"]["by_seed"] == [55.0, 57.0]
    assert rows["none"]["minus_whole"] == pytest.approx({"mean": -1.0, "low": -1.0, "high": -1.0})
    about = {"workload": "tiny", "full": 10, "samples": 2, "prompts": 2, "seeds": [0, 1], "rows": rows}
    line = next(line for line in table(about).splitlines() if line.startswith("| none"))
    assert line == "| none | 10 | 55.00 | 54.00, 56.00 | 49.30 | -1.00 [-1.00, -1.00] | 75% |"
