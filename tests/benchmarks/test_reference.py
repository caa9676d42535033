"""The kept table of a workload says what its report says."""

import json
from pathlib import Path

import pytest

from benchmarks.reference import collect, table
from lesa.atomic import write_json
from tests.helpers.evaluation import results


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("reports", "metrics"):
        (tmp_path / "data" / folder / "tiny").mkdir(parents=True)
    write_json(tmp_path / "data/reports/tiny/results.json", results().to_json())
    write_json(tmp_path / "data/metrics/tiny/base.json", {"agreement": 0.9666, "vae_psnr": 30.0984})
    write_json(tmp_path / "data/metrics/tiny/decision.json", {"promote": True})
    return tmp_path


def test_every_row_is_there_with_what_lesa_has_over_it(root: Path) -> None:
    document = collect("tiny", root)
    measured = results()
    assert set(document["budgets"]) == set(measured.budgets)
    for row in measured.rows:
        kept = document["budgets"][row.budget][row.method]
        assert kept["psnr"]["mean"] == row.psnr.mean
        if row.method != "lesa":
            assert kept["lesa_minus_this"]["mean"] == measured.differences(row.budget)[row.method].mean
    text = table(json.loads(json.dumps(document)))
    assert text.count("\n## ") == len(measured.budgets)
    for row in measured.rows:
        assert f"| {row.label} | {row.psnr.mean:.2f} [{row.psnr.low:.2f}, {row.psnr.high:.2f}] |" in text
    assert "agreement 0.9666, vae_psnr 30.1. Promoted." in text


def test_a_stage_that_has_not_run_is_named(root: Path) -> None:
    (root / "data/metrics/tiny/decision.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"decision.json: run make repro WORKLOAD=tiny first"):
        collect("tiny", root)
