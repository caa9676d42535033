from __future__ import annotations

import dataclasses

import pytest

from benchmarks.results_files import failed_searches, warned
from lesa.evaluation.results import Results
from tests.helpers.evaluation import results


def with_psnr(values: dict[tuple[str, str], float]) -> Results:
    """The small evaluation with other mean PSNRs, in the samples and in the rows."""
    found = results()
    samples = {key: dict(metrics) for key, metrics in found.samples.items()}
    rows = []
    for row in found.rows:
        key = (row.budget, row.method)
        mean = values.get(key, 20.0 + row.computed_steps)
        samples[key]["psnr"] = samples[key]["psnr"] * 0 + mean
        rows.append(dataclasses.replace(row, psnr=dataclasses.replace(row.psnr, mean=mean)))
    return dataclasses.replace(found, rows=tuple(rows), samples=samples)


def test_peers_that_gain_by_steps_are_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    judged = with_psnr({})
    capsys.readouterr()
    assert warned(judged) == []
    assert capsys.readouterr().err == ""


def test_a_peer_that_loses_by_steps_is_named_with_its_better_row(capsys: pytest.CaptureFixture[str]) -> None:
    judged = with_psnr({("1.43x", "taylor1"): 21.0, ("1.67x", "taylor1"): 21.5})
    capsys.readouterr()
    (line,) = warned(judged)
    assert line.startswith("1.43x/taylor1: 21.00 dB with 7 computed steps, 21.50 dB with 6 at 1.67x (-0.50")
    assert "search it again" in line and f"warning: {line}\n" == capsys.readouterr().err


def test_our_own_rows_and_equal_steps_are_no_matter() -> None:
    assert failed_searches(with_psnr({("1.43x", "lesa"): 1.0})) == []
    found = with_psnr({("1.43x", "taylor1"): 1.0})
    same = [dataclasses.replace(row, computed_steps=6.0) for row in found.rows]
    assert failed_searches(dataclasses.replace(found, rows=tuple(same))) == []
