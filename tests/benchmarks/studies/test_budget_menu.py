"""What knowledge of a sample is worth: on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.budget_menu import analyse, believed, table
from benchmarks.studies.error_meter import correlation

RANDOM = np.random.default_rng(3)
EASE = RANDOM.normal(size=4000)
TRUE = {str(count): 40.0 + count + 2.0 * EASE for count in (8, 9, 10, 11, 12)}


@pytest.mark.parametrize("r", [0.3, 0.9])
def test_what_is_believed_correlates_as_asked_and_is_unbiased(r: float) -> None:
    thought = believed(TRUE, r, RANDOM.normal(size=len(EASE)))["10"]
    assert correlation(thought, TRUE["10"]) == pytest.approx(r, abs=0.03)
    slope = np.polyfit(thought, TRUE["10"], 1)[0]
    assert slope == pytest.approx(1.0, abs=0.1) and thought.mean() == pytest.approx(TRUE["10"].mean(), abs=0.1)


def test_more_knowledge_lifts_the_tail_more_at_the_same_mean() -> None:
    true = {count: values[:1000] for count, values in TRUE.items()}
    document = {"workload": "tiny", "samples": 1000, "prompts": 32, **analyse(true, "10")}
    tails = [row["psnr_p5"] for row in document["knowledge"]]
    assert tails == sorted(tails) and document["oracle"]["psnr_p5"] == pytest.approx(tails[-1])
    assert tails[-1] > document["budgets"]["10"]["psnr_p5"] + 1.0
    assert all(row["mean_full_steps"] == pytest.approx(10, abs=0.05) for row in document["knowledge"])
    text = table(document)
    assert all(f"| knowledge of r = {row['r']:g} | 10.0" in text for row in document["knowledge"])
